"""Where text comes from: the Python sources on this machine, local files, or a Hugging Face dataset.

Every corpus is an iterable of `Document`s with a stable name. One rule decides what is held out, by name alone, so that the language
model's training, the SAEs' training and every evaluation agree on it across Python versions and machines.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

HELD_OUT_ONE_IN = 20
MIN_CHARACTERS = 200
PIECE_CHARACTERS = 10_000
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl")
_NOT_PROSE = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "ensurepip",
    "pydoc_data",
}


class TextKind(Enum):
    stdlib = "stdlib"
    """Python's own library sources: on every machine, no network."""
    packages = "packages"
    """Python sources of every installed package: more text, but different on every machine."""
    files = "files"
    """Local files and folders, `TextConfig.paths`."""
    dataset = "dataset"
    """A Hugging Face dataset, streamed in order."""


@dataclass
class TextConfig:
    """Which text to read. Raises ValueError for fields that the chosen kind lacks or would ignore."""

    kind: TextKind = TextKind.stdlib
    paths: list[str] = field(default_factory=list)
    """kind=files: files, or folders searched for text files."""
    dataset: str | None = None
    """kind=dataset: a hub name such as `Skylion007/openwebtext`, or a local dataset folder."""
    dataset_config: str | None = None
    split: str = "train"
    text_column: str = "text"
    max_documents: int | None = None
    """Reads at most so many documents on each side of the held-out split."""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, TextKind):
            if self.kind not in TextKind.__members__:
                raise ValueError(f"text.kind={self.kind!r} is unknown. Choose one of {', '.join(TextKind.__members__)}.")
            self.kind = TextKind[self.kind]
        if self.kind is TextKind.files and not self.paths:
            raise ValueError("text.kind=files needs at least one file or folder: set text.paths=[FOLDER].")
        if self.kind is TextKind.dataset and not self.dataset:
            raise ValueError("text.kind=dataset needs a name: set text.dataset=Skylion007/openwebtext, for example.")
        if self.paths and self.kind is not TextKind.files:
            raise ValueError(f"text.paths={list(self.paths)} would be ignored by text.kind={self.kind.value}. Set text.kind=files.")
        if self.dataset and self.kind is not TextKind.dataset:
            raise ValueError(f"text.dataset={self.dataset!r} would be ignored by text.kind={self.kind.value}. Set text.kind=dataset.")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"text.max_documents={self.max_documents} must be at least 1, or null for all documents.")

    @property
    def streamed(self) -> bool:
        """True where the text is too large to hold and is read in order, once per epoch."""
        return self.kind is TextKind.dataset


@dataclass(frozen=True)
class Document:
    """One text with a stable name, such as `stdlib/json/decoder.py`."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """True for one name in `HELD_OUT_ONE_IN`, decided by a hash of the name: no list to keep, the same on every machine."""
    return _name_hash(name) % HELD_OUT_ONE_IN == 0


def documents(config: TextConfig, held_out: bool) -> Iterator[Document]:
    """The training documents of a corpus, or its held-out ones.

    Local corpora: exact copies are read once and a copy of a held-out text never trains. Files longer than `PIECE_CHARACTERS` are cut, at
    line ends, into documents of their own named `file#0001`, so that one big file has a held-out part too. A corpus so small that the
    rule would hold out nothing (or everything) holds out the one document whose name hashes lowest. Raises ValueError for empty text.
    """
    if config.streamed:
        yield from islice(_streamed_side(config, held_out), config.max_documents)
    else:
        yield from local_split(config)[held_out]


def _streamed_side(config: TextConfig, held_out: bool) -> Iterator[Document]:
    assert config.dataset is not None
    seen = kept = 0
    for document in hugging_face_dataset(config.dataset, config.split, config.text_column, config.dataset_config):
        seen += 1
        if document.text.strip() and document.held_out == held_out:
            kept += 1
            yield document
    if not kept:
        side = "held-out" if held_out else "training"
        raise ValueError(
            f"dataset {config.dataset!r} (split {config.split!r}) has no {side} documents among {seen} rows; one row in {HELD_OUT_ONE_IN} is "
            "held out. Use a larger dataset, or save its text to a folder and use text.kind=files text.paths=[FOLDER]."
        )


def local_split(config: TextConfig) -> tuple[list[Document], list[Document]]:
    """(training, held out) of a local corpus, each sorted by name: both sides of `documents` from one reading."""
    match config.kind:
        case TextKind.stdlib:
            corpus = list(standard_library())
        case TextKind.packages:
            corpus = list(installed_packages())
        case _:
            files = list(local_files(config.paths))
            corpus = [piece for file in files for piece in _pieces(file, PIECE_CHARACTERS)]
            if len(corpus) == 1:
                corpus = list(_pieces(corpus[0], max(MIN_CHARACTERS, len(corpus[0].text) // HELD_OUT_ONE_IN)))
    corpus = [document for document in corpus if document.text.strip()]
    if not corpus:
        where = f"text.paths={list(config.paths)}" if config.kind is TextKind.files else f"text.kind={config.kind.value}"
        raise ValueError(f"{where} holds no text: every file is empty. Give files with text in them, or use text.kind=stdlib.")
    hidden = {document.name for document in corpus if document.held_out}
    if len(hidden) in (0, len(corpus)):
        hidden = {min((document.name for document in corpus), key=_name_hash)}
    seen: set[bytes] = set()
    split: tuple[list[Document], list[Document]] = ([], [])
    for document in sorted(corpus, key=lambda d: (d.name not in hidden, d.name)):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            split[document.name in hidden].append(document)
    if not split[False]:
        characters = sum(len(document.text) for document in corpus)
        raise ValueError(
            f"text of {len(corpus)} document(s) and {characters} characters is too little: training needs text beside the held-out part. "
            f"Give at least {2 * MIN_CHARACTERS} characters in one file, or two files that differ."
        )
    return split[False][: config.max_documents], split[True][: config.max_documents]


def _pieces(document: Document, size: int) -> Iterator[Document]:
    """The document itself, or pieces of at most `size` characters that end at a line or word end where there is one in their second half."""
    text, start, number = document.text, 0, 1
    if len(text) <= size:
        yield document
        return
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            middle = start + size // 2
            line_end = text.rfind("\n", middle, end)
            cut = line_end if line_end >= 0 else text.rfind(" ", middle, end)
            end = cut + 1 if cut >= 0 else end
        yield Document(f"{document.name}#{number:04d}", text[start:end])
        start, number = end, number + 1


def standard_library() -> Iterator[Document]:
    """Python's own library sources and help topics: about 10 MB of real text on every Python machine, needing no network.

    Tests and generated tables are left out; they are not installed everywhere.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    yield from _python_files(root, "stdlib", skip=_NOT_PROSE)
    from pydoc_data import topics

    for title, text in sorted(topics.topics.items()):
        if len(text) >= MIN_CHARACTERS:
            yield Document(f"stdlib/pydoc/{title}", text)


def installed_packages(max_characters: int = 100_000) -> Iterator[Document]:
    """Python sources of every installed package, each file cut at `max_characters` (the longest are generated tables)."""
    for root in sorted({Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")}):
        for document in _python_files(root, "packages", skip={"__pycache__"}):
            yield Document(document.name, document.text[:max_characters])


def local_files(paths: Iterable[str | Path], suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> Iterator[Document]:
    """Files, and folders searched for files with the given suffixes. A `.jsonl` file holds one document per line under the key `text`.

    Raises FileNotFoundError for a path that does not exist and ValueError for a folder without such files.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"text path {str(path)!r} does not exist. Give a file, or a folder holding {', '.join(suffixes)} files.")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
        if not files:
            raise ValueError(f"text folder {str(path)!r} holds no {', '.join(suffixes)} files. Put text there or give a file.")
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            if file.suffix == ".jsonl":
                yield from _json_lines(file, name)
            else:
                yield Document(name, file.read_text(encoding="utf-8", errors="replace"))


def hugging_face_dataset(name: str, split: str = "train", text_column: str = "text", config: str | None = None) -> Iterator[Document]:
    """Streams a Hugging Face dataset (such as `Skylion007/openwebtext`) without downloading it whole, or reads a local dataset folder.

    Raises ConnectionError when the hub cannot be reached, ValueError for an unknown split or config and for a text column that is not there.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("text.kind=dataset needs the datasets package: pip install datasets, or use text.kind=stdlib.") from error
    try:
        iterator = iter(load_dataset(name, config, split=split, streaming=True))
        first: dict[str, Any] | None = next(iterator, None)
    except Exception as error:
        message = (
            f"dataset {name!r} (config {config!r}, split {split!r}) could not be opened: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}. Check the name, config and split, and the network, "
            "or train on local text: text.kind=files text.paths=[FOLDER], or text.kind=stdlib."
        )
        unreachable = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        raise (ConnectionError if unreachable else ValueError)(message) from error
    if first is not None and not isinstance(first.get(text_column), str):
        texts = [column for column, value in first.items() if isinstance(value, str)]
        raise ValueError(f"dataset {name!r} has no text column {text_column!r}. Set text.text_column to one of its text columns: {texts}.")
    index = 0
    while first is not None:
        yield Document(f"{name}/{split}/{index}", first[text_column] or "")
        first, index = next(iterator, None), index + 1


def _python_files(root: Path, prefix: str, skip: set[str]) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skip & set(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few library files are deliberately not UTF-8; others may be unreadable to this user
        if len(text) >= MIN_CHARACTERS:
            yield Document(f"{prefix}/{relative.as_posix()}", text)


def _json_lines(file: Path, name: str) -> Iterator[Document]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield Document(f"{name}:{number}", json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: expected a JSON object with a 'text' key ({error}).") from error

"""Where text comes from: the Python sources on this machine, local files, or a Hugging Face dataset.

Every corpus is an iterable of `Document`s with a stable name, which alone decides what is held out (`document.is_held_out`).
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

from switch_sae.activations.document import HELD_OUT_ONE_IN, Document, is_held_out, name_hash
from switch_sae.activations.text_dataset import hugging_face_dataset
from switch_sae.activations.text_files import local_files
from switch_sae.checks import Settings

__all__ = [
    "HELD_OUT_ONE_IN",
    "Document",
    "TextConfig",
    "TextKind",
    "documents",
    "first_documents",
    "installed_packages",
    "is_held_out",
    "local_split",
    "standard_library",
    "text_hash",
]

MIN_CHARACTERS = 200
PIECE_CHARACTERS = 10_000
FIRST_DOCUMENTS = 64
"""Of each side of a stream: what it is told apart by."""
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


_READ_BY = {
    "paths": {TextKind.files},
    "dataset": {TextKind.dataset},
    "dataset_config": {TextKind.dataset},
    "dataset_revision": {TextKind.dataset},
    "split": {TextKind.dataset},
    "text_column": {TextKind.dataset, TextKind.files},
}
"""The kinds of text that read a setting; the others would ignore it."""


@dataclass
class TextConfig(Settings):
    """Which text to read. Raises ValueError for fields that the chosen kind lacks or would ignore."""

    prefix = "text."
    kind: TextKind = TextKind.stdlib
    paths: list[str] = field(default_factory=list)
    """kind=files: files, or folders searched for text files."""
    dataset: str | None = None
    """kind=dataset: a hub name such as `Skylion007/openwebtext`, or a local folder or file of a dataset."""
    dataset_config: str | None = None
    dataset_revision: str | None = None
    """A commit or branch on the hub; null takes the newest, whose commit the run folder notes."""
    split: str = "train"
    text_column: str = "text"
    """kind=dataset, and .jsonl files: where a row holds its text."""
    max_documents: int | None = None
    """Reads at most so many documents on each side of the held-out split."""

    def __post_init__(self) -> None:
        if self.kind is TextKind.files and not self.paths:
            raise ValueError("text.kind=files needs at least one file or folder: set text.paths=[FOLDER].")
        if self.kind is TextKind.dataset and not self.dataset:
            raise ValueError("text.kind=dataset needs a name: set text.dataset=Skylion007/openwebtext, for example.")
        for name in ignored(self.kind, vars(self)):
            kinds = " or ".join(f"text.kind={kind.value}" for kind in TextKind if kind in _READ_BY[name])
            raise ValueError(
                f"text.{name}={getattr(self, name)!r} would be ignored by text.kind={self.kind.value}. Set {kinds}, or leave text.{name} out."
            )
        if not all(self.paths):
            raise ValueError(f"text.paths={list(self.paths)} holds an empty path. Give files or folders; the working directory is `.`.")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"text.max_documents={self.max_documents} must be at least 1, or null for all documents.")

    @property
    def streamed(self) -> bool:
        """True where the text is too large to hold and is read in order, once per epoch."""
        return self.kind is TextKind.dataset


def ignored(kind: TextKind, settings: dict[str, Any]) -> list[str]:
    """The settings that have another value than usual but are not read by this kind of text."""
    usual = {f.name: f.default for f in fields(TextConfig)} | {"paths": []}
    return [name for name, kinds in _READ_BY.items() if kind not in kinds and name in settings and settings[name] != usual[name]]


def without_ignored(plain: dict[str, Any]) -> dict[str, Any]:
    """Saved settings without those that their kind of text ignores."""
    kind = TextKind.__members__.get(plain.get("kind", TextKind.stdlib.name))
    return {key: value for key, value in plain.items() if kind is None or key not in ignored(kind, plain)}


def documents(config: TextConfig, held_out: bool) -> Iterator[Document]:
    """The training documents of a corpus, or its held-out ones.

    Local corpora: exact copies are read once and a copy of a held-out text never trains. Files longer than `PIECE_CHARACTERS` are cut, at
    line ends, into documents of their own named `file#0001`, so that one big file has a held-out part too. A corpus so small that the
    rule would hold out nothing (or everything) holds out the one document whose name hashes lowest. Raises ValueError for empty text, and as
    `local_files` and `hugging_face_dataset` do.
    """
    if config.streamed:
        yield from islice(_streamed_side(config, held_out), config.max_documents)
    else:
        yield from local_split(config)[held_out]


def _streamed_side(config: TextConfig, held_out: bool) -> Iterator[Document]:
    seen = kept = 0
    for document in _stream(config):
        seen += 1
        if document.text.strip() and document.held_out == held_out:
            kept += 1
            yield document
    if not kept:
        raise _one_sided(config, held_out, seen)


def _stream(config: TextConfig) -> Iterator[Document]:
    assert config.dataset is not None
    return hugging_face_dataset(config.dataset, config.split, config.text_column, config.dataset_config, config.dataset_revision)


def _one_sided(config: TextConfig, held_out: bool, seen: int) -> ValueError:
    side = "held-out" if held_out else "training"
    return ValueError(
        f"dataset {config.dataset!r} (split {config.split!r}) has no {side} documents among {seen} rows, of which empty ones do not count; one row "
        f"in {HELD_OUT_ONE_IN} is held out. Use a larger dataset, or save its text to a folder and use text.kind=files text.paths=[FOLDER]."
    )


def first_documents(config: TextConfig) -> tuple[list[Document], list[Document]]:
    """The first `FIRST_DOCUMENTS` (training, held-out) documents of a streamed dataset: a short look at what it is.

    Raises ValueError where the dataset ends without documents of one side.
    """
    wanted, at_most = min(FIRST_DOCUMENTS, config.max_documents or FIRST_DOCUMENTS), 8 * FIRST_DOCUMENTS * HELD_OUT_ONE_IN
    sides: tuple[list[Document], list[Document]] = ([], [])
    seen = 0
    for seen, document in enumerate(islice(_stream(config), at_most), 1):  # noqa: B007
        side = sides[document.held_out]
        if document.text.strip() and len(side) < wanted:
            side.append(document)
        if len(sides[False]) == len(sides[True]) == wanted:
            break
    if not all(sides) and seen < at_most:
        raise _one_sided(config, not sides[True], seen)
    return sides


def text_hash(corpus: list[Document]) -> str:
    """A hash of documents' texts, in order."""
    digest = hashlib.sha256()
    for document in corpus:
        text = document.text.encode()
        digest.update(f"{len(text)} ".encode() + text)
    return digest.hexdigest()[:16]


def local_split(config: TextConfig) -> tuple[list[Document], list[Document]]:
    """(training, held out) of a local corpus, each sorted by name: both sides of `documents` from one reading."""
    match config.kind:
        case TextKind.stdlib:
            corpus = list(standard_library())
        case TextKind.packages:
            corpus = list(installed_packages())
        case _:
            files = list(local_files(config.paths, config.text_column))
            corpus = [piece for file in files for piece in _pieces(file, PIECE_CHARACTERS)]
            if len(corpus) == 1:
                corpus = list(_pieces(corpus[0], max(MIN_CHARACTERS, len(corpus[0].text) // HELD_OUT_ONE_IN)))
    corpus = [document for document in corpus if document.text.strip()]
    if not corpus:
        where = f"text.paths={list(config.paths)}" if config.kind is TextKind.files else f"text.kind={config.kind.value}"
        raise ValueError(f"{where} holds no text: every file is empty. Give files with text in them, or use text.kind=stdlib.")
    hidden = {document.name for document in corpus if document.held_out}
    if len(hidden) in (0, len(corpus)):
        hidden = {min((document.name for document in corpus), key=name_hash)}
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

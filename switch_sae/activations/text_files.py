"""Local files as documents: which of them are text and in which encoding, one JSON object a line, and what documents are called."""

import codecs
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switch_sae.activations.document import Document
from switch_sae.files import RunError, Say, tell

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".ndjson")
"""What a folder is searched for, in capitals too. A file that is named itself may have any suffix that is not known to be something else."""
_LINE_SUFFIXES = (".jsonl", ".ndjson")
_DATASET_SUFFIXES = (".parquet", ".arrow", ".json", ".csv", ".tsv")
_PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
_OFFICE_SUFFIXES = (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".mobi", ".ppt", ".pptx", ".xls", ".xlsx", ".ods", ".ipynb")
_MAGIC = {
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ\x00": ".xz",
    b"BZh91AY&SY": ".bz2",
    b"PK\x03\x04": ".zip",
    b"7z\xbc\xaf": ".7z",
    b"%PDF-": ".pdf",
    b"{\\rtf": ".rtf",
}
"""First bytes that tell a format, whatever the file is called."""
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_ODD_SHARE = 1e-3
"""A text in which more characters than this are NUL or no UTF-8 is no text, or in another encoding."""
_NAMED_AT_MOST = 3


class _NotText(ValueError):
    """A file that holds something else; the message says what to do."""


def expanded(path: str | Path) -> Path:
    """The path with `~` as the home folder; one of an unknown user stays as it is, and does not exist."""
    return Path(os.path.expanduser(path))


def local_files(paths: Iterable[str | Path], text_column: str = "text", say: Say = tell) -> Iterator[Document]:
    """Files, and folders searched for text files, through links too. A `.jsonl` file holds one document per line, under the key `text_column`.

    Documents are named by their place below the given folder, or by the name of the given file; where two given paths have one name in common, by
    their place below the folder that holds all given paths. Says what a search leaves out (what is hidden aside).
    Raises FileNotFoundError for a path that does not exist, RunError for what cannot be read, and ValueError for what is not text.
    """
    roots = list(dict.fromkeys(expanded(path).absolute() for path in paths))
    files = list({file: (file, root) for root in reversed(roots) for file in _text_files(root, say)}.values())
    if text_column != "text" and not any(_suffix(file) in _LINE_SUFFIXES for file, _ in files):
        raise ValueError(f"text.text_column={text_column!r} would be ignored: no text file ends in {' or '.join(_LINE_SUFFIXES)}. Leave it out.")
    problems: list[str] = []
    for (file, _), name in zip(files, _names(files, roots), strict=True):
        try:
            yield from _documents_of(file, name, text_column)
        except _NotText as problem:  # all of them in one message, so that they can be mended in one go
            problems.append(str(problem))
    if problems:
        others = f" Likewise {len(problems) - 1} more, the next: {problems[1]}" if len(problems) > 1 else ""
        raise ValueError(problems[0] + others)


def _names(files: list[tuple[Path, Path]], roots: list[Path]) -> list[str]:
    """A name for each (file, given path it was found by), all different."""
    names = [file.name if file == root else file.relative_to(root).as_posix() for file, root in files]
    clean = Path if len({os.path.abspath(file) for file, _ in files}) < len(files) else os.path.abspath  # `..` behind a link leads elsewhere
    together = os.path.commonpath([clean(root) for root in roots])
    while repeated := {name for name, count in Counter(names).items() if count > 1}:  # each round changes a name, and those below differ
        below = (Path(clean(file)).relative_to(together).as_posix() for file, _ in files)
        names = [place if name in repeated else name for place, name in zip(below, names, strict=True)]
    return names


def _text_files(root: Path, say: Say) -> list[Path]:
    """The given file itself, or the text files below the given folder."""
    with reading(root):
        if not root.exists():
            raise FileNotFoundError(f"text path {str(root)!r} does not exist. Give a file, or a folder holding {', '.join(TEXT_SUFFIXES)} files.")
        if root.is_file():
            if reason := _refusal(_suffix(root), root):
                raise ValueError(f"text file {str(root)!r} {reason}")
            return [root]
        if not root.is_dir():
            raise ValueError(f"text path {str(root)!r} is neither a file nor a folder. Give one that can be read more than once.")
        found: list[Path] = []
        left_out: list[Path] = []
        for path in files_below(root):
            (found if _suffix(path) in TEXT_SUFFIXES and path.is_file() else left_out).append(path)
    left_out = [path for path in left_out if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    rows = any(map(_holds_rows, left_out))
    fix = f"Rows of datasets are read with text.kind=dataset text.dataset={root}." if rows else ""
    if not found:
        holds = f", but {_counted(left_out)}" if left_out else ""
        raise ValueError(f"text folder {str(root)!r} holds no {', '.join(TEXT_SUFFIXES)} files{holds}. {fix or 'Put text there or give a file.'}")
    if left_out:
        some = f" ({', '.join(path.relative_to(root).as_posix() for path in found)})" if len(found) <= _NAMED_AT_MOST else ""
        say(f"{'note' if rows else 'text'}: of folder {root}, {len(found)} text file{'s' * (len(found) > 1)}{some}, {_size(found)}, "
            f"{'is' if len(found) == 1 else 'are'} read; left out: {_counted(left_out)}, {_size(left_out)}. {fix}".rstrip())  # fmt: skip
    return sorted(found)


def files_below(folder: Path) -> Iterator[Path]:
    """What is no folder below `folder`. Folders behind links come last, each once: a file that is met twice keeps the name it has without links."""
    waiting, links, seen = [folder], list[Path](), set[tuple[int, int]]()
    while waiting or links:
        current = waiting.pop() if waiting else links.pop(0)
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in sorted(current.iterdir()):
            if path.is_dir():
                (links if path.is_symlink() else waiting).append(path)
            else:
                yield path


def _documents_of(file: Path, name: str, text_column: str) -> Iterator[Document]:
    with reading(file):
        data = file.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise _NotText(f"text file {str(file)!r} is git-lfs's pointer to a file that was not downloaded. Get it with git lfs pull.")
    if reason := next((_refusal(kind, file) for magic, kind in _MAGIC.items() if data.startswith(magic)), ""):
        raise _NotText(f"text file {str(file)!r} {reason}")
    if _suffix(file) in _LINE_SUFFIXES:
        yield from _json_lines(file, name, _decoded(file, data, odd_share=0.0), text_column)
    else:
        yield Document(name, _decoded(file, data, _ODD_SHARE))


def _decoded(file: Path, data: bytes, odd_share: float) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says; a few undecodable bytes become U+FFFD. Line ends as Python reads them."""
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text, odd, first = data.decode(encoding), 0, len(data)
    except UnicodeDecodeError as error:
        text, first = data.decode(encoding, errors="replace"), error.start
        odd = max(1, text.count("\ufffd") - data.count("\ufffd".encode()))  # it may stand there itself
    if nul := text.count("\0"):
        odd, first = odd + nul, min(first, data.find(b"\0"))
    if odd > odd_share * len(text):
        line = data.count(b"\n", 0, first) + 1
        where = f"line {line}: byte {data[first]:#04x} at offset {first}"
        raise _NotText(
            f"text file {str(file)!r}, {where} is no {encoding.removesuffix('-sig').upper()}, and so are {odd / len(text):.2%} of its characters. "
            f"Text in another encoding is converted by iconv -f LATIN1 -t UTF-8 {file.name} > NEW.txt; what is no text must be left out."
        )
    return io.StringIO(text, newline=None).read()


def _json_lines(file: Path, name: str, text: str, column: str) -> Iterator[Document]:
    """One document a line. A line whose text is null has none and is passed over, as a dataset's row is."""
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        found = ""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = str(error)
        else:
            if not isinstance(row, dict):
                found = f"a {type(row).__name__}"
            elif column not in row:
                found = f"the keys {list(row)}"
        where = f"{file}, line {number}"
        if found:
            raise ValueError(
                f"{where}: expected a JSON object with a {column!r} key, found {found}. Mend the line, or name another key with text.text_column=KEY."
            )
        if row[column] is not None:
            yield Document(f"{name}:{number}", checked_text(row[column], where, column, row))


def checked_text(value: Any, where: str, column: str, row: dict[str, Any]) -> str:
    """The text of a row. Raises ValueError for what is none, and for half a surrogate pair, which no encoding and no tokenizer takes."""
    if not isinstance(value, str):
        texts = [key for key, other in row.items() if isinstance(other, str)]
        other_column = f", or set text.text_column to one of its text columns: {texts}" if texts else ""
        raise ValueError(
            f"{where}: {column!r} is {_short(value)}, of type {type(value).__name__}, but a document is a string (null has none and is passed over). "
            f"Mend the row{other_column}."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {column!r} has half a surrogate pair, {value[error.start]!r}, at character {error.start}: no character. Mend or drop the row."
        ) from error
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _holds_rows(path: Path) -> bool:
    """Whether a file that is not read as text is one of a dataset, compressed or not."""
    return _suffix(path) in _DATASET_SUFFIXES or (
        _suffix(path) in _PACKED_SUFFIXES and _suffix(path.with_suffix("")) in (*_LINE_SUFFIXES, *_DATASET_SUFFIXES)
    )


def _refusal(suffix: str, file: Path) -> str:
    """Why a file of this kind is not read, and what to do; empty for others."""
    if suffix in _DATASET_SUFFIXES:
        return f"holds rows ({suffix}), no plain text. Read them with text.kind=dataset text.dataset={file}."
    if suffix in _PACKED_SUFFIXES:
        rows = f", or read its rows with text.kind=dataset text.dataset={file}" if _holds_rows(file) else ""
        return f"is compressed or an archive ({suffix}). Unpack it{rows}."
    if suffix in _OFFICE_SUFFIXES:
        return f"is a document with a format of its own ({suffix}). Save its words as plain text (.txt) first."
    return ""


def _counted(paths: list[Path]) -> str:
    """Files by suffix, the most frequent first: `12 .parquet, 1 without suffix`."""
    kinds = Counter("link to nothing" if not path.exists() else _suffix(path) or "without suffix" for path in paths)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6)) + (", ..." if len(kinds) > 6 else "")


def _size(paths: list[Path]) -> str:
    size = sum(path.stat().st_size for path in paths if path.is_file())
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever keeps `path` from being read becomes one message."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # our own words
            raise
        raise RunError(f"cannot read {error.filename or path}: {error.strerror or error}. Make it readable, or leave it out.") from error

"""Hugging Face datasets as documents: of the hub, of local folders and files, and what `Dataset.save_to_disk` leaves; and which version they are."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from switch_sae.activations.document import Document
from switch_sae.activations.text_files import checked_text, expanded, files_below, reading

_SAMPLED_BYTES = 64 * 1024**2
_CHUNK_BYTES = 16 * 1024


def hugging_face_dataset(
    name: str, split: str = "train", text_column: str = "text", config: str | None = None, revision: str | None = None
) -> Iterator[Document]:
    """Streams a Hugging Face dataset (such as `Skylion007/openwebtext`) without downloading it whole, or reads a local folder or file of one.

    A row whose text is null gives an empty document. Raises ConnectionError when the hub cannot be reached, ValueError for an unknown split or
    config, for a text column that is not there, and for a row that is no text or cannot be read.
    """
    what = f"dataset {name!r} (config {config!r}, split {split!r})"
    try:
        rows = iter(_opened(name, split, config, revision))
        row: dict[str, Any] | None = next(rows, None)
    except (_Refused, ImportError):
        raise
    except Exception as error:
        raise _explained(f"{what} could not be opened", error) from error
    index = 0
    while row is not None:
        if text_column not in row:
            texts = [column for column, value in row.items() if isinstance(value, str)]
            raise ValueError(f"dataset {name!r} has no text column {text_column!r}. Set text.text_column to one of its text columns: {texts}.")
        text = row[text_column]
        yield Document(f"{name}/{split}/{index}", "" if text is None else checked_text(text, f"dataset {name!r}, row {index}", text_column, row))
        index += 1
        try:
            row = next(rows, None)
        except Exception as error:
            raise _explained(f"{what} could not be read at row {index}", error) from error


class _Refused(ValueError):
    """Settings that the dataset cannot follow; the message says it all."""


def _opened(name: str, split: str, config: str | None, revision: str | None) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError("text.kind=dataset needs the datasets package: pip install datasets, or use text.kind=stdlib.") from error
    place = expanded(name)
    if not place.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise _Refused(f"dataset {name!r} does not exist. Give a folder or file of a dataset, or a name on the hub.")
        rows: Iterable[dict[str, Any]] = load_dataset(name, config, split=split, revision=revision, streaming=True)
        return rows
    if revision is not None:
        raise _Refused(f"text.dataset_revision={revision!r} would be ignored: {place} is on this machine. Leave it out.")
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        if config is not None:
            raise _Refused(f"text.dataset_config={config!r} would be ignored: {place} was written by save_to_disk. Leave it out.")
        saved = load_from_disk(str(place))
        parts: dict[str, Any] = saved if isinstance(saved, dict) else {"train": saved, str(saved.split or "train"): saved}
        if split not in parts:
            raise _Refused(f"text.split={split!r}: {place} was written by save_to_disk with the splits {list(parts)}. Set text.split to one of them.")
        return parts[split]
    place = place.resolve()  # a folder called `json` or `text` would be taken for the reader of that name
    files = {"path": str(place.parent), "data_files": str(place)} if place.is_file() else {"path": str(place)}
    rows = load_dataset(name=config, split=split, streaming=True, **files)
    return rows


def _explained(what: str, error: Exception) -> Exception:
    message = (
        f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}. Check the name, config and split, and the network, "
        "or train on local text: text.kind=files text.paths=[FOLDER], or text.kind=stdlib."
    )
    unreachable = isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)
    return (ConnectionError if unreachable else ValueError)(message)


def dataset_version(name: str, config: str | None = None, revision: str | None = None) -> str | None:
    """What the dataset is at this moment: a hash over names, sizes and spread samples of a local one's files, the revision of one on the hub.

    None where the hub does not say. Local files are read whole where they are few megabytes together, else `_SAMPLED_BYTES` of them in all.
    """
    place = expanded(name)
    if place.exists():
        with reading(place):
            return f"files {_files_hash(place)}"
    try:
        from datasets import load_dataset_builder

        return f"revision {load_dataset_builder(name, config, revision=revision).hash}"
    except Exception:  # whatever is wrong, `hugging_face_dataset` says it; here it only means that the version is not known
        return None


def _files_hash(place: Path) -> str:
    """Dataset cards, hidden files and what `datasets` caches beside its own files are not data."""
    files = [place] if place.is_file() else [path for path in sorted(files_below(place)) if path.is_file()]
    files = [
        file
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(place).parts) and file.suffix != ".md" and not file.name.startswith("cache-")
    ]
    digest = hashlib.sha256()
    chunks = max(2, _SAMPLED_BYTES // _CHUNK_BYTES // max(1, len(files)))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(place).as_posix()} {size}\n".encode())
        last = max(0, size - _CHUNK_BYTES)
        starts = range(0, size, _CHUNK_BYTES) if size <= chunks * _CHUNK_BYTES else [last * i // (chunks - 1) for i in range(chunks)]
        with file.open("rb") as opened:
            for start in starts:
                opened.seek(start)
                digest.update(opened.read(_CHUNK_BYTES))
    return digest.hexdigest()[:16]

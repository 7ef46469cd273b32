"""What benchmarks share: tables in experiments/results, to which rows are added with their commit; how kernels are compiled."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from switch_sae.runs import environment, write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "results"


def commit() -> str:
    """The checkout's commit, with a plus sign if files differ from it; "none" where there is no history."""
    about = environment()
    return (about["git_commit"] or "none")[:12] + ("+" if about["git_dirty"] else "")


def compile_sooner() -> None:
    """Kernels compile without line numbers from here on: the same instructions, a quarter sooner.

    It is part of the key of Triton's cache, so all that compile for one another say it: benchmarks, replays, and what is compiled ahead of them.
    """
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")


def append(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Adds rows of equal columns to the CSV file at `path`, whole or not at all. Raises ValueError where the file has other columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    before = path.read_bytes() if path.is_file() else b""
    header = next(csv.reader(io.StringIO(before.decode())), list(rows[0]))
    if header != list(rows[0]):
        raise ValueError(f"{path} has the columns {header}, the new rows have {list(rows[0])}. Move the old table away.")
    if not before:
        writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, before + text.getvalue().encode())

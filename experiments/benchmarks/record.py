"""Where benchmarks keep what they measured: tables in experiments/results, to which rows are added with the commit that they were measured at."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from switch_sae.runs import environment, write_atomically

RESULTS = Path(__file__).resolve().parents[1] / "results"


def commit() -> str:
    """The checkout's commit, with a plus sign if files differ from it; "none" where there is no history."""
    about = environment()
    return (about["git_commit"] or "none")[:12] + ("+" if about["git_dirty"] else "")


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

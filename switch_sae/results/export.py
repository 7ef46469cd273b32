"""Rows as CSV or Parquet."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_sae.files import write_atomically
from switch_sae.results.rows import ResultRow

if TYPE_CHECKING:
    import pandas

IDENTITY = ("name", "sae", "role", "inference", "status", "step", "architecture", "num_latents", "num_experts", "k", "seed", "parameters", "tokens")
COSTS = (
    "flops_forward", "flops_encode", "flops_total", "flops_train", "tokens_per_second", "train_seconds", "wall_seconds", "group_size", "state_mb",
    "peak_mb",
)  # fmt: skip


def write_results(rows: Sequence[ResultRow], path: str | Path) -> None:
    """One line per row, all metrics with their intervals and all settings: Parquet where the name ends in .parquet, else CSV. Whole or not at all."""
    path = Path(path)
    if path.suffix != ".parquet":
        return write_csv([_record(row) for row in rows], path)
    try:
        import pyarrow  # noqa: F401  pandas would name its engine, not what to type
    except ImportError as error:
        raise ImportError(
            f"{path.name} needs pandas and pyarrow ({error}). Type pip install pandas pyarrow, or give a name ending in .csv."
        ) from error
    table = frame(rows)
    write_atomically(path, lambda part: table.to_parquet(part, index=False))


def frame(rows: Sequence[ResultRow]) -> "pandas.DataFrame":
    """One line per row as in results.csv: sizes, all metrics with their intervals, costs and settings. Needs pandas (raises ImportError)."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a data frame needs pandas. Type pip install pandas, or use write_results(rows, 'results.csv').") from error
    records = [_record(row) for row in rows]
    return pandas.DataFrame(records, columns=_columns(records)).convert_dtypes()


def write_csv(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Records with a header, whole or not at all; None and what a record lacks are empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(records), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(path, text.getvalue().encode())


def _columns(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _record(row: ResultRow) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for metric, estimate in row.metrics.items():
        scores[metric] = row.value(metric)
        if estimate.low is not None:
            scores |= {f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
    plain, costs = ({name: getattr(row, name) for name in names} for names in (IDENTITY, COSTS))
    config = {f"config.{key}": json.dumps(value) if isinstance(value, list) else value for key, value in row.config.items()}
    return {"path": str(row.path), **plain, **scores, **costs, "error": row.error, **config}

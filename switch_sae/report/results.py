"""Run folders and sweep folders in, one row per trained SAE out, as CSV or Parquet."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from switch_sae.evaluation import Estimate
from switch_sae.report.scored import evaluated_on
from switch_sae.runs import MODEL_FILE, RunDir, write_atomically

SEEDS = ("seed", "source.seed")
"""Settings in which repetitions of one experiment differ."""
BOOKKEEPING = ("name", "runs", "wandb", "device", "threads", "log_every", "checkpoint_every", "baselines")
"""Settings that change no number, or that say what trains beside."""
SIZES = ("sae.architecture", "sae.num_latents", "sae.num_experts", "sae.k")
"""Settings that rows hold as values of their own."""


@dataclass(frozen=True)
class ResultRow:
    """One trained SAE: what it was, what it cost and what it scored. None where a run has not measured it, or is too old to have."""

    path: Path
    """The run folder."""
    name: str
    """Of the sweep's member, or of the run folder; a run's further SAEs add their own name after a slash."""
    sae: str
    """Its key in results.json and metrics.jsonl."""
    status: str
    """finished, running (or interrupted), failed or waiting."""
    architecture: str
    num_latents: int
    num_experts: int
    k: int | None
    """None for architectures without a fixed number of active latents."""
    seed: int
    config: dict[str, Any]
    """Of this SAE, flat: `sae.num_latents`, `trainer.lr`, `tokens`."""
    step: int | None = None
    """Last logged step of an unfinished run."""
    error: str | None = None
    metrics: dict[str, Estimate] = field(default_factory=dict)
    flops_forward: int | None = None
    flops_total: int | None = None
    """Per token of training, in FLOPs (a multiply-add is two)."""
    parameters: int | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    """Of its own training steps alone."""
    train_seconds: float | None = None
    wall_seconds: float | None = None
    """The pass of all SAEs that shared its process and stream, activations included."""
    group_size: int | None = None
    """How many did."""
    state_mb: float | None = None
    """Its own weights, buffers and moments, in 10^6 bytes."""
    peak_mb: float | None = None
    """Peak of the whole process, shared by its group, in 10^6 bytes."""
    evaluated_on: dict[str, Any] = field(default_factory=dict)
    """The activations that it was scored on; rows that differ here are not comparable."""
    folder: Path | None = None
    """Where its model.safetensors is; None until it is finished."""

    def value(self, metric: str) -> float | None:
        """None where the metric was not measured or is not finite."""
        estimate = self.metrics.get(metric)
        return estimate.value if estimate is not None and abs(estimate.value) < float("inf") else None

    @property
    def settings(self) -> dict[str, Any]:
        """The config without sizes, seeds and bookkeeping: what makes two rows the same experiment."""
        return {key: value for key, value in self.config.items() if key not in (*SEEDS, *SIZES) and key.split(".")[0] not in BOOKKEEPING}

    def firing_counts(self) -> list[int]:
        """[M] evaluation rows on which each latent fired, read from the run folder."""
        counts: list[int] = RunDir(self.path).read_json("results.json")["members"][self.sae]["firing_counts"]
        return counts


def collect(paths: Sequence[str | Path]) -> list[ResultRow]:
    """One row per trained SAE of run folders, sweep folders, or folders of them, sorted by architecture and size; each folder counts once.

    Controls (PCA, untrained) are no rows. Of an unfinished run only the main SAE is one. Raises ValueError for no paths, FileNotFoundError for a
    path that holds no run.
    """
    if not paths:
        raise ValueError("no folders were given. Give run folders, sweep folders or folders that hold them, such as runs/.")
    rows: dict[tuple[Path, str], ResultRow] = {}
    for given in paths:
        path = Path(given)
        found = _rows_below(path)
        if not found:
            raise FileNotFoundError(f"{path} holds no run: neither it nor a folder in it has config.json or sweep.json. Give what training printed.")
        rows |= {(row.path.resolve(), row.sae): row for row in found}
    return sorted(rows.values(), key=_order)


def config_columns(rows: Sequence[ResultRow]) -> list[str]:
    """The settings in which rows that have them differ, sizes included, seeds and bookkeeping not."""
    keys = dict.fromkeys(key for row in rows for key in row.config if key not in SEEDS and key.split(".")[0] not in BOOKKEEPING)
    return [key for key in keys if len({hashable(row.config[key]) for row in rows if key in row.config}) > 1]


def write_results(rows: Sequence[ResultRow], path: str | Path) -> None:
    """One line per row, all metrics with their intervals and all settings: Parquet where the name ends in .parquet, else CSV. Whole or not at all."""
    path = Path(path)
    records = [_record(row) for row in rows]
    columns = list(dict.fromkeys(key for record in records for key in record))
    if path.suffix == ".parquet":
        try:
            import pandas
            import pyarrow  # noqa: F401  pandas would name its engine, not what to type
        except ImportError as error:
            raise ImportError(
                f"{path.name} needs pandas and pyarrow ({error}). Type pip install pandas pyarrow, or give a name ending in .csv."
            ) from error
        frame = pandas.DataFrame(records, columns=columns).convert_dtypes()
        write_atomically(path, lambda part: frame.to_parquet(part, index=False))
    else:
        write_atomically(path, csv_bytes(records, columns))


def csv_bytes(records: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> bytes:
    """Records as CSV with a header; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def usual_settings(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The most frequent value of every setting among the rows that have it."""
    counts: dict[str, Counter[Any]] = {}
    for row in rows:
        for key, value in row.settings.items():
            counts.setdefault(key, Counter())[hashable(value)] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}


def unusual(row: ResultRow, usual: dict[str, Any]) -> dict[str, Any]:
    """The settings of a row that are not the usual ones."""
    return {key: value for key, value in row.settings.items() if hashable(value) != usual.get(key)}


def _rows_below(path: Path) -> list[ResultRow]:
    if (path / "sweep.json").is_file():
        members = RunDir(path).read_json("sweep.json")["members"]
        return [row for name, config in members.items() for row in _run_rows(path / "members" / name, name, config)]
    if (path / "config.json").is_file():
        return _run_rows(path, path.name, RunDir(path).read_json("config.json"))
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")) if path.is_dir() else []
    return [row for folder in folders for row in _rows_below(folder)]


def _run_rows(path: Path, name: str, config: dict[str, Any]) -> list[ResultRow]:
    run, main = RunDir(path), config["sae"]["architecture"]
    flat = _flat(config)
    if not (path / "results.json").is_file():
        return [_unfinished(run, name, main, flat)]
    saved = run.read_json("results.json")
    rows = []
    for sae, entry in saved["members"].items():
        is_main = sae == main or len(saved["members"]) == 1
        folder = path if is_main else run.member(sae).path
        mine = flat if is_main else {key: value for key, value in flat.items() if not key.startswith("sae.")} | _saved_config(folder)
        rows.append(
            ResultRow(
                path=path,
                name=name if is_main else f"{name}/{sae}",
                sae=sae,
                status="finished",
                architecture=entry["architecture"],
                num_latents=entry["num_latents"],
                num_experts=entry["num_experts"],
                k=entry["k"],
                seed=config["seed"],
                config=mine,
                metrics={
                    metric: Estimate(float("nan") if e["value"] is None else e["value"], e["low"], e["high"])
                    for metric, e in entry["metrics"].items()
                },
                flops_forward=entry["flops"]["forward"],
                flops_total=entry["flops"]["total"],
                parameters=entry.get("parameters"),
                tokens=entry.get("tokens"),
                tokens_per_second=entry.get("train_tokens_per_second"),
                train_seconds=entry.get("train_seconds"),
                wall_seconds=entry.get("wall_seconds"),
                group_size=entry.get("group_size"),
                state_mb=_megabytes(entry.get("state_bytes")),
                peak_mb=_megabytes(entry.get("peak_bytes")),
                evaluated_on=evaluated_on(saved, entry),
                folder=folder,
            )
        )
    return rows


def _unfinished(run: RunDir, name: str, sae: str, flat: dict[str, Any]) -> ResultRow:
    failed = None
    with suppress(FileNotFoundError):  # another process may just be trying it again
        failed = run.read_json("failed.json")
    steps = [row["step"] for row in run.metrics()]
    status = "failed" if failed else "running" if steps or (run.path / "config.json").is_file() else "waiting"
    step = failed["step"] if failed else max(steps, default=0)
    return ResultRow(
        path=run.path, name=name, sae=sae, status=status, architecture=sae, num_latents=flat["sae.num_latents"],
        num_experts=flat.get("sae.num_experts", 1), k=flat.get("sae.k"), seed=flat["seed"], config=flat,
        step=None if status == "waiting" else step, error=failed["error"] if failed else None,
    )  # fmt: skip


def _saved_config(folder: Path) -> dict[str, Any]:
    """The flat `sae.*` settings in the header of a model file: results.json does not hold those of a run's further SAEs."""
    file = folder / MODEL_FILE
    if not file.is_file():
        return {}
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    return _flat({"sae": {"architecture": header["architecture"], **json.loads(header["config"])}})


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _record(row: ResultRow) -> dict[str, Any]:
    plain = {
        name: getattr(row, name)
        for name in ("name", "sae", "status", "step", "architecture", "num_latents", "num_experts", "k", "seed", "parameters", "tokens")
    }
    scores: dict[str, Any] = {}
    for metric, estimate in row.metrics.items():
        scores[metric] = row.value(metric)
        if estimate.low is not None:
            scores |= {f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
    costs = {
        name: getattr(row, name)
        for name in ("flops_forward", "flops_total", "tokens_per_second", "train_seconds", "wall_seconds", "group_size", "state_mb", "peak_mb")
    }
    config = {f"config.{key}": json.dumps(value) if isinstance(value, list) else value for key, value in row.config.items()}
    return {"path": str(row.path), **plain, **scores, **costs, "error": row.error, **config}


def _order(row: ResultRow) -> tuple[Any, ...]:
    return (
        row.architecture,
        row.num_latents,
        row.num_experts,
        row.k or 0,
        row.name.rpartition("-s")[0] or row.name,
        row.seed,
        str(row.path),
        row.sae,
    )


def _megabytes(number: int | None) -> float | None:
    return None if number is None else number / 1e6


def hashable(value: Any) -> Any:
    """A setting that can be counted: lists and dicts as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value

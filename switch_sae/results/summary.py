"""Repetitions with other seeds as one row: mean, standard deviation and number of seeds of everything measured."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switch_sae.results.export import write_csv
from switch_sae.results.rows import ROLES, SIZES, ResultRow, grouped, hashable, in_order
from switch_sae.results.settings import config_columns

COSTS = (
    "flops_forward", "flops_encode", "flops_total", "flops_train", "parameters", "tokens", "tokens_per_second", "train_seconds", "wall_seconds",
    "state_mb", "peak_mb",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Over seeds. sd = sqrt(sum (v - mean)^2 / (n - 1)); None for a single seed."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Raises ValueError for no values."""
        if not values:
            raise ValueError("there are no values to average. Leave out groups without any.")
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) if len(values) > 1 else None
        return cls(mean, None if variance is None else math.sqrt(variance), len(values))

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + ("" if self.sd is None else f" ± {self.sd:{spec}}")


@dataclass(frozen=True)
class Summary:
    """Runs that differ only in their seed. Sizes and settings are those of all of them."""

    rows: tuple[ResultRow, ...]
    """Finished ones, one per seed: of several with the same seed a main SAE before a baseline, then the newest."""
    unfinished: tuple[ResultRow, ...]
    repeated: int
    """Finished ones left out because another has the same seed."""
    spreads: dict[str, Spread]
    """Metrics and `COSTS` by name; absent where no seed has a finite value."""

    @property
    def first(self) -> ResultRow:
        """Any row, for what all of them share."""
        return (self.rows or self.unfinished)[0]

    @property
    def name(self) -> str:
        """The architecture of main SAEs; baselines, which stand beside them, by their own names; `NAME + INFERENCE` under another than their own."""
        rows = self.rows or self.unfinished
        main = any(row.is_the_runs for row in rows)
        name = self.first.architecture if main else ", ".join(sorted({row.of or row.sae for row in rows}))
        return name + (f" + {self.first.inference}" if self.first.of else "")

    @property
    def outlier_rows(self) -> int:
        """Evaluation rows that the `_inliers` metrics leave out."""
        return max((row.outlier_rows for row in self.rows), default=0)

    def mean(self, quantity: str) -> float | None:
        spread = self.spreads.get(quantity)
        return None if spread is None else spread.mean

    def sd(self, quantity: str) -> float:
        """0 where a single seed has no spread."""
        spread = self.spreads.get(quantity)
        return 0.0 if spread is None or spread.sd is None else spread.sd


def summary(rows: Sequence[ResultRow]) -> list[Summary]:
    """Groups rows that differ only in seed, in the order of `in_order`; rows scored on other activations, or under another inference than their own,
    are other groups."""
    groups = []

    def same(row: ResultRow) -> str:
        return _json([row.architecture, row.num_latents, row.num_experts, row.k, row.inference if row.of else None, row.settings])

    for alike in grouped(in_order(rows), same).values():
        finished = [row for row in alike if row.status == "finished"]
        first, *others = list(grouped(finished, activations_key).values()) or [[]]
        unfinished = [row for row in alike if row.status != "finished"]  # what they will be scored on is not known yet: they join the first
        groups += [_summarize(group) for group in ([*first, *unfinished], *others)]
    return groups


def activations_key(row: ResultRow) -> str:
    """Equal for rows that were scored on the same activations."""
    return _json(row.evaluated_on)


def write_summary(rows: Sequence[ResultRow], path: str | Path) -> None:
    """One line per group of seeds as CSV: sizes, how many seeds, mean and `_sd` of every quantity, and the settings in which groups differ."""
    differing = [key for key in config_columns(rows) if key not in SIZES]
    records = []
    for group in summary(rows):
        first = group.first
        sizes = ("architecture", "inference", "num_latents", "num_experts", "k")
        record: dict[str, Any] = {"sae": group.name} | {name: getattr(first, name) for name in sizes}
        record |= {"seeds": len(group.rows), "unfinished": len(group.unfinished), "outlier_rows": group.outlier_rows}
        record |= {key: hashable(first.settings.get(key)) for key in differing}
        for name, spread in group.spreads.items():
            record |= {name: spread.mean, f"{name}_sd": spread.sd}
        records.append(record)
    write_csv(records, Path(path))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _summarize(group: Sequence[ResultRow]) -> Summary:
    finished = [row for row in group if row.status == "finished"]
    by_seed = {row.seed: row for row in sorted(finished, key=lambda row: -ROLES.index(row.role))}  # the last of a seed stays: a main SAE, the newest
    rows = tuple(by_seed[seed] for seed in sorted(by_seed))
    metrics = dict.fromkeys(metric for row in rows for metric in row.metrics)
    values = {metric: [row.value(metric) for row in rows] for metric in metrics} | {cost: [getattr(row, cost) for row in rows] for cost in COSTS}
    spreads = {name: Spread.of(known) for name, found in values.items() if (known := [value for value in found if value is not None])}
    return Summary(rows, tuple(row for row in group if row.status != "finished"), len(finished) - len(rows), spreads)

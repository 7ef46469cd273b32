"""Repetitions with other seeds as one row: mean, standard deviation and number of seeds of everything measured."""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switch_sae.report.results import SIZES, ResultRow, config_columns, csv_bytes, hashable, unusual, usual_settings
from switch_sae.report.tables import UNKNOWN, other_activations, short
from switch_sae.runs import write_atomically

COSTS = ("flops_forward", "flops_total", "parameters", "tokens", "tokens_per_second", "train_seconds", "wall_seconds", "state_mb", "peak_mb")
WIDTH = 150


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
    """Finished ones, one per seed: of several with the same seed the last."""
    unfinished: tuple[ResultRow, ...]
    repeated: int
    """Finished ones left out because a later one has the same seed."""
    spreads: dict[str, Spread]
    """Metrics and `COSTS` by name; absent where no seed has a finite value."""

    @property
    def first(self) -> ResultRow:
        """Any row, for what all of them share."""
        return (self.rows or self.unfinished)[0]

    def mean(self, quantity: str) -> float | None:
        spread = self.spreads.get(quantity)
        return None if spread is None else spread.mean

    def sd(self, quantity: str) -> float:
        """0 where a single seed has no spread."""
        spread = self.spreads.get(quantity)
        return 0.0 if spread is None or spread.sd is None else spread.sd


def summary(rows: Sequence[ResultRow]) -> list[Summary]:
    """Groups rows that differ only in seed, in the order in which they come; rows scored on other activations are other groups."""
    same_settings: dict[str, list[ResultRow]] = {}
    for row in rows:
        key = [row.architecture, row.num_latents, row.num_experts, row.k, row.settings]
        same_settings.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(row)
    groups = []
    for alike in same_settings.values():
        by_activations: dict[str, list[ResultRow]] = {}
        for row in alike:
            if row.status == "finished":
                by_activations.setdefault(json.dumps(row.evaluated_on, sort_keys=True, default=str), []).append(row)
        first, *others = list(by_activations.values()) or [[]]
        unfinished = [row for row in alike if row.status != "finished"]  # what they will be scored on is not known yet: they join the first
        groups += [_summarize(group) for group in ([*first, *unfinished], *others)]
    return groups


def summary_table(rows: Sequence[ResultRow]) -> str:
    """One line per group of seeds, what differs between groups, then a legend; at most 150 columns."""
    usual = usual_settings(rows)
    groups = sorted(summary(rows), key=lambda group: (_sizes(group), len(unusual(group.first, usual))))
    scored = [group for group in groups if group.rows]
    first = scored[0].first.evaluated_on if scored else {}
    others = {id(group): other_activations(first, group.first.evaluated_on) for group in scored}
    header = [*_COLUMNS, "differs in"]
    lines = [[*(cell(group) for cell in _COLUMNS.values())] for group in groups]
    kept = [place for place, name in enumerate(_COLUMNS) if name in ("SAE", "n") or any(line[place] != UNKNOWN for line in lines)]
    lines = [[line[place] for place in kept] for line in [list(_COLUMNS), *lines]]
    widths = [max(len(line[place]) for line in lines) for place in range(len(kept))]
    texts = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    room = max(24, WIDTH - len(texts[0]) - 2)
    shown = [texts[0] + "  " + header[-1], "-" * (len(texts[0]) + 2 + min(room, 40))]
    for group, text in zip(groups, texts[1:], strict=True):
        note = ", ".join([*_words(unusual(group.first, usual)), *_status(group)])
        if others.get(id(group)):
            note = ", ".join(filter(None, [f"NOT COMPARABLE, other activations: {others[id(group)]}", note]))
        wrapped = textwrap.wrap(note, room, break_on_hyphens=False) or [""]
        shown.append((text + "  " + wrapped[0]).rstrip())
        shown += [" " * (len(text) + 2) + line for line in wrapped[1:]]
    differing = {key: value for key, value in usual.items() if any(key in unusual(row, usual) for row in rows)}
    usually = f"Where nothing is said: {', '.join(_words(differing))}." if differing else ""
    return "\n".join([*shown, "", *_legend(groups), *textwrap.wrap(usually, WIDTH)])


def write_summary(rows: Sequence[ResultRow], path: str | Path) -> None:
    """One line per group of seeds as CSV: sizes, how many seeds, mean and `_sd` of every quantity, and the settings in which groups differ."""
    differing = [key for key in config_columns(rows) if key not in SIZES]
    records = []
    for group in summary(rows):
        first = group.first
        record: dict[str, Any] = {
            "architecture": first.architecture,
            "num_latents": first.num_latents,
            "num_experts": first.num_experts,
            "k": first.k,
        }
        record |= {"seeds": len(group.rows), "unfinished": len(group.unfinished)} | {key: hashable(first.config.get(key)) for key in differing}
        for name, spread in group.spreads.items():
            record |= {name: spread.mean, f"{name}_sd": spread.sd}
        records.append(record)
    write_atomically(Path(path), csv_bytes(records))


def _sizes(group: Summary) -> tuple[Any, ...]:
    first = group.first
    return first.architecture, first.num_latents, first.num_experts, first.k or 0


def _summarize(group: Sequence[ResultRow]) -> Summary:
    finished = [row for row in group if row.status == "finished"]
    by_seed = {row.seed: row for row in finished}
    rows = tuple(by_seed.values())
    metrics = dict.fromkeys(metric for row in rows for metric in row.metrics)
    values = {metric: [row.value(metric) for row in rows] for metric in metrics} | {cost: [getattr(row, cost) for row in rows] for cost in COSTS}
    spreads = {name: Spread.of(known) for name, found in values.items() if (known := [value for value in found if value is not None])}
    return Summary(rows, tuple(row for row in group if row.status != "finished"), len(finished) - len(rows), spreads)


def _words(settings: dict[str, Any]) -> list[str]:
    return [f"{key.removeprefix('sae.')}={_word(hashable(value))}" for key, value in settings.items()]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _status(group: Summary) -> list[str]:
    words = []
    for status in dict.fromkeys(row.status for row in group.unfinished):
        rows = [row for row in group.unfinished if row.status == status]
        steps = sorted({row.step for row in rows if row.step is not None})
        at = f" at step {'-'.join(str(step) for step in dict.fromkeys((steps[0], steps[-1])))}" if steps else ""
        words.append((f"seed {rows[0].seed}" if len(rows) == 1 else f"{len(rows)} seeds") + f" {status}{at}")
    return words + ([f"{group.repeated} run{'s' * (group.repeated > 1)} with the same seed left out"] if group.repeated else [])


def _spread(name: str, spec: str) -> Any:
    return lambda group: UNKNOWN if name not in group.spreads else format(group.spreads[name], spec)


def _mean(name: str, spec: str) -> Any:
    return lambda group: UNKNOWN if name not in group.spreads else format(group.spreads[name].mean, spec)


def _short_mean(name: str, unit: float = 1.0) -> Any:
    return lambda group: UNKNOWN if name not in group.spreads else short(group.spreads[name].mean * unit)


_COLUMNS: dict[str, Any] = {
    "SAE": lambda group: group.first.architecture,
    "latents": lambda group: str(group.first.num_latents),
    "experts": lambda group: str(group.first.num_experts),
    "k": lambda group: UNKNOWN if group.first.k is None else str(group.first.k),
    "n": lambda group: str(len(group.rows)),
    "FVU": _spread("fvu", ".4f"),
    "delta CE": _spread("delta_ce", ".3f"),
    "L0": _mean("l0", ".1f"),
    "dead": _mean("dead_latents", ".1%"),
    "load CV": _mean("load_cv", ".2f"),
    "FLOPs": _short_mean("flops_total"),
    "tok/s": _short_mean("tokens_per_second"),
    "state B": _short_mean("state_mb", 1e6),
    "peak B": _short_mean("peak_mb", 1e6),
}


def _legend(groups: Sequence[Summary]) -> list[str]:
    counts = sorted({len(group.rows) for group in groups})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [
        f"mean ± standard deviation (n - 1) over seeds, n = {n}; a single seed has none. FVU: squared error / variance. delta CE: nats per prediction.",
        "dead: never fired on the evaluation rows. load CV: std / mean of experts' shares. FLOPs: per token of training, with router and decoder. tok/s:",
        "of training steps alone. state B: own weights and moments. peak B: peak of the process, shared by all SAEs that trained in it.",
    ]

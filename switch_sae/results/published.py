"""The authors' own numbers, to draw beside ours."""

import csv
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

CITATION = "Mudide et al.\n(arXiv 2410.08201)"
TOKENS = 819_200_000
"""Activations that each of their SAEs trained on: 100,000 steps of 8192."""
WIDTH = 24_576
"""Latents of their dense SAEs and of their width-matched Switch SAEs, 32 times GPT-2's 768 dimensions."""


@dataclass(frozen=True)
class PaperPoint:
    """One SAE of Mudide et al. at the end of 100,000 steps: GPT-2 small, block 8, one seed, one evaluation batch of 8,192 activations.

    From the logs that the authors committed (github.com/amudide/switch_sae, `results/`). The squared error is summed over 768 dimensions, not
    normalised, and includes position 0, whose norm is far outside the rest, so it compares with ours only as a ratio to another of theirs. Their
    logged L0 of TopK and Switch SAEs counts latents before TopK and is left out: `l0` is k there, and measured for ReLU and Gated.
    """

    series: str
    """width_matched, flop_matched, load_balance or gate."""
    architecture: str
    num_latents: int
    num_experts: int
    k: int | None
    l0: float
    gate: str | None
    load_balance: float | None
    """alpha, on activations as they come."""
    mse: float
    delta_ce: float
    """Nats per prediction; every SAE was scored on other texts, so differences below about 0.005 mean nothing."""
    loss_recovered: float
    balance_loss: float | None
    """E sum_i f_i P_i of the evaluation batch: 1 when balanced."""


def paper_points(series: str | None = None) -> list[PaperPoint]:
    """All points, or those of one series."""
    return [point for point in _read() if series in (None, point.series)]


@cache
def _read() -> tuple[PaperPoint, ...]:
    with (Path(__file__).parent / "paper_results.csv").open() as file:
        records = list(csv.DictReader(line for line in file if not line.startswith("#")))
    convert: dict[str, type] = {"num_latents": int, "num_experts": int, "k": int, "series": str, "architecture": str, "gate": str}

    def value(record: dict[str, str], name: str) -> Any:
        return convert.get(name, float)(record[name]) if record[name] else None

    return tuple(PaperPoint(**{field.name: value(record, field.name) for field in fields(PaperPoint)}) for record in records)

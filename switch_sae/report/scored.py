"""What run folders hold about each of their SAEs and controls."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from switch_sae.evaluation import Estimate, Results
from switch_sae.models import SparseAutoencoder
from switch_sae.runs import RunDir, load_sae

_STREAM_ONLY = {"seed", "buffer_rows", "device", "prefetch", "cache"}
"""Settings of a source that change the order of training rows but not which rows are evaluated."""


@dataclass(frozen=True)
class Scored:
    """One SAE or control of one run, and everything measured about it."""

    run: RunDir
    run_number: int
    """Which of the runs that were asked for, from 1."""
    label: str
    """`name`, with the run's number in front where there are several runs."""
    name: str
    is_control: bool
    """PCA and the untrained SAE: they were fitted or made, not trained."""
    architecture: str
    num_latents: int
    num_experts: int
    k: int | None
    """None for architectures without a fixed number of active latents."""
    results: Results
    train_tokens_per_second: float | None
    """Of training steps alone, without making activations; None for controls."""

    def estimate(self, metric: str) -> Estimate | None:
        """None where the metric was not measured, such as delta_ce without a language model, or is not finite."""
        estimate = self.results.metrics.get(metric)
        return estimate if estimate is not None and estimate.value == estimate.value else None


def scored(runs: Sequence[RunDir], file: str = "results.json") -> list[Scored]:
    """Every SAE and control of the runs, run by run: the main SAE, its baselines, then the controls.

    `file` is another evaluation in the same folders, such as results-500000.json. Raises ValueError for no runs, FileNotFoundError for an
    unfinished one.
    """
    if not runs:
        raise ValueError("no runs were given. Train one (make train), then give its folder.")
    known = {field.name for field in fields(Results)}
    rows = []
    for number, run in enumerate(runs, start=1):
        saved = run.read_json(file)
        for group in ("members", "controls"):
            for name, entry in saved[group].items():
                rows.append(
                    Scored(
                        run=run,
                        run_number=number,
                        label=name if len(runs) == 1 else f"{number} {name}",
                        name=name,
                        is_control=group == "controls",
                        architecture=entry["architecture"],
                        num_latents=entry["num_latents"],
                        num_experts=entry["num_experts"],
                        k=entry["k"],
                        results=Results.from_json({key: value for key, value in entry.items() if key in known}),
                        train_tokens_per_second=entry.get("train_tokens_per_second"),
                    )
                )
    return rows


def evaluated_on(saved: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """What the scores of one SAE, `entry` of the results `saved`, were measured on: equal for SAEs that can be compared."""
    where = {key: value for key, value in saved["evaluation"]["source"].items() if key not in _STREAM_ONLY}
    return where | {"evaluation rows": entry["rows"], "predictions": entry["predictions"]}


def load_members(run: RunDir) -> dict[str, SparseAutoencoder]:
    """The trained SAEs of a finished run by name, the main one first."""
    main, *baselines = run.read_json("results.json")["members"]
    return {main: load_sae(run.path)} | {name: load_sae(run.member(name).path) for name in baselines}


def finished_runs(parent: str | Path) -> list[RunDir]:
    """The run folders in `parent` that have results, newest first; empty where there are none."""
    return [RunDir(file.parent) for file in sorted(Path(parent).glob("*/results.json"), reverse=True)]

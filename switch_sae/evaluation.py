"""Scoring an SAE on the fixed evaluation rows: every metric that applies, with intervals over documents."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.metrics import METRICS, Downstream, DownstreamLoss, Firing, Metric, MetricBatch, MetricSetup
from switch_sae.metrics.bootstrap import bootstrap_intervals
from switch_sae.metrics.forward import Evaluable, sae_outputs


@dataclass(frozen=True)
class Estimate:
    """A number on the evaluation rows with its 95 % interval over documents; None where no interval is defined."""

    value: float
    low: float | None = None
    high: float | None = None

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return f"{self.value:{spec}}" if self.low is None or self.high is None else f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Results:
    """Everything measured about one SAE. `results["fvu"].value` is a number; `to_json` and `from_json` are inverses."""

    metrics: dict[str, Estimate]
    """By name, with the definition in the docstring of the metric that computes it."""
    vectors: dict[str, list[float]]
    """Numbers per expert."""
    flops: dict[str, int]
    """Per token: router, encode, decode, backward, forward, total."""
    rows: int
    documents: int
    outlier_rows: int
    """Rows that the `_inliers` metrics leave out."""
    predictions: int
    """Next-token predictions behind ce_*, delta_ce, kl and loss_recovered_*; 0 when no downstream was given."""
    firing_counts: Tensor
    """[M] evaluation rows on which each latent fired, int64."""

    def __getitem__(self, name: str) -> Estimate:
        if name not in self.metrics:
            raise KeyError(f"no metric {name!r} in these results. There are: {', '.join(self.metrics)}.")
        return self.metrics[name]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. Numbers that are not finite (a ratio whose denominator is 0) become null: JSON has none."""
        plain = {name: getattr(self, name) for name in ("vectors", "flops", "rows", "documents", "outlier_rows", "predictions")}
        metrics = {name: {key: _finite_or_none(value) for key, value in asdict(estimate).items()} for name, estimate in self.metrics.items()}
        return {"metrics": metrics, **plain, "firing_counts": self.firing_counts.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """From `to_json`, possibly by way of a file."""
        metrics = {name: Estimate(math.nan if e["value"] is None else e["value"], e["low"], e["high"]) for name, e in data["metrics"].items()}
        return cls(**{**data, "metrics": metrics, "firing_counts": torch.tensor(data["firing_counts"], dtype=torch.int64)})


def evaluate(sae: Evaluable, evaluation_set: EvaluationSet, downstream: Downstream | None = None, bootstrap: int = 1000) -> Results:
    """Scores an SAE, or a control such as `PCABaseline`, on all rows of an evaluation set; the SAE is left exactly as it was.

    `bootstrap` is the number of resamples behind each 95 % interval over documents (0: no intervals; a single document has none either). Rows are
    run in chunks of a fixed size, so the result is the same to the last bit for every caller.

    Raises ValueError for rows or outputs that are not finite, and for a downstream made from another evaluation set.
    """
    if downstream is not None and downstream.evaluation_set is not evaluation_set:
        raise ValueError("downstream was prepared from another evaluation set: its numbers would not belong to these rows. Make it from this one.")
    rows = evaluation_set.rows
    documents, document_T = evaluation_set.document_T.cpu().unique(return_inverse=True)
    if len(document_T) != len(rows):
        raise ValueError(f"the evaluation set has {len(rows)} rows but {len(document_T)} document numbers; it needs one per row.")
    setup = MetricSetup.of(rows.target_TD, len(documents), sae.num_latents, sae.num_experts)
    metrics = {name: metric(setup) for name, metric in METRICS.items() if metric.applies(setup)}
    firing = metrics["firing"]
    assert isinstance(firing, Firing)
    outliers = 0
    for chosen, target_TD, output in sae_outputs(sae, rows):
        batch = MetricBatch.of(target_TD, output, document_T[chosen])
        outliers += len(batch.target_TD) - int(batch.inlier_T(setup.norm_limit).sum())
        for metric in metrics.values():
            metric.update(batch)
    estimates = _estimates(list(metrics.values()), len(documents), bootstrap)
    if downstream is not None:
        loss = DownstreamLoss(replace(setup, num_documents=downstream.num_documents))
        for predictions in downstream.predictions(sae):
            loss.update(predictions)
        estimates |= _estimates([loss], downstream.num_documents, bootstrap)
    flops = sae.flops()
    return Results(
        metrics=estimates,
        vectors={name: values for metric in metrics.values() for name, values in metric.vectors().items()},
        flops=asdict(flops) | {"forward": flops.forward, "total": flops.total},
        rows=len(document_T),
        documents=len(documents),
        outlier_rows=outliers,
        predictions=0 if downstream is None else downstream.num_predictions,
        firing_counts=firing.firing_counts,
    )


def _estimates(metrics: Sequence[Metric[Any]], num_documents: int, replicates: int) -> dict[str, Estimate]:
    intervals = bootstrap_intervals(metrics, num_documents, replicates)
    return {name: Estimate(value, *intervals.get(name, (None, None))) for metric in metrics for name, value in metric.compute().items()}


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

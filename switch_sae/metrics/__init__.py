"""Metrics with one definition each. Add one by adding a file and a line to `METRICS`; `DownstreamLoss` stands apart, as it needs a language model."""

from switch_sae.metrics.base import DocumentMetric, Metric, MetricBatch, MetricSetup
from switch_sae.metrics.cosine import Cosine
from switch_sae.metrics.downstream import Downstream, DownstreamLoss, PredictionBatch
from switch_sae.metrics.experts import Experts
from switch_sae.metrics.firing import Firing
from switch_sae.metrics.fvu import FVU
from switch_sae.metrics.l0 import L0
from switch_sae.metrics.normalized_mse import NormalizedMSE
from switch_sae.metrics.relative_norm import RelativeNorm

METRICS: dict[str, type[Metric[MetricBatch]]] = {
    "fvu": FVU,
    "normalized_mse": NormalizedMSE,
    "cosine": Cosine,
    "relative_norm": RelativeNorm,
    "l0": L0,
    "firing": Firing,
    "experts": Experts,
}

__all__ = [
    "FVU",
    "L0",
    "METRICS",
    "Cosine",
    "DocumentMetric",
    "Downstream",
    "DownstreamLoss",
    "Experts",
    "Firing",
    "Metric",
    "MetricBatch",
    "MetricSetup",
    "NormalizedMSE",
    "PredictionBatch",
    "RelativeNorm",
]

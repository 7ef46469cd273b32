"""Metrics with one definition each. Add one by adding a file and a line to `METRICS`, or to `PROBES` where it must run the SAE again or see all codes
at once; `DownstreamLoss` stands apart, as it needs a language model."""

from switch_sae.metrics.amortisation import Amortisation
from switch_sae.metrics.base import DocumentMetric, Metric, MetricBatch, MetricSetup
from switch_sae.metrics.cosine import Cosine
from switch_sae.metrics.downstream import Downstream, DownstreamLoss, PredictionBatch
from switch_sae.metrics.error_spread import ErrorSpread
from switch_sae.metrics.experts import Experts
from switch_sae.metrics.firing import Firing
from switch_sae.metrics.fvu import FVU
from switch_sae.metrics.l0 import L0
from switch_sae.metrics.meaning import Meaning
from switch_sae.metrics.normalized_mse import NormalizedMSE
from switch_sae.metrics.probe import Halves, Probe, Quotients
from switch_sae.metrics.relative_norm import RelativeNorm
from switch_sae.metrics.stability import Stability

METRICS: dict[str, type[Metric[MetricBatch]]] = {
    "fvu": FVU,
    "normalized_mse": NormalizedMSE,
    "cosine": Cosine,
    "relative_norm": RelativeNorm,
    "l0": L0,
    "firing": Firing,
    "experts": Experts,
    "error_spread": ErrorSpread,
}

PROBES: dict[str, type[Probe]] = {"stability": Stability, "meaning": Meaning, "amortisation": Amortisation}

__all__ = [
    "FVU",
    "L0",
    "METRICS",
    "PROBES",
    "Amortisation",
    "Cosine",
    "DocumentMetric",
    "Downstream",
    "DownstreamLoss",
    "ErrorSpread",
    "Experts",
    "Firing",
    "Halves",
    "Meaning",
    "Metric",
    "MetricBatch",
    "MetricSetup",
    "NormalizedMSE",
    "PredictionBatch",
    "Probe",
    "Quotients",
    "RelativeNorm",
    "Stability",
]

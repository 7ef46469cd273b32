"""Scoring an SAE on the fixed evaluation rows: every metric that applies, with intervals over documents."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.countdown import Countdown
from switch_sae.files import Say
from switch_sae.metrics import FVU, METRICS, PROBES, Downstream, DownstreamLoss, Firing, Halves, Metric, MetricBatch, MetricSetup
from switch_sae.metrics.bootstrap import bootstrap_intervals, effective_documents, intervals
from switch_sae.metrics.error_spread import occurrences
from switch_sae.metrics.forward import Evaluable, chunks, outputs
from switch_sae.models.base import SparseAutoencoder
from switch_sae.rows import NormLimit


@dataclass(frozen=True)
class Estimate:
    """A number on the evaluation rows with its 95 % interval over documents (the judge's: over latents); None where no interval is defined."""

    value: float
    low: float | None = None
    high: float | None = None

    def __format__(self, spec: str) -> str:
        spec = spec or ".4g"
        return f"{self.value:{spec}}" if self.low is None or self.high is None else f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


_PLAIN = ("vectors", "flops", "rows", "documents", "outlier_rows", "predictions", "prediction_documents")


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
    prediction_documents: int | None = None
    """Documents that the predictions come from; None without downstream, or in results of an earlier version."""

    def __getitem__(self, name: str) -> Estimate:
        if name not in self.metrics:
            raise KeyError(f"no metric {name!r} in these results. There are: {', '.join(self.metrics)}.")
        return self.metrics[name]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. Numbers that are not finite (a ratio whose denominator is 0) become null: JSON has none."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        metrics = {name: {key: _finite_or_none(value) for key, value in asdict(estimate).items()} for name, estimate in self.metrics.items()}
        return {"metrics": metrics, **plain, "firing_counts": self.firing_counts.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """From `to_json`, possibly by way of a file."""
        metrics = {name: Estimate(math.nan if e["value"] is None else e["value"], e["low"], e["high"]) for name, e in data["metrics"].items()}
        return cls(**{**data, "metrics": metrics, "firing_counts": torch.tensor(data["firing_counts"], dtype=torch.int64)})


class Probes:
    """The `PROBES` that apply to an evaluation set: what does not depend on the SAE (noise, clusters, words) is made once, shared by all SAEs.

    What a probe chooses on some documents and scores on others it chooses and scores on `halves`: those of the evaluation set unless they are given,
    as they must be where the set itself is half of what is held out.
    """

    def __init__(self, evaluation_set: EvaluationSet, halves: Halves | None = None) -> None:
        self.evaluation_set = evaluation_set
        self.probes = {name: probe(evaluation_set, halves) for name, probe in PROBES.items() if probe.applies(evaluation_set, halves)}

    def measure(self, sae: SparseAutoencoder, bootstrap: int = 1000) -> dict[str, Estimate]:
        """All numbers of one SAE, which is left as it was."""
        found: dict[str, Estimate] = {}
        for probe in self.probes.values():
            numbers = probe.measure(sae)
            spans = intervals(numbers.replicates, numbers.units, bootstrap, effective=numbers.effective)
            found |= {name: Estimate(value, *spans.get(name, (None, None))) for name, value in numbers.values().items()}
        return found


def evaluate(
    sae: Evaluable, evaluation_set: EvaluationSet, downstream: Downstream | None = None, bootstrap: int = 1000, probes: Probes | None = None
) -> Results:
    """Scores one SAE, or a control such as `PCABaseline`: a group of one, see `evaluate_group`."""
    return evaluate_group({"sae": sae}, evaluation_set, downstream, bootstrap, probes=probes).results["sae"]


def evaluate_group(
    saes: Mapping[str, Evaluable],
    evaluation_set: EvaluationSet,
    downstream: Downstream | None = None,
    bootstrap: int = 1000,
    failed: Callable[[str, Exception], None] | None = None,
    say: Say | None = None,
    probes: Probes | None = None,
    probed: Collection[str] | None = None,
) -> "GroupResults":
    """Scores SAEs and controls on all rows of an evaluation set, in one pass over the language model; each SAE is left exactly as it was.

    `bootstrap` is the number of resamples behind each 95 % interval over documents (0: no intervals; a single document has none either). Rows are
    run in chunks of a fixed size, so the result is the same to the last bit for every caller and in every company. `say` hears how long it will take.
    `probes` run on the SAEs that `probed` names, None for all; controls that are no SAEs have no codes to probe.

    Raises ValueError for rows or outputs that are not finite, and for downstream or probes made from another evaluation set; with `failed`, an SAE
    that cannot be scored is left out and `failed` is told (name, error).
    """
    for name, prepared in (("downstream", downstream), ("probes", probes)):
        if prepared is not None and prepared.evaluation_set is not evaluation_set:
            raise ValueError(f"{name}: prepared from another evaluation set; its numbers would not belong to these rows. Make it from this one.")
    rows = evaluation_set.rows
    documents, document_T = evaluation_set.document_T.cpu().unique(return_inverse=True)
    if len(document_T) != len(rows):
        raise ValueError(f"the evaluation set has {len(rows)} rows but {len(document_T)} document numbers; it needs one per row.")
    shared = MetricSetup.of(rows.target_TD, len(documents), num_latents=0, num_experts=0)
    scores = {name: _Scores.of(_setup(shared, sae)) for name, sae in saes.items()}
    occurrences_T = None if evaluation_set.tokens_CS is None else occurrences(*evaluation_set.text())
    losses: dict[str, DownstreamLoss] = {}
    probings: dict[str, dict[str, Estimate]] = {}
    saes = dict(saes)

    def out(name: str, error: Exception) -> None:
        if failed is None:
            raise error
        del saes[name], scores[name]
        losses.pop(name, None)
        failed(name, error)

    progress = Countdown("evaluating", len(rows), "rows", say or (lambda _: None))
    for chosen in chunks(len(rows)):
        for name, sae in list(saes.items()):
            try:
                target_TD, output = outputs(sae, rows[chosen])
                counts_T = None if occurrences_T is None else occurrences_T[chosen]
                scores[name].update(MetricBatch.of(target_TD, output, document_T[chosen], counts_T))
            except Exception as error:  # one SAE that cannot be run must not stop the others
                out(name, error)
        progress(chosen.stop)
    if downstream is not None:
        losses = {name: DownstreamLoss(replace(shared, num_documents=downstream.num_documents)) for name in saes}
        progress = Countdown("evaluating", len(downstream), "parts of the text", say or (lambda _: None))
        for done, batches in enumerate(downstream.predictions(saes, out), start=1):
            for name, batch in batches.items():
                losses[name].update(batch)
            progress(done)
    if probes is not None:
        asked = {name: sae for name, sae in saes.items() if isinstance(sae, SparseAutoencoder) and (probed is None or name in probed)}
        progress = Countdown("probing", len(asked), "SAEs", say or (lambda _: None))
        for done, (name, asked_sae) in enumerate(asked.items(), start=1):
            try:
                probings[name] = probes.measure(asked_sae, bootstrap)
            except Exception as error:  # as above
                out(name, error)
            progress(done)
    effective = effective_documents(document_T.bincount())
    outliers = len(rows) - int(NormLimit.of(rows).inlier_T(rows).sum())
    results = {}
    for name, sae in saes.items():
        metrics, flops = list(scores[name].metrics.values()), sae.flops()
        estimates = _estimates(metrics, bootstrap, effective)
        if downstream is not None:
            estimates |= _estimates([losses[name]], bootstrap, downstream.effective_documents)
        estimates |= probings.get(name, {})
        results[name] = Results(
            metrics=estimates,
            vectors={key: values for metric in metrics for key, values in metric.vectors().items()},
            flops=asdict(flops) | {"forward": flops.forward, "total": flops.total},
            rows=len(document_T),
            documents=len(documents),
            outlier_rows=outliers,
            predictions=0 if downstream is None else downstream.num_predictions,
            firing_counts=scores[name].firing.firing_counts,
            prediction_documents=None if downstream is None else downstream.num_documents,
        )
    numbers = (effective, effective if downstream is None else downstream.effective_documents)
    return GroupResults(results, {name: [*scores[name].metrics.values(), *([losses[name]] if losses else [])] for name in saes}, bootstrap, numbers)


@dataclass(frozen=True)
class GroupResults:
    """What a group scored on the same rows."""

    results: dict[str, Results]
    metrics: dict[str, list[Metric[Any]]]
    """With the sums behind them."""
    _bootstrap: int
    _effective: tuple[float, float]
    """Documents of rows and of predictions (`effective_documents`)."""

    def ratios(self, main: str, others: Collection[str] | None = None) -> dict[str, dict[str, Estimate]]:
        """By the name of every other SAE, or of those among `others`: FVU (outliers left out) and delta CE of `main` divided by its own, with the
        interval that resampling the same documents for both gives. A number that is not above 0 has no ratio."""
        ratios: dict[str, dict[str, Estimate]] = {}
        for other in [name for name in self.results if name != main and (others is None or name in others)]:
            for name, kind, n in zip(("fvu_inliers", "delta_ce"), (FVU, DownstreamLoss), self._effective, strict=True):
                pair = [metric for sae in (main, other) for metric in self.metrics[sae] if isinstance(metric, kind)]
                if not pair or not (below := self.results[other].metrics[name].value) > 0:
                    continue

                def resampled(weights_RN: Tensor, pair: Any = pair, name: str = name) -> dict[str, Tensor]:
                    ours, theirs = (metric.replicates(weights_RN)[name] for metric in pair)
                    return {name: ours / theirs}

                interval = intervals(resampled, pair[0].setup.num_documents, self._bootstrap, effective=n).get(name, (None, None))
                ratios.setdefault(other, {})[name] = Estimate(self.results[main].metrics[name].value / below, *interval)
        return ratios


@dataclass(frozen=True)
class _Scores:
    """The metrics that apply to one SAE."""

    metrics: dict[str, Metric[MetricBatch]]
    firing: Firing

    @classmethod
    def of(cls, setup: MetricSetup) -> "_Scores":
        metrics = {name: metric(setup) for name, metric in METRICS.items() if metric.applies(setup)}
        firing = metrics["firing"]
        assert isinstance(firing, Firing)
        return cls(metrics, firing)

    def update(self, batch: MetricBatch) -> None:
        for metric in self.metrics.values():
            metric.update(batch)


def _estimates(metrics: Sequence[Metric[Any]], replicates: int, effective: float) -> dict[str, Estimate]:
    spans = bootstrap_intervals(metrics, metrics[0].setup.num_documents, replicates, effective=effective)
    return {name: Estimate(value, *spans.get(name, (None, None))) for metric in metrics for name, value in metric.compute().items()}


def _setup(shared: MetricSetup, sae: Evaluable) -> MetricSetup:
    num_shared = sae.num_shared if isinstance(sae, SparseAutoencoder) else 0  # a control has none
    return replace(shared, num_latents=sae.num_latents, num_experts=sae.num_experts, num_shared=num_shared)


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

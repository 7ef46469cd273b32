"""Intervals by resampling documents: rows of one document are alike, so resampling rows would make every interval far too narrow."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from switch_sae.metrics.base import Metric

BLOCK_ELEMENTS = 2**24
Replicates = Callable[[Tensor], dict[str, Tensor]]
"""What resamples with weights_RN give: numbers by name, [R] each (`Metric.replicates`)."""


def document_weights(num_documents: int, replicates: int, seed: int = 0) -> Iterator[Tensor]:
    """How often each of N documents is drawn in each of R resamples of N with replacement (multinomial), as blocks of [R', N], float64.

    The same seed gives the same resamples to every SAE, so differences between SAEs can be bootstrapped too.
    """
    generator = torch.Generator().manual_seed(seed)
    block = max(1, BLOCK_ELEMENTS // num_documents)
    for start in range(0, replicates, block):
        drawn_RN = torch.randint(num_documents, (min(block, replicates - start), num_documents), generator=generator)
        weights_RN = torch.zeros(drawn_RN.shape, dtype=torch.float64)
        yield weights_RN.scatter_add_(1, drawn_RN, torch.ones_like(weights_RN))


def bootstrap_intervals(
    metrics: Iterable[Metric], num_documents: int, replicates: int = 1000, coverage: float = 0.95, seed: int = 0, effective: float | None = None
) -> dict[str, tuple[float, float]]:
    """The interval of every number that can be resampled (`intervals`). The evaluation mean and the outlier limit are held fixed."""
    metrics = list(metrics)

    def resampled(weights_RN: Tensor) -> dict[str, Tensor]:
        return {name: values_R for metric in metrics for name, values_R in metric.replicates(weights_RN).items()}

    return intervals(resampled, num_documents, replicates, coverage, seed, effective)


def intervals(
    resampled: Replicates, num_documents: int, replicates: int = 1000, coverage: float = 0.95, seed: int = 0, effective: float | None = None
) -> dict[str, tuple[float, float]]:
    """Expanded percentile intervals (Hesterberg 2015, "What Teachers Should Know about the Bootstrap", section 5.3) of numbers that resamples of
    documents give: quantiles at tails of Phi(-sqrt(n / (n - 1)) t), t being Student's quantile with n - 1 degrees of freedom. n is the `effective`
    number of documents, None for all alike (`effective_documents`).

    Plain percentile intervals are too narrow by sqrt((n - 1) / n), take the normal's quantile for t, and know nothing of documents of unequal size:
    "95 %" of FVU covered 91 to 93 % at 34 documents and 87 % at 10. These cover 94 to 97 % (`python -m experiments.benchmarks.coverage`). Empty where
    there is one document or none: nothing can be said about others then. Nor is there an interval where some resample has no value, such as the FVU
    of rows that few documents have.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage={coverage} must lie between 0 and 1, such as 0.95.")
    if replicates < 0:
        raise ValueError(f"replicates={replicates} is negative. Use 0 for no intervals, or 1000.")
    if num_documents < 2 or replicates == 0:
        return {}
    values: dict[str, list[Tensor]] = {}
    for weights_RN in document_weights(num_documents, replicates, seed):
        for name, value_R in resampled(weights_RN).items():
            values.setdefault(name, []).append(value_R)
    tail = expanded_tail(coverage, num_documents if effective is None else effective)
    tails = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    replicated = {name: torch.cat(blocks) for name, blocks in values.items()}
    quantiles = {name: value_R.quantile(tails) for name, value_R in replicated.items() if bool(value_R.isfinite().all())}
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}


def middle_of(draws: Tensor) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of draws; of few draws nearly their smallest and largest."""
    low, high = draws.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def effective_documents(sizes_N: Tensor) -> float:
    """(sum of sizes)^2 / sum of squared sizes: as many documents of equal size say as much (Kish 1965). At least 2, below which nothing is known."""
    sizes_N = sizes_N.double()
    return max(2.0, float(sizes_N.sum().square() / sizes_N.square().sum()))


def expanded_tail(coverage: float, n: float) -> float:
    """Phi(-sqrt(n / (n - 1)) t) for the quantile t of |T| <= t with probability `coverage` and n - 1 degrees of freedom."""
    reach = math.sqrt(n / (n - 1)) * t_quantile(coverage, n - 1)
    return (1 - math.erf(reach / math.sqrt(2))) / 2


def t_quantile(coverage: float, freedom: float) -> float:
    """t with P(|T| <= t) = coverage for Student's T; infinite without degrees of freedom. Error below 1e-6 of it, up to coverage 0.999.

    With t = sqrt(freedom) tan(a) the density of the angle a is proportional to cos(a)^(freedom - 1), which is integrated.
    """
    if freedom <= 0:
        return math.inf
    angle = torch.linspace(0, math.pi / 2, 2**17 + 1, dtype=torch.float64)
    below = torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle)
    below = below / below[-1]
    place = int(torch.searchsorted(below, coverage))
    left = float(below[place - 1]) if place else 0.0
    share = (coverage - left) / (float(below[place]) - left)
    return math.sqrt(freedom) * math.tan(float(angle[place]) + share * float(angle[place + 1] - angle[place]))

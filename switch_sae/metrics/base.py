"""What every metric is: sums that `update` adds to and `compute` divides.

Sums are float64 and added row by row in reading order, so a result is bit-identical however the rows are split into updates. Most are kept per
document: resampling documents then gives an interval for any function of sums without seeing the rows again.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from switch_sae.models.base import SAEOutput
from switch_sae.models.routers import Routing
from switch_sae.rows import NormLimit, Rows, norms


@dataclass(frozen=True)
class MetricSetup:
    """What a metric must know before its first row: sizes, and statistics of all rows' targets, which no single update could know."""

    num_documents: int
    num_latents: int
    num_experts: int
    mean_D: Tensor
    """Mean of the evaluation rows, float64."""
    inlier_mean_D: Tensor
    """Mean of the rows that are not outliers, float64."""
    norm_limit: float
    """Rows of a larger norm are outliers (`NormLimit`)."""
    num_shared: int = 0
    """The first so many latents belong to no expert: every token may use them."""

    @classmethod
    def of(cls, x_TD: Tensor, num_documents: int, num_latents: int, num_experts: int) -> Self:
        """From all evaluation rows.

        Raises ValueError for rows that are missing, not finite, all equal or mostly zero: reconstruction metrics are not defined on them.
        """
        if x_TD.ndim != 2 or x_TD.shape[0] == 0:
            raise ValueError(f"evaluation rows have shape {tuple(x_TD.shape)}; need [rows, d_in] with at least one row.")
        x_TD = x_TD.cpu()
        check_finite("evaluation rows", x_TD)
        rows = Rows.of(x_TD)
        limit = NormLimit.of(rows)
        if bool((x_TD == x_TD[0]).all()):
            raise ValueError(f"all {len(x_TD)} evaluation rows are equal: the fraction of variance unexplained would be 0/0. Give more varied rows.")
        inlier_T = limit.inlier_T(rows).double()
        mean_D, inlier_mean_D = weighted_mean(x_TD, torch.ones_like(inlier_T)), weighted_mean(x_TD, inlier_T)
        return cls(num_documents, num_latents, num_experts, mean_D, inlier_mean_D, limit.target)


@dataclass(frozen=True)
class MetricBatch:
    """The targets of some evaluation rows and what an SAE made of the rows, on the CPU, where sums are added in a fixed order."""

    target_TD: Tensor
    """What should have come out: the rows themselves for an autoencoder."""
    output: SAEOutput
    document_T: Tensor
    """int64 in [0, num_documents)."""
    occurrences_T: Tensor | None = None
    """How many evaluation rows have the same token; None where there is no text."""

    @classmethod
    def of(cls, target_TD: Tensor, output: SAEOutput, document_T: Tensor, occurrences_T: Tensor | None = None) -> Self:
        """Checks a batch and moves it to the CPU. Raises ValueError for outputs that are not finite or not of the target's shape."""
        if output.recon_TD.shape != target_TD.shape:
            raise ValueError(f"the reconstruction has shape {tuple(output.recon_TD.shape)}; it must be that of the target, {tuple(target_TD.shape)}.")
        for name, tensor in (("activations", target_TD), ("reconstruction", output.recon_TD), ("latent values", output.latents.values)):
            check_finite(name, tensor)
        latents, routing = output.latents, output.routing
        if routing is not None:
            check_finite("router probabilities", routing.probs_TE)
            routing = Routing(routing.expert_TS.cpu(), routing.gate_TS.cpu(), routing.probs_TE.cpu())
        return cls(target_TD.cpu(), SAEOutput(output.recon_TD.cpu(), latents.cpu(), routing), document_T.cpu(), occurrences_T)

    @cached_property
    def residual_sq_T(self) -> Tensor:
        """||target - recon||^2, float64."""
        return (self.target_TD.double() - self.output.recon_TD.double()).square().sum(1)

    @cached_property
    def target_sq_T(self) -> Tensor:
        """||target||^2, float64."""
        return self.target_TD.double().square().sum(1)

    @cached_property
    def recon_sq_T(self) -> Tensor:
        """||recon||^2, float64."""
        return self.output.recon_TD.double().square().sum(1)

    def inlier_T(self, norm_limit: float) -> Tensor:
        """1 for rows whose norm is at most `norm_limit`, else 0; float64."""
        return (norms(self.target_TD) <= norm_limit).double()


class HasDocuments(Protocol):
    """A batch whose rows belong to documents."""

    @property
    def document_T(self) -> Tensor: ...


B = TypeVar("B", bound=HasDocuments)


class Metric(ABC, Generic[B]):
    """One or more numbers about an SAE on the evaluation rows."""

    def __init__(self, setup: MetricSetup) -> None:
        self.setup = setup

    @classmethod
    def applies(cls, setup: MetricSetup) -> bool:
        """False where the numbers are undefined, such as the load of experts for an SAE without experts."""
        return True

    @abstractmethod
    def update(self, batch: B) -> None:
        """Adds the sums of some rows."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers over all rows added so far."""

    def replicates(self, weights_RN: Tensor) -> dict[str, Tensor]:
        """The same numbers for R resamples, [R] each, when document n counts weights_RN[r, n] times. A number that is missing has no interval."""
        return {}

    def vectors(self) -> dict[str, list[float]]:
        """Numbers per expert, by name."""
        return {}


class DocumentMetric(Metric[B]):
    """A metric that is a function of sums over rows, kept per document. Subclasses say what is summed and what the sums mean."""

    def __init__(self, setup: MetricSetup) -> None:
        super().__init__(setup)
        self.sums: dict[str, Tensor] = {}
        """[num_documents] or [num_documents, columns] by name, float64."""

    @abstractmethod
    def rows(self, batch: B) -> dict[str, Tensor]:
        """What each row adds: [T] or [T, columns] by name."""

    @abstractmethod
    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The numbers, [R] each, from sums with a leading dimension R."""

    def update(self, batch: B) -> None:
        for name, rows in self.rows(batch).items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(self.setup.num_documents, *rows.shape[1:], dtype=torch.float64)
            add_by_document(self.sums[name], rows, batch.document_T)

    def totals(self) -> dict[str, Tensor]:
        """Sums over all documents, with a leading dimension of 1."""
        if not self.sums:
            raise ValueError(f"{type(self).__name__} has seen no rows. Call update before compute.")
        return {name: sums.sum(0, keepdim=True) for name, sums in self.sums.items()}

    def compute(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.ratios(self.totals()).items()}

    def replicates(self, weights_RN: Tensor) -> dict[str, Tensor]:
        return self.ratios({name: weights_RN @ sums for name, sums in self.sums.items()})


def add_by_document(sums: Tensor, rows: Tensor, document_T: Tensor) -> None:
    """sums[document_T[t]] += rows[t], in order of t and in float64.

    The one-dimensional index_add_ on a CPU is a sequential loop, which is what makes results independent of the split; hence the flat indices.
    """
    columns = sums[0].numel()
    flat = document_T[:, None] * columns + torch.arange(columns)
    sums.view(-1).index_add_(0, flat.flatten(), rows.double().flatten())


def weighted_mean(x_TD: Tensor, weight_T: Tensor) -> Tensor:
    """sum_t w_t x_t / sum_t w_t in float64, without a float64 copy of all rows."""
    total_D = torch.zeros(x_TD.shape[1], dtype=torch.float64)
    for rows, weight in zip(x_TD.split(2048), weight_T.split(2048), strict=True):
        total_D += weight @ rows.double()
    return total_D / weight_T.sum()


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError naming how many rows hold NaN or infinity, and the first."""
    bad = (~tensor.isfinite()).any(dim=1).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(tensor)} rows of the {name} hold NaN or infinity (first: row {int(bad[0])}). Metrics need finite numbers: "
            "check the source of activations and the SAE's weights."
        )

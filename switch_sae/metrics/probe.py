"""What every probe is: a measure that must run an SAE again, or needs all of its codes at once. Made once, shared by all SAEs of a group."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.metrics.base import weighted_mean
from switch_sae.metrics.bootstrap import effective_documents
from switch_sae.models.base import SparseAutoencoder
from switch_sae.rows import NormLimit, Rows

Halves = tuple[EvaluationSet, EvaluationSet]
"""Documents to choose on, and documents to score on."""


@dataclass(frozen=True)
class Quotients:
    """Numbers that are a sum over units divided by another; units are what the bootstrap resamples: documents, or latents."""

    above: Mapping[str, Tensor]
    """[units] by name, float64."""
    below: Mapping[str, Tensor]
    effective: float
    """As many units of equal size say as much (`effective_documents`)."""
    plain: Mapping[str, float] = field(default_factory=dict)
    """Numbers without an interval."""

    @property
    def units(self) -> int:
        return max((len(above_N) for above_N in self.above.values()), default=0)

    def values(self) -> dict[str, float]:
        """The numbers over all units."""
        return {name: float(above_N.sum() / self.below[name].sum()) for name, above_N in self.above.items()} | dict(self.plain)

    def replicates(self, weights_RN: Tensor) -> dict[str, Tensor]:
        """[R] each, when unit n counts weights_RN[r, n] times."""
        return {name: (weights_RN @ above_N) / (weights_RN @ self.below[name]) for name, above_N in self.above.items()}


class Probe(ABC):
    """Prepared for an evaluation set; `measure` gives the same bits for an SAE on every call, in every order and company."""

    @classmethod
    def applies(cls, evaluation_set: EvaluationSet, halves: Halves | None) -> bool:
        """False where the numbers are undefined, such as those about tokens for activations without text."""
        return True

    @abstractmethod
    def __init__(self, evaluation_set: EvaluationSet, halves: Halves | None) -> None:
        """`halves` are those of the evaluation set (`EvaluationSet.halves`) unless they are given."""

    @abstractmethod
    def measure(self, sae: SparseAutoencoder) -> Quotients:
        """The numbers of one SAE, which is left as it was; a number that is undefined for it is missing."""


@dataclass(frozen=True)
class Sample:
    """Rows that are no outliers, evenly taken from an evaluation set: the same for every SAE."""

    rows: Rows
    document_T: Tensor
    """Numbered as `evaluate_group` numbers the documents of the whole set, so that its resamples are theirs."""
    num_documents: int
    mean: Rows
    """[1, D] each: means of all rows that are no outliers, float64."""

    @classmethod
    def of(cls, evaluation_set: EvaluationSet, most: int) -> "Sample":
        """At most so many rows."""
        rows = evaluation_set.rows
        documents, document_T = evaluation_set.document_T.cpu().unique(return_inverse=True)
        inlier_T = NormLimit.of(rows).inlier_T(rows)
        chosen = inlier_T.nonzero()[:, 0]
        chosen = chosen[torch.arange(min(most, len(chosen))) * len(chosen) // min(most, len(chosen))]
        mean = rows.map(lambda rows_TD: weighted_mean(rows_TD.cpu(), inlier_T.cpu().double())[None])
        return cls(rows[chosen], document_T[chosen.cpu()], len(documents), mean)

    def quotients(self, columns: Mapping[str, tuple[Tensor, Tensor]]) -> Quotients:
        """Of what each row adds above and below, [T] each, by name."""
        sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, pair in columns.items():
            for side, rows_T in zip(sums, pair, strict=True):
                side[name] = torch.zeros(self.num_documents, dtype=torch.float64).index_add_(0, self.document_T, rows_T.double())
        return Quotients(*sums, effective_documents(self.document_T.bincount()))

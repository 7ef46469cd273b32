"""Rows that an analysis scores SAEs on, and ratios of sums over them with intervals over documents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.analysis.observed import Sample
from switch_sae.metrics.base import add_by_document
from switch_sae.metrics.bootstrap import effective_documents, intervals
from switch_sae.rows import NormLimit, Rows, Shapes

Ratio = Callable[[dict[str, Tensor]], Tensor]
"""Of sums by name, over all rows or [R] over resamples."""


@dataclass(frozen=True, repr=False)
class Scored(Shapes):
    """Rows that are no outliers, and what every sum over them needs."""

    rows: Rows
    document_T: Tensor
    halves: tuple[Tensor, Tensor]
    """Documents A and B (`Sample.halves`), as numbers of all these rows."""
    variance_T: Tensor
    """||target - mean||^2."""
    kept_T: Tensor
    """Which rows of the sample these are."""

    @classmethod
    def of(cls, sample: Sample) -> "Scored":
        inlier_T = NormLimit.of(sample.rows).inlier_T(sample.rows)
        kept_T, place_T = inlier_T.nonzero()[:, 0], inlier_T.cumsum(0) - 1
        first, second = (place_T[half[inlier_T[half]]] for half in sample.halves())
        rows = sample.rows if len(kept_T) == len(sample) else sample.rows[kept_T]
        target_TD = rows.target_TD.double()
        document_T = sample.document_T[kept_T].unique(return_inverse=True)[1]
        return cls(rows, document_T, (first, second), (target_TD - target_TD.mean(0)).square().sum(1), kept_T)

    def part(self, chosen: Tensor) -> "Scored":
        """Some rows. The variance stays that about the mean of all."""
        document_T = self.document_T[chosen].unique(return_inverse=True)[1]
        return Scored(self.rows[chosen], document_T, self.halves, self.variance_T[chosen], self.kept_T[chosen])

    def ratios(self, columns: Mapping[str, Tensor], wanted: Mapping[str, Ratio]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """(values, 95 % intervals) of functions of the sums of columns [T]; no interval for one that some resample leaves undefined."""
        documents = int(self.document_T.max()) + 1
        sums_NC = torch.zeros(documents, len(columns), dtype=torch.float64)
        add_by_document(sums_NC, torch.stack([column.double() for column in columns.values()], dim=1), self.document_T)

        def numbers(sums_RC: Tensor) -> dict[str, Tensor]:
            sums = dict(zip(columns, sums_RC.unbind(1), strict=True))
            return {name: function(sums) for name, function in wanted.items()}

        sizes_N = self.document_T.bincount().double()
        spans = intervals(lambda weights_RN: numbers(weights_RN @ sums_NC), documents, effective=effective_documents(sizes_N))
        return {name: float(value) for name, value in numbers(sums_NC.sum(0, keepdim=True)).items()}, spans

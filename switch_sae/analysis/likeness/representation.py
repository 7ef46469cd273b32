"""Vectors of the same rows, known by their inner products: dense ones, and sparse codes that are never made dense as a whole.

Shapes: T rows, P pairs of rows, M units (dimensions or latents), K slots of a code.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.models import SparseLatents

BLOCK_ELEMENTS = 2**22
"""Elements of what is made dense at once: 16 MB in float32."""


class Representation(ABC):
    """T vectors x_t; similarity analyses ask for nothing but their inner products k(t, u) = <x_t, x_u>."""

    units: int

    @abstractmethod
    def __len__(self) -> int:
        """T."""

    @abstractmethod
    def inner(self, left_P: Tensor, right_P: Tensor) -> Tensor:
        """[P] float64: k(left, right); fast where `left_P` is sorted."""

    @abstractmethod
    def part(self, row_T: Tensor) -> Self:
        """Those of some rows, in their order."""

    @abstractmethod
    def inner_with_all(self, rows: slice) -> Tensor:
        """[T, B]: k of every row with those of a block."""

    @property
    @abstractmethod
    def sum_T(self) -> Tensor:
        """Sums over units, float64."""

    @property
    @abstractmethod
    def total_T(self) -> Tensor:
        """sum_u k(t, u), float64."""

    @cached_property
    def squared_T(self) -> Tensor:
        """k(t, t), float64."""
        every = torch.arange(len(self))
        return self.inner(every, every)

    @cached_property
    def others_T(self) -> Tensor:
        """sum over u other than t of k(t, u), float64."""
        return self.total_T - self.squared_T


@dataclass(frozen=True)
class Vectors(Representation):
    """Dense vectors, such as activations."""

    x_TD: Tensor

    @property
    def units(self) -> int:  # type: ignore[override]
        return self.x_TD.shape[1]

    def __len__(self) -> int:
        return len(self.x_TD)

    def inner(self, left_P: Tensor, right_P: Tensor) -> Tensor:
        size = max(1, BLOCK_ELEMENTS // self.units)
        blocks = [(self.x_TD[a] * self.x_TD[b]).sum(1).double() for a, b in zip(left_P.split(size), right_P.split(size), strict=True)]
        return torch.cat(blocks)

    def part(self, row_T: Tensor) -> "Vectors":
        return Vectors(self.x_TD[row_T])

    def inner_with_all(self, rows: slice) -> Tensor:
        return self.x_TD @ self.x_TD[rows].T

    @cached_property
    def sum_T(self) -> Tensor:
        return self.x_TD.sum(1, dtype=torch.float64)

    @cached_property
    def total_T(self) -> Tensor:
        return (self.x_TD * self.x_TD.sum(0)).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class Codes(Representation):
    """Sparse codes z with k(t, u) = z_t' S z_u: S is the identity, or says how alike latents are (`mix_MM`)."""

    values_TK: Tensor
    indices_TK: Tensor
    units: int
    mix_MM: Tensor | None = None
    """Symmetric, in the values' type."""

    @classmethod
    def of(cls, latents: SparseLatents, cluster_M: Tensor | None = None, mix_MM: Tensor | None = None) -> "Codes":
        """Those of an SAE; with `cluster_M`, latents of one cluster are one unit whose value is their sum."""
        indices_TK, units = latents.indices_TK, latents.num_latents
        if cluster_M is not None:
            indices_TK, units = cluster_M[indices_TK], int(cluster_M.max()) + 1
        return cls(latents.values_TK, indices_TK, units, mix_MM)

    def __len__(self) -> int:
        return len(self.values_TK)

    def inner(self, left_P: Tensor, right_P: Tensor) -> Tensor:
        if bool((left_P[1:] < left_P[:-1]).any()):
            order_P = left_P.argsort(stable=True)
            return torch.empty(len(left_P), dtype=torch.float64).scatter_(0, order_P, self.inner(left_P[order_P], right_P[order_P]))
        found_P = torch.empty(len(left_P), dtype=torch.float64)
        size = max(1, BLOCK_ELEMENTS // self.units)
        for start in range(0, len(self), size):
            low, high = torch.searchsorted(left_P, torch.tensor([start, start + size])).tolist()
            spread = self._spread(slice(start, start + size)).flatten()
            step = max(1, BLOCK_ELEMENTS // self.values_TK.shape[1])
            for a, b, pairs in zip(left_P[low:high].split(step), right_P[low:high].split(step), torch.arange(low, high).split(step), strict=True):
                place_PK = (a - start)[:, None] * self.units + self.indices_TK[b]
                found_P[pairs] = (spread[place_PK] * self.values_TK[b]).sum(1).double()
        return found_P

    def _spread(self, rows: slice) -> Tensor:
        """[B, M]: S z of a block of rows."""
        values_BK, indices_BK = self.values_TK[rows], self.indices_TK[rows]
        if self.mix_MM is not None:
            return F.embedding_bag(indices_BK, self.mix_MM, per_sample_weights=values_BK, mode="sum")
        return values_BK.new_zeros(len(values_BK), self.units).scatter_add_(1, indices_BK, values_BK)

    def part(self, row_T: Tensor) -> "Codes":
        return replace(self, values_TK=self.values_TK[row_T], indices_TK=self.indices_TK[row_T])

    def inner_with_all(self, rows: slice) -> Tensor:
        return F.embedding_bag(self.indices_TK, self._spread(rows).T.contiguous(), per_sample_weights=self.values_TK, mode="sum")

    @cached_property
    def sum_T(self) -> Tensor:
        return self.values_TK.sum(1, dtype=torch.float64)

    @cached_property
    def total_T(self) -> Tensor:
        sum_M = torch.zeros(self.units, dtype=torch.float64).index_add_(0, self.indices_TK.flatten(), self.values_TK.flatten().double())
        if self.mix_MM is not None:
            sum_M = (self.mix_MM @ sum_M.to(self.mix_MM.dtype)).double()
        return (self.values_TK.double() * sum_M[self.indices_TK]).sum(1)

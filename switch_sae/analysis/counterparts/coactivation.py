"""Which latents of two SAEs fire together, by sums over the few that are active on a row: never a [T, M] array.

Shapes: A latents of the first SAE, B of the second, N groups of documents, R resamples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.metrics.bootstrap import effective_documents, intervals
from switch_sae.models import SparseLatents
from switch_sae.rows import Shapes

PAIRS = 2**22
"""Pairs of active latents held at once."""
GROUPS = 400
"""Documents are resampled one by one up to so many, more of them in so many groups: synthetic rows are documents of their own."""


def kept(latents: SparseLatents, rows_T: Tensor, keep_A: Tensor) -> SparseLatents:
    """The codes of some rows over some latents only, renumbered 0 to A - 1 in the order of `keep_A`; what is left out has value 0."""
    place_M = torch.full((latents.num_latents,), -1)
    place_M[keep_A] = torch.arange(len(keep_A))
    place_TK = place_M[latents.indices_TK[rows_T]]
    return SparseLatents(latents.values_TK[rows_T].masked_fill(place_TK < 0, 0.0), place_TK.clamp(min=0), max(1, len(keep_A)))


def firing(latents: SparseLatents) -> SparseLatents:
    """1 where a latent is active."""
    return SparseLatents((latents.values_TK != 0).to(latents.values_TK), latents.indices_TK, latents.num_latents)


def products(first: SparseLatents, second: SparseLatents) -> Tensor:
    """[A, B] float32: sum over rows of f_a(t) s_b(t). T K K' additions."""
    total = torch.zeros(first.num_latents * second.num_latents)
    step = max(1, PAIRS // (first.values_TK.shape[1] * second.values_TK.shape[1]))
    for start in range(0, len(first.values_TK), step):
        rows = slice(start, start + step)
        value_TKK = first.values_TK[rows, :, None] * second.values_TK[rows, None, :]
        place_TKK = first.indices_TK[rows, :, None] * second.num_latents + second.indices_TK[rows, None, :]
        total.index_add_(0, place_TKK.flatten(), value_TKK.flatten().float())
    return total.view(first.num_latents, second.num_latents)


def sums(latents: SparseLatents) -> tuple[Tensor, Tensor]:
    """(sum over rows of values, of their squares), both [A] float64."""
    values, places = latents.values_TK.double().flatten(), latents.indices_TK.flatten()
    empty = torch.zeros(latents.num_latents, dtype=torch.float64)
    return empty.index_add(0, places, values), empty.index_add(0, places, values.square())


def correlation(first: SparseLatents, second: SparseLatents) -> Tensor:
    """[A, B] float32: Pearson correlation of activations over the same rows, zeros included; 0 for a latent that is constant on them."""
    rows = len(first.values_TK)
    (sum_A, square_A), (sum_B, square_B) = sums(first), sums(second)
    scaled_AB = products(first, second)
    deviation_A, deviation_B = (_inverse_root(square - total.square() / rows, square) for total, square in ((sum_A, square_A), (sum_B, square_B)))
    scaled_AB -= (sum_A / rows).float()[:, None] * sum_B.float()
    return scaled_AB.mul_(deviation_A.float()[:, None]).mul_(deviation_B.float()).clamp_(-1, 1)


def groups(document_T: Tensor) -> tuple[Tensor, Tensor]:
    """(group of each row, from 0; rows of each group): documents, or where they are more than `GROUPS`, so many groups of whole documents."""
    number_T = document_T.unique(return_inverse=True)[1] % GROUPS
    return number_T, number_T.bincount()


@dataclass(frozen=True, repr=False)
class PairSums(Shapes):
    """What correlations of given pairs (a, partner of a) need, by group of documents; each [N, A] float64."""

    rows_N: Tensor
    product_NA: Tensor
    first_NA: Tensor
    first_square_NA: Tensor
    second_NA: Tensor
    second_square_NA: Tensor

    @classmethod
    def of(cls, first: SparseLatents, second: SparseLatents, partner_A: Tensor, document_T: Tensor) -> "PairSums":
        """`partner_A` are latents of the second SAE, one for each of the first's."""
        group_T, rows_N = groups(document_T)
        groups_N, pairs = len(rows_N), first.num_latents

        def summed(group: Tensor, place: Tensor, value: Tensor) -> Tensor:
            return torch.zeros(groups_N * pairs, dtype=torch.float64).index_add_(0, group * pairs + place, value.double()).view(groups_N, pairs)

        group_TK = group_T[:, None].expand_as(first.indices_TK)
        product_TK = first.values_TK * values_of(second, partner_A[first.indices_TK])
        by_first = [summed(group_TK.flatten(), first.indices_TK.flatten(), v.flatten()) for v in (product_TK, first.values_TK, first.values_TK**2)]
        # Several latents may have one partner: its sums are taken once, then given to each.
        used, back_A = partner_A.unique(return_inverse=True)
        theirs = kept(second, torch.arange(len(second.values_TK)), used)
        pairs = len(used)
        group_TK = group_T[:, None].expand_as(theirs.indices_TK)
        by_second = [summed(group_TK.flatten(), theirs.indices_TK.flatten(), v.flatten())[:, back_A] for v in (theirs.values_TK, theirs.values_TK**2)]
        return cls(rows_N.double(), *by_first, *by_second)

    def correlations(self, weights_RN: Tensor) -> Tensor:
        """[R, A] float64: of each pair in resamples of documents; NaN where the first is constant there, 0 where only its partner is."""
        rows_R1 = (weights_RN @ self.rows_N)[:, None]
        parts = (self.product_NA, self.first_NA, self.first_square_NA, self.second_NA, self.second_square_NA)
        product, first, first_square, second, second_square = (weights_RN @ part_NA for part_NA in parts)
        scale = _inverse_root(first_square - first**2 / rows_R1, first_square, torch.nan)
        scale *= _inverse_root(second_square - second**2 / rows_R1, second_square)
        return ((product - first * second / rows_R1) * scale).clamp(-1, 1)


def values_of(latents: SparseLatents, wanted_TK: Tensor) -> Tensor:
    """[T, K]: the value of latent `wanted_TK[t, k]` on row t, 0 where it is silent."""
    found_TK = torch.zeros(wanted_TK.shape, dtype=latents.values_TK.dtype)
    for value_T, index_T in zip(latents.values_TK.T, latents.indices_TK.T, strict=True):
        found_TK += value_T[:, None] * (wanted_TK == index_T[:, None])
    return found_TK


def over_documents(
    resampled: Callable[[Tensor], dict[str, Tensor]], values: dict[str, float], rows_N: Tensor, replicates: int
) -> dict[str, tuple[float, float]]:
    """95 % intervals over groups of documents of these values, from what resamples give (`metrics.bootstrap.intervals`), moved so that resamples have
    the values as their mean: on resampled documents fewer rare latents fire together with their partners, which would press all of them down."""

    def moved(weights_RN: Tensor) -> dict[str, Tensor]:
        return {name: value_R - value_R.mean() + values[name] for name, value_R in resampled(weights_RN).items() if name in values}

    spans = intervals(moved, len(rows_N), replicates, effective=effective_documents(rows_N))
    return {name: (min(low, values[name]), max(high, values[name])) for name, (low, high) in spans.items()}


def _inverse_root(variance: Tensor, scale: Tensor, otherwise: float = 0.0) -> Tensor:
    """1 / sqrt(variance); `otherwise` where it is 0 up to rounding, measured by the sum of squares."""
    constant = variance <= 1e-9 * scale
    return torch.where(constant, otherwise, variance.clamp(min=1e-300).rsqrt())

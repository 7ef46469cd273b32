"""Writing directions as sums of few rows of a dictionary, one row at a time.

Shapes: R targets, M rows of the dictionary, D activation size, S rows in a sum.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_JITTER = 1e-9
"""On the diagonal of Gram matrices: two equal rows must not make them singular."""
_USELESS = 1e-7
"""A row whose product with what is left of a unit target is smaller adds nothing."""


@dataclass(frozen=True)
class SparseSums:
    """For each target, how well 1, 2, ... `most` rows explain it."""

    r2_RS: Tensor
    """[r, s]: R^2 = 1 - ||target - sum||^2 / ||target||^2 of the best sum of at most s + 1 rows that was met, float64."""
    index_RS: Tensor
    """The rows of the last sum, int64, in no order; -1 where it has fewer."""
    weight_RS: Tensor
    """Their weights, for unit targets and unit rows; 0 where there is none."""


@torch.no_grad()
def sparse_sums(target_RD: Tensor, dictionary_MD: Tensor, most: int, nonnegative: bool = False) -> SparseSums:
    """Orthogonal matching pursuit (Pati et al. 1993): the row with the largest |product| with what is left, then least squares on all so far.

    With `nonnegative`, the largest product, and weights >= 0: the active-set method of Lawson and Hanson (1974) stopped after `most` rows, in which a
    row whose weight reaches 0 leaves again. Targets and rows are taken at unit norm; targets are independent of each other. Raises ValueError for
    rows or targets of norm 0, and for `most` above what there is.
    """
    if not 1 <= most <= len(dictionary_MD):
        raise ValueError(f"most={most} rows of a dictionary of {len(dictionary_MD)}: it must lie between 1 and {len(dictionary_MD)}.")
    for name, rows in (("targets", target_RD), ("dictionary rows", dictionary_MD)):
        if bool((rows.norm(dim=1) == 0).any()):
            raise ValueError(f"some {name} are exactly 0 and have no direction. Leave them out.")
    target_RD, unit_MD = F.normalize(target_RD.double(), dim=1), F.normalize(dictionary_MD.float(), dim=1)
    R = len(target_RD)
    atom_RSD = target_RD.new_zeros(R, most, target_RD.shape[1])
    index_RS = torch.full((R, most), -1)
    weight_RS, r2_RS = target_RD.new_zeros(R, most), target_RD.new_zeros(R, most)
    gram_RSS, seen_RS = target_RD.new_zeros(R, most, most), target_RD.new_zeros(R, most)
    rest_RD, every = target_RD.clone(), torch.arange(R)
    for step in range(most if not nonnegative else 2 * most):
        product_RM = rest_RD.float() @ unit_MD.T
        product_RM = product_RM if nonnegative else product_RM.abs_()
        taken = (index_RS >= 0).nonzero(as_tuple=True)
        product_RM[taken[0], index_RS[taken]] = -1
        best_R, row_R = product_RM.max(dim=1)
        grows_R = (best_R > _USELESS) & (index_RS < 0).any(dim=1)
        if not bool(grows_R.any()):
            break
        slot_R = (index_RS < 0).int().argmax(dim=1)
        r, slot = every[grows_R], slot_R[grows_R]
        index_RS[r, slot] = row_R[grows_R]
        new_rD = F.normalize(dictionary_MD[row_R[grows_R]].double(), dim=1)
        atom_RSD[r, slot] = new_rD
        held = min(step + 1, most)  # slots beyond are empty still
        product_rS = (atom_RSD[r, :held] @ new_rD[:, :, None])[:, :, 0]
        gram_RSS[r, slot, :held], gram_RSS[r, :held, slot] = product_rS, product_rS
        seen_RS[r, slot] = (new_rD * target_RD[r]).sum(dim=1)
        weight_RS[:, :held] = _refit(gram_RSS[:, :held, :held], seen_RS[:, :held], index_RS[:, :held], weight_RS[:, :held], nonnegative)
        rest_RD = target_RD - (weight_RS[:, None, :held] @ atom_RSD[:, :held])[:, 0]
        size_R = (index_RS >= 0).sum(dim=1).clamp_min(1)
        r2_R = 1 - rest_RD.square().sum(dim=1)
        r2_RS[every, size_R - 1] = torch.maximum(r2_RS[every, size_R - 1], r2_R)
    return SparseSums(r2_RS.cummax(dim=1).values, index_RS, weight_RS)


def _refit(gram_RSS: Tensor, seen_RS: Tensor, index_RS: Tensor, weight_RS: Tensor, nonnegative: bool) -> Tensor:
    """Least-squares weights of the rows in use, from products of rows and of rows with targets; with `nonnegative`, rows that would turn negative
    are taken out of `index_RS`, in place."""
    while True:
        used_RS = index_RS >= 0
        both_RSS = used_RS[:, :, None] & used_RS[:, None, :]
        identity_SS = torch.eye(gram_RSS.shape[1], dtype=gram_RSS.dtype)
        system_RSS = torch.where(both_RSS, gram_RSS, 0.0) + torch.where(used_RS, _JITTER, 1.0)[:, :, None] * identity_SS
        fitted_RS = torch.cholesky_solve((seen_RS * used_RS)[:, :, None], torch.linalg.cholesky(system_RSS))[:, :, 0]
        if not nonnegative:
            return fitted_RS
        falls_RS = used_RS & (fitted_RS <= 0)
        if not bool(falls_RS.any()):
            return fitted_RS
        # As far towards the fit as all weights stay >= 0; the row that stops it leaves.
        step_RS = torch.where(falls_RS, weight_RS / (weight_RS - fitted_RS).clamp_min(1e-300), torch.inf)
        step_R1 = step_RS.amin(dim=1, keepdim=True).clamp(max=1.0)
        weight_RS = torch.where(used_RS, weight_RS + step_R1 * (fitted_RS - weight_RS), 0.0)
        leaves_RS = falls_RS & (step_RS <= step_R1)
        index_RS[leaves_RS] = -1
        weight_RS = weight_RS.masked_fill(leaves_RS, 0.0)


@torch.no_grad()
def sums_of(target_RD: Tensor, dictionary_MD: Tensor, index_RS: Tensor) -> Tensor:
    """[r, s]: R^2 of each target from the first s + 1 of *given* rows, by least squares, float64: what rows explain that nobody chose by fit."""
    rest_RD, explained_RS = F.normalize(target_RD.double(), dim=1), target_RD.new_zeros(index_RS.shape, dtype=torch.float64)
    basis_RSD = rest_RD.new_zeros(*index_RS.shape, target_RD.shape[1])
    for s in range(index_RS.shape[1]):
        new_RD = F.normalize(dictionary_MD[index_RS[:, s]].double(), dim=1)
        for _ in range(2):  # once more, since the first leaves rounding behind
            new_RD = new_RD - torch.einsum("rs,rsd->rd", torch.einsum("rsd,rd->rs", basis_RSD, new_RD), basis_RSD)
        size_R1 = new_RD.norm(dim=1, keepdim=True)
        basis_RSD[:, s] = torch.where(size_R1 > _USELESS, new_RD / size_R1.clamp_min(_USELESS), 0.0)
        part_R1 = (rest_RD * basis_RSD[:, s]).sum(dim=1, keepdim=True)
        rest_RD = rest_RD - part_R1 * basis_RSD[:, s]
        explained_RS[:, s] = 1 - rest_RD.square().sum(dim=1)
    return explained_RS


def similar_in_frequency(index_RS: Tensor, count_M: Tensor, generator: torch.Generator, among: int = 64) -> Tensor:
    """[r, s]: in place of each row, one drawn from the `among` rows that fire about as often, itself left out; no row twice in one sum where there
    are others. Raises ValueError for an index of -1."""
    if bool((index_RS < 0).any()):
        raise ValueError("some sums have fewer rows than others, so there is nothing to match. Use the sums without nonnegative.")
    M = len(count_M)
    order_M = count_M.argsort(stable=True)
    place_M = torch.empty_like(order_M)
    place_M[order_M] = torch.arange(M)
    among = min(among, M)
    drawn_RS = torch.empty_like(index_RS)
    for r, chosen_S in enumerate(index_RS):
        used: set[int] = set()
        for s, m in enumerate(chosen_S.tolist()):
            first = min(max(0, int(place_M[m]) - among // 2), M - among)
            near = [row for row in order_M[first : first + among].tolist() if row != m]
            free = [row for row in near if row not in used] or near or [m]
            drawn_RS[r, s] = free[int(torch.randint(len(free), (), generator=generator))]
            used.add(int(drawn_RS[r, s]))
    return drawn_RS


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform over all (Haar; Mezzadri 2007), float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()

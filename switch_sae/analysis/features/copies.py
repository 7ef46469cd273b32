"""Rows that point the same way: which pairs do, what clusters they form, and what chance gives when experts are drawn at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.analysis.features.neighbours import BLOCK_ELEMENTS

MOST_PAIRS = 5_000_000
NEGLIGIBLE = 1e-9
"""Probability that is left out of an expectation."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, each once, with their cosines."""

    first_P: Tensor
    second_P: Tensor
    cosine_P: Tensor

    def above(self, threshold: float) -> "Pairs":
        """Those of a larger cosine."""
        kept_P = self.cosine_P > threshold
        return Pairs(self.first_P[kept_P], self.second_P[kept_P], self.cosine_P[kept_P])

    def where(self, kept_P: Tensor) -> "Pairs":
        return Pairs(self.first_P[kept_P], self.second_P[kept_P], self.cosine_P[kept_P])

    def touched(self, rows: int) -> Tensor:
        """[rows] bool: whether a row is in a pair."""
        in_pair_N = torch.zeros(rows, dtype=torch.bool)
        in_pair_N[self.first_P] = True
        in_pair_N[self.second_P] = True
        return in_pair_N


def close_pairs(unit_ND: Tensor, threshold: float) -> Pairs:
    """All pairs of unit rows with a cosine above `threshold`, block by block. Raises ValueError where they are more than `MOST_PAIRS`."""
    rows, found = len(unit_ND), []
    count = 0
    block = max(1, BLOCK_ELEMENTS // max(1, rows))
    for start in range(0, rows, block):
        cosine_BN = unit_ND[start : start + block] @ unit_ND[start:].T
        first_P, second_P = (cosine_BN > threshold).nonzero(as_tuple=True)
        cosine_P = cosine_BN[first_P, second_P]
        later_P = second_P > first_P
        found.append((first_P[later_P] + start, second_P[later_P] + start, cosine_P[later_P]))
        count += int(later_P.sum())
        if count > MOST_PAIRS:
            raise ValueError(f"more than {MOST_PAIRS:,} pairs of rows have a cosine above {threshold}: that finds no copies. Raise the threshold.")
    if not found:
        return Pairs(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    return Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def clusters(pairs: Pairs, rows: int) -> Tensor:
    """[rows] int64: the smallest row of each row's connected component."""
    label_N = torch.arange(rows)
    while True:
        smaller_P = torch.minimum(label_N[pairs.first_P], label_N[pairs.second_P])
        next_N = label_N.clone()
        for end_P in (pairs.first_P, pairs.second_P):
            next_N.scatter_reduce_(0, end_P, smaller_P, "amin")
        next_N = next_N[next_N]  # a label is a row of the same component, whose own label is at most as large
        if torch.equal(next_N, label_N):
            return label_N
        label_N = next_N


def cluster_sizes(label_N: Tensor) -> Tensor:
    """[components] rows of each."""
    return label_N.bincount()[label_N.unique()]


def expected_highest(unit_ND: Tensor, group_N: Tensor) -> tuple[float, float]:
    """(within, across): the mean highest cosine to another row of the own group, and to a row of other groups, that rows would have if the groups
    kept their sizes and were drawn at random: exact expectations, without drawing.

    Of a row's n - 1 others, sorted by cosine, the first that belongs to a random set of g of them has rank j with probability
    C(n - 1 - j, g - 1) / C(n - 1, g); a row is in a group as often as the group is large. NaN where no row has such others.
    """
    rows, size_E = len(unit_ND), group_N.unique(return_counts=True)[1].tolist()
    means = [_mean_rank(rows, [(size, size - 1) for size in size_E]), _mean_rank(rows, [(size, rows - size) for size in size_E])]
    deepest = max(len(chance_J) for chance_J in means)
    sums = [0.0, 0.0]
    block = max(1, BLOCK_ELEMENTS // max(1, rows))
    for start in range(0, rows, block):
        cosine_BN = unit_ND[start : start + block] @ unit_ND.T
        cosine_BN.diagonal(start).fill_(-torch.inf)
        best_BJ = cosine_BN.topk(deepest, dim=1).values.double()
        sums = [total + float((best_BJ[:, : len(chance_J)] @ chance_J).sum()) for total, chance_J in zip(sums, means, strict=True)]
    within, across = (total / rows if len(chance_J) else float("nan") for total, chance_J in zip(sums, means, strict=True))
    return within, across


def _mean_rank(rows: int, groups: list[tuple[int, int]]) -> Tensor:
    """[J]: `first_rank` averaged over groups of so many rows, each with so many members among the others; those without are left out."""
    ranks = [(size, first_rank(rows - 1, members)) for size, members in groups if members > 0]
    mean_J = torch.zeros(max((len(chance_J) for _, chance_J in ranks), default=0), dtype=torch.float64)
    for size, chance_J in ranks:
        mean_J[: len(chance_J)] += size * chance_J / sum(size for size, _ in ranks)
    return mean_J


def first_rank(others: int, members: int) -> Tensor:
    """[J] float64: the probability that the first of `members` random ones among `others` in order has rank 1, 2, ...; what is left out is negligible
    and added to the last. Empty without members."""
    if members < 1:
        return torch.empty(0, dtype=torch.float64)
    left, chances = 1.0, []
    for rank in range(others - members + 1):
        hit = members / (others - rank)
        chances.append(left * hit)
        left *= 1 - hit
        if left < NEGLIGIBLE:
            break
    chance_J = torch.tensor(chances, dtype=torch.float64)
    return chance_J / chance_J.sum()


def relabelled(group_N: Tensor, draws: int) -> Sequence[Tensor]:
    """The groups in random orders, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    return [group_N[torch.randperm(len(group_N), generator=generator)] for _ in range(draws)]


def spectral_size(unit_ND: Tensor) -> float:
    """exp(-sum_i p_i ln p_i) of the eigenvalues p of the Gram matrix of n unit rows over n, which sum to 1: how many orthogonal directions are as
    diverse (the Vendi score, Friedman & Dieng, arXiv 2210.02410, with the cosine as similarity). At most min(n, D).
    """
    p_D = torch.linalg.eigvalsh(unit_ND.double().T @ unit_ND.double()).clamp(min=0)
    return float(torch.special.entr(p_D / p_D.sum()).sum().exp())

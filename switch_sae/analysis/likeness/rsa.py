"""Representational similarity analysis on sampled pairs of rows, by ranks.

Shapes: T rows, P pairs, N documents, V representations ("views") of the same rows. A dissimilarity matrix (RDM) is a vector, its entries at P pairs.
Definitions as in rsatoolbox 0.3.2, which the tests compare with; its n x n matrices of 10,000 rows take minutes and 4 GB.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.analysis.likeness.representation import Representation


@dataclass(frozen=True)
class Pairs:
    """Pairs of different rows, sorted by the left one; each at most once."""

    left_P: Tensor
    right_P: Tensor

    def __len__(self) -> int:
        return len(self.left_P)

    def where(self, chosen_P: Tensor) -> "Pairs":
        """Those of a mask or of increasing numbers."""
        return Pairs(self.left_P[chosen_P], self.right_P[chosen_P])

    def weights(self, weight_N: Tensor, document_T: Tensor) -> Tensor:
        """[P]: how often a resample of documents holds each pair: w_a w_b. Pairs of a row with its own copies are no pairs and never counted."""
        weight_T = weight_N[document_T]
        return weight_T[self.left_P] * weight_T[self.right_P]


def sampled_pairs(rows: int, pairs: int, seed: int = 0) -> Pairs:
    """All pairs of so many rows where there are at most `pairs`, else about so many of them: every row in equally many, the same on every call.

    Rows stand on a circle in random order, and each is paired with those at distances that are drawn without replacement: as even as sampling gets.
    """
    if rows < 2:
        raise ValueError(f"{rows} rows have no pairs. Use at least 2.")
    if rows * (rows - 1) // 2 <= pairs:
        return Pairs(*torch.triu_indices(rows, rows, 1))
    generator = torch.Generator().manual_seed(seed)
    circle_T = torch.randperm(rows, generator=generator)
    steps = 1 + torch.randperm((rows - 1) // 2, generator=generator)[: max(1, pairs // rows)]
    place_T = torch.arange(rows)
    left_P, right_P = circle_T.repeat(len(steps)), torch.cat([circle_T[(place_T + step) % rows] for step in steps.tolist()])
    order_P = left_P.argsort(stable=True)
    return Pairs(left_P[order_P], right_P[order_P])


def cosine_distances(view: Representation, pairs: Pairs) -> Tensor:
    """[P] float64: 1 - cos(x_left, x_right); 1 where one is 0."""
    length_T = view.squared_T.clamp(min=0).sqrt()
    both_P = length_T[pairs.left_P] * length_T[pairs.right_P]
    return 1 - view.inner(pairs.left_P, pairs.right_P) / both_P.masked_fill(both_P == 0, 1)


def correlation_distances(view: Representation, pairs: Pairs) -> Tensor:
    """[P] float64: 1 - the correlation of two vectors over their units; 1 where one is constant.

    On sparse codes it tells nothing from nothing: two codes without a common latent have covariance -mean mean / M, so pairs that tie at cosine 0
    are put in order by how large their codes are.
    """
    mean_T = view.sum_T / view.units
    spread_T = (view.squared_T - view.units * mean_T.square()).clamp(min=0).sqrt()
    both_P = spread_T[pairs.left_P] * spread_T[pairs.right_P]
    covariance_P = view.inner(pairs.left_P, pairs.right_P) - view.units * mean_T[pairs.left_P] * mean_T[pairs.right_P]
    return 1 - covariance_P / both_P.masked_fill(both_P == 0, 1)


class Ranked:
    """An RDM in order, for mid-ranks under any weights without sorting again."""

    def __init__(self, entries_P: Tensor) -> None:
        values_G, self.group_P = entries_P.unique(return_inverse=True)
        self.groups = len(values_G)

    def centred(self, weight_P: Tensor | None = None) -> Tensor:
        """[P] float64: mid-ranks minus their mean, of a list in which each entry stands `weight_P` times."""
        weight_G = torch.bincount(self.group_P, weight_P, minlength=self.groups).double()
        rank_G = weight_G.cumsum(0) - weight_G / 2
        return (rank_G - weight_G.sum() / 2)[self.group_P]


def rank_scale(count: float) -> float:
    """12 / (N^3 - N): what makes a sum of products of centred ranks of N entries a rho-a."""
    return 12 / (count**3 - count) if count > 1 else float("nan")


def rho_a_matrix(ranked: Sequence[Ranked], weight_P: Tensor | None = None) -> Tensor:
    """[V, V] float64: rho-a = 12 <r1 - mean, r2 - mean> / (N^3 - N) of mid-ranks r (Schütt et al. 2023, eLife 82566): Spearman's correlation that
    random tie-breaking would give on average. An RDM with ties has less than 1 with itself: sqrt(rho-a(x, x) rho-a(y, y)) bounds rho-a(x, y)."""
    count = float(len(ranked[0].group_P) if weight_P is None else weight_P.sum())
    centred_VP = torch.stack([one.centred(weight_P) for one in ranked])
    weighted_VP = centred_VP if weight_P is None else centred_VP * weight_P
    return centred_VP @ weighted_VP.T * rank_scale(count)


def rho_a(first_P: Tensor, second_P: Tensor, weight_P: Tensor | None = None) -> float:
    """`rho_a_matrix` of two RDMs."""
    return float(rho_a_matrix([Ranked(first_P), Ranked(second_P)], weight_P)[0, 1])


def normalised(similarity_VV: Tensor) -> Tensor:
    """s_ij / sqrt(s_ii s_jj) over the last two axes: rho-a to Spearman's correlation, HSIC to CKA; NaN where something is constant."""
    own_V = similarity_VV.diagonal(dim1=-2, dim2=-1)
    own_V = torch.where(own_V > 0, own_V, torch.nan).sqrt()
    return similarity_VV / (own_V[..., :, None] * own_V[..., None, :])


def tau_a(first_P: Tensor, second_P: Tensor) -> float:
    """Kendall's tau-a: (concordant - discordant) / (P (P - 1) / 2). O(P log P).

    Of tot = con + dis + ties, dis is the number of inversions of the second in the order of the first.
    """
    first_P, second_P = (entries.unique(return_inverse=True)[1] for entries in (first_P, second_P))
    joint_P = first_P * (int(second_P.max()) + 1) + second_P
    total = len(joint_P) * (len(joint_P) - 1) // 2
    tied_first, tied_second, tied_both = (int((count * (count - 1) // 2).sum()) for count in map(_counts, (first_P, second_P, joint_P)))
    agreement = total - tied_first - tied_second + tied_both - 2 * _inversions(second_P[joint_P.argsort()])
    return agreement / total


def _counts(group_P: Tensor) -> Tensor:
    return group_P.unique(return_counts=True)[1]


def _inversions(number_P: Tensor) -> int:
    """Pairs in which the larger comes first: found at the highest bit in which the two differ."""
    found = 0
    for bit in reversed(range(int(number_P.max()).bit_length())):
        above_P, one_P = number_P >> (bit + 1), (number_P >> bit) & 1
        ones_before_P = one_P.cumsum(0) - one_P
        start_P = torch.searchsorted(above_P, above_P)  # numbers that agree above this bit stand together
        found += int(((ones_before_P - ones_before_P[start_P]) * (1 - one_P)).sum())
        number_P = number_P[(number_P >> bit).argsort(stable=True)]
    return found


def partialled(correlation_VV: Tensor, first: int, second: int, from_first: Sequence[int] = (), from_second: Sequence[int] = ()) -> Tensor:
    """The correlation of two views after each has lost what its own models explain linearly: semi-partial where only one of them has models.

    From correlations [..., V, V] of ranks, so it follows bootstrap and permutations at no cost. NaN where models explain a view completely.
    """
    combination = []
    for view, models in ((first, list(from_first)), (second, list(from_second))):
        weight_V = torch.zeros(correlation_VV.shape[:-1], dtype=correlation_VV.dtype)
        weight_V[..., view] = 1
        if models:
            known_VV = correlation_VV.nan_to_num()  # what is unknown stays so in the product below
            among_ZZ = known_VV[..., models, :][..., :, models]
            weight_V[..., models] -= (torch.linalg.pinv(among_ZZ) @ known_VV[..., models, view][..., None])[..., 0]
        combination.append(weight_V)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("...i,...ij,...j->...", a, correlation_VV, b)

    x, y = combination
    left = product(x, x) * product(y, y)
    return product(x, y) / torch.where(left > 1e-12, left, torch.nan).sqrt()


def noise_ceiling(entries_SP: Tensor, compare: Callable[[Tensor, Tensor], float] = rho_a) -> tuple[float, float]:
    """(lower, upper): mean similarity of each of S RDMs with the mean ranks of the others, and with those of all.

    S repetitions with other seeds are what "subjects" are in neuroscience. Raises ValueError for one.
    """
    seeds = len(entries_SP)
    if seeds < 2:
        raise ValueError("one seed has no noise ceiling. Give runs of the same settings with at least two seeds.")
    rank_SP = torch.stack([Ranked(entries_P).centred() for entries_P in entries_SP])
    total_P = rank_SP.sum(0)
    lower = sum(compare(entries_P, total_P - rank_P) for entries_P, rank_P in zip(entries_SP, rank_SP, strict=True))
    upper = sum(compare(entries_P, total_P) for entries_P in entries_SP)
    return lower / seeds, upper / seeds

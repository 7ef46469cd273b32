"""Statistics of routes: how they follow each other in text, and how two partitions of the same rows agree.

Shapes: T rows, E experts. Routes are int64 in [0, E).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from switch_sae.metrics.bootstrap import effective_documents, intervals

Interval = tuple[float, float]
Ratios = Mapping[str, tuple[Tensor, Tensor | None]]
"""[T] numerators and denominators by name; None counts rows."""


def over_documents(
    document_T: Tensor, ratios: Mapping[str, tuple[Tensor, Tensor | None]], replicates: int = 1000
) -> dict[str, tuple[float, Interval | None]]:
    """(sum of numerators / sum of denominators over all rows, its interval over documents) by name; a denominator of None counts rows.

    A ratio whose denominator is 0 is NaN. See `metrics.bootstrap.intervals`.
    """
    N = int(document_T.max()) + 1

    def summed(value_T: Tensor | None) -> Tensor:
        value_T = torch.ones(len(document_T), dtype=torch.float64) if value_T is None else value_T.double()
        return torch.zeros(N, dtype=torch.float64).index_add_(0, document_T, value_T)

    sums = {name: (summed(above_T), summed(below_T)) for name, (above_T, below_T) in ratios.items()}
    sizes_N = torch.bincount(document_T, minlength=N)
    present_N = sizes_N > 0
    found = intervals(
        lambda weights_RN: {name: (weights_RN @ a_N[present_N]) / (weights_RN @ b_N[present_N]) for name, (a_N, b_N) in sums.items()},
        int(present_N.sum()),
        replicates,
        effective=effective_documents(sizes_N[present_N]),
    )
    return {name: (float(a_N.sum() / b_N.sum()), found.get(name)) for name, (a_N, b_N) in sums.items()}


def shuffled(route_T: Tensor, block_T: Tensor, generator: torch.Generator) -> Tensor:
    """The routes, in random order within each block of rows (a document, a token)."""
    mixed_T = torch.empty_like(route_T)
    into_T = (block_T + torch.rand(len(route_T), generator=generator, dtype=torch.float64)).argsort()
    mixed_T[block_T.argsort(stable=True)] = route_T[into_T]
    return mixed_T


def following(context_T: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, the rows after them) that stand beside each other in one context."""
    first_P = (context_T[1:] == context_T[:-1]).nonzero()[:, 0]
    return first_P, first_P + 1


def transition_counts(route_T: Tensor, pairs: tuple[Tensor, Tensor], num_experts: int) -> Tensor:
    """[from, to] int64: how often an expert follows another."""
    return torch.bincount(route_T[pairs[0]] * num_experts + route_T[pairs[1]], minlength=num_experts**2).view(num_experts, num_experts)


def information(counts_AB: Tensor) -> float:
    """I(A; B) in bits of a table of counts, as it is: biased upwards by about (A - 1)(B - 1) / (2 n ln 2), so read it against shuffled rows."""
    joint_AB = counts_AB.double() / counts_AB.sum().clamp_min(1)
    entropies = torch.special.entr(joint_AB.sum(0)).sum() + torch.special.entr(joint_AB.sum(1)).sum() - torch.special.entr(joint_AB).sum()
    return float(entropies) / math.log(2)


def null_of(statistic: Callable[[Tensor], float], route_T: Tensor, block_T: Tensor, draws: int, seed: int = 0) -> Tensor:
    """[draws] float64: a statistic of routes that were shuffled within blocks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([statistic(shuffled(route_T, block_T, generator)) for _ in range(draws)], dtype=torch.float64)


def co_routing(first_T: Tensor, second_T: Tensor, num_experts: tuple[int, int]) -> Tensor:
    """[a, b] int64: rows that one router sends to expert a and the other to b."""
    return torch.bincount(first_T * num_experts[1] + second_T, minlength=num_experts[0] * num_experts[1]).view(*num_experts)


def adjusted_rand(counts_AB: Tensor) -> float:
    """The Rand index of two partitions, corrected for chance (Hubert & Arabie 1985): 1 for the same, 0 on average for unrelated ones; NaN where one
    is trivial in both."""

    def pairs(counts: Tensor) -> float:
        counts = counts.double()
        return float((counts * (counts - 1) / 2).sum())

    both, first, second = pairs(counts_AB), pairs(counts_AB.sum(1)), pairs(counts_AB.sum(0))
    total = pairs(counts_AB.sum())
    expected, most = first * second / total if total else 0.0, (first + second) / 2
    return (both - expected) / (most - expected) if most != expected else float("nan")


def flipped(route_T: Tensor, routes: Callable[[Tensor], Tensor], x_TD: Tensor, size_T: Tensor, seed: int) -> Tensor:
    """[T] bool: where isotropic noise of the given norm (root mean square) per row changes the route."""
    generator = torch.Generator().manual_seed(seed)
    noise_TD = torch.randn(x_TD.shape, generator=generator) * (size_T[:, None] / x_TD.shape[1] ** 0.5).float()
    return routes(x_TD + noise_TD) != route_T

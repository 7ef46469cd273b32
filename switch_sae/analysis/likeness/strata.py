"""Similarity among pairs of rows that one router sends to the same expert, and among those that it parts.

Shapes: T rows, P pairs, R resamples, S random partitions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.analysis.likeness.rsa import Pairs, Ranked, normalised, rho_a_matrix
from switch_sae.metrics.bootstrap import document_weights

PARTITIONS = 20
MOST_PAIRS = 10_000


@dataclass(frozen=True)
class Stratum:
    """Spearman's correlation of two RDMs at a part of their pairs."""

    value: Tensor
    resampled_R: Tensor
    null_S: Tensor
    """The same at pairs that random groups of the experts' sizes join, or part."""
    pairs: int


def stratum(
    first_P: Tensor, second_P: Tensor, pairs: Pairs, expert_T: Tensor, document_T: Tensor, same_expert: bool, replicates: int
) -> Stratum | None:
    """None where all entries of one side tie, as those of disjoint codes do: there is no order then. At most `MOST_PAIRS` pairs are looked at."""

    def part(label_T: Tensor) -> Tensor:
        within = ((label_T[pairs.left_P] == label_T[pairs.right_P]) == same_expert).nonzero()[:, 0]
        return within[:: max(1, -(-len(within) // MOST_PAIRS))]

    chosen = part(expert_T)
    if len(chosen) < 2 or any(len(entries[chosen].unique()) < 2 for entries in (first_P, second_P)):
        return None
    ranked, among = [Ranked(entries[chosen]) for entries in (first_P, second_P)], pairs.where(chosen)
    generator = torch.Generator().manual_seed(0)
    null = []
    for _ in range(PARTITIONS):
        other = part(expert_T[torch.randperm(len(expert_T), generator=generator)])
        null.append(_spearman([Ranked(entries[other]) for entries in (first_P, second_P)]))
    documents = int(document_T.max()) + 1
    weights = [weight_N for block in document_weights(documents, replicates) for weight_N in block]
    resampled = [_spearman(ranked, among.weights(weight_N, document_T)) for weight_N in weights]
    return Stratum(_spearman(ranked), torch.stack(resampled), torch.stack(null), len(chosen))


def _spearman(ranked: list[Ranked], weight_P: Tensor | None = None) -> Tensor:
    return normalised(rho_a_matrix(ranked, weight_P))[0, 1]

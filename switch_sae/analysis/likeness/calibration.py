"""What a similarity would be if two representations knew nothing of each other: whole documents permuted.

Shapes: N documents, L rows of each, T = N L rows, Q slots, P = N (N - 1) Q pairs, K permutations.

Documents differ in length, so rows of one cannot take the places of another's. Of documents with at least L rows the first L are taken, the others
are left out, and documents change places whole: an exact test, since under the null every order of documents is as likely as any other. Position in
the text stays where it was, so that what both representations know of it is in the null. (Cutting a long text at other places, or permuting windows
of documents that have several, makes the null narrower than it is: rows of a document are alike.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.analysis.likeness.rsa import Pairs
from switch_sae.metrics.bootstrap import middle_of

LEAST_DOCUMENTS = 6
"""6! = 720 orders; fewer documents have too few for 200 different permutations."""
MOST_ROWS = 4_000
MOST_DOCUMENTS = 224
"""50,000 pairs of documents: more would make each permutation slow."""


@dataclass(frozen=True)
class Balanced:
    """Documents of equal length: row (document n, place l) is `row_NL[n, l]` of the sample."""

    row_NL: Tensor

    @property
    def document_T(self) -> Tensor:
        return torch.arange(len(self.row_NL)).repeat_interleave(self.row_NL.shape[1])


def balanced(document_T: Tensor) -> Balanced | None:
    """The first L rows of each document that has so many: L keeps most rows among those that keep at least half of the documents, and at most
    `MOST_ROWS` rows and `MOST_DOCUMENTS` documents are kept. None for fewer than `LEAST_DOCUMENTS` documents."""
    size_N = document_T.bincount()
    sizes = size_N[size_N > 0].sort(descending=True).values
    if len(sizes) < LEAST_DOCUMENTS:
        return None
    sizes = sizes[:MOST_DOCUMENTS]
    kept_N = torch.arange(1, len(sizes) + 1) * sizes
    kept_N[: max(LEAST_DOCUMENTS, math.ceil(len(sizes) / 2)) - 1] = 0
    documents = int(kept_N.argmax()) + 1
    length = min(int(sizes[documents - 1]), max(1, MOST_ROWS // documents))
    rows = [(document_T == n).nonzero()[:length, 0] for n in (size_N >= length).nonzero()[:documents, 0].tolist()]
    return Balanced(torch.stack(rows))


@dataclass(frozen=True)
class PairSlots:
    """Pairs of rows of different documents that a permutation of documents maps onto each other: for each ordered pair of documents, the same Q pairs
    of places (l, m)."""

    documents: int
    length: int
    slot_Q2: Tensor

    def pairs(self) -> Pairs:
        """In rows of the balanced sample, n L + l."""
        first_A, second_A = self._documents()
        left_AQ = first_A[:, None] * self.length + self.slot_Q2[:, 0]
        right_AQ = second_A[:, None] * self.length + self.slot_Q2[:, 1]
        return Pairs(left_AQ.flatten(), right_AQ.flatten())

    def _documents(self) -> tuple[Tensor, Tensor]:
        every_NN = torch.ones(self.documents, self.documents).fill_diagonal_(0)
        first_A, second_A = every_NN.nonzero(as_tuple=True)
        return first_A, second_A

    def moved(self, order_N: Tensor) -> Tensor:
        """[P]: where each pair's entry stands when document n's place is taken by `order_N[n]`."""
        first_A, second_A = self._documents()
        place_NN = torch.zeros(self.documents, self.documents, dtype=torch.int64)
        place_NN[first_A, second_A] = torch.arange(len(first_A))
        place_A = place_NN[order_N[first_A], order_N[second_A]]
        return (place_A[:, None] * len(self.slot_Q2) + torch.arange(len(self.slot_Q2))).flatten()


def pair_slots(of: Balanced, pairs: int, seed: int = 0) -> PairSlots:
    """About `pairs` pairs, at least one per pair of documents."""
    documents, length = of.row_NL.shape
    slots = torch.stack(torch.triu_indices(length, length, int(length > 1)).unbind(), 1)
    wanted = max(1, pairs // (documents * (documents - 1)))
    chosen = torch.randperm(len(slots), generator=torch.Generator().manual_seed(seed))[:wanted]
    return PairSlots(documents, length, slots[chosen.sort().values])


def orders(documents: int, permutations: int, seed: int = 0) -> Iterator[Tensor]:
    """`permutations` random orders of N documents, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(permutations):
        yield torch.randperm(documents, generator=generator)


@dataclass(frozen=True)
class Calibrated:
    """A similarity against its permutations (arXiv 2602.14486)."""

    score: float
    """s_cal = max((s - threshold) / (most - threshold), 0): 0 for what chance gives, 1 for the most there can be."""
    p: float
    """(1 + #{s_k >= s}) / (K + 1), one-sided."""
    null: float
    """The mean over permutations."""
    interval: tuple[float, float]
    """From the 2.5 % to the 97.5 % quantile of permutations."""


def calibrated(observed: float, null_K: Tensor, most: float = 1.0, alpha: float = 0.05) -> Calibrated:
    """The threshold is the ceil((1 - alpha)(K + 1))-th smallest of the observed and the K permuted ones."""
    null_K = null_K.double()
    every = torch.cat([null_K, null_K.new_tensor([observed])]).sort().values
    threshold = float(every[math.ceil((1 - alpha) * len(every)) - 1])
    score = max((observed - threshold) / (most - threshold), 0.0) if most > threshold else 0.0
    return Calibrated(min(score, 1.0), (1 + int((null_K >= observed).sum())) / len(every), float(null_K.mean()), middle_of(null_K))

"""What matching pursuit reads of Gram matrices: whole experts' own, or the parts of one that lists of latents name.

Shapes as in `switch_kernels.pursuit`: N rows with C candidates each, padded to P columns; M latents in all, padded to Q columns.
"""

from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class GramRows(Protocol):
    """The Gram matrices [C, P] of N rows' candidates, without ever being made where rows have lists of their own."""

    @property
    def columns(self) -> int:
        """P."""

    def of(self, rows: Tensor | slice) -> Self:
        """Of some of the rows."""

    def of_latent(self, index_n: Tensor, out_nP: Tensor) -> Tensor:
        """[n, P], in `out_nP`: one candidate's products with all of its row's."""

    def between(self, rows_nK: Tensor, columns_nL: Tensor, lower: bool = False) -> Tensor:
        """[n, K, L]: the products of some candidates with others. With `lower` what stands above the diagonal is anything."""

    def sums(self, index_nK: Tensor, weight_nK: Tensor) -> Tensor:
        """[n, P]: the weighted sum of some candidates' rows."""


class OwnGrams:
    """Of rows that may use all C latents of their dictionary, one of G."""

    def __init__(self, gram_GCP: Tensor, group_N: Tensor) -> None:
        self.gram_GCP, self.group_N = gram_GCP, group_N
        self.gram_RP = gram_GCP.view(-1, gram_GCP.shape[2])
        self.first_N = group_N * gram_GCP.shape[1]

    @property
    def columns(self) -> int:
        return self.gram_GCP.shape[2]

    def of(self, rows: Tensor | slice) -> "OwnGrams":
        return OwnGrams(self.gram_GCP, self.group_N[rows])

    def of_latent(self, index_n: Tensor, out_nP: Tensor) -> Tensor:
        return torch.index_select(self.gram_RP, 0, self.first_N + index_n, out=out_nP)

    def between(self, rows_nK: Tensor, columns_nL: Tensor, lower: bool = False) -> Tensor:
        return gram_at(self.gram_GCP, self.group_N, rows_nK, columns_nL, lower)

    def sums(self, index_nK: Tensor, weight_nK: Tensor) -> Tensor:
        return F.embedding_bag(self.first_N[:, None] + index_nK, self.gram_RP, mode="sum", per_sample_weights=weight_nK)


class ListedGrams:
    """Of rows that may use the latents on a list of their own, of the M whose Gram matrix this is."""

    def __init__(self, gram_MQ: Tensor, candidate_NP: Tensor) -> None:
        """Columns that pad `candidate_NP` name any latent: what is read there must not be used."""
        self.gram_MQ, self.candidate_NP = gram_MQ, candidate_NP

    @property
    def columns(self) -> int:
        return self.candidate_NP.shape[1]

    def of(self, rows: Tensor | slice) -> "ListedGrams":
        return ListedGrams(self.gram_MQ, self.candidate_NP[rows])

    def of_latent(self, index_n: Tensor, out_nP: Tensor) -> Tensor:
        place_nP = self.candidate_NP.gather(1, index_n[:, None]) * self.gram_MQ.shape[1] + self.candidate_NP
        torch.index_select(self.gram_MQ.view(-1), 0, place_nP.flatten(), out=out_nP.view(-1))
        return out_nP

    def between(self, rows_nK: Tensor, columns_nL: Tensor, lower: bool = False) -> Tensor:
        latents_nK, others_nL = self.candidate_NP.gather(1, rows_nK), self.candidate_NP.gather(1, columns_nL)
        return gram_at(self.gram_MQ[None], torch.zeros_like(rows_nK[:, 0]), latents_nK, others_nL, lower)

    def sums(self, index_nK: Tensor, weight_nK: Tensor) -> Tensor:
        sums_nP = weight_nK.new_zeros(self.candidate_NP.shape)
        buffer_nP = torch.empty_like(sums_nP)
        for slot in range(index_nK.shape[1]):  # all at once would be [n, K, P]
            sums_nP.addcmul_(self.of_latent(index_nK[:, slot], buffer_nP), weight_nK[:, slot : slot + 1])
        return sums_nP


def gram_at(gram_GCP: Tensor, group_N: Tensor, rows_NK: Tensor, columns_NL: Tensor, lower: bool = False) -> Tensor:
    """[N, K, L]: gram[group, rows, columns]. With `lower` what stands above the diagonal is anything: reading half takes half of the time, as hardly
    any two numbers share a line of the cache.
    """
    candidates, columns = gram_GCP.shape[1:]
    small = torch.int32 if gram_GCP.numel() < 2**31 else torch.int64
    start_NK1, column_N1L = ((group_N[:, None] * candidates + rows_NK) * columns).to(small)[:, :, None], columns_NL.to(small)[:, None, :]
    if lower:
        below_KL = torch.ones(rows_NK.shape[1], columns_NL.shape[1], dtype=small, device=rows_NK.device).tril()
        place_NKL = torch.addcmul(start_NK1, below_KL, column_N1L)
    else:
        place_NKL = start_NK1 + column_N1L
    return gram_GCP.reshape(-1).index_select(0, place_NKL.flatten()).view(place_NKL.shape)

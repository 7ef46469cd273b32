"""The active latents of a batch in latent order: what turns weight gradients into gathers that touch only active rows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, repr=False)
class LatentOrder:
    """The T*K (token, slot) pairs sorted by latent, so that each latent owns one contiguous segment.

    The gradient of a row of an encoder or a decoder is a weighted sum of the tokens on which that latent was selected. In latent order
    this is a forward `embedding_bag` whose "vocabulary" is the batch and whose bags are the latents. Measured on a CPU at T=2048, K=32,
    D=512, M=8192: 1 ms, against 7 ms for `embedding_bag`'s own backward and 13 ms for per-expert matrix products.
    """

    pair_P: Tensor
    """Pair numbers token * K + slot, sorted by latent; ties keep token order, so sums are reproducible."""
    token_P: Tensor
    """The token of each pair."""
    start_M: Tensor
    """Where each latent's segment starts."""

    def __repr__(self) -> str:
        return f"LatentOrder({len(self.pair_P)} pairs of {len(self.start_M)} latents)"

    @classmethod
    def from_indices(cls, indices_TK: Tensor, num_latents: int) -> "LatentOrder":
        """Sorts the pairs of indices_TK (int64 in [0, num_latents)) by latent."""
        latent_P, pair_P = torch.sort(indices_TK.flatten(), stable=True)
        start_M = torch.searchsorted(latent_P, torch.arange(num_latents, device=latent_P.device))
        return cls(pair_P, pair_P // indices_TK.shape[1], start_M)

    def weighted_row_sums(self, rows_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """[M, D]: for each latent j, the sum over pairs (t, s) that selected it of weights[t, s] * rows[t]; zero where nothing did."""
        weights_P = weights_TK.flatten().index_select(0, self.pair_P)
        return F.embedding_bag(self.token_P, rows_TD, self.start_M, mode="sum", per_sample_weights=weights_P)

    def weight_sums(self, weights_TK: Tensor) -> Tensor:
        """[M]: for each latent, the sum of the weights of its pairs, one after another: the bits of `index_add_` on a CPU, and the same every time on
        a GPU, where that adds in any order.
        """
        one_of_one = torch.ones(1, 1, dtype=weights_TK.dtype, device=weights_TK.device)
        weights_P = weights_TK.flatten().index_select(0, self.pair_P)
        return F.embedding_bag(torch.zeros_like(self.pair_P), one_of_one, self.start_M, mode="sum", per_sample_weights=weights_P)[:, 0]

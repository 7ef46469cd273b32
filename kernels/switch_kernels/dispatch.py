"""Sorting a batch by expert, once, so that every expert sees one contiguous slice of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """A batch in expert order. `scatter(gather(x)) == x`; made once per batch.

    Worked example with E = 4 and expert_T = [2, 0, 2, 3] (expert 1 receives nothing, which is legal)::

        order_N   = [1, 0, 2, 3]        row n of the sorted batch is token order_N[n]; ties keep arrival order
        counts_E  = [1, 0, 2, 1]
        offsets   = [0, 1, 1, 3, 4]     expert e owns rows offsets[e] to offsets[e + 1] - 1
    """

    expert_T: Tensor
    """The expert of each token, int64 in [0, E)."""
    order_N: Tensor
    """Token of each sorted row, int64."""
    counts_E: Tensor
    """Rows per expert, int64."""
    offsets: tuple[int, ...]
    """E + 1 row boundaries, on the host: the loop over experts needs them."""
    is_identity: bool = False
    """True with one expert: nothing moves, gather and scatter return their argument."""

    @property
    def num_experts(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def from_experts(cls, expert_T: Tensor, num_experts: int) -> "Dispatch":
        """Stable sort of tokens by expert. Expert numbers must lie in [0, num_experts)."""
        if num_experts == 1:
            return cls.to_one_expert(expert_T.shape[0], expert_T.device)
        counts_E = torch.bincount(expert_T, minlength=num_experts)
        if counts_E.shape[0] != num_experts:
            raise ValueError(f"expert index {counts_E.shape[0] - 1} is out of range: it must be below num_experts={num_experts}.")
        order_N = torch.sort(expert_T, stable=True).indices
        return cls(expert_T, order_N, counts_E, (0, *torch.cumsum(counts_E, 0).tolist()))

    @classmethod
    def to_one_expert(cls, num_tokens: int, device: torch.device | str = "cpu") -> "Dispatch":
        """All tokens to expert 0: the dispatch of a dense SAE."""
        expert_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        order_N = torch.arange(num_tokens, device=device)
        return cls(expert_T, order_N, torch.tensor([num_tokens], device=device), (0, num_tokens), is_identity=True)

    def gather(self, x_TX: Tensor) -> Tensor:
        """Token order to expert order: x_TX[order_N]."""
        return x_TX if self.is_identity else x_TX.index_select(0, self.order_N)

    def scatter(self, x_NX: Tensor) -> Tensor:
        """Expert order back to token order."""
        return x_NX if self.is_identity else torch.empty_like(x_NX).index_copy_(0, self.order_N, x_NX)

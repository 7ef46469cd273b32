"""Sorting a batch by expert, once, so that every expert sees one contiguous slice of rows."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Dispatch:
    """The T*S (token, slot) pairs of a batch in expert order; S experts per token, usually 1. `scatter(gather(x)) == x`; made once per batch.

    Worked example with S = 1, E = 4 and expert_TS = [[2], [0], [2], [3]] (expert 1 receives nothing, which is legal)::

        order_N   = [1, 0, 2, 3]        row n of the sorted batch is pair order_N[n]; ties keep arrival order
        start_E1  = [0, 1, 1, 3, 4]     expert e owns rows start_E1[e] to start_E1[e + 1] - 1

    Pair t * S + s is token t's slot s, so with S = 1 pairs are tokens.
    """

    expert_TS: Tensor
    """The experts of each token, int64 in [0, E)."""
    num_experts: int
    """E."""
    known: list[Tensor] = field(default_factory=list)
    """order_N and start_E1, once somebody asked: kernels sort for themselves. No `cached_property`, whose lock torch.compile cannot enter."""

    def __repr__(self) -> str:
        return f"Dispatch({len(self.expert_TS)} tokens to {self.slots} of {self.num_experts} experts each)"

    def _in_order(self) -> list[Tensor]:
        if not self.known:
            num_pairs, device = self.expert_TS.numel(), self.expert_TS.device
            if self.is_identity:
                self.known.extend([torch.arange(num_pairs, device=device), torch.arange(2, device=device) * num_pairs])
            else:
                sorted_N, order_N = torch.sort(self.expert_TS.flatten(), stable=True)
                self.known.extend([order_N, torch.searchsorted(sorted_N, torch.arange(self.num_experts + 1, device=device))])
        return self.known

    @property
    def order_N(self) -> Tensor:
        """Pair of each sorted row, int64."""
        return self._in_order()[0]

    @property
    def start_E1(self) -> Tensor:
        """E + 1 row boundaries, int64."""
        return self._in_order()[1]

    @property
    def slots(self) -> int:
        """S."""
        return self.expert_TS.shape[1]

    @cached_property
    def offsets(self) -> list[int]:
        """`start_E1` on the host, which a loop over experts needs."""
        return self.start_E1.tolist()

    @cached_property
    def expert_N(self) -> Tensor:
        """The expert of each sorted row, [N]."""
        return self.gather_pairs(self.expert_TS.flatten())

    @property
    def is_identity(self) -> bool:
        """True with one expert: nothing moves, gather and scatter return their argument."""
        return self.num_experts == 1 and self.slots == 1

    @classmethod
    def from_experts(cls, expert_TS: Tensor, num_experts: int) -> "Dispatch":
        """Stable sort of pairs by expert. Expert numbers must lie in [0, num_experts): ValueError on a CPU, where looking is free."""
        if num_experts == 1 and expert_TS.shape[1] == 1:
            return cls.to_one_expert(expert_TS.shape[0], expert_TS.device)
        if expert_TS.device.type == "cpu" and not torch.compiler.is_compiling() and expert_TS.numel():
            lowest, highest = (int(number) for number in expert_TS.aminmax())
            if lowest < 0 or highest >= num_experts:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"expert index {wrong} is out of range: it must be at least 0 and below num_experts={num_experts}.")
        return cls(expert_TS, num_experts)

    @classmethod
    def to_one_expert(cls, num_tokens: int, device: torch.device | str = "cpu") -> "Dispatch":
        """All tokens to expert 0: the dispatch of a dense SAE."""
        return cls(torch.zeros(num_tokens, 1, dtype=torch.int64, device=device), 1)

    def gather(self, x_TX: Tensor) -> Tensor:
        """Token order to expert order, [N, X]: row n is the token of pair order_N[n]."""
        return x_TX if self.is_identity else x_TX.index_select(0, self.order_N if self.slots == 1 else self.order_N // self.slots)

    def gather_pairs(self, x_RX: Tensor) -> Tensor:
        """Pair order (row t * S + s) to expert order."""
        return x_RX if self.is_identity else x_RX.index_select(0, self.order_N)

    def scatter(self, x_NX: Tensor) -> Tensor:
        """Expert order back to pair order, [T * S, X]; with S = 1 that is token order."""
        return x_NX if self.is_identity else torch.empty_like(x_NX).index_copy_(0, self.order_N, x_NX)

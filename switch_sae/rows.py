"""Rows of activations: what an SAE reads, and what it must reconstruct."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """T activations and their targets. For an autoencoder both are one tensor, and stay one: nothing is copied or computed twice."""

    x_TD: Tensor
    """What is encoded: raw activations at the input hook."""
    target_TD: Tensor
    """What is reconstructed: the same rows at the same or another hook."""

    @classmethod
    def of(cls, x_TD: Tensor, target_TD: Tensor | None = None) -> "Rows":
        """The rows of an autoencoder, whose target is its input, or those of a transcoder. Raises ValueError for different numbers of rows."""
        target_TD = x_TD if target_TD is None else target_TD
        if len(x_TD) != len(target_TD):
            raise ValueError(f"{len(x_TD)} activations have {len(target_TD)} targets; each needs one.")
        return cls(x_TD, target_TD)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        """Both tensors changed alike; one tensor stays one."""
        x_TD = change(self.x_TD)
        return Rows(x_TD, x_TD if self.target_TD is self.x_TD else change(self.target_TD))

    def to(self, device: torch.device | str) -> "Rows":
        return self.map(lambda rows_TD: rows_TD.to(device))

    @staticmethod
    def cat(parts: "Sequence[Rows]") -> "Rows":
        """The rows of all parts, one after another."""
        x_TD = torch.cat([part.x_TD for part in parts]) if len(parts) > 1 else parts[0].x_TD
        if all(part.target_TD is part.x_TD for part in parts):
            return Rows(x_TD, x_TD)
        return Rows(x_TD, torch.cat([part.target_TD for part in parts]))

    def __getitem__(self, chosen: slice) -> "Rows":
        return self.map(lambda rows_TD: rows_TD[chosen])

    def __len__(self) -> int:
        return len(self.x_TD)

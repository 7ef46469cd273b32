"""Which latents are active, and how strongly: what encoders, pursuit and refits give and decoders take."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from switch_sae.rows import Shapes


class Latents(Shapes, ABC):
    """Which of the M latents are active for each of T tokens, and how strongly; 0 where a latent did not fire. Of activations [batch, position, d_in]
    they are [batch, position, ...]: T stands for all leading dimensions."""

    num_latents: int
    """M."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """[T, slots]: activations in units of the scaled activations; a slot that holds 0 is unused."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The same latents as [T, M], zeros where nothing fired."""

    @abstractmethod
    def shaped(self, leading: Sequence[int]) -> Self:
        """The same with other leading dimensions, of equal product."""

    @property
    def leading(self) -> torch.Size:
        """All dimensions but the last."""
        return self.values.shape[:-1]

    @abstractmethod
    def select(self, latent_L: Tensor) -> Tensor:
        """[T, L]: the values of some latents, which differ from each other."""

    @abstractmethod
    def firing_counts(self) -> Tensor:
        """[M] how many tokens each latent fired on; zero-valued slots do not count."""

    @abstractmethod
    def cpu(self) -> Self:
        """The same on the CPU."""


@dataclass(frozen=True, repr=False)
class SparseLatents(Latents):
    """At most K active latents per token. The gate is inside the values, so decoding is linear and knows nothing of experts.

    Slots whose value is 0 are unused: they name some latent but that latent did not fire.
    """

    values_TK: Tensor
    """Activations of the chosen latents, >= 0, in units of the scaled activations."""
    indices_TK: Tensor
    """Global latent indices, int64 in [0, M)."""
    num_latents: int

    @property
    def values(self) -> Tensor:
        return self.values_TK

    def part(self, rows: slice) -> Self:
        """Those of some tokens."""
        return replace(self, values_TK=self.values_TK[rows], indices_TK=self.indices_TK[rows])

    def to_dense(self) -> Tensor:
        dense_TM = self.values_TK.new_zeros(*self.leading, self.num_latents)
        return dense_TM.scatter_add(-1, self.indices_TK, self.values_TK)

    def shaped(self, leading: Sequence[int]) -> Self:
        values_TK, indices_TK = (tensor.reshape(*leading, tensor.shape[-1]) for tensor in (self.values_TK, self.indices_TK))
        return replace(self, values_TK=values_TK, indices_TK=indices_TK)

    def select(self, latent_L: Tensor) -> Tensor:
        column_M = torch.full((self.num_latents,), len(latent_L), device=self.values_TK.device)  # the last column takes all others
        column_M[latent_L] = torch.arange(len(latent_L), device=column_M.device)
        selected_TL = self.values_TK.new_zeros(*self.leading, len(latent_L) + 1)
        return selected_TL.scatter_add(-1, column_M[self.indices_TK], self.values_TK)[..., :-1]

    def firing_counts(self) -> Tensor:
        counts_M = torch.zeros(self.num_latents, dtype=torch.float32, device=self.values_TK.device)
        return counts_M.scatter_add_(0, self.indices_TK.flatten(), (self.values_TK != 0).float().flatten())

    def cpu(self) -> Self:
        return replace(self, values_TK=self.values_TK.cpu(), indices_TK=self.indices_TK.cpu())


@dataclass(frozen=True, repr=False)
class DenseLatents(Latents):
    """All M latents of every token: what an SAE without a fixed number of active latents gives. Most values are 0."""

    values_TM: Tensor

    @property
    def num_latents(self) -> int:  # type: ignore[override]
        return self.values_TM.shape[-1]

    @property
    def values(self) -> Tensor:
        return self.values_TM

    def to_dense(self) -> Tensor:
        return self.values_TM

    def shaped(self, leading: Sequence[int]) -> Self:
        return replace(self, values_TM=self.values_TM.reshape(*leading, self.num_latents))

    def select(self, latent_L: Tensor) -> Tensor:
        return self.values_TM[..., latent_L]

    def firing_counts(self) -> Tensor:
        return (self.values_TM != 0).reshape(-1, self.num_latents).sum(dim=0).float()

    def cpu(self) -> Self:
        return replace(self, values_TM=self.values_TM.cpu())

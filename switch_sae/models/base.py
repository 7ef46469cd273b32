"""The contract that every sparse autoencoder (SAE) keeps, and the values it passes around.

Shapes: T tokens, D activation size (`d_in`), M latents (`d_sae`), E experts, F = M / E latents per expert, S experts per token, K active
latents per token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from switch_kernels import Execution


@dataclass(frozen=True)
class SparseLatents:
    """At most K active latents per token. The gate is inside the values, so decoding is linear and knows nothing of experts.

    Slots whose value is 0 are unused: they name some latent but that latent did not fire.
    """

    values_TK: Tensor
    """Activations of the chosen latents, >= 0, in units of the scaled activations."""
    indices_TK: Tensor
    """Global latent indices, int64 in [0, M)."""
    num_latents: int
    """M."""

    def to_dense(self) -> Tensor:
        """The same latents as [T, M], zeros where nothing fired."""
        dense_TM = self.values_TK.new_zeros(self.values_TK.shape[0], self.num_latents)
        return dense_TM.scatter_add(1, self.indices_TK, self.values_TK)

    def firing_counts(self) -> Tensor:
        """[M] how many tokens each latent fired on; zero-valued slots do not count."""
        counts_M = torch.zeros(self.num_latents, dtype=torch.float32, device=self.values_TK.device)
        return counts_M.scatter_add_(0, self.indices_TK.flatten(), (self.values_TK > 0).float().flatten())

    def cpu(self) -> "SparseLatents":
        return replace(self, values_TK=self.values_TK.cpu(), indices_TK=self.indices_TK.cpu())


class DenseLatents(SparseLatents):
    """All M latents of every token, K = M: what an SAE without a fixed number of active latents gives. Most values are 0; indices take no memory."""

    @classmethod
    def of(cls, dense_TM: Tensor) -> "DenseLatents":
        """From latents as [T, M], >= 0."""
        return cls(dense_TM, torch.arange(dense_TM.shape[1], device=dense_TM.device).expand_as(dense_TM), dense_TM.shape[1])

    def to_dense(self) -> Tensor:
        return self.values_TK

    def firing_counts(self) -> Tensor:
        return (self.values_TK > 0).sum(dim=0).float()

    def cpu(self) -> "DenseLatents":
        return DenseLatents.of(self.values_TK.cpu())


@dataclass(frozen=True)
class Routing:
    """What the router decided for one batch."""

    expert_TS: Tensor
    """The S chosen experts of each token (S is 1 in the paper), likeliest first, int64 in [0, E)."""
    gate_TS: Tensor
    """What multiplies their latents: their probabilities, or 1 with a hard gate."""
    probs_TE: Tensor
    """All probabilities: the softmax of the router's logits."""


@dataclass(frozen=True)
class SAEOutput:
    """What `SparseAutoencoder.forward` returns."""

    recon_TD: Tensor
    """Reconstruction, in the units of the input."""
    latents: SparseLatents
    routing: Routing | None = None
    """None for architectures without experts."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, a multiply-add counted as two. Elementwise work, selection and the optimiser are not counted."""

    router: int
    encode: int
    decode: int
    backward: int

    @property
    def forward(self) -> int:
        return self.router + self.encode + self.decode

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Recipe:
    """How an architecture's authors optimise it, where that differs from what the trainer does by default. `TrainerConfig` overrides rate and warm-up."""

    lr: float | None = None
    """Peak learning rate; None is the trainer's rule by width."""
    warmup_steps: int | None = None
    """None is the trainer's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    unit_decoder: bool = True
    """Whether decoder rows are kept on the unit sphere; False where the loss weighs latents by their rows' norms instead."""


class SparseAutoencoder(nn.Module, ABC):
    """x_TD -> SparseLatents -> recon_TD. Takes and returns raw activations; `activation_scale` is applied inside.

    Training scales activations once so that their mean squared norm is D (`scale_to`); the factor is a buffer, saved with the weights.
    """

    config: Any
    d_in: int
    num_latents: int
    num_experts: int
    recipe: Recipe = Recipe()
    activation_scale: Tensor
    activations: dict[str, Any]
    """What it was trained on (`ActivationSource.describe`), for an SAE that was loaded; empty before."""
    execution: Execution = Execution()
    """Who computes, and in which precision: PyTorch in float32 unless it is set. Not saved: it changes rounding, not the function."""

    @abstractmethod
    def encode(self, x_TD: Tensor) -> SparseLatents:
        """The active latents of raw activations. Raises ValueError for a wrong width."""

    @abstractmethod
    def decode(self, latents: SparseLatents) -> Tensor:
        """recon_TD, in the units of the raw activations; `decode(encode(x)) == forward(x).recon_TD`."""

    @abstractmethod
    def forward(self, x_TD: Tensor) -> SAEOutput: ...

    @abstractmethod
    def loss_terms(self, x_TD: Tensor, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        """Scalar loss terms by name, already weighted: the trainer adds them up. `dead_M` marks latents that AuxK should revive."""

    @property
    def k(self) -> int | None:
        """Active latents per token by construction (at most, or on average); None where training finds their number."""
        return None

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before training step `step` (from 0): where coefficients that rise over the run are set, from these two numbers alone."""

    def end_step(self, output: SAEOutput) -> None:
        """Called after a training step, without gradients, with what its forward pass gave: where running statistics are kept, in buffers."""

    @abstractmethod
    def initialize(self, x_TD: Tensor) -> None:
        """Sets the data-dependent start (biases) from one large batch of raw activations."""

    @abstractmethod
    def flops(self) -> Flops:
        """Honest cost of one token, router and decoder included."""

    @abstractmethod
    def decoder_weight(self) -> nn.Parameter:
        """W_dec_MD, whose rows stay on the unit sphere if `recipe.unit_decoder`."""

    @abstractmethod
    def fold_activation_scale(self) -> None:
        """Absorbs `activation_scale` into the biases and the router, exactly: the function of raw activations stays, the scale becomes 1.

        Latent values and every latent's threshold change units (divided by the old scale); decoder rows keep unit norm.
        """

    def _scaled(self, x_TD: Tensor) -> Tensor:
        """x * activation_scale. Raises ValueError for another shape than [tokens, d_in]."""
        if x_TD.ndim != 2 or x_TD.shape[1] != self.d_in:
            raise ValueError(
                f"activations have shape {tuple(x_TD.shape)}; this SAE takes [tokens, d_in={self.d_in}]. Flatten leading dimensions first."
            )
        return x_TD * self.activation_scale


def at_least(name: str, value: float, least: float) -> None:
    """Raises ValueError for a setting below its least value."""
    if value < least:
        raise ValueError(f"{name}={value} is too small: it must be at least {least}.")

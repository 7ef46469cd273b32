"""SAEs that normalise every token before they encode it: those of OpenAI, and of SAELens with `layer_norm` or `constant_norm_rescale`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

import torch
from torch import Tensor, nn

from switch_sae.models import Flops, Latents, SAEOutput, SparseAutoencoder
from switch_sae.rows import Rows


class TokenNorm(Enum):
    """What is done to a token x of D numbers."""

    layer_norm = "layer_norm"
    """(x - mean(x)) / (std(x) + 1e-5), std with D - 1; reconstructions times std(x), plus mean(x)."""
    constant_norm_rescale = "constant_norm_rescale"
    """x sqrt(D) / ||x||; reconstructions times ||x|| / sqrt(D)."""


@dataclass(frozen=True, repr=False)
class TokenLatents(Latents):
    """Latents of normalised tokens, with what turns reconstructions back: latents alone do not tell how large their token was.

    To change some, as for steering: `dataclasses.replace(latents, inner=DenseLatents(changed))`.
    """

    inner: Latents
    mean_T1: Tensor
    scale_T1: Tensor

    @property
    def num_latents(self) -> int:  # type: ignore[override]
        return self.inner.num_latents

    @property
    def values(self) -> Tensor:
        return self.inner.values

    def to_dense(self) -> Tensor:
        return self.inner.to_dense()

    def shaped(self, leading: Sequence[int]) -> Self:
        mean_T1, scale_T1 = self.mean_T1.reshape(*leading, 1), self.scale_T1.reshape(*leading, 1)
        return replace(self, inner=self.inner.shaped(leading), mean_T1=mean_T1, scale_T1=scale_T1)

    def select(self, latent_L: Tensor) -> Tensor:
        return self.inner.select(latent_L)

    def firing_counts(self) -> Tensor:
        return self.inner.firing_counts()

    def cpu(self) -> Self:
        return replace(self, inner=self.inner.cpu(), mean_T1=self.mean_T1.cpu(), scale_T1=self.scale_T1.cpu())


class TokenNormSAE(SparseAutoencoder):
    """latents = encode(norm(x)), recon = scale(x) * decode(latents) + mean(x), by another SAE's encoder and decoder. For use, not training.

    It is no entry of `SAES`: its format can hold it, a run folder cannot. Latents are in units of normalised tokens.
    """

    def __init__(self, inner: SparseAutoencoder, norm: TokenNorm) -> None:
        """Raises ValueError for an inner SAE of fewer than 2 inputs, which have no spread."""
        super().__init__()
        if inner.d_in < 2:
            raise ValueError(f"d_in={inner.d_in} numbers cannot be normalised by their spread. Use an SAE of at least 2 inputs.")
        self.inner, self.norm = inner, norm
        self.config, self.d_in, self.num_latents, self.num_experts = inner.config, inner.d_in, inner.num_latents, inner.num_experts
        self.activations = {}
        self.register_buffer("activation_scale", torch.tensor(1.0))

    @property
    def b_pre_D(self) -> nn.Parameter:  # type: ignore[override]
        return self.inner.b_pre_D

    @property
    def W_enc(self) -> Tensor:
        return self.inner.W_enc

    @property
    def b_enc(self) -> Tensor:
        return self.inner.b_enc

    @property
    def k(self) -> int | None:
        return self.inner.k

    def why_not_trained(self) -> str:
        return f"it was read from another library, and normalises tokens ({self.norm.name}); such SAEs are for use. Train on activations as they are"

    def encode(self, x_TD: Tensor) -> TokenLatents:
        x_TD, mean_T1, scale_T1 = self._normalised(x_TD)
        return TokenLatents(self.inner.encode(x_TD), mean_T1, scale_T1)

    def decode(self, latents: Latents) -> Tensor:
        if not isinstance(latents, TokenLatents):
            raise ValueError(
                f"this SAE normalises tokens ({self.norm.name}): of {type(latents).__name__} it cannot tell how large their tokens were. "
                "Use those that encode gave, or dataclasses.replace(latents, inner=DenseLatents(changed))."
            )
        return self.inner.decode(latents.inner) * latents.scale_T1 + latents.mean_T1

    def forward(self, x_TD: Tensor) -> SAEOutput:
        latents = self.encode(x_TD)
        return SAEOutput(self.decode(latents), latents)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        raise ValueError(f"it has no loss: {self.why_not_trained()}.")

    def initialize(self, rows: Rows) -> None:
        raise ValueError(f"it has no start: {self.why_not_trained()}.")

    def flops(self) -> Flops:
        return self.inner.flops()

    def decoder_weight(self) -> nn.Parameter:
        return self.inner.decoder_weight()

    def fold_activation_scale(self) -> None:
        self.inner.fold_activation_scale()

    def _normalised(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(normalised tokens, what reconstructions are to be shifted and multiplied by)."""
        x_TD = self._read(x_TD)
        if self.norm is TokenNorm.layer_norm:
            mean_T1 = x_TD.mean(dim=1, keepdim=True)
            scale_T1 = (x_TD - mean_T1).std(dim=1, keepdim=True)
            return (x_TD - mean_T1) / (scale_T1 + 1e-5), mean_T1, scale_T1
        scale_T1 = torch.linalg.vector_norm(x_TD, dim=1, keepdim=True) / self.d_in**0.5
        return x_TD / scale_T1.clamp_min(torch.finfo(x_TD.dtype).tiny), torch.zeros_like(scale_T1), scale_T1

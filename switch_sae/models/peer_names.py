"""The names and layouts that other libraries use for what every SAE has."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class PeerNames:
    """`W_enc`, `W_dec`, `b_enc`, `b_dec`, `cfg`, `d_sae`, `device` and `dtype`: views of the SAE's own parts, never copies to be kept in step.

    Weights and biases are in units of scaled activations; `load_sae(path, fold=True)` gives them in units of raw ones.
    """

    config: Any
    num_latents: int
    activation_scale: Tensor

    @property
    @abstractmethod
    def b_out_D(self) -> Tensor: ...

    @abstractmethod
    def decoder_weight(self) -> nn.Parameter: ...

    @property
    def W_dec(self) -> Tensor:
        """[M, D]: `decoder_weight()`, by the name that other libraries use. Its units are those of scaled targets unless the scale is folded."""
        return self.decoder_weight()

    @property
    def b_dec(self) -> Tensor:
        """[D]: `b_out_D`, by the name that other libraries use."""
        return self.b_out_D

    @property
    def W_enc(self) -> Tensor:
        """[D, M], as other libraries lay it out: the encoder's rows as columns; those of the decoder where a search takes the encoder's place. A
        routed SAE computes those of a token's expert alone."""
        return getattr(self, "W_enc_MD", self.decoder_weight()).T

    @property
    def b_enc(self) -> Tensor:
        """[M]; zeros where there is none (a Gated SAE has `b_gate_M` and `b_mag_M` instead)."""
        bias_M = getattr(self, "b_enc_M", None)
        return self.decoder_weight().new_zeros(self.num_latents) if bias_M is None else bias_M

    @property
    def cfg(self) -> Any:
        """`config`, by the name that other libraries use."""
        return self.config

    @property
    def d_sae(self) -> int:
        """`num_latents`, by the name that other libraries use."""
        return self.num_latents

    @property
    def device(self) -> torch.device:
        return self.activation_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """That of weights, latents and reconstructions."""
        return self.activation_scale.dtype

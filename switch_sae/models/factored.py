"""What encoders share that score M latents by two small sub-encoders: a latent is a pair of keys.

Shapes: G heads, each with L left and R right keys, so that M = G L R; P = G (L + R) keys in all. Latent (g, i, j) has number (g L + i) R + j.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_sae.checks import at_least
from switch_sae.models.base import Flops
from switch_sae.models.dense import encoder_linear
from switch_sae.models.inference import Inference, equal_blocks, pursuit_flops, refit_flops
from switch_sae.models.latents import SparseLatents
from switch_sae.models.losses import normalized_auxk_loss
from switch_sae.models.routers.base import Routing
from switch_sae.models.topk import EncoderInit, TopKSAE


class FactoredSAE(TopKSAE):
    """u = A (x - b_pre) + b_left, v = B (x - b_pre) + b_right; subclasses say what u_i and v_j make of latent (i, j). The rest is `TopKSAE`'s.

    W_dec starts as the unit rows of A_i + B_j. AuxK scores dead latents by the same keys as living ones and trains those too: they have no others.
    """

    @dataclass
    class Config(TopKSAE.Config):
        @property
        def heads_left_right(self) -> tuple[int, int, int]:
            """(G, L, R)."""
            raise NotImplementedError

        def fitting(self, least: int) -> int:
            """The fewest num_latents, at least so many, that fit the other settings."""
            return -(-least // self.width_step) * self.width_step

        @property
        def least_latents(self) -> int:
            return self.fitting(self.k)

    config: "FactoredSAE.Config"
    trains_by = (Inference.encoder, Inference.refit)
    key_norm: float = 1.0
    """Of keys at the start, where `encoder_init` is unit."""

    def __init__(self, config: "FactoredSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super(TopKSAE, self).__init__()  # TopKSAE's has M encoder rows
        at_least("d_in", d_in, 1)
        self.config, self.d_in, self.num_latents = config, d_in, config.num_latents
        self.activations = {}
        self.heads, self.left, self.right = config.heads_left_right
        keys_PD = (torch.rand(self.heads * (self.left + self.right), d_in, generator=generator) * 2 - 1) / d_in**0.5
        if config.encoder_init is EncoderInit.unit:
            keys_PD = F.normalize(keys_PD, dim=1) * self.key_norm
        self.W_key_PD = nn.Parameter(keys_PD)
        self.b_key_P = nn.Parameter(torch.zeros(len(keys_PD))) if config.encoder_bias else None
        self.W_dec_MD = nn.Parameter(F.normalize(self.sums_of_keys().detach(), dim=1))
        self.b_pre_D = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("activation_scale", torch.tensor(1.0))

    def sums_of_keys(self) -> Tensor:
        """[M, D]: A_i + B_j of every latent."""
        left_GLD, right_GRD = self.W_key_PD.view(self.heads, -1, self.d_in).split((self.left, self.right), dim=1)
        return (left_GLD[:, :, None] + right_GRD[:, None]).flatten(0, 2)

    @property
    def W_enc(self) -> Tensor:
        """[D, M]: A_i + B_j as columns, computed anew. What a latent reads through its two keys; its value need not be linear in that."""
        return self.sums_of_keys().T

    def flops(self) -> Flops:
        """Encoding: all keys. Backward: gradients of values and W_dec (2DK each) on selected rows, of all keys (2DP). Sums, products and choices of
        pairs are elementwise and not counted."""
        k, row = self.config.k, 2 * self.d_in
        keys, (encoded, learned) = row * len(self.W_key_PD), self._own_rows()
        own = Flops(router=0, encode=keys + row * encoded, decode=row * k, backward=2 * row * k + keys + row * learned)
        if self.inference is Inference.refit:  # values have no gradient
            return replace(own, encode=own.encode + refit_flops(self.d_in, k, from_gram=False), backward=own.backward - row * k)
        if self.inference is Inference.pursuit:
            return replace(own, encode=pursuit_flops(self.d_in, self.num_latents, k, equal_blocks(k)))
        return own

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        # Positively homogeneous: with all biases divided by the scale, the latents are divided by it too.
        for bias in (self.b_pre_D, self.b_key_P, getattr(self, "b_enc_M", None)):
            if bias is not None:
                bias.div_(self.activation_scale)
        self.activation_scale.fill_(1.0)

    def _own_rows(self) -> tuple[int, int]:
        """Rows of a token's latents' own, beside keys: how many are multiplied, and how many of them learn."""
        return 0, 0

    def _keys(self, x_TD: Tensor, b_pre_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(u_TGL, v_TGR) of scaled activations."""
        bias_P = self.W_key_PD.new_zeros(len(self.W_key_PD)) if self.b_key_P is None else self.b_key_P
        keys_TP = encoder_linear(x_TD, self.b_in_D if b_pre_D is None else b_pre_D, self.W_key_PD, bias_P)
        u_TGL, v_TGR = keys_TP.view(len(x_TD), self.heads, self.left + self.right).split((self.left, self.right), dim=2)
        return u_TGL, v_TGR

    def _encode(self, x_TD: Tensor) -> tuple[SparseLatents, Routing | None, Any]:
        values_TK, indices_TK, by_latent = self._choose(x_TD, *self._keys(x_TD))
        return SparseLatents(values_TK, indices_TK, self.num_latents), None, by_latent

    @abstractmethod
    def _choose(self, x_TD: Tensor, u_TGL: Tensor, v_TGR: Tensor) -> tuple[Tensor, Tensor, Any]:
        """(values, latents, what spares `_decode` a sort) of each token's k largest."""

    @abstractmethod
    def _join(self, x_TD: Tensor, u_BT: Tensor, v_BT: Tensor, latent_B: Tensor) -> Tensor:
        """[B, T]: what some latents are before ReLU, from their keys'; `x_TD` are centred."""

    def _auxk(self, x_TD: Tensor, residual_TD: Tensor, routing: Routing | None, dead_M: Tensor) -> Tensor:
        dead_B, b_D = dead_M.nonzero()[:, 0], self.b_in_D.detach()
        u_TGL, v_TGR = self._keys(x_TD, b_D)
        left_B, right_B = self._keys_of(dead_B)
        # As rows of an embedding: its gradient adds up what several latents share in the same order every time, on a GPU too.
        u_BT, v_BT = F.embedding(left_B, u_TGL.flatten(1).T), F.embedding(right_B, v_TGR.flatten(1).T)
        pre_TB = self._join(x_TD - b_D, u_BT, v_BT, dead_B).T
        values, indices = pre_TB.topk(min(self.auxk_latents(), len(dead_B)), dim=1, sorted=False)
        latents_TB = torch.zeros_like(pre_TB).scatter(1, indices, values.relu())
        return normalized_auxk_loss(residual_TD, latents_TB @ self.W_dec_MD.index_select(0, dead_B), self.group)

    def _keys_of(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The left key of each latent among G L, and the right one among G R."""
        left = latents // self.right
        return left, left // self.left * self.right + latents % self.right

    def _latents_of(self, left_TGC: Tensor, right_TGC: Tensor, rank_r: Tensor, rank_s: Tensor) -> Tensor:
        """[T, G R]: the latents of pairs of some ranks, from the keys' numbers in their heads by rank."""
        head_G1 = torch.arange(self.heads, device=left_TGC.device)[:, None]
        return ((head_G1 * self.left + left_TGC[..., rank_r]) * self.right + right_TGC[..., rank_s]).flatten(1)

    def _picked(self, keys_TGL: Tensor, index_TK: Tensor) -> Tensor:
        """[T, K]: some of each token's values."""
        keys_TP = keys_TGL.flatten(1)
        row_T1 = torch.arange(len(keys_TP), device=keys_TP.device)[:, None] * keys_TP.shape[1]
        return F.embedding(row_T1 + index_TK, keys_TP.reshape(-1, 1))[..., 0]


def staircase(left: int, right: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (r, s), from 0, with (r + 1)(s + 1) <= count: in one of them lies each of the `count` best pairs by any score that grows with both.

    Each pair (r, s) is no better than the (r + 1)(s + 1) pairs of better ranks, itself included; about count * ln(count) instead of count^2.
    """
    r, s = torch.arange(min(left, count), device=device), torch.arange(min(right, count), device=device)
    rank_r, rank_s = ((r[:, None] + 1) * (s + 1) <= count).nonzero(as_tuple=True)
    return rank_r, rank_s


def geometric_mean(u: Tensor, v: Tensor) -> Tensor:
    """sqrt(u v) of what is not negative, with gradient 0 where the product is 0: there it has none."""
    product = u * v
    return torch.where(product > 0, product, 1.0).sqrt() * (product > 0)

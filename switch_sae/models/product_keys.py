"""`ProductKeysSAE`: latents scored by the sum of two keys (Lample et al., arXiv 1907.05242; for sparse coders Shabalin et al., EleutherAI 2025)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_sae.checks import all_at_least
from switch_sae.models.factored import FactoredSAE


class ProductKeysSAE(FactoredSAE):
    """z_ij = ReLU(u_i + v_j + b_ij) of pairs of the k largest u and the k largest v of a head, z = TopK of these; recon = W_dec z + b_pre.

    s keys on each side of G heads, M = G s^2; the encoder costs 2 G s rows, 1/32 of a dense one at M = 4,096 and one head. A head's rows have rank
    2 s - 1 and share halves, so that crossings (i, j') of two latents that fire look like latents too. As published
    (https://github.com/EleutherAI/sparsify/tree/e2e-pkm), but with what that code's fast path leaves out: the bias of each latent acts, on pairs that
    exist, before ReLU. Heads own latents of their own here; there they share them, and one latent can be chosen twice. Their Muon and falling k are
    left out.
    """

    @dataclass
    class Config(FactoredSAE.Config):
        keys: int | None = None
        """s: keys on each side of a head, of which there are num_latents / s^2. None is one head, sqrt(num_latents) keys."""

        def __post_init__(self) -> None:
            all_at_least(self, keys=1, num_latents=1)
            if self.keys is None and math.isqrt(self.num_latents) ** 2 != self.num_latents:
                low = math.isqrt(self.num_latents)
                raise ValueError(
                    f"num_latents={self.num_latents} is no square: latents are pairs of as many left as right keys. Use {low**2} or "
                    f"{(low + 1) ** 2}, or several heads: keys=16 makes any multiple of 256 fit."
                )
            if self.keys is not None and self.num_latents % self.keys**2:
                low = self.num_latents // self.keys**2 * self.keys**2
                fits = " or ".join(str(fit) for fit in (low, low + self.keys**2) if fit > 0)
                raise ValueError(f"num_latents={self.num_latents} is no multiple of keys^2 = {self.keys**2}, the latents of a head. Use {fits}.")
            super().__post_init__()

        @property
        def width_step(self) -> int:
            return 1 if self.keys is None else self.keys**2

        def fitting(self, least: int) -> int:
            return super().fitting(least) if self.keys else math.ceil(math.sqrt(least)) ** 2

        @property
        def heads_left_right(self) -> tuple[int, int, int]:
            keys = self.keys or math.isqrt(self.num_latents)
            return self.num_latents // keys**2, keys, keys

    config: "ProductKeysSAE.Config"
    label, colour, marker = "Product keys", "#2A9D8F", "h"
    key_norm = 0.5**0.5  # sums of two have norm 1

    def __init__(self, config: "ProductKeysSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.b_enc_M = nn.Parameter(torch.zeros(config.num_latents)) if config.encoder_bias else None

    def _choose(self, x_TD: Tensor, u_TGL: Tensor, v_TGR: Tensor) -> tuple[Tensor, Tensor, Any]:
        with torch.no_grad():
            k = self.config.k
            best_u, best_v = (keys.topk(min(k, keys.shape[2]), dim=2, sorted=False) for keys in (u_TGL, v_TGR))
            each = torch.arange(best_u.indices.shape[2], device=u_TGL.device)
            rank_r, rank_s = each.repeat_interleave(len(each)), each.repeat(len(each))
            latent_TC = self._latents_of(best_u.indices, best_v.indices, rank_r, rank_s)
            score_TC = self._biased((best_u.values[..., rank_r] + best_v.values[..., rank_s]).flatten(1), latent_TC)
            indices_TK = latent_TC.gather(1, score_TC.topk(k, dim=1, sorted=False).indices)
        left_TK, right_TK = self._keys_of(indices_TK)
        return self._biased(self._picked(u_TGL, left_TK) + self._picked(v_TGR, right_TK), indices_TK).relu(), indices_TK, None

    def _join(self, x_TD: Tensor, u_BT: Tensor, v_BT: Tensor, latent_B: Tensor) -> Tensor:
        return self._biased(u_BT + v_BT, latent_B[:, None])

    def _biased(self, pre: Tensor, latents: Tensor) -> Tensor:
        return pre if self.b_enc_M is None else pre + F.embedding(latents, self.b_enc_M[:, None])[..., 0]

"""`ProductKeysExactSAE`: product keys choose candidates, whose own encoder rows decide, as in PEER one neuron each (He, arXiv 2407.04153)."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_kernels import Dispatch, LatentOrder
from switch_kernels.decode import row_products
from switch_sae.checks import all_at_least
from switch_sae.models.base import Flops
from switch_sae.models.factored import geometric_mean, staircase
from switch_sae.models.inference import Inference, equal_blocks, pursue_in_lists, pursuit_flops
from switch_sae.models.latents import SparseLatents
from switch_sae.models.product_keys import ProductKeysSAE


class KeyGate(Enum):
    """What a latent's score s = u_i + v_j, by which it was retrieved, is to its value; y is its own row's, w (x - b_pre)."""

    none = "none"
    """z = ReLU(y + s + b): rows are W_enc = w + A_i + B_j, and scores are values but for w, which starts at 0."""
    score = "score"
    """z = sqrt(ReLU(y + b) ReLU(s)): rows of their own alone; w starts as the unit row of A_i + B_j."""


class ProductKeysExactSAE(ProductKeysSAE):
    """The c latents with the largest u_i + v_j are encoded by a full row each, w_ij; z = TopK of these; recon = W_dec z + b_pre.

    2 G s + c rows instead of M: with k = 16 and M = 4,096 1/16 of a dense encoder, at M = 16,384 1/43. Retrieval is exact (`staircase`): the same c
    as if all M scores were sorted. Keys learn through the values of the k latents that were chosen and through AuxK, in both gates. The product y s
    of sparsely gated linear experts (Schug, arXiv 2606.07414) is no gate here: it would grow with the square of activations, and did worse.
    """

    @dataclass
    class Config(ProductKeysSAE.Config):
        candidates: int | None = None
        """c: latents that keys retrieve for each token; None is 8 k, or all where there are fewer."""
        gate: KeyGate = KeyGate.none
        """How keys take part in values, which is what trains them."""

        def __post_init__(self) -> None:
            all_at_least(self, candidates=1)
            super().__post_init__()
            if self.retrieved < self.k:
                raise ValueError(f"candidates={self.candidates} are fewer than the k={self.k} that are chosen of them. Use candidates >= {self.k}.")
            if self.retrieved > self.num_latents:
                raise ValueError(f"num_latents={self.num_latents} are fewer than candidates={self.candidates}. Use num_latents >= {self.candidates}.")

        @property
        def retrieved(self) -> int:
            """c."""
            return min(self.num_latents, 8 * self.k) if self.candidates is None else self.candidates

        @property
        def least_latents(self) -> int:
            return self.fitting(max(self.k, self.candidates or 1))

    config: "ProductKeysExactSAE.Config"
    label, colour, marker = "Product keys, exact", "#1D6F65", "H"
    searches_lists = True

    def __init__(self, config: "ProductKeysExactSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        # Under the gate `none` only what a row is beside its keys.
        self.W_enc_MD = nn.Parameter(torch.zeros_like(self.W_dec_MD) if config.gate is KeyGate.none else self.W_dec_MD.detach().clone())

    @property
    def W_enc(self) -> Tensor:
        """[D, M]: whole rows as columns, computed anew where keys are a part of them."""
        return self.W_enc_MD.T + self.sums_of_keys().T if self.config.gate is KeyGate.none else self.W_enc_MD.T

    def flops(self) -> Flops:
        """Pursuit, which is for scoring, searches what keys retrieve; the Gram matrix of all latents is computed once for given weights."""
        own, (config, row) = super().flops(), (self.config, 2 * self.d_in)
        if self.inference is not Inference.pursuit:
            return own
        return replace(own, encode=row * len(self.W_key_PD) + pursuit_flops(self.d_in, config.retrieved, config.k, equal_blocks(config.k)))

    def _pursue(self, x_TD: Tensor, dispatch: Dispatch) -> SparseLatents:
        """Among what keys retrieve."""
        with torch.no_grad():
            latent_TC, _ = self._retrieved(*self._keys(x_TD))
        return pursue_in_lists(self, x_TD, latent_TC, self.config.k, equal_blocks(self.config.k))

    def _own_rows(self) -> tuple[int, int]:
        return self.config.retrieved, self.config.k

    def _choose(self, x_TD: Tensor, u_TGL: Tensor, v_TGR: Tensor) -> tuple[Tensor, Tensor, LatentOrder | None]:
        with torch.no_grad():
            latent_TC, score_TC = self._retrieved(u_TGL, v_TGR)
            own_TC = row_products(x_TD - self.b_in_D, latent_TC, self.W_enc_MD)
            chosen_TK = self._value(own_TC, score_TC, latent_TC).topk(self.config.k, dim=1, sorted=False).indices
            indices_TK, own_TK, score_TK = (each_TC.gather(1, chosen_TK) for each_TC in (latent_TC, own_TC, score_TC))
        by_latent = None
        if torch.is_grad_enabled():
            by_latent = LatentOrder.from_indices(indices_TK, self.num_latents)
            own_TK = _Known.apply(x_TD, self.b_in_D, self.W_enc_MD, own_TK, indices_TK, by_latent)
            left_TK, right_TK = self._keys_of(indices_TK)
            score_TK = self._picked(u_TGL, left_TK) + self._picked(v_TGR, right_TK)
        return self._value(own_TK, score_TK, indices_TK), indices_TK, by_latent

    def _retrieved(self, u_TGL: Tensor, v_TGR: Tensor) -> tuple[Tensor, Tensor]:
        """(latents, scores), [T, c]: the largest sums of all heads."""
        count = self.config.retrieved
        best_u, best_v = (keys.topk(min(count, keys.shape[2]), dim=2) for keys in (u_TGL, v_TGR))
        rank_r, rank_s = staircase(self.left, self.right, count, u_TGL.device)
        score_TC, place_TC = (best_u.values[..., rank_r] + best_v.values[..., rank_s]).flatten(1).topk(count, dim=1, sorted=False)
        return self._latents_of(best_u.indices, best_v.indices, rank_r, rank_s).gather(1, place_TC), score_TC

    def _value(self, own: Tensor, score: Tensor, latents: Tensor) -> Tensor:
        if self.config.gate is KeyGate.none:
            return self._biased(own + score, latents).relu()
        return geometric_mean(self._biased(own, latents).relu(), score.relu())

    def _join(self, x_TD: Tensor, u_BT: Tensor, v_BT: Tensor, latent_B: Tensor) -> Tensor:
        return self._value(self.W_enc_MD.index_select(0, latent_B) @ x_TD.T, u_BT + v_BT, latent_B[:, None])


class _Known(torch.autograd.Function):
    """[T, K]: (x - b_pre) W[latent] of chosen pairs, which are known already; gradients touch their rows alone."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, b_pre_D: Tensor, W_MD: Tensor, values_TK: Tensor, indices_TK: Tensor, by_latent: LatentOrder) -> Tensor:
        ctx.save_for_backward(x_TD, b_pre_D, W_MD, indices_TK)
        ctx.by_latent = by_latent
        return values_TK.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TK,), (x_TD, b_pre_D, W_MD, indices_TK) = grads, ctx.saved_tensors
        grad_x_TD = F.embedding_bag(indices_TK, W_MD, mode="sum", per_sample_weights=grad_TK) if ctx.needs_input_grad[0] else None
        grad_b_pre_D = -(ctx.by_latent.weight_sums(grad_TK) @ W_MD)
        return grad_x_TD, grad_b_pre_D, ctx.by_latent.weighted_row_sums(x_TD - b_pre_D, grad_TK), None, None, None

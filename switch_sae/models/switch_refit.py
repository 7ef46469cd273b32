"""`SwitchRefitSAE`: one expert per token, whose encoder chooses latents, a threshold for the whole batch, and values by least squares."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switch_kernels import Dispatch
from switch_sae.checks import all_at_least
from switch_sae.models.base import Flops, SAEConfig, SAEOutput
from switch_sae.models.gram import local_products, refresh_tokens, to_global
from switch_sae.models.inference import RIDGE, Inference, equal_blocks, gram_flops, gram_now, pursue_with_threshold, pursuit_flops, refit, refit_flops
from switch_sae.models.latents import SparseLatents
from switch_sae.models.losses import local_auxk_loss
from switch_sae.models.pairs import largest, row_sums
from switch_sae.models.routers import ROUTERS, Routing
from switch_sae.models.switch_pursuit import SwitchPursuitSAE, check_even_experts, check_router
from switch_sae.rows import Rows


class SwitchRefitSAE(SwitchPursuitSAE):
    """e = router(x); v = ReLU(W_enc (x - b) + b_enc) of the shared latents and expert e's; I: of a batch of T tokens the T * k largest v, at most
    `max_latents` per token (in evaluation those above `threshold`); z = least squares on I, z >= 0; recon = W_dec[I]^T z + b.

    Loss: ||x - recon||^2 with z held fixed, its exact gradient; mean_t ||v_I - z||^2, by which the encoder learns to predict the values of what it
    chose; the same for one latent of some tokens that it left out and that would help most (`_missed`); the router's competition and balance; AuxK.
    The encoder keeps the stability of one-shot codes, least squares the error that they leave.
    """

    @dataclass
    class Config(SAEConfig):
        num_latents: int = 4096
        """M, in all."""
        k: int = 32
        """Active latents per token, on average."""
        num_experts: int = 32
        """E; must divide num_latents - shared."""
        shared: int = 0
        """S: the first latents, which every token may use beside its expert's."""
        max_latents: int | None = None
        """The most that one token may take; None is 2 k."""
        router: Any = ROUTERS.field("competition")
        """The `Config` of one of `ROUTERS`."""
        auxk: float = 1 / 32
        """Coefficient of AuxK, which revives dead latents; 0 switches it off."""
        ridge: float = RIDGE
        """Added to the diagonal of Gram matrices in refits."""
        gram_tokens: int | None = None
        """Gram matrices are computed anew after so many tokens of training; None is 8,192."""
        coherence: float = 0.0
        """Coefficient of a penalty on close pairs in a dictionary: coherence * D * mean_i sum_{j != i} ReLU(cos_ij - 0.3)^2."""
        missed: float = 1.0
        """Coefficient of the loss that teaches the encoder what it left out; 0 switches it off."""
        missed_share: float = 0.25
        """Share of a batch's tokens that are searched for it."""
        threshold_beta: float = 0.999
        """Decay per step of the threshold's running mean; at first less, (1 + step) / (10 + step)."""

        def __post_init__(self) -> None:
            all_at_least(self, num_latents=1, k=1, num_experts=1, shared=0, max_latents=1, auxk=0, coherence=0, ridge=0, gram_tokens=1, missed=0)
            check_even_experts(self.num_latents, self.num_experts, self.shared)
            check_router(self.router)
            if not 0 <= self.missed_share <= 1:
                raise ValueError(f"missed_share={self.missed_share} must lie between 0 and 1. Use 0.25, or missed=0 to search nothing.")
            if not 0 <= self.threshold_beta < 1:
                raise ValueError(f"threshold_beta={self.threshold_beta} must lie in [0, 1): at 1 the threshold would never move. Use 0.999.")
            if self.max_latents is not None and self.max_latents < self.k:
                raise ValueError(f"max_latents={self.max_latents} must be at least k={self.k}, the mean. Use {2 * self.k}.")
            if self.k > self.candidates:
                raise ValueError(
                    f"num_latents={self.num_latents} gives a token {self.candidates} latents to choose from, of which it takes k={self.k}. "
                    f"Use num_latents >= {self.least_latents}, or a smaller k."
                )

        @property
        def most(self) -> int:
            """The most that one token may take."""
            return min(self.max_latents or 2 * self.k, self.candidates)

        @property
        def candidates(self) -> int:
            """Latents that one token may use."""
            return self.shared + (self.num_latents - self.shared) // self.num_experts

        @property
        def width_step(self) -> int:
            return self.num_experts

        @property
        def least_latents(self) -> int:
            return self.num_experts * max(1, self.k - self.shared) + self.shared

    config: "SwitchRefitSAE.Config"  # type: ignore[assignment]
    colour, marker = "#D95F02", "X"
    own_inference, has_encoder = Inference.refit, True
    trains_by = (Inference.refit,)
    by_threshold = True
    step = 0

    def __init__(self, config: "SwitchRefitSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)  # type: ignore[arg-type]
        self.W_enc_MD = nn.Parameter(self.W_dec_MD.detach().clone())
        self.b_enc_M = nn.Parameter(torch.zeros(config.num_latents))

    @torch.no_grad()
    def initialize(self, rows: Rows) -> None:
        super().initialize(rows)
        x_TD = self._scaled(rows.x_TD[:8192])
        values_TK = self._candidates(x_TD, self.route(rows.x_TD[:8192])[1])[0]
        kept = largest(values_TK, len(values_TK) * self.config.k)
        smallest = values_TK.flatten()[kept].min() if len(kept) else values_TK.new_zeros(())
        self.theta.copy_(smallest)
        self.threshold.copy_(smallest)

    def begin_step(self, step: int, total_steps: int) -> None:
        super().begin_step(step, total_steps)
        self.step = step

    def _update_threshold(self, output: SAEOutput) -> None:
        beta = min(self.config.threshold_beta, (1 + self.step) / (10 + self.step))
        self.threshold.lerp_(self.theta, 1 - beta)

    def flops(self) -> Flops:
        """Encoding: C products, and the refit of k latents on average. Backward: W_dec and W_enc on selected rows,
        Gram matrices, the search for what was missed, rivals.
        """
        k, latents, row = self.config.k, self.config.candidates, 2 * self.d_in
        encode = row * latents
        if self.inference is Inference.pursuit:
            encode = pursuit_flops(self.d_in, latents, k, equal_blocks(k), by_threshold=True)
        elif self.inference is Inference.refit:
            encode += refit_flops(self.d_in, k, from_gram=True, by_threshold=True)
        searched = round(self.config.missed_share * row * latents) if self.config.missed else 0
        backward = 2 * row * k + searched + gram_flops(self.d_in, self.num_experts, latents, refresh_tokens(self.config))
        return self._with_router(Flops(router=0, encode=encode, decode=row * k, backward=backward))

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        self.b_enc_M.div_(self.activation_scale)
        super().fold_activation_scale()

    def _infer(self, x_TD: Tensor) -> tuple[SparseLatents, Routing, Tensor | None]:
        routing = self.router.route(x_TD)
        dispatch = self._dispatch(routing, len(x_TD))
        if not (self.training and torch.is_grad_enabled()):
            return self._find(x_TD, dispatch), routing, None
        values_TK, indices_TK = self._candidates(x_TD, dispatch)
        with torch.no_grad():
            kept = largest(values_TK, len(values_TK) * self.config.k, self.group)
            chosen_TK = torch.zeros_like(values_TK).flatten().index_put_((kept,), values_TK.flatten()[kept]).view_as(values_TK)
            smallest = values_TK.flatten()[kept].min() if len(kept) else torch.full_like(self.theta, torch.inf)
            smallest = torch.cat(self.group.gather(smallest[None])).min()
            self.theta.copy_(torch.where(smallest.isinf(), self.theta, smallest))
        latents = refit(self, x_TD, SparseLatents(chosen_TK, indices_TK, self.num_latents), dispatch.expert_TS[:, 0], gram_now(self, len(x_TD)))
        assert isinstance(latents, SparseLatents)
        token_P, latent_P = kept // values_TK.shape[1], indices_TK.flatten()[kept]
        centred_TD = (x_TD - self.b_in_D).detach()
        proposed_P = _Proposed.apply(values_TK.flatten()[kept], token_P, latent_P, centred_TD, self.W_enc_MD, self.b_enc_M)
        match = (proposed_P - latents.values_TK.flatten()[kept]).square().sum() / len(x_TD)
        return latents, routing, match

    @torch.no_grad()
    def _find(self, x_TD: Tensor, dispatch: Dispatch, gram_ECP: Tensor | None = None) -> SparseLatents:
        if self.inference is Inference.pursuit:
            return pursue_with_threshold(self, x_TD, dispatch, self.config.k, self._theta(), gram_ECP)
        values_TK, indices_TK = self._candidates(x_TD, dispatch)
        latents = SparseLatents(torch.where(values_TK > self._theta(), values_TK, 0.0), indices_TK, self.num_latents)
        if self.inference is Inference.encoder:
            return latents
        refitted = refit(self, x_TD, latents, dispatch.expert_TS[:, 0], gram_ECP)
        assert isinstance(refitted, SparseLatents)
        return refitted

    @torch.no_grad()
    def _candidates(self, x_TD: Tensor, dispatch: Dispatch) -> tuple[Tensor, Tensor]:
        """(values, latents) of the `most` largest ReLU(W_enc (x - b) + b_enc) that each token may use."""
        pre_NC = local_products(dispatch.gather(x_TD - self.b_in_D), self.W_enc_MD, dispatch, self.num_shared, self.b_enc_M)
        values_NK, local_NK = pre_NC.topk(self.config.most, dim=1, sorted=False)
        expert_N = dispatch.gather_pairs(dispatch.expert_TS.flatten())
        indices_NK = to_global(local_NK, expert_N, self.num_shared, self.latents_per_expert)
        return dispatch.scatter(values_NK.clamp_min(0)), dispatch.scatter(indices_NK)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss_terms(rows, output, dead_M)
        count = math.ceil(self.config.missed_share * len(rows))
        return terms if not (self.config.missed and count) else terms | {"missed": self.config.missed * self._missed(rows, output, count)}

    def _missed(self, rows: Rows, output: SAEOutput, count: int) -> Tensor:
        """Over the first tokens, mean (v_j - c_j)^2 of the latent j that was left out and would help most, c_j = W_dec[j] (x - recon), where
        c_j is above theta; v_j without ReLU.
        """
        assert output.routing is not None and isinstance(output.latents, SparseLatents)
        with torch.no_grad():
            x_nD = self._scaled(rows.x_TD[:count])
            dispatch = Dispatch.from_experts(output.routing.expert_TS[:count], self.num_experts)
            residual_nD = x_nD - output.recon_TD[:count] * self.target_scale
            left_nC = local_products(dispatch.gather(residual_nD), self.W_dec_MD, dispatch, self.num_shared)
            expert_n = dispatch.gather_pairs(dispatch.expert_TS.flatten())
            # What is in use has next to no correlation left (least squares), so the largest is of a latent that is not.
            best_n, local_n = left_nC.max(dim=1)
            latent_n = dispatch.scatter(to_global(local_n[:, None], expert_n, self.num_shared, self.latents_per_expert))
            wanted_n1 = dispatch.scatter(best_n[:, None])
            token_P = (wanted_n1[:, 0] > self.theta).nonzero()[:, 0]
            latent_P, wanted_P, centred_nD = latent_n[token_P, 0], wanted_n1[token_P, 0], x_nD - self.b_in_D
            value_P = (centred_nD[token_P] * self.W_enc_MD[latent_P]).sum(dim=1) + self.b_enc_M[latent_P]
        return (_Proposed.apply(value_P, token_P, latent_P, centred_nD, self.W_enc_MD, self.b_enc_M) - wanted_P).square().sum() / count

    def _auxk(self, rows: Rows, residual_TD: Tensor, output: SAEOutput, dead_M: Tensor) -> Tensor:
        dispatch = self._dispatch(output.routing, len(rows))
        encoder = ((self._scaled(rows.x_TD) - self.b_in_D).detach(), self.W_enc_MD, self.b_enc_M)
        return local_auxk_loss(residual_TD, self.W_dec_MD, dead_M, dispatch, self.num_shared, self.group, encoder)


class _Proposed(torch.autograd.Function):
    """Values that are known already, W_enc[latent] x[token] + b_enc[latent], with the gradients of those rows."""

    @staticmethod
    def forward(ctx: Any, values_P: Tensor, token_P: Tensor, latent_P: Tensor, x_TD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor) -> Tensor:
        ctx.save_for_backward(token_P, latent_P, x_TD)
        ctx.num_latents = len(W_enc_MD)
        return values_P.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        token_P, latent_P, x_TD = ctx.saved_tensors
        grad_b_M = grads[0].new_zeros(ctx.num_latents).index_add_(0, latent_P, grads[0])
        return None, None, None, None, row_sums(grads[0], latent_P, token_P, x_TD, ctx.num_latents), grad_b_M

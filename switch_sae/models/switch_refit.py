"""`SwitchRefitSAE`: one expert per token, whose encoder chooses latents, a threshold for the whole batch, and values by least squares."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from switch_kernels import ALONE, Dispatch, Group, LatentOrder
from switch_sae.checks import all_at_least
from switch_sae.models.base import Flops, SAEConfig, SAEOutput
from switch_sae.models.gram import local_products, precise, refresh_tokens, to_global
from switch_sae.models.inference import (
    RIDGE,
    Inference,
    equal_blocks,
    gram_flops,
    gram_now,
    pursue_with_threshold,
    pursuit_flops,
    refit_flops,
    refit_pairs,
    searched_by,
    select_in_kernels,
    why_not_searched_in_kernels,
)
from switch_sae.models.latents import SparseLatents
from switch_sae.models.losses import local_auxk_loss
from switch_sae.models.pairs import above, decode_pairs, largest, order_of, row_sums
from switch_sae.models.routers import ROUTERS
from switch_sae.models.switch_pursuit import StepOutput, SwitchPursuitSAE, check_even_experts, check_router
from switch_sae.rows import Rows, Shapes

if TYPE_CHECKING:
    from switch_kernels.gpu.auxk import DeadLatents
    from switch_kernels.gpu.pursuit_step import SearchSettings, SearchWeights
    from switch_kernels.gpu.step import StepTensors

Select = Callable[[Tensor], Tensor]
"""Flat positions, rising, of what is selected of pre-activations."""


class SwitchRefitSAE(SwitchPursuitSAE):
    """e = router(x); v = ReLU(W_enc (x - b) + b_enc) of the shared latents and expert e's; I: of a batch of T tokens the T * k largest v, at most
    `max_latents` per token (in evaluation those above `threshold`); z = least squares on I, z >= 0; recon = W_dec[I]^T z + b.

    Loss: ||x - recon||^2 with z held fixed, its exact gradient; mean_t ||v_I - z||^2 (`match`), by which the encoder learns to predict the values of
    what it chose; the same for one latent of some tokens that it left out and that would help most (`missed`); the router's competition and balance;
    AuxK.
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
    has_kernels, kernels_train_by = True, Inference.refit
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
        values_P = self._propose(x_TD, self.route(rows.x_TD[:8192])[1], self._largest(len(x_TD))).values_P
        self.theta.copy_(values_P.min() if len(values_P) else torch.zeros_like(self.theta))
        self.threshold.copy_(self.theta)

    def begin_step(self, step: int, total_steps: int) -> None:
        super().begin_step(step, total_steps)
        self.step = step

    def _search_step(
        self,
        x_TD: Tensor,
        operands: Mapping[str, Tensor],
        weights: "SearchWeights",
        settings: "SearchSettings",
        seed: Tensor,
        dead: "DeadLatents | None",
    ) -> "StepTensors":
        from switch_kernels.gpu.refit_step import Encoder, refit_step

        count = self._searched_tokens(len(x_TD))
        encoder = Encoder(operands["W_enc_MD"], self.b_enc_M, self.W_dec_MD, self.config.k, self.config.missed, count)
        return refit_step(x_TD, self.activation_scale, weights, encoder, settings, seed, dead)

    def follow_step(self, computed: "StepTensors", step: Tensor) -> None:
        from switch_kernels.gpu.thresholds import follow_theta_

        follow_theta_(self.theta, self.threshold, step, computed.gradients.square, self.config.threshold_beta)

    def _searched_tokens(self, tokens: int) -> int:
        """How many tokens of a batch are searched for what the encoder left out."""
        return math.ceil(self.config.missed_share * tokens) if self.config.missed else 0

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

    def forward(self, x_TD: Tensor) -> SAEOutput:
        if not self._in_step:
            return super().forward(x_TD)
        x_TD = self._scaled(x_TD)
        routing = self.router.route(x_TD)
        own = self._propose(x_TD, self._dispatch(routing, len(x_TD)), self._largest(len(x_TD), self.group))
        self._set_theta(own)
        proposals = [own]
        if (rivals := self.router.rivals(routing)) is not None:
            dispatch = Dispatch.from_experts(rivals.expert_n1, self.num_experts)
            proposals.append(self._propose(x_TD[: len(rivals.expert_n1)], dispatch, self._above(self.theta)))
        refitted = self._refit(proposals, gram_now(self, len(x_TD)))
        latents, theirs = self._latents(own, refitted[0]), None if rivals is None else self._latents(proposals[1], refitted[1])
        by_latent = order_of(own.latent_P, self.num_latents)
        recon_ND = decode_pairs(refitted[0], own.latent_P, own.row_P, len(x_TD), self.W_dec_MD, by_latent)
        recon_TD = (own.dispatch.scatter(recon_ND) + self.b_out_D) / self.target_scale
        return RefitOutput(recon_TD, latents, routing, own=own, refitted_P=refitted[0], by_latent=by_latent, rivals=rivals, theirs=theirs)

    @torch.no_grad()
    def _find(self, x_TD: Tensor, dispatch: Dispatch, gram_ECP: Tensor | None = None) -> SparseLatents:
        if self.inference is Inference.pursuit:
            return pursue_with_threshold(self, x_TD, dispatch, self.config.k, self._theta(), gram_ECP)
        if why_not_searched_in_kernels(self) is None:
            encoder = self.W_enc_MD, self.b_enc_M
            return select_in_kernels(self, x_TD, encoder, dispatch.expert_TS, self.config.most, self._theta(), gram_ECP)
        proposal = self._propose(x_TD, dispatch, self._above(self._theta()))
        if self.inference is Inference.encoder:
            return self._latents(proposal, proposal.values_P)
        return self._latents(proposal, *self._refit([proposal], gram_now(self, len(x_TD)) if gram_ECP is None else gram_ECP))

    def _largest(self, tokens: int, group: Group = ALONE) -> Select:
        return lambda pre_NC: largest(pre_NC, tokens * self.config.k, group, self.config.most)

    def _above(self, theta: Tensor) -> Select:
        return lambda pre_NC: above(pre_NC, theta, self.config.most)

    @torch.no_grad()
    def _propose(self, x_TD: Tensor, dispatch: Dispatch, select: Select) -> "Proposal":
        """What is selected of W_enc (x - b) + b_enc, > 0."""
        centred_ND = dispatch.gather(x_TD - self.b_in_D)
        pre_NC = local_products(centred_ND, self.W_enc_MD, dispatch, self.num_shared, self.b_enc_M, searched_by(self))
        kept_P = select(pre_NC)
        row_P, local_P = kept_P // pre_NC.shape[1], kept_P % pre_NC.shape[1]
        latent_P = to_global(local_P[:, None], dispatch.expert_N[row_P], self.num_shared, self.latents_per_expert)[:, 0]
        return Proposal(dispatch, centred_ND, row_P, latent_P, pre_NC.flatten()[kept_P])

    @torch.no_grad()
    def _set_theta(self, own: "Proposal") -> None:
        smallest = own.values_P.min() if len(own.values_P) else torch.full_like(self.theta, torch.inf)
        smallest = torch.cat(self.group.gather(smallest[None])).min()
        self.theta.copy_(torch.where(smallest.isinf(), self.theta, smallest))

    @torch.no_grad()
    def _refit(self, proposals: "list[Proposal]", gram_ECP: Tensor) -> list[Tensor]:
        """The values of each by least squares; of all at once, so that threads have many rows to share."""
        centred_ND, count_N, latent_P, expert_N = (
            torch.cat(parts) if len(parts) > 1 else parts[0]
            for parts in zip(*((each.centred_ND, each.count_N, each.latent_P, each.dispatch.expert_N) for each in proposals), strict=True)
        )
        refitted_P = refit_pairs(self, precise(centred_ND), count_N, latent_P, expert_N, gram_ECP, self.config.most).to(centred_ND.dtype)
        return list(refitted_P.split([len(each.latent_P) for each in proposals]))

    @torch.no_grad()
    def _latents(self, proposal: "Proposal", values_P: Tensor) -> SparseLatents:
        count_N, slots = proposal.count_N, self.config.most
        slot_P = torch.arange(len(values_P), device=values_P.device) - (count_N.cumsum(0) - count_N)[proposal.row_P]
        place_P = proposal.dispatch.order_N[proposal.row_P] * slots + slot_P
        values_TK, indices_TK = values_P.new_zeros(len(count_N), slots), proposal.latent_P.new_zeros(len(count_N), slots)
        values_TK.view(-1)[place_P], indices_TK.view(-1)[place_P] = values_P, proposal.latent_P
        return SparseLatents(values_TK, indices_TK, self.num_latents)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss_terms(rows, output, dead_M)
        if not isinstance(output, RefitOutput):
            return terms
        count = self._searched_tokens(len(rows))
        missed = self._missed(rows, output, count)
        proposed_P, missed_Q = _Proposed.apply(output.own, output.by_latent, missed, self.W_enc_MD, self.b_enc_M)
        terms["match"] = (proposed_P - output.refitted_P).square().sum() / len(rows)
        if count:
            terms["missed"] = self.config.missed * (missed_Q - missed.wanted_Q).square().sum() / count
        return terms

    @torch.no_grad()
    def _missed(self, rows: Rows, output: SAEOutput, count: int) -> "Missed":
        """Of the first tokens: the latent j that was left out and would help most, where c_j = W_dec[j] (x - recon) is above theta, as the encoder
        values it (without ReLU) and as it should have, c_j.
        """
        assert output.routing is not None
        x_nD = self._scaled(rows.x_TD[:count])
        dispatch = Dispatch.from_experts(output.routing.expert_TS[:count], self.num_experts)
        residual_nD = x_nD - output.recon_TD[:count] * self.target_scale
        left_nC = local_products(dispatch.gather(residual_nD), self.W_dec_MD, dispatch, self.num_shared, execution=searched_by(self))
        # What is in use has next to no correlation left (least squares), so the largest is of a latent that is not.
        best_n, local_n = left_nC.max(dim=1)
        row_Q = (best_n > self.theta).nonzero()[:, 0]
        expert_Q = dispatch.expert_N[row_Q]
        latent_Q = to_global(local_n[row_Q, None], expert_Q, self.num_shared, self.latents_per_expert)[:, 0]
        centred_QD = x_nD[dispatch.order_N[row_Q]] - self.b_in_D
        value_Q = (centred_QD * self.W_enc_MD[latent_Q]).sum(dim=1) + self.b_enc_M[latent_Q]
        return Missed(centred_QD, latent_Q, value_Q, best_n[row_Q])

    def _auxk(self, rows: Rows, residual_TD: Tensor, output: SAEOutput, dead_M: Tensor) -> Tensor:
        dispatch = self._dispatch(output.routing, len(rows))
        encoder = ((self._scaled(rows.x_TD) - self.b_in_D).detach(), self.W_enc_MD, self.b_enc_M)
        return local_auxk_loss(residual_TD, self.W_dec_MD, dead_M, dispatch, self.num_shared, self.group, encoder)


@dataclass(frozen=True, repr=False)
class Proposal(Shapes):
    """The P pairs of a row and a latent that the encoder chose, row by row. Rows are those of the dispatch, in the order of experts."""

    dispatch: Dispatch
    centred_ND: Tensor
    """x - b, scaled."""
    row_P: Tensor
    latent_P: Tensor
    values_P: Tensor
    """> 0."""

    @cached_property
    def count_N(self) -> Tensor:
        """Pairs of each row."""
        return torch.bincount(self.row_P, minlength=len(self.centred_ND))


class Missed(NamedTuple):
    """The Q pairs of a token and a latent that the encoder should have chosen."""

    centred_QD: Tensor
    latent_Q: Tensor
    value_Q: Tensor
    """As the encoder values them, without ReLU."""
    wanted_Q: Tensor


@dataclass(frozen=True, repr=False)
class RefitOutput(StepOutput):
    """Of a training step, with what the encoder's losses need."""

    own: Proposal = field(kw_only=True)
    refitted_P: Tensor = field(kw_only=True)
    by_latent: LatentOrder = field(kw_only=True)


class _Proposed(torch.autograd.Function):
    """Values that are known already, W_enc[latent] x + b_enc[latent] of proposed and of missed pairs, with the gradients of those rows.

    One function for both: each gradient of W_enc takes as long to write as its rows take to sum.
    """

    @staticmethod
    def forward(ctx: Any, own: Proposal, by_latent: LatentOrder, missed: Missed, W_enc_MD: Tensor, b_enc_M: Tensor) -> tuple[Tensor, Tensor]:
        ctx.own, ctx.by_latent, ctx.missed = own, by_latent, missed
        return own.values_P.clone(), missed.value_Q.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_P, grad_Q), own, missed = grads, ctx.own, ctx.missed
        grad_W_MD = row_sums(grad_P, own.row_P, own.centred_ND, ctx.by_latent)
        grad_W_MD.index_add_(0, missed.latent_Q, grad_Q[:, None] * missed.centred_QD)
        grad_b_M = grad_P.new_zeros(len(grad_W_MD)).index_add_(0, own.latent_P, grad_P).index_add_(0, missed.latent_Q, grad_Q)
        return None, None, None, grad_W_MD, grad_b_M

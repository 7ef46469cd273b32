"""One training step up to its gradients of SAEs whose values are found and not encoded: matching pursuit in the dictionary of a token's expert.

The router learns by competition: a rival expert computes some tokens as well. Values are held fixed, so that the loss's gradient is that of the
decoder and its bias. No device data is read on the host and no shape depends on it, so the step can be captured in a CUDA graph; the same bits come
out every time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_kernels.backend import Dot, operand_dtype
from switch_kernels.gpu import pairs, pursuit, sparse
from switch_kernels.gpu.auxk import Auxk, DeadLatents, Rows, auxk, scales_of
from switch_kernels.gpu.candidate_products import candidate_products
from switch_kernels.gpu.dispatch import Sorted, count_experts, gather_rows, sort_pairs
from switch_kernels.gpu.finish import Balance, Columns, finish
from switch_kernels.gpu.gemm_decode import residual_rows
from switch_kernels.gpu.rivals import Competition, compete, draw_rivals
from switch_kernels.gpu.route import Routed, route, route_backward
from switch_kernels.gpu.step import Gradients, StepTensors, router_columns
from switch_kernels.gpu.update import row_sum_parts
from switch_kernels.plan import GradientMode, Plan


@dataclass(frozen=True)
class SearchWeights:
    """An SAE's parameters as the kernels read them."""

    W_dec_MD: Tensor
    """[M, Dp] in the operands' dtype, Dp = D rounded up to 8, pad columns 0."""
    b_pre_D: Tensor
    W_router_ED: Tensor
    b_router_D: Tensor
    gram_ECP: Tensor
    """float32: the Gram matrices of the experts' dictionaries, of these weights or slightly older ones."""
    theta: Tensor
    """float32 []: a latent joins while its correlation exceeds it, and costs its square."""


@dataclass(frozen=True)
class SearchSettings:
    """What does not change from step to step."""

    num_experts: int
    shared: int
    """Latents that every token may use: the first ones."""
    most: int
    """Latents that a token may take."""
    ridge: float
    balance: float
    """alpha * D, or 0."""
    train_router: bool
    rivals: float
    """Share of the tokens that a rival computes as well."""
    dot: Dot
    plan: Plan

    @property
    def operand_dtype(self) -> torch.dtype:
        return operand_dtype(self.dot)


@dataclass(frozen=True)
class Batch:
    """The T tokens of a batch and its n rivals' tokens behind them, which are the first n once more, in the order of their experts."""

    x_TD: Tensor
    scale: Tensor
    routed: Routed
    rival_n: Tensor | None
    expert_R: Tensor
    """int32 [T + n]."""
    in_order: Sorted

    @property
    def tokens(self) -> int:
        return self.x_TD.shape[0]

    @property
    def grad_scale(self) -> float:
        """d(mean_t ||e_t||^2)/de_t = grad_scale * e_t."""
        return 2 / self.tokens

    @property
    def counts_E(self) -> Tensor:
        """int32: the batch's own tokens of each expert."""
        return self.in_order.counts_E if self.rival_n is None else self.routed.counts_BE.sum(0, dtype=torch.int32)

    def rows(self, b_pre_D: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, Dp]: x * scale - b in the order of experts."""
        return gather_rows(self.x_TD, self.scale, b_pre_D, self.in_order.order_N, 1, dtype)


def dispatch(x_TD: Tensor, scale: Tensor, W_router_ED: Tensor, b_router_D: Tensor, rivals: float, dot: Dot, seed: Tensor) -> Batch:
    """Routes, draws rivals for a share of the tokens, sorts by experts."""
    routed, num_experts = route(x_TD, scale, W_router_ED, b_router_D, 1, dot), W_router_ED.shape[0]
    expert_R, counts_BE, rival_n = routed.expert_TS.view(-1), routed.counts_BE, None
    count = math.ceil(rivals * x_TD.shape[0])
    if count:
        rival_n = draw_rivals(routed, count, seed)
        expert_R = torch.cat([expert_R, rival_n])
        counts_BE = count_experts(expert_R[:, None], num_experts)
    return Batch(x_TD, scale, routed, rival_n, expert_R, sort_pairs(expert_R[:, None], counts_BE, num_experts))


def pursuit_step(
    x_TD: Tensor, scale: Tensor, weights: SearchWeights, s: SearchSettings, blocks: int, seed: Tensor, dead: DeadLatents | None = None
) -> StepTensors:
    """Losses and gradients of one batch of raw activations x_TD (float32 or bfloat16, contiguous), by matching pursuit in `blocks` blocks.

    `seed` (int32 [1], another each step) draws the rivals. `dead` switches AuxK on, with the decoder as its own encoder.
    """
    batch = dispatch(x_TD, scale, weights.W_router_ED, weights.b_router_D, s.rivals, s.dot, seed)
    rows_ND, order_N = batch.rows(weights.b_pre_D, s.operand_dtype), batch.in_order.order_N
    products_NC = candidate_products(rows_ND, weights.W_dec_MD, None, batch.in_order.start_E1, s.shared, s.dot)
    found = pursuit.pursue_tokens(products_NC, weights.gram_ECP, batch.expert_R, order_N, s.most, blocks, s.ridge, weights.theta, s.shared)
    decoded = Decoded.of(batch, weights, *found)
    revived = None
    if dead is not None:
        rows_ND = decoded.residual_rows(batch, order_N, s.operand_dtype)
        revived = revive(batch, decoded, rows_ND, weights.W_dec_MD, None, weights, dead, s)
    decoder = pairs.Terms(decoded.values_TL, decoded.grad_TD, x_TD.shape[1], extra=revived.dec if revived else None)
    of_latents = pairs.pairs_by_latent(decoded.indices_TL, weights.W_dec_MD.shape[0], decoded.values_TL)
    return complete(batch, decoded, weights, of_latents, decoder, None, revived, s)


@dataclass(frozen=True)
class Decoded:
    """The batch's own reconstruction, from L slots of each token, and what all of them cost."""

    values_TL: Tensor
    """float32; 0 in slots that are not in use."""
    indices_TL: Tensor
    """int32."""
    grad_TD: Tensor
    """d loss / d reconstruction, in the operands' dtype: -grad_scale times the residual."""
    column_parts: Tensor
    loss_R: Tensor
    """float32 [T + n]: squared errors, with those of the rivals."""
    values_RL: Tensor

    @classmethod
    def of(cls, batch: Batch, weights: SearchWeights, values_RL: Tensor, indices_RL: Tensor) -> "Decoded":
        tokens, D = batch.x_TD.shape
        loss = sparse.decode_loss(
            values_RL, indices_RL, None, None, weights.W_dec_MD, D, weights.b_pre_D, batch.x_TD, batch.scale, batch.grad_scale,
            batch.in_order.order_N, fixed=True,
        )  # fmt: skip
        grad_TD = loss.grad_TD[:tokens]
        return cls(values_RL[:tokens], indices_RL[:tokens], grad_TD, row_sum_parts(grad_TD, D), loss.loss_T, values_RL)

    def residual(self, batch: Batch) -> Tensor:
        """x - recon, scaled, float32 [T, D]."""
        tokens, D = batch.x_TD.shape
        return residual_rows(self.grad_TD, None, None, 1, tokens, D, batch.grad_scale)

    def residual_rows(self, batch: Batch, order_N: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, Dp]: the residuals of tokens in some order."""
        columns, device = self.grad_TD.shape[1], self.grad_TD.device
        factor = torch.full((), -1 / batch.grad_scale, device=device)
        return gather_rows(self.grad_TD, factor, torch.zeros(columns, device=device), order_N, 1, dtype)


def revive(
    batch: Batch,
    decoded: Decoded,
    rows_ND: Tensor,
    W_in_MD: Tensor,
    b_in_M: Tensor | None,
    weights: SearchWeights,
    dead: DeadLatents,
    s: SearchSettings,
) -> Auxk:
    """AuxK of the batch's own tokens. Rows of rivals have codes, of which nothing comes: no residual is theirs."""
    tokens, D = batch.x_TD.shape
    order = batch.in_order
    rows = Rows(rows_ND, order.order_N, order.row_R[:tokens], order.start_E1, None, 1)
    scales = scales_of(decoded.loss_R[:tokens], decoded.column_parts, tokens, batch.grad_scale, dead.coefficient)
    return auxk(rows, W_in_MD, b_in_M, weights.W_dec_MD, dead, decoded.residual(batch), scales, D, s.dot, tied=b_in_M is None)


def complete(
    batch: Batch, decoded: Decoded, weights: SearchWeights, of_latents: pairs.LatentPairs, decoder: pairs.Terms, encoder: pairs.Terms | None,
    revived: Auxk | None, s: SearchSettings, more_terms: dict[str, Tensor] | None = None,
) -> StepTensors:  # fmt: skip
    """All gradients and loss terms, from what each latent's pairs add up."""
    (tokens, D), routed = batch.x_TD.shape, batch.routed
    counts_E = batch.counts_E
    factor = s.balance * s.num_experts / (tokens * tokens)
    columns: dict[str, Columns] = {}
    competition: Competition | None = None
    if batch.rival_n is not None:
        competition = compete(routed, batch.rival_n, decoded.loss_R, decoded.values_RL, weights.theta)
    if s.train_router:
        by_costs = (None, None) if competition is None else (competition.rival_n, competition.grad_n)
        grad_TE = route_backward(routed, None, counts_E, factor, *by_costs)
        columns |= router_columns(grad_TE, batch.x_TD, batch.scale, weights.W_router_ED, weights.b_router_D, s.dot)
    recomputed = s.plan.gradients is GradientMode.recomputed
    grads = pairs.latent_gradients(of_latents, decoder, encoder, None if recomputed else s.operand_dtype)
    columns["b_in_D"] = Columns((D,), decoded.column_parts)
    if grads.bias_M is not None:
        columns["b_enc_M"] = Columns(tuple(grads.bias_M.shape), grads.bias_M, revived.bias_M if revived else None)
    balance = Balance(routed.prob_sums_BE, counts_E, factor) if s.balance > 0 else None
    done = finish(columns, [grads.square_parts], decoded.loss_R[:tokens], tokens, balance)
    terms = {"mse": done.mse}
    if revived is not None:
        terms["auxk"] = revived.term
    if balance is not None:
        terms["load_balance"] = done.load_balance
    if competition is not None:
        terms["competition"] = competition.parts.sum()
    terms |= more_terms or {}
    recipe = grads if recomputed else None
    return StepTensors(
        terms, Gradients(grads.encoder_MD, grads.decoder_MD, recipe, done.gradients, done.square), done.squared_error,
        decoded.values_TL, decoded.indices_TL, counts_E, of_latents.start_M1[-1:] if encoder is None else None,
    )  # fmt: skip

"""One training step of a TopK or Switch SAE up to its gradients: router, dispatch, encoding, selection, decoding, losses, backward.

No device data is read on the host and no shape depends on it, so the step can be captured in a CUDA graph; the same bits come out every time.
Loss: mean_t ||x - recon||^2 + balance * E * sum_i f_i P_i + auxk, with x scaled by `scale` (Mudide et al., arXiv 2410.08201; AuxK: Gao et al.,
2406.04093).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_kernels.backend import Dot, operand_dtype
from switch_kernels.gpu import gemm, gemm_decode, gemm_weights, pairs, sparse
from switch_kernels.gpu.auxk import DeadLatents, Rows, auxk, scales_of
from switch_kernels.gpu.dispatch import count_experts
from switch_kernels.gpu.encode import encode_pairs
from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.finish import Balance, Columns, finish
from switch_kernels.gpu.gemm_tiles import padded
from switch_kernels.gpu.rivals import Competition
from switch_kernels.gpu.route import GateParts, Routed, route, route_backward, router_gradients
from switch_kernels.gpu.scatter import scatter_latents
from switch_kernels.gpu.topk import select_jointly
from switch_kernels.gpu.update import row_sum_parts
from switch_kernels.plan import GradientMode, Plan, Regime


@dataclass(frozen=True)
class Weights:
    """An SAE's parameters as the kernels read them."""

    W_enc_MD: Tensor
    """[M, Dp] in the operands' dtype, Dp = D rounded up to 8, pad columns 0."""
    W_dec_MD: Tensor
    """Likewise."""
    b_enc_M: Tensor | None
    b_in_D: Tensor
    """Subtracted from scaled activations before they are encoded."""
    b_out_D: Tensor
    """Added by the decoder. An autoencoder gives one tensor for both, and finds the gradient of both roles under `b_in_D`."""
    W_router_ED: Tensor | None = None
    b_router_D: Tensor | None = None
    """No router: one expert takes all, with gate 1."""


@dataclass(frozen=True)
class Settings:
    """What does not change from step to step."""

    num_experts: int
    slots: int
    k: int
    joint: bool
    balance: float
    """alpha * D, or 0."""
    train_router: bool
    dot: Dot
    plan: Plan

    @property
    def operand_dtype(self) -> torch.dtype:
        return operand_dtype(self.dot)


@dataclass(frozen=True)
class Gradients:
    """Of all parameters; those of the weight matrices as buffers or as a recipe (`GradientMode`)."""

    W_enc_MD: Tensor | None
    W_dec_MD: Tensor | None
    recipe: pairs.LatentGradients | None
    small: dict[str, Tensor]
    """By name in `Weights`: b_enc_M, b_in_D, b_out_D, W_router_ED, b_router_D as far as they are trained."""
    square: Tensor
    """float32 []: squared norm of all of them together."""

    def of_matrix(self, name: str) -> Tensor:
        """That of W_enc_MD or W_dec_MD, where it is no recipe."""
        gradient: Tensor | None = getattr(self, name)
        assert gradient is not None, name
        return gradient


@dataclass(frozen=True)
class StepTensors:
    """What a step computed. All tensors live on the device."""

    terms: dict[str, Tensor]
    gradients: Gradients
    squared_error: Tensor
    """sum_t ||target - recon||^2, scaled."""
    values_TK: Tensor
    """Before the gate."""
    indices_TK: Tensor
    """Where tokens take any number of latents: [1, M], values above 0 of those that fired, and the numbers of all."""
    pairs_E: Tensor | None
    """(token, slot) pairs per expert; None without a router."""
    active: Tensor | None = None
    """int32 [1]: pairs of a token and an active latent, where the step has counted them."""
    theta: Tensor | None = None
    """float32 []: the smallest value of a batch that was selected, where that is what selects; NaN where nothing was."""

    def active_pairs(self) -> Tensor:
        """int64 []."""
        return (self.values_TK > 0).sum() if self.active is None else self.active[0].long()


@dataclass(frozen=True)
class Selected:
    """A batch in expert order, and what was selected of it."""

    x_TD: Tensor
    target_TD: Tensor
    target_scale: Tensor
    gate_TS: Tensor | None
    expert_TS: Tensor
    order_N: Tensor
    row_R: Tensor
    start_E1: Tensor
    counts_E: Tensor
    rows_ND: Tensor
    values_TK: Tensor
    indices_TK: Tensor
    slot_TK: Tensor | None
    latents_per_expert: int
    active: Tensor | None = None
    theta: Tensor | None = None
    """As in `StepTensors`."""

    @property
    def grad_scale(self) -> float:
        """d(mean_t ||e_t||^2)/de_t = grad_scale * e_t."""
        return 2 / self.x_TD.shape[0]


@dataclass(frozen=True)
class _WeightGradients:
    W_enc_MD: Tensor | None
    W_dec_MD: Tensor | None
    recipe: pairs.LatentGradients | None
    bias_M: Tensor
    square_parts: tuple[Tensor, ...]
    """Their sum is the squared norm of the gradients of both matrices."""


def training_step(
    x_TD: Tensor, target_TD: Tensor, scale: Tensor, target_scale: Tensor, weights: Weights, settings: Settings, dead: DeadLatents | None = None
) -> StepTensors:
    """Losses and gradients of one batch of raw activations x_TD and what they shall become (float32 or bfloat16, contiguous). `dead` switches AuxK
    on.

    An autoencoder gives its activations and their scale twice.
    """
    s, routed = settings, None
    if weights.W_router_ED is not None:
        assert weights.b_router_D is not None
        routed = route(x_TD, scale, weights.W_router_ED, weights.b_router_D, s.slots, s.dot)
    batch = _select(x_TD, target_TD, scale, target_scale, weights, s, routed)
    decoded = (Dense if s.plan.regime is Regime.dense else Sparse)(batch, weights, s)
    return complete(batch, decoded, routed, scale, weights, s, dead)


def complete(
    batch: "Selected", decoded: "Dense | Sparse", routed: Routed | None, scale: Tensor, weights: Weights, s: Settings, dead: DeadLatents | None,
    competition: Competition | None = None,
) -> StepTensors:  # fmt: skip
    """All gradients and loss terms of what was selected and decoded; `scale` is that of the activations."""
    (tokens, D), x_TD = batch.x_TD.shape, batch.x_TD
    columns: dict[str, Columns] = {}
    balance = None
    if routed is not None:
        factor = s.balance * s.num_experts / (routed.expert_TS.numel() * tokens)
        if s.balance > 0:
            balance = Balance(routed.prob_sums_BE, batch.counts_E, factor)
        if s.train_router:
            assert weights.W_router_ED is not None and weights.b_router_D is not None
            by_costs = (None, None) if competition is None else (competition.rival_n, competition.grad_n)
            grad_TE = route_backward(routed, decoded.grad_gate, batch.counts_E, factor, *by_costs)
            columns |= router_columns(grad_TE, x_TD, scale, weights.W_router_ED, weights.b_router_D, s.dot)
    made = extra_enc = extra_dec = auxk_bias_M = None
    if dead is not None:
        rows = Rows(batch.rows_ND, batch.order_N, batch.row_R, batch.start_E1, batch.gate_TS, s.slots)
        scales = scales_of(decoded.error_parts, decoded.column_parts, tokens, batch.grad_scale, dead.coefficient)
        made = auxk(rows, weights.W_enc_MD, weights.b_enc_M, weights.W_dec_MD, dead, decoded.residual(), scales, D, s.dot)
        extra_enc, extra_dec, auxk_bias_M = made.enc, made.dec, made.bias_M
    grads = decoded.weight_gradients(extra_enc, extra_dec)
    b_in_parts = row_sum_parts(weights.W_enc_MD, D, grads.bias_M, -1.0)
    if weights.b_in_D is weights.b_out_D:
        columns["b_in_D"] = Columns((D,), decoded.column_parts, b_in_parts)
    else:
        columns |= {"b_out_D": Columns((batch.target_TD.shape[1],), decoded.column_parts), "b_in_D": Columns((D,), b_in_parts)}
    if weights.b_enc_M is not None:
        columns["b_enc_M"] = Columns((weights.W_enc_MD.shape[0],), grads.bias_M, auxk_bias_M)
    done = finish(columns, grads.square_parts, decoded.error_parts, tokens, balance)
    terms = {"mse": done.mse}
    if balance is not None:
        terms["load_balance"] = done.load_balance
    if competition is not None:
        terms["competition"] = competition.parts.sum()
    if made is not None:
        terms["auxk"] = made.term
    return StepTensors(
        terms, Gradients(grads.W_enc_MD, grads.W_dec_MD, grads.recipe, done.gradients, done.square), done.squared_error,
        batch.values_TK, batch.indices_TK, None if routed is None else batch.counts_E, batch.active, batch.theta,
    )  # fmt: skip


def router_columns(grad_TE: Tensor, x_TD: Tensor, scale: Tensor, W_ED: Tensor, b_D: Tensor, dot: Dot) -> dict[str, Columns]:
    """The gradients of the router's parameters, from that of its logits."""
    W_parts, b_parts = router_gradients(grad_TE, x_TD, scale, W_ED, b_D, dot)
    return {"W_router_ED": Columns(W_ED.shape, W_parts), "b_router_D": Columns(b_D.shape, b_parts)}


def _select(x_TD: Tensor, target_TD: Tensor, scale: Tensor, target_scale: Tensor, weights: Weights, s: Settings, routed: Routed | None) -> Selected:
    """Dispatch, encode, select."""
    tokens, F = x_TD.shape[0], weights.W_enc_MD.shape[0] // s.num_experts
    if routed is None:
        expert_TS, gate_TS = torch.zeros(tokens, 1, dtype=torch.int32, device=x_TD.device), None
        counts_BE = count_experts(expert_TS, 1)
    else:
        expert_TS, gate_TS, counts_BE = routed.expert_TS, routed.gate_TS, routed.counts_BE
    k = s.k if s.joint else s.k // s.slots
    found = encode_pairs(x_TD, scale, weights.b_in_D, expert_TS, counts_BE, weights.W_enc_MD, weights.b_enc_M, s.num_experts, k, s.dot)
    values_RK, indices_RK = found.values_RK, found.indices_RK
    slot_TK = None
    if s.slots > 1 and s.joint:
        assert gate_TS is not None
        values_TK, indices_TK, slot_TK = select_jointly(values_RK, indices_RK, gate_TS, s.k)
    else:
        values_TK, indices_TK = values_RK.view(tokens, s.k), indices_RK.view(tokens, s.k)
    in_order = found.in_order
    return Selected(
        x_TD, target_TD, target_scale, gate_TS, expert_TS, in_order.order_N, in_order.row_R, in_order.start_E1, in_order.counts_E, found.rows_ND,
        values_TK, indices_TK, slot_TK, F,
    )  # fmt: skip


class Dense:
    """Decoding and gradients through masked dense latents z_NF and grouped matrix products."""

    def __init__(self, batch: Selected, weights: Weights, s: Settings) -> None:
        F, start_E1 = batch.latents_per_expert, batch.start_E1
        z_NF = scatter_latents(batch.values_TK, batch.indices_TK, batch.slot_TK, batch.expert_TS, batch.row_R, batch.rows_ND.shape[0], F, padded(F))
        target = (batch.target_TD, batch.target_scale, weights.b_out_D, batch.grad_scale)
        if s.slots == 1:
            gate_R = None if batch.gate_TS is None else batch.gate_TS.view(-1)
            loss = gemm_decode.decode_loss(z_NF, weights.W_dec_MD, start_E1, F, batch.order_N, gate_R, *target, s.dot)
        else:
            assert batch.gate_TS is not None
            y_ND = gemm_decode.decode_rows(z_NF, weights.W_dec_MD, start_E1, F, batch.target_TD.shape[1], s.dot)
            loss = gemm_decode.combine_slots(y_ND, batch.row_R, s.slots, batch.gate_TS, *target, s.operand_dtype)
        self._decoded(batch, weights, s, z_NF, loss, loss.square_parts)

    def _decoded(self, batch: Selected, weights: Weights, s: Settings, z_NF: Tensor, loss: gemm_decode.RowLoss, error_parts: Tensor) -> None:
        """What follows from the latents of rows in expert order and the gradients of their reconstructions."""
        self.batch, self.s, self.z_NF, self.loss = batch, s, z_NF, loss
        self.error_parts, self.column_parts = error_parts, loss.column_sums
        F = batch.latents_per_expert
        self.dz_NF, gate_parts_NP = gemm.latent_gradients(loss.grad_rows_ND, weights.W_dec_MD, z_NF, batch.start_E1, F, s.dot)
        self.grad_gate = None if batch.gate_TS is None else GateParts(gate_parts_NP, batch.row_R)  # the rows carry the gate

    def residual(self) -> Tensor:
        """target - recon, scaled, float32 [T, D], from the gradient rows of each token's first slot."""
        batch, (tokens, D) = self.batch, self.batch.target_TD.shape
        return gemm_decode.residual_rows(self.loss.grad_rows_ND, batch.row_R, batch.gate_TS, self.s.slots, tokens, D, batch.grad_scale)

    def weight_gradients(self, extra_enc: Extra | None, extra_dec: Extra | None) -> _WeightGradients:
        batch, s = self.batch, self.s
        F, D = batch.latents_per_expert, batch.x_TD.shape[1]
        D_out = batch.target_TD.shape[1]
        dec = gemm_weights.weight_gradient(self.z_NF, self.loss.grad_rows_ND, batch.start_E1, F, D_out, s.dot, s.operand_dtype, extra_dec)
        enc = gemm_weights.weight_gradient(self.dz_NF, batch.rows_ND, batch.start_E1, F, D, s.dot, s.operand_dtype, extra_enc, column_sums=True)
        assert enc.column_sums_M is not None
        return _WeightGradients(enc.grad_MD, dec.grad_MD, None, enc.column_sums_M, (enc.square_parts, dec.square_parts))


class Sparse:
    """Decoding by gathering K rows per token, weight gradients latent by latent."""

    def __init__(self, batch: Selected, weights: Weights, s: Settings) -> None:
        loss = sparse.decode_loss(
            batch.values_TK, batch.indices_TK, batch.slot_TK, batch.gate_TS, weights.W_dec_MD, batch.target_TD.shape[1], weights.b_out_D,
            batch.target_TD, batch.target_scale, batch.grad_scale, batch.order_N if s.slots == 1 else None,
        )  # fmt: skip
        self._decoded(batch, s, loss)

    def _decoded(self, batch: Selected, s: Settings, loss: sparse.TokenLoss) -> None:
        """What follows from the gradients of the T tokens' reconstructions."""
        self.batch, self.s, self.loss = batch, s, loss
        self.error_parts, self.grad_gate = loss.loss_T, loss.grad_gate_TS
        self.column_parts = row_sum_parts(loss.grad_TD, batch.target_TD.shape[1])

    def residual(self) -> Tensor:
        """As `Dense.residual`."""
        tokens, D = self.batch.target_TD.shape
        return gemm_decode.residual_rows(self.loss.grad_TD, None, None, 1, tokens, D, self.batch.grad_scale)

    def weight_gradients(self, extra_enc: Extra | None, extra_dec: Extra | None) -> _WeightGradients:
        batch, s = self.batch, self.s
        recomputed = s.plan.gradients is GradientMode.recomputed
        slot_TK = batch.slot_TK if s.slots > 1 else None
        assert self.loss.grad_pre_TK is not None
        decoder = pairs.Terms(self.loss.weights_TK, self.loss.grad_TD, batch.target_TD.shape[1], extra=extra_dec)
        encoder = pairs.Terms(self.loss.grad_pre_TK, batch.rows_ND, batch.x_TD.shape[1], batch.row_R, slot_TK, s.slots, extra_enc)
        of_latents = pairs.pairs_by_latent(batch.indices_TK, s.num_experts * batch.latents_per_expert)
        grads = pairs.latent_gradients(of_latents, decoder, encoder, None if recomputed else s.operand_dtype)
        assert grads.bias_M is not None
        return _WeightGradients(grads.encoder_MD, grads.decoder_MD, grads if recomputed else None, grads.bias_M, (grads.square_parts,))

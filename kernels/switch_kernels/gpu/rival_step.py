"""One training step up to its gradients of Switch SAEs whose router learns by competition, or that select under one threshold for a whole batch.

As `step` otherwise. In a competition gates are 1 and a rival expert computes some tokens as well, which takes part in nothing but costs. Under a
threshold each token takes as many latents as reach it: masked latents and grouped products know no number of them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from switch_kernels.gpu import gemm, gemm_decode, sparse
from switch_kernels.gpu.auxk import DeadLatents
from switch_kernels.gpu.batch_mask import batch_threshold, keep_reaching, row_losses
from switch_kernels.gpu.encode import select_encoded
from switch_kernels.gpu.gemm_tiles import padded
from switch_kernels.gpu.pursuit_step import Batch, dispatch
from switch_kernels.gpu.rivals import compete
from switch_kernels.gpu.scatter import scatter_latents
from switch_kernels.gpu.step import Dense, Selected, Settings, Sparse, StepTensors, Weights, complete
from switch_kernels.plan import Regime


class _Masked(Dense):
    """The batch's own reconstruction from masked latents, and what all of them cost: `loss_R`."""

    def __init__(self, batch: Selected, weights: Weights, s: Settings, z_NF: Tensor, pairs: int) -> None:
        tokens, D = batch.target_TD.shape
        y_ND = gemm_decode.decode_rows(z_NF, weights.W_dec_MD, batch.start_E1, batch.latents_per_expert, D, s.dot)
        gate_T = None if batch.gate_TS is None else batch.gate_TS.view(-1)
        target = (batch.target_TD, batch.target_scale, weights.b_out_D, batch.grad_scale)
        loss = row_losses(y_ND, batch.order_N, pairs, gate_T, *target, s.operand_dtype)
        self.loss_R = loss.square_parts
        self._decoded(batch, weights, s, z_NF, loss, self.loss_R[:tokens])


class _Gathered(Sparse):
    """The same from K latents of each token, without gates."""

    def __init__(self, batch: Selected, weights: Weights, s: Settings, values_RK: Tensor, indices_RK: Tensor) -> None:
        tokens, D = batch.target_TD.shape
        target = (batch.target_TD, batch.target_scale, batch.grad_scale, batch.order_N)
        loss = sparse.decode_loss(values_RK, indices_RK, None, None, weights.W_dec_MD, D, weights.b_out_D, *target)
        assert loss.grad_pre_TK is not None
        self.loss_R = loss.loss_T
        own = (loss.grad_TD[:tokens], loss.weights_TK[:tokens], loss.grad_pre_TK[:tokens], None, loss.loss_T[:tokens])
        self._decoded(batch, s, sparse.TokenLoss(*own))


def rival_step(
    x_TD: Tensor, scale: Tensor, weights: Weights, settings: Settings, rivals: float | None, bound: Tensor | None, seed: Tensor,
    dead: DeadLatents | None = None,
) -> StepTensors:  # fmt: skip
    """Losses and gradients of one batch of raw activations x_TD (float32 or bfloat16, contiguous), one expert per token.

    Each token takes its k largest pre-activations, its rival, too; or, with a `bound` (float32 []), the T * k largest scores of the batch above 0 are
    taken and all that equal the smallest of them, of rivals what exceeds the bound. A score is the pre-activation, or gate times that where `rivals`
    is None, and there is no competition; else it is the share of the tokens that has rivals, drawn by `seed` (int32 [1], another each step). `dead`
    switches AuxK on.
    """
    s = settings
    assert weights.W_router_ED is not None and weights.b_router_D is not None
    batch = dispatch(x_TD, scale, weights.W_router_ED, weights.b_router_D, rivals or 0.0, s.dot, seed)
    decoded: _Masked | _Gathered
    if bound is None:
        decoded = _of_each_token(batch, weights, s)
    else:
        decoded = _of_the_batch(batch, weights, s, None if rivals is not None else batch.routed.gate_TS, bound)
    competition = None
    if batch.rival_n is not None:
        competition = compete(batch.routed, batch.rival_n, decoded.loss_R, None, None)
    return complete(decoded.batch, decoded, batch.routed, scale, weights, s, dead, competition)


def _of_each_token(batch: Batch, weights: Weights, s: Settings) -> _Masked | _Gathered:
    order, tokens, F = batch.in_order, batch.tokens, weights.W_enc_MD.shape[0] // s.num_experts
    rows_ND, expert_R1 = batch.rows(weights.b_in_D, s.operand_dtype), batch.expert_R[:, None]
    values_RK, indices_RK = select_encoded(rows_ND, order, expert_R1, weights.W_enc_MD, weights.b_enc_M, s.k, s.dot)
    selected = _selected(batch, rows_ND, F, None, values_RK[:tokens], indices_RK[:tokens])
    if s.plan.regime is Regime.sparse:
        return _Gathered(selected, weights, s, values_RK, indices_RK)
    z_NF = scatter_latents(values_RK, indices_RK, None, expert_R1, order.row_R, len(rows_ND), F, padded(F))
    return _Masked(selected, weights, s, z_NF, len(expert_R1))


def _of_the_batch(batch: Batch, weights: Weights, s: Settings, gate_TS: Tensor | None, bound: Tensor) -> _Masked:
    order, tokens, M = batch.in_order, batch.tokens, weights.W_enc_MD.shape[0]
    F, gate_T = M // s.num_experts, None if gate_TS is None else gate_TS.view(-1)
    rows_ND = batch.rows(weights.b_in_D, s.operand_dtype)
    # float32, of which few are equal: a threshold takes all that equal it
    pre_NF, _ = gemm.encode(rows_ND, weights.W_enc_MD, weights.b_enc_M, order.start_E1, F, 1, s.dot, dtype=torch.float32)
    theta = batch_threshold(pre_NF, F, order.order_N, gate_T, tokens, tokens * s.k, bound)
    z_NF, fired_M1 = keep_reaching(pre_NF, F, order.order_N, batch.expert_R, gate_T, theta, bound, tokens, M, s.operand_dtype)
    numbers_1M = torch.arange(M, dtype=torch.int32, device=rows_ND.device)[None]
    selected = _selected(batch, rows_ND, F, gate_TS, fired_M1[None, :M], numbers_1M)
    return _Masked(replace(selected, active=fired_M1[M:], theta=theta), weights, s, z_NF, len(batch.expert_R))


def _selected(batch: Batch, rows_ND: Tensor, F: int, gate_TS: Tensor | None, values_TK: Tensor, indices_TK: Tensor) -> Selected:
    order, x_TD = batch.in_order, batch.x_TD
    of_order = (order.order_N, order.row_R[: batch.tokens], order.start_E1, batch.counts_E)
    return Selected(x_TD, x_TD, batch.scale, gate_TS, batch.routed.expert_TS, *of_order, rows_ND, values_TK, indices_TK, None, F)

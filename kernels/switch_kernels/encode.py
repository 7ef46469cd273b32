"""Encode and select: pre-activations of the routed experts only, then the K largest."""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels.backend import PYTORCH, Dot, Execution
from switch_kernels.dispatch import Dispatch
from switch_kernels.latent_order import LatentOrder
from switch_kernels.operator import operator


class Selection(NamedTuple):
    """The K selected latents of each token."""

    values_TK: Tensor
    """gate * relu(pre-activation), >= 0, differentiable."""
    indices_TK: Tensor
    """Global latent indices, int64: expert * F + position inside the expert."""
    by_latent: LatentOrder | None
    """The same pairs in latent order, shared by both weight gradients; None where no gradient will be asked for."""


def encode_topk(
    x_TD: Tensor,
    b_pre_D: Tensor,
    gate_TS: Tensor | None,
    W_enc_MD: Tensor,
    b_enc_M: Tensor | None,
    dispatch: Dispatch,
    k: int,
    joint: bool = True,
    execution: Execution = PYTORCH,
) -> Selection:
    """values = gate * top_k(relu((x - b_pre) W_enc[rows of its experts]^T + b_enc)), computing those experts' F rows each and no others.

    Equivalent to computing all M pre-activations, masking those of other experts and selecting (`encode_topk_reference`), at S/E of its cost.
    `joint` selects the k largest gated values among all S experts of a token, otherwise k / S of each. With `gate_TS` None the gate is 1.
    Needs W_enc to hold E * F rows, expert e owning rows e*F to (e+1)*F - 1, and k <= F. The backward pass touches only selected rows.
    Gradients reach x, b_pre, gate, W_enc and b_enc.
    """
    order = torch.is_grad_enabled()  # inside an operator it is always off
    engine = execution.dot if execution.is_triton else "torch"
    values_TK, indices_TK, _, _, _, *by_latent = _encode_topk(
        x_TD, b_pre_D, gate_TS, W_enc_MD, b_enc_M, dispatch.expert_TS, dispatch.order_N, dispatch.start_E1, k, joint, order, engine
    )
    return Selection(values_TK, indices_TK, LatentOrder(*by_latent) if order else None)


@operator
def _encode_topk(
    x_TD: Tensor,
    b_pre_D: Tensor,
    gate_TS: Tensor | None,
    W_enc_MD: Tensor,
    b_enc_M: Tensor | None,
    expert_TS: Tensor,
    order_N: Tensor,
    start_E1: Tensor,
    k: int,
    joint: bool,
    order: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(values, indices, values before the gate, slot of each, x - b_pre, and the fields of a `LatentOrder`, empty unless `order`)."""
    dispatch = Dispatch(expert_TS, start_E1.shape[0] - 1, [order_N, start_E1])
    centred_TD = x_TD - b_pre_D
    if engine == "torch":
        active_RK, indices_RK = _select_rows(centred_TD, W_enc_MD, b_enc_M, dispatch, k if joint else k // dispatch.slots)
    else:
        from switch_kernels.gpu.inference import select_rows

        active_RK, indices_RK = select_rows(centred_TD, W_enc_MD, b_enc_M, dispatch, k if joint else k // dispatch.slots, cast(Dot, engine))
    active_TK, indices_TK, slot_TK = _merge_slots(active_RK, indices_RK, gate_TS, dispatch.slots, k, joint)
    values_TK = active_TK.clone() if gate_TS is None else active_TK * _per_latent(gate_TS, slot_TK)
    by_latent = LatentOrder.from_indices(indices_TK, W_enc_MD.shape[0]) if order else LatentOrder(*(indices_TK.new_empty(0) for _ in range(3)))
    return values_TK, indices_TK, active_TK, slot_TK, centred_TD, by_latent.pair_P, by_latent.token_P, by_latent.start_M


def _select_rows(centred_TD: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor | None, dispatch: Dispatch, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each (token, slot) pair, after ReLU, and their global indices."""
    latents_per_expert = W_enc_MD.shape[0] // dispatch.num_experts
    x_ND = dispatch.gather(centred_TD)
    pre_NF = x_ND.new_empty(x_ND.shape[0], latents_per_expert)
    for e in range(dispatch.num_experts):
        rows = slice(dispatch.offsets[e], dispatch.offsets[e + 1])
        latents = slice(e * latents_per_expert, (e + 1) * latents_per_expert)
        if b_enc_M is None:
            torch.mm(x_ND[rows], W_enc_MD[latents].T, out=pre_NF[rows])
        else:
            torch.addmm(b_enc_M[latents], x_ND[rows], W_enc_MD[latents].T, out=pre_NF[rows])
    pre_NK, local_NK = pre_NF.topk(k, dim=1, sorted=False)
    indices_RK = dispatch.scatter(local_NK) + (dispatch.expert_TS * latents_per_expert).view(-1, 1)
    return dispatch.scatter(pre_NK).clamp_(min=0), indices_RK


def _merge_slots(active_RK: Tensor, indices_RK: Tensor, gate_TS: Tensor | None, slots: int, k: int, joint: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(values before the gate, global indices, slots) of each token's k latents. The slots are empty with one expert per token."""
    if slots == 1:
        return active_RK, indices_RK, indices_RK.new_empty(0)
    active_TC, indices_TC = active_RK.view(-1, slots * active_RK.shape[1]), indices_RK.view(-1, slots * indices_RK.shape[1])
    slot_TC = (torch.arange(active_TC.shape[1], device=indices_RK.device) // active_RK.shape[1]).expand_as(indices_TC)
    if not joint:
        return active_TC, indices_TC, slot_TC.contiguous()
    gated_TC = active_TC if gate_TS is None else active_TC * gate_TS.gather(1, slot_TC)
    chosen_TK = gated_TC.topk(k, dim=1, sorted=False).indices
    return active_TC.gather(1, chosen_TK), indices_TC.gather(1, chosen_TK), slot_TC.gather(1, chosen_TK)


def _per_latent(gate_TS: Tensor, slot_TK: Tensor) -> Tensor:
    """The gate of each selected latent, broadcastable to [T, K]."""
    return gate_TS.gather(1, slot_TK) if slot_TK.ndim == 2 else gate_TS


@torch.library.register_fake("switch_kernels::encode_topk")
def _(x_TD, b_pre_D, gate_TS, W_enc_MD, b_enc_M, expert_TS, order_N, start_E1, k, joint, order, engine):
    tokens, slots = expert_TS.shape
    values_TK = x_TD.new_empty(tokens, k)
    indices_TK = expert_TS.new_empty(tokens, k, dtype=torch.int64)
    slot_TK = torch.empty_like(indices_TK) if slots > 1 else indices_TK.new_empty(0)
    pairs = tokens * k if order else 0
    by_latent = (indices_TK.new_empty(pairs), indices_TK.new_empty(pairs), indices_TK.new_empty(W_enc_MD.shape[0] if order else 0))
    return values_TK, indices_TK, torch.empty_like(values_TK), slot_TK, x_TD.new_empty(x_TD.shape), *by_latent


@operator
def _encode_topk_backward(
    grad_values_TK: Tensor,
    gate_TS: Tensor | None,
    W_enc_MD: Tensor,
    active_TK: Tensor,
    indices_TK: Tensor,
    slot_TK: Tensor,
    centred_TD: Tensor,
    pair_P: Tensor,
    token_P: Tensor,
    start_M: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, b_pre, gate, W_enc and b_enc; empty tensors for those that `needs` leaves out."""
    needs_x, needs_b_pre, needs_gate, needs_W_enc, needs_b_enc = needs
    scaled_TK = grad_values_TK if gate_TS is None else grad_values_TK * _per_latent(gate_TS, slot_TK)
    grad_pre_TK = torch.where(active_TK > 0, scaled_TK, 0.0)
    grads = [W_enc_MD.new_empty(0) for _ in needs]
    if needs_x:
        grads[0] = F.embedding_bag(indices_TK, W_enc_MD, mode="sum", per_sample_weights=grad_pre_TK)
    by_latent = LatentOrder(pair_P, token_P, start_M)
    if needs_b_enc or needs_b_pre:
        column_sums_M = by_latent.weight_sums(grad_pre_TK)
        if needs_b_pre:
            grads[1] = -(column_sums_M @ W_enc_MD)
        if needs_b_enc:
            grads[4] = column_sums_M
    if needs_gate:
        grad_gate_TK = grad_values_TK * active_TK
        assert gate_TS is not None
        grads[2] = _sums_by_slot(grad_gate_TK, slot_TK, gate_TS.shape[1]) if slot_TK.ndim == 2 else grad_gate_TK.sum(1, keepdim=True)
    if needs_W_enc:
        grads[3] = by_latent.weighted_row_sums(centred_TD, grad_pre_TK)
    return grads


def _sums_by_slot(grad_TK: Tensor, slot_TK: Tensor, slots: int) -> Tensor:
    """[T, S]: each token's sums over the latents of each slot."""
    if grad_TK.device.type == "cpu":
        return grad_TK.new_zeros(len(grad_TK), slots).scatter_add_(1, slot_TK, grad_TK)
    return _masked_sums(grad_TK, slot_TK, slots)  # the same every time: scatter_add_ adds in any order there


def _masked_sums(grad_TK: Tensor, slot_TK: Tensor, slots: int) -> Tensor:
    return torch.stack([torch.where(slot_TK == slot, grad_TK, 0.0).sum(dim=1) for slot in range(slots)], dim=1)


@torch.library.register_fake("switch_kernels::encode_topk_backward")
def _(grad_values_TK, gate_TS, W_enc_MD, active_TK, indices_TK, slot_TK, centred_TD, pair_P, token_P, start_M, needs):
    shapes = (centred_TD.shape, centred_TD.shape[1:], None if gate_TS is None else gate_TS.shape, W_enc_MD.shape, W_enc_MD.shape[:1])
    return [W_enc_MD.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, gate_TS, W_enc_MD, *_ = inputs
    _, indices_TK, *others = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices_TK, *others)
    ctx.save_for_backward(gate_TS, W_enc_MD, others[0], indices_TK, *others[1:])


def _backward(ctx: Any, grad_values_TK: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_values_TK is None:
        return (None,) * len(ctx.needs_input_grad)
    needs = list(ctx.needs_input_grad[:5])
    grads = _encode_topk_backward(grad_values_TK, *ctx.saved_tensors, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * (len(ctx.needs_input_grad) - 5)


torch.library.register_autograd("switch_kernels::encode_topk", _backward, setup_context=_keep_for_backward)


def encode_topk_reference(
    x_TD: Tensor,
    b_pre_D: Tensor,
    gate_TS: Tensor | None,
    W_enc_MD: Tensor,
    b_enc_M: Tensor | None,
    dispatch: Dispatch,
    k: int,
    joint: bool = True,
    execution: Execution = PYTORCH,
) -> Selection:
    """The same function as published: every expert is computed, then all but the routed ones are masked (Mudide et al., 2410.08201, eq. 4-6)."""
    pre_TM = F.linear(x_TD - b_pre_D, W_enc_MD, b_enc_M)
    latents_per_expert = W_enc_MD.shape[0] // dispatch.num_experts
    routed_TSE = F.one_hot(dispatch.expert_TS, dispatch.num_experts).to(pre_TM.dtype)
    if gate_TS is not None:
        routed_TSE = routed_TSE * gate_TS[..., None]

    def masked(routed_TE: Tensor) -> Tensor:
        return pre_TM.relu() * routed_TE.repeat_interleave(latents_per_expert, dim=1)

    if joint:
        values_TK, indices_TK = masked(routed_TSE.sum(1)).topk(k, dim=1, sorted=False)
    else:
        chosen = [masked(routed_TE).topk(k // dispatch.slots, dim=1, sorted=False) for routed_TE in routed_TSE.unbind(1)]
        values_TK, indices_TK = (torch.cat(parts, dim=1) for parts in zip(*chosen, strict=True))
    return Selection(values_TK, indices_TK, None)

"""Encode and select: pre-activations of the routed expert only, then the K largest."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from switch_kernels.dispatch import Dispatch
from switch_kernels.latent_order import LatentOrder


class Selection(NamedTuple):
    """The K selected latents of each token."""

    values_TK: Tensor
    """gate * relu(pre-activation), >= 0, differentiable."""
    indices_TK: Tensor
    """Global latent indices, int64: expert * F + position inside the expert."""
    by_latent: LatentOrder | None
    """The same pairs in latent order, shared by both weight gradients; None where no gradient will be asked for."""


def encode_topk(
    x_TD: Tensor, b_pre_D: Tensor, gate_T: Tensor | None, W_enc_MD: Tensor, b_enc_M: Tensor | None, dispatch: Dispatch, k: int
) -> Selection:
    """values = gate * top_k(relu((x - b_pre) W_enc[rows of its expert]^T + b_enc)), computing that expert's F rows and no others.

    Equivalent to computing all M pre-activations, masking those of other experts and selecting (`encode_topk_reference`), at 1/E of its cost.
    With `gate_T` None the gate is 1. Needs W_enc to hold E * F rows, expert e owning rows e*F to (e+1)*F - 1, and k <= F.
    The backward pass touches only selected rows. Gradients reach x, b_pre, gate, W_enc and b_enc.
    """
    order = torch.is_grad_enabled()  # inside a Function's forward it is always off
    values_TK, indices_TK, pair_P, token_P, start_M = _EncodeTopK.apply(x_TD, b_pre_D, gate_T, W_enc_MD, b_enc_M, dispatch, k, order)
    return Selection(values_TK, indices_TK, LatentOrder(pair_P, token_P, start_M) if pair_P is not None else None)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        b_pre_D: Tensor,
        gate_T: Tensor | None,
        W_enc_MD: Tensor,
        b_enc_M: Tensor | None,
        dispatch: Dispatch,
        k: int,
        order: bool,
    ) -> tuple[Tensor | None, ...]:
        num_latents = W_enc_MD.shape[0]
        latents_per_expert = num_latents // dispatch.num_experts
        centred_TD = x_TD - b_pre_D
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
        active_TK = dispatch.scatter(pre_NK).clamp_(min=0)
        indices_TK = dispatch.scatter(local_NK) + (dispatch.expert_T * latents_per_expert)[:, None]
        values_TK = active_TK.clone() if gate_T is None else active_TK * gate_T[:, None]
        if not (order and any(ctx.needs_input_grad)):
            return values_TK, indices_TK, None, None, None
        by_latent = LatentOrder.from_indices(indices_TK, num_latents)
        ctx.save_for_backward(centred_TD, gate_T, W_enc_MD, active_TK, indices_TK, by_latent.pair_P, by_latent.token_P, by_latent.start_M)
        ctx.has_bias = b_enc_M is not None
        ctx.mark_non_differentiable(indices_TK, by_latent.pair_P, by_latent.token_P, by_latent.start_M)
        return values_TK, indices_TK, by_latent.pair_P, by_latent.token_P, by_latent.start_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values_TK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred_TD, gate_T, W_enc_MD, active_TK, indices_TK, pair_P, token_P, start_M = ctx.saved_tensors
        needs_x, needs_b_pre, needs_gate, needs_W_enc, needs_b_enc, *_ = ctx.needs_input_grad
        scaled_TK = grad_values_TK if gate_T is None else grad_values_TK * gate_T[:, None]
        grad_pre_TK = torch.where(active_TK > 0, scaled_TK, 0.0)
        grad_x_TD = grad_b_pre_D = grad_gate_T = grad_W_enc_MD = grad_b_enc_M = None
        if needs_gate:
            grad_gate_T = (grad_values_TK * active_TK).sum(1)
        if needs_W_enc:
            grad_W_enc_MD = LatentOrder(pair_P, token_P, start_M).weighted_row_sums(centred_TD, grad_pre_TK)
        if (needs_b_enc and ctx.has_bias) or needs_b_pre:
            column_sums_M = torch.zeros(W_enc_MD.shape[0], dtype=grad_pre_TK.dtype, device=grad_pre_TK.device)
            column_sums_M.index_add_(0, indices_TK.flatten(), grad_pre_TK.flatten())
            grad_b_enc_M = column_sums_M if needs_b_enc and ctx.has_bias else None
            grad_b_pre_D = -(column_sums_M @ W_enc_MD) if needs_b_pre else None
        if needs_x:
            grad_x_TD = F.embedding_bag(indices_TK, W_enc_MD, mode="sum", per_sample_weights=grad_pre_TK)
        return grad_x_TD, grad_b_pre_D, grad_gate_T, grad_W_enc_MD, grad_b_enc_M, None, None, None


def encode_topk_reference(
    x_TD: Tensor, b_pre_D: Tensor, gate_T: Tensor | None, W_enc_MD: Tensor, b_enc_M: Tensor | None, dispatch: Dispatch, k: int
) -> Selection:
    """The same function as published: every expert is computed, then all but the routed one are masked (Mudide et al., 2410.08201, eq. 4-6)."""
    num_experts = dispatch.num_experts
    pre_TM = F.linear(x_TD - b_pre_D, W_enc_MD, b_enc_M)
    routed_TE = F.one_hot(dispatch.expert_T, num_experts).to(pre_TM.dtype)
    if gate_T is not None:
        routed_TE = routed_TE * gate_T[:, None]
    mask_TM = routed_TE.repeat_interleave(W_enc_MD.shape[0] // num_experts, dim=1)
    values_TK, indices_TK = (pre_TM.relu() * mask_TM).topk(k, dim=1, sorted=False)
    return Selection(values_TK, indices_TK, None)

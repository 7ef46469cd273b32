"""Encoding by the latents that a token may use: those that all tokens share, then those of its experts. What is selected of them are pairs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels import Dispatch
from switch_sae.models.pairs import bag_sums, order_of, row_sums

Select = Callable[[Tensor], Tensor]
"""Flat positions of what is selected of the pre-activations [T, C], token by token."""


class Chosen(NamedTuple):
    """The P selected pairs of a token and a latent, token by token."""

    values_P: Tensor
    """ReLU of the pre-activations, without a gate."""
    token_P: Tensor
    latent_P: Tensor
    column_P: Tensor
    """Their places among the token's candidates."""


def encode_candidates(x_TD: Tensor, b_D: Tensor, W_MD: Tensor, b_M: Tensor | None, dispatch: Dispatch, shared: int, select: Select) -> Chosen:
    """ReLU((x - b) W^T + b_M) of the C = shared + S * F candidates of each token, at the positions that `select` gives of all pre-activations.

    Candidates: rows 0 .. shared - 1 of W, then the F rows of each of the S experts of the token, expert e owning those from shared + e * F on.
    Gradients reach x, both biases and W, of the latter only rows of selected pairs that are above 0.
    """
    values_P, position_P, latent_P = _EncodeCandidates.apply(x_TD, b_D, W_MD, b_M, dispatch, shared, select)
    width = shared + dispatch.slots * ((len(W_MD) - shared) // dispatch.num_experts)
    return Chosen(values_P, position_P // width, latent_P, position_P % width)


def candidate_indices(dispatch: Dispatch, shared: int, latents_per_expert: int) -> Tensor:
    """[T, C]: the latents that each token may use."""
    start_TS, device = dispatch.expert_TS * latents_per_expert + shared, dispatch.expert_TS.device
    own_TC = (start_TS[..., None] + torch.arange(latents_per_expert, device=device)).flatten(1)
    return torch.cat([torch.arange(shared, device=device).expand(len(own_TC), shared), own_TC], dim=1)


def gates_of(gate_TS: Tensor | None, shared: int, latents_per_expert: int) -> Tensor | None:
    """[T, C]: what multiplies each candidate, 1 for shared ones; None where nothing does."""
    if gate_TS is None:
        return None
    own_TC = gate_TS.repeat_interleave(latents_per_expert, dim=1)
    return torch.cat([own_TC.new_ones(len(own_TC), shared), own_TC], dim=1) if shared else own_TC


class _EncodeCandidates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, b_D: Tensor, W_MD: Tensor, b_M: Tensor | None, dispatch: Dispatch, shared: int, select: Select
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred_TD = x_TD - b_D
        size = (len(W_MD) - shared) // dispatch.num_experts
        pre_NF = x_TD.new_empty(dispatch.order_N.shape[0], size)
        centred_ND = dispatch.gather(centred_TD)
        for e in range(dispatch.num_experts):
            rows, own = slice(dispatch.offsets[e], dispatch.offsets[e + 1]), slice(shared + e * size, shared + (e + 1) * size)
            pre_NF[rows] = F.linear(centred_ND[rows], W_MD[own], None if b_M is None else b_M[own])
        pre_TC = dispatch.scatter(pre_NF).view(len(x_TD), dispatch.slots * size)
        if shared:
            pre_TC = torch.cat([F.linear(centred_TD, W_MD[:shared], None if b_M is None else b_M[:shared]), pre_TC], dim=1)
        position_P = select(pre_TC)
        token_P, column_P = position_P // pre_TC.shape[1], position_P % pre_TC.shape[1]
        own_P = (column_P - shared).clamp_min(0)
        expert_P = dispatch.expert_TS[token_P, own_P // size]
        latent_P = torch.where(column_P < shared, column_P, shared + expert_P * size + own_P % size)
        values_P = pre_TC.flatten()[position_P].relu()
        ctx.save_for_backward(centred_TD, W_MD, values_P, token_P, latent_P)
        ctx.mark_non_differentiable(position_P, latent_P)
        return values_P, position_P, latent_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred_TD, W_MD, values_P, token_P, latent_P = ctx.saved_tensors
        grad_P = torch.where(values_P > 0, grads[0], 0.0)
        by_latent = order_of(latent_P, len(W_MD))
        column_sums_M = by_latent.weight_sums(grad_P[:, None])
        grad_x_TD = bag_sums(grad_P, latent_P, token_P, len(centred_TD), W_MD) if ctx.needs_input_grad[0] else None
        grad_W_MD = row_sums(grad_P, token_P, centred_TD, by_latent)
        return grad_x_TD, -(column_sums_M @ W_MD), grad_W_MD, column_sums_M if ctx.needs_input_grad[3] else None, None, None, None

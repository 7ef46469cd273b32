"""Decode K active latents per token by gathering K rows of the decoder."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from switch_kernels.latent_order import LatentOrder


def sparse_decode(values_TK: Tensor, indices_TK: Tensor, W_dec_MD: Tensor, by_latent: LatentOrder | None = None) -> Tensor:
    """out[t] = sum_s values[t, s] * W_dec[indices[t, s]], reading K rows per token; equivalent to `dense @ W_dec` (`sparse_decode_reference`).

    Gradients reach values and W_dec; the latter touches only selected rows. `by_latent`, if the encoder already made it, saves a sort.
    """
    order = (by_latent.pair_P, by_latent.token_P, by_latent.start_M) if by_latent is not None else (None, None, None)
    return _SparseDecode.apply(values_TK, indices_TK, W_dec_MD, *order)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_TK: Tensor, indices_TK: Tensor, W_dec_MD: Tensor, *order: Tensor | None) -> Tensor:
        ctx.save_for_backward(values_TK, indices_TK, W_dec_MD, *order)
        return F.embedding_bag(indices_TK, W_dec_MD, mode="sum", per_sample_weights=values_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        values_TK, indices_TK, W_dec_MD, pair_P, token_P, start_M = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        grad_values_TK = grad_W_dec_MD = None
        if ctx.needs_input_grad[0]:
            # embedding_bag's own gradient for its weights is a gather of K rows and K dot products; a second forward (1 ms) buys it publicly
            with torch.enable_grad():
                weights_TK = values_TK.detach().requires_grad_()
                out_TD = F.embedding_bag(indices_TK, W_dec_MD.detach(), mode="sum", per_sample_weights=weights_TK)
            (grad_values_TK,) = torch.autograd.grad(out_TD, weights_TK, grad_TD)
        if ctx.needs_input_grad[2]:
            by_latent = LatentOrder(pair_P, token_P, start_M) if pair_P is not None else LatentOrder.from_indices(indices_TK, W_dec_MD.shape[0])
            grad_W_dec_MD = by_latent.weighted_row_sums(grad_TD, values_TK)
        return grad_values_TK, None, grad_W_dec_MD, None, None, None


def sparse_decode_reference(values_TK: Tensor, indices_TK: Tensor, W_dec_MD: Tensor, by_latent: LatentOrder | None = None) -> Tensor:
    """The same function through the dense [T, M] latents and one matrix product."""
    dense_TM = values_TK.new_zeros(values_TK.shape[0], W_dec_MD.shape[0]).scatter_add(1, indices_TK, values_TK)
    return dense_TM @ W_dec_MD

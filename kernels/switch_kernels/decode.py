"""Decode K active latents per token by gathering K rows of the decoder."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels.backend import PYTORCH, Dot, Execution
from switch_kernels.latent_order import LatentOrder
from switch_kernels.operator import operator


def sparse_decode(
    values_TK: Tensor, indices_TK: Tensor, W_dec_MD: Tensor, by_latent: LatentOrder | None = None, execution: Execution = PYTORCH
) -> Tensor:
    """out[t] = sum_s values[t, s] * W_dec[indices[t, s]], reading K rows per token; equivalent to `dense @ W_dec` (`sparse_decode_reference`).

    Gradients reach values and W_dec; the latter touches only selected rows. `by_latent`, if the encoder already made it, saves a sort.
    """
    order = (by_latent.pair_P, by_latent.token_P, by_latent.start_M) if by_latent is not None else (None, None, None)
    return _sparse_decode(values_TK, indices_TK, W_dec_MD, *order, execution.dot if execution.is_triton else "torch")


@operator
def _sparse_decode(
    values_TK: Tensor, indices_TK: Tensor, W_dec_MD: Tensor, pair_P: Tensor | None, token_P: Tensor | None, start_M: Tensor | None, engine: str
) -> Tensor:
    if engine == "torch":
        return F.embedding_bag(indices_TK, W_dec_MD, mode="sum", per_sample_weights=values_TK)
    from switch_kernels.gpu.inference import decode

    return decode(values_TK, indices_TK, W_dec_MD, cast(Dot, engine))


@torch.library.register_fake("switch_kernels::sparse_decode")
def _(values_TK, indices_TK, W_dec_MD, pair_P, token_P, start_M, engine):
    return W_dec_MD.new_empty(values_TK.shape[0], W_dec_MD.shape[1])


@operator
def _sparse_decode_backward(
    grad_TD: Tensor,
    values_TK: Tensor,
    indices_TK: Tensor,
    W_dec_MD: Tensor,
    pair_P: Tensor | None,
    token_P: Tensor | None,
    start_M: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of values and W_dec; empty tensors for those that `needs` leaves out."""
    grad_TD = grad_TD.contiguous()
    needs_values, needs_W_dec = needs
    grads = [W_dec_MD.new_empty(0) for _ in needs]
    if needs_values:
        grads[0] = row_products(grad_TD, indices_TK, W_dec_MD)
    if needs_W_dec:
        if pair_P is not None and token_P is not None and start_M is not None:
            by_latent = LatentOrder(pair_P, token_P, start_M)
        else:
            by_latent = LatentOrder.from_indices(indices_TK, W_dec_MD.shape[0])
        grads[1] = by_latent.weighted_row_sums(grad_TD, values_TK)
    return grads


def row_products(x_TD: Tensor, indices_TK: Tensor, W_MD: Tensor) -> Tensor:
    """[T, K]: x[t] . W[indices[t, s]], and no other products; no [T, K, D] between. x must be contiguous."""
    tokens, k = indices_TK.shape
    token_P = torch.arange(tokens, device=indices_TK.device).repeat_interleave(k)
    starts_T = torch.arange(0, tokens * k, k, device=indices_TK.device)
    return pair_products(x_TD, indices_TK.flatten(), token_P, starts_T, W_MD).view(tokens, k)


def pair_products(x_TD: Tensor, latent_P: Tensor, token_P: Tensor, start_T: Tensor, W_MD: Tensor) -> Tensor:
    """[P]: x[token] . W[latent] of each pair, token by token; `start_T` says where each token's pairs start. x must be contiguous."""
    # The gradient of `embedding_bag` with respect to its weights is just that; autograd through a second forward takes 1.5 times as long.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x_TD, W_MD.contiguous(), latent_P, start_T, token_P, 0, -1)


@torch.library.register_fake("switch_kernels::sparse_decode_backward")
def _(grad_TD, values_TK, indices_TK, W_dec_MD, pair_P, token_P, start_M, needs):
    return [W_dec_MD.new_empty(shape if needed else (0,)) for shape, needed in zip((values_TK.shape, W_dec_MD.shape), needs, strict=True)]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    grad_values_TK, grad_W_dec_MD = _sparse_decode_backward(grad_TD, *ctx.saved_tensors, needs)
    return grad_values_TK if needs[0] else None, None, grad_W_dec_MD if needs[1] else None, None, None, None, None


torch.library.register_autograd("switch_kernels::sparse_decode", _backward, setup_context=_keep_for_backward)


def sparse_decode_reference(
    values_TK: Tensor, indices_TK: Tensor, W_dec_MD: Tensor, by_latent: LatentOrder | None = None, execution: Execution = PYTORCH
) -> Tensor:
    """The same function through the dense [T, M] latents and one matrix product."""
    dense_TM = values_TK.new_zeros(values_TK.shape[0], W_dec_MD.shape[0]).scatter_add(1, indices_TK, values_TK)
    return dense_TM @ W_dec_MD

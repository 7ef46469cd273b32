"""Encoding a few candidates of each token exactly: what architectures share that look at all latents cheaply first, and then at those only.

Shapes: T tokens, D activation size, C candidates per token, K active latents per token, M latents; n tokens of a sample.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels import Group, LatentOrder


def known_products(
    values_TC: Tensor, x_TD: Tensor, b_D: Tensor | None, W_MD: Tensor, b_M: Tensor | None, index_TC: Tensor, order: LatentOrder
) -> Tensor:
    """[T, C]: (x[t] - b_D) . W[index[t, c]] + b_M[index[t, c]], which somebody has computed already, with gradients for x, b_D, W and b_M.

    The gradients touch no other rows; `order` is `LatentOrder.from_indices(index_TC, M)`.
    """
    return _KnownProducts.apply(values_TC, x_TD, b_D, W_MD, b_M, index_TC, order)


class _KnownProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_TC: Tensor, x_TD: Tensor, b_D: Tensor | None, W_MD: Tensor, b_M: Tensor | None, index_TC: Tensor, order: LatentOrder
    ) -> Tensor:
        ctx.save_for_backward(x_TD if b_D is None else x_TD - b_D, W_MD, index_TC)
        ctx.order = order
        return values_TC.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TC = grads[0].contiguous()
        centred_TD, W_MD, index_TC = ctx.saved_tensors
        needs_x, needs_b_D, needs_W, needs_b_M = ctx.needs_input_grad[1:5]
        sums_M = ctx.order.weight_sums(grad_TC) if needs_b_D or needs_b_M else None
        return (
            None,
            F.embedding_bag(index_TC, W_MD, mode="sum", per_sample_weights=grad_TC) if needs_x else None,
            -(sums_M @ W_MD) if needs_b_D else None,
            ctx.order.weighted_row_sums(centred_TD, grad_TC) if needs_W else None,
            sums_M if needs_b_M else None,
            None,
            None,
        )


class Sample(NamedTuple):
    """What a few tokens would use if all M latents were encoded exactly: the first n of a batch, whose order is random."""

    values_nK: Tensor
    """TopK(ReLU(pre-activations)) of all latents; no gradients."""
    indices_nK: Tensor

    def shares(self) -> Tensor:
        """[n, K]: each latent's part of its token's sum of squares; 0 where nothing fired."""
        return energy_shares(self.values_nK)


@torch.no_grad()
def sampled(centred_nD: Tensor, W_MD: Tensor, b_M: Tensor | None, k: int) -> Sample:
    """Encodes all M latents of x - b."""
    pre_nK, indices_nK = F.linear(centred_nD, W_MD, b_M).topk(k, dim=1, sorted=False)
    return Sample(pre_nK.clamp_(min=0), indices_nK)


def energy_shares(values_TK: Tensor) -> Tensor:
    """z^2 / sum z^2 of each row; zeros stay zeros."""
    energy_TK = values_TK.square()
    return energy_TK / energy_TK.sum(dim=1, keepdim=True).clamp_min(torch.finfo(energy_TK.dtype).tiny)


def tell_offered(tokens_since_M: Tensor, offered_M: Tensor, tokens: int, group: Group) -> None:
    """Counts, in place, the tokens of all processes since each latent was last a candidate of one."""
    group.any_(offered_M)
    tokens_since_M.add_(tokens * group.size).masked_fill_(offered_M, 0)

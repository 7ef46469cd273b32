"""Exact top-k in place, of rows of any length: what AuxK keeps of the pre-activations of dead latents; ties go to the lowest index."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import launch

KEEP_WIDTH = 1024
"""Columns that `keep_topk_` reads at once, of rows of any length: one kernel, whatever the number of dead latents."""


def keep_topk_(z_NF: Tensor, F: int, k: int, order_N: Tensor | None = None) -> None:
    """In place, in every row: relu, then all but the k largest of the first F columns to 0 (ties to the lowest), and the columns after F to 0.

    The k-th largest value is found by bisection on the bits, so the cost hardly depends on k. Given order_N, rows that it marks as padding are
    zeroed instead.
    """
    if not 1 <= k <= F:
        raise ValueError(f"k={k} must lie between 1 and the number of latents per expert, {F}.")
    bits = 15 if z_NF.dtype == torch.bfloat16 else 31
    order, padded = (z_NF, False) if order_N is None else (order_N, True)
    launch(_keep_topk, (z_NF.shape[0],), z_NF, order, F, z_NF.shape[1], k, PADDED=padded, BITS=bits, WIDTH=KEEP_WIDTH, num_warps=4)


@triton.jit
def _magnitudes(z, real, BITS: tl.constexpr):
    """Bits of relu(z) as int32, in the order of the values and BITS long; -1 where not real."""
    z = z.to(tl.float32)
    bits = tl.where(z < 0, 0.0, z).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(real, bits >> (31 - BITS), -1)


@triton.jit
def _from_magnitudes(key, BITS: tl.constexpr):
    return (key << (31 - BITS)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["F", "K"])
def _keep_topk(z_NF, order_N, F, FP, K, PADDED: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """One row, read once for every bit of the k-th largest value, WIDTH columns at a time; after the first time it lies in the L1 cache."""
    n = tl.program_id(0).to(tl.int64)
    row = z_NF + n * FP
    i = tl.arange(0, WIDTH)
    live = True
    if PADDED:
        live = tl.load(order_N + n) >= 0
    if live:
        # `count` >= K keys reach threshold, `above` < K keys reach threshold + 2 * bit; with count == K the answer is known early
        threshold = 0
        count = F
        above = 0
        bit = 1 << (BITS - 1)
        while (bit > 0) & (count != K):
            upper = threshold + bit
            reached = tl.zeros((WIDTH,), tl.int32)
            for first in range(0, F, WIDTH):
                key = _magnitudes(tl.load(row + first + i, mask=first + i < F, other=0.0), first + i < F, BITS)
                reached += (key >= upper).to(tl.int32)
            larger = tl.sum(reached, axis=0)
            enough = larger >= K
            threshold = tl.where(enough, upper, threshold)
            count = tl.where(enough, larger, count)
            above = tl.where(enough, above, larger)
            bit = bit >> 1
        room = tl.where(count == K, F, K - above)
        ties = 0
        for first in range(0, FP, WIDTH):
            column = first + i
            key = _magnitudes(tl.load(row + column, mask=column < F, other=0.0), column < F, BITS)
            tie = (key == threshold).to(tl.int32)
            rank = ties + tl.cumsum(tie, 0)
            keep = (key > threshold) | ((tie > 0) & (rank <= room))
            z = tl.where(keep, _from_magnitudes(key, BITS), 0.0)
            tl.store(row + column, z.to(z_NF.dtype.element_ty), mask=column < FP)
            ties += tl.sum(tie, axis=0)
    else:
        for first in range(0, FP, WIDTH):
            tl.store(row + first + i, tl.zeros((WIDTH,), z_NF.dtype.element_ty), mask=first + i < FP)

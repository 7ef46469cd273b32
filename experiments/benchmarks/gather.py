"""The kernel that measures how fast a GPU gathers rows which stay in its L2 cache: k random rows in, one row out. Needs triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = ((128, 1), (128, 2), (128, 4), (256, 2), (256, 4), (256, 8), (1024, 8))
"""(columns per pass, warps); which of them is fastest depends on the GPU, and the ceiling is the fastest."""


@triton.jit
def _gather_sum(table, index, out, D: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    bag = tl.program_id(0)
    row_K = tl.load(index + bag * K + tl.arange(0, K)).to(tl.int64)
    for start in tl.static_range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < D
        tile = tl.load(table + row_K[:, None] * D + column[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        tl.store(out + bag * D + column, tl.sum(tile, axis=0).to(out.dtype.element_ty), mask=inside)


def gather_sum(table_RD: Tensor, index_TK: Tensor, out_TD: Tensor, columns: int, warps: int) -> None:
    """out[t] = sum over k of table[index[t, k]], added up in float32; K must be a power of two."""
    T, K = index_TK.shape
    assert triton.next_power_of_2(K) == K and index_TK.dtype == torch.int32
    _gather_sum[(T,)](table_RD, index_TK, out_TD, D=table_RD.shape[1], K=K, COLUMNS=columns, num_warps=warps)

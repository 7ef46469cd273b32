"""Products of rows with the latents that each may use: those that all experts share, then those of its own expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.backend import Dot
from switch_kernels.gpu import gemm
from switch_kernels.gpu.gemm import find_rows
from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2


def candidate_products(rows_ND: Tensor, W_MD: Tensor, bias_M: Tensor | None, start_E1: Tensor, shared: int, dot: Dot) -> Tensor:
    """float32 [N, C]: the products of rows with those of W that each may use. Both are operands of the same width."""
    if shared:
        return local_products(rows_ND, W_MD, start_E1, shared, bias_M, dot)
    F = W_MD.shape[0] // (start_E1.shape[0] - 1)
    return gemm.encode(rows_ND, W_MD, bias_M, start_E1, F, 1, dot, dtype=torch.float32)[1]


@triton.jit(do_not_specialize=["N", "C", "E", "F", "shared"])
def _local_products(
    x_ND,
    W_MD,
    bias_M,
    start_E1,
    out_NC,
    N,
    C,
    F,
    shared,
    D,
    E,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    expert, row, stop = find_rows(tl.program_id(0), start_E1, N, E, EP, ROWS, 1)
    if (expert < E) & (row < stop):
        n_R1 = row + tl.arange(0, ROWS)[:, None].to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        latent = tl.where(column < shared, column, column + expert * F).to(tl.int64)
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, D, DEPTH):
            d_1D = first + tl.arange(0, DEPTH)[None, :]
            x = tl.load(x_ND + n_R1 * D + d_1D, mask=(n_R1 < stop) & (d_1D < D), other=0.0)
            w = tl.load(W_MD + latent[:, None] * D + d_1D, mask=(column < C)[:, None] & (d_1D < D), other=0.0)
            if LOW:
                x, w = x.to(tl.bfloat16), w.to(tl.bfloat16)
            products = tl.dot(x, tl.trans(w), products, input_precision="ieee")  # which bfloat16 operands ignore
        if HAS_BIAS:
            products += tl.load(bias_M + latent, mask=column < C, other=0.0)[None, :]
        tl.store(out_NC + n_R1 * C + column[None, :], products, mask=(n_R1 < stop) & (column < C)[None, :])


def local_products(x_ND: Tensor, W_MD: Tensor, start_E1: Tensor, shared: int, bias_M: Tensor | None, dot: Dot) -> Tensor:
    """float32 [N, C]: the products of rows in the order of experts with the rows of W that each may use: `shared` first ones, then its expert's."""
    experts = len(start_E1) - 1
    rows, columns, depth = (64, 32, 16) if dot == "ieee" else (64, 64, 32)  # products of float32 are made in registers, which would spill
    latents = (len(W_MD) - shared) // experts
    out_NC = torch.empty(len(x_ND), shared + latents, dtype=torch.float32, device=x_ND.device)
    if not out_NC.numel():
        return out_NC
    launch(
        _local_products,
        (cdiv(len(x_ND) + experts * (rows - 1), rows), cdiv(shared + latents, columns)),
        x_ND.contiguous(),
        W_MD.contiguous(),
        W_MD if bias_M is None else bias_M,
        start_E1,
        out_NC,
        len(x_ND),
        shared + latents,
        latents,
        shared,
        x_ND.shape[1],
        experts,
        EP=max(256, next_power_of_2(experts + 1)),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        LOW=dot == "bf16",
        HAS_BIAS=bias_M is not None,
    )
    return out_NC

"""Gradients of the experts' weight matrices by dense grouped products along the rows: left[e]^T @ right[e]."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.gemm import halves, tiles_of_rows
from switch_kernels.gpu.gemm_tiles import capability_of, check_operands, choose_tile, has_descriptors, source
from switch_kernels.gpu.launch import cdiv, launch


class WeightGradient(NamedTuple):
    """The gradient of one [M, D] matrix, and what clipping and the bias need of it."""

    grad_MD: Tensor
    """[M, D] in the dtype asked for; zero for experts without rows."""
    square_parts: Tensor
    """float32: its sum is the sum of squares of the gradient before it was rounded to that dtype."""
    column_sums_M: Tensor | None
    """float32 [M]: the sum of left over each expert's rows, if asked for; the bias gradient where left is dz."""


@triton.jit
def _finish_slice(
    grad,
    expert,
    first,
    column,
    square_part,
    slot_M,
    extra_AD,
    grad_MD,
    square_parts,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the extra rows to a gradient [BM, BN], at the expert's latents from `first` on and columns from `column` on;
    writes it and its sum of squares.
    """
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    row = expert * F + first
    inside = (first + i < F)[:, None] & (column + j < D)[None, :]
    if slot_M is not None:
        slot = tl.load(slot_M + row + i, mask=first + i < F, other=-1)
        extra = extra_AD + slot[:, None].to(tl.int64) * D + (column + j)[None, :]
        grad += tl.load(extra, mask=inside & (slot >= 0)[:, None], other=0.0)
    tl.store(square_parts + square_part, tl.sum(tl.sum(grad * grad, axis=1), axis=0))
    corner = grad_MD + row.to(tl.int64) * D + column
    tl.store(corner + i[:, None] * D + j[None, :], grad.to(grad_MD.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient_kernel(
    left_NF,
    right_ND,
    start_E1,
    slot_M,
    extra_AD,
    grad_MD,
    square_parts,
    column_sums_M,
    num_rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    F: tl.constexpr,
    FP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    left = tiles_of_rows(left_NF, num_rows, FP, BK, BM, DESCRIPTORS)
    right = tiles_of_rows(right_ND, num_rows, DP, BK, BN, DESCRIPTORS)
    F_TILES: tl.constexpr = (F + BM - 1) // BM
    D_TILES: tl.constexpr = (D + BN - 1) // BN
    # one tile more per strip of latents sums left's columns: the strip's other programs are reading the same tiles
    STRIP: tl.constexpr = D_TILES + 1 if column_sums_M is not None else D_TILES
    pid = tl.program_id(0)
    d_tile = pid % STRIP
    f_tile = (pid // STRIP) % F_TILES
    expert = pid // (STRIP * F_TILES)
    begin = tl.load(start_E1 + expert)
    stop = tl.load(start_E1 + expert + 1)
    if d_tile < D_TILES:
        acc = tl.zeros((BM, BN), tl.float32)
        for r in range(begin, stop, BK):
            acc = tl.dot(left.load([r, f_tile * BM]).T, right.load([r, d_tile * BN]), acc, input_precision="ieee")
        # one half after the other: a whole tile and the extra rows beside it would leave room for fewer programs on a multiprocessor
        parts = halves(acc, BM, BN)
        for h in tl.static_range(2):
            column = d_tile * BN + h * (BN // 2)
            square_part = ((expert * F_TILES + f_tile) * D_TILES + d_tile) * 2 + h
            _finish_slice(parts[h], expert, f_tile * BM, column, square_part, slot_M, extra_AD, grad_MD, square_parts, D, F, BM, BN // 2)
    elif column_sums_M is not None:
        total = tl.zeros((BK, BM), tl.float32)
        for r in range(begin, stop, BK):
            total += left.load([r, f_tile * BM]).to(tl.float32)
        j = f_tile * BM + tl.arange(0, BM)
        tl.store(column_sums_M + expert * F + j, tl.sum(total, axis=0), mask=j < F)


def weight_gradient(
    left_NF: Tensor,
    right_ND: Tensor,
    start_E1: Tensor,
    F: int,
    D: int,
    precision: str,
    out_dtype: torch.dtype,
    extra: Extra | None = None,
    column_sums: bool = False,
) -> WeightGradient:
    """left[e]^T @ right[e] for every expert e, plus the rows of `extra`: see `WeightGradient`.

    left_NF [N, Fp] and right_ND [N, Dp] have the operands' dtype and pad columns 0. On each expert's padding rows one of them must be 0 and the other
    finite (for the column sums: left must be 0); rows behind the last expert are not read.
    """
    check_operands(precision, left_NF=left_NF, right_ND=right_ND)
    num_rows, FP = left_NF.shape
    E = start_E1.shape[0] - 1
    capability = capability_of(left_NF)
    tile = choose_tile("weight_gradient", num_rows // E, F, D, precision, capability)
    f_tiles, d_tiles = cdiv(F, tile.BM), cdiv(D, tile.BN)
    grad_MD = torch.empty(E * F, D, dtype=out_dtype, device=left_NF.device)
    square_parts = torch.empty(E * f_tiles, d_tiles, 2, dtype=torch.float32, device=left_NF.device)
    column_sums_M = torch.empty(E * F, dtype=torch.float32, device=left_NF.device) if column_sums else None
    descriptors = has_descriptors(capability)
    launch(
        _weight_gradient_kernel,
        (E * f_tiles * (d_tiles + column_sums),),
        source(left_NF, [tile.BK, tile.BM], descriptors),
        source(right_ND, [tile.BK, tile.BN], descriptors),
        start_E1,
        extra.slot_M if extra else None,
        extra.rows_AD if extra else None,
        grad_MD,
        square_parts,
        column_sums_M,
        num_rows,
        D=D,
        DP=right_ND.shape[1],
        F=F,
        FP=FP,
        DESCRIPTORS=descriptors,
        **tile._asdict(),
    )
    return WeightGradient(grad_MD, square_parts, column_sums_M)

"""Gradients of the experts' weight matrices by dense grouped products along the rows: left[e]^T @ right[e]."""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.gemm import halves, tiles_of_rows
from switch_kernels.gpu.gemm_tiles import SIZES, capability_of, check_operands, choose_tile, has_descriptors, source, tile_width
from switch_kernels.gpu.launch import cdiv, launch

MULTIPROCESSORS = 132
"""Of an H100 or H200; a constant, so that every GPU adds in the same order."""
SUM_ROWS, SUM_COLUMNS = 16, 128
"""Of the tiles that chunks of rows are summed in."""


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
    grad, expert, first, column, square_part, scale, slot_M, extra_AD, grad_MD, square_parts, F, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Scales a gradient [BM, BN], at the expert's latents from `first` on and columns from `column` on, and adds the extra rows;
    writes it and its sum of squares.
    """
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    row = expert * F + first
    inside = (first + i < F)[:, None] & (column + j < D)[None, :]
    if scale is not None:
        grad *= tl.load(scale)
    if slot_M is not None:
        slot = tl.load(slot_M + row + i, mask=first + i < F, other=-1)
        extra = extra_AD + slot[:, None].to(tl.int64) * D + (column + j)[None, :]
        grad += tl.load(extra, mask=inside & (slot >= 0)[:, None], other=0.0)
    tl.store(square_parts + square_part, tl.sum(tl.sum(grad * grad, axis=1), axis=0))
    corner = grad_MD + row.to(tl.int64) * D + column
    tl.store(corner + i[:, None] * D + j[None, :], grad.to(grad_MD.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "num_chunks", "M"])
def _weight_gradient_kernel(
    left_NF,
    right_ND,
    start_E1,
    scale,
    slot_M,
    extra_AD,
    grad_MD,
    square_parts,
    column_sums_M,
    num_rows,
    num_chunks,
    M,
    F,
    FP,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    left = tiles_of_rows(left_NF, num_rows, FP, BK, BM, DESCRIPTORS)
    right = tiles_of_rows(right_ND, num_rows, DP, BK, BN, DESCRIPTORS)
    f_tiles = (F + BM - 1) // BM
    D_TILES: tl.constexpr = (D + BN - 1) // BN
    # one tile more per strip of latents sums left's columns: the strip's other programs are reading the same tiles
    STRIP: tl.constexpr = D_TILES + 1 if column_sums_M is not None else D_TILES
    pid = tl.program_id(0)
    d_tile = pid % STRIP
    f_tile = (pid // STRIP) % f_tiles
    expert = pid // (STRIP * f_tiles)
    begin = tl.load(start_E1 + expert)
    end = tl.load(start_E1 + expert + 1)
    chunk = tl.program_id(1)
    length = (end - begin + num_chunks * BK - 1) // (num_chunks * BK) * BK
    begin += chunk * length
    stop = tl.minimum(begin + length, end)
    if d_tile < D_TILES:
        acc = tl.zeros((BM, BN), tl.float32)
        for r in range(begin, stop, BK):
            acc = tl.dot(left.load([r, f_tile * BM]).T, right.load([r, d_tile * BN]), acc, input_precision="ieee")
        # one half after the other: a whole tile and the extra rows beside it would leave room for fewer programs on a multiprocessor
        parts = halves(acc, BM, BN)
        for h in tl.static_range(2):
            column = d_tile * BN + h * (BN // 2)
            if square_parts is None:  # one of several chunks, which `_sum_chunks_of_rows` will finish
                i = f_tile * BM + tl.arange(0, BM)
                c = column + tl.arange(0, BN // 2)
                corner = grad_MD + (chunk.to(tl.int64) * M + expert * F) * D
                tl.store(corner + i[:, None] * D + c[None, :], parts[h], mask=(i < F)[:, None] & (c < D)[None, :])
            else:
                square_part = ((expert * f_tiles + f_tile) * D_TILES + d_tile) * 2 + h
                _finish_slice(parts[h], expert, f_tile * BM, column, square_part, scale, slot_M, extra_AD, grad_MD, square_parts, F, D, BM, BN // 2)
    elif column_sums_M is not None:
        total = tl.zeros((BK, BM), tl.float32)
        for r in range(begin, stop, BK):
            total += left.load([r, f_tile * BM]).to(tl.float32)
        j = f_tile * BM + tl.arange(0, BM)
        sums = tl.sum(total, axis=0)
        if scale is not None:
            sums *= tl.load(scale)
        tl.store(column_sums_M + chunk.to(tl.int64) * M + expert * F + j, sums, mask=j < F)


@triton.jit(do_not_specialize=["num_chunks", "M"])
def _sum_chunks_of_rows(
    partial_CMD,
    partial_sums_CM,
    scale,
    slot_M,
    extra_AD,
    grad_MD,
    square_parts,
    column_sums_M,
    num_chunks,
    M,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    first = tl.program_id(0) * BM
    column = tl.program_id(1) * BN
    i = first + tl.arange(0, BM)
    j = column + tl.arange(0, BN)
    inside = (i < M)[:, None] & (j < D)[None, :]
    part = partial_CMD + i[:, None].to(tl.int64) * D + j[None, :]
    grad = tl.zeros((BM, BN), tl.float32)
    for _ in range(num_chunks):
        grad += tl.load(part, mask=inside, other=0.0)
        part += M.to(tl.int64) * D
    square_part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    _finish_slice(grad, 0, first, column, square_part, scale, slot_M, extra_AD, grad_MD, square_parts, M, D, BM, BN)
    if column_sums_M is not None:  # noqa: SIM102 (decided when the kernel is compiled, unlike the next)
        if column == 0:
            total = tl.zeros((BM,), tl.float32)
            sums = partial_sums_CM + i
            for _ in range(num_chunks):
                total += tl.load(sums, mask=i < M, other=0.0)
                sums += M
            if scale is not None:
                total *= tl.load(scale)
            tl.store(column_sums_M + i, total, mask=i < M)


def chunks_of_rows(programs: int, rows_per_expert: int, BK: int) -> int:
    """Into how many parts the rows of every expert are cut, so that a product of few programs fills the GPU: of at least four steps each."""
    return max(1, min(MULTIPROCESSORS // programs, rows_per_expert // (4 * BK)))


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
    scale: Tensor | None = None,
    any_width: bool = False,
) -> WeightGradient:
    """scale * left[e]^T @ right[e] for every expert e, plus the rows of `extra`: see `WeightGradient`. `scale` is float32 [], None means 1.

    left_NF [N, Fp] and right_ND [N, Dp] have the operands' dtype and pad columns 0. On each expert's padding rows one of them must be 0 and the other
    finite (for the column sums: left must be 0); rows behind the last expert are not read. With `any_width` every F takes the same kernel.
    """
    check_operands(precision, left_NF=left_NF, right_ND=right_ND)
    num_rows, FP = left_NF.shape
    E = start_E1.shape[0] - 1
    capability = capability_of(left_NF)
    tile = choose_tile("weight_gradient", num_rows // E, tile_width(F, any_width), D, precision, capability)
    f_tiles, d_tiles = cdiv(F, tile.BM), cdiv(D, tile.BN)
    grad_MD = torch.empty(E * F, D, dtype=out_dtype, device=left_NF.device)
    empty = partial(torch.empty, dtype=torch.float32, device=left_NF.device)
    column_sums_M = empty(E * F) if column_sums else None
    programs = E * f_tiles * (d_tiles + column_sums)
    chunks = chunks_of_rows(programs, num_rows // E, tile.BK)
    # where the width changes, the fewest programs decide, so that a model keeps its kernels: a single chunk may then go through the sum, too
    is_cut = chunks_of_rows(programs // f_tiles if any_width else programs, num_rows // E, tile.BK) > 1
    finish = (scale, extra.slot_M if extra else None, extra.rows_AD if extra else None, grad_MD)
    if not is_cut:
        square_parts = empty(E * f_tiles, d_tiles, 2)
        outputs: tuple[Tensor | None, ...] = (*finish, square_parts, column_sums_M)
    else:
        square_parts = empty(cdiv(E * F, SUM_ROWS), cdiv(D, SUM_COLUMNS))
        partial_CMD, partial_sums_CM = empty(chunks, E * F, D), empty(chunks, E * F) if column_sums else None
        outputs = (None, None, None, partial_CMD, None, partial_sums_CM)
    descriptors = has_descriptors(capability)
    launch(
        _weight_gradient_kernel,
        (programs, chunks),
        source(left_NF, [tile.BK, tile.BM], descriptors),
        source(right_ND, [tile.BK, tile.BN], descriptors),
        start_E1,
        *outputs,
        num_rows,
        chunks,
        E * F,
        F,
        FP,
        D=D,
        DP=right_ND.shape[1],
        DESCRIPTORS=descriptors,
        **tile._asdict(),
    )
    if is_cut:
        launch(
            _sum_chunks_of_rows,
            tuple(square_parts.shape),
            partial_CMD,
            partial_sums_CM,
            *finish,
            square_parts,
            column_sums_M,
            chunks,
            E * F,
            D=D,
            BM=SUM_ROWS,
            BN=SUM_COLUMNS,
        )
    return WeightGradient(grad_MD, square_parts, column_sums_M)

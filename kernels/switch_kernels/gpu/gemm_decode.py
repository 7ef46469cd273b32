"""Decoding masked latents by dense grouped products, z @ W[e], and the squared error of the reconstruction, taken in the product's epilogue."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.gemm import find_rows, find_tile, halves, latents_of, load_latents, store_tile, tiles_of_rows
from switch_kernels.gpu.gemm_tiles import SIZES, check_operands, grouped, source
from switch_kernels.gpu.launch import cdiv, interpreted, launch, next_power_of_2


class RowLoss(NamedTuple):
    """Squared error of the reconstructions, and its gradient in expert order."""

    grad_rows_ND: Tensor
    """Operand dtype [N, Dp]: gate * g, where g = grad_scale * error is the gradient of the reconstruction; padding rows and columns are 0."""
    square_parts: Tensor
    """float32: its sum is the sum of squared errors."""
    column_sums: Tensor
    """float32 [parts, D]: its sum over parts is the sum of g over tokens, the decoder's share of the gradient of b_pre."""


@triton.jit
def _latents_times_rows(
    latents, W_MD, row, expert, column, F, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """float32 [BM, BN]: z @ W[expert][:, column : column + BN]."""
    weights = latents_of(expert, W_MD, F, DP, BK, BN, DESCRIPTORS)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, F, BK):
        left = latents.load([row, k])
        right = load_latents(weights, expert, k, column, BK, BN, DESCRIPTORS)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _loss_of_slice(
    y,
    row,
    stop,
    column,
    sums_row,
    square_part,
    order_N,
    gate_T,
    x_TD,
    scale,
    b_pre_D,
    grad_rows_ND,
    square_parts,
    column_sums_PD,
    grad_scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Error, its gradient and their sums, where y is the product at rows `row` to `row + BM - 1` and columns `column` to `column + BN - 1`."""
    r = row + tl.arange(0, BM)
    c = column + tl.arange(0, BN)
    token = tl.load(order_N + r, mask=r < stop, other=-1)
    real = (token >= 0)[:, None]
    if D % STEP != 0:
        real = real & (c < D)[None, :]
    x = tl.load(x_TD + token[:, None].to(tl.int64) * D + c[None, :], mask=real, other=0.0).to(tl.float32)
    if gate_T is not None:
        gate = tl.load(gate_T + token, mask=token >= 0, other=0.0)
        y = y * gate[:, None]
    error = tl.where(real, y + tl.load(b_pre_D + c, mask=c < D, other=0.0)[None, :] - x * tl.load(scale), 0.0)
    tl.store(square_parts + square_part, tl.sum(tl.sum(error * error, axis=1), axis=0))
    g = error * grad_scale
    tl.store(column_sums_PD + sums_row * D + c, tl.sum(g, axis=0), mask=c < D)
    if gate_T is not None:
        g = g * gate[:, None]
    store_tile(grad_rows_ND, g, row, stop, column, DP, BM, BN, DP % STEP == 0)


@triton.jit(do_not_specialize=SIZES)
def _decode_loss_kernel(
    z_NF,
    W_MD,
    start_E1,
    order_N,
    gate_T,
    x_TD,
    scale,
    b_pre_D,
    grad_rows_ND,
    square_parts,
    column_sums_PD,
    num_rows,
    num_row_tiles,
    E,
    F,
    FP,
    grad_scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    latents = tiles_of_rows(z_NF, num_rows, FP, BM, BK, DESCRIPTORS)
    COLUMN_TILES: tl.constexpr = (D + BN - 1) // BN
    QUARTER: tl.constexpr = BN // 4
    row_tile, column_tile = find_tile(num_row_tiles, COLUMN_TILES)
    expert, row, stop = find_rows(row_tile, start_E1, num_rows, E, EP, BM, ALIGN)
    column = column_tile * BN
    part = (row_tile * COLUMN_TILES + column_tile) * 4
    if (expert < E) & (row < stop):
        acc = _latents_times_rows(latents, W_MD, row, expert, column, F, DP, BM, BN, BK, DESCRIPTORS)
        # quarter by quarter: beside a whole tile of x and of errors the registers would not hold two programs on a multiprocessor
        left, right = halves(acc, BM, BN)
        quarters = halves(left, BM, BN // 2) + halves(right, BM, BN // 2)
        for q in tl.static_range(4):
            _loss_of_slice(
                quarters[q],
                row,
                stop,
                column + q * QUARTER,
                row_tile,
                part + q,
                order_N,
                gate_T,
                x_TD,
                scale,
                b_pre_D,
                grad_rows_ND,
                square_parts,
                column_sums_PD,
                grad_scale,
                D,
                DP,
                BM,
                QUARTER,
                BN,
            )
    else:
        c = column + tl.arange(0, BN)
        tl.store(square_parts + part + tl.arange(0, 4), tl.zeros((4,), tl.float32))
        tl.store(column_sums_PD + row_tile * D + c, tl.zeros((BN,), tl.float32), mask=c < D)
        store_tile(grad_rows_ND, tl.zeros((BM, BN), tl.float32), row, stop, column, DP, BM, BN, DP % BN == 0)


def decode_loss(
    z_NF: Tensor,
    W_MD: Tensor,
    start_E1: Tensor,
    F: int,
    order_N: Tensor,
    gate_T: Tensor | None,
    x_TD: Tensor,
    scale: Tensor,
    b_pre_D: Tensor,
    grad_scale: float,
    precision: str,
) -> RowLoss:
    """error = gate * (z @ W[e]) + b_pre - x * scale, for one expert per token; the reconstruction itself is never written.

    z_NF [N, Fp] and W_MD [M, Dp] have the operands' dtype and pad columns 0; order_N is the token of each row or -1; x_TD is float32 or bfloat16.
    `grad_scale` times the error is the gradient: 2 / T for the mean over T tokens of the summed squared error.
    """
    check_operands(precision, z_NF=z_NF, W_MD=W_MD)
    num_rows, FP = z_NF.shape
    D, DP, E = x_TD.shape[1], W_MD.shape[1], start_E1.shape[0] - 1
    tile, descriptors, num_row_tiles, constants = grouped("decode_loss", z_NF, start_E1, F, D, precision)
    column_tiles = cdiv(D, tile.BN)
    grad_rows_ND = z_NF.new_empty(num_rows, DP)
    square_parts = torch.empty(num_row_tiles, column_tiles, 4, dtype=torch.float32, device=z_NF.device)
    column_sums = torch.empty(num_row_tiles, D, dtype=torch.float32, device=z_NF.device)
    launch(
        _decode_loss_kernel,
        (num_row_tiles * column_tiles,),
        source(z_NF, [tile.BM, tile.BK], descriptors),
        source(W_MD.view(E, F, DP), [1, tile.BK, tile.BN], descriptors),
        start_E1,
        order_N,
        gate_T,
        x_TD,
        scale,
        b_pre_D,
        grad_rows_ND,
        square_parts,
        column_sums,
        num_rows,
        num_row_tiles,
        E,
        F,
        FP,
        grad_scale,
        D=D,
        DP=DP,
        **constants,
    )
    return RowLoss(grad_rows_ND, square_parts, column_sums)


@triton.jit(do_not_specialize=SIZES)
def _decode_rows_kernel(
    z_NF,
    W_MD,
    start_E1,
    y_ND,
    num_rows,
    num_row_tiles,
    E,
    F,
    FP,
    D: tl.constexpr,
    DP: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    latents = tiles_of_rows(z_NF, num_rows, FP, BM, BK, DESCRIPTORS)
    row_tile, column_tile = find_tile(num_row_tiles, (D + BN - 1) // BN)
    expert, row, stop = find_rows(row_tile, start_E1, num_rows, E, EP, BM, ALIGN)
    column = column_tile * BN
    if (expert < E) & (row < stop):
        y = _latents_times_rows(latents, W_MD, row, expert, column, F, DP, BM, BN, BK, DESCRIPTORS)
        store_tile(y_ND, y, row, stop, column, DP, BM, BN, DP % BN == 0)
    else:
        store_tile(y_ND, tl.zeros((BM, BN), tl.float32), row, stop, column, DP, BM, BN, DP % BN == 0)


def decode_rows(z_NF: Tensor, W_MD: Tensor, start_E1: Tensor, F: int, D: int, precision: str) -> Tensor:
    """float32 [N, Dp]: z @ W[e] of each row's expert. A row of zeros gives zeros; rows behind the last expert and pad columns are 0."""
    check_operands(precision, z_NF=z_NF, W_MD=W_MD)
    num_rows, FP = z_NF.shape
    DP, E = W_MD.shape[1], start_E1.shape[0] - 1
    tile, descriptors, num_row_tiles, constants = grouped("decode_rows", z_NF, start_E1, F, D, precision)
    y_ND = torch.empty(num_rows, DP, dtype=torch.float32, device=z_NF.device)
    launch(
        _decode_rows_kernel,
        (num_row_tiles * cdiv(D, tile.BN),),
        source(z_NF, [tile.BM, tile.BK], descriptors),
        source(W_MD.view(E, F, DP), [1, tile.BK, tile.BN], descriptors),
        start_E1,
        y_ND,
        num_rows,
        num_row_tiles,
        E,
        F,
        FP,
        D=D,
        DP=DP,
        **constants,
    )
    return y_ND


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_slots_kernel(
    y_ND,
    row_R,
    gate_TS,
    x_TD,
    scale,
    b_pre_D,
    grad_rows_ND,
    square_parts,
    column_sums_PD,
    num_tokens,
    grad_scale,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    column_block = tl.program_id(1)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    c = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    real = (t < num_tokens)[:, None] & (c < D)[None, :]
    recon = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + tl.load(b_pre_D + c, mask=c < D, other=0.0)[None, :]
    for s in range(SLOTS):
        row = tl.load(row_R + t * SLOTS + s, mask=t < num_tokens, other=0)
        gate = tl.load(gate_TS + t * SLOTS + s, mask=t < num_tokens, other=0.0)
        recon += gate[:, None] * tl.load(y_ND + row[:, None].to(tl.int64) * DP + c[None, :], mask=real, other=0.0)
    x = tl.load(x_TD + t[:, None].to(tl.int64) * D + c[None, :], mask=real, other=0.0).to(tl.float32)
    error = tl.where(real, recon - x * tl.load(scale), 0.0)
    tl.store(square_parts + block * tl.num_programs(1) + column_block, tl.sum(tl.sum(error * error, axis=1), axis=0))
    g = error * grad_scale
    tl.store(column_sums_PD + block * D + c, tl.sum(g, axis=0), mask=c < D)
    for s in range(SLOTS):
        row = tl.load(row_R + t * SLOTS + s, mask=t < num_tokens, other=0)
        gate = tl.load(gate_TS + t * SLOTS + s, mask=t < num_tokens, other=0.0)
        grad_rows = grad_rows_ND + row[:, None].to(tl.int64) * DP + c[None, :]
        tl.store(grad_rows, (gate[:, None] * g).to(grad_rows_ND.dtype.element_ty), mask=real)


def combine_slots(
    y_ND: Tensor, row_R: Tensor, slots: int, gate_TS: Tensor, x_TD: Tensor, scale: Tensor, b_pre_D: Tensor, grad_scale: float, out_dtype: torch.dtype
) -> RowLoss:
    """The loss where several experts serve a token: error_t = sum_s gate[t, s] * y[row of (t, s)] + b_pre - x_t * scale;
    y is what `decode_rows` gave.
    """
    num_tokens, D = x_TD.shape
    num_rows, DP = y_ND.shape
    block_t, block_d = (8, 32) if interpreted() else (32, min(64, max(16, next_power_of_2(D))))
    blocks, column_blocks = cdiv(num_tokens, block_t), cdiv(D, block_d)
    grad_rows_ND = torch.zeros(num_rows, DP, dtype=out_dtype, device=y_ND.device)
    square_parts = torch.empty(blocks, column_blocks, dtype=torch.float32, device=y_ND.device)
    column_sums = torch.empty(blocks, D, dtype=torch.float32, device=y_ND.device)
    launch(
        _combine_slots_kernel,
        (blocks, column_blocks),
        y_ND,
        row_R,
        gate_TS,
        x_TD,
        scale,
        b_pre_D,
        grad_rows_ND,
        square_parts,
        column_sums,
        num_tokens,
        grad_scale,
        SLOTS=slots,
        D=D,
        DP=DP,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return RowLoss(grad_rows_ND, square_parts, column_sums)


@triton.jit(do_not_specialize=["T", "stride"])
def _residual_rows(
    grad_rows, row_R, gate_TS, out_TD, T, stride, factor, S: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = t < T
    inside = live[:, None] & (c < D)[None, :]
    row = t
    if row_R is not None:
        row = tl.load(row_R + t * S, mask=live, other=0)
    residual = tl.load(grad_rows + row[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0).to(tl.float32) * factor
    if gate_TS is not None:
        residual /= tl.load(gate_TS + t * S, mask=live, other=1.0)[:, None]
    tl.store(out_TD + t[:, None].to(tl.int64) * D + c[None, :], residual, mask=inside)


def residual_rows(grad_rows: Tensor, row_R: Tensor | None, gate_TS: Tensor | None, slots: int, tokens: int, D: int, grad_scale: float) -> Tensor:
    """float32 [T, D]: target - recon, scaled, of each token, from its gradient row, which is gate * grad_scale * (recon - target).

    The row is that of the token's first slot, `row_R[t * slots]`, or its own; the gate is that slot's, or 1.
    """
    block_t, block_d = (8, 32) if interpreted() else (16, min(256, max(16, next_power_of_2(D))))
    out_TD = torch.empty(tokens, D, dtype=torch.float32, device=grad_rows.device)
    launch(
        _residual_rows,
        (cdiv(tokens, block_t), cdiv(D, block_d)),
        *(grad_rows, row_R, gate_TS, out_TD, tokens, grad_rows.stride(0), -1 / grad_scale),
        S=slots,
        D=D,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    return out_TD

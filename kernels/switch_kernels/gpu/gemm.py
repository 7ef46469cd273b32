"""Grouped products over experts whose contraction runs along D: pre-activations forward, latent gradients backward.

Every expert multiplies its own rows by its own F rows of a weight matrix. All products share the search for a program's rows (`find_rows`), the order
of tiles (`find_tile`) and the ways tiles are loaded.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.gemm_tiles import SIZES, check_operands, grouped, padded, source
from switch_kernels.gpu.launch import cdiv, launch


class LatentGradients(NamedTuple):
    """Gradients of the pre-activations of all F latents of each row's expert."""

    dz_NF: Tensor
    """Operand dtype [N, Fp]: grad_rows @ W^T where the latent was active, else 0; rows behind the last expert and pad columns 0."""
    gate_parts_NP: Tensor
    """float32 [N, P]: its sum over P is sum_j z_j * (grad_rows @ W^T)_j, which times 1/gate is the gradient of the gate."""


@triton.jit
def find_tile(num_row_tiles, column_tiles, BAND: tl.constexpr = 16):
    """This program's (row tile, column tile). Bands of BAND row tiles are crossed column by column:
    programs that run together share rows and weights in L2.
    """
    pid = tl.program_id(0)
    band = pid // (BAND * column_tiles)
    height = tl.minimum(num_row_tiles - band * BAND, BAND)
    inside = pid % (BAND * column_tiles)
    return band * BAND + inside % height, inside // height


@triton.jit
def find_rows(row_tile, start_E1, num_rows, E, EP: tl.constexpr, BM: tl.constexpr, ALIGN: tl.constexpr):
    """Expert, first row and end row of a row tile; the tile is empty where first >= end. Expert E stands for the rows behind the last expert.

    Expert e's tiles begin at tile ceil((start_e + e * (BM - ALIGN)) / BM): far enough apart for any sizes that are multiples of ALIGN, so that no
    program needs the sizes of the experts before it.
    """
    e = tl.arange(0, EP)
    start = tl.load(start_E1 + e, mask=e <= E, other=0)
    tile_of_start = tl.where(e <= E, (start + e * (BM - ALIGN) + BM - 1) // BM, row_tile + 1)
    expert = tl.sum((tile_of_start <= row_tile).to(tl.int32), axis=0) - 1
    begin = tl.load(start_E1 + expert)
    stop = tl.where(expert < E, tl.load(start_E1 + tl.minimum(expert + 1, E)), num_rows)
    row = begin + (row_tile - (begin + expert * (BM - ALIGN) + BM - 1) // BM) * BM
    return expert, row, stop


@triton.jit
def tiles_of_rows(matrix, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Tiles [ROWS, COLUMNS] of a [num_rows, width] matrix; what lies outside it reads as 0."""
    if DESCRIPTORS:
        return matrix
    else:
        return tl.make_tensor_descriptor(matrix, [num_rows, width], [width, 1], [ROWS, COLUMNS])


@triton.jit
def latents_of(expert, matrix, F, WIDTH: tl.constexpr, LATENTS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Tiles of an expert's [F, WIDTH] part of an [E, F, WIDTH] matrix, for `load_latents`.

    What lies past its F rows reads as 0, not as the next expert's.
    """
    if DESCRIPTORS:
        return matrix
    else:
        return tl.make_tensor_descriptor(matrix + expert.to(tl.int64) * F * WIDTH, [F, WIDTH], [WIDTH, 1], [LATENTS, COLUMNS])


@triton.jit
def load_latents(tiles, expert, latent, column, LATENTS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """The [LATENTS, COLUMNS] tile of an expert at (latent, column)."""
    if DESCRIPTORS:
        return tiles.load([expert, latent, column]).reshape(LATENTS, COLUMNS)
    else:
        return tiles.load([latent, column])


@triton.jit
def store_tile(matrix, tile, row, stop, column, width, BM: tl.constexpr, BN: tl.constexpr, INSIDE: tl.constexpr = False):
    """Writes a [BM, BN] tile at (row, column) of a [., width] matrix, cast to its dtype: rows below `stop` and columns below `width`.

    INSIDE says that no tile reaches past the last column.
    """
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    inside = (row + i < stop)[:, None]
    if not INSIDE:
        inside = inside & (column + j < width)[None, :]
    # 64 bits for the corner only: offsets inside the tile fit 32, and 64-bit ones would cost as many registers as the tile itself
    corner = matrix + row.to(tl.int64) * width + column
    tl.store(corner + i[:, None] * width + j[None, :], tile.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of the columns: of a product's sums, a renaming of registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _rows_times_latents(
    rows, W_MD, row, expert, latent, F, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """float32 [BM, BN]: rows @ W[expert, latent : latent + BN]^T."""
    weights = latents_of(expert, W_MD, F, DP, BN, BK, DESCRIPTORS)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, DP, BK):
        left = rows.load([row, k])
        right = load_latents(weights, expert, latent, k, BN, BK, DESCRIPTORS)
        acc = tl.dot(left, right.T, acc, input_precision="ieee")  # of float32; tensor cores would cut it off to 10 bits of mantissa
    return acc


@triton.jit(do_not_specialize=SIZES)
def _encode_kernel(
    rows_ND,
    W_MD,
    b_M,
    start_E1,
    pre_NF,
    group_max_NG,
    num_rows,
    num_row_tiles,
    E,
    F,
    FP,
    GP,
    DP: tl.constexpr,
    EP: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    rows = tiles_of_rows(rows_ND, num_rows, DP, BM, BK, DESCRIPTORS)
    row_tile, column_tile = find_tile(num_row_tiles, (F + BN - 1) // BN)
    expert, row, stop = find_rows(row_tile, start_E1, num_rows, E, EP, BM, ALIGN)
    if row < stop:
        first = column_tile * BN
        if expert < E:
            acc = _rows_times_latents(rows, W_MD, row, expert, first, F, DP, BM, BN, BK, DESCRIPTORS)
            j = first + tl.arange(0, BN)
            if b_M is not None:
                acc += tl.load(b_M + expert * F + j, mask=j < F, other=0.0)[None, :]
            store_tile(pre_NF, acc, row, stop, first, FP, BM, BN)
            if GROUP > 1:
                if RAGGED:
                    acc = tl.where((j < F)[None, :], acc, float("-inf"))
                # rounding is monotone: the largest of the rounded values is the rounded largest
                largest = tl.max(tl.reshape(acc, (BM, BN // GROUP, GROUP)), axis=2)
                store_tile(group_max_NG, largest, row, stop, column_tile * (BN // GROUP), GP, BM, BN // GROUP)
        else:
            store_tile(pre_NF, tl.zeros((BM, BN), tl.float32), row, stop, first, FP, BM, BN)
            if GROUP > 1:
                zeros = tl.zeros((BM, BN // GROUP), tl.float32)
                store_tile(group_max_NG, zeros, row, stop, column_tile * (BN // GROUP), GP, BM, BN // GROUP)


def encode(
    rows_ND: Tensor, W_MD: Tensor, b_M: Tensor | None, start_E1: Tensor, F: int, group: int, precision: str, any_width: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(pre_NF [N, Fp], group_max_NG [N, ceil(F / group)]) in `dtype`, the operands' unless given: pre = rows @ W[e]^T + b of each row's expert,
    and its maxima over groups.

    rows_ND is [N, Dp], W_MD [M, Dp], b_M float32; their pad columns hold 0. Pad columns of pre hold 0, padding rows whatever a row of zeros gives,
    rows behind the last expert 0. `group` is a power of two up to 128; with group 1 the maxima are pre itself, not a copy. With `any_width` every F
    takes the same kernel.
    """
    check_operands(precision, rows_ND=rows_ND, W_MD=W_MD)
    num_rows, DP = rows_ND.shape
    E, groups = start_E1.shape[0] - 1, cdiv(F, group)
    tile, descriptors, num_row_tiles, constants = grouped("encode", rows_ND, start_E1, F, DP, precision, group, any_width)
    pre_NF = rows_ND.new_empty(num_rows, padded(F), dtype=dtype)
    group_max_NG = pre_NF[:, :F] if group == 1 else pre_NF.new_empty(num_rows, padded(groups))[:, :groups]
    launch(
        _encode_kernel,
        (num_row_tiles * cdiv(F, tile.BN),),
        source(rows_ND, [tile.BM, tile.BK], descriptors),
        source(W_MD.view(E, F, DP), [1, tile.BN, tile.BK], descriptors),
        b_M,
        start_E1,
        pre_NF,
        group_max_NG,
        num_rows,
        num_row_tiles,
        E,
        F,
        pre_NF.stride(0),
        group_max_NG.stride(0),
        DP=DP,
        GROUP=group,
        RAGGED=group > 1 and F % tile.BN != 0,
        **constants,
    )
    return pre_NF, group_max_NG


@triton.jit(do_not_specialize=SIZES)
def _latent_gradients_kernel(
    grad_rows_ND,
    W_MD,
    z_NF,
    start_E1,
    dz_NF,
    gate_parts_NP,
    num_rows,
    num_row_tiles,
    E,
    F,
    FP,
    DP: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    rows = tiles_of_rows(grad_rows_ND, num_rows, DP, BM, BK, DESCRIPTORS)
    latents = tiles_of_rows(z_NF, num_rows, FP, BM, BN, DESCRIPTORS)
    row_tile, column_tile = find_tile(num_row_tiles, (F + BN - 1) // BN)
    expert, row, stop = find_rows(row_tile, start_E1, num_rows, E, EP, BM, ALIGN)
    if row < stop:
        first = column_tile * BN
        r = row + tl.arange(0, BM)
        gate_part = gate_parts_NP + r.to(tl.int64) * ((F + BN - 1) // BN) + column_tile
        if expert < E:
            acc = _rows_times_latents(rows, W_MD, row, expert, first, F, DP, BM, BN, BK, DESCRIPTORS)
            z = latents.load([row, first]).to(tl.float32)
            tl.store(gate_part, tl.sum(z * acc, axis=1), mask=r < stop)
            store_tile(dz_NF, tl.where(z > 0, acc, 0.0), row, stop, first, FP, BM, BN)
        else:
            store_tile(dz_NF, tl.zeros((BM, BN), tl.float32), row, stop, first, FP, BM, BN)
            tl.store(gate_part, tl.zeros((BM,), tl.float32), mask=r < stop)


def latent_gradients(
    grad_rows_ND: Tensor, W_dec_MD: Tensor, z_NF: Tensor, start_E1: Tensor, F: int, precision: str, any_width: bool = False
) -> LatentGradients:
    """Back through the decoder and the ReLU, for all F latents of each row's expert: see `LatentGradients`.

    grad_rows_ND [N, Dp] is what `decode_loss` left, z_NF [N, Fp] the latents that it decoded; both have the operands' dtype. With
    `any_width` every F takes the same kernel.
    """
    check_operands(precision, grad_rows_ND=grad_rows_ND, W_dec_MD=W_dec_MD, z_NF=z_NF)
    num_rows, DP = grad_rows_ND.shape
    E = start_E1.shape[0] - 1
    tile, descriptors, num_row_tiles, constants = grouped("latent_gradients", grad_rows_ND, start_E1, F, DP, precision, any_width=any_width)
    dz_NF = torch.empty_like(z_NF)
    gate_parts_NP = torch.empty(num_rows, cdiv(F, tile.BN), dtype=torch.float32, device=z_NF.device)
    launch(
        _latent_gradients_kernel,
        (num_row_tiles * cdiv(F, tile.BN),),
        source(grad_rows_ND, [tile.BM, tile.BK], descriptors),
        source(W_dec_MD.view(E, F, DP), [1, tile.BN, tile.BK], descriptors),
        source(z_NF, [tile.BM, tile.BN], descriptors),
        start_E1,
        dz_NF,
        gate_parts_NP,
        num_rows,
        num_row_tiles,
        E,
        F,
        z_NF.stride(0),
        DP=DP,
        **constants,
    )
    return LatentGradients(dz_NF, gate_parts_NP)

"""Gram matrices of the experts' dictionaries in one kernel, which a CUDA graph can hold: pursuit and refits search in them.

A program computes one tile and writes it twice, as it is and transposed: that saves half of the products, and makes a matrix symmetric bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.backend import Dot
from switch_kernels.gpu.launch import cdiv, interpreted, launch
from switch_kernels.gpu.route import precision_of
from switch_kernels.pursuit import COLUMNS, padded_columns


class GramTile(NamedTuple):
    """The side of a program's square of the matrix, the elements of the sum per step, and the compiler's two options."""

    SIDE: int
    DEPTH: int
    num_warps: int = 4
    num_stages: int = 3


def gram_tile(precision: str) -> GramTile:
    """The tile for all sizes; float32 operands are made products of in registers, of which deeper tiles take more.

    Four such programs share a multiprocessor of an H100, so that some split operands while others multiply. Tiles of 128 x 128 read half as much, but
    their operands and sums leave room for one program of eight warps, which does one after the other.
    """
    if interpreted():
        return GramTile(32, 32, num_stages=1)
    return GramTile(64, 16) if precision == "ieee" else GramTile(64, 32)


@triton.jit
def _tile_pair(pair, n):
    """(a, b), a >= b, of pair 0 to n (n + 1) / 2 - 1 of n tiles.

    Two rows of the triangle make a line of n pairs where n is odd, of n + 1 where it is even: row n - 1 - line, which has n - line, and the row that
    has as many as are missing.
    """
    line, place = pair // (n | 1), pair % (n | 1)
    length = n - line
    return tl.where(place < length, length - 1, line - n % 2), tl.where(place < length, place, place - length)


@triton.jit
def _halves(x):
    """bfloat16 (high, low): x = high + low to 16 bits. NaN may leave high, but not low.

    `high` is rounded as an integer: where its value is needed, too, the compiler converts numbers singly, in the narrowest unit of the GPU.
    """
    high = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit(do_not_specialize=["C", "shared"])
def _gram(W_MD, gram_ECP, C, shared, D, PAD: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr):
    n = (C + SIDE - 1) // SIDE
    pairs = n * (n + 1) // 2
    expert = (tl.program_id(0) // pairs).to(tl.int64)
    a, b = _tile_pair(tl.program_id(0) % pairs, n)
    i = tl.arange(0, SIDE)
    row, column = a * SIDE + i, b * SIDE + i
    # rows past the last are the last again, so that no load asks where they end; what they give is replaced by 0
    left, right = tl.minimum(row, C - 1), tl.minimum(column, C - 1)
    own = expert * (C - shared)
    left_rows = W_MD + (tl.where(left < shared, left, left + own) * D)[:, None]
    right_rows = W_MD + (tl.where(right < shared, right, right + own) * D)[:, None]
    acc = tl.zeros((SIDE, SIDE), tl.float32)
    for first in range(0, D, DEPTH):
        d = first + tl.arange(0, DEPTH)[None, :]
        x = tl.load(left_rows + d, mask=d < D, other=0.0)
        y = tl.load(right_rows + d, mask=d < D, other=0.0)
        if SPLIT:  # written out: Triton's own bf16x3 adds to a second accumulator in every step, which takes twice the registers
            x_high, x_low = _halves(x)
            y_high, y_low = _halves(y)
            acc = tl.dot(x_low, y_high.T, acc)
            acc = tl.dot(x_high, y_low.T, acc)
            acc = tl.dot(x_high, y_high.T, acc)
        else:
            acc = tl.dot(x, y.T, acc, input_precision="ieee")
    acc = tl.where((row < C)[:, None] & (column < C)[None, :], acc, 0.0)
    if a == b:  # the other side of the diagonal has its sums in another order
        acc = tl.where(i[:, None] >= i[None, :], acc, acc.T)
    P = (C + PAD - 1) // PAD * PAD  # not an argument: its rows are known to be of whole vectors
    gram = gram_ECP + expert * C * P
    inside = i[:, None] * P + i[None, :]
    tl.store(gram + a.to(tl.int64) * SIDE * P + b * SIDE + inside, acc, mask=(row < C)[:, None] & (column < P)[None, :])
    if a != b:
        tl.store(gram + b.to(tl.int64) * SIDE * P + a * SIDE + inside, acc.T, mask=(column < C)[:, None] & (row < P)[None, :])


def gram_matrices_(gram_ECP: Tensor, W_MD: Tensor, shared: int, dot: Dot) -> None:
    """Writes into gram_ECP, float32 [E, C, P]: A_e A_e^T of each expert's dictionary A_e, its columns padded with 0 to P.

    A_e are the C = shared + F rows W[:shared] and W[shared + e F : shared + (e + 1) F] of W_MD, float32 [M, D] with M = shared + E F; P is
    `padded_columns` of C. What gram_ECP held is not read. The matrices are those of `switch_kernels.pursuit.gram_matrices`, and symmetric bit for
    bit. With `dot` "ieee", and in the interpreter, products are float32; else three of bfloat16 stand for each (`precision_of`), which between rows
    of norm 1 err by 3 * 2^-16 at most, and by what sums in float32 do. One kernel serves all E, C, shared, and all D that are multiples of 16.
    Raises ValueError for tensors that do not fit.
    """
    _check(gram_ECP, W_MD, shared)
    experts, candidates, _ = gram_ECP.shape
    precision = precision_of(dot)
    tile = gram_tile(precision)
    n = cdiv(candidates, tile.SIDE)
    grid = (experts * n * (n + 1) // 2,)
    launch(_gram, grid, W_MD, gram_ECP, candidates, shared, W_MD.shape[1], PAD=COLUMNS, SPLIT=precision != "ieee", **tile._asdict())


def _check(gram_ECP: Tensor, W_MD: Tensor, shared: int) -> None:
    for name, tensor, dimensions in (("gram_ECP", gram_ECP, 3), ("W_MD", W_MD, 2)):
        if tensor.dtype != torch.float32 or tensor.dim() != dimensions or not tensor.is_contiguous():
            about = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" + ("" if tensor.is_contiguous() else ", not contiguous")
            raise ValueError(f"{name} is {about}: it must be contiguous float32 with {dimensions} dimensions. Convert it first.")
    experts, M = len(gram_ECP), len(W_MD)
    if experts < 1 or not 0 <= shared <= M or (M - shared) % experts:
        raise ValueError(
            f"M={M} latents, shared={shared} of them shared, are no whole number for each of E={experts} experts: M - shared must be a multiple of "
            "E >= 1, and shared lie between 0 and M. Give the rows of all experts, and a matrix for each."
        )
    candidates = shared + (M - shared) // experts
    needed = [experts, candidates, padded_columns(candidates)]
    if list(gram_ECP.shape) != needed:
        raise ValueError(
            f"gram_ECP has shape {list(gram_ECP.shape)}: for M={M}, shared={shared} it must be [E, C, P] = {needed}, where C is "
            "shared + (M - shared) / E, and P is padded_columns(C). Make it with that shape."
        )

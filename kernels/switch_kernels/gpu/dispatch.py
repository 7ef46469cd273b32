"""Putting (token, slot) pairs in expert order: a stable counting sort without atomics, and the gather of the rows that the products read."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import ALIGN, cdiv, launch, next_power_of_2, round_up
from switch_kernels.gpu.route import block_tokens, padded_experts

PAD_EXPERTS = 16
"""Experts whose padding rows one program marks."""


@dataclass(frozen=True)
class Sorted:
    """The pairs r = t * S + s of a batch in expert order, every expert's rows starting at a multiple of `ALIGN`.

    Worked example with ALIGN = 4, E = 3, S = 1 and experts [2, 0, 2] (expert 1 receives nothing)::

        order_N   = [1, -1, -1, -1, 0, 2, -1, -1, -1, -1, -1, -1]     row n holds pair order_N[n]; -1 is padding
        row_R     = [4, 0, 5]
        start_E1  = [0, 4, 4, 8]
        counts_E  = [1, 0, 2]
    """

    order_N: Tensor
    """int32: the pair of each row, or -1."""
    row_R: Tensor
    """int32: the row of each pair."""
    start_E1: Tensor
    """int32 [E + 1]: expert e owns rows start_E1[e] to start_E1[e + 1] - 1; rows from start_E1[E] on are padding."""
    counts_E: Tensor
    """int32: pairs per expert."""


def num_rows(num_pairs: int, num_experts: int) -> int:
    """N, the rows that hold any `num_pairs` pairs in expert order, padding included:
    R + E * (ALIGN - 1) rounded up to ALIGN, or R rounded up if E is 1.
    """
    return round_up(num_pairs + (num_experts * (ALIGN - 1) if num_experts > 1 else 0), ALIGN)


def count_experts(expert_TS: Tensor, num_experts: int) -> Tensor:
    """int32 [B, E]: pairs of each expert in each block of `block_tokens(E)` tokens, as `route` counts them;
    experts (int32) lie in [0, num_experts).
    """
    tokens, slots = expert_TS.shape
    block = block_tokens(num_experts)
    width = min(128, padded_experts(num_experts))
    counts_BE = torch.empty(cdiv(tokens, block), num_experts, dtype=torch.int32, device=expert_TS.device)
    grid = (counts_BE.shape[0], cdiv(num_experts, width))
    launch(_count_experts, grid, expert_TS, counts_BE, tokens * slots, E=num_experts, S=slots, BLOCK_T=block, WIDTH=width)
    return counts_BE


@triton.jit
def _count_experts(expert_R, counts_BE, R, E: tl.constexpr, S: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr):
    block = tl.program_id(0)
    e = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    counts = tl.zeros((BLOCK_T, WIDTH), tl.int32)
    for s in tl.static_range(S):
        r = (block * S + s) * BLOCK_T + tl.arange(0, BLOCK_T)
        expert = tl.load(expert_R + r, mask=r < R, other=-1)
        counts += (expert[:, None] == e[None, :]).to(tl.int32)
    tl.store(counts_BE + block.to(tl.int64) * E + e, tl.sum(counts, axis=0), mask=e < E)


def sort_pairs(expert_TS: Tensor, counts_BE: Tensor, num_experts: int) -> Sorted:
    """Stable counting sort of the pairs by expert, given `counts_BE` of `route` or `count_experts`.

    Two launches whatever the sizes: counts are summed down the blocks, each block once; then a program places BLOCK_T pairs. A pair's row is its
    expert's start, plus that expert's pairs in earlier blocks, plus those earlier in its own block.
    """
    tokens, slots = expert_TS.shape
    block = block_tokens(num_experts)
    blocks = cdiv(tokens, block)
    if counts_BE.shape != (blocks, num_experts):
        raise ValueError(f"counts_BE has shape {tuple(counts_BE.shape)}; {tokens} tokens and {num_experts} experts need {(blocks, num_experts)}.")
    pairs = tokens * slots
    rows = num_rows(pairs, num_experts)
    device = expert_TS.device
    before_BE = torch.empty_like(counts_BE)
    result = Sorted(
        order_N=torch.empty(rows, dtype=torch.int32, device=device),
        row_R=torch.empty(pairs, dtype=torch.int32, device=device),
        start_E1=torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        counts_E=torch.empty(num_experts, dtype=torch.int32, device=device),
    )
    launch(_sum_counts, (cdiv(num_experts, 16),), counts_BE, before_BE, result.counts_E, blocks, num_experts, WIDTH=16, CHUNK=256)
    chunks = cdiv(pairs, block)
    launch(
        _place_pairs,
        (chunks + cdiv(num_experts, PAD_EXPERTS),),
        expert_TS,
        before_BE,
        result.counts_E,
        result.order_N,
        result.row_R,
        result.start_E1,
        pairs,
        chunks,
        rows,
        num_experts,
        slots,
        BLOCK_T=block,
        WIDTH=max(128, padded_experts(num_experts)),
        PAD=PAD_EXPERTS,
        ROW_ALIGN=ALIGN,
    )
    return result


@triton.jit(do_not_specialize=["B", "E"])
def _sum_counts(counts_BE, before_BE, counts_E, B, E, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """before[b, e] = sum of counts[:b, e], for WIDTH experts."""
    e = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, B, CHUNK):
        b = first + tl.arange(0, CHUNK)
        at = b[:, None].to(tl.int64) * E + e[None, :]
        live = (b < B)[:, None] & (e < E)[None, :]
        counts = tl.load(counts_BE + at, mask=live, other=0)
        tl.store(before_BE + at, tl.cumsum(counts, 0) - counts + total[None, :], mask=live)
        total += tl.sum(counts, axis=0)
    tl.store(counts_E + e, total, mask=e < E)


@triton.jit(do_not_specialize=["R", "chunks", "N", "E", "S"])
def _place_pairs(
    expert_R,
    before_BE,
    counts_E,
    order_N,
    row_R,
    start_E1,
    R,
    chunks,
    N,
    E,
    S,
    BLOCK_T: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
):
    """The first `chunks` programs place BLOCK_T pairs each;
    the rest mark the padding rows of PAD experts and a slice of those after the last expert.
    """
    program = tl.program_id(0)
    n = tl.arange(0, WIDTH)
    counts = tl.load(counts_E + n, mask=n < E, other=0)
    aligned = (counts + ROW_ALIGN - 1) // ROW_ALIGN * ROW_ALIGN
    end = tl.cumsum(aligned, 0)
    start = end - aligned
    if program < chunks:
        block = program // S
        lane = tl.arange(0, BLOCK_T)
        r = program * BLOCK_T + lane
        live = r < R
        expert = tl.load(expert_R + r, mask=live, other=0)
        row = tl.gather(start, expert, 0) + tl.load(before_BE + block.to(tl.int64) * E + expert)
        for chunk in range(block * S, program + 1):
            other = chunk * BLOCK_T + lane
            other_expert = tl.load(expert_R + other, mask=other < R, other=-1)
            same = (other_expert[None, :] == expert[:, None]) & (other[None, :] < r[:, None])
            row += tl.sum(same.to(tl.int32), axis=1)
        tl.store(row_R + r, row, mask=live)
        tl.store(order_N + row, r, mask=live)
    else:
        pad = program - chunks
        e = pad * PAD + tl.arange(0, PAD)
        inside = tl.minimum(e, E - 1)
        real = e < E
        first = tl.gather(start, inside, 0) + tl.load(counts_E + inside)
        stop = tl.where(real, tl.gather(end, inside, 0), 0)
        slot = tl.arange(0, ROW_ALIGN)
        padding = first[:, None] + slot[None, :]
        nothing = tl.full((PAD, ROW_ALIGN), -1, tl.int32)
        tl.store(order_N + padding, nothing, mask=padding < stop[:, None])
        rows_used = tl.sum(aligned, axis=0)
        # N - rows_used <= ROW_ALIGN * E, so ROW_ALIGN rows per expert cover the tail
        tail = rows_used + e[:, None] * ROW_ALIGN + slot[None, :]
        tl.store(order_N + tail, nothing, mask=tail < N)
        if pad == 0:
            tl.store(start_E1, 0)
            tl.store(start_E1 + 1 + n, end, mask=n < E)


def gather_rows(x_TD: Tensor, scale: Tensor, b_pre_D: Tensor, order_N: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """[N, Dp] of `dtype`: x * scale - b_pre of each row's token, in float32 before the cast; Dp is D rounded up to 8, padding rows and columns are 0.

    x_TD is float32 or bfloat16, scale a float32 scalar, b_pre_D float32, order_N from `sort_pairs` (pair // slots is the token). Tokens T and on are
    the first ones once more.
    """
    tokens, width = x_TD.shape
    leading = round_up(width, 8)
    columns = min(256, next_power_of_2(leading))
    rows = min(ALIGN, 2048 // columns)
    rows_ND = torch.empty(order_N.shape[0], leading, dtype=dtype, device=x_TD.device)
    grid = (order_N.shape[0] // rows, cdiv(leading, columns))
    launch(_gather_rows, grid, x_TD, scale, b_pre_D, order_N, rows_ND, tokens, width, leading, slots, ROWS=rows, COLUMNS=columns)
    return rows_ND


@triton.jit(do_not_specialize=["T", "S"])
def _gather_rows(x_TD, scale, b_pre_D, order_N, rows_ND, T, D, DP, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pair = tl.load(order_N + n)
    token = tl.maximum(pair, 0) // S
    token = tl.where(token < T, token, token - T).to(tl.int64)
    real = (pair >= 0)[:, None] & (d < D)[None, :]
    x = tl.load(x_TD + token[:, None] * D + d[None, :], mask=real, other=0.0).to(tl.float32)
    bias = tl.load(b_pre_D + d, mask=d < D, other=0.0)
    centred = tl.where(real, x * tl.load(scale) - bias[None, :], 0.0)
    at = n.to(tl.int64)[:, None] * DP + d[None, :]
    tl.store(rows_ND + at, centred.to(rows_ND.dtype.element_ty), mask=(d < DP)[None, :])

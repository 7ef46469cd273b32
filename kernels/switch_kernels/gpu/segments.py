"""Kernels that sum the pairs of each latent: what `pairs` launches.

A row's sum stays in registers, as the tuple of column chunks of `update.RowTiling`. Rows are gathered a few at a time; the numbers of the next few
are loaded behind them, so that a lone long segment waits for memory once per step and not three times.
"""

import triton
import triton.language as tl

from switch_kernels.gpu.update import appended, is_finite, row_product, update_row_in_registers

NUMBERS = ["multiplier", "shift", "S"]
"""Arguments whose values no kernel is compiled for."""


@triton.jit
def _locate(q, end, pair, weights, row_R, slots, multiplier, shift, S, BY_ROW: tl.constexpr, HAS_SLOT: tl.constexpr):
    """(row of the table, weight) of the q-th pair; past the end some row and weight 0. The multiplier and the shift divide: see `pairs.division`."""
    p = tl.load(pair + tl.minimum(q, tl.maximum(end - 1, 0)))
    row = ((p.to(tl.int64) * multiplier) >> shift).to(tl.int32)
    if HAS_SLOT:
        row = row * S + tl.load(slots + p)
    if BY_ROW:
        row = tl.load(row_R + row)
    return row, tl.where(q < end, tl.load(weights + p), 0.0)


@triton.jit
def _add_pairs(
    sums,
    total,
    first,
    end,
    pair,
    weights,
    table,
    row_R,
    slots,
    multiplier,
    shift,
    S,
    D: tl.constexpr,
    DP: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Adds pairs first to end - 1 to `sums`, a tuple of tiles [1, WIDTH], and their weights to `total`, one after the other."""
    column = tl.arange(0, WIDTH)[None, :]
    zeros = tl.zeros((1, WIDTH), tl.int32)  # makes masks of tiles from scalars: the interpreter cannot combine masks of either kind
    rows = ()
    factors = ()
    for u in tl.static_range(UNROLL):
        row, factor = _locate(first + u, end, pair, weights, row_R, slots, multiplier, shift, S, BY_ROW, HAS_SLOT)
        rows = appended(rows, row)
        factors = appended(factors, factor)
    for i in range(first, end, UNROLL):
        tiles = ()
        for u in tl.static_range(UNROLL):
            for n in tl.static_range(CHUNKS):
                offsets = rows[u].to(tl.int64) * DP + n * WIDTH + column
                mask = (zeros + (i + u) < end) & (n * WIDTH + column < D)
                tiles = appended(tiles, tl.load(table + offsets, mask=mask, other=0.0))
        next_rows = ()
        next_factors = ()
        for u in tl.static_range(UNROLL):
            row, factor = _locate(i + UNROLL + u, end, pair, weights, row_R, slots, multiplier, shift, S, BY_ROW, HAS_SLOT)
            next_rows = appended(next_rows, row)
            next_factors = appended(next_factors, factor)
        for u in tl.static_range(UNROLL):
            added = ()
            for n in tl.static_range(CHUNKS):
                added = appended(added, sums[n] + factors[u] * tiles[u * CHUNKS + n].to(tl.float32))
            sums = added
            total += factors[u]
        rows = next_rows
        factors = next_factors
    return sums, total


@triton.jit
def _zero_sums(WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = appended(sums, tl.zeros((1, WIDTH), tl.float32))
    return sums


@triton.jit(do_not_specialize=["num_pairs", "nobody", *NUMBERS])
def sum_chunks(
    pair,
    latent,
    weights,
    table,
    row_R,
    slots,
    multiplier,
    shift,
    S,
    chunk_sums,
    chunk_weights,
    num_pairs,
    nobody,
    D: tl.constexpr,
    DP: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program per chunk of pairs; it works only if all belong to one latent, and not to nobody."""
    b = tl.program_id(0)
    first = b * CHUNK
    end = first + CHUNK
    if end > num_pairs:
        return
    if (tl.load(latent + first) != tl.load(latent + end - 1)) | (tl.load(latent + first) == nobody):
        return
    sums, total = _add_pairs(
        _zero_sums(WIDTH, CHUNKS),
        tl.full((), 0.0, tl.float32),
        first,
        end,
        pair,
        weights,
        table,
        row_R,
        slots,
        multiplier,
        shift,
        S,
        D,
        DP,
        BY_ROW,
        HAS_SLOT,
        WIDTH,
        CHUNKS,
        UNROLL,
    )
    column = tl.arange(0, WIDTH)[None, :]
    for n in tl.static_range(CHUNKS):
        tl.store(chunk_sums + b.to(tl.int64) * D + n * WIDTH + column, sums[n], mask=n * WIDTH + column < D)
    tl.store(chunk_weights + b, total)


@triton.jit
def _sum_segment(
    j,
    start,
    pair,
    weights,
    table,
    row_R,
    slots,
    multiplier,
    shift,
    S,
    chunk_sums,
    chunk_weights,
    extra_slot,
    extra_rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The whole gradient of row j: pairs before its first and after its last whole chunk, the whole chunks, the extra row."""
    first = tl.load(start + j)
    end = tl.load(start + j + 1)
    first_chunk = (first + CHUNK - 1) // CHUNK
    end_chunk = end // CHUNK
    has_chunks = end_chunk > first_chunk
    head_end = tl.where(has_chunks, first_chunk * CHUNK, end)
    tail = tl.where(has_chunks, end_chunk * CHUNK, end)
    sums = _zero_sums(WIDTH, CHUNKS)
    total = tl.full((), 0.0, tl.float32)
    sums, total = _add_pairs(
        sums, total, first, head_end, pair, weights, table, row_R, slots, multiplier, shift, S, D, DP, BY_ROW, HAS_SLOT, WIDTH, CHUNKS, UNROLL
    )
    if has_chunks:
        sums, total = _add_pairs(
            sums, total, tail, end, pair, weights, table, row_R, slots, multiplier, shift, S, D, DP, BY_ROW, HAS_SLOT, WIDTH, CHUNKS, UNROLL
        )
    column = tl.arange(0, WIDTH)[None, :]
    for b in range(first_chunk, end_chunk):
        added = ()
        for n in tl.static_range(CHUNKS):
            offsets = (tl.zeros((1, WIDTH), tl.int64) + b) * D + n * WIDTH + column
            added = appended(added, sums[n] + tl.load(chunk_sums + offsets, mask=n * WIDTH + column < D, other=0.0))
        sums = added
        total += tl.load(chunk_weights + b)
    if HAS_EXTRA:
        slot = tl.load(extra_slot + j)
        added = ()
        for n in tl.static_range(CHUNKS):
            mask = (tl.zeros((1, WIDTH), tl.int32) + slot >= 0) & (n * WIDTH + column < D)
            added = appended(added, sums[n] + tl.load(extra_rows + slot.to(tl.int64) * D + n * WIDTH + column, mask=mask, other=0.0))
        sums = added
    return sums, total


@triton.jit(do_not_specialize=NUMBERS)
def gradient_rows(
    start,
    pair,
    weights,
    table,
    row_R,
    slots,
    multiplier,
    shift,
    S,
    chunk_sums,
    chunk_weights,
    extra_slot,
    extra_rows,
    grad,
    squares,
    totals,
    D: tl.constexpr,
    DP: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    STORE: tl.constexpr,
    STORE_TOTAL: tl.constexpr,
):
    """One program per latent."""
    j = tl.program_id(0).to(tl.int64)
    sums, total = _sum_segment(
        j,
        start,
        pair,
        weights,
        table,
        row_R,
        slots,
        multiplier,
        shift,
        S,
        chunk_sums,
        chunk_weights,
        extra_slot,
        extra_rows,
        D,
        DP,
        BY_ROW,
        HAS_SLOT,
        HAS_EXTRA,
        WIDTH,
        CHUNKS,
        CHUNK,
        UNROLL,
    )
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(squares + j + tl.arange(0, 1)[:, None], row_product(sums, sums, CHUNKS))
    if STORE_TOTAL:
        tl.store(totals + j, total)
    if STORE:
        for n in tl.static_range(CHUNKS):
            tl.store(grad + j * D + n * WIDTH + column, sums[n].to(grad.dtype.element_ty), mask=n * WIDTH + column < D)


@triton.jit(do_not_specialize=NUMBERS)
def update_latents(
    start,
    pair,
    weights,
    table,
    row_R,
    slots,
    multiplier,
    shift,
    S,
    chunk_sums,
    chunk_weights,
    extra_slot,
    extra_rows,
    weight,
    exp_avg,
    exp_avg_sq,
    operand,
    hyper,
    total_square,
    seed,
    TABLE_DP: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    HAS_OPERAND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One program per latent."""
    if is_finite(total_square) == 0:
        return
    j = tl.program_id(0).to(tl.int64)
    sums, _ = _sum_segment(
        j,
        start,
        pair,
        weights,
        table,
        row_R,
        slots,
        multiplier,
        shift,
        S,
        chunk_sums,
        chunk_weights,
        extra_slot,
        extra_rows,
        D,
        TABLE_DP,
        BY_ROW,
        HAS_SLOT,
        HAS_EXTRA,
        WIDTH,
        CHUNKS,
        CHUNK,
        UNROLL,
    )
    update_row_in_registers(
        j, sums, weight, exp_avg, exp_avg_sq, operand, hyper, total_square, seed, D, DP, WIDTH, CHUNKS, UNIT_NORM, HAS_OPERAND, STOCHASTIC
    )

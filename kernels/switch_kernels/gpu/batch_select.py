"""Which latents a whole batch takes, and what they are weighed with: selection under one threshold that no kernel needs the host for.

The threshold is the smallest of the `count` largest values of all tokens, of which each may offer its `most` largest. So first every row finds its
own largest (`row_candidates`), then the threshold is found among these (`threshold_`), then what reaches it moves to the front (`keep_above`).

Only `threshold_` is atomic, on integers: their sums are the same in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2

MOST_COLUMNS = 8192
"""Candidates of a row that `row_candidates` holds in registers."""
ONE_WARP = 1024
"""Longest row of one warp, whose sums need no shared memory: 32 keys in each lane's registers. Longer rows have 16."""
DIGITS = ((20, 11), (10, 10), (0, 10))
"""(lowest bit, bits) of the digits by which `threshold_` looks for a positive float32; the first holds the exponent."""
COUNTED, COUNTERS = 2048, 512
"""Values that a program of `threshold_` counts at once, and how many programs there are at most: each adds to the counts once."""
MOVED = 1024
"""Slots that a program of `keep_above` moves."""


def row_candidates(pre_NC: Tensor, order_N: Tensor, tokens: int, most: int) -> tuple[Tensor, Tensor]:
    """(values float32 [tokens, most], columns int32 [tokens, most]) in token order: of each row the `most` largest values above 0.

    They come in rising order of columns; a tie goes to the lowest. Slots that are not in use hold 0 and column 0. pre_NC is float32 with rows of any
    stride, order_N (int32) the token of each row or -1; every token has one row. NaN is not above 0. ValueError for more than `MOST_COLUMNS` columns.
    """
    rows, columns = pre_NC.shape
    if columns > MOST_COLUMNS or pre_NC.stride(1) != 1:
        raise ValueError(f"pre_NC has {columns} columns of stride {pre_NC.stride(1)}; at most {MOST_COLUMNS}, of stride 1, fit the registers.")
    parts = 4 if most < 256 else 2
    width = max(4, next_power_of_2(columns))
    values_TL = torch.empty(tokens, most, dtype=torch.float32, device=pre_NC.device)
    columns_TL = torch.empty(tokens, most, dtype=torch.int32, device=pre_NC.device)
    launch(
        _row_candidates,
        (rows,),
        *(pre_NC, order_N, values_TL, columns_TL),
        columns,
        pre_NC.stride(0),
        most,
        SLOTS=next_power_of_2(most),
        WIDTH=width // parts,
        PARTS=parts,
        num_warps=1 if width <= ONE_WARP else width // 512,
        num_stages=1,
    )
    return values_TL, columns_TL


@triton.jit
def _keys(values):
    """int32 in the order of the values above 0; 0 for all others, and for NaN."""
    return tl.where(values > 0, values.to(tl.int32, bitcast=True), 0)


@triton.jit
def _reaching(numbers, bound):
    """How many of the numbers in [0, 2^31), in rows, reach `bound`: two instructions each, where a sum of comparisons becomes four."""
    return numbers.numel + tl.sum(tl.sum((numbers - bound) >> 31, axis=0), axis=0)


@triton.jit(do_not_specialize=["C", "P", "K"])
def _row_candidates(pre_NC, order_N, values_TL, columns_TL, C, P, K, SLOTS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """One row, in PARTS parts of WIDTH columns. Its K-th largest key lies in [low, high): `count` >= K keys reach `low`, fewer reach `high`.

    The interval is halved as numbers at first, which soon tells apart values of like size, then as bits, which ends after 31 times. P is not
    specialized, so that loads and stores have the same layout: columns next to each other in the lanes of a warp.
    """
    n = tl.program_id(0).to(tl.int64)
    token = tl.load(order_N + n).to(tl.int64)
    if token >= 0:
        part = tl.arange(0, PARTS)[:, None]
        i = tl.arange(0, WIDTH)[None, :]
        c = part * WIDTH + i
        key = _keys(tl.load(pre_NC + n * P + i + part * WIDTH, mask=c < C, other=0.0))
        low = tl.full((), 1, tl.int32)
        high = tl.max(tl.max(key, axis=0), axis=0) + 1
        count = _reaching(key, low)
        step = 0
        while (count > K) & (high - low > 1):
            finite = tl.minimum(high, 0x7F7FFFFF).to(tl.float32, bitcast=True)
            middle = (0.5 * low.to(tl.float32, bitcast=True) + 0.5 * finite).to(tl.int32, bitcast=True)
            middle = tl.where(step < 12, middle, low + (high - low) // 2)
            middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
            reached = _reaching(key, middle)
            enough = reached >= K
            low = tl.where(enough, middle, low)
            count = tl.where(enough, reached, count)
            high = tl.where(enough, high, middle)
            step += 1
        if count > K:  # all that reach `low` but not `high` are the same: the first `room` of them stay, those before column `end`
            room = K - _reaching(key, high)
            tie = tl.where(key == low, c, PARTS * WIDTH)
            begin = 0
            end = PARTS * WIDTH
            while end - begin > 1:
                middle = (begin + end) // 2
                enough = PARTS * WIDTH - _reaching(tie, middle) >= room
                end = tl.where(enough, middle, end)
                begin = tl.where(enough, begin, middle)
            key = tl.where((key == low) & (c >= end), 0, key)
            count = K
        # of every part the sums so far in bits of their own, which hold K
        BITS: tl.constexpr = 32 // PARTS
        keep = key >= low
        kept = tl.sum(keep.to(tl.int32) << (BITS * part), axis=0)
        places = tl.cumsum(kept, 0)
        total = tl.sum(kept, axis=0)
        for p in tl.static_range(1, PARTS):
            places += total << (BITS * p)
        place = ((places[None, :] >> (BITS * part)) & ((1 << BITS) - 1)) - 1
        values_TL += token * K
        columns_TL += token * K
        tl.store(values_TL + place, key.to(tl.float32, bitcast=True), mask=keep)
        tl.store(columns_TL + place, c, mask=keep)
        slot = tl.arange(0, SLOTS)
        rest = (slot >= count) & (slot < K)
        tl.store(values_TL + slot, tl.zeros((SLOTS,), tl.float32), mask=rest)
        tl.store(columns_TL + slot, tl.zeros((SLOTS,), tl.int32), mask=rest)


def threshold_(theta: Tensor, values: Tensor, count: int, numbers: Tensor | None = None) -> None:
    """In place: theta (float32 scalar) = the smallest of the `count` largest values above 0, or of all above 0 if fewer are. If none is, it stays.

    `values` is float32; given `numbers` (int32) only so many of them as their sum. A radix select: each pass counts the values that agree with the
    digits so far by their next digit, which the program that finishes last decides. ValueError for more than 2^30 values.
    """
    size, of_pass = values.numel(), 3 + max(1 << bits for _, bits in DIGITS)
    if size > 1 << 30:  # steps through them are counted in 32 bits
        raise ValueError(f"{size} values hold too many to count: at most 2^30. Use a smaller batch.")
    state = torch.zeros(len(DIGITS) * of_pass, dtype=torch.int32, device=values.device)
    for digit, (shift, bits) in enumerate(DIGITS):
        launch(
            _count_digits,
            (min(COUNTERS, cdiv(size, COUNTED)),),
            *(values.contiguous(), numbers, state, theta),
            size,
            count,
            DIGIT=digit,
            SHIFT=shift,
            BITS=bits,
            STATE=of_pass,
            BLOCK=COUNTED,
            num_warps=4,
            num_stages=1,
        )


@triton.jit(do_not_specialize=["size", "count"])
def _count_digits(
    values, numbers, state, theta, size, count, DIGIT: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr
):
    """One digit. The state of a pass: programs that are done, the digits found (-1: nothing is above 0), how many largest of those that agree with
    them to look for, counts by digit.
    """
    state += DIGIT * STATE
    prefix = 0
    if DIGIT > 0:
        prefix = tl.load(state - STATE + 1)
    if numbers is not None:
        size = tl.load(numbers) + tl.load(numbers + 1)
    digit = tl.arange(0, 1 << BITS)
    counts = tl.zeros((1 << BITS,), tl.int32)
    for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        key = _keys(tl.load(values + i, mask=i < size, other=0.0))
        agrees = key > 0
        if DIGIT > 0:
            agrees = agrees & ((key >> (SHIFT + BITS)) == prefix)
        counts += tl.histogram((key >> SHIFT) & ((1 << BITS) - 1), 1 << BITS, mask=agrees)
    tl.atomic_add(state + 3 + digit, counts, mask=counts > 0, sem="relaxed")
    tl.debug_barrier()  # all lanes have added before the first lane says so
    if tl.atomic_add(state, 1) == tl.num_programs(0) - 1:
        counts = tl.load(state + 3 + digit, cache_modifier=".cg")  # from L2, where atomics are done
        total = tl.sum(counts, axis=0)
        wanted = tl.minimum(total, count)
        if DIGIT > 0:
            wanted = tl.load(state - STATE + 2)
        reached = total - tl.cumsum(counts, 0) + counts
        found = tl.max(tl.where((reached >= wanted) & (wanted > 0), digit, -1), axis=0)
        tl.store(state + 2, wanted - tl.sum(tl.where(digit > found, counts, 0), axis=0))
        prefix = tl.where(found < 0, -1, (prefix << BITS) + found)
        tl.store(state + 1, prefix)
        if SHIFT == 0:
            tl.store(theta, prefix.to(tl.float32, bitcast=True), mask=prefix >= 0)


def keep_above(
    values_TL: Tensor, columns_TL: Tensor, theta: Tensor, strict_from: int, expert_T: Tensor, shared: int, F: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(values float32 [T, L], latents int32 [T, L], count int32 [T]): what is above 0 and >= theta, from token `strict_from` on > theta.

    It moves to the front in the same order; 0 and latent 0 stay behind. Column c of a row of `row_candidates` is latent c below `shared`, else latent
    c + expert_T[t] * F; expert_T is int32.
    """
    tokens, slots = values_TL.shape
    width = next_power_of_2(slots)
    rows = max(1, MOVED // width)
    kept_TL, latents_TL = torch.empty_like(values_TL), torch.empty_like(columns_TL)
    count_T = torch.empty(tokens, dtype=torch.int32, device=values_TL.device)
    launch(
        _keep_above,
        (cdiv(tokens, rows),),
        *(values_TL, columns_TL, theta, expert_T, kept_TL, latents_TL, count_T),
        *(tokens, slots, strict_from, shared, F),
        ROWS=rows,
        WIDTH=width,
        num_warps=4,
        num_stages=1,
    )
    return kept_TL, latents_TL, count_T


@triton.jit(do_not_specialize=["T", "strict_from", "shared", "F"])
def _keep_above(
    values_TL, columns_TL, theta, expert_T, kept_TL, latents_TL, count_T, T, L, strict_from, shared, F, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, WIDTH)[None, :]
    live = (t < T)[:, None] & (slot < L)
    first = (t.to(tl.int64) * L)[:, None]
    value = tl.load(values_TL + first + slot, mask=live, other=0.0)
    column = tl.load(columns_TL + first + slot, mask=live, other=0)
    expert = tl.load(expert_T + t, mask=t < T, other=0)
    bound = tl.load(theta)
    keep = (value > 0) & ((value > bound) | ((value == bound) & (t < strict_from)[:, None]))
    kept = keep.to(tl.int32)
    before = tl.cumsum(kept, 1) - kept
    count = tl.sum(kept, axis=1)
    place = tl.where(keep, before, count[:, None] + slot - before)
    latent = tl.where(column < shared, column, column + expert[:, None] * F)
    tl.store(kept_TL + first + place, tl.where(keep, value, 0.0), mask=live)
    tl.store(latents_TL + first + place, tl.where(keep, latent, 0), mask=live)
    tl.store(count_T + t, count, mask=t < T)

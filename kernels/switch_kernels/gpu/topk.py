"""Exact top-k of pre-activations: ties go to the lowest index, so the result does not depend on the device, the tiling or the run.

A value and its index are packed into one integer whose order is value descending, index ascending; the largest integers are then the answer. A
bfloat16 value and an index below 2^16 fit 32 bits; all else takes 64. Selection is on the stored pre-activations: in bfloat16, on rounded ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2

NARROW_KEYS = 1024
"""32-bit keys that one warp sorts in registers."""
WIDE_KEYS = 256
"""64-bit keys that one warp sorts in registers; twice as many spill."""
MAX_GROUP = 64
"""Largest group; the product that writes group maxima needs whole groups in its tiles."""
MAX_CANDIDATES = 2048
"""Most columns that the second level of `select_rows` sorts."""
KEEP_WIDTH = 1024
"""Columns that `keep_topk_` reads at once, of rows of any length: one kernel, whatever the number of dead latents."""


def _padded_k(k: int) -> int:
    return max(2, next_power_of_2(k))


def group_of(F: int, k: int) -> int:
    """Columns per group maximum for `select_rows`: the power of two that sorts fewest keys, cdiv(F, G) maxima then G * k columns; 1 for no groups.

    The k groups with the largest maxima hold the k largest columns, ties included: a column outside them is beaten by, or ties with and comes
    after, the maximum of each. At least next_power_of_2(k) groups remain.
    """
    k2 = _padded_k(k)
    best, fewest = 1, next_power_of_2(F)
    group = 2
    while group <= MAX_GROUP and k2 * group <= MAX_CANDIDATES and cdiv(F, group) >= k2:
        keys = next_power_of_2(cdiv(F, group)) + k2 * group
        if keys < fewest or (keys == fewest and best > 1):
            best, fewest = group, keys
        group *= 2
    return best


def select_rows(pre_NF: Tensor, group_max_NG: Tensor, F: int, group: int, expert_TS: Tensor, row_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the F pre-activations of every pair's row: values_RK (relu applied, dtype of pre_NF) and indices_RK (int32, expert * F +
    column).

    Descending by value, then ascending by index; selected before the relu, so rows with fewer than k positive entries end in zeros. With group > 1,
    group_max_NG[n, g] must be the exact maximum of columns g * group to (g + 1) * group - 1 of row n as stored; with group 1 it is not read.
    """
    groups = cdiv(F, group)
    padded = _padded_k(k)
    if not 1 <= k <= F:
        raise ValueError(f"k={k} must lie between 1 and the number of latents per expert, {F}.")
    if group > 1 and groups < padded:
        raise ValueError(f"group={group} leaves {groups} groups of {F} latents; k={k} needs at least {padded}: use group_of(F, k).")
    float32 = pre_NF.dtype != torch.bfloat16
    first_length = groups if group > 1 else F
    by_position = not float32 and group > 1 and F > 1 << 16
    wide_first = float32 or first_length > 1 << 16
    first_keys = WIDE_KEYS if wide_first else NARROW_KEYS
    second_keys = WIDE_KEYS if float32 else NARROW_KEYS // 2 if by_position else NARROW_KEYS
    warps = min(16, max(cdiv(2 * padded, first_keys), cdiv(padded * group, second_keys) if group > 1 else 1))
    chunk = max(padded, min(next_power_of_2(first_length), first_keys * warps))
    pairs = row_R.shape[0]
    values_RK = torch.empty(pairs, k, dtype=pre_NF.dtype, device=pre_NF.device)
    indices_RK = torch.empty(pairs, k, dtype=torch.int32, device=pre_NF.device)
    launch(
        _select_rows,
        (pairs,),
        pre_NF,
        group_max_NG,
        expert_TS,
        row_R,
        values_RK,
        indices_RK,
        F,
        pre_NF.stride(0),
        groups,
        group_max_NG.stride(0),
        G=group,
        K=k,
        K2=padded,
        CHUNK=chunk,
        ONE_CHUNK=first_length <= chunk,
        WIDE_FIRST=wide_first,
        WIDE_SECOND=float32,
        BY_POSITION=by_position,
        num_warps=warps,
    )
    return values_RK, indices_RK


@triton.jit
def _sortable(bits):
    """int32 whose signed order is the order of the floats with these bits; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _pack(value, index, real, WIDE: tl.constexpr):
    """Keys that sort by value descending (a NaN of either sign first), then index ascending; what is not real sorts last."""
    value = value.to(tl.float32)
    key = _sortable(tl.where(value == value, value, float("nan")).to(tl.int32, bitcast=True))
    if WIDE:
        packed = (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
        return tl.where(real, packed, -0x8000000000000000)
    else:
        return tl.where(real, (key & -0x10000) | (0xFFFF - index), -0x80000000)


@triton.jit
def _index_of(key, WIDE: tl.constexpr):
    if WIDE:
        return 0x7FFFFFFF - key.to(tl.int32)
    else:
        return 0xFFFF - (key & 0xFFFF)


@triton.jit
def _value_of(key, WIDE: tl.constexpr):
    """The float32 value of a key."""
    if WIDE:
        return _sortable((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        return (_sortable(key) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _top_keys(row, length, K2: tl.constexpr, CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """The K2 largest keys of `length` values, descending: CHUNK at a time, each chunk's best merged with the best so far."""
    i = tl.arange(0, CHUNK)
    if ONE_CHUNK:
        top = tl.topk(_pack(tl.load(row + i, mask=i < length, other=0.0), i, i < length, WIDE), K2)
    else:
        nothing = tl.arange(0, K2)
        top = _pack(nothing, nothing, nothing < 0, WIDE)
        for first in range(0, length, CHUNK):
            j = first + i
            more = tl.topk(_pack(tl.load(row + j, mask=j < length, other=0.0), j, j < length, WIDE), K2)
            top = tl.topk(tl.reshape(tl.join(top, more), (2 * K2,)), K2)
    return top


@triton.jit(do_not_specialize=["F", "groups"])
def _select_rows(
    pre_NF,
    group_max_NG,
    expert_R,
    row_R,
    values_RK,
    indices_RK,
    F,
    FP,
    groups,
    GP,
    G: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    WIDE_FIRST: tl.constexpr,
    WIDE_SECOND: tl.constexpr,
    BY_POSITION: tl.constexpr,
):
    """One pair."""
    r = tl.program_id(0).to(tl.int64)
    n = tl.load(row_R + r).to(tl.int64)
    offset = tl.load(expert_R + r) * F
    pre = pre_NF + n * FP
    if G > 1:
        best = _index_of(_top_keys(group_max_NG + n * GP, groups, K2, CHUNK, ONE_CHUNK, WIDE_FIRST), WIDE_FIRST)
        if BY_POSITION:
            best = tl.sort(best)
        g = tl.arange(0, G)
        column = best[:, None] * G + g[None, :]
        # among groups in ascending order, positions order like columns, and fit a narrow key where columns do not
        rank = tl.arange(0, K2)[:, None] * G + g[None, :] if BY_POSITION else column
        keys = _pack(tl.load(pre + column, mask=column < F, other=0.0), rank, column < F, WIDE_SECOND)
        top = tl.topk(tl.reshape(keys, (K2 * G,)), K2)
        index = _index_of(top, WIDE_SECOND)
        if BY_POSITION:
            index = tl.gather(best, index // G, 0) * G + index % G
        value = _value_of(top, WIDE_SECOND)
    else:
        top = _top_keys(pre, F, K2, CHUNK, ONE_CHUNK, WIDE_FIRST)
        index = _index_of(top, WIDE_FIRST)
        value = _value_of(top, WIDE_FIRST)
    i = tl.arange(0, K2)
    # where, not maximum: a NaN stays a NaN
    relu = tl.where(value < 0, 0.0, value)
    tl.store(values_RK + r * K + i, relu.to(values_RK.dtype.element_ty), mask=i < K)
    tl.store(indices_RK + r * K + i, offset + index, mask=i < K)


def select_jointly(values_RK: Tensor, indices_RK: Tensor, gate_TS: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the S * K' candidates of a token the k with the largest gate * value (in float32): values_TK (without gate), indices_TK and slot_TK, int32.

    values_RK and indices_RK are `select_rows`' for the pairs r = t * S + s, K' candidates each. Descending, ties to the lowest candidate.
    """
    tokens, slots = gate_TS.shape
    per_slot = values_RK.shape[1]
    candidates = slots * per_slot
    if not 1 <= k <= candidates:
        raise ValueError(f"k={k} must lie between 1 and the candidates of a token, {slots} slots x {per_slot}.")
    padded = _padded_k(k)
    width = max(padded, next_power_of_2(candidates))
    values_TK = torch.empty(tokens, k, dtype=values_RK.dtype, device=values_RK.device)
    indices_TK = torch.empty(tokens, k, dtype=torch.int32, device=values_RK.device)
    slot_TK = torch.empty(tokens, k, dtype=torch.int32, device=values_RK.device)
    launch(
        _select_jointly,
        (tokens,),
        values_RK,
        indices_RK,
        gate_TS,
        values_TK,
        indices_TK,
        slot_TK,
        S=slots,
        PER_SLOT=per_slot,
        K=k,
        K2=padded,
        WIDTH=width,
        num_warps=min(16, cdiv(width, WIDE_KEYS)),
    )
    return values_TK, indices_TK, slot_TK


@triton.jit
def _select_jointly(
    values_RK,
    indices_RK,
    gate_TS,
    values_TK,
    indices_TK,
    slot_TK,
    S: tl.constexpr,
    PER_SLOT: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    real = c < S * PER_SLOT
    first = t * (S * PER_SLOT)
    value = tl.load(values_RK + first + c, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(gate_TS + t * S + c // PER_SLOT, mask=real, other=0.0)
    chosen = _index_of(tl.topk(_pack(gate * value, c, real, True), K2), True)
    i = tl.arange(0, K2)
    live = i < K
    tl.store(values_TK + t * K + i, tl.load(values_RK + first + chosen, mask=live, other=0.0), mask=live)
    tl.store(indices_TK + t * K + i, tl.load(indices_RK + first + chosen, mask=live, other=0), mask=live)
    tl.store(slot_TK + t * K + i, chosen // PER_SLOT, mask=live)


def keep_topk_(z_NF: Tensor, F: int, k: int, order_N: Tensor | None = None) -> None:
    """In place, in every row: relu, then all but the k largest of the first F columns to 0 (ties to the lowest), and the columns after F to 0.

    The k-th largest value is found by bisection on the bits, so the cost hardly depends on k. Given order_N, rows that it marks as padding are
    zeroed instead.
    """
    if not 1 <= k <= F:
        raise ValueError(f"k={k} must lie between 1 and the number of latents per expert, {F}.")
    bits = 15 if z_NF.dtype == torch.bfloat16 else 31
    order, padded = (z_NF, False) if order_N is None else (order_N, True)
    launch(_keep_topk, (z_NF.shape[0],), z_NF, order, F, z_NF.shape[1], k, PADDED=padded, BITS=bits, WIDTH=KEEP_WIDTH, num_warps=4)


@triton.jit
def _magnitudes(z, real, BITS: tl.constexpr):
    """Bits of relu(z) as int32, in the order of the values and BITS long; -1 where not real."""
    z = z.to(tl.float32)
    bits = tl.where(z < 0, 0.0, z).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(real, bits >> (31 - BITS), -1)


@triton.jit
def _from_magnitudes(key, BITS: tl.constexpr):
    return (key << (31 - BITS)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["F", "K"])
def _keep_topk(z_NF, order_N, F, FP, K, PADDED: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """One row, read once for every bit of the k-th largest value, WIDTH columns at a time; after the first time it lies in the L1 cache."""
    n = tl.program_id(0).to(tl.int64)
    row = z_NF + n * FP
    i = tl.arange(0, WIDTH)
    live = True
    if PADDED:
        live = tl.load(order_N + n) >= 0
    if live:
        # `count` >= K keys reach threshold, `above` < K keys reach threshold + 2 * bit; with count == K the answer is known early
        threshold = 0
        count = F
        above = 0
        bit = 1 << (BITS - 1)
        while (bit > 0) & (count != K):
            upper = threshold + bit
            reached = tl.zeros((WIDTH,), tl.int32)
            for first in range(0, F, WIDTH):
                key = _magnitudes(tl.load(row + first + i, mask=first + i < F, other=0.0), first + i < F, BITS)
                reached += (key >= upper).to(tl.int32)
            larger = tl.sum(reached, axis=0)
            enough = larger >= K
            threshold = tl.where(enough, upper, threshold)
            count = tl.where(enough, larger, count)
            above = tl.where(enough, above, larger)
            bit = bit >> 1
        room = tl.where(count == K, F, K - above)
        ties = 0
        for first in range(0, FP, WIDTH):
            column = first + i
            key = _magnitudes(tl.load(row + column, mask=column < F, other=0.0), column < F, BITS)
            tie = (key == threshold).to(tl.int32)
            rank = ties + tl.cumsum(tie, 0)
            keep = (key > threshold) | ((tie > 0) & (rank <= room))
            z = tl.where(keep, _from_magnitudes(key, BITS), 0.0)
            tl.store(row + column, z.to(z_NF.dtype.element_ty), mask=column < FP)
            ties += tl.sum(tie, axis=0)
    else:
        for first in range(0, FP, WIDTH):
            tl.store(row + first + i, tl.zeros((WIDTH,), z_NF.dtype.element_ty), mask=first + i < FP)


def mark_fired_(tokens_since_M: Tensor, values_TK: Tensor, indices_TK: Tensor, tokens: int) -> None:
    """In place: tokens_since_M (int64) += tokens, then 0 for every latent selected with a value above 0."""
    tokens_since_M += tokens
    pairs = values_TK.numel()
    launch(_mark_fired, (cdiv(pairs, 1024),), tokens_since_M, values_TK, indices_TK, pairs, BLOCK=1024)


@triton.jit(do_not_specialize=["P"])
def _mark_fired(tokens_since_M, values_P, indices_P, P, BLOCK: tl.constexpr):
    """Programs may store to one address, always the same 0."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fired = tl.load(values_P + p, mask=p < P, other=0.0).to(tl.float32) > 0
    index = tl.load(indices_P + p, mask=fired, other=0)
    tl.store(tokens_since_M + index, tl.zeros((BLOCK,), tl.int64), mask=fired)

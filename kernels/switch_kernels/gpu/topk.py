"""Exact top-k of pre-activations: ties go to the lowest index, so the result does not depend on the device, the tiling or the run.

Rows are searched, not sorted: an interval around the k-th largest value is halved, which is a short loop over values in registers, and what reaches
it moves to the front; only those k are sorted. Selection is on the stored pre-activations: in bfloat16, on rounded ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2
from switch_kernels.gpu.update import appended
from switch_kernels.plan import MOST_COLUMNS, padded_k, searched_columns

WARP_COLUMNS = 1024
"""Columns that one warp searches, 32 in the registers of each lane."""
WIDE_KEYS = 256
"""64-bit keys that one warp sorts in registers; twice as many spill."""


def select_rows(pre_NF: Tensor, group_max_NG: Tensor, F: int, group: int, expert_TS: Tensor, row_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the F pre-activations of every pair's row: values_RK (relu applied, dtype of pre_NF) and indices_RK (int32, expert * F +
    column).

    Descending by value, then ascending by index; selected before the relu, so rows with fewer than k positive entries end in zeros. With group > 1,
    group_max_NG[n, g] must be the exact maximum of columns g * group to (g + 1) * group - 1 of row n as stored; with group 1 it is not read.
    """
    groups, columns = cdiv(F, group), searched_columns(F, k, group)
    if not 1 <= k <= F:
        raise ValueError(f"k={k} must lie between 1 and the number of latents per expert, {F}.")
    if groups < k:
        raise ValueError(f"group={group} leaves {groups} groups of {F} latents; k={k} needs at least as many: use group_of(F, k).")
    if max(columns) > MOST_COLUMNS:
        raise ValueError(f"k={k} of {F} latents searches {max(columns)} columns at once, and {MOST_COLUMNS} fit the registers: use fewer.")
    pairs, parts = row_R.shape[0], 4 if k < 256 else 2
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
        k,
        group.bit_length() - 1,
        K2=padded_k(k),
        PARTS=parts,
        WIDTH=max(32, columns[0] // parts),
        BEST=max(32, columns[1] // parts) if group > 1 else 0,
        num_warps=min(16, max(1, max(columns) // WARP_COLUMNS)),
    )
    return values_RK, indices_RK


@triton.jit
def _sortable(bits):
    """int32 whose signed order is the order of the floats with these bits; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _searchable(value, SHIFT: tl.constexpr):
    """float32, where a NaN and what is infinite above 0 are the largest finite number, and -0 is 0: the sign of a difference says which is larger."""
    LARGEST: tl.constexpr = (2 - 2.0 ** (-7 if SHIFT == 16 else -23)) * 2.0**127
    value = value.to(tl.float32) + 0.0
    return tl.where(value <= LARGEST, value, LARGEST)


@triton.jit
def _key_of(value):
    """int32 in the order of the values: a NaN of either sign above all, both zeros the same."""
    value = value.to(tl.float32) + 0.0
    return _sortable(tl.where(value == value, value, float("nan")).to(tl.int32, bitcast=True))


@triton.jit
def _value_of(key, SHIFT: tl.constexpr):
    """The float32 of a key of `_interval`."""
    return _sortable(tl.where(key < 0, ((key + 1) << SHIFT) - 1, key << SHIFT)).to(tl.float32, bitcast=True)


@triton.jit
def _loaded(row, columns, length, SHIFT: tl.constexpr, PARTS: tl.constexpr):
    """The values of a row at PARTS tuples of columns; what lies at or behind `length` is minus infinity, which ties with nothing that comes after."""
    values = ()
    for part in tl.static_range(PARTS):
        values = appended(values, _searchable(tl.load(row + columns[part], mask=columns[part] < length, other=float("-inf")), SHIFT))
    return values


@triton.jit
def _above_all(values, SHIFT: tl.constexpr, PARTS: tl.constexpr):
    """A key that none of the values reaches if any is above 0."""
    largest = values[0].to(tl.int32, bitcast=True)
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, values[part].to(tl.int32, bitcast=True))
    return (tl.max(largest, axis=0) >> SHIFT) + 1


@triton.jit
def _reaching(values, bound, PARTS: tl.constexpr):
    """How many values reach `bound`: two instructions each, where a sum of comparisons becomes four."""
    below = (values[0] - bound).to(tl.int32, bitcast=True) >> 31
    for part in tl.static_range(1, PARTS):
        below += (values[part] - bound).to(tl.int32, bitcast=True) >> 31
    return PARTS * values[0].numel + tl.sum(below, axis=0)


@triton.jit
def _narrowed(values, K, middle, bound, low, high, count, above, PARTS: tl.constexpr):
    """The half of an interval that begins or ends in the middle, whose value is `bound`."""
    reached = _reaching(values, bound, PARTS)
    enough = reached >= K
    return tl.where(enough, middle, low), tl.where(enough, high, middle), tl.where(enough, reached, count), tl.where(enough, above, reached)


@triton.jit
def _interval(values, K, low, high, SHIFT: tl.constexpr, PARTS: tl.constexpr):
    """(low, high, count, above), of keys: `count` >= K of the values reach `low`, and `above` < K of them reach `high`. Either count is K, or all
    values that reach `low` but not `high` are equal.

    A key is a float32's bits in the order of the values, or the upper half of them for bfloat16. Given are a `low` > 0 where the search begins, above
    which there may also be too few, and a `high` that no value reaches unless it is below 0. Numbers above 0 are halved as numbers, which tells those
    of like size apart sooner than bits do.
    """
    count = _reaching(values, (low << SHIFT).to(tl.float32, bitcast=True), PARTS)
    above = 0
    while (count > K) & (high - low > 1):
        # of the last key below `high`, which is a number
        mean = 0.5 * (low << SHIFT).to(tl.float32, bitcast=True) + 0.5 * ((high - 1) << SHIFT).to(tl.float32, bitcast=True)
        middle = tl.minimum(tl.maximum(mean.to(tl.int32, bitcast=True) >> SHIFT, low + 1), high - 1)
        bound = (middle << SHIFT).to(tl.float32, bitcast=True)
        low, high, count, above = _narrowed(values, K, middle, bound, low, high, count, above, PARTS)
    if count < K:
        above = count
        high = low
        low = ~(0x7F800000 >> SHIFT)  # minus infinity
        count = PARTS * values[0].numel
        while (count > K) & (high - low > 1):
            middle = low + (high - low) // 2
            low, high, count, above = _narrowed(values, K, middle, _value_of(middle, SHIFT), low, high, count, above, PARTS)
    return low, high, count, above


@triton.jit
def _store_places(found, columns, values, K, low, high, SHIFT: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Writes the columns of the K largest of the values, PARTS tuples of WIDTH, in their order, in which a tie goes to the first; returns a key that
    all of them reach.
    """
    low, high, count, above = _interval(values, K, low, high, SHIFT, PARTS)
    i = tl.arange(0, WIDTH)
    end = PARTS * WIDTH
    if count > K:  # of what reaches `low` but not `high`, the first K - above stay, those before position `end`; else all do
        begin = 0
        while end - begin > 1:
            middle = (begin + end) // 2
            ties = tl.zeros((WIDTH,), tl.int32)
            for part in tl.static_range(PARTS):
                tie = (values[part] >= _value_of(low, SHIFT)) & (values[part] < _value_of(high, SHIFT))
                ties += (tie & (part * WIDTH + i < middle)).to(tl.int32)
            enough = tl.sum(ties, axis=0) >= K - above
            end = tl.where(enough, middle, end)
            begin = tl.where(enough, begin, middle)
    # of every part the sums so far in bits of their own, which hold K
    BITS: tl.constexpr = 32 // PARTS
    keeps = ()
    kept = tl.zeros((WIDTH,), tl.int32)
    for part in tl.static_range(PARTS):
        keep = (values[part] >= _value_of(low, SHIFT)) & ((values[part] >= _value_of(high, SHIFT)) | (part * WIDTH + i < end))
        keeps = appended(keeps, keep)
        kept += keep.to(tl.int32) << (BITS * part)
    places = tl.cumsum(kept, 0)
    total = tl.sum(kept, axis=0)
    for part in tl.static_range(1, PARTS):
        places += total << (BITS * part)
    for part in tl.static_range(PARTS):
        tl.store(found + (((places >> (BITS * part)) & ((1 << BITS) - 1)) - 1), columns[part], mask=keeps[part])
    return low


@triton.jit(do_not_specialize=["F", "groups", "K", "FP", "GP", "log_G"])
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
    K,
    log_G,
    K2: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BEST: tl.constexpr,
):
    """One pair. What was found so far lies in its row of indices_RK, in rising order; all lanes read it there.

    No stride and no size of groups is known to the compiler, so that all it loads and stores has one layout.
    """
    SHIFT: tl.constexpr = 16 if pre_NF.dtype.element_ty == tl.bfloat16 else 0
    r = tl.program_id(0).to(tl.int64)
    n = tl.load(row_R + r).to(tl.int64)
    pre = pre_NF + n * FP
    found = indices_RK + r * K
    columns = ()
    for part in tl.static_range(PARTS):
        columns = appended(columns, part * WIDTH + tl.arange(0, WIDTH))
    values = _loaded(group_max_NG + n * GP if BEST else pre, columns, groups, SHIFT, PARTS)
    low = _store_places(found, columns, values, K, tl.full((), 1, tl.int32), _above_all(values, SHIFT, PARTS), SHIFT, PARTS, WIDTH)
    tl.debug_barrier()
    if BEST:
        columns = ()
        for part in tl.static_range(PARTS):
            candidate = part * BEST + tl.arange(0, BEST)
            live = candidate < (K << log_G)
            column = (tl.load(found + (candidate >> log_G), mask=live, other=0) << log_G) + (candidate & ((1 << log_G) - 1))
            columns = appended(columns, tl.where(live, column, F))
        values = _loaded(pre, columns, F, SHIFT, PARTS)
        tl.debug_barrier()  # all lanes have read the groups that columns now replace
        # the maxima's K-th largest is a first bound for that of the columns; their largest is none, as a maximum hides a NaN
        _store_places(found, columns, values, K, tl.maximum(low, 1), _above_all(values, SHIFT, PARTS), SHIFT, PARTS, BEST)
        tl.debug_barrier()
    slot = tl.arange(0, K2)
    live = slot < K
    column = tl.load(found + slot, mask=live, other=0)
    key = _key_of(tl.load(pre + column, mask=live, other=0.0))
    if SHIFT == 16:
        key = tl.sort(tl.where(live, (key & -0x10000) | (0xFFFF - slot), -0x80000000), descending=True)
        origin = 0xFFFF - (key & 0xFFFF)
    else:
        wide = (key.to(tl.int64) << 32) | (0x7FFFFFFF - slot).to(tl.int64)
        wide = tl.sort(tl.where(live, wide, -0x8000000000000000), descending=True)
        origin = 0x7FFFFFFF - wide.to(tl.int32)
        key = (wide >> 32).to(tl.int32)
    column = tl.load(found + origin, mask=live, other=0)
    value = (tl.maximum(key, 0) >> SHIFT << SHIFT).to(tl.float32, bitcast=True)  # relu: a NaN stays a NaN
    tl.debug_barrier()  # all lanes have read the columns that indices now replace
    tl.store(values_RK + r * K + slot, value.to(values_RK.dtype.element_ty), mask=live)
    tl.store(found + slot, tl.load(expert_R + r) * F + column, mask=live)


def select_jointly(values_RK: Tensor, indices_RK: Tensor, gate_TS: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the S * K' candidates of a token the k with the largest gate * value (in float32): values_TK (without gate), indices_TK and slot_TK, int32.

    values_RK and indices_RK are `select_rows`' for the pairs r = t * S + s, K' candidates each. Descending, ties to the lowest candidate.
    """
    tokens, slots = gate_TS.shape
    per_slot = values_RK.shape[1]
    candidates = slots * per_slot
    if not 1 <= k <= candidates:
        raise ValueError(f"k={k} must lie between 1 and the candidates of a token, {slots} slots x {per_slot}.")
    padded = padded_k(k)
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
    key = _key_of(gate * value)
    keys = tl.where(real, (key.to(tl.int64) << 32) | (0x7FFFFFFF - c).to(tl.int64), -0x8000000000000000)
    chosen = 0x7FFFFFFF - tl.topk(keys, K2).to(tl.int32)
    i = tl.arange(0, K2)
    live = i < K
    tl.store(values_TK + t * K + i, tl.load(values_RK + first + chosen, mask=live, other=0.0), mask=live)
    tl.store(indices_TK + t * K + i, tl.load(indices_RK + first + chosen, mask=live, other=0), mask=live)
    tl.store(slot_TK + t * K + i, chosen // PER_SLOT, mask=live)


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

"""What an encoder that chose for a whole batch has to learn: what it left out (`missed_rows`), and gradients of both losses (`encoder_weights`).

Both are in token order with a fixed number of slots for each token, those of `batch_select.keep_above` and one more for what was missed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2

TILE = 1024
"""Slots that a program of `encoder_weights` weighs; numbers that one program adds at a time."""


def missed_rows(
    left_NC: Tensor,
    order_N: Tensor,
    tokens: int,
    expert_T: Tensor,
    theta: Tensor,
    centred_ND: Tensor,
    row_T: Tensor | None,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    shared: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Of each row of left_NC the largest candidate j, if it is above theta: out = (latent j, W_enc[j] . centred + b_enc[j], left_NC[n, j]); else 0s.

    `out` (int32 latents, float32 values, float32 wanted) are vectors of any stride in token order; entries from `tokens` on become 0. left_NC is
    float32, order_N the token of each row or -1, expert_T (int32) the expert of each. Row row_T[t] (int32; None: the row of left_NC) of centred_ND is
    token t's; it and W_enc_MD are float32 or bfloat16, and columns that only one of them has are padding. Products are added up in float32. A tie
    goes to the lowest candidate; a row that holds a NaN has none.
    """
    latents, values, wanted = out
    rows, columns = left_NC.shape
    depth = min(centred_ND.shape[1], W_enc_MD.shape[1])
    width = min(256, next_power_of_2(columns))
    launch(
        _missed_rows,
        (rows + cdiv(len(latents) - tokens, width),),
        *(left_NC, order_N, expert_T, theta, centred_ND, row_T, W_enc_MD, b_enc_M, latents, values, wanted),
        *(rows, columns, left_NC.stride(0), shared, columns - shared, tokens, len(latents)),
        *(centred_ND.stride(0), W_enc_MD.stride(0), depth, latents.stride(0), values.stride(0), wanted.stride(0)),
        WIDTH=width,
        DEPTH=min(256, next_power_of_2(depth)),
        num_warps=1,
        num_stages=1,
    )


@triton.jit(do_not_specialize=["N", "C", "shared", "F", "n_tokens", "T", "D", "latent_step", "value_step", "wanted_step"])
def _missed_rows(
    left_NC,
    order_N,
    expert_T,
    theta,
    centred_ND,
    row_T,
    W_enc_MD,
    b_enc_M,
    latents,
    values,
    wanted,
    N,
    C,
    CP,
    shared,
    F,
    n_tokens,
    T,
    DP,
    WP,
    D,
    latent_step,
    value_step,
    wanted_step,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One row; the programs after the last row write WIDTH zeros each."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    if n < N:
        token = tl.load(order_N + n).to(tl.int64)
        if token >= 0:
            best_W = tl.full((WIDTH,), -float("inf"), tl.float32)
            at_W = tl.zeros((WIDTH,), tl.int32)
            broken_W = tl.zeros((WIDTH,), tl.int32)
            for first in range(0, C, WIDTH):
                left = tl.load(left_NC + n * CP + first + i, mask=first + i < C, other=-float("inf"))
                at_W = tl.where(left > best_W, first + i, at_W)
                best_W = tl.where(left > best_W, left, best_W)
                broken_W |= (left != left).to(tl.int32)
            best = tl.max(best_W, axis=0)
            column = tl.min(tl.where(best_W == best, at_W, C), axis=0)
            latent = 0
            value = 0.0
            found = (best > tl.load(theta)) & (tl.max(broken_W, axis=0) == 0)
            if found:
                latent = tl.where(column < shared, column, column + tl.load(expert_T + token) * F)
                row = n
                if row_T is not None:
                    row = tl.load(row_T + token).to(tl.int64)
                product = tl.zeros((DEPTH,), tl.float32)
                for first in range(0, D, DEPTH):
                    d = first + tl.arange(0, DEPTH)
                    x = tl.load(centred_ND + row * DP + d, mask=d < D, other=0.0).to(tl.float32)
                    product += x * tl.load(W_enc_MD + latent.to(tl.int64) * WP + d, mask=d < D, other=0.0).to(tl.float32)
                value = tl.sum(product, axis=0) + tl.load(b_enc_M + latent)
            tl.store(latents + token * latent_step, latent)
            tl.store(values + token * value_step, value)
            tl.store(wanted + token * wanted_step, tl.where(found, best, 0.0))
    else:
        t = n_tokens + (n - N) * WIDTH + i
        tl.store(latents + t * latent_step, tl.zeros((WIDTH,), tl.int32), mask=t < T)
        tl.store(values + t * value_step, tl.zeros((WIDTH,), tl.float32), mask=t < T)
        tl.store(wanted + t * wanted_step, tl.zeros((WIDTH,), tl.float32), mask=t < T)


def encoder_weights(
    values_TL: Tensor,
    refitted_TL: Tensor,
    count_T: Tensor,
    missed_value: Tensor,
    missed_wanted: Tensor,
    tokens: int,
    missed: float,
    missed_count: int,
) -> tuple[Tensor, Tensor]:
    """(weights float32 [T, L + 1], losses float32 [2]) of the first T = `tokens` tokens: the gradients of both losses to what the encoder gave.

    match = sum_{l < count} (v - z)^2 / T, weights[t, l] = 2 (v - z) / T; missed = `missed` * sum (value - wanted)^2 / missed_count over the first
    `missed_count` tokens, weights[t, L] = 2 * `missed` * (value - wanted) / missed_count, where wanted > 0. All other weights are 0. What is behind
    `count` is not read. missed_value and missed_wanted are float32 of any stride. Sums are taken in a fixed order.
    """
    slots = values_TL.shape[1]
    width = next_power_of_2(slots)
    rows = max(1, TILE // width)
    programs = cdiv(tokens, rows)
    weights_TL = torch.empty(tokens, slots + 1, dtype=torch.float32, device=values_TL.device)
    parts_2P = torch.empty(2, programs, dtype=torch.float32, device=values_TL.device)
    losses = torch.empty(2, dtype=torch.float32, device=values_TL.device)
    of_match, of_missed = 1.0 / max(1, tokens), float(missed) / max(1, missed_count)
    launch(
        _encoder_weights,
        (programs,),
        *(values_TL, refitted_TL, count_T, missed_value, missed_wanted, weights_TL, parts_2P),
        *(tokens, slots, missed_count, missed_value.stride(0), missed_wanted.stride(0), 2.0 * of_match, 2.0 * of_missed),
        ROWS=rows,
        WIDTH=width,
        num_warps=4,
        num_stages=1,
    )
    launch(_add_losses, (2,), parts_2P, losses, programs, of_match, of_missed, TILE=TILE, num_warps=4, num_stages=1)
    return weights_TL, losses


@triton.jit(do_not_specialize=["T", "missed_count", "value_step", "wanted_step"])
def _encoder_weights(
    values_TL,
    refitted_TL,
    count_T,
    missed_value,
    missed_wanted,
    weights_TL,
    parts_2P,
    T,
    L,
    missed_count,
    value_step,
    wanted_step,
    of_match,
    of_missed,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, WIDTH)[None, :]
    row = t.to(tl.int64)
    live = (t < T)[:, None] & (slot < L)
    real = live & (slot < tl.load(count_T + t, mask=t < T, other=0)[:, None])
    at = row[:, None] * L + slot
    error = tl.load(values_TL + at, mask=real, other=0.0) - tl.load(refitted_TL + at, mask=real, other=0.0)
    tl.store(weights_TL + row[:, None] * (L + 1) + slot, of_match * error, mask=live)
    searched = (t < T) & (t < missed_count)
    wanted = tl.load(missed_wanted + row * wanted_step, mask=searched, other=0.0)
    left_out = tl.where(wanted > 0, tl.load(missed_value + row * value_step, mask=searched, other=0.0) - wanted, 0.0)
    tl.store(weights_TL + row * (L + 1) + L, of_missed * left_out, mask=t < T)
    part = parts_2P + tl.program_id(0)
    tl.store(part, tl.sum(tl.sum(error * error, axis=1), axis=0))
    tl.store(part + tl.num_programs(0), tl.sum(left_out * left_out, axis=0))


@triton.jit(do_not_specialize=["P"])
def _add_losses(parts_2P, losses, P, of_match, of_missed, TILE: tl.constexpr):
    """The first program adds up the parts of `match`, the second those of `missed`."""
    term = tl.program_id(0)
    acc = tl.zeros((TILE,), tl.float32)
    for first in range(0, P, TILE):
        i = first + tl.arange(0, TILE)
        acc += tl.load(parts_2P + term * P + i, mask=i < P, other=0.0)
    tl.store(losses + term, tl.sum(acc, axis=0) * tl.where(term == 0, of_match, of_missed))

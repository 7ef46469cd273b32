"""The router's softmax, choice of experts and their counts in one pass over the logits, and its gradient."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2

TILE = 4096
"""Logits that four warps hold in registers, 32 in each thread."""


@dataclass(frozen=True)
class Routed:
    """Where each token goes."""

    expert_TS: Tensor
    """int32, by falling probability."""
    gate_TS: Tensor
    """float32: the softmax probability of each chosen expert."""
    lse_T: Tensor
    """float32: log sum exp of the logits."""
    counts_BE: Tensor
    """int32: (token, slot) pairs of each expert in each block of `block_tokens(E)` tokens."""
    prob_sums_BE: Tensor
    """float32: the same blocks' sums of probabilities, chosen or not; their sum over B / T is the mean that load balancing needs."""


def block_tokens(num_experts: int) -> int:
    """Tokens per block of the counts; smaller with many experts, where one block is already hundreds of kilobytes of logits."""
    return 64 if num_experts <= 128 else 32


def _check_width(num_experts: int) -> None:
    if num_experts > TILE:
        raise ValueError(f"E={num_experts} experts: one row of logits must fit the registers of a program, {TILE} at most.")


def padded_experts(num_experts: int) -> int:
    """Width of a tile over all experts: a power of two."""
    return max(2, next_power_of_2(num_experts))


def route(raw_TE: Tensor, scale: Tensor, shift_E: Tensor, slots: int) -> Routed:
    """softmax(raw * scale - shift) and its `slots` largest entries, ties to the lowest expert; raw_TE and shift_E float32, scale a float32 scalar.

    A token whose probabilities are NaN goes to the lowest experts with a NaN gate, so that nothing downstream reads out of bounds.
    """
    tokens, num_experts = raw_TE.shape
    _check_width(num_experts)
    if not 1 <= slots <= num_experts:
        raise ValueError(f"slots={slots} must lie between 1 and the number of experts, {num_experts}.")
    block = block_tokens(num_experts)
    width = padded_experts(num_experts)
    blocks = cdiv(tokens, block)
    warps = 8 if block * width == 2 * TILE else 4  # a block that eight warps can hold at once is not split
    rows = min(block, TILE * warps // 4 // width)
    device = raw_TE.device
    routed = Routed(
        expert_TS=torch.empty(tokens, slots, dtype=torch.int32, device=device),
        gate_TS=torch.empty(tokens, slots, dtype=torch.float32, device=device),
        lse_T=torch.empty(tokens, dtype=torch.float32, device=device),
        counts_BE=torch.empty(blocks, num_experts, dtype=torch.int32, device=device),
        prob_sums_BE=torch.empty(blocks, num_experts, dtype=torch.float32, device=device),
    )
    launch(
        _route,
        (blocks,),
        raw_TE,
        scale,
        shift_E,
        routed.expert_TS,
        routed.gate_TS,
        routed.lse_T,
        routed.counts_BE,
        routed.prob_sums_BE,
        tokens,
        E=num_experts,
        S=slots,
        BLOCK_T=block,
        ROWS=rows,
        WIDTH=width,
        num_warps=warps,
    )
    return routed


@triton.jit
def _route(
    raw_TE,
    scale,
    shift_E,
    expert_TS,
    gate_TS,
    lse_T,
    counts_BE,
    prob_sums_BE,
    T,
    E: tl.constexpr,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One block of tokens, ROWS at a time; the block's two sums stay in registers."""
    block = tl.program_id(0)
    e = tl.arange(0, WIDTH)
    real = (e < E)[None, :]
    factor = tl.load(scale)
    shift = tl.load(shift_E + e, mask=e < E, other=0.0)
    counts = tl.zeros((ROWS, WIDTH), tl.int32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, BLOCK_T, ROWS):
        t = block * BLOCK_T + first + tl.arange(0, ROWS)
        live = t < T
        row = t.to(tl.int64)
        raw = tl.load(raw_TE + row[:, None] * E + e[None, :], mask=live[:, None] & real, other=0.0)
        logits = tl.where(real, raw * factor - shift[None, :], float("-inf"))
        largest = tl.max(logits, axis=1)
        p = tl.exp(logits - largest[:, None])
        total = tl.sum(p, axis=1)
        p = p / total[:, None]
        tl.store(lse_T + t, largest + tl.log(total), mask=live)
        sums += tl.where(live[:, None], p, 0.0)
        # a NaN ranks below every probability but above the padding columns, and what was chosen ranks below both
        score = tl.where(real, tl.where(p == p, p, -1.0), -2.0)
        for s in tl.static_range(S):
            best = tl.max(score, axis=1)
            choice = tl.min(tl.where(score == best[:, None], e[None, :], WIDTH), axis=1)
            chosen = e[None, :] == choice[:, None]
            tl.store(expert_TS + row * S + s, choice, mask=live)
            tl.store(gate_TS + row * S + s, tl.sum(tl.where(chosen, p, 0.0), axis=1), mask=live)
            counts += (chosen & live[:, None]).to(tl.int32)
            score = tl.where(chosen, -3.0, score)
    out = block.to(tl.int64) * E + e
    tl.store(counts_BE + out, tl.sum(counts, axis=0), mask=e < E)
    tl.store(prob_sums_BE + out, tl.sum(sums, axis=0), mask=e < E)


def route_backward(
    raw_TE: Tensor, scale: Tensor, shift_E: Tensor, lse_T: Tensor, expert_TS: Tensor, grad_gate_TS: Tensor, grad_prob_E: Tensor
) -> Tensor:
    """float32 [T, E]: the gradient of the logits raw * scale - shift.

    With dL/dp[t, e] = grad_prob_E[e] + sum_s [expert_TS[t, s] == e] grad_gate_TS[t, s] it is p * (dL/dp - sum_e p dL/dp); p is made again from lse_T.
    """
    tokens, num_experts = raw_TE.shape
    width = padded_experts(num_experts)
    rows = min(64, TILE // width)
    grad_logits_TE = torch.empty_like(raw_TE)
    launch(
        _route_backward,
        (cdiv(tokens, rows),),
        raw_TE,
        scale,
        shift_E,
        lse_T,
        expert_TS,
        grad_gate_TS,
        grad_prob_E,
        grad_logits_TE,
        tokens,
        E=num_experts,
        S=expert_TS.shape[1],
        ROWS=rows,
        WIDTH=width,
    )
    return grad_logits_TE


@triton.jit
def _route_backward(
    raw_TE,
    scale,
    shift_E,
    lse_T,
    expert_TS,
    grad_gate_TS,
    grad_prob_E,
    grad_logits_TE,
    T,
    E: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    e = tl.arange(0, WIDTH)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = t < T
    real = live[:, None] & (e < E)[None, :]
    row = t.to(tl.int64)
    at = row[:, None] * E + e[None, :]
    raw = tl.load(raw_TE + at, mask=real, other=0.0)
    shift = tl.load(shift_E + e, mask=e < E, other=0.0)
    lse = tl.load(lse_T + t, mask=live, other=float("inf"))
    p = tl.where(real, tl.exp(raw * tl.load(scale) - shift[None, :] - lse[:, None]), 0.0)
    grad_p = tl.load(grad_prob_E + e, mask=e < E, other=0.0)[None, :] + tl.zeros((ROWS, WIDTH), tl.float32)
    for s in tl.static_range(S):
        expert = tl.load(expert_TS + row * S + s, mask=live, other=0)
        grad = tl.load(grad_gate_TS + row * S + s, mask=live, other=0.0)
        grad_p += tl.where(e[None, :] == expert[:, None], grad[:, None], 0.0)
    mean = tl.sum(p * grad_p, axis=1)
    tl.store(grad_logits_TE + at, p * (grad_p - mean[:, None]), mask=real)

"""The router: logits, softmax, choice of experts and their counts in one kernel, and its gradients in two.

Products are float32 whatever the operands of the experts' products are, or sums of three bfloat16 products, as exact to 16 bits (`precision_of`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.backend import Dot
from switch_kernels.gpu.launch import cdiv, interpreted, launch, next_power_of_2

TILE = 4096
"""Logits that four warps hold in registers, 32 in each thread."""
PRODUCT_TILE = 64
"""Experts and columns of a product's tile where no row of logits has to stay whole."""
LEAST_WIDTH = 32
"""Columns of a tile over fewer experts: one kernel serves them all."""


class Cut(NamedTuple):
    """How a product of few columns is cut into programs: the tokens and activation columns of a step of its loop, and how many programs share it."""

    tokens: int
    columns: int
    programs: int
    num_warps: int = 4
    num_stages: int = 3


ROUTE = Cut(64, 64, 0, num_stages=4)
"""Of the logits; the programs are the blocks of tokens."""
GRADIENTS = Cut(16, 128, 512, num_warps=2, num_stages=2)
"""Of the gradient of the router's weights, over 32 experts; with more, fewer columns."""
THREE_PRODUCTS = "bf16x3"
"""What stands for a product of float32: three of bfloat16 on the tensor cores."""
SMALLEST: tl.constexpr = tl.constexpr(2.0**-126)
"""The least normal float32: what lies below, a GPU may flush to 0."""


@dataclass(frozen=True)
class Routed:
    """Where each token goes."""

    expert_TS: Tensor
    """int32, by falling probability."""
    gate_TS: Tensor
    """float32: the softmax probability of each chosen expert."""
    lse_T: Tensor
    """float32: log sum exp of the logits."""
    logits_TE: Tensor
    """float32."""
    counts_BE: Tensor
    """int32: (token, slot) pairs of each expert in each block of `block_tokens(E)` tokens."""
    prob_sums_BE: Tensor
    """float32: the same blocks' sums of probabilities, chosen or not; their sum over B / T is the mean that load balancing needs."""


def block_tokens(num_experts: int) -> int:
    """Tokens per block of the counts; smaller with many experts, where one block is already hundreds of kilobytes of logits."""
    return ROUTE.tokens if num_experts <= 128 else 32


def _check_width(num_experts: int) -> None:
    if num_experts > TILE:
        raise ValueError(f"E={num_experts} experts: one row of logits must fit the registers of a program, {TILE} at most.")


def padded_experts(num_experts: int) -> int:
    """Width of a tile over all experts: a power of two."""
    return max(2, next_power_of_2(num_experts))


def logit_width(num_experts: int) -> int:
    """Of a tile over whole rows of logits."""
    return max(LEAST_WIDTH, padded_experts(num_experts))


def precision_of(dot: Dot) -> str:
    """How the router multiplies where the experts multiply by `dot`: three bfloat16 products on the tensor cores stand for one of float32."""
    return "ieee" if dot == "ieee" or interpreted() else THREE_PRODUCTS


def route(x_TD: Tensor, scale: Tensor, W_ED: Tensor, b_D: Tensor, slots: int, dot: Dot) -> Routed:
    """softmax((x * scale - b) @ W^T) and its `slots` largest entries, ties to the lowest expert; x is float32 or bfloat16, all else float32.

    A token whose probabilities are NaN goes to the lowest experts with a NaN gate, so that nothing downstream reads out of bounds.
    """
    (tokens, D), num_experts = x_TD.shape, W_ED.shape[0]
    _check_width(num_experts)
    if not 1 <= slots <= num_experts:
        raise ValueError(f"slots={slots} must lie between 1 and the number of experts, {num_experts}.")
    block = block_tokens(num_experts)
    width = logit_width(num_experts)
    blocks = cdiv(tokens, block)
    warps = 8 if block * width == 2 * TILE else 4  # a block that eight warps can hold at once is not split
    rows = min(block, TILE * warps // 4 // width)
    device = x_TD.device
    routed = Routed(
        expert_TS=torch.empty(tokens, slots, dtype=torch.int32, device=device),
        gate_TS=torch.empty(tokens, slots, dtype=torch.float32, device=device),
        lse_T=torch.empty(tokens, dtype=torch.float32, device=device),
        logits_TE=torch.empty(tokens, num_experts, dtype=torch.float32, device=device),
        counts_BE=torch.empty(blocks, num_experts, dtype=torch.int32, device=device),
        prob_sums_BE=torch.empty(blocks, num_experts, dtype=torch.float32, device=device),
    )
    sizes = (tokens, num_experts, D)
    product: dict[str, Any] = {
        "BLOCK_D": min(ROUTE.columns, max(16, next_power_of_2(D))),
        "PRECISION": precision_of(dot),
        "num_stages": ROUTE.num_stages,
    }
    whole = rows == block and width <= 128  # the block's logits are one product; of more experts they are made in tiles beforehand
    if not whole:
        size = PRODUCT_TILE
        grid = (cdiv(tokens, size), cdiv(num_experts, size))
        launch(_router_logits, grid, x_TD, scale, W_ED, b_D, routed.logits_TE, *sizes, ROWS=size, WIDTH=size, **product)
    launch(
        _route,
        (blocks,),
        x_TD,
        scale,
        W_ED,
        b_D,
        *(routed.expert_TS, routed.gate_TS, routed.lse_T, routed.logits_TE, routed.counts_BE, routed.prob_sums_BE),
        *sizes,
        S=slots,
        BLOCK_T=block,
        ROWS=rows,
        WIDTH=width,
        PRODUCT=whole,
        **product,
        num_warps=warps,
    )
    return routed


@triton.jit
def _centred(x_TD, factor, b_D, t, d, T, D):
    """float32 x * factor - b of tokens t and columns d; 0 outside."""
    inside = (t < T)[:, None] & (d < D)[None, :]
    x = tl.load(x_TD + t[:, None].to(tl.int64) * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x * factor - tl.load(b_D + d, mask=d < D, other=0.0)[None, :], 0.0)


@triton.jit
def _logits_of(x_TD, scale, W_ED, b_D, t, e, T, E, D, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """float32 [ROWS, WIDTH]: the logits of tokens t and experts e."""
    factor = tl.load(scale)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = _centred(x_TD, factor, b_D, t, d, T, D)
        w = tl.load(W_ED + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "E"])
def _router_logits(
    x_TD, scale, W_ED, b_D, logits_TE, T, E, D, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    logits = _logits_of(x_TD, scale, W_ED, b_D, t, e, T, E, D, ROWS, WIDTH, BLOCK_D, PRECISION)
    tl.store(logits_TE + t[:, None].to(tl.int64) * E + e[None, :], logits, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T", "E"])
def _route(
    x_TD,
    scale,
    W_ED,
    b_D,
    expert_TS,
    gate_TS,
    lse_T,
    logits_TE,
    counts_BE,
    prob_sums_BE,
    T,
    E,
    D,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of tokens, ROWS at a time; the block's two sums stay in registers."""
    block = tl.program_id(0)
    e = tl.arange(0, WIDTH)
    real = (e < E)[None, :]
    counts = tl.zeros((ROWS, WIDTH), tl.int32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, BLOCK_T, ROWS):
        t = block * BLOCK_T + first + tl.arange(0, ROWS)
        live = t < T
        row = t.to(tl.int64)
        at = row[:, None] * E + e[None, :]
        if PRODUCT:
            logits = _logits_of(x_TD, scale, W_ED, b_D, t, e, T, E, D, ROWS, WIDTH, BLOCK_D, PRECISION)
            tl.store(logits_TE + at, logits, mask=live[:, None] & real)
        else:
            logits = tl.load(logits_TE + at, mask=live[:, None] & real, other=0.0)
        logits = tl.where(real, logits, float("-inf"))
        largest = tl.maximum(tl.max(logits, axis=1), -3e38)  # finite where all logits are NaN: nothing is left of them in the padding
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


@dataclass(frozen=True)
class GateParts:
    """The gradients of the gates as the dense products leave them: gate times gradient of pair r is the sum of row row_R[r]."""

    parts_NP: Tensor
    """float32 [N, P]."""
    row_R: Tensor


def route_backward(
    routed: Routed, grad_gate: Tensor | GateParts | None, counts_E: Tensor, factor: float, rival_n: Tensor | None = None, grad_n: Tensor | None = None
) -> Tensor:
    """float32 [T, E]: the gradient of the logits.

    With dL/dp[t, e] = factor * counts_E[e] + sum_s [expert_TS[t, s] == e] grad_gate[t, s] it is p * (dL/dp - sum_e p dL/dp); p is made again from
    lse_T. A gate that has underflowed gets no gradient, which the factor p would take away again; None means that nothing is multiplied by gates. To
    that the first n tokens add grad_n at their one expert, and subtract it at their rival.
    """
    tokens, num_experts = routed.logits_TE.shape
    width = logit_width(num_experts)
    rows = min(64, TILE // width)
    grad_TE = torch.empty_like(routed.logits_TE)
    parts_NP, row_R = (grad_gate.parts_NP, grad_gate.row_R) if isinstance(grad_gate, GateParts) else (grad_gate, None)
    launch(
        _route_backward,
        (cdiv(tokens, rows),),
        *(routed.logits_TE, routed.lse_T, routed.expert_TS, routed.gate_TS, parts_NP, row_R, counts_E, rival_n, grad_n, grad_TE),
        tokens,
        0 if rival_n is None else rival_n.shape[0],
        1 if parts_NP is None else parts_NP.shape[1],
        factor,
        num_experts,
        S=routed.expert_TS.shape[1],
        ROWS=rows,
        WIDTH=width,
    )
    return grad_TE


@triton.jit
def _gate_gradient(pair, live, gate_TS, parts_NP, row_R, P, ROWS: tl.constexpr):
    """float32 [ROWS]: the gradients of the gates of these pairs."""
    if row_R is None:
        return tl.load(parts_NP + pair, mask=live, other=0.0)
    else:
        PARTS: tl.constexpr = 8
        row = tl.load(row_R + pair, mask=live, other=0).to(tl.int64)
        acc = tl.zeros((ROWS, PARTS), tl.float32)
        for first in range(0, P, PARTS):
            p = first + tl.arange(0, PARTS)
            acc += tl.load(parts_NP + row[:, None] * P + p[None, :], mask=live[:, None] & (p < P)[None, :], other=0.0)
        gate = tl.load(gate_TS + pair, mask=live, other=1.0)
        vanished = gate < SMALLEST
        return tl.where(vanished, 0.0, tl.sum(acc, axis=1) / tl.where(vanished, 1.0, gate))


@triton.jit(do_not_specialize=["T", "n", "P", "E"])
def _route_backward(
    logits_TE,
    lse_T,
    expert_TS,
    gate_TS,
    parts_NP,
    row_R,
    counts_E,
    rival_n,
    grad_n,
    grad_TE,
    T,
    n,
    P,
    factor,
    E,
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
    lse = tl.load(lse_T + t, mask=live, other=0.0)
    p = tl.exp(tl.load(logits_TE + at, mask=real, other=float("-inf")) - lse[:, None])
    grad_p = tl.load(counts_E + e, mask=e < E, other=0).to(tl.float32)[None, :] * factor + tl.zeros((ROWS, WIDTH), tl.float32)
    for s in tl.static_range(S):
        expert = tl.load(expert_TS + row * S + s, mask=live, other=0)
        if parts_NP is not None:
            grad = _gate_gradient(row * S + s, live, gate_TS, parts_NP, row_R, P, ROWS)
            grad_p += tl.where(e[None, :] == expert[:, None], grad[:, None], 0.0)
    mean = tl.sum(p * grad_p, axis=1)
    grad_logit = p * (grad_p - mean[:, None])
    if rival_n is not None:
        rival = tl.load(rival_n + t, mask=t < n, other=0)
        gained = tl.load(grad_n + t, mask=t < n, other=0.0)
        grad_logit += tl.where(e[None, :] == expert[:, None], gained[:, None], 0.0) - tl.where(e[None, :] == rival[:, None], gained[:, None], 0.0)
    tl.store(grad_TE + at, grad_logit, mask=real)


def router_gradients(grad_TE: Tensor, x_TD: Tensor, scale: Tensor, W_ED: Tensor, b_D: Tensor, dot: Dot) -> tuple[Tensor, Tensor]:
    """Partial sums (float32) of the gradients of W [C, E, D] and b [B, D], from that of the logits: grad^T (x * scale - b) and -sum_t grad W.

    Each program owns a tile of W and a chunk of tokens; there are about `GRADIENTS.programs` of them.
    """
    (tokens, E), D = grad_TE.shape, x_TD.shape[1]
    precision = precision_of(dot)
    size, width = GRADIENTS.tokens, min(PRODUCT_TILE, max(LEAST_WIDTH, next_power_of_2(E)))
    most_d = 32 if precision == "ieee" else GRADIENTS.columns * LEAST_WIDTH // width  # products of float32 are made in registers, which would spill
    block_d = min(most_d, max(16, next_power_of_2(D)))
    d_tiles, e_tiles, blocks = cdiv(D, block_d), cdiv(E, width), cdiv(tokens, size)
    per_chunk = cdiv(blocks, min(blocks, max(1, GRADIENTS.programs // (d_tiles * e_tiles))))
    chunks = cdiv(blocks, per_chunk)
    W_parts, b_parts = (torch.empty(shape, dtype=torch.float32, device=x_TD.device) for shape in ((chunks, E, D), (chunks * e_tiles, D)))
    launch(
        _router_gradients,
        (chunks, e_tiles, d_tiles),
        *(grad_TE, x_TD, scale, W_ED, b_D, W_parts, b_parts),
        tokens,
        per_chunk,
        E,
        D,
        ROWS=size,
        WIDTH=width,
        BLOCK_D=block_d,
        PRECISION=precision,
        num_warps=GRADIENTS.num_warps,
        num_stages=GRADIENTS.num_stages,
    )
    return W_parts, b_parts


@triton.jit(do_not_specialize=["T", "blocks", "E"])
def _router_gradients(
    grad_TE,
    x_TD,
    scale,
    W_ED,
    b_D,
    W_parts,
    b_parts,
    T,
    blocks,
    E,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk, e_tile = tl.program_id(0), tl.program_id(1)
    e = e_tile * WIDTH + tl.arange(0, WIDTH)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (e < E)[:, None] & (d < D)[None, :]
    factor = tl.load(scale)
    acc = tl.zeros((WIDTH, BLOCK_D), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for block in range(chunk * blocks, (chunk + 1) * blocks):
        t = block * ROWS + tl.arange(0, ROWS)
        grad = tl.load(grad_TE + t[:, None].to(tl.int64) * E + e[None, :], mask=(t < T)[:, None] & (e < E)[None, :], other=0.0)
        acc = tl.dot(grad.T, _centred(x_TD, factor, b_D, t, d, T, D), acc, input_precision=PRECISION)
        sums += grad
    at = e[:, None] * D + d[None, :]
    tl.store(W_parts + chunk.to(tl.int64) * E * D + at, acc, mask=inside)
    w = tl.load(W_ED + at, mask=inside, other=0.0)
    b_part = tl.sum(w * tl.sum(sums, axis=0)[:, None], axis=0)
    tl.store(b_parts + (chunk * tl.num_programs(1) + e_tile) * D + d, -b_part, mask=d < D)

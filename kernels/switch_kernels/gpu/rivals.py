"""The competition of a router: which other expert computes a token as well, and what the costs of both say about the router's logits.

The chosen expert e and its rival r ~ p of the others; loss mean(g L_e + (1 - g) L_r) of fixed costs, g = p_e / (p_e + p_r).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2
from switch_kernels.gpu.route import TILE, Routed, logit_width

LEAST: tl.constexpr = tl.constexpr(-1e30)
"""Stands for the key of an expert that cannot be drawn: finite, so that whatever the logits are some expert is."""
BLOCK = 16
"""Tokens of a program that compares costs."""


class Competition(NamedTuple):
    """What the costs of n tokens came to."""

    rival_n: Tensor
    """int32: the other expert."""
    grad_n: Tensor
    """float32: the gradient of the chosen expert's logit; the rival's is its negative."""
    parts: Tensor
    """float32: their sum is the loss."""


def draw_rivals(routed: Routed, count: int, seed: Tensor) -> Tensor:
    """int32 [n]: for each of the first n tokens an expert drawn by the router's probabilities from those that were not chosen.

    By Gumbel's trick, argmax of logit - log(-log u) with u of Philox: the same numbers for the same `seed`, int32 [1] on the device. One expert per
    token, at least two experts.
    """
    num_experts = routed.logits_TE.shape[1]
    if routed.expert_TS.shape[1] != 1 or num_experts < 2:
        raise ValueError(
            f"{num_experts} experts, {routed.expert_TS.shape[1]} of them per token, leave no one rival. Use one per token, of two or more."
        )
    width = logit_width(num_experts)
    rows = min(64, TILE // width)
    rival_n = torch.empty(count, dtype=torch.int32, device=routed.logits_TE.device)
    launch(_draw_rivals, (cdiv(count, rows),), routed.logits_TE, routed.expert_TS, seed, rival_n, count, num_experts, ROWS=rows, WIDTH=width)
    return rival_n


@triton.jit(do_not_specialize=["n", "E"])
def _draw_rivals(logits_TE, expert_T, seed, rival_n, n, E, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    real = (t < n)[:, None] & (e < E)[None, :]
    at = t[:, None] * E + e[None, :]
    u = tl.maximum(tl.rand(tl.load(seed), at), 1e-10)  # never 0, and at most 1 - 2^-24 or so: both logarithms are finite
    key = tl.load(logits_TE + at, mask=real, other=0.0) - tl.log(-tl.log(u))
    own = tl.load(expert_T + t, mask=t < n, other=0)
    key = tl.where(key > LEAST, key, LEAST)  # NaN, too
    key = tl.where(e[None, :] == own[:, None], 2.0 * LEAST, key)
    key = tl.where((e < E)[None, :], key, 3.0 * LEAST)
    best = tl.max(key, axis=1)
    tl.store(rival_n + t, tl.min(tl.where(key == best[:, None], e[None, :], WIDTH), axis=1), mask=t < n)


def compete(routed: Routed, rival_n: Tensor, loss_T: Tensor, values_TK: Tensor | None, theta: Tensor | None) -> Competition:
    """The loss of the competition and its gradient, from costs ||error||^2 + theta^2 L0.

    loss_T and values_TK (float32) are of T tokens, then of the first n once more by their rivals; L0 counts values above 0. Without both latents cost
    nothing.
    """
    tokens, num_experts, count = *routed.logits_TE.shape, rival_n.shape[0]
    competition = Competition(rival_n, loss_T.new_empty(count), loss_T.new_empty(cdiv(count, BLOCK)))
    k = 1 if values_TK is None else values_TK.shape[1]
    launch(
        _compete,
        (cdiv(count, BLOCK),),
        *(routed.logits_TE, routed.expert_TS, rival_n, loss_T, values_TK, theta, competition.grad_n, competition.parts),
        *(count, tokens, num_experts, k),
        ROWS=BLOCK,
        WIDTH=min(64, next_power_of_2(k)),
        num_warps=2,
    )
    return competition


@triton.jit
def _cost(loss_T, values_TK, theta, t, live, K, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    cost = tl.load(loss_T + t, mask=live, other=0.0)
    if values_TK is not None:
        active = tl.zeros((ROWS, WIDTH), tl.int32)
        for first in range(0, K, WIDTH):
            k = first + tl.arange(0, WIDTH)
            inside = live[:, None] & (k < K)[None, :]
            active += (tl.load(values_TK + t[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0) > 0.0).to(tl.int32)
        cost += tl.load(theta) * tl.load(theta) * tl.sum(active, axis=1).to(tl.float32)
    return cost


@triton.jit(do_not_specialize=["n", "T", "E", "K"])
def _compete(
    logits_TE, expert_T, rival_n, loss_T, values_TK, theta, grad_n, parts, n, T, E, K, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = t < n
    own_cost = _cost(loss_T, values_TK, theta, t, live, K, ROWS, WIDTH)
    rival_cost = _cost(loss_T, values_TK, theta, T + t, live, K, ROWS, WIDTH)
    row = logits_TE + t.to(tl.int64) * E
    own = tl.load(row + tl.load(expert_T + t, mask=live, other=0), mask=live, other=0.0)
    odds = own - tl.load(row + tl.load(rival_n + t, mask=live, other=0), mask=live, other=0.0)
    share = 1.0 / (1.0 + tl.exp(-odds))
    other = 1.0 / (1.0 + tl.exp(odds))  # 1 - share, which loses nothing where share is next to 1
    tl.store(grad_n + t, share * other * (own_cost - rival_cost) / n, mask=live)
    tl.store(parts + tl.program_id(0), tl.sum(share * own_cost + other * rival_cost, axis=0) / n)

"""The optimiser's update in one pass over the state: clip, projection, Adam, unit norm, low-precision copy.

Bound by memory: 26 bytes per parameter with float32 moments (weight and two moments read and written, a bfloat16 copy written), 18 with bfloat16
moments, plus the gradient. A row stays in registers from its first load to its last store, as a tuple of column chunks that need not be a
power of two in number: at D = 768 six chunks of 128 waste nothing where one block of 1024 would idle a quarter of the lanes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2

EPS: tl.constexpr = tl.constexpr(1e-8)
"""Adam's eps, PyTorch's default."""
NORM_EPS: tl.constexpr = tl.constexpr(1e-6)
"""Added to the global norm before dividing by it, as in torch.nn.utils.clip_grad_norm_."""
MIN_SQUARE: tl.constexpr = tl.constexpr(1e-30)
"""Least squared norm that a row is divided by: a row of zeros stays a row of zeros."""


class SumCut(NamedTuple):
    """How `row_sum_parts` is cut into programs."""

    rows: int
    columns: int
    parts: int
    """Partial sums, at most."""
    num_warps: int = 4
    num_stages: int = 2


ROW_SUMS = SumCut(16, 512, 512)


@dataclass(frozen=True)
class MatrixState:
    """A parameter with its Adam moments, all contiguous and updated in place."""

    weight_MD: Tensor
    """float32 [M, D]."""
    exp_avg: Tensor
    """Shape of the weight, float32 or bfloat16 (then rounded to nearest: it changes by 10 % a step)."""
    exp_avg_sq: Tensor
    """Shape of the weight, float32 or bfloat16 (then rounded stochastically: rounding to nearest would swallow its changes of 0.1 % a step)."""
    operand_MD: Tensor | None = None
    """[M, Dp] copy for matrix products, rewritten by every update: the weight in bfloat16 or float32, pad columns zero."""
    unit_norm: bool = False
    """Rows live on the unit sphere: the gradient's part along the row is removed before Adam, and the row is normalised after it."""


@dataclass(frozen=True)
class RowTiling:
    """How a program holds whole rows in registers: `chunks` tiles of `width` columns.

    A tile gives each lane 4 neighbouring columns: 16 bytes of float32, the widest access. With 8, which would suit bfloat16, Triton reorders every
    float32 tile through shared memory before storing it.
    """

    width: int
    chunks: int
    warps: int

    @classmethod
    def of(cls, columns: int) -> "RowTiling":
        """One warp up to 1024 columns, so that sums over a row need no barrier; then as many as keep 32 columns a lane, at most 16."""
        warps = min(16, max(1, next_power_of_2(columns) // 1024))
        width = min(128 * warps, next_power_of_2(columns))
        return cls(width, cdiv(columns, width), warps)


@triton.jit
def appended(items, item):
    """The tuple `items` with `item` behind."""
    return items + (item,)  # noqa: RUF005 (triton 3.6 does not unpack)


@triton.jit
def load_hyper(hyper, total_square):
    """(lr, beta1, beta2, 1 / (1 - beta1^t), 1 / (1 - beta2^t), clip factor)."""
    scale = tl.minimum(tl.load(hyper + 5) / (tl.sqrt(tl.load(total_square)) + NORM_EPS), 1.0)
    return tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3), tl.load(hyper + 4), scale


@triton.jit
def is_finite(total_square):
    """Whether to update at all: gradients with a NaN or an infinity change nothing."""
    return tl.load(total_square) < float("inf")


@triton.jit
def adam_step(w, g, exp_avg, exp_avg_sq, lr, beta1, beta2, correction1, correction2):
    """One step of torch.optim.Adam on float32 tiles; returns (w, exp_avg, exp_avg_sq)."""
    exp_avg = beta1 * exp_avg + (1.0 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * g * g
    return w - lr * (exp_avg * correction1) / (tl.sqrt(exp_avg_sq * correction2) + EPS), exp_avg, exp_avg_sq


@triton.jit
def stochastic_bfloat16(x, random):
    """Rounds float32 to one of its two bfloat16 neighbours with probabilities that make the mean exact, by 16 random bits."""
    bits = x.to(tl.uint32, bitcast=True) + (random & 0xFFFF).to(tl.uint32)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def row_product(a, b, CHUNKS: tl.constexpr):
    """<a, b> as a tile [1, 1], of two tuples of tiles [1, WIDTH]; summed over chunks before over lanes, which takes shuffles."""
    products = a[0] * b[0]
    for n in tl.static_range(1, CHUNKS):
        products += a[n] * b[n]
    return tl.sum(products, axis=1)[:, None]


@triton.jit
def update_row_in_registers(
    j,
    grads,
    weight,
    exp_avg,
    exp_avg_sq,
    operand,
    hyper,
    total_square,
    seed,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    HAS_OPERAND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The whole update of row j (int64) from its unclipped gradient, a tuple of float32 tiles [1, WIDTH]. All loads go out before any store."""
    lr, beta1, beta2, correction1, correction2, scale = load_hyper(hyper, total_square)
    column = tl.arange(0, WIDTH)[None, :]
    weights = ()
    averages = ()
    squares = ()
    for n in tl.static_range(CHUNKS):
        c = n * WIDTH + column
        weights = appended(weights, tl.load(weight + j * D + c, mask=c < D, other=0.0, eviction_policy="evict_first"))
        averages = appended(averages, tl.load(exp_avg + j * D + c, mask=c < D, other=0.0, eviction_policy="evict_first").to(tl.float32))
        squares = appended(squares, tl.load(exp_avg_sq + j * D + c, mask=c < D, other=0.0, eviction_policy="evict_first").to(tl.float32))
    if UNIT_NORM:
        along = row_product(grads, weights, CHUNKS)
    updated = ()
    for n in tl.static_range(CHUNKS):
        c = n * WIDTH + column
        g = grads[n]
        if UNIT_NORM:
            g = g - along * weights[n]
        w, average, square = adam_step(weights[n], g * scale, averages[n], squares[n], lr, beta1, beta2, correction1, correction2)
        updated = appended(updated, w)
        tl.store(exp_avg + j * D + c, average.to(exp_avg.dtype.element_ty), mask=c < D, eviction_policy="evict_first")
        if STOCHASTIC:
            if n % 4 == 0:  # one Philox call makes four words: enough for four chunks
                words = tl.randint4x(tl.load(seed), (j.to(tl.int32) * ((CHUNKS + 3) // 4) + n // 4) * WIDTH + column)
            square = stochastic_bfloat16(square, words[n % 4])
        tl.store(exp_avg_sq + j * D + c, square, mask=c < D, eviction_policy="evict_first")
    if UNIT_NORM:
        inverse = 1.0 / tl.sqrt(tl.maximum(row_product(updated, updated, CHUNKS), MIN_SQUARE))
    for n in tl.static_range(CHUNKS):
        c = n * WIDTH + column
        w = updated[n]
        if UNIT_NORM:
            w = w * inverse
        tl.store(weight + j * D + c, w, mask=c < D, eviction_policy="evict_first")
        if HAS_OPERAND:  # columns past D are zero in every tile, and so in the copy
            tl.store(operand + j * DP + c, w.to(operand.dtype.element_ty), mask=c < DP)


@triton.jit
def _update_rows(
    grad,
    weight,
    exp_avg,
    exp_avg_sq,
    operand,
    hyper,
    total_square,
    seed,
    D: tl.constexpr,
    DP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    HAS_OPERAND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One program per row: a single warp up to 1024 columns, and as many rows in flight as warps fit."""
    if is_finite(total_square) == 0:
        return
    j = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    grads = ()
    for n in tl.static_range(CHUNKS):
        c = n * WIDTH + column
        grads = appended(grads, tl.load(grad + j * D + c, mask=c < D, other=0.0, eviction_policy="evict_first").to(tl.float32))
    update_row_in_registers(
        j, grads, weight, exp_avg, exp_avg_sq, operand, hyper, total_square, seed, D, DP, WIDTH, CHUNKS, UNIT_NORM, HAS_OPERAND, STOCHASTIC
    )


def update_rows_(state: MatrixState, grad_MD: Tensor, hyper: Tensor, total_square: Tensor, step_seed: Tensor | None = None) -> None:
    """Clips by the norm of the whole gradient, then per row: projection, Adam, unit norm, and the copy for matrix products.

    `grad_MD` is float32 or bfloat16. `hyper` is float32 [6]: lr, beta1, beta2, 1 / (1 - beta1^t), 1 / (1 - beta2^t), clip (infinity: none).
    `total_square` (float32, one element) is the squared norm of all gradients before the projection; the clip factor is
    min(1, clip / (norm + 1e-6)), and where it is not finite nothing changes. `step_seed` (int32, one element, another each step) feeds the stochastic
    rounding of a bfloat16 `exp_avg_sq`.
    """
    M, D = state.weight_MD.shape
    check_state(state, step_seed)
    if grad_MD.shape != state.weight_MD.shape or not grad_MD.is_contiguous():
        raise ValueError(f"the gradient has shape {tuple(grad_MD.shape)}: it must be contiguous and have the weight's, {(M, D)}.")
    tiling = RowTiling.of(D)
    launch(
        _update_rows, (M,), grad_MD, *state_arguments(state, hyper, total_square, step_seed), **state_constants(state, tiling), num_warps=tiling.warps
    )


def check_state(state: MatrixState, step_seed: Tensor | None) -> None:
    """Raises ValueError unless the kernels can address the state and, with a bfloat16 `exp_avg_sq`, there is a seed."""
    for name in ("weight_MD", "exp_avg", "exp_avg_sq"):
        tensor = getattr(state, name)
        if tensor.shape != state.weight_MD.shape or not tensor.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be contiguous, with the shape of weight_MD.")
    if state.weight_MD.dtype != torch.float32:
        raise ValueError(f"weight_MD is {state.weight_MD.dtype}: master weights are float32; pass the low-precision copy as operand_MD.")
    if step_seed is None and state.exp_avg_sq.dtype != torch.float32:
        raise ValueError(f"exp_avg_sq is {state.exp_avg_sq.dtype}: stochastic rounding needs step_seed, an int32 tensor that changes every step.")


def state_arguments(state: MatrixState, hyper: Tensor, total_square: Tensor, step_seed: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors that `update_row_in_registers` takes; where one is absent another stands in, which the kernel does not touch."""
    operand = state.operand_MD if state.operand_MD is not None else state.weight_MD
    return state.weight_MD, state.exp_avg, state.exp_avg_sq, operand, hyper, total_square, step_seed if step_seed is not None else hyper


def state_constants(state: MatrixState, tiling: RowTiling) -> dict[str, int | bool]:
    """The compile-time constants that go with `state_arguments`."""
    D = state.weight_MD.shape[1]
    return {
        "D": D,
        "DP": D if state.operand_MD is None else state.operand_MD.stride(0),
        "WIDTH": tiling.width,
        "CHUNKS": tiling.chunks,
        "UNIT_NORM": state.unit_norm,
        "HAS_OPERAND": state.operand_MD is not None,
        "STOCHASTIC": state.exp_avg_sq.dtype == torch.bfloat16,
    }


@triton.jit(do_not_specialize=["M", "SPAN"])
def _row_sum_parts(weights, W, out, M, factor, D, DP, SPAN, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SPAN
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    r = tl.arange(0, ROWS)
    if weights is not None:
        a = tl.load(weights + first + r, mask=first + r < M, other=0.0)
    for i in range(0, SPAN, ROWS):
        rows = first + i + r
        inside = (rows < M)[:, None] & (c < D)[None, :]
        if weights is not None:
            # the next weights come while this tile does: which rows are read hangs on them, and two waits in a row would be twice as long
            following = tl.load(weights + rows + ROWS, mask=rows + ROWS < M, other=0.0)
            tile = tl.load(W + rows[:, None] * DP + c[None, :], mask=inside & (a != 0.0)[:, None], other=0.0).to(tl.float32)
            acc += a[:, None] * tile
            a = following
        else:
            acc += tl.load(W + rows[:, None] * DP + c[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * D + c, tl.sum(acc, axis=0) * factor, mask=c < D)


def row_sum_parts(W_MD: Tensor, D: int, weights_M: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """float32 [P, D], whose sum over P is factor * sum over rows j of weights[j] * W[j, :D]; no weights: all 1. Rows of weight zero are not read.

    W is [M, Dp], float32 or bfloat16; P is at most `ROW_SUMS.parts`.
    """
    M = W_MD.shape[0]
    rows, width, parts_at_most, warps, stages = ROW_SUMS
    span = rows * max(cdiv(128, rows), cdiv(M, parts_at_most * rows))  # at most so many partial sums, each of at least 128 rows
    width = min(width, next_power_of_2(D))
    parts = torch.empty(cdiv(M, span), D, dtype=torch.float32, device=W_MD.device)
    grid = (parts.shape[0], cdiv(D, width))
    launch(
        _row_sum_parts, grid, weights_M, W_MD, parts, M, factor, D, W_MD.stride(0), span, ROWS=rows, WIDTH=width, num_warps=warps, num_stages=stages
    )
    return parts

"""The end of a backward pass: partial sums that its kernels left behind become small gradients, loss terms and the gradient's norm, in two launches.

Every sum is taken in a fixed order: first each program adds a strip of columns or a chunk of numbers, then one program adds what they found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, coded, decoded, launch

TILE = 1024
"""Numbers that a program adds at a time."""
CHUNK = 4 * TILE
"""Numbers that become one partial sum."""


@dataclass(frozen=True)
class Columns:
    """A small gradient that is still in parts, float32 and contiguous."""

    shape: tuple[int, ...]
    """Of the gradient, whose entries are numbered 0 to W - 1."""
    parts_PW: Tensor
    """[P, ...] of P * W numbers: the gradient is their sum over P."""
    more_PW: Tensor | None = None
    """Likewise, added to it."""

    @property
    def width(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Balance:
    """The load-balance loss: factor * sum_e counts_e * sum_b prob_sums[b, e]."""

    prob_sums_BE: Tensor
    counts_E: Tensor
    factor: float


@dataclass(frozen=True)
class Finished:
    """What the sums came to; scalars are float32 [] views of one tensor."""

    gradients: dict[str, Tensor]
    """float32, contiguous, by the names of their columns."""
    square: Tensor
    """Squared norm of these gradients and of those whose `square_parts` were given."""
    squared_error: Tensor
    mse: Tensor
    """squared_error / tokens."""
    load_balance: Tensor
    """0 without `Balance`."""


def finish(
    columns: Mapping[str, Columns], square_parts: Sequence[Tensor], error_parts: Tensor, tokens: int, balance: Balance | None = None
) -> Finished:
    """Small gradients from their columns; squared norm of everything; squared error from its parts, and the loss terms of a batch of `tokens`.

    `square_parts` and `error_parts` are float32 and contiguous, of any shape: only their sums matter.
    """
    device = error_parts.device
    gradients = {name: torch.empty(column.shape, dtype=torch.float32, device=device) for name, column in columns.items()}
    rows = [1 if max(_parts(c.parts_PW, c), _parts(c.more_PW, c)) == 1 else 16 for c in columns.values()]
    numbers = [*square_parts, error_parts, *([balance.prob_sums_BE] if balance else [])]
    programs = [cdiv(c.width, TILE // r) for c, r in zip(columns.values(), rows, strict=True)] + [cdiv(n.numel(), CHUNK) for n in numbers]
    first = [sum(programs[:n]) for n in range(len(programs) + 1)]
    sums_Q = torch.empty(first[-1], dtype=torch.float32, device=device)
    launch(
        _sum_parts,
        (first[-1],),
        sums_Q,
        coded(first),
        tuple(c.parts_PW for c in columns.values()),
        coded(_parts(c.parts_PW, c) for c in columns.values()),
        tuple(c.more_PW if c.more_PW is not None else c.parts_PW for c in columns.values()),
        coded(_parts(c.more_PW, c) for c in columns.values()),
        tuple(gradients.values()),
        coded(c.width for c in columns.values()),
        tuple(numbers),
        coded(n.numel() for n in numbers),
        balance.counts_E if balance else None,
        balance.counts_E.numel() if balance else 0,
        ROWS=tuple(rows),
        SECTIONS=len(columns),
        LISTS=len(numbers),
        TILE=TILE,
        CHUNK=CHUNK,
    )
    scalars = torch.empty(4, dtype=torch.float32, device=device)
    of_squares, of_errors = first[len(columns) + len(square_parts)], first[len(columns) + len(square_parts) + 1]
    factor = balance.factor if balance else 0.0
    launch(_finish_sums, (1,), sums_Q, scalars, of_squares, of_errors, first[-1], tokens, factor, TILE=TILE)
    return Finished(gradients, scalars[0], scalars[1], scalars[2], scalars[3])


def _parts(parts_PW: Tensor | None, column: Columns) -> int:
    """P."""
    return parts_PW.numel() // column.width if parts_PW is not None else 0


@triton.jit
def _add_rows(acc, parts_PW, P, W, n, ROWS: tl.constexpr):
    """acc [ROWS, .] plus columns n of the P rows, ROWS at a time."""
    for first in range(0, P, ROWS):
        p = first + tl.arange(0, ROWS)
        inside = (p < P)[:, None] & (n < W)[None, :]
        acc += tl.load(parts_PW + p[:, None].to(tl.int64) * W + n[None, :], mask=inside, other=0.0)
    return acc


@triton.jit
def _sum_columns(block, parts_PW, P, more_PW, more_P, out_W, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes COLUMNS entries of a gradient; returns the sum of their squares."""
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    acc = _add_rows(tl.zeros((ROWS, COLUMNS), tl.float32), parts_PW, P, W, n, ROWS)
    acc = _add_rows(acc, more_PW, more_P, W, n, ROWS)
    total = tl.sum(acc, axis=0)
    tl.store(out_W + n, total, mask=n < W)
    return tl.sum(total * total, axis=0)


@triton.jit
def _sum_chunk(block, values, count, weights, period, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """The sum of CHUNK numbers, number i weighed with weights[i % period] if there are weights."""
    acc = tl.zeros((TILE,), tl.float32)
    for step in tl.static_range(0, CHUNK, TILE):
        i = block * CHUNK + step + tl.arange(0, TILE)
        value = tl.load(values + i, mask=i < count, other=0.0)
        if weights is not None:
            value *= tl.load(weights + i % period, mask=i < count, other=0).to(tl.float32)
        acc += value
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["period"])
def _sum_parts(
    sums_Q,
    first,
    parts,
    num_parts,
    more,
    num_more,
    outs,
    widths,
    values,
    counts,
    weights,
    period,
    ROWS: tl.constexpr,
    SECTIONS: tl.constexpr,
    LISTS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs first[n] to first[n + 1] - 1 serve section n: SECTIONS gradients, then LISTS of numbers, of which the last is weighed."""
    program = tl.program_id(0)
    total = tl.full((), 0.0, tl.float32)
    for n in tl.static_range(SECTIONS):
        block = program - decoded(first[n])
        if (block >= 0) & (program < decoded(first[n + 1])):
            P, more_P, W = decoded(num_parts[n]), decoded(num_more[n]), decoded(widths[n])
            total = _sum_columns(block, parts[n], P, more[n], more_P, outs[n], W, ROWS[n], TILE // ROWS[n])
    for n in tl.static_range(LISTS):
        block = program - decoded(first[SECTIONS + n])
        if (block >= 0) & (program < decoded(first[SECTIONS + n + 1])):
            if n == LISTS - 1:
                total = _sum_chunk(block, values[n], decoded(counts[n]), weights, period, TILE, CHUNK)
            else:
                total = _sum_chunk(block, values[n], decoded(counts[n]), None, 1, TILE, CHUNK)
    tl.store(sums_Q + program, total)


@triton.jit
def sum_range(numbers, begin, end, TILE: tl.constexpr):
    acc = tl.zeros((TILE,), tl.float32)
    for first in range(begin, end, TILE):
        i = first + tl.arange(0, TILE)
        acc += tl.load(numbers + i, mask=i < end, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["of_squares", "of_errors", "end", "tokens"])
def _finish_sums(sums_Q, scalars, of_squares, of_errors, end, tokens, factor, TILE: tl.constexpr):
    error = sum_range(sums_Q, of_squares, of_errors, TILE)
    tl.store(scalars, sum_range(sums_Q, 0, of_squares, TILE))
    tl.store(scalars + 1, error)
    tl.store(scalars + 2, error / tokens)
    tl.store(scalars + 3, sum_range(sums_Q, of_errors, end, TILE) * factor)

"""What an update does once: it reads the schedule's row of the step and moves on, and it updates all small parameters together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, coded, decoded, launch
from switch_kernels.gpu.update import adam_step, is_finite, load_hyper


@dataclass(frozen=True)
class Schedule:
    """What differs from step to step, on the device."""

    hyper_IH: Tensor
    """float32 [I, 6]: the `hyper` of `update_rows_` for the next I steps."""
    position: Tensor
    """int64 [1]: the row of the next step."""
    seed: Tensor
    """int32 [1]: another number each step."""
    worst_norm: Tensor
    """float32 []: the largest norm of a gradient so far, NaN if one was."""


@triton.jit
def _begin_update(hyper_IH, intervals, position, seed, worst_norm, total_square, hyper_H, norm):
    """Copies the row of this step and moves the schedule on; a row past the last is the last."""
    i = tl.minimum(tl.load(position), intervals - 1)
    h = tl.arange(0, 8)
    tl.store(hyper_H + h, tl.load(hyper_IH + i * 6 + h, mask=h < 6, other=0.0), mask=h < 6)
    now = tl.sqrt(tl.load(total_square))
    worst = tl.load(worst_norm)
    tl.store(norm, now)
    tl.store(worst_norm, tl.where((now > worst) | (now != now), now, worst))  # a NaN is larger than any, and stays
    tl.store(position, tl.load(position) + 1)
    tl.store(seed, tl.load(seed) + 1)


def begin_update_(schedule: Schedule, total_square: Tensor) -> tuple[Tensor, Tensor]:
    """(hyper, norm) of the step whose gradient has this squared norm; `schedule` moves on by one step."""
    hyper_H, norm = torch.empty(6, device=total_square.device), torch.empty((), device=total_square.device)
    steps = schedule.hyper_IH.shape[0]
    launch(
        _begin_update, (1,), schedule.hyper_IH, steps, schedule.position, schedule.seed, schedule.worst_norm, total_square, hyper_H, norm, num_warps=1
    )
    return hyper_H, norm


@triton.jit
def _update_block(block, weight, exp_avg, exp_avg_sq, grad, n, hyper, total_square, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    lr, beta1, beta2, correction1, correction2, scale = load_hyper(hyper, total_square)
    w = tl.load(weight + i, mask=mask, other=0.0)
    g = tl.load(grad + i, mask=mask, other=0.0) * scale
    average = tl.load(exp_avg + i, mask=mask, other=0.0)
    square = tl.load(exp_avg_sq + i, mask=mask, other=0.0)
    w, average, square = adam_step(w, g, average, square, lr, beta1, beta2, correction1, correction2)
    tl.store(weight + i, w, mask=mask)
    tl.store(exp_avg + i, average, mask=mask)
    tl.store(exp_avg_sq + i, square, mask=mask)


@triton.jit
def _update_small(weights, exp_avgs, exp_avg_sqs, grads, sizes, first, hyper, total_square, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Programs first[n] to first[n + 1] - 1 serve parameter n."""
    if is_finite(total_square) == 0:
        return
    program = tl.program_id(0)
    for n in tl.static_range(COUNT):
        block = program - decoded(first[n])
        if (block >= 0) & (program < decoded(first[n + 1])):
            _update_block(block, weights[n], exp_avgs[n], exp_avg_sqs[n], grads[n], decoded(sizes[n]), hyper, total_square, BLOCK)


@dataclass(frozen=True)
class SmallState:
    """A parameter of any shape with its Adam moments and its gradient; all float32, contiguous and of one shape."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad: Tensor


def update_small_(states: Sequence[SmallState], hyper: Tensor, total_square: Tensor) -> None:
    """The clipped Adam of `update_rows_` for small parameters, all in one launch. Each has fewer than 2^31 entries."""
    for state in states:
        for name, tensor in vars(state).items():
            if tensor.shape != state.weight.shape or not tensor.is_contiguous():
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be contiguous and have the weight's, {tuple(state.weight.shape)}.")
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype}: small parameters keep float32 state.")
    block = 1024
    programs = [cdiv(state.weight.numel(), block) for state in states]
    first = [sum(programs[:n]) for n in range(len(states) + 1)]
    weights, exp_avgs, exp_avg_sqs, grads = zip(*(vars(state).values() for state in states), strict=True)
    sizes = coded(weight.numel() for weight in weights)
    launch(
        _update_small, (first[-1],), weights, exp_avgs, exp_avg_sqs, grads, sizes, coded(first), hyper, total_square, COUNT=len(states), BLOCK=block,
        num_warps=4,
    )  # fmt: skip

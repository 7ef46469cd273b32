"""Thresholds that follow training from step to step, on the device; a step whose gradient is not finite moves nothing."""

import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import launch
from switch_kernels.gpu.update import is_finite


@triton.jit(do_not_specialize=["tokens", "k"])
def _follow_l0(theta, threshold, active, total_square, tokens, k, eta, rate):
    if is_finite(total_square):
        l0 = tl.load(active).to(tl.float32) / tokens
        moved = tl.load(theta) * tl.exp(eta * (l0 / k - 1.0))
        tl.store(theta, moved)
        before = tl.load(threshold)
        tl.store(threshold, before + rate * (moved - before))


def follow_l0_(theta: Tensor, threshold: Tensor, active: Tensor, total_square: Tensor, tokens: int, k: int, eta: float, rate: float) -> None:
    """theta *= exp(eta * (L0 / k - 1)), so that L0 = active / tokens becomes k; threshold += rate * (theta - threshold). In place, float32 []."""
    launch(_follow_l0, (1,), theta, threshold, active, total_square, tokens, k, eta, rate, num_warps=1)


@triton.jit
def _follow_theta(theta, threshold, step, total_square, beta):
    found = tl.load(theta)
    if is_finite(total_square) & (found == found):
        now = tl.load(step).to(tl.float32) - 1.0
        before = tl.load(threshold)
        tl.store(threshold, before + (1.0 - tl.minimum(beta, (1.0 + now) / (10.0 + now))) * (found - before))


def follow_theta_(theta: Tensor, threshold: Tensor, step: Tensor, total_square: Tensor, beta: float) -> None:
    """threshold += (1 - b) * (theta - threshold) with b = min(beta, (1 + n) / (10 + n)) after step n = step - 1, unless theta is NaN.

    In place, float32 []; `step` is int32 [1].
    """
    launch(_follow_theta, (1,), theta, threshold, step, total_square, beta, num_warps=1)

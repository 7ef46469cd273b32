"""The one door to the GPU: every kernel is launched here, so that a check can compile what would be launched without a GPU."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

ALIGN = 64
"""Rows of an expert start at multiples of this."""


@dataclass(frozen=True)
class Launch:
    """One requested launch: the kernel, its grid, positional arguments, and keyword arguments (compile-time constants and options)."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> None:
        device = next(arg.device for arg in self.args if isinstance(arg, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](*self.args, **self.kwargs)
        else:
            self.kernel[self.grid](*self.args, **self.kwargs)


_run: Callable[[Launch], None] = Launch.run


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
    """Runs `kernel` on `grid`. Nothing is launched on an empty grid. Options are pinned, never tuned or left to a default:
    results stay bitwise the same.
    """
    if min(grid) > 0:
        _run(Launch(kernel, grid, args, {**constants, "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}))


@contextmanager
def launches_to(handler: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the block, launches go to `handler` instead of the device: how kernels are compiled, counted or timed one by one."""
    global _run
    before, _run = _run, handler
    try:
        yield
    finally:
        _run = before


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1 when triton was first imported)."""
    return bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return cdiv(a, b) * b


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def coded(numbers: Iterable[int]) -> tuple[int, ...]:
    """Numbers from 0 to 2^30 as elements of a tuple that a kernel takes (`decoded`): odd and above 1, so that all of them compile to the same kernel.

    Triton compiles anew for a 1 and for multiples of 16, and `do_not_specialize` does not reach the elements of tuples.
    """
    return tuple(2 * number + 3 for number in numbers)


@triton.jit
def decoded(number):
    """The inverse of `coded`."""
    return (number - 3) // 2

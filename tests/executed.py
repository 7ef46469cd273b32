"""What a computation really multiplies: multiply-adds of products, counted by PyTorch's profiler below every operator, ours included."""

import math
from collections.abc import Callable
from typing import Any

import torch


def executed_flops(call: Callable[[], Any]) -> int:
    """A multiply-add counted as two, of matrix products and of weighted sums and products of rows; elementwise work is not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    return sum(2 * _multiply_adds(event.name, event.input_shapes) for event in profile.events())


def _multiply_adds(name: str, shapes: list[list[int]]) -> int:
    if name in ("aten::mm", "aten::mv", "aten::bmm"):
        return math.prod(shapes[0]) * math.prod(shapes[1][2 if name == "aten::bmm" else 1 :])
    if name == "aten::addmm":
        return math.prod(shapes[1]) * shapes[2][1]
    if name in ("aten::_embedding_bag", "aten::_embedding_bag_forward_only"):  # rows, indices
        return math.prod(shapes[1]) * shapes[0][1]
    if name == "aten::_embedding_bag_per_sample_weights_backward":  # gradient, rows, indices
        return math.prod(shapes[2]) * shapes[1][1]
    return 0

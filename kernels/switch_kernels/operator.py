"""Registering operators with PyTorch, so that torch.compile and torch.export see them whole."""

from collections.abc import Callable
from typing import Any

import torch


def operator(function: Callable[..., Any]) -> Any:
    """Registers `function` (which changes no argument and returns no view of one) as operator switch_kernels::NAME, its name without the underscore.

    As `torch.library.custom_op`, whose first call, however, imports the compiler: 3 seconds for whoever encodes one batch.
    """
    name = function.__name__.lstrip("_")
    torch.library.define(f"switch_kernels::{name}", torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(f"switch_kernels::{name}", "default", function)
    return getattr(torch.ops.switch_kernels, name).default

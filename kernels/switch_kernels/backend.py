"""Which code computes, and in which precision: chosen once, explicitly, with a reason that can be printed."""

import importlib.util
import os
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

Dot = Literal["bf16", "ieee"]
"""How Triton kernels multiply: bfloat16 operands, or full float32."""


def operand_dtype(dot: str) -> torch.dtype:
    return torch.bfloat16 if dot == "bf16" else torch.float32


class Backend(Enum):
    """Who computes."""

    auto = "auto"
    """Triton on a GPU that it can serve, PyTorch elsewhere; resolved once, at start."""
    torch = "torch"
    triton = "triton"


class Precision(Enum):
    """Operands of matrix products and gathers; master weights, accumulation, router and losses are float32 always."""

    auto = "auto"
    """bf16 with Triton, float32 with PyTorch."""
    bf16 = "bf16"
    float32 = "float32"

    @classmethod
    def _missing_(cls, value: object) -> None:
        if value == "tf32":
            raise ValueError(
                "precision='tf32' is no longer one of auto, bf16, float32: Triton cuts its operands off instead of rounding them, which biases every "
                "product. Use bf16, or float32 to be exact; of a saved run, write it into config.json."
            )


class Moments(Enum):
    """How Adam's moments are stored (Triton only)."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    """Half the optimiser's memory and 30 % less traffic; the second moment is rounded stochastically, because round-to-nearest would freeze it."""


@dataclass(frozen=True)
class Execution:
    """A resolved choice; the names of its parts will do."""

    backend: Backend = Backend.torch
    precision: Precision = Precision.float32
    reason: str = "default"

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", Backend(self.backend))
        object.__setattr__(self, "precision", Precision(self.precision))

    @property
    def is_triton(self) -> bool:
        return self.backend is Backend.triton

    @property
    def dot(self) -> Dot:
        """The name that the kernels give the precision: bf16, or ieee for full float32."""
        return "bf16" if self.precision is Precision.bf16 else "ieee"

    def __str__(self) -> str:
        return f"{self.backend.value}, {self.precision.value} operands ({self.reason})"


PYTORCH = Execution()
"""PyTorch in float32: the default wherever nobody has asked for another."""


def resolve(backend: Backend, precision: Precision, device: torch.device | str) -> Execution:
    """Resolves `auto`. Raises ValueError for a combination that cannot run, never falls back silently."""
    backend, precision, device = Backend(backend), Precision(precision), torch.device(device)
    obstacle = _obstacle_to_triton(device)
    reason = "as configured"
    if backend is Backend.auto:
        if device.type == "cpu":
            obstacle = "the device is a CPU"
        backend = Backend.torch if obstacle else Backend.triton
        reason = obstacle or f"a GPU of compute capability {_capability(device)}"
    elif backend is Backend.triton and obstacle:
        raise ValueError(f"backend=triton cannot run: {obstacle}. Use backend=auto or backend=torch.")
    if backend is Backend.torch and precision is Precision.bf16:
        raise ValueError(f"precision=bf16 needs backend=triton; here the backend is torch ({reason}), whose path is float32. Use precision=auto.")
    if precision is Precision.auto:
        precision = Precision.bf16 if backend is Backend.triton else Precision.float32
    return Execution(backend, precision, reason)


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def _obstacle_to_triton(device: torch.device) -> str | None:
    """Why Triton cannot serve this device; None if it can."""
    installed = importlib.util.find_spec("triton") is not None
    if device.type == "cpu":
        if installed and os.environ.get("TRITON_INTERPRET") == "1":
            return None  # tests ask for it by name: kernels run in the interpreter, on CPU tensors
        return "the device is a CPU"
    if device.type == "meta":
        return None if installed else "triton is not installed"
    if device.type != "cuda":
        return f"Triton does not serve devices of type {device.type}"
    if not installed:
        return "triton is not installed (it comes with PyTorch's CUDA builds; or pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"compute capability {_capability(device)} is below 8.0"
    return None

"""One description per operation: its fast and slow forms, inputs, and cost. Tests, benchmarks and docs read only this."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels.decode import sparse_decode, sparse_decode_reference
from switch_kernels.dispatch import Dispatch
from switch_kernels.encode import encode_topk, encode_topk_reference


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem. `routing` says how tokens fall on experts: `random`, `one` (all to the last S experts) or `skip` (expert 0 empty)."""

    T: int
    D: int
    M: int
    E: int
    K: int
    S: int = 1
    routing: str = "random"
    joint: bool = True

    @property
    def F(self) -> int:
        return self.M // self.E


@dataclass(frozen=True)
class KernelSpec:
    """One operation."""

    name: str
    fast: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, torch.Generator], dict[str, Any]]
    """Keyword arguments for both forms; tensors that want a gradient have requires_grad set."""
    flops: Callable[[Shape], int]
    """Multiply-adds counted as two, forward."""
    bytes: Callable[[Shape], int]
    """The fewest bytes that a float32 forward must move: inputs read once, outputs written once."""


def _experts(shape: Shape, generator: torch.Generator) -> Tensor:
    """[T, S], distinct within a token."""
    liking_TE = torch.rand(shape.T, shape.E, generator=generator)
    if shape.routing == "one":
        liking_TE = torch.arange(shape.E).expand(shape.T, -1)
    elif shape.routing == "skip" and shape.E > shape.S:
        liking_TE[:, 0] = -1
    return liking_TE.topk(shape.S, dim=1).indices


def _encode_inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator)

    return {
        "x_TD": normal(shape.T, shape.D).requires_grad_(),
        "b_pre_D": normal(shape.D).mul_(0.1).requires_grad_(),
        "gate_TS": torch.rand(shape.T, shape.S, dtype=dtype, generator=generator).add_(0.1).requires_grad_(),
        "W_enc_MD": F.normalize(normal(shape.M, shape.D), dim=1).requires_grad_(),
        "b_enc_M": normal(shape.M).mul_(0.1).requires_grad_(),
        "dispatch": Dispatch.from_experts(_experts(shape, generator), shape.E),
        "k": shape.K,
        "joint": shape.joint,
    }


def _decode_inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    inside_TK = torch.rand(shape.T, shape.F, generator=generator).topk(shape.K, dim=1).indices
    return {
        "values_TK": torch.rand(shape.T, shape.K, dtype=dtype, generator=generator).requires_grad_(),
        "indices_TK": inside_TK + _experts(shape, generator)[:, :1] * shape.F,
        "W_dec_MD": F.normalize(torch.randn(shape.M, shape.D, dtype=dtype, generator=generator), dim=1).requires_grad_(),
    }


def _dense_selection(selection: Any, num_latents: int) -> Tensor:
    values_TK = selection.values_TK
    return values_TK.new_zeros(values_TK.shape[0], num_latents).scatter_add(1, selection.indices_TK, values_TK)


KERNELS: dict[str, KernelSpec] = {
    spec.name: spec
    for spec in (
        KernelSpec(
            name="encode_topk",
            fast=lambda **inputs: _dense_selection(encode_topk(**inputs), inputs["W_enc_MD"].shape[0]),
            reference=lambda **inputs: _dense_selection(encode_topk_reference(**inputs), inputs["W_enc_MD"].shape[0]),
            make_inputs=_encode_inputs,
            flops=lambda s: 2 * s.T * s.S * s.D * s.F,
            bytes=lambda s: 4 * (s.T * s.D + min(s.T * s.S, s.E) * s.F * s.D + 3 * s.T * s.K),
        ),
        KernelSpec(
            name="sparse_decode",
            fast=sparse_decode,
            reference=sparse_decode_reference,
            make_inputs=_decode_inputs,
            flops=lambda s: 2 * s.T * s.D * s.K,
            bytes=lambda s: 4 * (3 * s.T * s.K + min(s.T * s.K, s.M) * s.D + s.T * s.D),
        ),
    )
}

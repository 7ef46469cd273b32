"""The sizes of a problem, shared by tests and benchmarks, and one description per operation: its fast and slow forms and their inputs."""

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
    """T tokens of D numbers, M latents in E experts, K active latents and S experts per token; `joint` selects the K over all S experts at once.

    `routing` says how tokens fall on experts: `random`, as a router at its start sends them; `one`, all to the last S experts; `skip`, expert 0 stays
    empty; `zipf`, to expert e in proportion to 1 / (e + 1).
    """

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

    @property
    def R(self) -> int:
        """Pairs of a token and an expert."""
        return self.T * self.S

    def __str__(self) -> str:
        more = (f" S={self.S}" if self.S > 1 else "") + ("" if self.joint else " separate")
        return f"D={self.D} M={self.M} E={self.E} K={self.K} T={self.T}{more}" + ("" if self.routing == "random" else f" {self.routing}")


@dataclass(frozen=True)
class KernelSpec:
    """One operation."""

    name: str
    fast: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[[Shape, torch.dtype, torch.Generator], dict[str, Any]]
    """Keyword arguments for both forms; tensors that want a gradient have requires_grad set."""


def _experts(shape: Shape, generator: torch.Generator) -> Tensor:
    """[T, S], distinct within a token."""
    liking_TE = torch.rand(shape.T, shape.E, generator=generator)
    if shape.routing == "one":
        liking_TE = torch.arange(shape.E).expand(shape.T, -1)
    elif shape.routing == "skip" and shape.E > shape.S:
        liking_TE[:, 0] = -1
    elif shape.routing == "zipf":  # expert e is the first to ring: exponential clocks of rates 1 / (e + 1)
        liking_TE = liking_TE.log() * torch.arange(1, shape.E + 1)
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
        ),
        KernelSpec(name="sparse_decode", fast=sparse_decode, reference=sparse_decode_reference, make_inputs=_decode_inputs),
    )
}

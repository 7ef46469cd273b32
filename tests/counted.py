"""Multiply-adds as they are executed: what `Flops` says is held against it."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _product(a, b):
    return 2 * a.numel() * b.shape[-1]


COSTS = {
    "mm": lambda a, b: _product(a, b),
    "bmm": lambda a, b: _product(a, b),
    "addmm": lambda bias, a, b: _product(a, b),
    "mv": lambda a, b: 2 * a.numel(),
    "dot": lambda a, b: 2 * a.numel(),
    "_embedding_bag": lambda rows, indices, *_: 2 * indices.numel() * rows.shape[1],
    "_embedding_bag_forward_only": lambda rows, indices, *_: 2 * indices.numel() * rows.shape[1],
    "_embedding_bag_per_sample_weights_backward": lambda grad, rows, indices, *_: 2 * indices.numel() * rows.shape[1],
}
"""FLOPs of an operator by its arguments, a multiply-add counted as two; all others are elementwise work, selection or movement."""
COMPOSITE = ("matmul", "linear", "embedding_bag", "einsum")
"""Made of others."""
UNKNOWN = ("baddbmm", "addmv", "addbmm", "convolution", "_scaled_dot_product_attention")
"""Products that are not counted: none of them may be executed."""


class Counted(TorchDispatchMode):
    """FLOPs executed while it is on, inside the project's own operators too."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name in COMPOSITE:
            with self:
                return operator.decompose(*args, **(kwargs or {}))
        assert name not in UNKNOWN, name
        if operator.namespace == "switch_kernels":
            with self:
                return operator.redispatch(CPU, *args, **(kwargs or {}))
        if name in COSTS:
            self.flops += COSTS[name](*args[: 3 if name.startswith("_") or name == "addmm" else 2])
        return operator(*args, **(kwargs or {}))


def executed_flops(call) -> int:
    """FLOPs of whatever a call computes."""
    with Counted() as counted:
        call()
    return counted.flops


def executed(sae, rows) -> tuple[float, float]:
    """(FLOPs of a forward pass, of forward, losses and backward) per token of training, without AuxK."""
    sae.train()
    with Counted() as forward:
        output = sae(rows.x_TD)
    with Counted() as rest:
        loss = torch.stack(list(sae.loss_terms(rows, output).values())).sum()
        torch.autograd.grad(loss, [p for p in sae.parameters() if p.requires_grad])
    assert math.isfinite(loss.item())
    return forward.flops / len(rows), (forward.flops + rest.flops) / len(rows)

"""Running an SAE over evaluation rows without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from switch_sae.metrics.base import check_finite
from switch_sae.models.base import Flops, SAEOutput
from switch_sae.rows import Rows

ROWS_PER_CHUNK = 2048
"""Fixed, because a matrix product's last bits depend on how many rows it has: results must not depend on the caller."""


class Evaluable(Protocol):
    """What evaluation needs of an SAE, or of a control such as PCA: a module that maps x_TD to `SAEOutput` and knows its sizes and its cost."""

    num_latents: int
    num_experts: int

    def __call__(self, x_TD: Tensor, /) -> SAEOutput: ...

    def flops(self) -> Flops: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def buffers(self) -> Iterator[Tensor]: ...


def device_of(sae: Evaluable) -> torch.device:
    """Where the SAE's buffers are."""
    return next(sae.buffers()).device


def run(sae: Evaluable, x_TD: Tensor) -> SAEOutput:
    """The SAE's output in evaluation mode, without gradients; the SAE is left as it was."""
    # Held only during the call: a context left open across a generator's yield would leak into the caller.
    with untouched(sae):
        return sae(x_TD)


@contextmanager
def untouched(sae: Evaluable) -> Iterator[None]:
    """Evaluation mode and no gradients inside; train/eval mode of every submodule, buffers and torch's random state afterwards as they were."""
    modes = [(module, module.training) for module in sae.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in sae.buffers()]
    device = device_of(sae)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, before in buffers:
                buffer.copy_(before)


def chunks(rows: int) -> Iterator[slice]:
    """All rows, `ROWS_PER_CHUNK` at a time."""
    return (slice(start, min(start + ROWS_PER_CHUNK, rows)) for start in range(0, rows, ROWS_PER_CHUNK))


def outputs(sae: Evaluable, chunk: Rows) -> tuple[Tensor, SAEOutput]:
    """(targets, output) of a chunk, on the SAE's device. Raises ValueError for rows that are not finite."""
    chunk = chunk.to(device_of(sae))
    check_finite("activations", chunk.x_TD)
    return chunk.target_TD, run(sae, chunk.x_TD)


def sae_outputs(sae: Evaluable, rows: Rows) -> Iterator[tuple[slice, Tensor, SAEOutput]]:
    """(which rows, their targets, output), chunk by chunk. Raises ValueError for rows that are not finite."""
    for chosen in chunks(len(rows)):
        yield chosen, *outputs(sae, rows[chosen])

"""The only meaning of equal width, FLOPs, parameters and time: `num_latents` changes until an SAE costs what its reference does.

Costs are asked of SAEs built without memory (`flops()`, shapes), so that no other room holds a formula of one.
"""

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any

import torch

from switch_sae.checks import typed
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.models.base import Flops

REFERENCE = next(key for key, cls in SAES.items() if cls.is_reference)
"""The dense architecture that all others are compared with, but for those that name another (`SparseAutoencoder.reference`)."""


class Match(Enum):
    """What is held equal between an SAE and a dense one of W latents that it is compared with."""

    width = "width"
    """Latents in all: M = W."""
    flops = "flops"
    """FLOPs per token of training, forward and backward, router and decoder included."""
    active = "active"
    """FLOPs of encoding one token, which is what it sees: S * F = W, so M = W * E / S. The "FLOP-matched" of Mudide et al. (arXiv 2410.08201): the
    router's cost comes on top, and tables count it."""
    parameters = "parameters"
    """Numbers that it holds, trained or frozen, router and biases included."""
    time = "time"
    """Seconds per training step on this machine: measured once, before anything trains, and kept in the sweep's plan."""


def without_memory(config: Any, d_in: int) -> SparseAutoencoder:
    """The SAE of a config on the meta device: shapes and costs, no numbers."""
    with torch.device("meta"):
        return SAES.build(config, d_in)


def cost(config: Any, d_in: int) -> Flops:
    """FLOPs per token."""
    return without_memory(config, d_in).flops()


def parameters(config: Any, d_in: int) -> int:
    """Numbers that an SAE holds, whether they are trained or frozen."""
    return sum(p.numel() for p in without_memory(config, d_in).parameters())


_MEASURES: dict[Match, Callable[[Any, int], int]] = {
    Match.width: lambda config, d_in: config.num_latents,
    Match.flops: lambda config, d_in: cost(config, d_in).total,
    Match.active: lambda config, d_in: cost(config, d_in).encode,
    Match.parameters: parameters,
}


def matched(config: Any, reference: Any, match: Match, d_in: int) -> Any:
    """`config` with the num_latents at which it costs most nearly what `reference` does; of two equally near ones the smaller.

    Exact up to `width_step`, the multiple that num_latents must be of. Costs must not fall with the width. Raises ValueError where even the narrowest
    SAE costs more, and for `Match.time`, which has to be measured.
    """
    match = typed("match", Match, match)
    if match is Match.time:
        raise ValueError("widths of equal time are measured, not computed: match=time is for sweeps.")
    if match is Match.width and reference.num_latents % config.width_step == 0:
        return replace(config, num_latents=reference.num_latents)
    wanted, step = _MEASURES[match](reference, d_in), config.width_step

    def costs(width: int) -> int:
        return _MEASURES[match](replace(config, num_latents=width * step), d_in)

    low = config.least_latents // step
    if costs(low) > wanted:
        raise ValueError(
            f"no width matches in {match.value}: with num_latents={low * step}, the fewest that fit its other settings, this SAE costs "
            f"{costs(low):,}, "
            f"the one of {reference.num_latents} latents {wanted:,}. Use fewer experts or a wider reference."
        )
    high = low + 1
    while costs(high) <= wanted:
        low, high = high, 2 * high
        if high > 2**40:
            raise ValueError(f"no width matches in {match.value}: what this SAE costs does not grow with num_latents.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs(middle) <= wanted else (low, middle)
    return replace(config, num_latents=(low if wanted - costs(low) <= costs(high) - wanted else high) * step)


def reference_of(key: str) -> str:
    """Key of the dense architecture that one is compared with."""
    return SAES[key].reference or REFERENCE


def dense_reference(config: Any) -> Any:
    """The dense TopK SAE that shares every setting with `config` that it has, `num_latents` included; of a transcoder, the dense transcoder.

    Raises ValueError for an SAE without a k.
    """
    key = SAES.key_of(config)
    if not hasattr(config, "k"):
        raise ValueError(f"{key} has no fixed number of active latents, so no dense TopK SAE corresponds to it. Use baselines=[].")
    return SAES.derive(config, {"architecture": reference_of(key)}, {})

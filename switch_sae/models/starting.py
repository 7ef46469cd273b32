"""Training that starts from saved weights: what has to fit, and what may differ."""

from dataclasses import fields, is_dataclass
from typing import Any

import torch

from switch_sae.invocation import invocation
from switch_sae.models.base import SparseAutoencoder
from switch_sae.models.topk import TopKSAE


@torch.no_grad()
def take_weights(sae: SparseAutoencoder, start: SparseAutoencoder) -> list[str]:
    """Gives `sae` all weights and buffers of `start`, scale included; returns the settings that differ (`sae.k=8 (saved with 16)`), which touch no
    weight. Raises ValueError for another architecture, for tensors of other names or shapes, and for latents that are shared out otherwise.
    """
    if type(start) is not type(sae):
        can_be_split = type(start) is TopKSAE and sae.is_routed
        fix = f"split it into experts with {invocation('upcycle')}." if can_be_split else f"train sae={type(start).__name__}, or give another."
        raise ValueError(f"it holds a {type(start).__name__}, and this run trains a {type(sae).__name__}: {fix}")
    mine, theirs = ({name: tuple(tensor.shape) for name, tensor in one.state_dict().items()} for one in (sae, start))
    if wrong := [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]:
        told = "; ".join(f"{name} is {theirs.get(name, 'absent')}, this run's is {mine.get(name, 'absent')}" for name in wrong)
        raise ValueError(f"its weights have other shapes than this run's: {told}. Give this run the sizes of {start}, on activations of its d_in.")
    if (sae.num_shared, sae.num_experts) != (start.num_shared, start.num_experts):
        raise ValueError(f"it shares its latents out otherwise: it is {start}, this run trains {sae}. Use the same experts and shared latents.")
    sae.load_state_dict(start.state_dict())
    return _differences(sae.config, start.config, "sae.")


def _differences(now: Any, then: Any, prefix: str) -> list[str]:
    found = []
    for field in fields(now):
        mine, theirs = getattr(now, field.name), getattr(then, field.name)
        if is_dataclass(mine) and type(mine) is type(theirs):
            found += _differences(mine, theirs, f"{prefix}{field.name}.")
        elif mine != theirs:
            found.append(f"{prefix}{field.name}={_name(mine)} (saved with {_name(theirs)})")
    return found


def _name(value: Any) -> str:
    return type(value).__qualname__.removesuffix(".Config") if is_dataclass(value) else str(getattr(value, "name", value))

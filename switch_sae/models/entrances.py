"""How an SAE is entered: in the weights' precision whatever autocast says, and with any leading dimensions."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from switch_sae.models.latents import DenseLatents, Latents

_OF_ROWS = ("encode", "decode", "forward")
_ENTRANCES = (*_OF_ROWS, "route", "loss_terms", "initialize", "set_scale", "end_step", "training_step")


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where products keep the dtype of the weights though `torch.autocast` is on: which latents and experts are chosen hangs on the last bits."""
    lowered = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if lowered else nullcontext()


def _keeping_leading(method: Callable[..., Any]) -> Callable[..., Any]:
    """Architectures are written for rows [T, D]; what they give has the leading dimensions of what they got."""

    name = list(inspect.signature(method).parameters)[1]

    @functools.wraps(method)
    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given, args = (args[0], args[1:]) if args else (kwargs.pop(name, None), ())
        if method.__name__ == "decode" and isinstance(given, Tensor) and given.ndim:
            given = DenseLatents(given)
        leading = given.leading if isinstance(given, Latents) else given.shape[:-1] if isinstance(given, Tensor) and given.ndim else (1,)
        if len(leading) == 1:  # rows already, or what the method refuses
            return method(self, given, *args, **kwargs)
        rows = math.prod(leading)
        made = method(self, given.shaped((rows,)) if isinstance(given, Latents) else given.reshape(rows, given.shape[-1]), *args, **kwargs)
        return made.reshape(*leading, made.shape[-1]) if isinstance(made, Tensor) else made.shaped(leading)

    return computed


def _computed_outside_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with outside_autocast(self.activation_scale.device):
            return method(self, *args, **kwargs)

    return computed


def as_entrances(attributes: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """The methods of a class through which an SAE is entered, by name, wrapped."""
    entrances = {name: _computed_outside_autocast(attributes[name]) for name in _ENTRANCES if name in attributes}
    return entrances | {name: _keeping_leading(entrances[name]) for name in _OF_ROWS if name in entrances}

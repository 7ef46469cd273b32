"""Typed configuration to plain JSON values and back."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, paths and tuples as plain JSON values; a config of a `Choice` with its tag."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((f, getattr(value, f.name)) for f in fields(value))
        return {f.name: f.metadata["choice"].to_plain(item) if "choice" in f.metadata else to_plain(item) for f, item in pairs}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(cls: type, plain: dict[str, Any]) -> Any:
    """The dataclass `cls` from what `to_plain` made of it.

    Raises ValueError for a name that `cls` does not have and for an enum value that does not exist.
    """
    if not isinstance(plain, Mapping):
        raise ValueError(f"{plain!r} should be the settings of {cls.__qualname__}, by name.")
    hints = get_type_hints(cls)
    unknown = sorted(set(plain) - set(hints))
    if unknown:
        raise ValueError(
            f"unknown settings {unknown} for {cls.__qualname__}; it has {sorted(hints)}. A newer version of switch_sae may have made this."
        )
    choices = {f.name: f.metadata["choice"] for f in fields(cls) if "choice" in f.metadata}
    return cls(**{name: choices[name].from_plain(value) if name in choices else _convert(name, hints[name], value) for name, value in plain.items()})


def _convert(name: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}={value!r} is of the wrong type: it must be a list.")
        return [_convert(name, get_args(hint)[0], item) for item in value]
    if isinstance(hint, type) and is_dataclass(hint):
        return from_plain(hint, value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        if value not in hint.__members__:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(hint.__members__)}.")
        return hint[value]
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e5 is a whole number
    expected: tuple[type, ...] = {float: (float, int), int: (int,), str: (str,), bool: (bool,)}.get(hint, ())
    if expected and (not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool)):
        raise ValueError(f"{name}={value!r} is of the wrong type: it must be {hint.__name__}.")
    return float(value) if hint is float else value

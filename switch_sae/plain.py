"""Typed configuration to plain JSON values and back."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from switch_sae.checks import field_types, typed


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
    types = field_types(cls)
    unknown = sorted(set(plain) - set(types))
    if unknown:
        raise ValueError(
            f"unknown settings {unknown} for {cls.__qualname__}; it has {sorted(types)}. A newer version of switch_sae may have made this."
        )
    return cls(**{name: _from_plain(f"{getattr(cls, 'prefix', '')}{name}", *types[name], value) for name, value in plain.items()})


def _from_plain(name: str, hint: Any, choice: Any, value: Any) -> Any:
    if choice is not None:
        return choice.from_plain(value)
    nested: Any = next((option for option in (hint, *get_args(hint)) if is_dataclass(option)), None)
    return typed(name, hint, value) if nested is None or value is None else from_plain(nested, value)

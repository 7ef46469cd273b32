"""Checks that settings of many rooms share: one message each, with the value, the rule and, where there is one, the fix."""

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints


def at_least(name: str, value: float, least: float, fix: str = "") -> None:
    """Raises ValueError for a setting below its least value, or that is no finite number."""
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be at least {least}.{' ' * bool(fix)}{fix}")


def all_at_least(settings: object, prefix: str = "", /, **least: float) -> None:
    """`at_least` for attributes by name; None, which leaves a choice to somebody else, passes. Messages name them after `prefix`."""
    for name, bound in least.items():
        if (value := getattr(settings, name)) is not None:
            at_least(prefix + name, value, bound)


class Settings:
    """What every dataclass of settings inherits. A value takes its field's type when it is set, in the constructor or later, or is refused.

    So `gate="hard"` is `Gate.hard`, `k=16.0` is 16, a path is text; what is no value of the type, and a name that is no setting, raise ValueError.
    """

    prefix: ClassVar[str] = ""
    """What messages put before the names of settings: where they stand in a run's."""
    group: ClassVar[str] = ""
    """The same for choices on the command line, with slashes."""

    def __setattr__(self, name: str, value: Any) -> None:
        cls: Any = type(self)
        known = field_types(cls)
        if name not in known:
            raise ValueError(f"{cls.__qualname__} has no setting {name!r}.{_meant(name, known)} It has {', '.join(known)}.")
        hint, choice = known[name]
        if choice is None:
            value = typed(self.prefix + name, hint, value)
        else:
            self._check_choice(name, choice, value)
        super().__setattr__(name, value)

    def _check_choice(self, name: str, choice: Any, value: Any) -> None:
        if isinstance(value, str):
            config = choice.config_of(value if value in choice else next(iter(choice))).__qualname__
            raise ValueError(
                f"{self.prefix}{name}={value!r} is a name, not settings. In Python give a Config of {', '.join(choice)}, such as {config}(). "
                f"On the command line write {self.group}{name}={value}."
            )
        if isinstance(value, type) or not is_dataclass(value):
            raise ValueError(f"{self.prefix}{name}={value!r} is of the wrong type: it must be the Config of a {choice.what} ({', '.join(choice)}).")
        choice.key_of(value)


@cache
def field_types(cls: Any) -> dict[str, tuple[Any, Any]]:
    """By name of a dataclass's field: its annotated type, and the `Choice` that it holds a config of, or None."""
    hints = get_type_hints(cls)
    return {f.name: (hints[f.name], f.metadata.get("choice")) for f in fields(cls)}


def typed(name: str, hint: Any, value: Any) -> Any:
    """`value` as one of the annotated type: an enum's member by its name, a whole float as an int, a path as text; of lists every item.

    Raises ValueError, with `name`, for what does not fit. Mappings are checked for being such, `Any` for nothing.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is Any or kind is object:
        return value
    outer = get_origin(kind) or kind
    if outer is list and isinstance(value, list | tuple):
        return [typed(name, get_args(kind)[0], item) for item in value]
    if issubclass(outer, Enum):
        return _member(name, outer, value)
    if outer is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if outer in (int, float):
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if is_number and (outer is float or isinstance(value, Integral) or float(value).is_integer()):
            with suppress(OverflowError):  # an int that no float holds
                return outer(value)
    elif isinstance(value, Mapping if outer is dict else outer):
        return value
    optional = " or null" if type(None) in options else ""
    raise ValueError(f"{name}={value!r} is of the wrong type: it must be {kind.__name__ if kind is outer else kind}{optional}.")


def _member(name: str, kind: type[Enum], value: Any) -> Enum:
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in kind.__members__:
        return kind[value]
    kind._missing_(value)  # a choice may say what has become of a name that it no longer has
    raise ValueError(f"{name}={value!r} is not one of {', '.join(kind.__members__)}.{_meant(value, kind.__members__)}")


def _meant(value: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""

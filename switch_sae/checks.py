"""Checks that settings of many rooms share: one message each, with the value, the rule and, where there is one, the fix."""

import math


def at_least(name: str, value: float, least: float, fix: str = "") -> None:
    """Raises ValueError for a setting below its least value, or that is no finite number."""
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be at least {least}.{' ' * bool(fix)}{fix}")


def all_at_least(settings: object, prefix: str = "", /, **least: float) -> None:
    """`at_least` for attributes by name; None, which leaves a choice to somebody else, passes. Messages name them after `prefix`."""
    for name, bound in least.items():
        if (value := getattr(settings, name)) is not None:
            at_least(prefix + name, value, bound)

"""Effective dense width: how wide a dense TopK SAE would have to be for the same error, and how much of it each dot product buys."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from switch_sae.results.settings import HEADLINE
from switch_sae.results.summary import Summary

LEAST = 3
"""Widths without which there is no curve."""


class DenseWidth(NamedTuple):
    """Of the dense TopK SAE with some error."""

    width: float
    is_extrapolated: bool
    """Whether it lies beyond the widest or the narrowest that was trained, on the line through the two nearest."""


class DenseCurve(NamedTuple):
    """Mean error over seeds of dense TopK SAEs by width, which rises."""

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, dense: Sequence[Summary]) -> "DenseCurve | None":
        """Through SAEs of different widths; None where they are fewer than `LEAST`."""
        points = {group.first.num_latents: error for group in dense if (error := group.mean(HEADLINE))}
        return cls(tuple(sorted(points.items()))) if len(points) >= LEAST else None

    def at(self, error: float) -> DenseWidth | None:
        """The width with that error, linear in log(width) and log(error) between neighbours; None where wider SAEs were not better."""
        pairs = list(pairwise(self.points))
        for (narrow, above), (wide, below) in pairs:
            if below <= error <= above and below < above:
                return DenseWidth(_between(narrow, above, wide, below, error), False)
        (narrow, above), (wide, below) = pairs[-1] if error < self.points[-1][1] else pairs[0]
        return DenseWidth(_between(narrow, above, wide, below, error), True) if 0 < below < above and error > 0 else None


def _between(narrow: int, above: float, wide: int, below: float, error: float) -> float:
    share = math.log(above / error) / math.log(above / below)
    return float(narrow * (wide / narrow) ** share)

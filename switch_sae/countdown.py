"""How far a long piece of work is, and how long it will still take: said in lines, where there is no bar."""

import time

from switch_sae.files import Say, tell

PATIENCE = 10.0
"""Seconds before the first line; what is done by then says nothing."""
EVERY = 30.0
"""Seconds between lines."""


class Countdown:
    """Says `WHAT: 300 of 1,000 UNIT, 2 min left` while work goes on: first after `PATIENCE` seconds, then every `EVERY`."""

    def __init__(self, what: str, total: int, unit: str, say: Say = tell) -> None:
        self.what, self.total, self.unit, self.say = what, total, unit, say
        self.began = time.perf_counter()
        self._next = self.began + PATIENCE

    def __call__(self, done: int) -> None:
        """So much is done."""
        now = time.perf_counter()
        if now >= self._next and 0 < done < self.total:
            self._next = now + EVERY
            left = duration((now - self.began) * (self.total - done) / done)
            self.say(f"{self.what}: {done:,} of {self.total:,} {self.unit}, {left} left")


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"

"""One text with a name, and the one rule that decides by that name alone what is held out.

The language model's training, the SAEs' training and every evaluation agree on it, across Python versions and machines.
"""

import hashlib
from dataclasses import dataclass

HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Document:
    """One text with a stable name, such as `stdlib/json/decoder.py`."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)


def name_hash(name: str) -> int:
    """A whole number below 2^64 that is the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """True for one name in `HELD_OUT_ONE_IN`, decided by a hash of the name: no list to keep, the same on every machine."""
    return name_hash(name) % HELD_OUT_ONE_IN == 0

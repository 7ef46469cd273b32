"""What makes SAEs one line of a figure, and which of them is the one that all are measured against."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from switch_sae.models import SAES, SparseAutoencoder


class Kind(NamedTuple):
    """An architecture with so many experts; `_asdict` gives the columns that tables of figures name it by."""

    architecture: str
    """Its key in `SAES`."""
    experts: int = 1
    experts_per_token: int = 1

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Kind":
        """Of a table's record."""
        return cls(*(record[name] for name in cls._fields))

    @property
    def family(self) -> type[SparseAutoencoder]:
        """Its class, which knows its family and its look; the contract itself for an architecture that is not in the table."""
        return SAES.get(self.architecture, SparseAutoencoder)

    @property
    def is_routed(self) -> bool:
        """Whether it has experts, be it one."""
        return self.family.is_routed

    @property
    def is_reference(self) -> bool:
        """Whether errors are given relative to this kind."""
        return self.family.is_reference

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts the reference first, then other dense architectures, then by number of experts."""
        return (self.is_routed, not self.is_reference, *self)

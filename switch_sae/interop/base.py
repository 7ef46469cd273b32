"""The contract of a file format of other libraries that SAEs are read from and written to."""

from abc import ABC, abstractmethod
from pathlib import Path

from switch_sae.models import SparseAutoencoder


class Format(ABC):
    """One file and one line in `FORMATS`. Nothing but tensors is ever unpickled: a file from elsewhere must not be able to run code."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether this file or folder is of this format, from names and headers alone; False, never an error, for anything else."""

    @abstractmethod
    def load(self, path: Path) -> SparseAutoencoder:
        """The SAE, giving what its own library would give. Raises ValueError, naming the setting, for a variant that nothing here computes."""

    @abstractmethod
    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        """Writes it so that the other library reads it. Raises ValueError for an architecture that the format cannot hold."""

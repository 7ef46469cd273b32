"""The contract of a file format of other libraries that SAEs are read from and written to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from switch_sae.files import write_atomically
from switch_sae.models import SparseAutoencoder


def write(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """One file of a format, whole or not at all, and its folder. Raises RunError where it cannot be written."""
    write_atomically(path, content, "Free some space, make the folder writable, or give another.")


class Format(ABC):
    """One file and one line in `FORMATS`. Nothing but tensors is ever unpickled: a file from elsewhere must not be able to run code."""

    files: ClassVar[tuple[str, ...]] = ()
    """Names of its files in a folder: all that is fetched of one on the hub. Empty where its one file may have any name."""
    settings: ClassVar[Mapping[str, str]] = {}
    """What its files may lack and `load` takes by keyword, with an example of each as it is typed: `{"k": "k=64"}`. Asked for, never guessed."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether this file or folder is of this format, from names and headers alone; False, never an error, for anything else."""

    @abstractmethod
    def load(self, path: Path, **settings: Any) -> SparseAutoencoder:
        """The SAE, giving what its own library would give. Raises ValueError, naming the setting, for a variant that nothing here computes, and
        for a setting that the file lacks and nobody gave."""

    @abstractmethod
    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        """Writes it so that the other library reads it. Raises ValueError for an architecture that the format cannot hold."""

    def load_all(self, path: Path) -> list[SparseAutoencoder]:
        """All SAEs of a folder that `save_all` wrote."""
        return [self.load(path)]

    def save_all(self, saes: Sequence[SparseAutoencoder], path: Path) -> list[SparseAutoencoder]:
        """Writes several SAEs into one folder, and gives them in the order of `load_all`. Raises ValueError as `save`, and for several where a folder
        holds one."""
        if len(saes) != 1:
            raise ValueError(f"a folder of the format {type(self).__name__} holds one SAE, and {len(saes)} were given. Write each into its own.")
        self.save(saes[0], path)
        return list(saes)

    def check_settings(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises ValueError for settings that this format has no use for."""
        if unknown := [name for name in settings if name not in self.settings]:
            takes = f"it takes {', '.join(self.settings.values())}" if self.settings else "it needs no settings: the file holds them all"
            raise ValueError(f"{path}: {unknown[0]} is no setting of the format {type(self).__name__}; {takes}.")

"""Reading files of others: every size is known and checked before a value is read, nothing is executed, and each error is one message.

A file's tensors are looked at by name and shape first (`TensorFile`); values are read one by one, as float32, and must be finite.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_JSON_BYTES = 2**20
_ANOTHER_KIND = "It is cut, damaged or of another kind; copy it again."


class TensorFile:
    """The tensors of one file, by name. What nobody takes must be named in `finish`: a tensor that is not understood may change what is computed."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self.path, self.shapes, self._read, self._taken = path, dict(shapes), read, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def size(self, name: str, dimensions: int = 2) -> tuple[int, ...]:
        """A tensor's shape. Raises ValueError where it is missing, empty or has another number of dimensions."""
        if name not in self.shapes:
            raise ValueError(f"{self.path} holds no tensor {name}; it has {listed(self.shapes)}. {_ANOTHER_KIND}")
        shape = self.shapes[name]
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"{self.path}: {name} has shape {shape}; it must have {dimensions} dimensions, none of them 0. {_ANOTHER_KIND}")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """float32, contiguous, in memory of its own. Raises ValueError for another shape, for integers, and for NaN or infinite values."""
        tensor = self._of_shape(name, shape, _FLOATS, "real numbers (float32, float16, bfloat16, float64)")
        values = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(values).all():
            raise ValueError(f"{self.path}: {name} holds NaN or infinite values; it is not loaded. Take an earlier checkpoint.")
        return values

    def take_integers(self, name: str, *shape: int) -> list[int]:
        """The values of a small tensor of integers, flat."""
        if math.prod(self.size(name, len(shape))) > 10_000:
            raise ValueError(f"{self.path}: {name} has {math.prod(self.shapes[name])} values; a few were expected. {_ANOTHER_KIND}")
        return [int(value) for value in self._of_shape(name, shape, _INTEGERS, "integers").flatten().tolist()]

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Raises ValueError for tensors that were neither taken nor are known to change nothing."""
        if left := [name for name in self.shapes if name not in self._taken and name not in ignored]:
            raise ValueError(
                f"{self.path} also holds {listed(left)}, which nothing here computes with: the SAE would not be the same without. "
                "Convert it with its own library to one that has no such part."
            )

    def _of_shape(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], kind: str) -> Tensor:
        self.size(name, len(shape))
        if self.shapes[name] != shape:
            raise ValueError(f"{self.path}: {name} has shape {self.shapes[name]}, but by the other tensors it should be {shape}. {_ANOTHER_KIND}")
        self._taken.add(name)
        with clear(self.path):
            tensor = self._read(name)
        if tensor.dtype not in dtypes:
            raise ValueError(f"{self.path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}; it must hold {kind}.")
        return tensor


def read_safetensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file, none of which is read yet. Raises ValueError for a file that is missing, cut or of another kind."""
    with clear(path), safe_open(path, framework="pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as opened:
            return opened.get_tensor(name)

    return TensorFile(path, shapes, read)


def read_yaml(path: Path) -> dict[str, Any]:
    """The texts, numbers and booleans of a YAML mapping; lists and mappings inside it are left out. Raises ValueError as `read_json`."""
    import yaml  # Hydra brings it

    with clear(path):
        _refuse_large(path)
        try:
            value = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())[:100]}). Copy it again.") from error
    return {str(key)[:60]: value for key, value in section(path, {"": value}, "").items() if isinstance(value, str | int | float)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, and for a file of more than 1 MB."""
    with clear(path):
        _refuse_large(path)
        try:
            value = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"{path} is not valid JSON ({str(error)[:100]}). Copy it again.") from error
    return section(path, {"": value}, "")


def _refuse_large(path: Path) -> None:
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a configuration has at most {_JSON_BYTES:,}. It is something else.")


def section(path: Path, plain: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside a configuration."""
    value = plain.get(name)
    if not isinstance(value, dict):
        what = f"no object {name!r}" if name else "no JSON object ({...})" if path.suffix == ".json" else "no names with values"
        raise ValueError(f"{path} holds {what}: it is of another kind, or damaged. Copy it again.")
    return value


def count(where: object, name: str, value: Any, at_most: int | None = None) -> int:
    """A positive integer of a configuration. Raises ValueError for anything else, and for more than `at_most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (at_most is not None and value > at_most):
        bound = "" if at_most is None else f" and at most {at_most}"
        raise ValueError(f"{where}: {name}={str(value)[:40]} must be a whole number of at least 1{bound}.")
    return value


def flag(where: object, config: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false of a configuration. Raises ValueError for anything else."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name}={str(value)[:40]!r} must be true or false.")
    return value


def agree(path: Path, name: str, *values: tuple[str, Any]) -> Any:
    """The one value that several places give, each named; None where all are None. Raises ValueError where they differ."""
    given = [(place, value) for place, value in values if value is not None]
    if any(value != given[0][1] for _, value in given[1:]):
        raise ValueError(f"{path}: {name} is {' but '.join(f'{str(value)[:40]} in {place}' for place, value in given)}. One of them is wrong.")
    return given[0][1] if given else None


def listed(names: Collection[str]) -> str:
    shown = sorted(str(name)[:60] for name in names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "none"


@contextmanager
def clear(path: Path) -> Iterator[None]:
    """One ValueError that names the file, for what reading it can raise."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: this format needs it. Copy the whole folder.") from error
    except (SafetensorError, OSError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}. {_ANOTHER_KIND}") from error

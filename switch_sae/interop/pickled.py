"""Files of `torch.save`, read without running anything and within the memory that their bytes take.

Before `torch.load(weights_only=True)` sees a file, its table of contents and the instructions of its pickle are read, not executed: records must be
stored as they are (compressed ones could unfold to any size), must fit into the file, and may ask for tensors and ordered dictionaries alone.
Values are then mapped from the file, and a tensor that claims more numbers than its record holds is refused before it is copied.
"""

import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switch_sae.interop.reading import TensorFile, clear, listed

_PICKLE_BYTES = 2**20
"""A state dict's pickle holds names, shapes and dtypes: a few hundred bytes a tensor."""
_ALLOWED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_STORAGES = {f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Int", "Long", "Bool", "Short", "Char", "Byte")}
_OPCODES = frozenset(
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
        *("BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    }
)
_SAVE_AGAIN = "Save its state_dict() anew with its own library: torch.save(sae.state_dict(), FILE)."


def read_pickled(path: Path) -> tuple[TensorFile, dict[str, Any]]:
    """(tensors, the other values of the state dict by name). Raises ValueError for what is no plain state dict, or damaged."""
    _instructions(path)
    with clear(path):
        try:
            # Mapped, not read: a record that claims to be longer than it is cannot make torch allocate, or read beyond it.
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, AttributeError, KeyError, IndexError, TypeError, ValueError, EOFError, AssertionError, struct.error) as error:
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise ValueError(f"{path} is no state dict that torch can read: {reason}. {_SAVE_AGAIN}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict with names. {_SAVE_AGAIN}")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims shape {tuple(tensor.shape)}, more numbers than the file holds for it. {_SAVE_AGAIN}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return TensorFile(path, shapes, tensors.__getitem__), {name: value for name, value in state.items() if name not in tensors}


def pickled_names(path: Path) -> set[str]:
    """All strings of the pickle, the tensors' names among them; empty, never an error, for what is no file of `torch.save`."""
    try:
        return _instructions(path)
    except ValueError:
        return set()


def _instructions(path: Path) -> set[str]:
    """Strings of the pickle, without executing it. Raises ValueError where the file is not what `torch.save` writes of a state dict."""
    content, strings = _pickle_of(path), set[str]()
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL" and argument not in _ALLOWED | _STORAGES:
                raise _Refused(
                    f"asks for {str(argument)[:80].replace(' ', '.')}: a state dict needs tensors alone, and code from elsewhere is never run"
                )
            if opcode.name not in _OPCODES:
                raise _Refused(f"uses the instruction {opcode.name}, which torch.save does not write for a state dict")
            if isinstance(argument, str) and opcode.name != "GLOBAL":
                strings.add(argument)
    except (ValueError, IndexError, KeyError, OverflowError, EOFError, struct.error) as error:
        reason = str(error) if isinstance(error, _Refused) else f"is damaged ({str(error)[:100]})"
        raise ValueError(f"{path}: its pickle {reason}. {_SAVE_AGAIN}") from error
    return strings


class _Refused(ValueError):
    """An instruction that is not obeyed."""


def _pickle_of(path: Path) -> bytes:
    with clear(path):
        size = path.stat().st_size
        with _opened(path) as archive:
            records = archive.infolist()
        if packed := [record.filename for record in records if not _is_stored(record)]:
            raise ValueError(f"{path}: its records {listed(packed)} are compressed, as torch.save never does. {_SAVE_AGAIN}")
        if sum(record.file_size for record in records) > size:
            raise ValueError(f"{path} has {size:,} bytes, but its records claim more than that. {_SAVE_AGAIN}")
        pickles = [record for record in records if record.filename.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > _PICKLE_BYTES:
            raise ValueError(f"{path} has no pickle of a state dict (one record data.pkl of at most {_PICKLE_BYTES:,} bytes). {_SAVE_AGAIN}")
        with _opened(path) as archive:
            return archive.read(pickles[0])


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError) as error:
        reason = (
            f"{path} is no zip file of torch.save ({str(error)[:100] or 'it ends too early'}): it is cut, of another kind, or from before torch 1.6."
        )
        raise ValueError(f"{reason} {_SAVE_AGAIN}") from error


def _is_stored(record: zipfile.ZipInfo) -> bool:
    return record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size

"""What the interpreter cannot see by itself, because it runs programs one after another on raw addresses: stray accesses and races.

Every load and store of a launch is checked against the tensors given to it. It is an error
- to touch an address outside the storage of every tensor argument;
- for one program to read or change what another program of the same launch wrote, or to change what another read: on a GPU the order is open;
- for two lanes of one store to write different values to one address.
Storing the value that is already there changes nothing and is never an error by itself.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

MANY = -1  # read by several programs


class Watch:
    """Who touched which byte in one launch. Elements are looked up by their first byte."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.start = np.array(sorted(storages), np.uint64)
        sizes = np.array([storages[int(start)] for start in self.start], np.uint64)
        self.end = self.start + sizes
        self.shadow_start = np.cumsum(sizes) - sizes
        self.writer = np.zeros(int(sizes.sum()), np.int32)
        self.reader = np.zeros(int(sizes.sum()), np.int32)

    def read(self, builder: Any, ptrs: TensorHandle, mask: TensorHandle) -> None:
        number, at, who = self._locate(builder, ptrs, _broadcast(mask.data, ptrs))
        self._refuse_foreign(self.writer[at], number, f"{who} reads what another program of this launch wrote")
        readers = self.reader[at]
        self.reader[at] = np.where((readers != 0) & (readers != number), MANY, number)

    def write(self, builder: Any, ptrs: TensorHandle, before: np.ndarray, value: np.ndarray, mask: TensorHandle) -> None:
        """`before` is what the addresses hold."""
        live = _broadcast(mask.data, ptrs)
        number, at, who = self._locate(builder, ptrs, live)
        old, new = _bits(before)[live], _bits(_broadcast(value, ptrs))[live]
        changed = at[old != new]
        self._refuse_foreign(self.writer[changed], number, f"{who} changes what another program of this launch wrote")
        self._refuse_foreign(self.reader[changed], number, f"{who} changes what another program of this launch read")
        order = np.argsort(at, kind="stable")
        if ((np.diff(at[order]) == 0) & (new[order][1:] != new[order][:-1])).any():
            raise RuntimeError(f"race: {who} writes different values to one address in one store.")
        self.writer[at] = number

    def _locate(self, builder: Any, ptrs: TensorHandle, live: np.ndarray) -> tuple[int, np.ndarray, str]:
        """This program's number, the shadow positions of the live addresses, and the program's name in messages."""
        address = ptrs.data[live]
        number = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim)) + 1
        storage = np.searchsorted(self.start, address, "right") - 1
        width = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
        stray = (storage < 0) | (address + width > self.end[storage])
        if stray.any():
            raise IndexError(f"program {builder.grid_idx} accesses {stray.sum()} elements outside of the tensors that the kernel was given.")
        return number, (self.shadow_start[storage] + (address - self.start[storage])).astype(np.int64), f"program {builder.grid_idx}"

    @staticmethod
    def _refuse_foreign(touched: np.ndarray, number: int, what: str) -> None:
        if ((touched != 0) & (touched != number)).any():
            raise RuntimeError(f"race: {what}.")


def _broadcast(data: np.ndarray, ptrs: TensorHandle) -> np.ndarray:
    return np.broadcast_to(data, ptrs.data.shape)


def _bits(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(f"u{data.itemsize}")


def install() -> None:
    """Watches all launches of this process from now on."""
    call, init_args = GridExecutor.__call__, GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    watch: Watch | None = None

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal watch
        try:
            call(self, *args, **kwargs)
        finally:
            watch = None

    def watched_init_args(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal watch
        on_host = init_args(self, args, kwargs)
        watch = Watch(_tensors((*on_host[0], *on_host[1].values())))
        return on_host

    def watched_load(self: Any, ptrs: TensorHandle, mask: TensorHandle, *options: Any, **named: Any) -> TensorHandle:
        assert watch is not None
        watch.read(self, ptrs, mask)
        return load(self, ptrs, mask, *options, **named)

    def watched_store(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any) -> Any:
        assert watch is not None
        before = interpreter._interpreter.load(ptrs.data, mask.data, np.zeros_like(value.data), value.data.dtype)
        watch.write(self, ptrs, before, value.data, mask)
        return store(self, ptrs, value, mask, *options)

    GridExecutor.__call__, GridExecutor._init_args_hst = watched_call, watched_init_args
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = watched_load, watched_store


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from _tensors(argument)

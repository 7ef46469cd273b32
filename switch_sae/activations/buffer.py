"""The shuffling buffer: blocks of rows, each permuted whole and cut into batches, exactly resumable; and the thread that works ahead.

A block is a pure function of its position in the text, so the state of the stream is a position and a row offset: loading it makes the
block again, bit for bit. Rows that do not fill a batch carry over into the next block, so no row is lost or repeated.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from switch_sae.rows import Rows

Position = dict[str, int]
"""Where a block begins, as plain JSON values."""


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`: streams with different keys share nothing, and none depends on what was drawn before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Block:
    """Shuffled rows, and where the next block begins."""

    rows: Rows
    document_T: Tensor
    """Document number of each row, int64, on the CPU."""
    next_position: Position


_DOCUMENT_RANGE = 1 << 18
"""Document numbers in a batch may differ by so much for a table of flags to be faster than sorting them."""

MakeBlock = Callable[[Position, threading.Event], Block]
"""Makes the block at a position; it may stop with any exception once the event is set, since nobody will take the result."""


class Prefetcher:
    """Makes the next block in a thread while the caller uses the current one. Holds no state of the stream: positions come from the caller."""

    def __init__(self, make: MakeBlock) -> None:
        self._make = make
        self._job: _Job | None = None
        self._closed = False

    def get(self, position: Position) -> Block:
        """The block at `position`; starts on its successor before returning. Raises what making it raised, with the thread's traceback."""
        if self._closed:
            raise RuntimeError("this source is closed and gives no more activations. Build a new one.")
        if self._job is None or self._job.position != position:
            self._drop()
            self._job = _Job(self._make, position)
        block = self._job.result()
        self._job = _Job(self._make, block.next_position)
        return block

    def close(self) -> None:
        """Stops the thread and waits until it has ended."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.cancel()


class _Job:
    """One block being made in its own thread, which stops early when cancelled or when the program ends."""

    def __init__(self, make: MakeBlock, position: Position) -> None:
        self.position = position
        self._cancelled = _Cancelled()
        self._block: Block | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(make,), name="activations")
        self._thread.start()

    def _run(self, make: MakeBlock) -> None:
        try:
            self._block = make(self.position, self._cancelled)
        except BaseException as error:
            self._error = error

    def result(self) -> Block:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._block is not None
        return self._block

    def cancel(self) -> None:
        self._cancelled.set()
        self._thread.join()


class _Cancelled(threading.Event):
    """Set by hand, or by the end of the main thread: an unhandled error there must not wait for a block that nobody will use."""

    def is_set(self) -> bool:
        return super().is_set() or not threading.main_thread().is_alive()


class ShuffleBuffer:
    """Cuts an endless chain of blocks into batches of exactly `batch_size` rows.

    `start` is the first block's position. `expected_documents` is how many distinct documents a batch would hold under a perfect shuffle of
    the whole text. At most two blocks are held at once, three while a prefetched one is being finished.
    """

    def __init__(self, make: MakeBlock, start: Position, batch_size: int, expected_documents: float, prefetch: bool) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.batch_size = batch_size
        self._make, self._expected = make, expected_documents
        self.rate: float | None = None
        """Rows per second at which the last block was made; None before the first."""
        self.prefetches = prefetch
        self._prefetcher = Prefetcher(self._timed) if prefetch else None
        self._position, self._offset = dict(start), 0
        self._block: Block | None = None
        self._batches = self._documents = 0

    def __next__(self) -> Rows:
        rows: list[Rows] = []
        documents: list[Tensor] = []
        missing = self.batch_size
        while missing:
            block = self._current()
            piece = slice(self._offset, min(self._offset + missing, len(block.rows)))
            missing -= piece.stop - piece.start
            self._offset = piece.stop
            # Copied, so that neither a batch nor a left-over keeps a used-up block in memory while the next one arrives. On a GPU, whose time it is,
            # only the last two batches of a block: a caller lets go of a batch when it has the one after.
            is_used_up_soon = len(block.rows) - piece.stop < self.batch_size
            part = block.rows[piece]
            rows.append(part.clone() if is_used_up_soon or not on_gpu(part) else part)
            documents.append(block.document_T[piece])
            if piece.stop == len(block.rows):
                self._position, self._offset, self._block = block.next_position, 0, None
            del block
        self._batches += 1
        self._documents += distinct(torch.cat(documents))
        return Rows.cat(rows)

    @property
    def position(self) -> Position:
        """The block that the next row lies in."""
        return dict(self._position)

    def _current(self) -> Block:
        if self._block is None:
            if self._prefetcher is not None:
                self._block = self._prefetcher.get(self._position)
            else:
                self._block = self._timed(self._position, threading.Event())
        return self._block

    def _timed(self, position: Position, cancelled: threading.Event) -> Block:
        began = time.perf_counter()
        block = self._make(position, cancelled)
        if on_gpu(block.rows):
            block = replace(block, rows=block.rows.measured())  # once a block, and in the thread that works ahead: no batch waits for the device
        self.rate = len(block.rows) / (time.perf_counter() - began)
        return block

    def state_dict(self) -> dict[str, Any]:
        """The next unseen row: the block it lies in and its number there; never what a prefetch thread is busy with."""
        return {"position": dict(self._position), "offset": self._offset, "batches": self._batches, "documents": self._documents}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved place; the block is made again when the next batch is asked for."""
        self._position, self._offset, self._block = dict(state["position"]), int(state["offset"]), None
        self._batches, self._documents = int(state["batches"]), int(state["documents"])

    def mixing(self) -> dict[str, float]:
        """How well batches mix documents: the mean number of distinct documents in a batch, the number that a perfect shuffle of the whole
        text would give, and their ratio (1 is perfect). Raises ValueError before the first batch."""
        if not self._batches:
            raise ValueError("mixing is measured on batches and none was taken yet. Take one first.")
        measured = self._documents / self._batches
        return {"documents_per_batch": measured, "expected_documents_per_batch": self._expected, "mixing": measured / self._expected}

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._block = None


def on_gpu(rows: Rows) -> bool:
    """Whether looking at these rows means waiting for a device."""
    return rows.x_TD.device.type != "cpu"


def distinct(document_T: Tensor) -> int:
    """How many different documents there are."""
    first, last = (int(end) for end in document_T.aminmax())
    if last - first >= _DOCUMENT_RANGE:
        return len(document_T.unique())
    seen = torch.zeros(last - first + 1, dtype=torch.bool)
    seen[document_T - first] = True
    return int(seen.sum())

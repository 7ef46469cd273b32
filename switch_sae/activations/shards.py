"""A chain of blocks kept on disk, one shard file each, that several processes grow and read together.

    FOLDER/
      manifest.json              what made the rows, and the shards in the order of the chain
      shard-00000.safetensors    x_TD in the storage type, document_T int32
      lock                       held by the one process that writes

Shards are appended under the lock and each is in the manifest as soon as it is whole, so a killed or interrupted writer loses at most the
shard it was making, and readers need no lock. A block is a pure function of its position: a shard that is gone can be made again.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from switch_sae.activations.base import differences
from switch_sae.activations.buffer import Block, MakeBlock, Position
from switch_sae.files import RunError, remove_part_files, wait_for_lock, write_atomically
from switch_sae.rows import Rows, moved

FORMAT = {"format": "switch_sae.activations", "version": 1}
_ROWS_PER_COPY = 8192
_SECONDS_BETWEEN_LINES = 10.0
_WAYS_OUT = (
    "Free some space, halve what is stored with source.cache_dtype=bfloat16, train on fewer tokens, or put the cache elsewhere with "
    "source.cache=FOLDER. What is stored stays; the same command goes on after it."
)


@dataclass(frozen=True)
class Chain:
    """The blocks to keep, and what they are."""

    make: MakeBlock
    start: Position
    """Where the first block begins; the text has been stored once when a block ends at this position with epoch 1."""
    made_of: dict[str, Any]
    """Everything that the stored bits follow from, as plain JSON values: its hash names the folder."""
    about: dict[str, Any]
    """For people who read the manifest; nothing depends on it."""
    d_in: int
    dtype: torch.dtype
    block_rows: int
    """Rows in most blocks."""
    rows_of_text: int | None
    """Rows in one reading of the text; None where the text is a stream whose end is not known."""
    d_target: int = 0
    """Size of targets that are stored beside activations; 0 where activations are their own."""

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, self.made_of], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Shard:
    """One stored block."""

    file: str
    rows: int
    sha256: str
    position: Position
    next_position: Position


class ShardStore:
    """The shards of one chain in `parent`/<key>. Safe to use from several processes and threads at once.

    Raises ValueError where the folder holds something else, and RunError where it cannot be written.
    """

    def __init__(self, parent: str | Path, chain: Chain, say: Callable[[str], None]) -> None:
        self.chain, self._say = chain, say
        self.folder = Path(parent).expanduser() / chain.key
        self.shards: list[Shard] = []
        """As last read from the manifest."""
        self._complete = False
        self._load()

    def ensure(self, rows: int, shards: int, cancelled: threading.Event) -> int:
        """Sees that at least `rows` rows and `shards` shards are stored, or the whole text if it has fewer: builds those that are missing, or
        waits for who is building them. Returns how many shards from the first on that takes.

        Raises InterruptedError once `cancelled` is set.
        """

        def done() -> bool:
            self._load()
            return self._covers(rows, shards)

        if not done():
            held = wait_for_lock(self.folder / "lock", lambda: cancelled.is_set() or done(), self._say_waiting)
            if held is not None:
                with held:
                    if not done():
                        self._build(rows, shards, cancelled)
            elif cancelled.is_set():
                raise InterruptedError(f"waiting for {self.folder} was called off.")
        count, total = 0, 0
        while (total < rows or count < shards) and count < len(self.shards):
            total += self.shards[count].rows
            count += 1
        return count

    def read(self, index: int, place_T: Tensor, device: torch.device, cancelled: threading.Event) -> tuple[Rows, Tensor]:
        """(rows float32 on `device`, document_T int64) of a stored shard, its row i at place_T[i].

        The file is memory-mapped, read once from front to back and scattered, which is several times faster than gathering from it. A missing
        file is made again. Raises ValueError for one that is damaged; its sha256 is checked when this process first opens it.
        """
        path = self._checked(index, cancelled)
        with safe_open(path, framework="pt") as opened:
            has_target = "target_TD" in opened.keys()  # noqa: SIM118
            stored = Rows.of(opened.get_tensor("x_TD"), opened.get_tensor("target_TD") if has_target else None)
            stored_document_T = opened.get_tensor("document_T")
        x_place_T = place_T.to(device)

        def scattered(stored_TD: Tensor) -> Tensor:
            rows_TD = torch.empty(stored_TD.shape, device=device)
            for start in range(0, len(rows_TD), _ROWS_PER_COPY):
                if cancelled.is_set():
                    raise InterruptedError(f"reading {path} was called off.")
                part = slice(start, start + _ROWS_PER_COPY)
                rows_TD[x_place_T[part]] = moved(stored_TD[part], device).to(torch.float32)
            return rows_TD

        document_T = torch.empty(len(stored), dtype=torch.int64)
        document_T[place_T] = stored_document_T.long()
        return stored.map(scattered), document_T

    def _covers(self, rows: int, shards: int) -> bool:
        return self._complete or (sum(shard.rows for shard in self.shards) >= rows and len(self.shards) >= shards)

    def _load(self) -> None:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            made_of, complete = manifest["made_of"], manifest["complete"]
            shards = [Shard(**shard) for shard in manifest["shards"]]
        except FileNotFoundError:
            self.shards, self._complete = [], False
            return
        except OSError as error:
            raise RunError(
                f"cannot read {path}: {error.strerror or error}. Make the folder readable, or choose another with source.cache=FOLDER."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a manifest of stored activations ({error!r}). Delete {self.folder}; it is made again.") from error
        if differs := differences(made_of, self.chain.made_of, ("stored", "needed")):
            raise ValueError(
                f"{path} says that its activations are others than this job needs; they differ in {differs}. The file was edited or copied: "
                f"delete {self.folder}, or choose another folder with source.cache=FOLDER."
            )
        self.shards, self._complete = shards, complete

    def _save(self) -> None:
        manifest = {
            **FORMAT,
            "made_of": self.chain.made_of,
            "about": self.chain.about,
            "d_in": self.chain.d_in,
            "dtype": str(self.chain.dtype).removeprefix("torch."),
            "rows": sum(shard.rows for shard in self.shards),
            "complete": self._complete,
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_atomically(self.folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode(), _WAYS_OUT)

    def _build(self, rows: int, shards: int, cancelled: threading.Event) -> None:
        """Appends shards until so many rows and shards are there or the text has been stored once. Only under the lock."""
        chain, had = self.chain, sum(shard.rows for shard in self.shards)
        remove_part_files(self.folder)
        wanted = rows if chain.rows_of_text is None else min(rows, chain.rows_of_text)
        missing = max(1, shards - len(self.shards), -(-(wanted - had) // chain.block_rows))
        in_all = len(self.shards) + missing
        new_rows = missing * chain.block_rows if chain.rows_of_text is None else min(missing * chain.block_rows, chain.rows_of_text - had)
        size = new_rows * ((chain.d_in + chain.d_target) * chain.dtype.itemsize + 4)
        self._check_space(new_rows, size)
        self._say(f"activations: cached in {self.folder}: building {missing} of {in_all} shards ({_bytes(size)}, {new_rows:,} rows)")
        began = told = time.perf_counter()
        made = 0
        while not self._covers(rows, shards):
            position = self.shards[-1].next_position if self.shards else chain.start
            block = chain.make(position, cancelled)
            end = {**chain.start, "epoch": 1}
            if block.next_position["epoch"] and block.next_position != end:
                self._complete = True  # a stream that held no further row: the block is its beginning again, and that is stored already
            else:
                self.shards = [*self.shards, self._write(len(self.shards), position, block)]
                self._complete = block.next_position == end
                made += len(block.rows)
            self._save()
            now = time.perf_counter()
            if now - told > _SECONDS_BETWEEN_LINES and not self._covers(rows, shards):
                told, speed = now, made / (now - began)
                self._say(
                    f"activations: {len(self.shards)} of {in_all} shards, {had + made:,} rows, {speed:,.0f} rows/s, "
                    f"{max(0, new_rows - made) / speed:.0f} s left"
                )
        seconds = time.perf_counter() - began
        self._say(f"activations: {made:,} rows stored in {seconds:.1f} s, {made / seconds:,.0f} rows/s")

    def _check_space(self, rows: int, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if size > free:
            values = f"{self.chain.d_in + self.chain.d_target} {str(self.chain.dtype).removeprefix('torch.')} values"
            raise RunError(f"{rows:,} more rows of {values} need {_bytes(size)} in {self.folder}, where {_bytes(free)} are free. {_WAYS_OUT}")

    def _write(self, index: int, position: Position, block: Block) -> Shard:
        rows = block.rows.map(lambda rows_TD: rows_TD.to("cpu", self.chain.dtype).contiguous())
        tensors = {"x_TD": rows.x_TD} | ({} if rows.target_TD is rows.x_TD else {"target_TD": rows.target_TD})
        if not all(torch.isfinite(rows_TD).all() for rows_TD in tensors.values()):
            largest = max(rows_TD.abs().max().item() for rows_TD in (block.rows.x_TD, block.rows.target_TD))
            raise ValueError(
                f"the activation {largest:,.0f} is beyond what {self.chain.dtype} holds ({torch.finfo(self.chain.dtype).max:,.0f}). "
                "Set source.cache_dtype=bfloat16 or float32."
            )
        path = self.folder / f"shard-{index:05d}.safetensors"
        digest = ""

        def fill(part: Path) -> None:
            nonlocal digest
            # One entry of metadata: their order in the header is random, and the same rows must give the same file.
            save_file({**tensors, "document_T": block.document_T.to(torch.int32)}, part, {"format": str(FORMAT["format"])})
            digest = _sha256(part)

        write_atomically(path, fill, _WAYS_OUT)
        return Shard(path.name, len(rows), digest, position, block.next_position)

    def _checked(self, index: int, cancelled: threading.Event) -> Path:
        """The shard's file, whole."""
        path = self.folder / self.shards[index].file
        if not path.is_file():
            self._make_again(index, cancelled)
        found, shard = _sha256_once(path), self.shards[index]
        if found != shard.sha256:
            self._load()  # another job may have made it again, where arithmetic rounds otherwise
        shard = self.shards[index] if index < len(self.shards) else shard
        if found != shard.sha256:
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is damaged: its sha256 is {found[:16]}..., the manifest says {shard.sha256[:16]}... . "
                "Delete this one file; the next job that needs it makes it again."
            )
        return path

    def _make_again(self, index: int, cancelled: threading.Event) -> None:
        path = self.folder / self.shards[index].file
        held = wait_for_lock(self.folder / "lock", cancelled.is_set, self._say_waiting)
        if held is None:
            raise InterruptedError(f"waiting for {self.folder} was called off.")
        with held:
            self._load()
            if index >= len(self.shards):  # the whole folder was deleted
                self._build(0, index + 1, cancelled)
            if path.is_file():
                return
            self._say(f"activations: {path} is missing and is made again")
            old = self.shards[index]
            block = self.chain.make(old.position, cancelled)
            if (len(block.rows), block.next_position) != (old.rows, old.next_position):
                raise ValueError(
                    f"{path} is missing and cannot be made again: the block at {old.position} now has {len(block.rows)} rows and ends at "
                    f"{block.next_position}, the manifest says {old.rows} and {old.next_position}. The text changed: delete {self.folder}."
                )
            new = self._write(index, old.position, block)
            if new.sha256 != old.sha256:
                self._say(f"note: {path} differs in bits from the one that is gone: it was made on other hardware or by another version of torch.")
                self.shards = [*self.shards[:index], new, *self.shards[index + 1 :]]
                self._save()

    def _say_waiting(self, text: str) -> None:
        self._say(f"activations: {text}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_once(path: Path) -> str:
    """As `_sha256`, remembered by this process until the file changes."""
    status = path.stat()
    return _remembered(path, status.st_ino, status.st_size, status.st_mtime_ns)


@cache
def _remembered(path: Path, inode: int, size: int, modified: int) -> str:
    return _sha256(path)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

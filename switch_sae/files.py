"""The one place that writes to disk: files that are whole or not there, and locks between processes.

A file is written beside its final place, flushed to the disk and renamed: a reader, a killed process or a full disk sees the old file or the
new one, never half of it. A lock belongs to a process, and the kernel takes it back when that process ends, however it ends.
"""

import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError

from switch_sae.invocation import how_to_resume

_POLL_SECONDS = 0.1


class RunError(RuntimeError):
    """A folder cannot be written or read; the message says what to do, and what is on disk is whole."""


Say = Callable[[str], None]
"""Where lines for a person go."""


def tell(text: str) -> None:
    """Prints a line at once, into a pipe or a job's log file too."""
    print(text, flush=True)


def user_path(text: str) -> Path:
    """A path as people type it: ~ is their home, also where no shell has seen it."""
    return Path(text).expanduser()


def write_atomically(path: Path, content: bytes | Callable[[Path], None], advice: str | None = None) -> None:
    """Replaces `path` with `content`, whole or not at all; a function is given the path of the part file and fills it.

    Raises RunError, ending in `advice` (how to go on with a run, unless it is given), when the disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            part.touch()
            mode = part.stat().st_mode
            content(part)
            part.chmod(mode)  # safetensors makes files that nobody but their owner can read, whatever the umask
        else:
            part.write_bytes(content)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must outlive a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink()
        reason = getattr(error, "strerror", None) or error
        advice = advice or f"Free some space or make the folder writable, then {how_to_resume()}, or choose another with runs=FOLDER."
        raise RunError(f"cannot write {path}: {reason}. What was there before is untouched. {advice}") from error


def folder_atomically(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder `path`, whole or not at all: `fill` is given a new folder beside it and fills that. Raises RunError as `write_atomically`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent, ignore_cleanup_errors=True) as name:
            part = Path(name, path.name)
            part.mkdir()
            fill(part)
            part.rename(path)
    except OSError as error:
        if isinstance(error, ConnectionError | FileNotFoundError) and error.strerror is None:
            raise  # a message of fill's own
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Free some space or make the folder writable; nothing is left behind."
        ) from error


def remove_part_files(folder: Path) -> None:
    """Removes what killed processes had half written, below `folder`; nothing ever reads it. Only where no other process is writing."""
    for pattern in (".*.part", ".tmp??????"):  # the second is what safetensors renames to the first when it is done
        for part in folder.rglob(pattern):
            part.unlink(missing_ok=True)


class Lock:
    """A lock that this process holds until `release`, the end of a `with` block or its own end, by kill -9 too.

    A child made by a bare fork holds it as well, so after its parent was killed the lock stays until the child ends.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Lets others have it; a second call does nothing. The file stays: removing it would let two processes lock two files of one name."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            import fcntl

            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # explicitly, since closing leaves it to forked children
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def try_lock(path: str | Path) -> Lock | None:
    """The lock of the file `path`, which is made where it is missing; None while a lock on it is held, by this process or another.

    Raises RunError where the file cannot be made or its file system has no locks.
    """
    import fcntl  # not on Windows, where trained SAEs can still be loaded

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                        break
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # somebody removed the file in between: whoever comes next would lock another one
    except OSError as error:
        raise RunError(
            f"cannot lock {path}: {error.strerror or error}. Make its folder writable, or choose one on a file system that has locks (flock)."
        ) from error
    with suppress(OSError):  # a full disk leaves the holder unnamed, the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return Lock(path, descriptor)


def holder(path: str | Path) -> str:
    """Who holds the lock of `path`, as `process 123 on host`; only for messages, since that may have changed when it is read."""
    with suppress(OSError):
        return Path(path).read_text() or "another process"
    return "another process"


def wait_for_lock(path: str | Path, give_up: Callable[[], bool], say: Say = tell) -> Lock | None:
    """As `lock`; None as soon as `give_up()`, asked ten times a second while the lock is held elsewhere, is true."""
    told = False
    while (held := try_lock(path)) is None:
        if give_up():
            return None
        if not told:
            told = True
            say(f"waiting for {holder(path)}, which holds {path}")
        time.sleep(_POLL_SECONDS)
    return held


def lock(path: str | Path, say: Say = tell) -> Lock:
    """Waits until the lock of the file `path` is free and takes it; says once whom it waits for. Use as `with lock(path): ...`.

    Waits forever where the caller itself holds it. Raises RunError as `try_lock`.
    """
    held = wait_for_lock(path, lambda: False, say)
    assert held is not None
    return held

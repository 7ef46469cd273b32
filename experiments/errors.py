"""What a person is told when a command fails: one message and status 1 for what can be mended, a traceback for what is a bug of ours."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import yaml
from safetensors import SafetensorError

from switch_sae.cohort import Interrupted
from switch_sae.invocation import invocation
from switch_sae.runs import RunError

_MENDABLE = (ValueError, ConnectionError, FloatingPointError, ImportError, RunError)
"""Their own text says what was given, the rule, and the fix."""
_LAUNCHERS = ("joblib", "submitit", "ray")
"""Whose exceptions say that a process which they started ended without a result."""
_OUT_OF_MEMORY = re.compile(r"allocat\w* .*memory|not enough memory|out of memory|bad_alloc|[Ss]torage size calculation overflowed", re.DOTALL)


def verdict(error: BaseException) -> tuple[int, str] | None:
    """(exit status, what to tell) of an error that a user can mend or has caused; None for a bug, which keeps its traceback."""
    if isinstance(error, Interrupted):
        return 128 + error.signal, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped; what was written is whole."
    if isinstance(error, BrokenPipeError):  # `| head` closed our output
        return 141, ""
    text = _told(error)
    return None if text is None else (1, text)


def _told(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno is not None and error.strerror is not None:
        fix = {
            errno.EACCES: "Change its permissions, or give another path.",
            errno.EPERM: "Change its permissions, or give another path.",
            errno.ENOSPC: "Free some space, or give another path.",
            errno.ENOENT: "Give a path that is there.",
            errno.ENAMETOOLONG: "Give a shorter one.",
        }.get(error.errno, "Is the path what you meant, and its disk, or the network, in order?")
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}. {fix}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        wanted = re.search(r"allocate (\d+) bytes", str(error))
        what = f"{int(wanted[1]) / 1e9:,.1f} GB were asked for at once" if wanted else " ".join(str(error).split()) or "no reason given"
        return f"not enough memory: {what}. Lower sae.num_latents, batch_size, source.buffer_rows or evaluation.rows, or use a larger machine."
    if isinstance(error, SafetensorError):
        return f"a safetensors file cannot be read: {error}. It is cut, damaged or of another kind; copy it again."
    if isinstance(error, yaml.YAMLError):
        return f"this is not valid YAML: {' '.join(str(error).split())}. Correct the file."
    if type(error).__module__.partition(".")[0] in _LAUNCHERS:
        return (
            f"the process of a job ended without a result, most often killed for memory: {' '.join(str(error).split())} "
            f"Run folders are whole: go on with {invocation('train', resume='...')}, or the same command for a sweep in a sweep.folder."
        )
    return str(error) if isinstance(error, (*_MENDABLE, OSError)) else None


def finish(status: int, text: str = "") -> None:
    """Tells why on stderr and ends the process."""
    if text:
        print(f"\n{'error: ' if status == 1 else ''}{text}", file=sys.stderr)
    if status == 141:  # nobody reads what is still in the buffer: closing it must not fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


@contextmanager
def clear_errors() -> Iterator[None]:
    """One message instead of a traceback for mistakes a user can mend; 128 + signal as exit status after an interruption."""
    try:
        yield
        sys.stdout.flush()  # here, where a closed pipe can be told from a bug
    except (Exception, KeyboardInterrupt) as error:
        end = verdict(error)
        if end is None:
            raise
        finish(*end)

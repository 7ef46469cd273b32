"""Hydra's commands: one message for what goes wrong in a run, and one failure that stays one in a multirun, whatever launches its jobs."""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from switch_sae.files import tell

from .compose import CONF, taken_from_bundled
from .errors import clear_errors, finish, verdict
from .mistakes import explained, readable, swept

FAILURES: "list[Failure]" = []
"""Those that this process knows of."""


@dataclass(frozen=True)
class Failure:
    """What a job of a multirun returns that did not end well: never an exception, which launchers answer by ending other jobs, or cannot unpickle.

    It is noted in every process where it comes to be: in the job's, and, unpickled as the job's result, in the one that launched it.
    """

    job: str
    status: int
    text: str

    def __post_init__(self) -> None:
        FAILURES.append(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Failure, astuple(self)


def command(name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes a command of a function of the composed config `name`; what it is called with on the command line is Hydra's."""

    def decorate(main: Callable[[DictConfig], None]) -> Callable[[], None]:
        def run() -> None:
            words, launcher = tuple(readable(sys.argv[1:], name)), os.getpid()

            @functools.wraps(main)
            def job(composed: DictConfig) -> Failure | None:
                return run_job(main, composed, words, launcher)

            sys.argv[1:] = words
            FAILURES.clear()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, which are told below, instead of printing them itself
            with clear_errors():
                try:
                    hydra.main(version_base="1.3", config_path=CONF, config_name=name)(job)()
                except (HydraException, OmegaConfBaseException) as error:
                    raise ValueError(explained(error, words, name)) from error
                finally:
                    _tell_failures()
            if FAILURES:
                sys.exit(1 if any(failure.status == 1 for failure in FAILURES) else FAILURES[0].status)

        return run

    return decorate


def run_job(main: Callable[[DictConfig], None], composed: DictConfig, words: tuple[str, ...], launcher: int) -> Failure | None:
    """One job, in the process `launcher` or one that it started. A lone one ends its process when it fails; in a multirun a failure is told and
    returned, so that the others go on, and only an interruption of the launching process itself ends them all."""
    settings, here = HydraConfig.get(), os.getpid() == launcher
    try:
        with _terminable(not here):
            if line := taken_from_bundled(composed):
                tell(line)
            main(composed)
        return None
    except (Exception, KeyboardInterrupt) as error:
        end = verdict(error)
        if end is None:
            traceback.print_exc()
            end = 1, f"{type(error).__name__}: {error} (a bug of switch_sae: its traceback is above)"
        status, text = end
        text = {KeyboardInterrupt: "stopped before training began; nothing was saved.", BrokenPipeError: "stopped: nobody reads what it prints."}.get(
            type(error), text
        )
    if settings.mode is not RunMode.MULTIRUN or (here and status > 128):
        finish(status, text)
    keys = swept(words)
    name = ", ".join(word for word in settings.overrides.task if word.partition("=")[0] in keys) or f"job {settings.job.num}"
    print(f"\n{name}: {text}\nThe other jobs go on.", file=sys.stderr, flush=True)
    return Failure(name, status, text)


@contextmanager
def _terminable(is_worker: bool) -> Iterator[None]:
    """In a worker SIGTERM stops the job as Ctrl-C does, also where training does not listen: a worker that dies of it takes its pool along."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = None
    if is_worker:
        with suppress(ValueError):  # not in the main thread: signals are not ours there
            previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _tell_failures() -> None:
    if FAILURES:
        jobs: dict[str, list[str]] = {}
        for failure in FAILURES:
            jobs.setdefault(failure.text, []).append(failure.job)
        lines = [f"  {'; '.join(names)}: {text}" for text, names in jobs.items()]
        print("\n".join(["\nfailed in this multirun:", *lines]), file=sys.stderr)

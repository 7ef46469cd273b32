"""Kills a training run again and again, and shows that what comes out is bit for bit what an undisturbed run makes.

    python -m experiments.benchmarks.kill_test --kills 20 --seed 0

A small run (synthetic activations, a Switch SAE and two baselines on one stream) is trained once in peace. Then it is trained again in a process
that is ended by SIGKILL at random moments of its whole life, half of them inside the writing of a file, and resumed each time as
`make train RESUME=...` would. Final weights must be equal bit for bit, and so must logged rows, results and the list of files.

Processes are forked from one that has imported the library, so that a restart takes a fraction of a second. Nothing is on disk before imports end.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor

from switch_sae import orchestrator, runs
from switch_sae.activations import SyntheticSource
from switch_sae.config import Baseline, EvaluationConfig, RunConfig
from switch_sae.models import SwitchSAE
from switch_sae.training import TrainerConfig
from switch_sae.wandb_logger import WandbConfig, WandbMode

STEPS, CHECKPOINT_EVERY = 120, 4
TIMES = ("seconds", "train_tokens_per_second", "train_seconds", "wall_seconds", "peak_bytes")
MOMENTS = ("half written", "before the rename", "after the rename")


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: `delay` seconds after `step` was logged (step 0: after the start), or at one of MOMENTS in writing the file `write`."""

    step: int = 0
    delay: float = 0.0
    write: str | None = None
    """A file's name; for a checkpoint, that of the first one that may be hit."""
    moment: str = ""

    def __str__(self) -> str:
        if self.write is not None:
            return f"{self.write}, {self.moment}"
        return f"{self.delay * 1e3:.0f} ms after " + (f"step {self.step}" if self.step else "the start")


def run_config(parent: Path) -> RunConfig:
    """About two seconds of training, everything in it that a run can have without a language model: latents die and AuxK revives them."""
    return RunConfig(
        source=SyntheticSource.Config(d_in=32, seed=1),
        sae=SwitchSAE.Config(num_latents=256, k=4, num_experts=4),
        baselines=[Baseline.width_matched, Baseline.frozen_router],
        trainer=TrainerConfig(lr=3e-3, dead_after_tokens=2000),
        evaluation=EvaluationConfig(rows=2000, bootstrap=20),
        wandb=WandbConfig(mode=WandbMode.disabled),
        calibration_rows=512,
        tokens=STEPS * 128,
        batch_size=128,
        log_every=1,
        checkpoint_every=CHECKPOINT_EVERY,
        device="cpu",
        threads=1,
        runs=str(parent),
        name="killed",
    )


def train_or_resume(parent: Path, kill: Kill | None = None) -> None:
    """What one process does: begins the run in `parent`, or goes on with the one that is there."""
    if kill is not None and kill.write is not None:
        die_in_write(kill.write, kill.moment)
    started = [path.parent for path in parent.glob("*/config.json")]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if started:
            orchestrator.resume_training(started[0])
        else:
            orchestrator.run_training(run_config(parent))


def die_in_write(name: str, moment: str) -> None:
    """Makes this process end itself by SIGKILL inside `write_atomically` of the named file, as a kill from outside would at that moment."""
    write, fsync, replace = runs.write_atomically, os.fsync, Path.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fatal_write(path: Path, content: Any) -> None:
        def fatal_fsync(file: int) -> None:
            if moment == "half written":
                os.ftruncate(file, os.fstat(file).st_size // 2)
            fsync(file)
            die()

        def fatal_replace(part: Path, target: Path) -> None:
            replace(part, target)
            die()

        if path.name.split("-")[0] == name.split("-")[0] and path.name >= name:
            fatal = patch.object(Path, "replace", fatal_replace) if moment == "after the rename" else patch.object(os, "fsync", fatal_fsync)
            fatal.start()
        write(path, content)

    patch.object(runs, "write_atomically", fatal_write).start()


def plan(kills: int, seed: int, startup: float, evaluation: float) -> list[Kill]:
    """Random kills in the order of the run's life: its start, its first steps, checkpoints and steps throughout, evaluation and last files."""
    rng = random.Random(seed)
    moments = itertools.cycle(rng.sample(MOMENTS, len(MOMENTS)))

    def in_write(name: str) -> Kill:
        return Kill(write=name, moment=next(moments))

    first = [in_write("environment.json"), in_write("config.json")]
    first += [Kill(delay=rng.uniform(0, startup)), Kill(step=rng.randrange(1, CHECKPOINT_EVERY))]
    last = [in_write("model.safetensors"), in_write("training.json"), Kill(step=STEPS, delay=rng.uniform(0, evaluation / 3))]
    last += [Kill(write="results.json", moment=MOMENTS[-1])]
    middle = max(0, kills - len(first) - len(last))
    body = []
    for i in range(middle):
        step = max(1, round(STEPS * (i + rng.random()) / (middle + 1)))
        checkpoint = f"step-{step:08d}.safetensors"
        body.append(Kill(step=step, delay=rng.uniform(0, 0.02)) if i % 2 else in_write("metrics.jsonl" if i % 4 == 2 else checkpoint))
    return (first + body + last)[:kills]


@dataclass(frozen=True)
class Outcome:
    landed: int
    """Kills that ended a process before it was done."""
    differences: list[str]
    """What is not as in the undisturbed run."""


def kill_test(folder: Path, kills: int, seed: int, say: Callable[[str], None] = print) -> Outcome:
    """Runs both runs below `folder` and compares them. Raises RuntimeError when a killed run cannot go on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["switch_sae.orchestrator", "torch._dynamo"])

    def start(parent: Path, kill: Kill | None = None) -> BaseProcess:
        process = context.Process(target=train_or_resume, args=(parent, kill))
        process.start()
        return process

    imported = context.Process(target=time.sleep, args=(0,))
    imported.start()
    imported.join()
    peaceful, killed = folder / "peaceful", folder / "killed"
    peaceful.mkdir(parents=True)
    killed.mkdir()
    began = time.perf_counter()
    process = start(peaceful)
    marks = [_wait(process, peaceful, step) - began for step in (1, STEPS)]
    process.join()
    ended = time.perf_counter() - began
    if process.exitcode:
        raise RuntimeError(f"the undisturbed run failed with status {process.exitcode}: see above.")
    say(f"undisturbed: {STEPS} steps in {ended:.1f} s")
    landed = 0
    for kill in [*plan(kills, seed, marks[0], ended - marks[1]), None]:
        process = start(killed, kill)
        if kill is not None and kill.write is None:
            _wait(process, killed, kill.step)
            time.sleep(kill.delay)
            process.kill()
        process.join()
        if process.exitcode == 0:
            say("finished")
            break
        if kill is None or process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"after {landed} kills the run could not go on: status {process.exitcode}, see above.")
        landed += 1
        say(f"kill {landed:>2}  {kill}: logged to step {_logged(killed)}, last checkpoint at {_saved(killed)}")
    return Outcome(landed, compare(_only_run(peaceful), _only_run(killed)))


def compare(expected: Path, found: Path) -> list[str]:
    """What differs between two finished run folders, apart from times: weights bit for bit (the order of names in a
    safetensors header is random), logged rows, results, and which files there are."""
    names = [{str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (expected, found)]
    differences = [f"{name}: only in {'the undisturbed' if name in names[0] else 'the killed'} run" for name in sorted(names[0] ^ names[1])]
    for name in sorted(name for name in names[0] & names[1] if name.endswith(".safetensors")):
        with safe_open(expected / name, "pt") as one, safe_open(found / name, "pt") as other:
            if one.metadata() != other.metadata() or one.keys() != other.keys():
                differences.append(f"{name}: headers differ")
                continue
            names_of_tensors = one.keys()
            differences += [f"{name}: {key} differs" for key in names_of_tensors if not _same_bits(one.get_tensor(key), other.get_tensor(key))]
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (expected, found)]
    if rows[0] != rows[1]:
        steps = sorted({row["step"] for row in rows[0] + rows[1] if rows[0].count(row) != rows[1].count(row)})
        differences.append(f"metrics.jsonl: {len(rows[0])} rows against {len(rows[1])}; steps that differ: {steps or 'none, only their order'}")
    results = [json.dumps(_without_times(json.loads((run / "results.json").read_text()))) for run in (expected, found)]
    if results[0] != results[1]:
        differences.append("results.json differs")
    return differences


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Stricter than equality: NaN and the sign of zero count."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _only_run(parent: Path) -> Path:
    (path,) = parent.glob("*/config.json")
    return path.parent


def _logged(parent: Path) -> int:
    """The last step with a whole row in metrics.jsonl; 0 where there is none."""
    rows = [line for path in parent.glob("*/metrics.jsonl") for line in path.read_text().splitlines(keepends=True)[-2:] if line.endswith("\n")]
    return json.loads(rows[-1])["step"] if rows else 0


def _saved(parent: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in parent.glob("*/checkpoints/step-*.safetensors")), default=0)


def _wait(process: BaseProcess, parent: Path, step: int) -> float:
    """Returns the time at which `step` has been logged or the process has ended."""
    while process.is_alive() and _logged(parent) < step:
        time.sleep(0.001)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_test(Path(folder), options.kills, options.seed)
    if outcome.landed < options.kills:
        outcome.differences.append(f"only {outcome.landed} of {options.kills} kills landed")
    print("\n".join(outcome.differences) or f"identical after {outcome.landed} kills: weights, logged rows, results, files")
    sys.exit(1 if outcome.differences else 0)


if __name__ == "__main__":
    main()

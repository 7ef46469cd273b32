"""Twelve SAEs from one pass over the language model against twelve separate runs: time, and whether the weights are the same bits.

python -m experiments.benchmarks.sweep                # about 3 minutes; a quiet machine

Both train, save and score the same SAEs on the bundled language model in this process, imports done. A pass is what its activations cost a separate
run: loading the model, reading the text, the model's forward passes. The sweep may take the separate runs' time less eleven passes, plus 5 %.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from experiments.errors import clear_errors
from switch_sae import load_sae
from switch_sae.activations import LanguageModelSource
from switch_sae.config import EvaluationConfig
from switch_sae.models import SwitchSAE
from switch_sae.orchestrator import run_training
from switch_sae.runs import RunDir
from switch_sae.stream import Stream
from switch_sae.sweep import SweepConfig, SweepFolder, SweepOptions, run_sweep
from switch_sae.training import TrainerConfig
from switch_sae.wandb_logger import WandbConfig, WandbMode


def config(folder: Path, tokens: int) -> SweepConfig:
    return SweepConfig(
        source=LanguageModelSource.Config(hook="blocks.2.hook_resid_post"),
        sae=SwitchSAE.Config(num_latents=4096, k=16),
        trainer=TrainerConfig(lr=3e-3),
        evaluation=EvaluationConfig(rows=2000, downstream_contexts=0, bootstrap=0),
        wandb=WandbConfig(mode=WandbMode.disabled),
        tokens=tokens, batch_size=1024, runs=str(folder / "alone"),
        sweep=SweepOptions(experts=[1, 2, 4, 8], seeds=3, folder=str(folder / "sweep")),
    )  # fmt: skip


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextmanager
def passes() -> Iterator[list[float]]:
    """Collects the seconds that runs spend on their activations inside the block: loading the model, reading the text, its passes."""
    spent: list[float] = []
    is_inside = False

    def timed(action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal is_inside
            if is_inside:  # the calibration rows are drawn while the stream is built
                return action(*arguments)
            is_inside, began = True, time.perf_counter()
            try:
                return action(*arguments)
            finally:
                is_inside = False
                spent.append(time.perf_counter() - began)

        return call

    with patch.object(Stream, "__init__", timed(Stream.__init__)), patch.object(LanguageModelSource, "__next__", timed(LanguageModelSource.__next__)):
        yield spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    options = parser.parse_args()

    def quiet(line: str) -> None:
        pass

    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        settings = config(Path(folder), options.tokens)
        run_training(replace(settings.base, tokens=settings.batch_size), quiet)  # imports, first use of everything
        together = seconds(lambda: run_sweep(settings, quiet))
        sweep = SweepFolder.open(Path(folder) / "sweep")
        runs: dict[str, RunDir] = {}
        with passes() as spent:
            alone = seconds(lambda: runs.update({name: run_training(member, quiet) for name, member in sweep.members.items()}))
        same = all(
            torch.equal(ours, theirs)
            for name, run in runs.items()
            for ours, theirs in zip(load_sae(sweep.run(name).path).state_dict().values(), load_sae(run.path).state_dict().values(), strict=True)
        )
    count, one = len(runs), sum(spent) / len(runs)
    allowed = 1.05 * (alone - (count - 1) * one)
    print(f"\n{count} separate runs     {alone:7.1f} s, of which a pass takes {one:.1f} s")
    print(f"one sweep            {together:7.1f} s, {alone / together:.2f} times as fast")
    print(f"allowed              {allowed:7.1f} s = 1.05 x ({count} runs - {count - 1} passes): {'kept' if together <= allowed else 'EXCEEDED'}")
    print(f"final weights        {'the same bits' if same else 'DIFFER'}")
    if not same or together > allowed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

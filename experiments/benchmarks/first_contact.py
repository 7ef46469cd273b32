"""The first minutes on a GPU in one call: each kernel alone, then memory, then steps, then speed. Every part has a time limit and a log of its own.

    python -m experiments.benchmarks.first_contact --recording launches.zip --out OUT            # all parts, about 14 minutes
    python -m experiments.benchmarks.first_contact --recording launches.zip --out OUT --parts versions compile replay memory      # the first call
    python -m experiments.benchmarks.first_contact --out OUT --parts suite                       # the second
    python -m experiments.benchmarks.first_contact --quick --out OUT                             # tiny, without a GPU, to see that it works

Needs what `experiments.benchmarks.gpu` needs. A part that fails does not keep the others from running: the last lines say what held, and
OUT/summary.txt says it after every part. With TRITON_CACHE_DIR set to a folder that `experiments.benchmarks.ahead` filled, compiling takes seconds.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.benchmarks.cases import TINY, Case
from experiments.benchmarks.contenders import OurStep, activations, build_sae
from experiments.benchmarks.gpu import clocks, versions
from experiments.benchmarks.peers import ROOT
from experiments.benchmarks.recording import interpreter
from experiments.benchmarks.searches import CPU, SEARCHES, SMALL, SearchCase, SearchStep, build_search
from switch_kernels import Backend, Regime, resolve

SUITE = ("targets", "searches", "stages", "architectures", "contenders", "parity")
"""Sections of the benchmark; its roofs and correctness, eager before graphs, come first."""
STEPS = (*(regime.value for regime in Regime), "searches")
"""Whose memory is checked."""
PARTS = ("versions", "compile", "replay", "memory", "suite")


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    seconds: float
    skipped: str = ""
    """Why it does not run."""


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"experiments.benchmarks.{name}", *arguments]


def plan(recording: Path | None, out: Path, minutes: float, quick: bool, commit: str | None) -> list[Part]:
    """All parts, in order."""
    has_gpu, sanitizer = torch.cuda.is_available(), shutil.which("compute-sanitizer")
    no_gpu = "" if has_gpu else "there is no GPU"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if has_gpu else "9.0"
    of_recording = [] if recording is None else ["--recording", str(recording)]
    no_recording = "no --recording was given" if recording is None else ""
    suite = [
        "--minutes",
        str(minutes),
        "--sections",
        *SUITE,
        "--out",
        str(out),
        *(["--quick"] if quick else []),
        *(["--commit", commit] if commit else []),
    ]
    parts = [
        Part("versions", module("first_contact", "--versions"), 30),
        Part("compile", module("ahead", "--capability", capability, *of_recording, "--sections", *SUITE), 180, no_gpu),
        Part("replay", module("replay", "replay", str(recording)), 240, no_recording or ("" if has_gpu or interpreted else no_gpu)),
    ]
    for kind in STEPS:
        step = module("first_contact", "--one-step", kind)
        if interpreted and not has_gpu:  # the step by itself
            parts.append(Part(f"memory, {kind}", step, 300))
        else:
            checked = [str(sanitizer), "--tool", "memcheck", "--error-exitcode", "9", *step]
            parts.append(Part(f"memory, {kind}", checked, 90, no_gpu or ("" if sanitizer else "compute-sanitizer is not installed")))
    return [*parts, Part("suite", module("gpu", *suite), 60 * minutes + 70)]


def run(part: Part, out: Path) -> str:
    """What became of a part; its output goes to the terminal and to its log, line by line."""
    print(f"== {part.name} (at most {part.seconds:.0f} s)", flush=True)
    if part.skipped:
        return f"SKIPPED: {part.skipped}"
    started, log = time.monotonic(), out / f"{part.name.replace(', ', '_')}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(part.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        shown, late = 0, False
        while True:
            ended = process.poll() is not None
            text = log.read_bytes()
            sys.stdout.write(text[shown:].decode(errors="replace"))
            sys.stdout.flush()
            shown = len(text)
            if ended:
                break
            if late := time.monotonic() - started > part.seconds:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:  # a hanging kernel
                    process.kill()
                    process.wait()
            else:
                time.sleep(0.2)
    took = f"{time.monotonic() - started:.0f} s"
    return f"CUT OFF after {took}" if late else f"holds, {took}" if process.returncode == 0 else f"FAILED with exit code {process.returncode}, {took}"


def one_step(kind: str) -> None:
    """A tiny training step with dead latents, eager: in one of the regimes, or of SAEs that search."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        interpreter()
    if kind == "searches":
        losses = [search_loss(name, device) for name in SEARCHES if "shared" in name or "competition" in name]
    else:
        shape = replace(TINY, S=2) if kind == Regime.sparse.value else TINY
        x_TD = activations(shape, 1, device)[0]
        losses = [OurStep(build_sae(shape, x_TD), Case(shape, regime=Regime(kind), dead=5), Backend.triton).loss(x_TD).item()]
    print(f"   one step, {kind}: loss {losses}")
    sys.exit(0 if all(map(math.isfinite, losses)) else 1)


def search_loss(name: str, device: torch.device) -> float:
    """Of a tiny step."""
    case = SearchCase(name, SMALL)
    x_TD = activations(case.shape, 1, CPU)[0]
    step = SearchStep(build_search(case, x_TD).to(device), case.shape.T, resolve(Backend.triton, case.precision, device))
    step.mark_dead(0, 3)
    return step.loss(x_TD.to(device)).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="experiments.benchmarks.first_contact", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recording", type=Path, help="made by `experiments.benchmarks.replay record`")
    parser.add_argument("--out", type=Path, help="folder for logs, tables and the summary")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.3, help="for the suite")
    parser.add_argument("--commit", help="what to record as the commit, where the checkout has no git history")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--versions", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one-step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.versions:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(f"   {versions(device, options.commit)}, python {sys.version.split()[0]}, cuda {torch.version.cuda}; {clocks()}")
        return
    if options.one_step:
        one_step(options.one_step)
    if options.out is None:
        parser.error("--out FOLDER is needed: everything that is found out is written there")
    if options.recording is not None and not options.recording.is_file():
        parser.error(f"there is no recording {options.recording}: make it with `python -m experiments.benchmarks.replay record FILE`")
    options.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    out = options.out.absolute()
    recording = options.recording.absolute() if options.recording else None
    for part in plan(recording, out, options.minutes, options.quick, options.commit):
        if part.name.split(",")[0] in options.parts:
            lines.append(f"{part.name:<16} {run(part, out)}")
            print(f"   {lines[-1]}", flush=True)
            (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("== first contact\n" + "\n".join(f"   {line}" for line in lines))
    sys.exit(sum("FAILED" in line or "CUT OFF" in line for line in lines))


if __name__ == "__main__":
    main()

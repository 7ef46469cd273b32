"""Compiles what the GPU benchmark and a replay will launch into Triton's cache: no GPU is needed, and where there is one none is touched.

    python -m experiments.benchmarks.ahead --capability 9.0 --cache triton-cache --recording launches.zip      # here; then carry the folder along
    TRITON_CACHE_DIR=triton-cache python -m experiments.benchmarks.first_contact ...                           # there

The benchmark runs this by itself first, with all processors. The launchers run on meta tensors, so the kernels are exactly those that steps ask for.
A carried cache holds for the same wheel of triton (the same version for the same Python), the same kernel sources and the same capability; anything
else misses it and compiles, so that a wrong cache costs time and never changes a result.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from experiments.benchmarks import architectures, gates
from experiments.benchmarks.cases import MAIN, Case, compile_groups
from experiments.benchmarks.compile_kernels import Job, StubDriver, collect, labels
from experiments.benchmarks.kernel_cases import evaluate
from experiments.benchmarks.nodes import engine_on_meta, step_on_meta
from experiments.benchmarks.record import compile_sooner
from experiments.benchmarks.recording import Recorded, Recording, kernel_of, rebuilt
from experiments.benchmarks.searches import SearchCase, search_cases, search_graph_cases
from experiments.benchmarks.suite import SECTIONS
from switch_kernels import Precision, Shape
from switch_kernels.gpu.gemm_tiles import compiling_for
from switch_kernels.gpu.launch import launch, next_power_of_2


class Driver(StubDriver):
    """Of an NVIDIA GPU of any capability, which `compile_kernels` need not know."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        self.device = 100 + self.target.arch


def requests(sections: list[str], tiny: bool) -> dict[str, Callable[[], None]]:
    """One step of every case that these sections run, on meta tensors, by importance."""
    cases = [case for group in compile_groups(tiny, sections) for case in group]
    wanted = {str(case): partial(step, case) for case in cases}
    if "searches" in sections:
        wanted |= {f"{case}, {dead} dead, step": partial(search_step, case, dead) for case, dead in search_steps(tiny)}
    if "architectures" in sections:
        sizes = architectures.TINY_SIZES if tiny else architectures.SIZES
        for name, config in architectures.configs(sizes).items():
            if architectures.why_autograd(config, sizes.D) is None:
                wanted[f"architecture {name}"] = partial(architecture_step, config, sizes)
    return wanted | {"evaluate": partial(evaluate, MAIN)}


def search_steps(tiny: bool) -> list[tuple[SearchCase, int]]:
    """What the checks of SAEs that search run, with as many dead latents of an expert as a step has room for in each."""
    found = []
    for case in dict.fromkeys(replace(case, dead=0) for case in [*search_cases(tiny), *search_graph_cases(tiny)]):
        most = min(gates.MORE, case.shape.F // 2) * (2 if "shared" in case.name else 1)
        found += [(case, dead) for dead in dict.fromkeys((0, 64, max(64, next_power_of_2(most))))]
    return found


def search_step(case: SearchCase, dead: int) -> None:
    engine_on_meta(case.config(), case.shape.T, case.shape.D, case.precision, dead, regime=case.regime)()


def architecture_step(config: Any, s: Shape) -> None:
    engine_on_meta(config, s.T, s.D, Precision.float32)()


def step(case: Case) -> None:
    step_on_meta(as_padded(case))()


def as_padded(case: Case) -> Case:
    """With as many dead latents as a step has room for: a power of two, at least 64."""
    return replace(case, dead=max(64, next_power_of_2(case.dead))) if case.dead else case


def replays(path: Path) -> dict[str, Callable[[], None]]:
    """Every recorded launch, on meta tensors."""
    recording = Recording(path)
    return {f"replay {number}": partial(replay_on_meta, recorded) for number, recorded in enumerate(recording.launches)}


def replay_on_meta(recorded: Recorded) -> None:
    storages = [torch.empty(2**40, dtype=torch.uint8, device="meta") for _ in recorded.before]
    launch(kernel_of(recorded), tuple(recorded.grid), *(rebuilt(a, storages) for a in recorded.args), **without_options(recorded.kwargs))


def without_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `launch` adds by itself left out."""
    return {name: value for name, value in kwargs.items() if name != "enable_fp_fusion"}


def compile_into_cache(jobs: list[Job], processes: int, say: Callable[[str], None]) -> int:
    """Each job in a process of its own, so that a compiler that aborts takes nothing with it; the number that failed."""
    context = multiprocessing.get_context("fork")  # kernels and meta tensors need no pickling
    waiting, running, failed = list(reversed(list(zip(jobs, labels(jobs), strict=True)))), dict[int, tuple[Any, str]](), 0
    while waiting or running:
        while waiting and len(running) < processes:
            job, label = waiting.pop()
            process = context.Process(target=_compile, args=(job, label), daemon=True)
            process.start()
            running[process.sentinel] = process, label
        for sentinel in wait(list(running)):
            process, label = running.pop(sentinel)  # type: ignore[index]
            process.join()
            if process.exitcode:
                failed += 1
                say(f"   FAILED {label}, exit code {process.exitcode}")
    return failed


def _compile(job: Job, label: str) -> None:
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # on a failure Triton prints the whole assembly
            job.launch.kernel.warmup(*job.launch.args, grid=job.launch.grid, **job.launch.kwargs)
    except Exception as error:  # the compiler's errors have no common type
        print(f"   {label} ({job.case}): {type(error).__name__}: {str(error)[-800:]}", flush=True)
        sys.exit(1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.benchmarks.ahead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", default="9.0", help="compute capability, such as 9.0 for an H100 or H200")
    parser.add_argument("--cache", type=Path, help="folder to fill instead of Triton's own cache")
    parser.add_argument("--recording", type=Path, help="a recording whose replay shall find its kernels too")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help="of the GPU benchmark")
    parser.add_argument("--only-recording", action="store_true", help="leave the benchmark's kernels out")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="compiler processes")
    parser.add_argument("--quick", action="store_true", help="the benchmark's tiny sizes")
    options = parser.parse_args(arguments)
    major, _, minor = options.capability.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        parser.error(f"--capability {options.capability!r} must be two numbers, as in 9.0")
    compile_sooner()
    if options.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.absolute())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the compilers too
    started, capability = time.monotonic(), (int(major), int(minor))
    triton.runtime.driver.set_active(Driver(capability))
    cases = {} if options.recording is None else replays(options.recording)
    cases |= {} if options.only_recording else requests(options.sections, options.quick)
    with compiling_for(capability):
        jobs = collect(cases)
    print(f"   triton {triton.__version__}, capability {options.capability}: {len(jobs)} kernels", flush=True)
    failed = compile_into_cache(jobs, options.jobs, partial(print, flush=True))
    size = sum(file.stat().st_size for file in options.cache.rglob("*") if file.is_file()) / 1e6 if options.cache else 0.0
    where = f" into {options.cache} ({size:.0f} MB)" if options.cache else ""
    print(f"   {len(jobs) - failed} of {len(jobs)} kernels compiled{where} by {options.jobs} processes in {time.monotonic() - started:.0f} s")
    sys.exit(min(1, failed))


if __name__ == "__main__":
    main()

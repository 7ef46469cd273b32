"""Compiles the Triton kernels for a GPU without having one: exactly what the launch code requests at production sizes, and nothing else.

    python -m experiments.benchmarks.compile_kernels                              # for sm_90; 2 processes
    python -m experiments.benchmarks.compile_kernels --target sm_80 gfx942 --only encode
    python -m experiments.benchmarks.compile_kernels --check                      # exit 1 on a failed compilation, a spill, or too much shared memory

The launchers run on meta tensors, their launches are caught, and what differs is compiled once. Per kernel: registers a thread, bytes of stack,
loads and stores of spilled registers (LDL, STL), shared memory, programs that fit on a multiprocessor, counts of tensor-core, bulk-copy (TMA) and
asynchronous-copy instructions, all instructions, seconds. Compiled kernels are kept in Triton's own cache.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it.")

import torch
import triton
from triton.backends.compiler import GPUTarget

from experiments.benchmarks.kernel_cases import CASES
from experiments.benchmarks.record import compile_sooner
from switch_kernels.gpu.gemm_tiles import compiling_for
from switch_kernels.gpu.launch import Launch, launches_to

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what one program (block) may take of it."""

    gpu: GPUTarget
    shared_memory: int
    """Most bytes of shared memory of one program; a multiprocessor has 1 KiB more."""
    capability: tuple[int, int]
    """What `torch.cuda.get_device_capability` says of it."""


TARGETS = {
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, (9, 0)),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, (8, 0)),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, (9, 4)),
}
NVIDIA_INSTRUCTIONS = {"LDL": "LDL", "STL": "STL", "HGMMA": "HGMMA", "HMMA": "HMMA", "TMA": "UTMALDG|UTMASTG", "cp.async": "LDGSTS"}


@dataclass
class Job:
    """One kernel with one set of argument types, constants and options."""

    launch: Launch
    case: str
    """The first case that requests it."""
    types: dict[str, str]
    constants: dict[str, Any]


@dataclass
class Report:
    """What came of a job: figures by column, or why it failed."""

    figures: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class StubDriver:
    """The part of a driver that Triton asks before it compiles. Every target is a device of its own, so that each has its own cache."""

    def __init__(self, target: Target) -> None:
        self.target = target.gpu
        self.device = list(TARGETS.values()).index(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def collect(cases: dict[str, Callable[[], None]]) -> list[Job]:
    """Runs every case on meta tensors; returns the distinct kernels that it would launch, compiling none."""
    jobs: dict[tuple[Any, str], Job] = {}

    def handler(case: str, launch: Launch) -> None:
        def before_compilation(*, key: str, compile: dict[str, Any], **_: Any) -> bool:
            names = launch.kernel.arg_names
            constants = {names[path[0]]: value for path, value in compile["constants"].items() if len(path) == 1}
            jobs.setdefault((launch.kernel, str(key)), Job(launch, case, compile["signature"], constants))
            return True  # do not compile

        triton.knobs.runtime.jit_cache_hook = before_compilation
        launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.kwargs)
        triton.knobs.runtime.jit_cache_hook = None

    for case, run in cases.items():
        with launches_to(partial(handler, case)):
            run()
    return list(jobs.values())


def compile_job(job: Job, target: Target, count: bool = True) -> Report:
    """Compiles and measures one job; to `count` its instructions takes a fifth of the time."""
    start = time.perf_counter()
    try:
        kernel = job.launch.kernel.warmup(*job.launch.args, grid=job.launch.grid, **job.launch.kwargs)
    except Exception as error:  # the compiler's errors have no common type
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        telling = [line for line in lines if re.search(r"fatal|error", line, re.IGNORECASE)]
        return Report(problem=f"{type(error).__name__}: {(telling or lines)[0]} ... {lines[-1]}"[:400])
    seconds = time.perf_counter() - start
    figures = nvidia_figures(kernel, target, count) if target.gpu.backend == "cuda" else amd_figures(kernel)
    problems = {
        "SPILLS REGISTERS": figures["spills"] > 0,
        f"SHARED MEMORY OVER {target.shared_memory} B": kernel.metadata.shared > target.shared_memory,
        "NEEDS GLOBAL SCRATCH MEMORY, which nothing allocates": kernel.metadata.global_scratch_size > 0,
    }
    return Report({**figures, "s": round(seconds, 1)}, "; ".join(text for text, found in problems.items() if found))


def nvidia_figures(kernel: Any, target: Target, count: bool) -> dict[str, Any]:
    """Resources from the compiled binary and, to `count` instructions, its disassembly. What spills lies on the stack: without one nothing did."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        tool = partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = tool([TOOLS / "cuobjdump", "-res-usage", binary.name]).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
        assembly = tool([TOOLS / "nvdisasm", "-c", "-ndf", binary.name]).stdout if count or stack else ""
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", assembly)
    counts = {name: sum(bool(re.fullmatch(pattern, op)) for op in instructions) for name, pattern in NVIDIA_INSTRUCTIONS.items()}
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    per_program = -(-registers // 8) * 8 * 32 * warps
    resident = min(65536 // per_program, (target.shared_memory + 1024) // (shared + 1024), 64 // warps, 32)
    spills = counts.pop("LDL") + counts.pop("STL")
    found = {"reg": registers, "stack": stack, "spills": spills, "shared": shared, "CTA/SM": resident}
    return {**found, **counts, "instr": len(instructions)} if count else found


def amd_figures(kernel: Any) -> dict[str, Any]:
    """Resources as the assembler records them."""
    assembly = kernel.asm["amdgcn"]
    names = {"vgpr": "vgpr_count", "agpr": "agpr_count", "sgpr": "sgpr_count", "spills": "vgpr_spill_count"}
    counts = {column: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for column, name in names.items()}  # type: ignore[index]
    return {**counts, "shared": kernel.metadata.shared, "MFMA": len(re.findall(r"v_mfma", assembly))}


def compile_all(jobs: list[Job], target: Target, processes: int, count: bool = True) -> Iterator[tuple[Job, Report]]:
    """Compiles each job in a child process, so that a compiler that aborts takes nothing with it; yields in the order of completion."""
    context = multiprocessing.get_context("fork")  # kernels and meta tensors need no pickling
    waiting = list(reversed(jobs))
    running: dict[Any, tuple[Job, Any]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_compile_and_send, args=(job, target, count, sender))
            process.start()
            sender.close()
            running[receiver] = job, process
        ready: list[Any] = wait(list(running))
        for receiver in ready:
            job, process = running.pop(receiver)
            try:
                report = receiver.recv()
            except EOFError:
                process.join()
                report = Report(problem=f"the compiler died with exit code {process.exitcode}")
            process.join()
            yield job, report


def _compile_and_send(job: Job, target: Target, count: bool, sender: Connection) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # on a failure Triton prints the whole assembly
        report = compile_job(job, target, count)
    sender.send(report)


def labels(jobs: list[Job]) -> list[str]:
    """Names that tell the jobs of one kernel apart: the constants that are not the same in all of them, then if need be the argument types."""
    names = [job.launch.kernel.__name__ for job in jobs]
    for described in ("constants", "types"):
        for name in {name for name in names if names.count(name) > 1}:
            same = [n for n in range(len(jobs)) if names[n] == name]
            of = [getattr(jobs[n], described) for n in same]
            differing = [key for key in of[0] if len({str(values.get(key)) for values in of}) > 1]
            for n, values in zip(same, of, strict=True):
                names[n] += "".join(f" {key}={values[key]}" for key in differing if key in values)
    return [f"{name} w{job.launch.kwargs['num_warps']} s{job.launch.kwargs['num_stages']}" for name, job in zip(names, jobs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=["sm_90"])
    parser.add_argument("--only", default="", help="only cases and kernels whose name contains this")
    parser.add_argument("--check", action="store_true", help="exit 1 if a kernel fails; counts no instructions")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes")
    args = parser.parse_args()
    compile_sooner()
    failed = 0
    for name in args.target:
        target = TARGETS[name]
        triton.runtime.driver.set_active(StubDriver(target))
        start = time.perf_counter()
        with compiling_for(target.capability):
            jobs = collect(CASES)
        jobs = [job for job in jobs if args.only in job.case or args.only in job.launch.kernel.__name__]
        if not jobs:
            parser.error(f"--only {args.only!r} matches no case and no kernel.")
        print(f"triton {triton.__version__}, {name}: {len(jobs)} kernels", flush=True)
        label_of = {id(job): label for job, label in zip(jobs, labels(jobs), strict=True)}
        header: list[str] = []
        for job, report in compile_all(jobs, target, args.jobs, count=not args.check):
            if report.figures and list(report.figures) != header:
                header = list(report.figures)
                print(" ".join(f"{column:>8}" for column in header))
            figures = " ".join(f"{report.figures[column]:>8}" for column in header) if report.figures else ""
            print(f"{figures}  {label_of[id(job)]}", flush=True)
            if report.problem:
                failed += 1
                print(f"    FAILED ({job.case}): {report.problem}", flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s\n")
    if failed:
        print(f"{failed} kernels failed")
        sys.exit(1 if args.check else 0)


if __name__ == "__main__":
    main()

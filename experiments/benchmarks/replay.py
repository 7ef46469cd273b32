"""Each Triton kernel by itself on this device, from bytes recorded in Triton's interpreter: names the kernel that is wrong, whatever others do.

    TRITON_INTERPRET=1 python -m experiments.benchmarks.replay record launches.zip       # on any CPU, minutes; with the tiles that a GPU gets
    python -m experiments.benchmarks.replay replay launches.zip                          # on a GPU; mostly compilation
    TRITON_INTERPRET=1 python -m experiments.benchmarks.replay replay launches.zip       # in the interpreter: every byte equal

A recording holds every launch of some small training steps, also of SAEs that search, and of encoding and decoding: the arguments before, and what
the launch changed. Kernels are found by module and name. A replayed launch must leave integers, copies and all that it only reads as they were
recorded; what it computes in floating point may differ by `LIMITS`. Recordings hold no code and are made again whenever a kernel's arguments change.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.benchmarks.record import compile_sooner
from experiments.benchmarks.recording import (
    CASES,
    SEARCHES,
    Recorded,
    Recording,
    StaleError,
    interpreter,
    kernel_of,
    rebuilt,
    record,
    source_hash,
    tensors_of,
    tiles_of_a_gpu,
)

LIMITS = {torch.float32: (2e-3, 2e-5), torch.bfloat16: (1e-2, 1e-4)}
"""(relative to the number itself, relative to the numbers beside it). Inputs are the same bits, so that only the order of a float32 sum, fused
multiply-adds and one rounding at the end can differ; a number that cancelled to almost nothing is measured against its row and its column."""
MANY = 16
"""A row or column of fewer numbers says nothing of the size of each: they may be different quantities side by side."""
COPIES = (
    *("_count_experts", "_sum_counts", "_place_pairs", "_select_rows", "_scatter_latents", "_keep_topk", "_mark_fired"),
    *("_row_candidates", "_collect_scores", "_count_digits", "_keep_above", "_keep_reaching", "_write_keys"),
)
"""Kernels that move numbers and compute none: every bit must be right."""
UNORDERED = ("_collect_scores",)
"""Kernels that write the same numbers in any order."""


@dataclass(frozen=True)
class Difference:
    """How far one argument is from what was recorded, in units of what is allowed."""

    argument: str
    error: float
    what: str

    @property
    def holds(self) -> bool:
        return self.error <= 1  # NaN does not


def run(recording: Recording, launch: Recorded, device: torch.device) -> list[Tensor]:
    """The storages after the launch, on this device."""
    kernel, storages = kernel_of(launch), recording.storages(launch.before, device)
    kernel[tuple(launch.grid)](*(rebuilt(argument, storages) for argument in launch.args), **launch.kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [storage.cpu() for storage in storages]


def compare(launch: Recorded, before: list[Tensor], found: list[Tensor], expected: list[Tensor]) -> list[Difference]:
    """Of each tensor that the launch was given, written or not."""
    differences = []
    for name, tensor in tensors_of(launch.names, launch.args):
        was, is_now, should_be = (rebuilt(tensor, storages) for storages in (before, found, expected))
        if launch.kernel in UNORDERED and not same_bits(was, should_be):
            is_now, should_be = is_now.sort().values, should_be.sort().values
        if same_bits(was, should_be):
            error = 0.0 if same_bits(is_now, was) else float("inf")
            differences.append(Difference(name, error, "only read, but changed" if error else "only read"))
        elif not should_be.is_floating_point() or launch.kernel in COPIES:
            wrong = (numbers(is_now) != numbers(should_be)).sum().item()
            differences.append(Difference(name, float("inf") if wrong else 0.0, f"{wrong} of {should_be.numel()} differ, which must not"))
        else:
            error, at = distance(is_now, should_be)
            differences.append(Difference(name, error, f"worst at {at}"))
    return differences


def numbers(tensor: Tensor) -> Tensor:
    """Without NaN, which would differ from itself."""
    return torch.nan_to_num(tensor.float(), nan=1.2345e38) if tensor.is_floating_point() else tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def distance(found: Tensor, expected: Tensor) -> tuple[float, str]:
    """The largest |found - expected| in units of what `LIMITS` allow, and where. What is not finite must be the same."""
    relative, beside = LIMITS[expected.dtype]
    columns = expected.shape[-1] if expected.ndim else 1
    a_RC, b_RC = (tensor.double().reshape(-1, columns) for tensor in (found, expected))
    if not torch.equal(numbers(torch.where(b_RC.isfinite(), 0.0, a_RC)), numbers(torch.where(b_RC.isfinite(), 0.0, b_RC))):
        return float("inf"), "what is not finite"
    finite_RC = b_RC.isfinite()
    size_RC = torch.where(finite_RC, b_RC.abs(), 0.0)
    scales = [torch.full_like(size_RC, float("inf"))]
    for axis in (0, 1):
        if size_RC.shape[axis] >= MANY:  # of those that are not zero: rows of z hold K numbers among F zeros
            count = (size_RC > 0).sum(dim=axis, keepdim=True).clamp(min=1)
            scales.append((size_RC.square().sum(dim=axis, keepdim=True) / count).sqrt().expand_as(size_RC))
    scale_RC = torch.stack(scales).amin(dim=0) if len(scales) > 1 else torch.zeros_like(size_RC)
    error_RC = torch.where(finite_RC, (a_RC - b_RC).abs(), 0.0)
    allowed_RC = relative * size_RC + beside * scale_RC
    ratio_RC = torch.where(error_RC == 0, 0.0, error_RC / allowed_RC)  # NaN stays, and does not hold
    if ratio_RC.numel() == 0:
        return 0.0, "nothing"
    place = int(torch.nan_to_num(ratio_RC, nan=float("inf")).argmax())
    row, column = divmod(place, columns)
    return ratio_RC.flatten()[place].item(), f"[{row}, {column}]: {a_RC[row, column]:.6g} for {b_RC[row, column]:.6g}"


def replay(path: Path, device: torch.device, say: Callable[[str], None] = print, start: int = 0) -> int:
    """One line for each kernel; the number of kernels that are wrong. `start` leaves out the first kernels."""
    recording = Recording(path)
    of_kernel: dict[str, list[Recorded]] = {}
    for launch in recording.launches:
        of_kernel.setdefault(launch.kernel, []).append(launch)
    wrong, stale = [], 0
    for number, (name, launches) in enumerate(of_kernel.items()):
        if number < start:
            continue
        print(f"   {name:<28}", end="", flush=True)  # before it runs: a kernel that hangs is then known
        started, complaints, worst = time.monotonic(), [], 0.0
        try:
            for launch in launches:
                expected, before = (recording.storages(keys, "cpu") for keys in (launch.after, launch.before))
                differences = compare(launch, before, run(recording, launch, device), expected)
                worst = max([worst, *(d.error for d in differences)])
                complaints += [f"{launch.case}, grid {launch.grid}: {d.argument} is {d.what}" for d in differences if not d.holds]
        except StaleError as error:
            stale += 1
            complaints.append(str(error))
        except Exception as error:  # the next kernel is still worth a look
            complaints.append(f"{launch.case}, grid {launch.grid}: {type(error).__name__}: {str(error)[-600:]}")
        verdict = "WRONG" if complaints else "holds"
        say(f"{verdict}  {len(launches):>3} launches, {worst:8.1e} of what is allowed, {time.monotonic() - started:.0f} s")
        for complaint in complaints[:6]:
            say(f"         {complaint}")
        if complaints:
            wrong.append(name)
            if any(launch.source != source_hash(kernel_of(launch)) for launch in launches[:1] if not stale):
                say("         its source is not the one that was recorded")
        if any(sign in complaint for complaint in complaints for sign in ("CUDA error", "illegal memory", "misaligned")):
            say("   the GPU is lost for this process; a new one goes on with the next kernel")
            command = [
                sys.executable,
                "-m",
                "experiments.benchmarks.replay",
                "replay",
                str(path),
                "--device",
                str(device),
                "--start",
                str(number + 1),
            ]
            return len(wrong) + subprocess.run(command).returncode
    say(f"   {len(recording.launches)} launches of {len(of_kernel)} kernels on {device}: " + (f"WRONG: {', '.join(wrong)}" if wrong else "all hold"))
    return len(wrong)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.benchmarks.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "replay"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", help="where to replay; the default is the GPU, where there is one")
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.action == "record":
        interpreter()
        with tiles_of_a_gpu():
            record(options.file, CASES, wanted=SEARCHES)
        return
    compile_sooner()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        interpreter()
    with tiles_of_a_gpu() if device.type == "cpu" else nullcontext():
        wrong = replay(options.file, device, start=options.start)
    sys.exit(min(100, wrong))


if __name__ == "__main__":
    main()

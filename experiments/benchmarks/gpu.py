"""The benchmark on a GPU: checks first, then times whole training steps against their floor and against others. One call, within `--minutes`.

    python -m experiments.benchmarks.gpu                      # everything; `make benchmark` does the same on a machine with a CUDA device
    python -m experiments.benchmarks.gpu --sections parity    # some sections (kernels, roofs and correctness always come first)
    python -m experiments.benchmarks.gpu --quick              # tiny sizes, on a CPU too, to see that it works; nothing is recorded

Needs torch, triton, numpy and safetensors; where the project is not installed, PYTHONPATH=kernels in front. eai-sparsify's kernels are compared if
the package can be found on PYTHONPATH (its own dependencies are not needed: pip install --no-deps --target FOLDER eai-sparsify==1.3.3), or with
`--peers`, which fetches it. A precision is timed only where its steps agree with float64 PyTorch, eager, and its replayed graphs with eager steps,
bit for bit. Sections run by importance; what the time does not allow is skipped with a line that says so.
"""

import argparse
import copy
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks import architectures
from experiments.benchmarks.cases import (
    FLOOR_TARGET,
    MASKED_TARGET,
    PARITY_STEPS,
    PEER_TARGET,
    TARGET_COPY,
    TARGETS_US,
    Case,
    crossover_cases,
    parity_cases,
    target_cases,
    target_us,
)
from experiments.benchmarks.checks import Trained, compare, train
from experiments.benchmarks.contenders import (
    NEVER,
    SPARSIFY,
    SPARSIFY_VERSION,
    ExpertLoop,
    Grouped,
    MaskedDense,
    OurStep,
    SparsifyDecode,
    SparsifyNative,
    activations,
    build_sae,
    fetch_sparsify,
    sparsify_modules,
)
from experiments.benchmarks.gates import eager
from experiments.benchmarks.record import RESULTS, append, commit, compile_sooner
from experiments.benchmarks.recording import interpreter
from experiments.benchmarks.roofline import floor
from experiments.benchmarks.stages import kernel_times, optimizer_contest, profile, stage_table, stage_times
from experiments.benchmarks.suite import COLUMNS, SECTIONS, Budget, Suite, is_fatal, say
from switch_kernels import Backend, Precision, Shape
from switch_sae.runs import write_atomically
from switch_sae.training import TrainerConfig

TABLE = RESULTS / "benchmark_gpu.csv"
CHECKED_STEPS, LOSS_LIMIT, DECREASE_LIMIT = 4, {"bf16": 5e-3, "float32": 1e-4}, 0.1
OURS = "ours"
MASKED = "masked-dense, float32"


class Benchmark(Suite):
    """The sections that compare: with float32 PyTorch over a whole run, with other implementations, stage by stage, regime by regime."""

    kernels: Any = None
    """eai-sparsify's modules, once they were looked for."""

    def run_parity(self, sections: list[str]) -> None:
        steps = 10 if self.tiny else PARITY_STEPS
        config = TrainerConfig(dead_after_tokens=NEVER) if self.tiny else TrainerConfig()
        references: dict[Shape, Trained | None] = {}
        for case in self.each(parity_cases(self.tiny)):
            shape = case.shape
            x_BTD, held_out_BTD = (activations(shape, count if not self.tiny else 3, self.device, seed) for count, seed in ((48, 5), (4, 6)))
            arguments = (config, steps, x_BTD, held_out_BTD, lambda: self.budget.left() > 0)
            if shape not in references:
                references[shape] = train(Case(shape, Precision.float32), Backend.torch, *arguments)
            expected = references[shape]
            found = train(case, self.backend, *arguments)
            if found is None or expected is None:
                say(f"   {case}: CUT OFF by the time limit before {steps} steps")
                continue
            findings = compare(found, expected)
            self.parity[str(case)] = holds = all(finding.holds for finding in findings)
            say(f"   {'holds' if holds else 'RED  '} {case}, {steps} steps\n         ours {found}\n         float32 PyTorch {expected}")
            for finding in findings:
                say(f"         {'' if finding.holds else 'RED '}{finding}")
            note = f"{'holds' if holds else 'RED'}: ours {found}; float32 PyTorch {expected}"
            kind = {"precision": case.precision.value, "moments": case.moments.value}
            self.record([self.row("parity", f"{steps} steps against float32 PyTorch", shape, **kind, note=note)])

    def run_contenders(self, sections: list[str]) -> None:
        self.kernels = self._sparsify()
        for case in self.each(target_cases(self.tiny)[:3]):
            x_BTD = self.batches(case.shape)
            expected: list[float] = []
            times = self.contest[case.shape.E] = {}
            peaks = {}
            for name, (precision, start) in self._contenders(case, x_BTD).items():
                try:
                    peak_mb = self.peak_mb()
                    us, losses = self._contend(name, precision, start, x_BTD, expected)
                    expected = expected or losses  # masked-dense comes first
                    if us is not None and (name != MASKED or case.shape.E == self.main.E):
                        times[name], peaks[name] = us, peak_mb()
                except torch.OutOfMemoryError:
                    say(f"   {name} does not fit into the GPU's memory")
                except Exception as error:
                    self.failed(f"{name} at {case.shape}", error)
                    if is_fatal(error):
                        raise
            self._print_contest(case.shape, times, peaks)
        self._print_optimizers()

    def _contend(self, name: str, precision: str, start: Callable[[], Any], x_BTD: Tensor, expected: list[float]) -> tuple[float | None, list[float]]:
        """(microseconds of a step, first losses); no time for a contender whose losses are not the expected ones."""
        step = start()
        losses = [step.loss(x_BTD[0]).item() for _ in range(CHECKED_STEPS)]
        if complaint := disagreement(losses, expected or losses, precision):
            self.failures.append(name)
            say(f"   {name} is NOT TIMED: {complaint}")
            return None, losses
        taken, _ = self.timed(lambda number: step(x_BTD[number % len(x_BTD)]), 3 if self.tiny else 15)
        return median(taken), losses

    def _print_contest(self, shape: Shape, times: dict[str, float], peaks: dict[str, float]) -> None:
        if not times:
            return
        say(f"   {shape!s:<44}{'us':>10}{'x ours':>8}{'tokens/s':>11}{'peak MB':>9}")
        rows = []
        for name, us in times.items():
            slower = us / times[OURS] if OURS in times else None
            say(f"   {name:<44}{us:>10.0f}{f'{slower:.1f}' if slower else '':>8}{shape.T / us * 1e6:>11.3g}{peaks[name]:>9.0f}")
            note = f"{slower:.2f} x ours" if slower else ""
            rows.append(self.row("contenders", name, shape, measured_us=us, tokens_per_s=shape.T / us * 1e6, peak_mb=peaks[name], note=note))
        self.record(rows)

    def _contenders(self, case: Case, x_BTD: Tensor) -> dict[str, tuple[str, Callable[[], Any]]]:
        """Name -> (precision, how to start it), all from one start. Low precision only on a GPU, where it is fast.

        Masked-dense takes the same time for every E: it is always there, since its losses are what the others' should be, but timed for one E.
        """
        sae = build_sae(case.shape, x_BTD[0])
        low = "bf16" if self.device.type == "cuda" else "float32"
        starts: dict[str, tuple[str, Callable[[], Any]]] = {MASKED: ("float32", lambda: MaskedDense(sae, "float32", optimizer={}))}
        if case.shape.E == self.main.E:
            starts[f"{MaskedDense.name}, bf16"] = ("bf16", lambda: MaskedDense(sae, "bf16", optimizer={}))
        if case.shape.E > 1:
            starts[ExpertLoop.name] = (low, lambda: ExpertLoop(sae, low))
        starts[Grouped.name] = (low, lambda: Grouped(sae, low))
        if self.kernels is not None:
            decoder, encoder = self.kernels
            for rows in (True, False):
                starts[SparsifyDecode.title(rows)] = (low, partial(SparsifyDecode, sae, low, decoder, rows))
            if case.shape.E == 1:
                starts[SparsifyNative.name] = ("bf16", lambda: SparsifyNative(sae, decoder, encoder))
        starts[OURS] = (case.precision.value, lambda: OurStep(copy.deepcopy(sae), case, self.backend))
        return starts

    def _sparsify(self) -> Any:
        kernels = None
        if self.backend is Backend.triton:
            kernels = sparsify_modules()
            if kernels is None and self.fetch_peers:
                problem = fetch_sparsify()
                say(f"   {SPARSIFY} could not be fetched: {problem}" if problem else f"   {SPARSIFY} {SPARSIFY_VERSION} was fetched")
                kernels = sparsify_modules()
        if kernels is None:
            say(
                f"   {SPARSIFY}'s kernels are MISSING from this comparison. On a machine with a network: --peers; elsewhere carry the wheel: "
                f"pip download --no-deps {SPARSIFY}=={SPARSIFY_VERSION}, pip install --no-deps --target FOLDER, PYTHONPATH=FOLDER (needs triton)"
            )
        return kernels

    def _print_optimizers(self) -> None:
        for shape in [self.main] if self.tiny else [self.main, replace(self.main, M=131072)]:
            if self.budget.left() <= 0:
                say(f"   optimiser at {shape}: SKIPPED for lack of time")
                continue
            self.free()
            contest = optimizer_contest(shape, self.device, self.backend is Backend.triton)
            say(f"   optimiser alone, 2 x [{shape.M}, {shape.D}]: " + "; ".join(f"{name} {us:.0f} us" for name, us in contest.items()))
            self.record([self.row("optimizer", name, shape, measured_us=us) for name, us in contest.items()])

    def run_stages(self, sections: list[str]) -> None:
        if self.backend is not Backend.triton:
            say("   SKIPPED: stages are Triton kernels, and the backend is PyTorch")
            return
        for case in self.each(target_cases(self.tiny)):
            x_BTD = self.batches(case.shape)
            self.free()
            plan = OurStep(build_sae(case.shape, x_BTD[0]), case, self.backend).regime()
            kernels = kernel_times(build_sae(case.shape, x_BTD[0]), case, x_BTD[0], 3 if self.tiny else 15)
            known = self.measured.get(case) or self.measure(case)
            least = floor(case.shape, self.roofs, x_bytes=4, plan=plan, nodes=known.nodes)
            stages = stage_times(kernels, least, known.median_us, known.nodes)
            say(f"   {case}: {plan}, and so are the floors")
            say(stage_table(stages, kernels, known.median_us))
            self.record(
                [
                    self.row(
                        "stages", stage.name, case.shape, precision=case.precision.value, plan=plan, floor_us=stage.floor_us,
                        measured_us=stage.cold_us, ratio=stage.floor_us / stage.cold_us if stage.floor_us and stage.cold_us else None,
                        note=f"{stage.launches} launches, L2 flushed; {stage.warm_us:.1f} us warm",
                    )
                    for stage in stages
                ]
            )  # fmt: skip

    def run_architectures(self, sections: list[str]) -> None:
        """What every other architecture costs on this device, and whether it computes there what it does on a CPU."""
        sizes = architectures.TINY_SIZES if self.tiny else architectures.SIZES
        x_BTD = activations(sizes, architectures.BATCHES, self.device)
        say(f"   {sizes}\n   {'':<32}{'step us':>9}{'host us':>9}{'waits':>6}{'encode + decode us':>20}{'waits':>6}{'loss':>9}{'gradients':>10}")
        for name in self.each(list(several := architectures.configs(sizes))):
            self.free()
            if (why := self.untrusted_searches.get(Precision.float32)) and architectures.is_search(several[name], sizes.D):
                say(f"   {name:<32}NOT TIMED, {why}")
                continue
            try:
                seen = architectures.look(name, several[name], self.device, sizes, x_BTD, 3 if self.tiny else architectures.STEPS)
            except Exception as error:
                self.failed(name, error)
                if is_fatal(error):
                    raise
                continue
            times = f"{seen.step_us:>9.0f}{seen.host_us:>9.0f}{seen.waits:>6}{seen.inference_us:>20.0f}{seen.inference_waits:>6}"
            errors = f"{seen.loss_error:>9.1e}{seen.gradient_error:>10.1e} {seen.worst}"
            say(f"   {'' if seen.holds else 'RED '}{name:<{32 if seen.holds else 28}}{times}{errors}; {seen.how}")
            if not seen.holds:
                self.failures.append(name)
            note = f"{seen.waits} waits a step, gradients {seen.gradient_error:.1e} from the CPU's ({seen.worst}); {seen.how}"
            self.record([self.row("architectures", name, sizes, precision="float32", measured_us=seen.step_us, note=note)])

    def run_profile(self, sections: list[str]) -> None:
        """What the GPU runs in a step, torch's own kernels included. Last, because a profiler that was once attached may slow what follows."""
        case = target_cases(self.tiny)[0]
        if why := self.why_untrusted(case):
            say(f"   {case}: NOT TIMED, {why}")
            return
        x_BTD = self.batches(case.shape)
        contenders = self._contenders(case, x_BTD)
        for name in self.each(list(contenders)):
            self.free()
            step = contenders[name][1]()
            for _ in range(4):
                step(x_BTD[0])
            times = profile(partial(step, x_BTD[0]), self.device)
            del step
            if not times:
                say("   the profiler saw no kernel")
                return
            busy_us = sum(times.values())
            say(f"   {name}: the GPU is busy for {busy_us:.0f} us of a step, with {len(times)} kinds of kernels")
            self.record([self.row("profile", name, case.shape, measured_us=busy_us, note="time that the GPU is busy in a step")])
            for kernel, us in list(times.items())[: 20 if name == OURS else 3]:
                say(f"     {us:>9.1f}  {kernel[:110]}")

    def run_crossover(self, sections: list[str]) -> None:
        if self.backend is not Backend.triton:
            say("   SKIPPED: there is one regime, PyTorch's")
            return
        say(f"   {'':<40}{'sparse us':>10}{'dense us':>10}{'dense/sparse':>13}  the planner takes")
        pairs = dict(crossover_cases(self.tiny))
        for sparse in self.each(list(pairs)):  # both are of one precision
            taken = {regime: self.measure(replace(sparse, regime=regime)) for regime in (sparse.regime, pairs[sparse].regime)}
            sparse_us, dense_us = (m.median_us for m in taken.values())
            chosen = OurStep(build_sae(sparse.shape, self.batches(sparse.shape)[0]), replace(sparse, regime=None), self.backend).plan
            label = f"F={sparse.shape.F}, {sparse.shape}"
            say(f"   {label:<40}{sparse_us:>10.0f}{dense_us:>10.0f}{dense_us / sparse_us:>13.2f}  {chosen}")
            self.record(
                [
                    self.row("crossover", f"forced {case.regime.value}", case.shape, plan=m.plan, measured_us=m.median_us, peak_mb=m.peak_mb)
                    for case, m in ((replace(sparse, regime=regime), m) for regime, m in taken.items())
                    if case.regime is not None
                ]
            )

    def summary(self) -> None:
        if self.tiny:
            say("tiny sizes: nothing was recorded, and no target is judged")
        else:
            say(f"== targets, for a copy at {self.roofs.copy / 1e12:.2f} TB/s (they were set at {TARGET_COPY / 1e12:.2f})")
            for precision, why in self.untrusted.items():
                say(f"   {precision.value}: NOT TIMED, {why}")
            for what, target, found, at_most in self._targets():
                verdict = "not measured" if found is None else "met" if (found <= target if at_most else found >= target) else "NOT MET"
                shown = "" if found is None else f"{found:.3g}"
                say(f"   {what:<74}{'<=' if at_most else '>='} {target:<8g}{shown:>9}  {verdict}")
            for case, held in self.parity.items():
                say(f"   parity with float32 PyTorch, {case:<44}{'met' if held else 'NOT MET':>21}")
        if self.failures:
            say(f"FAILED: {', '.join(self.failures)}")

    def _targets(self) -> list[tuple[str, float, float | None, bool]]:
        """(what, target, found, whether the target is an upper bound)."""
        lines: list[tuple[str, float, float | None, bool]] = []
        for case in TARGETS_US:
            m, limit_us = self.measured.get(case), target_us(case, self.roofs.copy)
            more = f", {case.dead} dead" if case.dead else ""
            lines.append((f"{case.shape}{more}: mean step, ms", round(limit_us / 1e3, 3), m.mean_us / 1e3 if m else None, True))
            if not case.dead:
                lines.append((f"{case.shape}: floor / measured", FLOOR_TARGET, m.ratio if m else None, False))
        for E, times in self.contest.items():
            ours, others = times.get(OURS), [us for name, us in times.items() if name != OURS and not name.startswith("masked-dense")]
            if ours and others:
                lines.append((f"E={E}: times faster than the best other contender", PEER_TARGET, min(others) / ours, False))
            if ours and MASKED in times:
                lines.append((f"E={E}: times faster than masked-dense in float32", MASKED_TARGET, times[MASKED] / ours, False))
        return lines


def disagreement(losses: list[float], expected: list[float], precision: str) -> str | None:
    """Why losses of the same steps on the same batch are not those of one function, or None: their values, and by how much training lowers them."""
    limit = LOSS_LIMIT[precision]
    worst = max(abs(found / right - 1) for found, right in zip(losses, expected, strict=True))
    fell, should_fall = losses[0] - losses[-1], expected[0] - expected[-1]
    if not worst <= limit:
        return f"its losses {losses} differ from {expected} by {worst:.1e} (limit {limit:.0e})"
    if not abs(fell - should_fall) <= DECREASE_LIMIT * abs(should_fall):
        return f"its loss falls by {fell:.4g} in {len(losses)} steps, not by {should_fall:.4g}"
    return None


def recorder(path: Path, out: Path | None) -> Callable[[list[dict[str, Any]]], None]:
    """Appends rows to the table at `path` at once, and keeps a copy of the table in the folder `out`."""

    def record(rows: list[dict[str, Any]]) -> None:
        append(path, rows)
        if out is not None:
            write_atomically(out / path.name, path.read_bytes())

    return record


def versions(device: torch.device, named_commit: str | None) -> dict[str, str]:
    """The columns that all rows share."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return dict(zip(COLUMNS, (time.strftime("%Y-%m-%d"), named_commit or commit(), name, torch.__version__, triton), strict=False))


def clocks() -> str:
    """What the driver says of the GPU's clocks, for the record; empty where there is no nvidia-smi."""
    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.used", "--format=csv,noheader")
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.3, help="time for all sections together, imports and the last case's overrun not among it")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="a folder that receives a copy of the table, for machines whose checkout does not come back")
    parser.add_argument("--commit", help="what to record as the commit, where the checkout has no git history")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes that compile kernels ahead")
    parser.add_argument("--peers", action="store_true", help="fetch eai-sparsify if it is not there")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too; nothing is recorded")
    parser.add_argument("--no-graph", action="store_true", help="eager steps only: what holds and what it costs without CUDA graphs")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.quick:
        parser.error("there is no CUDA device. Use --quick for tiny sizes on a CPU, or the CPU's table: `python -m experiments.benchmarks.cpu`.")
    if options.minutes <= 0 or options.jobs < 1:
        parser.error("--minutes and --jobs must be positive")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if interpreted := device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        interpreter()
    backend = Backend.triton if device.type == "cuda" or interpreted else Backend.torch
    compile_sooner()
    about = versions(device, options.commit)
    say(", ".join(f"{key} {value}" for key, value in about.items()) + f", python {sys.version.split()[0]}, backend {backend.value}; {clocks()}")
    record = (lambda rows: None) if options.quick else recorder(TABLE, options.out)
    suite = Benchmark(device, backend, options.quick, Budget(options.minutes), record, about, options.jobs, options.peers, not options.no_graph)
    with eager() if options.no_graph else nullcontext():
        status = suite.run(options.sections)
    if not options.quick:
        say(f"recorded in {TABLE}" + (f" and {options.out}" if options.out else ""))
    sys.exit(status)


if __name__ == "__main__":
    main()

"""The machinery of the GPU benchmark: its time budget, its table, and the sections that all others build on."""

import gc
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import torch
from torch import Tensor

from experiments.benchmarks.cases import MAIN, TINY, Case, shape_cases, target_cases
from experiments.benchmarks.checks import NotTrustedError
from experiments.benchmarks.contenders import OurStep, activations, build_sae, skew
from experiments.benchmarks.gates import Part, parts, search_parts, untrusted
from experiments.benchmarks.peers import ROOT
from experiments.benchmarks.roofline import Roofs, calibrate, count_nodes, floor, synchronize, times_and_host_us
from switch_kernels import Backend, Moments, Precision, Shape

SECTIONS = {
    "compile": 140,
    "roofs": 20,
    "correctness": 90,
    "targets": 40,
    "searches": 90,
    "parity": 120,
    "contenders": 80,
    "stages": 40,
    "architectures": 90,
    "shapes": 150,
    "crossover": 40,
    "profile": 30,
}
"""In order of importance, with the most seconds that each may take."""
JUDGED = {"targets", "parity", "contenders"}
"""Sections whose results are compared with targets."""
LEAST_SECONDS = 5.0
STEPS_WARM, STEPS_TIMED, BATCHES = 8, 40, 4
TARGET_STEPS = 128
"""Of a target: two whole intervals between readings of the device, so that what happens at a reading is in the mean."""
Item = TypeVar("Item")
COLUMNS = (
    *("date", "commit", "device", "torch", "triton", "section", "name", "precision", "moments", "plan", "T", "D", "M", "E", "K", "S", "routing"),
    *("floor_us", "measured_us", "mean_us", "min_us", "ratio", "tokens_per_s", "peak_mb", "note"),
)


def say(text: str) -> None:
    print(text, flush=True)


def is_fatal(error: BaseException) -> bool:
    """Whether the GPU is lost for this process: after such an error every call fails."""
    signs = ("CUDA error", "illegal memory access", "misaligned address", "launch failure")
    return any(sign in str(error) for sign in signs) and not isinstance(error, torch.OutOfMemoryError)


class Budget:
    """Wall time: of everything, and of the section that runs."""

    def __init__(self, minutes: float) -> None:
        self.end = self.section_end = time.monotonic() + 60 * minutes

    def open(self, seconds: float) -> bool:
        """Starts a section of at most so many seconds; False if too little time is left for any of it."""
        now = time.monotonic()
        self.section_end = min(self.end, now + seconds)
        return self.end - now >= LEAST_SECONDS

    def left(self) -> float:
        """Seconds left of the section."""
        return self.section_end - time.monotonic()

    def remaining(self) -> float:
        return self.end - time.monotonic()


@dataclass(frozen=True)
class Measured:
    """One configuration's whole step."""

    median_us: float
    mean_us: float
    """With what happens at readings of the device; the median is a step between them."""
    min_us: float
    host_us: float
    """What the host took to enqueue a step; above the median, the GPU waited for it."""
    peak_mb: float
    plan: str
    floor_us: float | None
    nodes: int = 0
    """Of the step's graph, as the floor counts them."""

    @property
    def ratio(self) -> float | None:
        return None if self.floor_us is None else self.floor_us / self.median_us


class Suite:
    """Everything that one run of the benchmark knows."""

    def __init__(
        self,
        device: torch.device,
        backend: Backend,
        tiny: bool,
        budget: Budget,
        record: Callable[[list[dict[str, Any]]], None],
        about: dict[str, str],
        jobs: int = 1,
        fetch_peers: bool = False,
        graph: bool = True,
    ) -> None:
        """`record` receives finished rows of the table; `about` are the columns that all rows share; without `graph` steps stay eager."""
        self.device, self.backend, self.tiny, self.budget = device, backend, tiny, budget
        self.record, self.about, self.jobs, self.fetch_peers, self.graph = record, about, jobs, fetch_peers, graph
        self.roofs = Roofs()
        self.main = TINY if tiny else MAIN
        self.measured: dict[Case, Measured] = {}
        self.contest: dict[int, dict[str, float]] = {}
        """Microseconds by E and name."""
        self.parity: dict[str, bool] = {}
        self.failures: list[str] = []
        self.untrusted: dict[Precision, str] = {}
        """Why a precision's checks did not hold."""
        self.untrusted_searches: dict[Precision, str] = {}
        """Likewise of SAEs that search: the others' speeds do not depend on them."""
        self._batches: tuple[tuple[int, int], Tensor] | None = None

    def run(self, sections: list[str]) -> int:
        """The exit status: 0 when all checks held and nothing failed."""
        said = False
        for name, seconds in SECTIONS.items():
            if name not in sections and name not in ("compile", "roofs", "correctness"):
                continue
            if not self.budget.open(seconds):
                say(f"== {name}: SKIPPED, the time is up")
                continue
            say(f"== {name} (at most {min(seconds, self.budget.left()):.0f} s; {self.budget.remaining():.0f} s are left in all)")
            started = time.monotonic()
            try:
                getattr(self, f"run_{name}")(sections)
            except NotTrustedError as error:
                say(f"no speed is reported: {error}")
                return 1
            except Exception as error:
                self.failed(name, error)
                if is_fatal(error):
                    break
            say(f"   {name} took {time.monotonic() - started:.0f} s")
            if said := name in JUDGED:  # now, lest the process is killed before the end
                self.summary()
        if not said:
            self.summary()
        return 1 if self.failures or not all(self.parity.values()) else 0

    def summary(self) -> None:
        """What is known by now: printed after each section that adds to it."""

    def failed(self, what: str, error: Exception) -> None:
        self.failures.append(what)
        say(f"   {what}: FAILED\n{''.join(traceback.format_exception(error))[-3000:]}")

    def each(self, cases: list[Item]) -> Iterator[Item]:
        """Those that the time allows: as long as one that takes as long as the last would end in time."""
        last = 0.0 if self.tiny else LEAST_SECONDS
        for number, case in enumerate(cases):
            if self.budget.left() < last:
                say(f"   SKIPPED for lack of time: {len(cases) - number} of {len(cases)}, from {case}")
                return
            if isinstance(case, Case) and (why := self.why_untrusted(case)):
                say(f"   {case}: NOT TIMED, {why}")
                continue
            started = time.monotonic()
            yield case
            last = max(0.0 if self.tiny else LEAST_SECONDS, time.monotonic() - started)

    def row(self, section: str, name: str, shape: Shape, **values: Any) -> dict[str, Any]:
        sizes = {column: size for column, size in vars(shape).items() if column in COLUMNS}
        given = {**self.about, "section": section, "name": name, **sizes, **values}
        assert set(given) <= set(COLUMNS)
        shown = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in given.items() if value is not None}
        return dict.fromkeys(COLUMNS, "") | shown

    def run_compile(self, sections: list[str]) -> None:
        """Compiles kernels in many processes into triton's cache, where this process finds them; they touch no GPU."""
        if self.backend is not Backend.triton or self.device.type != "cuda":
            say("   nothing to compile ahead")
            return
        capability = ".".join(map(str, torch.cuda.get_device_capability(self.device)))
        command = [
            sys.executable,
            "-m",
            "experiments.benchmarks.ahead",
            "--capability",
            capability,
            "--jobs",
            str(self.jobs),
            "--sections",
            *sections,
        ]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            with log.open("w") as file:
                process = subprocess.Popen(command + ["--quick"] * self.tiny, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
            try:
                while self.budget.left() > 0 and process.poll() is None:
                    time.sleep(0.2)
            finally:
                if process.poll() is None:
                    process.terminate()  # it ends its own
                process.wait()
            text = log.read_text()
        say(f"   {(text.strip().splitlines() or ['nothing was said'])[-1].strip()}; what is left compiles when it runs")
        if "FAILED" in text or "Traceback" in text:
            self.failures.append("compile")
            say(text[-3000:])

    def run_roofs(self, sections: list[str]) -> None:
        self.roofs = calibrate(self.device, self.tiny)
        say(f"   {self.roofs.describe()}")
        self.record([self.row("roofs", "calibration", self.main, note=self.roofs.describe())])

    def run_correctness(self, sections: list[str]) -> None:
        several = parts(self.tiny, self.device, self.backend, self.graph)
        self.untrusted = self._check(several, "")
        if {part.precision for part in several} <= set(self.untrusted):
            raise NotTrustedError("; ".join(f"{precision.value}: {why}" for precision, why in self.untrusted.items()))

    def run_searches(self, sections: list[str]) -> None:
        """Of SAEs that search: by themselves, after the targets, which a kernel of theirs that loses the GPU then does not cost."""
        several = search_parts(self.tiny, self.device, self.backend, self.graph)
        if not several:
            say("   SKIPPED: searches in kernels are Triton's, and the backend is PyTorch")
        self.untrusted_searches = self._check(several, "searches in ")

    def _check(self, several: list[Part], of: str) -> dict[Precision, str]:
        """By precision that did not hold, why; it is said, and counts as a failure."""

        def failed(what: str, error: Exception) -> bool:
            self.failed(what, error)
            return is_fatal(error)

        found = untrusted(several, say, failed, lambda: self.budget.remaining() <= 0)
        for precision, why in found.items():
            self.failures.append(f"correctness {'of' if of else 'in'} {of}{precision.value}")
            say(f"   {of}{precision.value} is NOT TIMED: {why}")
        return found

    def why_untrusted(self, case: Case) -> str | None:
        """Why this case's speed would mean nothing. PyTorch computes everything in float32."""
        return self.untrusted.get(case.precision if self.backend is Backend.triton else Precision.float32)

    def run_targets(self, sections: list[str]) -> None:
        self.measure_all("step", target_cases(self.tiny), TARGET_STEPS)

    def run_shapes(self, sections: list[str]) -> None:
        self.measure_all("step", shape_cases(self.tiny))

    def measure_all(self, section: str, cases: list[Case], repeats: int = STEPS_TIMED) -> None:
        say(f"   {'':<62}{'floor us':>9}{'median':>9}{'mean':>9}{'min':>9}{'ratio':>6}{'tokens/s':>10}{'peak MB':>9}  plan")
        for case in self.each(cases):
            try:
                self.report(section, case, self.measure(case, repeats))
            except torch.OutOfMemoryError:
                say(f"   {case!s:<62} does not fit into the GPU's memory")
            except Exception as error:
                self.failed(str(case), error)
                if is_fatal(error):
                    raise

    def report(self, section: str, case: Case, m: Measured) -> None:
        floor_us, ratio = (f"{m.floor_us:.0f}" if m.floor_us else "", f"{m.ratio:.2f}" if m.ratio else "")
        rate = case.shape.T / m.mean_us * 1e6
        waits = f"; the host needs {m.host_us:.0f} us a step" if m.host_us > 0.8 * m.median_us and self.device.type == "cuda" else ""
        nodes = f", {m.nodes} nodes" if m.nodes else ""
        times = f"{floor_us:>9}{m.median_us:>9.0f}{m.mean_us:>9.0f}{m.min_us:>9.0f}{ratio:>6}"
        say(f"   {case!s:<62}{times}{rate:>10.3g}{m.peak_mb:>9.0f}  {m.plan}{nodes}{waits}")
        kind = {"precision": case.precision.value, "moments": case.moments.value, "plan": m.plan}
        columns = {"floor_us": m.floor_us, "measured_us": m.median_us, "mean_us": m.mean_us, "min_us": m.min_us, "ratio": m.ratio}
        columns |= {"tokens_per_s": rate, "peak_mb": m.peak_mb}
        self.record([self.row(section, "ours", case.shape, **kind, **columns)])

    def batches(self, shape: Shape) -> Tensor:
        key = (shape.T, shape.D)
        if self._batches is None or self._batches[0] != key:
            self._batches = None
            self._batches = (key, activations(shape, BATCHES, self.device))
        return self._batches[1]

    def measure(self, case: Case, repeats: int = STEPS_TIMED) -> Measured:
        """Times whole steps of our trainer, in a queue, on alternating batches."""
        x_BTD = self.batches(case.shape)
        peak_mb = self.peak_mb()
        sae = build_sae(case.shape, x_BTD[0])
        if case.shape.routing == "zipf":
            x_BTD = skew(sae, x_BTD)
        step = OurStep(sae, case, self.backend)
        times, host_us = self.timed(lambda number: step(x_BTD[number % BATCHES]), 3 if self.tiny else repeats)
        peak, plan = peak_mb(), step.regime()
        nodes = count_nodes(case, self.backend)
        least = floor(case.shape, self.roofs, 2 if case.moments is Moments.bfloat16 else 4, x_bytes=4, nodes=nodes).total_us
        modelled = case.precision is Precision.bf16 and not case.dead
        m = Measured(median(times), mean(times), min(times), host_us, peak, plan, least if modelled else None, nodes if step.plan else 0)
        self.measured[case] = m
        return m

    def timed(self, call: Callable[[int], object], repeats: int) -> tuple[list[float], float]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # here, since a graph's replay no longer shows what the captured step allocated
        for number in range(2 if self.tiny else STEPS_WARM):
            call(number)
        return times_and_host_us(call, repeats, self.device)

    def peak_mb(self) -> Callable[[], float]:
        """Frees what was left behind; returns what tells the peak in MB above what is held now (0 on a CPU)."""
        if self.device.type != "cuda":
            return lambda: 0.0
        self.free()
        held = torch.cuda.memory_allocated(self.device)
        return lambda: (torch.cuda.max_memory_allocated(self.device) - held) / 1e6

    def free(self) -> None:
        """Gives the GPU's memory back that nothing refers to any more."""
        if self.device.type == "cuda":
            gc.collect()
            synchronize(self.device)
            torch.cuda.empty_cache()

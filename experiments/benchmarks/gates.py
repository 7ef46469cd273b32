"""What must hold before a speed is printed, by precision and in two parts: eager steps against float64, then replayed graphs against eager steps."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from experiments.benchmarks.cases import Case, graph_cases, step_cases
from experiments.benchmarks.checks import Finding, check_step
from experiments.benchmarks.contenders import NEVER, OurStep, activations, build_sae
from switch_kernels import Backend, Precision
from switch_sae.engines import TritonEngine

REDS = 3
"""So many red cases end a part: more would say the same, and cost time."""
INTERVAL = 4
"""Steps between readings of the device here, so that a few steps see the dead set change; two of them are eager, the third is captured."""


@contextmanager
def eager() -> Iterator[None]:
    """Inside, no step is captured in a graph."""
    before, TritonEngine.EAGER_STEPS = TritonEngine.EAGER_STEPS, NEVER
    try:
        yield
    finally:
        TritonEngine.EAGER_STEPS = before


@dataclass(frozen=True)
class Part:
    """Checks of one kind in one precision."""

    name: str
    precision: Precision
    cases: list[Case]
    check: Callable[[Case], list[Finding]]

    def __str__(self) -> str:
        return f"{self.name}, {self.precision.value}"


def parts(tiny: bool, device: torch.device, backend: Backend, graph: bool = True) -> list[Part]:
    """Eager parts of all precisions, then their graphs'; without `graph`, or where PyTorch computes, the first only."""
    triton = backend is Backend.triton

    def eager_check(case: Case) -> list[Finding]:
        with eager():
            return check_step(case, device, backend)

    found = []
    for name, cases, check in (
        ("eager", step_cases(tiny, triton), eager_check),
        ("graph", graph_cases(tiny) if triton and graph else [], lambda case: check_graph(case, device)),
    ):
        for precision in dict.fromkeys(case.precision for case in cases):
            found.append(Part(name, precision, [case for case in cases if case.precision is precision], check))
    return found


def check_graph(case: Case, device: torch.device) -> list[Finding]:
    """The same steps eager and replayed, while the dead set appears, grows, changes and vanishes: every bit must be the same at each stage.

    A new width of the dead set is a new graph; the same width is written where the graph reads it. On a CPU nothing is captured: both are eager.
    """
    shape = case.shape
    x_BTD = activations(shape, 2, device)
    sae = build_sae(shape, x_BTD[0])
    runs = [OurStep(copy.deepcopy(sae), case, Backend.triton) for _ in range(2)]
    engines = [run.trainer.engine for run in runs]
    for engine in engines:
        vars(engine)["INTERVAL"] = INTERVAL
    vars(engines[0])["EAGER_STEPS"] = NEVER
    few, more = min(5, shape.F // 4), min(70, shape.F // 2)  # beyond 64 the set is wider
    phases = {"none dead": (0, 0), "some dead": (0, few), "more dead": (0, more), "others dead": (few, more + few), "none dead again": (0, 0)}
    findings = []
    for phase, (first, last) in phases.items():
        for run in runs:
            since_fired_EF = run.trainer.tokens_since_fired_M.zero_().view(shape.E, -1)
            since_fired_EF[:, first:last] = NEVER
        losses = [torch.stack([run.loss(x_BTD[n % 2]).clone() for n in range(INTERVAL)]) for run in runs]
        eager_tensors, replayed = (run.tensors() for run in runs)
        differing = sorted(name for name, tensor in eager_tensors.items() if not torch.equal(tensor, replayed[name]))
        differing += [] if torch.equal(*losses) else ["loss"]
        findings.append(Finding(f"tensors whose bits are not those of eager steps, {phase} {differing[:3]}", len(differing), 0))
    return findings


def untrusted(
    several: list[Part], say: Callable[[str], None], failed: Callable[[str, Exception], bool], time_is_up: Callable[[], bool]
) -> dict[Precision, str]:
    """Runs the parts; by precision that did not hold, why. `failed` is told of exceptions and says whether the GPU is lost, which ends all."""
    reasons: dict[Precision, list[str]] = {part.precision: [] for part in several}
    lost = False
    for part in several:
        red = done = 0
        for case in part.cases:
            if lost or red == REDS or time_is_up():
                break
            done += 1
            try:
                findings = part.check(case)
            except Exception as error:
                lost = failed(f"check of {case} ({part.name})", error)
                red += 1
                continue
            wrong = [finding for finding in findings if not finding.holds]
            red += bool(wrong)
            worst = max(findings, key=lambda finding: finding.error / finding.limit if finding.limit else finding.error)
            say(f"   {'RED  ' if wrong else 'holds'} {part.name}: {case}; closest to its limit: {worst}")
            for finding in wrong:
                say(f"         {finding}")
        left = len(part.cases) - done
        if left and not lost:
            say(f"   {part}: {left} of {len(part.cases)} cases left out, {'after ' + str(REDS) + ' reds' if red == REDS else 'the time was up'}")
        if red or left:
            why = f"{red} checks failed" if red else "the GPU was lost" if lost else "the time was up before all checks were done"
            reasons[part.precision].append(f"{part.name}: {why}")
    return {precision: "; ".join(why) for precision, why in reasons.items() if why}

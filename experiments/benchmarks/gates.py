"""What must hold before a speed is printed, by precision and in two parts: eager steps against float64, then replayed graphs against eager steps.

Of TopK and Switch SAEs (`parts`), then of those that search, compete or have one threshold (`search_parts`).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.cases import Case, graph_cases, step_cases
from experiments.benchmarks.checks import Finding, check_step
from experiments.benchmarks.contenders import NEVER, OurStep, activations, build_sae
from experiments.benchmarks.searches import CPU, SearchCase, SearchStep, build_search, check_search, search_cases, search_graph_cases
from switch_kernels import Backend, Precision, resolve
from switch_sae.engines import TritonEngine

REDS = 3
"""So many red cases end a part: more would say the same, and cost time."""
INTERVAL = 4
"""Steps between readings of the device here, so that a few steps see the dead set change; two of them are eager, the third is captured. Searches take
twice as many: every second step renews Gram matrices and has a graph of its own."""
MORE = 70
"""Latents that die in an expert: beyond 64 the dead set is wider."""
PHASES = ("none dead", "some dead", "more dead", "others dead", "none dead again")


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
    cases: list[Any]
    """`Case`s or `SearchCase`s."""
    check: Callable[[Any], list[Finding]]

    def __str__(self) -> str:
        return f"{self.name}, {self.precision.value}"


def parts(tiny: bool, device: torch.device, backend: Backend, graph: bool = True) -> list[Part]:
    """Eager parts of all precisions, then their graphs'; without `graph`, or where PyTorch computes, the first only."""
    triton = backend is Backend.triton
    graphs = graph_cases(tiny) if triton and graph else []
    return _by_precision("eager", step_cases(tiny, triton), lambda case: eager_check(check_step, case, device, backend)) + _by_precision(
        "graph", graphs, lambda case: check_graph(case, device)
    )


def search_parts(tiny: bool, device: torch.device, backend: Backend, graph: bool = True) -> list[Part]:
    """Likewise of SAEs that search; none where PyTorch computes."""
    if backend is not Backend.triton:
        return []
    graphs = search_graph_cases(tiny) if graph else []
    return _by_precision("eager search", search_cases(tiny), lambda case: eager_check(check_search, case, device)) + _by_precision(
        "search graph", graphs, lambda case: check_search_graph(case, device)
    )


def _by_precision(name: str, cases: list[Any], check: Callable[[Any], list[Finding]]) -> list[Part]:
    precisions = dict.fromkeys(case.precision for case in cases)
    return [Part(name, precision, [case for case in cases if case.precision is precision], check) for precision in precisions]


def eager_check(check: Callable[..., list[Finding]], *arguments: Any) -> list[Finding]:
    with eager():
        return check(*arguments)


def check_graph(case: Case, device: torch.device) -> list[Finding]:
    """The same steps eager and replayed, while the dead set appears, grows, changes and vanishes: every bit must be the same at each stage.

    A new width of the dead set is a new graph; the same width is written where the graph reads it. On a CPU nothing is captured: both are eager.
    """
    shape = case.shape
    x_BTD = activations(shape, 2, device)
    sae = build_sae(shape, x_BTD[0])
    runs = [OurStep(copy.deepcopy(sae), case, Backend.triton) for _ in range(2)]

    def mark_dead(run: OurStep, first: int, last: int) -> None:
        run.trainer.tokens_since_fired_M.zero_().view(shape.E, -1)[:, first:last] = NEVER

    return _compare_runs(runs, x_BTD, shape.F, INTERVAL, mark_dead)


def check_search_graph(case: SearchCase, device: torch.device) -> list[Finding]:
    """Likewise of these; a step that searches has a graph with Gram matrices computed anew and one that reads older ones. Each must be captured."""
    shape = case.shape
    x_BTD = activations(shape, 2, CPU)
    sae, execution = build_search(case, x_BTD[0]).to(device), resolve(Backend.triton, case.precision, device)
    runs = [SearchStep(copy.deepcopy(sae), shape.T, execution) for _ in range(2)]
    findings = _compare_runs(runs, x_BTD.to(device), shape.F, 2 * INTERVAL, SearchStep.mark_dead)
    if device.type == "cuda" and case.searches:
        renewing = {kind[0] for _, kind in runs[1].trainer.engine.graphs}  # type: ignore[attr-defined]
        findings.append(Finding("kinds of steps without a graph", len({True, False} - renewing), 0))
    return findings


def _compare_runs(
    runs: list[Any], x_BTD: Tensor, latents: int, interval: int, mark_dead: Callable[[Any, int, int], None]
) -> list[Finding]:  # fmt: skip
    """What differs after each phase between the first run, whose steps stay eager here, and the second, of experts of so many latents."""
    for run in runs:
        vars(run.trainer.engine)["INTERVAL"] = interval
    vars(runs[0].trainer.engine)["EAGER_STEPS"] = NEVER
    few, more = min(5, latents // 4), min(MORE, latents // 2)
    dead = {"some dead": (0, few), "more dead": (0, more), "others dead": (few, more + few)}
    findings = []
    for phase in PHASES:
        for run in runs:
            mark_dead(run, *dead.get(phase, (0, 0)))
        losses = [torch.stack([run.loss(x_BTD[n % 2]).clone() for n in range(interval)]) for run in runs]
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

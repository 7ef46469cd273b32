"""The GPU benchmark's gates and its compilation ahead, as far as the interpreter can show them."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from experiments.benchmarks import architectures, gates, searches
from experiments.benchmarks.cases import Case, graph_cases
from experiments.benchmarks.contenders import OurStep, activations, build_sae
from experiments.benchmarks.nodes import engine_on_meta, step_on_meta
from switch_kernels import PYTORCH, Backend, Precision, Regime, Shape, resolve
from switch_kernels.gpu import pursuit_step
from switch_kernels.gpu.launch import launches_to
from switch_sae.engines import TritonEngine
from switch_sae.models.routers import CompetitionRouter

CPU = torch.device("cpu")
pytestmark = pytest.mark.whole_steps


def test_graph_cases_are_of_both_regimes_and_precisions():
    cases = graph_cases(False)
    assert {case.precision for case in cases} == {Precision.bf16, Precision.float32} and any(case.shape.S == 2 for case in cases)
    assert all(part.cases for part in gates.parts(False, CPU, Backend.triton))
    assert [str(part) for part in gates.parts(False, CPU, Backend.triton)] == ["eager, bf16", "eager, float32", "graph, bf16", "graph, float32"]
    assert [str(part) for part in gates.parts(False, CPU, Backend.triton, graph=False)] == ["eager, bf16", "eager, float32"]


def test_searches_are_checked_in_both_precisions_with_dead_latents_and_graphs():
    several = gates.search_parts(False, CPU, Backend.triton)
    assert [str(part) for part in several] == [f"{name}, {low}" for name in ("eager search", "search graph") for low in ("bf16", "float32")]
    assert all({case.name for case in part.cases} == searches.SEARCHES.keys() for part in several)
    assert any(case.dead for case in several[1].cases) and not gates.search_parts(False, CPU, Backend.torch)
    assert len(gates.search_parts(False, CPU, Backend.triton, graph=False)) == 2
    assert {case.config().most for case in several[0].cases if case.searches} == {24, 48}
    assert {case.searches for part in several for case in part.cases} == {True, False}


@pytest.mark.parametrize("case", searches.search_cases(True), ids=str)
def test_a_step_that_searches_holds_against_float64(case, monkeypatch):
    monkeypatch.setattr(searches, "STEPS", 2 if case.searches and not case.dead else 1)
    findings = searches.check_search(case, CPU)
    assert all(finding.holds for finding in findings), [str(finding) for finding in findings if not finding.holds]
    said = " ".join(finding.what for finding in findings)
    assert "gradient of router.W_ED" in said and "loss term competition" in said and ("auxk" in said) == (case.dead > 0)
    exact = [finding.error for finding in findings if finding.what.startswith(("loss term", "gradient of router"))]
    assert max(exact) < 2e-4  # in bf16, too: operands lose nothing


def test_every_fault_of_a_search_shows(monkeypatch):
    monkeypatch.setattr(searches, "STEPS", 1)
    case = searches.search_cases(True)[0]

    def red():
        return [finding.what for finding in searches.check_search(case, CPU) if not finding.holds]

    right = pursuit_step.compete
    with monkeypatch.context() as patch:
        patch.setattr(pursuit_step, "compete", lambda *given: right(*given)._replace(grad_n=right(*given).grad_n * 1.05))
        found = red()
        assert "gradient of router.W_ED" in found and not any("term" in what for what in found)
    found = []
    monkeypatch.setattr(searches, "same_rivals", lambda: nullcontext([]))
    for shift in (1, 2):  # the kernels cannot have drawn both of three experts' rivals
        other = lambda self, routing, shift=shift: searches.as_rivals(routing, (routing.expert_TS[:4, 0] + shift) % 3)  # noqa: E731
        monkeypatch.setattr(CompetitionRouter, "rivals", other)
        found += red()
    assert "loss term competition" in found


def test_batches_are_clear_of_ties():
    case = searches.SearchCase("switch_pursuit", replace(searches.SMALL, T=64), Precision.float32)
    x_TD = activations(replace(case.shape, T=128), 1, CPU)[0]
    sae = searches.build_search(case, x_TD)
    assert len(searches.settled_batch(sae, x_TD, 64)) == 64
    sae.W_dec_MD.data[1::2] = sae.W_dec_MD.data[::2] * (1 + 1e-7)
    with pytest.raises(RuntimeError, match="no 64 of 128 tokens are clear of ties"):
        searches.settled_batch(sae, x_TD, 64)


def test_bfloat16_loses_nothing_of_a_representable_batch():
    case = searches.search_cases(True)[0]
    x_TD = activations(case.shape, 1, CPU)[0]
    sae = searches.build_search(case, x_TD)
    centred_TD = searches.representable(sae, x_TD) * sae.activation_scale - sae.b_pre_D
    for tensor in (centred_TD, sae.W_dec_MD, sae.router.W_ED):
        assert torch.equal(tensor, tensor.bfloat16().float()) and tensor.unique().numel() > 20


def test_graphs_of_searches_are_compared_where_gram_matrices_are_renewed_at_every_second_step(monkeypatch):
    monkeypatch.setattr(gates, "PHASES", ("none dead", "some dead"))
    monkeypatch.setattr(gates, "INTERVAL", 1)
    kinds = []
    step = TritonEngine._compute
    monkeypatch.setattr(TritonEngine, "_compute", lambda self: (kinds.append((self._key()[0], self.kind[0])), step(self))[1])
    findings = gates.check_search_graph(searches.search_graph_cases(True)[0], CPU)
    assert all(finding.holds for finding in findings) and len(findings) == 2
    assert kinds == [(0, True), (0, False)] * 2 + [(192, True), (192, False)] * 2  # three experts' dead latents, padded to 64 each


def test_a_look_at_a_search_in_kernels_gives_the_cpu_their_rivals(monkeypatch):
    shape, executions = searches.SMALL, [resolve(Backend.triton, Precision.float32, CPU), PYTORCH]
    monkeypatch.setattr(architectures, "resolve", lambda *_: executions.pop(0))
    monkeypatch.setattr(architectures, "WARM", 0)
    config = searches.SearchCase("switch_pursuit, stop rule, shared", shape).config()
    seen = architectures.look("switch_pursuit, stop", config, CPU, shape, activations(shape, 2, CPU), steps=1)
    assert seen.holds and 0 < seen.gradient_error < 1e-4 and seen.loss_error < 1e-5 and "sparse latents" in seen.how and not executions


def described(argument):
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype), argument.storage_offset() * argument.element_size() % 16 == 0
    if isinstance(argument, tuple):
        return tuple(map(described, argument))
    if type(argument).__name__ == "TensorDescriptor":
        return described(argument.base), tuple(argument.block_shape)
    return argument


@pytest.mark.parametrize(
    "case",
    [
        Case(Shape(T=12, D=9, M=32, E=2, K=2), regime=Regime.dense, dead=3),
        Case(Shape(T=8, D=9, M=32, E=2, K=4, S=2), Precision.float32, regime=Regime.sparse),
        searches.SearchCase("switch_pursuit, stop rule, shared", searches.SMALL),
        searches.SearchCase("switch_refit, shared", searches.SMALL, Precision.float32, dead=3),
    ],
    ids=str,
)
def test_steps_on_meta_tensors_launch_what_real_steps_launch(case):
    """So that what is compiled ahead is what is launched: same kernels, constants, and arguments of the same kind and alignment."""
    real, meta = set(), set()

    def into(launches):
        def keep(launch):
            key = launch.kernel.fn.__name__, launch.grid, tuple(map(described, launch.args)), tuple(sorted(launch.kwargs.items()))
            launches.add(key)
            if launches is real:
                launch.run()

        return keep

    x_TD, dead = activations(case.shape, 1, CPU)[0], 64 if case.dead else 0
    if isinstance(case, Case):
        step, on_meta = OurStep(build_sae(case.shape, x_TD), case, Backend.triton), step_on_meta(replace(case, dead=dead))
    else:
        execution = resolve(Backend.triton, case.precision, CPU)
        step, on_meta = searches.SearchStep(searches.build_search(case, x_TD), case.shape.T, execution), partial(ahead_step, case, dead)
        step.mark_dead(0, case.dead)
    with launches_to(into(real)):
        step(x_TD)
    with launches_to(into(meta)):
        on_meta()
    assert real == meta


def ahead_step(case, dead):
    engine_on_meta(case.config(), case.shape.T, case.shape.D, case.precision, dead)()

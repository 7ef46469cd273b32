"""The GPU benchmark without a GPU: the floor model, the contenders' agreement, the checks that come before any speed, the budget, the table."""

import ast
import copy
import csv
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import cpu, gates, gpu, roofline
from experiments.benchmarks import suite as suite_module
from experiments.benchmarks.cases import (
    MAIN,
    TARGETS_US,
    TINY,
    Case,
    compile_groups,
    crossover_cases,
    parity_cases,
    shape_cases,
    step_cases,
    target_cases,
)
from experiments.benchmarks.checks import Finding, NotTrustedError, Trained, check_step, compare, settled
from experiments.benchmarks.contenders import (
    ExpertLoop,
    Grouped,
    MaskedDense,
    OurStep,
    SparsifyDecode,
    SparsifyNative,
    activations,
    build_sae,
    skew,
    sparsify_modules,
)
from experiments.benchmarks.gpu import OURS, Benchmark, disagreement, recorder
from experiments.benchmarks.record import append
from experiments.benchmarks.roofline import NODES, Roofs, alone_us, calibrate, floor, graph_us, modelled, times_and_host_us
from experiments.benchmarks.stages import STAGE_OF, KernelTime, stage_table, stage_times
from experiments.benchmarks.suite import COLUMNS, SECTIONS, Budget
from switch_kernels import Backend, Moments, Precision, Regime, Shape
from switch_kernels.adam import Adam
from switch_sae.engines import TritonEngine
from switch_sae.models import SwitchSAE, TopKSAE

CPU = torch.device("cpu")
SMALL = Shape(T=64, D=16, M=64, E=4, K=4)


@pytest.mark.parametrize(
    ("shape", "expected_us", "plan"),
    [
        (MAIN, 476, "dense, recomputed"),
        (replace(MAIN, E=8), 705, "sparse, buffered"),
        (replace(MAIN, E=1), 1239, "sparse, buffered"),
        (replace(MAIN, M=2**20, E=64), 10658, "sparse, recomputed"),
        (replace(MAIN, D=4096, M=131072), 8900, "sparse, recomputed"),
    ],
)
def test_floors_are_those_that_the_targets_were_set_by(shape, expected_us, plan):
    least = floor(shape, Roofs(), nodes=12)
    assert round(least.total_us) == expected_us and least.plan == plan
    assert floor(shape, Roofs(), plan=plan, nodes=12) == least
    assert all(
        floor(shape, Roofs(), plan=other, nodes=12).total_us >= least.total_us
        for other in ("dense, buffered", "sparse, buffered", "sparse, recomputed")
    )


def test_floors_follow_the_roofs_and_the_work():
    def total(shape=MAIN, **changes):
        return floor(shape, Roofs(**changes)).total_us

    assert (
        total(copy=8.6e12) < total() < total(copy=2e12)
        and total(gemm=4e14) > total()
        and total(launch_us=5.0) == pytest.approx(total() + 2.5 * NODES)
    )
    sparse = replace(MAIN, E=1)
    assert total(sparse, gather=2e12) > total(sparse)
    assert total() < total(replace(MAIN, S=2)) < total(replace(MAIN, S=4)) and total() < total(replace(MAIN, T=32768))
    # moments in half the bytes: 8 of the 26 bytes of each of 2 M D parameters
    saved = floor(MAIN, Roofs()).stages["update"] - floor(MAIN, Roofs(), moment_bytes=2).stages["update"]
    assert saved == pytest.approx(8 * 2 * 32768 * 768 / 4.3e12 * 1e6)


def test_steps_are_modelled_by_their_number_of_nodes(capsys):
    assert modelled(Case(MAIN), 59) - modelled(Case(MAIN), 30) == pytest.approx(58)
    roofline.main(["--nodes", "59", "30", "--node-us", "3"])
    text = capsys.readouterr().out
    assert "not measured" in text and text.count("59 -> 30") == 4 and text.count(" 87 ") == 4


def test_roofs_are_measured_and_not_assumed():
    roofs = calibrate(CPU, tiny=True)
    assert all(value > 0 for value in vars(roofs).values()) and not set(vars(roofs).values()) & set(vars(Roofs()).values())
    assert "TB/s" in roofs.describe()


class FakeCuda:
    """torch.cuda on a clock that each kernel moves on by 5 us: what code for a GPU does with its events, streams and graphs."""

    def __init__(self, monkeypatch):
        self.now_us, self.captured, self.device = 0.0, None, SimpleNamespace(type="cuda")
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                assert cuda.captured is None
                self.at = cuda.now_us

            def elapsed_time(self, other):
                return (other.at - self.at) / 1e3

        class CUDAGraph:
            def replay(self):
                cuda.now_us += 2.0 + 5.0 * self.kernels

        @contextmanager
        def graph(made):
            cuda.captured = 0
            yield
            made.kernels, cuda.captured = cuda.captured, None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "synchronize": lambda device: None, "Stream": lambda device: stream}
        fakes |= {"current_stream": lambda device: stream, "stream": lambda stream: nullcontext()}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def kernel(self, *_):
        if self.captured is None:
            self.now_us += 5.0
        else:
            self.captured += 1


def test_device_time_is_told_from_host_time(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    times, host_us = times_and_host_us(cuda.kernel, 7, cuda.device)
    assert times == pytest.approx([5.0] * 7) and 0 < host_us < 1e4
    assert alone_us(cuda.kernel, 3, cuda.device, SimpleNamespace(sum=cuda.kernel)) == pytest.approx(5.0)
    assert graph_us(cuda.kernel, 10, 4, cuda.device) == pytest.approx(5.2)


def test_activations_and_weights_are_the_same_every_time_and_skew_is_zipf():
    x_BTD = activations(replace(SMALL, T=2048), 2, CPU)
    assert torch.equal(x_BTD, activations(replace(SMALL, T=2048), 2, CPU)) and not torch.equal(x_BTD[0], x_BTD[1])
    sae = build_sae(SMALL, x_BTD[0])
    assert isinstance(sae, SwitchSAE) and torch.equal(sae.W_enc_MD, build_sae(SMALL, x_BTD[0]).W_enc_MD)
    assert type(build_sae(replace(SMALL, E=1), x_BTD[0])) is TopKSAE
    skewed_BTD = skew(sae, x_BTD)
    with torch.no_grad():
        counts_E = torch.bincount(sae.route(skewed_BTD[0])[0].expert_TS.flatten(), minlength=4)
    assert counts_E / 2048 == pytest.approx(torch.tensor([12, 6, 4, 3]) / 25, abs=0.05)


@pytest.mark.parametrize(("E", "S"), [(1, 1), (4, 1), (4, 2)])
def test_all_contenders_train_alike(E, S):
    shape = replace(SMALL, E=E, S=S)
    x_TD = activations(shape, 1, CPU)[0]
    sae = build_sae(shape, x_TD)
    steps = {"truth": MaskedDense(sae, "float64", dense_decode=True), "masked": MaskedDense(sae, "float32")}
    steps[OURS] = OurStep(copy.deepcopy(sae), Case(shape), Backend.torch)
    if S == 1:
        steps |= {"loop": ExpertLoop(sae, "float32"), "grouped": Grouped(sae, "float32")}
    losses = {name: [step.loss(x_TD).item() for _ in range(3)] for name, step in steps.items()}
    assert losses["truth"][2] < 0.995 * losses["truth"][0]
    for name, step in steps.items():
        assert losses[name] == pytest.approx(losses["truth"], rel=2e-6), name
        for parameter, moment in steps["truth"].moments().items():
            assert torch.allclose(step.moments()[parameter].double(), moment, rtol=1e-3, atol=1e-6), (name, parameter)
    low = MaskedDense(sae, "bf16", dense_decode=True)
    assert disagreement([low.loss(x_TD).item() for _ in range(3)], losses["truth"], "bf16") is None


def test_sparsify_is_found_and_loaded_without_what_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.benchmarks.contenders.SPARSIFY_FOLDER", tmp_path / "nowhere")
    assert sparsify_modules() is None
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "__init__.py").write_text("raise ImportError('transformers is missing')")
    (tmp_path / "sparsify" / "xformers.py").write_text(
        "import torch\ndef xformers_embedding_bag(indices, weight, weights):\n"
        "    return torch.nn.functional.embedding_bag(indices, weight, mode='sum', per_sample_weights=weights)\n"
    )
    (tmp_path / "sparsify" / "fused_encoder.py").write_text(
        "import torch\ndef fused_encoder(x, W, b, k, activation):\n"
        "    pre = torch.nn.functional.linear(x, W, b).relu()\n    return *torch.topk(pre, k, sorted=False), pre\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    decoder, encoder = sparsify_modules()
    for name in ("sparsify_xformers", "sparsify_fused_encoder"):
        monkeypatch.delitem(sys.modules, name)
    shape = replace(SMALL, E=1)
    x_TD = activations(shape, 1, CPU)[0]
    sae = build_sae(shape, x_TD)
    expected = [MaskedDense(sae, "float32").loss(x_TD).item()]
    assert [SparsifyDecode(sae, "float32", decoder, False).loss(x_TD).item()] == pytest.approx(expected, rel=1e-6)
    assert disagreement([SparsifyNative(sae, decoder, encoder).loss(x_TD).item()], expected, "bf16") is None


def test_one_step_holds_against_float64_and_every_fault_shows(monkeypatch):
    for case in (Case(replace(SMALL, S=2), Precision.float32), Case(SMALL, Precision.float32, dead=3)):
        assert all(finding.holds for finding in check_step(case, CPU, Backend.torch))
    right = Adam.step

    def red():
        return {f.what.split(" of ")[0].split(" whose")[0] for f in check_step(Case(SMALL, Precision.float32), CPU, Backend.torch) if not f.holds}

    def spoiled(spoil):
        def step(self, gradients, lr, clip):
            if self.torch_adam.defaults["lr"] == 0.0:  # ours; the references have a learning rate from the start
                return spoil(self, gradients, lr, clip)
            return right(self, gradients, lr, clip)

        monkeypatch.setattr(Adam, "step", step)
        return red()

    assert "gradient" in spoiled(lambda self, g, lr, clip: right(self, g | {"W_enc_MD": g["W_enc_MD"] * 1.001}, lr, clip))
    assert "update" in spoiled(lambda self, g, lr, clip: right(self, g, 1.01 * lr, clip))
    noise = iter(range(10**6))
    assert spoiled(lambda self, g, lr, clip: right(self, g, lr * (1 + 1e-6 * next(noise)), clip)) == {"tensors"}
    monkeypatch.setattr(Adam, "step", lambda self, *rest: right(self, *rest) * float("nan"))
    assert red() == set()  # a norm that is only reported is not what is checked
    assert not Finding("NaN", float("nan"), 1.0).holds


def test_tokens_near_a_tie_are_left_out_of_the_check():
    x_TD = activations(SMALL, 1, CPU)[0]
    sae = build_sae(SMALL, x_TD)
    assert len(settled(sae, x_TD)) >= len(x_TD) - 4
    sae.W_enc_MD.data[1::2] = sae.W_enc_MD.data[::2] * (1 + 1e-7)
    sae.config.k = 3  # an odd number of latents that come in equal pairs
    assert len(settled(sae, x_TD)) < len(x_TD) / 4


def test_parity_is_judged_by_loss_l0_and_dead_latents():
    right = Trained(10.0, 11.0, 32.0, 0.02)
    assert all(finding.holds for finding in compare(Trained(10.09, 10.9, 31.9, 0.025), right))
    for changes in ({"train_loss": 10.2}, {"loss": 10.8}, {"l0": 31.0}, {"dead": 0.04}):
        assert [finding.holds for finding in compare(replace(right, **changes), right)].count(False) == 1


def test_losses_that_are_not_those_of_the_same_function_are_found():
    assert disagreement([10.0, 9.0], [10.0, 9.0], "float32") is None
    assert disagreement([10.02, 9.03], [10.0, 9.0], "bf16") is None
    assert "differ" in disagreement([10.02, 9.03], [10.0, 9.0], "float32") and "differ" in disagreement([float("nan")] * 2, [10.0, 9.0], "bf16")
    assert "falls by" in disagreement([10.0, 9.99], [10.0, 9.98], "bf16")


def test_every_case_is_compiled_ahead_once_and_the_targets_come_first():
    groups = compile_groups(False, SECTIONS)
    cases = [case for group in groups for case in group]
    assert len(cases) == len(set(cases))
    timed = {*target_cases(False), *shape_cases(False), *(case for pair in crossover_cases(False) for case in pair)}
    assert timed | {*parity_cases(False), *step_cases(False, True)} <= set(cases)
    assert all(len({(c.shape.D, c.shape.M, c.shape.E, c.shape.K, c.precision, c.regime) for c in group}) == 1 for group in groups)
    assert {case.dead for case in cases if case.shape == MAIN} == {0, 64, 128, 256, 512, 1024}
    assert not any(case.shape.M == 131072 for group in compile_groups(False, ["parity"]) for case in group)
    assert next(iter(TARGETS_US)) == Case(MAIN)
    shapes = {case.shape for case in timed}
    assert {s.M for s in shapes} > {24576, 32768, 131072, 2**20} and {s.E for s in shapes} >= {1, 8, 32, 64, 128}
    assert {s.T for s in shapes} == {2048, 8192, 32768} and {s.S for s in shapes} == {1, 2, 4} and {s.D for s in shapes} == {768, 4096}
    assert Case(MAIN, moments=Moments.bfloat16) in timed and any(s.routing == "zipf" for s in shapes)
    assert {case.regime for case in step_cases(False, True)} == set(Regime)


def test_kernels_are_summed_by_stage_and_unknown_ones_are_shown():
    least = floor(MAIN, Roofs(), plan="dense, buffered")
    kernels = [KernelTime("_route", 1.0, 4.0, 3.0), KernelTime("_update_rows", 90.0, 200.0, 190.0), KernelTime("_update_rows", 90.0, 180.0, 170.0)]
    stages = {stage.name: stage for stage in stage_times([*kernels, KernelTime("_new", 1.0, 5.0, 5.0), KernelTime("_pursue", 1.0, 7.0, 6.0)], least)}
    assert stages["update"].launches == 2 and stages["update"].cold_us == 380 and stages["update"].floor_us == least.stages["update"]
    assert stages["weight gradients"].floor_us == least.stages["weight gradients"] + least.stages["clip"]
    assert stages["other"].floor_us is None and stages["encode"].launches == 0
    assert stages["search"].floor_us is None and stages["search"].cold_us == 7
    text = stage_table(list(stages.values()), [*kernels, KernelTime("_new", 1.0, 5.0, 5.0)], 700.0)
    assert "_new" in text and "389 us cold" in text and "700 us" in text


def test_every_kernel_that_a_step_launches_belongs_to_a_stage():
    folder = Path(gpu.__file__).parents[2] / "kernels" / "switch_kernels" / "gpu"
    calls = [node for path in sorted(folder.glob("*.py")) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    launched = {
        call.args[0].id for call in calls if isinstance(call.func, ast.Name) and call.func.id == "launch" and isinstance(call.args[0], ast.Name)
    }
    assert len(launched) > 15 and launched <= set(STAGE_OF)


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setattr(gates, "step_cases", lambda tiny, triton: [Case(SMALL, Precision.float32)])
    rows = []
    about = dict(zip(COLUMNS, ("2026-01-01", "abc", "cpu", "2.11", "3.6"), strict=False))
    made = Benchmark(CPU, Backend.torch, True, Budget(5.0), rows.extend, about)
    made.rows = rows
    return made


def test_a_run_checks_first_then_fills_the_table(suite, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "profile", lambda step, device, steps=5: {"kernel": step() and 1.0})
    assert suite.run(list(SECTIONS)) == 0
    text = capsys.readouterr().out
    assert text.index("== correctness") < text.index("== targets") < text.index("== contenders") and "holds" in text
    assert "eai-sparsify's kernels are MISSING" in text and "RED" not in text and "FAILED" not in text
    assert all(tuple(row) == COLUMNS for row in suite.rows)
    sections = {row["section"] for row in suite.rows}
    assert sections == {"roofs", "step", "parity", "contenders", "optimizer", "architectures", "profile"}
    steps = [row for row in suite.rows if row["section"] == "step"]
    assert [(row["E"], row["S"], row["routing"]) for row in steps] == [(4, 1, "random"), (1, 1, "random"), (4, 2, "random"), (4, 1, "zipf")]
    assert all(float(row["measured_us"]) > 0 and float(row["ratio"]) > 0 and row["device"] == "cpu" for row in steps)
    named = {row["name"] for row in suite.rows if row["section"] == "contenders" and row["E"] == TINY.E}
    assert named == {OURS, "masked-dense, float32", "masked-dense, bf16", "loop over experts", "F.grouped_mm, embedding_bag"}


def test_no_speed_on_red(suite, capsys, monkeypatch):
    monkeypatch.setattr(gates, "check_step", lambda *_: [Finding("gradient of W_enc_MD", 0.5, 0.1)])
    assert suite.run(list(SECTIONS)) == 1
    text = capsys.readouterr().out
    assert "RED" in text and "no speed is reported: float32: eager: 1 checks failed" in text
    assert {row["section"] for row in suite.rows} == {"roofs"} and "tokens/s" not in text


def test_what_fails_is_reported_and_the_rest_goes_on(suite, capsys, monkeypatch):
    measure = Benchmark.measure
    monkeypatch.setattr(Benchmark, "measure", lambda self, case, *repeats: measure(self, case, *repeats) if case.shape.E > 1 else 1 / 0)
    assert suite.run(["targets", "shapes"]) == 1
    text = capsys.readouterr().out
    assert "ZeroDivisionError" in text and "== shapes" in text and text.strip().endswith(f"FAILED: {Case(replace(TINY, E=1))}")
    assert len([row for row in suite.rows if row["section"] == "step"]) == 3


def test_kernels_are_compiled_ahead_by_a_process_that_the_time_limit_ends(suite, capsys, monkeypatch):
    suite.backend, suite.device, suite.jobs = Backend.triton, SimpleNamespace(type="cuda"), 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    commands, ends = [], []

    class Process:
        def __init__(self, command, stdout, stderr, cwd):
            commands.append(command)
            stdout.write("   FAILED _encode_kernel, exit code 1\n   3 of 4 kernels compiled by 2 processes in 1 s\n")

        def poll(self):
            return 0 if ends else None

        def terminate(self):
            ends.append("terminated")

        def wait(self):
            assert ends

    monkeypatch.setattr(suite_module.subprocess, "Popen", Process)
    suite.budget = Budget(0.5 / 60)
    suite.run_compile(["targets"])
    text = capsys.readouterr().out
    assert ends == ["terminated"] and suite.failures == ["compile"]
    assert commands[0][1:] == ["-m", "experiments.benchmarks.ahead", "--capability", "9.0", "--jobs", "2", "--sections", "targets", "--quick"]
    assert "3 of 4 kernels compiled by 2 processes" in text and "FAILED _encode_kernel" in text


def test_one_precision_that_is_wrong_keeps_the_others(suite, capsys, monkeypatch):
    suite.backend = Backend.triton
    cases = {precision: [Case(replace(SMALL, T=64 + n), precision) for n in range(5)] for precision in (Precision.bf16, Precision.float32)}
    monkeypatch.setattr(gates, "step_cases", lambda tiny, triton: [case for several in cases.values() for case in several])
    monkeypatch.setattr(gates, "graph_cases", lambda tiny: [several[0] for several in cases.values()])
    checked = []

    def check(name, wrong):
        def one(case, *_):
            checked.append((name, case))
            if case.precision is wrong and case.shape.T == 65:
                raise RuntimeError("no such tile")
            return [Finding("gradient", 0.5 if case.precision is wrong else 0.05, 0.1)]

        return one

    monkeypatch.setattr(gates, "check_step", check("eager", Precision.float32))
    monkeypatch.setattr(gates, "check_graph", check("graph", None))
    suite.run_correctness([])
    text = capsys.readouterr().out
    assert [name for name, _ in checked] == ["eager"] * 8 + ["graph"] * 2  # the first three reds ended that part
    assert "eager, float32: 2 of 5 cases left out, after 3 reds" in text and "no such tile" in text
    assert suite.untrusted == {Precision.float32: "eager: 3 checks failed"} and "float32 is NOT TIMED: eager: 3 checks failed" in text
    assert list(suite.each([cases[Precision.float32][0], cases[Precision.bf16][0]])) == [cases[Precision.bf16][0]]
    monkeypatch.setattr(gates, "check_graph", check("graph", Precision.bf16))
    with pytest.raises(NotTrustedError, match="bf16: graph: 1 checks failed; float32"):
        suite.run_correctness([])
    suite.graph = False
    suite.run_correctness([])
    assert Precision.bf16 not in suite.untrusted  # --no-graph: eager steps are what is timed


def test_searches_that_are_wrong_keep_what_does_not_search(suite, capsys, monkeypatch):
    suite.run_searches([])
    assert "SKIPPED" in capsys.readouterr().out and not suite.untrusted_searches
    suite.backend = Backend.triton
    monkeypatch.setattr(gates, "check_search", lambda case, device: [Finding("gradient", float(case.precision is Precision.bf16), 0.1)])
    monkeypatch.setattr(gates, "check_search_graph", lambda case, device: [Finding("bits", 0, 0)])
    suite.run_searches([])
    assert suite.untrusted_searches == {Precision.bf16: "eager search: 1 checks failed"} and not suite.untrusted
    assert suite.failures == ["correctness of searches in bf16"]
    assert "searches in bf16 is NOT TIMED: eager search: 1 checks failed" in capsys.readouterr().out


def test_after_the_gpu_is_lost_and_after_time_is_up_nothing_is_trusted(suite, monkeypatch):
    suite.backend = Backend.triton
    case = Case(SMALL)
    monkeypatch.setattr(gates, "step_cases", lambda tiny, triton: [case, replace(case, dead=1)])
    monkeypatch.setattr(gates, "graph_cases", lambda tiny: [case])
    monkeypatch.setattr(gates, "check_step", lambda *_: 1 / 0 if suite.budget.end else [])
    with pytest.raises(NotTrustedError, match="bf16: eager: 2 checks failed"):
        monkeypatch.setattr(gates, "check_graph", lambda *_: [Finding("bits", 0, 0)])
        suite.run_correctness([])

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gates, "check_step", lost)
    with pytest.raises(NotTrustedError, match="eager: 1 checks failed; graph: the GPU was lost"):
        suite.run_correctness([])
    suite.budget.end = 0.0
    with pytest.raises(NotTrustedError, match="eager: the time was up"):
        suite.run_correctness([])


def test_a_graph_that_keeps_an_old_dead_set_is_found(monkeypatch):
    class Step:
        """Weights that move by the number of latents that were dead at the last reading; a graph that is stale moves by the first ones."""

        stale = False

        def __init__(self, sae, case, backend):
            self.engine = self.trainer = SimpleNamespace(tokens_since_fired_M=torch.zeros(case.shape.M, dtype=torch.int64))
            self.trainer.engine, self.weight, self.steps = self.trainer, torch.zeros(()), 0

        def loss(self, x_TD):
            if self.steps % self.engine.INTERVAL == 0 and (self.steps <= 4 or not (self.stale and "EAGER_STEPS" not in vars(self.engine))):
                self.dead = (self.trainer.tokens_since_fired_M > 0).sum()
            self.steps += 1
            self.weight = self.weight + self.dead
            return self.weight

        def tensors(self):
            return {"W": self.weight}

    monkeypatch.setattr(gates, "OurStep", Step)
    for Step.stale in (False, True):
        found = gates.check_graph(Case(SMALL), CPU)
        assert [finding.holds for finding in found] == ([True, True] + [not Step.stale] * 3) and "more dead" in found[2].what


def test_eager_is_only_inside():
    before = TritonEngine.EAGER_STEPS
    with gates.eager():
        assert TritonEngine.EAGER_STEPS > 10**9
    assert before == TritonEngine.EAGER_STEPS


def test_what_is_known_is_said_after_each_section(suite, capsys):
    suite.run(["targets", "shapes"])
    text = capsys.readouterr().out
    assert text.index("no target is judged") < text.index("== shapes")


def test_a_contender_with_another_loss_is_not_timed(suite, capsys, monkeypatch):
    monkeypatch.setattr(
        Grouped,
        "decode",
        lambda self, values, indices: 1.1 * F.embedding_bag(indices, self.operand("W_dec_MD"), per_sample_weights=values, mode="sum"),
    )
    assert suite.run(["contenders"]) == 1
    assert "F.grouped_mm, embedding_bag is NOT TIMED: its losses" in capsys.readouterr().out
    assert Grouped.name not in {row["name"] for row in suite.rows} and OURS in suite.contest[TINY.E]


def test_what_the_time_does_not_allow_is_skipped_with_a_line(suite, capsys):
    suite.budget.end = 0.0
    assert suite.run(list(SECTIONS)) == 0
    text = capsys.readouterr().out
    assert all(f"== {name}: SKIPPED, the time is up" in text for name in SECTIONS) and suite.rows == []
    suite.budget = Budget(1.0)
    suite.budget.open(10.0)
    suite.tiny = False  # now a case is thought to take 5 seconds
    taken = []
    for case in suite.each(["a", "b", "c"]):
        taken.append(case)
        suite.budget.section_end -= 6.0
    assert taken == ["a"] and "SKIPPED for lack of time: 2 of 3, from b" in capsys.readouterr().out


def test_targets_are_judged(suite, capsys):
    suite.tiny = False
    case = next(iter(TARGETS_US))
    suite.measured[case] = SimpleNamespace(mean_us=550.0, ratio=0.7)
    suite.contest[32] = {OURS: 550.0, "masked-dense, float32": 33000.0, "loop over experts": 3000.0, "F.grouped_mm, embedding_bag": 2000.0}
    suite.parity["a case"] = True
    suite.summary()
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line.split("  ")[-1].strip() for line in lines[1:]]
    assert verdicts == ["met", "NOT MET", *["not measured"] * 7, "NOT MET", "met", "met"]
    assert "0.55" in lines[1] and "3.64" in lines[10] and "60" in lines[11]
    suite.roofs = Roofs(copy=3.0e12)  # an H100 may take longer, a faster machine must be faster
    suite.untrusted = {Precision.float32: "graph: 1 checks failed"}
    suite.summary()
    text = capsys.readouterr().out
    assert f"<= {0.6 * 4.3 / 3.0:.2f}" in text and "3.00 TB/s" in text and "float32: NOT TIMED, graph: 1 checks failed" in text
    suite.roofs, suite.untrusted = Roofs(copy=5e12), {}
    suite.summary()
    assert capsys.readouterr().out.splitlines()[1].endswith("NOT MET")


def test_rows_are_appended_and_copied_out(tmp_path):
    path, out = tmp_path / "results" / "gpu.csv", tmp_path / "out"
    record = recorder(path, out)
    row = dict.fromkeys(COLUMNS, "") | {"name": "ours", "T": 8192, "measured_us": "512.3"}
    record([row])
    record([row, row | {"name": "loop, naive"}])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == ["ours", "ours", "loop, naive"] and list(rows[0]) == list(COLUMNS) and rows[0]["T"] == "8192"
    assert (out / "gpu.csv").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="Move the old table away"):
        append(path, [{"another": 1}])
    assert (out / "gpu.csv").read_bytes() == path.read_bytes()


def test_it_runs_where_only_torch_numpy_and_safetensors_are():
    blocked = ("hydra", "omegaconf", "transformer_lens", "transformers", "datasets", "wandb", "matplotlib", "tqdm", "triton")
    code = f"""
import sys, torch
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
before = set(sys.modules)
sys.meta_path.insert(0, Missing())
import experiments.benchmarks.gpu, experiments.benchmarks.first_contact, experiments.benchmarks.replay
print(sorted((set(sys.modules) - before) & set({blocked})))
"""
    root = Path(gpu.__file__).parents[2]
    done = subprocess.run((sys.executable, "-c", code), cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_gpu_makes_the_benchmark_run_its_suite(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2 and "there is no CUDA device. Use --quick" in capsys.readouterr().err
    calls = []
    for module in (cpu, gpu):
        monkeypatch.setattr(module, "main", lambda arguments, module=module: calls.append((module, arguments)))
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        benchmarks.main(["--peers"])
        benchmarks.main(["--cpu", "--peers"])
    assert calls == [(cpu, ["--peers"]), (cpu, ["--peers"]), (gpu, ["--peers"]), (cpu, ["--peers"])]

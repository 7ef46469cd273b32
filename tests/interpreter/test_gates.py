"""The GPU benchmark's gates and its compilation ahead, as far as the interpreter can show them."""

from dataclasses import replace

import pytest
import torch

from experiments.benchmarks import gates
from experiments.benchmarks.cases import Case, graph_cases
from experiments.benchmarks.contenders import OurStep, activations, build_sae
from experiments.benchmarks.nodes import step_on_meta
from switch_kernels import Backend, Precision, Regime, Shape
from switch_kernels.gpu.launch import launches_to

CPU = torch.device("cpu")


def test_graph_cases_are_of_both_regimes_and_precisions():
    cases = graph_cases(False)
    assert {case.precision for case in cases} == {Precision.bf16, Precision.float32} and any(case.shape.S == 2 for case in cases)
    assert all(part.cases for part in gates.parts(False, CPU, Backend.triton))
    assert [str(part) for part in gates.parts(False, CPU, Backend.triton)] == ["eager, bf16", "eager, float32", "graph, bf16", "graph, float32"]
    assert [str(part) for part in gates.parts(False, CPU, Backend.triton, graph=False)] == ["eager, bf16", "eager, float32"]


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
    ],
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

    x_TD = activations(case.shape, 1, CPU)[0]
    step = OurStep(build_sae(case.shape, x_TD), case, Backend.triton)
    with launches_to(into(real)):
        step(x_TD)
    with launches_to(into(meta)):
        step_on_meta(replace(case, dead=64 if case.dead else 0))()
    assert real == meta

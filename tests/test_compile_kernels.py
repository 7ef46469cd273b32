"""The offline compilation finds what it is there to find."""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from experiments.benchmarks.compile_kernels import TARGETS, Job, Report, StubDriver, collect, compile_all, labels
from experiments.benchmarks.kernel_cases import MAIN, Case, grams, train
from switch_kernels import Shape
from switch_kernels.gpu.launch import Launch, launch


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", StubDriver(TARGETS["sm_90"]))


@triton.jit
def _powers(x, out, n, times, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    power = value
    for _ in range(times):
        power *= value + i
    tl.store(out + i, power, mask=i < n)


@triton.jit
def _product(a, b, out, N: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + i[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + i[None, :])
    tl.store(out + i[:, None] * N + i[None, :], tl.dot(left, right))


def launch_powers(size: int, block: int) -> None:
    x = torch.empty(size, device="meta")
    launch(_powers, (-(-size // block),), x, torch.empty_like(x), size, 3, BLOCK=block, num_warps=1)


def launch_product(n: int, k: int) -> None:
    a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((n, k), (k, n)))
    launch(_product, (1,), a, b, torch.empty(n, n, device="meta"), N=n, K=k, num_warps=8)


def reports(run: Any, count: bool = True) -> list[Report]:
    return [report for _, report in compile_all(collect({"case": run}), TARGETS["sm_90"], processes=1, count=count)]


def test_each_distinct_kernel_is_compiled_once() -> None:
    jobs = collect({"aligned": lambda: launch_powers(64, 32), "too": lambda: launch_powers(128, 32), "odd": lambda: launch_powers(65, 32)})
    assert [job.case for job in jobs] == ["aligned", "odd"]
    jobs += collect({"other": lambda: launch_powers(64, 64)})
    assert len(set(labels(jobs))) >= 2


@pytest.mark.parametrize("shape", [MAIN, replace(MAIN, E=1), replace(MAIN, E=8, S=2)], ids=str)
def test_another_number_of_dead_latents_compiles_nothing(shape: Shape) -> None:
    steps = {str(dead): partial(train, Case(shape, dead=dead)) for dead in (64, 128, 512)}
    alone = collect({"64": steps["64"]})
    assert "_keep_topk" in {job.launch.kernel.__name__ for job in alone}
    assert [job.case for job in collect(steps)] == ["64"] * len(alone)


def test_gram_matrices_of_other_sizes_compile_nothing() -> None:
    sizes = [(24, 170), (1, 1), (1, 16384), (16, 0, 16), (32, 704, 160), (4096, 1, 1)]
    jobs = collect({str(size): partial(grams, *size, D=D) for size in sizes for D in (768, 16)})
    assert [job.case for job in jobs] == ["(24, 170)"] * 2  # of three products, and of float32
    odd = collect({f"rows of {D}": partial(grams, 24, 170, D=D) for D in (771, 768, 40)})
    assert [job.case for job in odd] == ["rows of 771"] * 2 + ["rows of 768"] * 2


def test_a_kernel_that_fits_passes() -> None:
    (report,) = reports(lambda: launch_powers(64, 32))
    assert not report.problem
    assert report.figures["reg"] > 0 and report.figures["spills"] == 0 and report.figures["instr"] > 10


def test_tensor_core_instructions_are_counted() -> None:
    (report,) = reports(lambda: launch_product(64, 64))
    assert report.figures["HGMMA"] > 0 and report.figures["shared"] > 0


@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (lambda: launch_powers(2**13, 2**13), "SPILLS"),
        (lambda: launch_product(64, 1024), "SHARED MEMORY"),
        (lambda: launch_powers(64, 48), "power of 2"),
    ],
)
def test_what_a_gpu_would_choke_on_is_reported(run: Any, problem: str, count: bool) -> None:
    (report,) = reports(run, count)
    assert problem in report.problem
    assert problem == "power of 2" or ("instr" in report.figures) == count


def test_a_compiler_that_dies_is_reported() -> None:
    class Dying:
        def warmup(self, *args: Any, **kwargs: Any) -> None:
            os._exit(3)

    job = Job(Launch(Dying(), (1,), (), {}), "case", {}, {})
    ((_, report),) = compile_all([job], TARGETS["sm_90"], processes=2)
    assert "exit code 3" in report.problem

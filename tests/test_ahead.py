"""Kernels are compiled ahead into a cache, without a GPU."""

import importlib

import pytest
import torch

from experiments.benchmarks.cases import TINY, Case

triton = pytest.importorskip("triton")
launches_to = importlib.import_module("switch_kernels.gpu.launch").launches_to
ahead = importlib.import_module("experiments.benchmarks.ahead")  # needs triton, as do the kernels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", "nowhere")  # main sets it; afterwards it is what it was
    monkeypatch.setattr(ahead.signal, "signal", lambda *_: None)
    return tmp_path / "cache"


def count(experts):
    from switch_kernels.gpu.dispatch import count_experts

    return lambda: count_experts(torch.zeros(4, 1, dtype=torch.int32, device="meta"), experts)


def test_a_cache_is_filled_without_a_gpu(cache, monkeypatch, capsys):
    monkeypatch.setattr(ahead, "requests", lambda sections, tiny: {"one": count(1), "the same": count(1)})
    with pytest.raises(SystemExit) as ended:
        ahead.main(["--cache", str(cache), "--jobs", "1"])
    assert ended.value.code == 0 and f"1 of 1 kernels compiled into {cache}" in capsys.readouterr().out
    assert len(list(cache.rglob("_count_experts.cubin"))) == 1


def test_what_does_not_compile_is_named(cache, monkeypatch, capfd):
    monkeypatch.setattr(ahead, "requests", lambda sections, tiny: {"one": count(3)})
    monkeypatch.setattr(ahead, "_compile", lambda job, label: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        ahead.main(["--cache", str(cache), "--jobs", "1"])
    text = capfd.readouterr().out
    assert ended.value.code == 1 and "FAILED _count_experts" in text and "0 of 1 kernels compiled" in text
    with pytest.raises(SystemExit):
        ahead.main(["--capability", "ninety"])


def test_dead_latents_are_as_many_as_a_step_pads_them_to():
    assert [ahead.as_padded(Case(TINY, dead=dead)).dead for dead in (0, 5, 64, 65, 256)] == [0, 64, 64, 128, 256]


def test_searches_and_architectures_are_compiled_where_their_sections_run():
    def kernels(*sections):
        seen = set()
        with launches_to(lambda launch: seen.add(launch.kernel.fn.__name__)):
            for run in ahead.requests(list(sections), True).values():
                run()
        return seen

    searched = {"_gram", "_pursue", "_refit_pairs", "_draw_rivals", "_follow_l0", "_row_candidates", "_missed_rows"}
    assert not searched & kernels("targets")
    assert searched <= kernels("searches") and searched <= kernels("architectures")
    named = [name for name in ahead.requests(["architectures"], True) if name.startswith("architecture ")]
    assert {"architecture topk", "architecture switch_refit", "architecture switch_pursuit, stop"} <= set(named) and len(named) < 10
    dead = {(case.name, dead) for case, dead in ahead.search_steps(False)}
    assert {("switch_refit", 128), ("switch_refit, shared", 256), ("switch_refit", 64), ("switch_refit", 0)} <= dead

"""The benchmark's look at every architecture on a GPU, without one: what it covers, what it finds, what it says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments.benchmarks import architectures
from experiments.benchmarks.architectures import BATCHES, TINY_SIZES, configs, is_search, look, waits_of, why_autograd
from experiments.benchmarks.contenders import activations
from experiments.benchmarks.gpu import Benchmark
from experiments.benchmarks.suite import Budget
from switch_kernels import Backend, Precision
from switch_sae.models import ROUTERS, SAES, SwitchSAE

CPU = torch.device("cpu")


def test_every_architecture_and_router_is_looked_at():
    found = configs(TINY_SIZES)
    assert {SAES.key_of(config) for config in found.values()} == SAES.keys()
    assert {ROUTERS.key_of(config.router) for config in found.values() if isinstance(config, SwitchSAE.Config)} == ROUTERS.keys()
    assert {config.num_latents for config in found.values()} == {TINY_SIZES.M}


@pytest.mark.parametrize("name", ["switch", "switch_pursuit, stop", "transcoder"])
def test_a_step_is_that_of_the_cpu(name):
    seen = look(name, configs(TINY_SIZES)[name], CPU, TINY_SIZES, activations(TINY_SIZES, BATCHES, CPU), steps=2)
    assert (seen.loss_error, seen.gradient_error, seen.holds) == (0, 0, True) and seen.step_us > 0 and seen.inference_us > 0


def test_another_gradient_is_named(monkeypatch):
    first = architectures._first_step

    def changed(*arguments):
        loss, moments, trainer = first(*arguments)
        moments["adam/W_dec_MD/exp_avg"] *= 1 + 0.02 * (len(calls) == 0)  # the device comes first
        calls.append(1)
        return loss, moments, trainer

    calls = []
    monkeypatch.setattr(architectures, "_first_step", changed)
    seen = look("topk", configs(TINY_SIZES)["topk"], CPU, TINY_SIZES, activations(TINY_SIZES, BATCHES, CPU), steps=1)
    assert seen.gradient_error == pytest.approx(0.02, rel=0.01) and "W_dec_MD" in seen.worst and not seen.holds


def test_searches_in_kernels_are_told_from_what_autograd_computes():
    found = configs(TINY_SIZES)
    searches = {name for name, config in found.items() if is_search(config, TINY_SIZES.D)}
    assert searches == {"switch_pursuit", "switch_pursuit, stop", "switch_refit"}
    assert why_autograd(found["topk"], TINY_SIZES.D) is None and "no Triton kernels train" in why_autograd(found["sketch"], TINY_SIZES.D)
    seen = look("switch_refit", found["switch_refit"], CPU, TINY_SIZES, activations(TINY_SIZES, BATCHES, CPU), steps=1)
    assert replace(seen, gradient_error=0.02).holds and not replace(seen, gradient_error=0.04).holds


def test_searches_whose_checks_failed_are_not_timed(monkeypatch, capsys):
    suite = Benchmark(CPU, Backend.torch, True, Budget(5), lambda rows: None, {})
    monkeypatch.setattr(architectures, "configs", lambda sizes, own=configs: {name: own(sizes)[name] for name in ("topk", "switch_pursuit")})
    suite.untrusted_searches = {Precision.float32: "eager search: 1 checks failed"}
    suite.run_architectures([])
    text = capsys.readouterr().out
    assert text.count("NOT TIMED, eager search: 1 checks failed") == 1 and "topk" in text and not suite.failures


def test_waits_are_counted_where_pytorch_warns_of_them(monkeypatch):
    import warnings

    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert waits_of(call, SimpleNamespace(type="cuda")) == 3 and modes == ["warn", 0]
    assert waits_of(call, CPU) == 0


def test_the_section_goes_on_after_a_failure_and_says_which_are_wrong(monkeypatch, capsys):
    rows = []
    suite = Benchmark(CPU, Backend.torch, True, Budget(5), rows.extend, {})
    wanted = {name: configs(TINY_SIZES)[name] for name in ("topk", "relu", "gated")}
    monkeypatch.setattr(architectures, "configs", lambda sizes: wanted)
    seen = look("topk", wanted["topk"], CPU, TINY_SIZES, activations(TINY_SIZES, BATCHES, CPU), steps=1)

    def looked(name, *rest):
        if name == "relu":
            raise RuntimeError("no such kernel")
        return architectures.Seen(**{**vars(seen), "loss_error": 1.0 if name == "gated" else 0.0})

    monkeypatch.setattr(architectures, "look", looked)
    suite.run_architectures([])
    text = capsys.readouterr().out
    assert (
        suite.failures == ["relu", "gated"]
        and "RED gated" in text
        and "no such kernel" in text
        and [row["name"] for row in rows] == ["topk", "gated"]
    )

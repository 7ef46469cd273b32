"""The benchmark's look at every architecture on a GPU, without one: what it covers, what it finds, what it says."""

from types import SimpleNamespace

import pytest
import torch

from experiments.benchmarks import architectures
from experiments.benchmarks.architectures import BATCHES, TINY_SIZES, configs, look, waits_of
from experiments.benchmarks.contenders import activations
from experiments.benchmarks.gpu import Benchmark
from experiments.benchmarks.suite import Budget
from switch_kernels import Backend
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
        moments["adam/W_dec_MD/exp_avg"] *= 1 + 0.02 * (len(calls) > 0)
        calls.append(1)
        return loss, moments, trainer

    calls = []
    monkeypatch.setattr(architectures, "_first_step", changed)
    seen = look("topk", configs(TINY_SIZES)["topk"], CPU, TINY_SIZES, activations(TINY_SIZES, BATCHES, CPU), steps=1)
    assert seen.gradient_error == pytest.approx(0.02, rel=0.01) and "W_dec_MD" in seen.worst and not seen.holds


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

"""Every dataclass of settings: values take the type that their field says, from Python as from files, or are refused by name."""

import importlib
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
import torch
from test_structure import dotted, modules

from experiments.compose import Run
from switch_kernels import Backend, Execution, Moments, Precision, Regime, choose_plan, resolve
from switch_sae import load_sae, save_sae
from switch_sae.activations import SOURCES, SyntheticSource
from switch_sae.activations.text import TextConfig
from switch_sae.analysis import ANALYSES
from switch_sae.checks import Settings, field_types, typed
from switch_sae.config import RunConfig, check_baselines, config_from_plain, config_to_plain
from switch_sae.models import ROUTERS, SAES, JumpReLUSAE, MatryoshkaSAE, SwitchSAE, TopKSAE
from switch_sae.models.baselines import Baseline, baseline_config, why_no_baseline
from switch_sae.models.jumprelu import Sparsity
from switch_sae.models.routers import Gate, SoftmaxRouter
from switch_sae.models.routers.sigmoid import SigmoidRouter
from switch_sae.models.topk import EncoderInit
from switch_sae.models.widths import Match, matched
from switch_sae.sweep import SweepConfig, SweepOptions
from switch_sae.training import LRWidth, TrainerConfig
from switch_sae.wandb_logger import WandbConfig, WandbMode


def dataclasses_of(owner: Any) -> list[type]:
    """Those defined in a module, nested ones too."""
    name = owner.__name__ if not isinstance(owner, type) else owner.__module__
    own = [value for value in vars(owner).values() if isinstance(value, type) and value.__module__ == name and value is not owner]
    return [found for value in own for found in ([value] if is_dataclass(value) else []) + dataclasses_of(value)]


def reachable(cls: type) -> set[type]:
    """The dataclasses that a run's settings consist of, through fields and choices."""
    found = {cls}
    for hint, choice in field_types(cls).values():
        inner = [choice.config_of(key) for key in choice] if choice else [hint for hint in (hint, *get_args(hint)) if is_dataclass(hint)]
        found |= {below for one in inner for below in reachable(one)}
    return found


NAMED = [
    cls
    for path in modules()
    if "gpu" not in path.parts
    for cls in dataclasses_of(importlib.import_module(dotted(path)))
    if cls.__name__.endswith(("Config", "Options"))
]
"""Every dataclass of the project that is called a config or options."""
CONFIGS = sorted({*NAMED, *reachable(SweepConfig), *(ANALYSES.config_of(key) for key in ANALYSES), Run}, key=lambda cls: cls.__qualname__)
FIELDS = [(cls, name) for cls in CONFIGS for name in field_types(cls)]


def kind_of(cls: type, name: str) -> tuple[Any, bool]:
    """(the type without `| None`, whether None may stand there)."""
    hint = field_types(cls)[name][0]
    options = [option for option in get_args(hint) or (hint,) if option is not type(None)] if get_origin(hint) is not list else [hint]
    assert len(options) == 1 or get_origin(hint) in (list, dict), f"{cls.__qualname__}.{name} may be {hint}: of which type is a value that is given?"
    return (options[0] if get_origin(hint) not in (list, dict) else hint), type(None) in get_args(hint)


def test_every_config_of_the_project_takes_types():
    assert {RunConfig, TrainerConfig, TextConfig, WandbConfig, SweepOptions, SwitchSAE.Config, SoftmaxRouter.Config} <= set(CONFIGS)
    assert {table.config_of(key) for table in (SAES, ROUTERS, SOURCES, ANALYSES) for key in table} <= set(CONFIGS)
    for cls in CONFIGS:
        assert issubclass(cls, Settings), f"{cls.__module__}.{cls.__qualname__} takes any value: let it inherit switch_sae.checks.Settings"


def accepted(hint: Any) -> list[tuple[Any, Any]]:
    """(given, kept) for each way to give a value of a type."""
    if get_origin(hint) is list:
        return [((given,), [kept]) for given, kept in accepted(get_args(hint)[0])] + [([], [])]
    if issubclass(hint, Enum):
        return [(given, member) for member in hint for given in (member, member.name)]
    ways = {
        int: [(8, 8), (8.0, 8), (np.int64(8), 8), (1e5, 100_000)],
        float: [(8, 8.0), (0.5, 0.5), (np.float32(0.5), 0.5)],
        bool: [(True, True)],
        str: [("x", "x"), (Path("x"), "x")],
    }
    return ways[hint]


def refused(hint: Any) -> list[Any]:
    if get_origin(hint) is list:
        return ["x", 3, {}, *([value] for value in refused(get_args(hint)[0]))]
    if issubclass(hint, Enum):
        return ["nonsense", 3, Match.time if hint is not Match else Gate.hard, [next(iter(hint))]]
    ways: dict[Any, list[Any]] = {int: [8.5, "8", True, [8], float("nan"), float("inf")], float: ["8", True, [8.0], 10**400]}
    return ways.get(hint, [3, 3.5, ["x"]])


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__module__}.{cls.__qualname__}.{name}" for cls, name in FIELDS])
def test_every_field_takes_its_type_and_refuses_others_by_name(cls, name):
    settings, before = cls(), getattr(cls(), name)
    choice = field_types(cls)[name][1]
    kind, optional = kind_of(cls, name)
    if choice is not None:
        pairs, wrong = (
            [(config := choice.config_of(next(iter(choice)))(), config)],
            [next(iter(choice)), None, 3, choice.config_of(next(iter(choice)))],
        )
    elif is_dataclass(kind):
        pairs, wrong = [(value := kind(), value)], [{}, "x", None]
    elif get_origin(kind) is dict:
        pairs, wrong = [({"a": 1}, {"a": 1})], ["x", 3, None]
    else:
        pairs, wrong = accepted(kind), refused(kind) + ([] if optional else [None])
    for given, kept in pairs + ([(None, None)] if optional else []):
        setattr(settings, name, given)
        now = getattr(settings, name)
        assert now == kept and type(now) is type(kept), (given, now)
    setattr(settings, name, before)
    for value in wrong:
        with pytest.raises(ValueError, match=f"{name}="):
            setattr(settings, name, value)
        with pytest.raises(ValueError, match=f"{name}="):
            cls(**{name: value})
        assert getattr(settings, name) == before


def test_a_name_that_is_no_setting_is_refused_with_the_one_that_was_meant():
    config = RunConfig()
    for settings, wrong, meant in ((config.trainer, "lr_widht", "lr_width"), (config.sae, "num_latent", "num_latents"), (config, "token", "tokens")):
        with pytest.raises(ValueError, match=rf"has no setting '{wrong}'. Did you mean {meant}\? It has .*{meant}"):
            setattr(settings, wrong, 1)


def test_messages_say_where_a_setting_stands_what_there_is_and_what_was_meant():
    for make, message in (
        (lambda: SoftmaxRouter.Config(gate="hadr"), r"^gate='hadr' is not one of probability, hard, straight_through. Did you mean hard\?$"),
        (lambda: TrainerConfig(lr_width="experts"), r"^trainer.lr_width='experts' is not one of total, expert. Did you mean expert\?$"),
        (lambda: WandbConfig(mode="off"), r"^wandb.mode='off' is not one of disabled, offline, online."),
        (lambda: RunConfig(baselines=["flop_matched", "none"]), r"^baselines='none' is not one of flop_matched, width_matched,"),
        (lambda: RunConfig(baselines="flop_matched"), "^baselines='flop_matched' is of the wrong type: it must be list.* or null"),
        (lambda: TopKSAE.Config(k=16.5), "^k=16.5 is of the wrong type: it must be int.$"),
        (lambda: SyntheticSource.Config(topics="8"), "^topics='8' is of the wrong type: it must be int.$"),
        (lambda: SwitchSAE.Config(router="sigmoid"), r"such as SigmoidRouter.Config\(\). On the command line write sae/router=sigmoid."),
        (lambda: RunConfig(sae="topk"), r"such as TopKSAE.Config\(\). On the command line write sae=topk."),
        (lambda: RunConfig(sae=TrainerConfig()), "TrainerConfig is no SAE architecture of the table"),
        (lambda: RunConfig(sae=SwitchSAE), "must be the Config of a SAE architecture"),
        (lambda: RunConfig(trainer={"lr": 1e-3}), "^trainer=.* must be TrainerConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_names_of_enums_mean_what_the_enums_mean_and_survive_saving(tmp_path):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))

    def sae(**router):
        config = SwitchSAE.Config(num_latents=64, k=4.0, num_experts=4, encoder_init="linear", router=SoftmaxRouter.Config(**router))
        return SwitchSAE(config, 16, torch.Generator().manual_seed(0)).eval()

    hard = sae(gate="hard")
    assert hard.config.router.gate is Gate.hard and hard.config.encoder_init is EncoderInit.linear and type(hard.config.k) is int
    assert (hard(x).routing.gate_TS == 1).all() and not torch.equal(hard(x).recon_TD, sae()(x).recon_TD)
    save_sae(tmp_path / "model.safetensors", hard)
    assert torch.equal(load_sae(tmp_path / "model.safetensors")(x).recon_TD, hard(x).recon_TD)
    jumprelu = JumpReLUSAE(JumpReLUSAE.Config(num_latents=64, sparsity="l0"), 16)
    assert jumprelu.config.sparsity is Sparsity.l0 and jumprelu.recipe.lr == 7e-5
    assert TrainerConfig(lr_width="expert").lr_width is LRWidth.expert and TrainerConfig(moments="bfloat16").moments is Moments.bfloat16


def test_settings_of_a_run_may_be_names_when_it_is_made_and_later():
    config = RunConfig(baselines=["flop_matched"], backend="torch", wandb=WandbConfig(mode="disabled"), tokens=1e5, runs=Path("runs"))
    assert config == RunConfig(baselines=[Baseline.flop_matched], backend=Backend.torch, wandb=WandbConfig(WandbMode.disabled), tokens=100_000)
    check_baselines(config)
    config.wandb.mode, config.precision, config.sae.router.gate = "online", "float32", "hard"
    assert (config.wandb.mode, config.precision, config.sae.router.gate) == (WandbMode.online, Precision.float32, Gate.hard)
    assert config_from_plain(config_to_plain(config)) == config
    assert MatryoshkaSAE.Config(k=8, group_fractions=(0.25, 0.5)).group_fractions == [0.25, 0.5]


def test_functions_that_take_a_choice_take_its_name():
    config = SwitchSAE.Config(num_latents=64, k=4, num_experts=4)
    topk = TopKSAE.Config(num_latents=64, k=4)
    for match in (Match.flops, Match.width, Match.parameters):
        assert matched(topk, config, match.name, 16) == matched(topk, config, match, 16)
    for baseline in (Baseline.flop_matched, Baseline.frozen_router):
        assert baseline_config(config, baseline.name, 16) == baseline_config(config, baseline, 16)
        assert why_no_baseline(topk, baseline.name) == why_no_baseline(topk, baseline) is not None
    assert Execution("triton", "bf16") == Execution(Backend.triton, Precision.bf16) and Execution("triton").is_triton
    assert resolve("torch", "auto", "cpu") == resolve(Backend.torch, Precision.auto, "cpu")
    assert choose_plan(64, 4096, 1, 4, regime="dense").regime is Regime.dense
    for wrong in (lambda: Execution("tritn"), lambda: matched(topk, config, "flopz", 16), lambda: baseline_config(config, "frozen", 16)):
        with pytest.raises(ValueError, match=r"tritn|flopz|frozen"):
            wrong()


def test_a_saved_run_in_tf32_is_told_what_became_of_it():
    saved = config_to_plain(RunConfig(precision="bf16"))
    for make in (lambda: config_from_plain({**saved, "precision": "tf32"}), lambda: RunConfig(precision="tf32"), lambda: Execution("triton", "tf32")):
        with pytest.raises(ValueError, match=r"^precision='tf32' is no longer one of auto, bf16, float32: .* Use bf16, or float32 .*config.json"):
            make()


def test_settings_of_another_library_need_only_inherit():
    @dataclass
    class Config(SigmoidRouter.Config):
        start: EncoderInit = EncoderInit.unit

    assert Config(start="linear").start is EncoderInit.linear and [f.name for f in fields(Config)][-1] == "start"
    with pytest.raises(ValueError, match="start='lin' is not one of unit, linear"):
        Config(start="lin")
    assert typed("anything", Any, Config) is Config

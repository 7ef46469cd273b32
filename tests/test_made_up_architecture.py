"""An architecture that only a test knows goes through training, sweep, tables, figures and loading: a class and a line in `SAES` are all it takes."""

import csv
from dataclasses import dataclass, replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_report import cells, tiny_run
from test_sweep import config, quiet

from experiments.compose import CONF, register_schemas, run_config
from switch_sae import load_sae
from switch_sae.models import ROUTERS, SAES, SwitchSAE, TopKSAE
from switch_sae.models.dense import DenseSAE, encoder_linear
from switch_sae.models.routers.base import LinearRouter, Routing, largest
from switch_sae.models.topk import EncoderInit
from switch_sae.report import draw_figures, report, table
from switch_sae.results import collect
from switch_sae.results.kind import Kind
from switch_sae.style import look
from switch_sae.sweep import run_sweep


class SoftplusSAE(DenseSAE):
    """A dense one: f = softplus(W_enc (x - b_pre) + b_enc) - log 2, cut off at 0, with a penalty on its sum."""

    @dataclass
    class Config(DenseSAE.Config):
        penalty: float = 0.1

    colour, marker = "#123456", "1"

    def __init__(self, config, d_in, generator=None):
        super().__init__(config, d_in, generator)
        self.b_enc_M = torch.nn.Parameter(torch.zeros(config.num_latents))

    def _activate(self, x_TD):
        pre_TM = encoder_linear(x_TD, self.b_pre_D, self.W_enc_MD, self.b_enc_M)
        return (torch.nn.functional.softplus(pre_TM) - 0.6931).relu(), pre_TM

    def sparsity_terms(self, x_TD, output):
        return {"penalty": self.config.penalty * output.latents.to_dense().sum(dim=1).mean()}

    def _thresholds(self):
        return (self.b_enc_M,)


class TwinSAE(SwitchSAE):
    """A routed one: a Switch SAE whose gates are square roots of probabilities."""

    @dataclass
    class Config(SwitchSAE.Config):
        pass

    marker = "2"

    def _route(self, x_TD):
        routing, dispatch = super()._route(x_TD)
        return replace(routing, gate_TS=routing.gate_TS.sqrt()), dispatch


class SharpRouter(LinearRouter):
    """A router: softmax of sharpened logits, no loss."""

    @dataclass
    class Config(LinearRouter.Config):
        sharpness: float = 2.0

    def route(self, x_TD):
        probs_TE = torch.softmax(self.config.sharpness * self.logits(x_TD), dim=1)
        gate_TS, expert_TS = largest(probs_TE, self.experts_per_token)
        return Routing(expert_TS, gate_TS, probs_TE)


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    monkeypatch.setitem(SAES, "softplus", SoftplusSAE)
    monkeypatch.setitem(SAES, "twin", TwinSAE)
    monkeypatch.setitem(ROUTERS, "sharp", SharpRouter)


def test_its_family_and_look_are_its_own():
    assert (TwinSAE.label, TwinSAE.marker, TwinSAE.is_routed, TwinSAE.is_reference) == ("Twin", "2", True, False)
    assert (SoftplusSAE.label, SoftplusSAE.is_routed) == ("Softplus", False)
    assert (look("twin", 4).label, look("twin", 4).marker, look("twin", 4).colour) == ("Twin 4", "2", look("switch", 4).colour)
    assert (look("softplus").label, look("softplus").colour) == ("Softplus", "#123456")

    class Child(TopKSAE):
        pass

    assert (Child.label, Child.is_reference, Child.colour) == ("Child", False, "#7A7A7A") and TopKSAE.is_reference
    kinds = [Kind("twin", 4), Kind("softplus"), Kind("topk"), Kind("switch", 2)]
    assert sorted(kinds, key=lambda kind: kind.order) == [Kind("topk"), Kind("softplus"), Kind("switch", 2), Kind("twin", 4)]


def test_its_slug_is_its_key_and_sizes():
    assert TwinSAE.Config(num_latents=64, k=4, num_experts=4).slug() == "twin-e4-m64-k4"
    assert SoftplusSAE.Config(num_latents=64).slug() == "softplus-m64" and TopKSAE.Config(num_latents=64, k=4).slug() == "topk-m64-k4"


def test_a_line_in_the_table_is_all_that_the_command_line_needs():
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        overrides = ["sae=twin", "sae/router=sharp", "sae.router.sharpness=3", "preset=paper"]
        sae = run_config(compose("train", overrides=overrides)).sae
    assert sae == TwinSAE.Config(encoder_bias=False, encoder_init=EncoderInit.linear, auxk=0.0, k=16, router=SharpRouter.Config(sharpness=3.0))


def test_a_router_goes_through_a_run_its_baselines_a_sweep_and_loading(tmp_path):
    sae = SwitchSAE.Config(num_latents=32, k=4, num_experts=4, router=SharpRouter.Config())
    run = tiny_run(tmp_path, sae=sae, baselines=None)
    assert set(cells(table([run]))) == {"switch", "flop_matched", "frozen_router", "pca_4", "untrained"}
    assert load_sae(run.path).config == sae and load_sae(run.member("frozen_router").path).config.router == SharpRouter.Config(train=False)
    grids = {"sharp": {"sae": {"num_experts": 4, "router": {"kind": "sharp", "sharpness": [1.0, 4.0]}}}}
    folder = run_sweep(config(tmp_path / "sweep", experts=[], seeds=1, grids=grids), quiet)
    assert list(folder.members) == [f"switch-e4-m64-k4-router=sharp-sharpness={value}-s0" for value in (1, 4)]
    assert {row.config["sae.router.sharpness"] for row in collect([folder.path])} == {1.0, 4.0}


@pytest.mark.parametrize("sae", [SoftplusSAE.Config(num_latents=32), TwinSAE.Config(num_latents=32, k=4, num_experts=4)])
def test_a_run_of_it_is_trained_reported_and_loaded(sae, tmp_path):
    run = tiny_run(tmp_path, sae=sae, baselines=[])
    report(run, lambda line: None)
    key = "softplus" if isinstance(sae, SoftplusSAE.Config) else "twin"
    assert cells(table([run]))[key]["latents"] == "32" and key in run.path.name
    assert {file.stem for file in run.figures.glob("*.png")} == {"geometry", "scores", "training", *(["load"] if key == "twin" else [])}
    loaded = load_sae(run.path)
    assert type(loaded) is SAES[key] and loaded.config == sae


def test_a_sweep_over_both_is_tabled_and_drawn_beside_the_built_in_ones(tmp_path):
    grids = {
        "twins": {"sae": {"architecture": "twin", "num_experts": [2, 4]}},
        "flops": {"sae": {"architecture": "twin", "num_experts": 2}, "match": "flops"},
        "softplus": {"sae": {"architecture": "softplus", "penalty": [0.1, 0.3]}},
    }
    folder = run_sweep(config(tmp_path / "sweep", experts=[1, 2, 4], seeds=2, grids=grids), quiet)
    assert all(map(folder.is_finished, folder.members)) and len(folder.members) == 2 * 8
    rows = collect([folder.path])
    assert {row.kind for row in rows} >= {Kind("twin", 4), Kind("softplus"), Kind("topk"), Kind("switch", 4)}
    assert "twin" in folder.table() and "softplus" in folder.table()
    drawn, missing = draw_figures([folder.path], tmp_path / "figures", say=quiet)
    assert drawn[:2] == ["frontier", "curves"] and "duplication" in drawn and set(missing) <= {"scaling", "ablations", "projection"}
    with (tmp_path / "figures" / "frontier.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    flop_matched = {(r["architecture"], r["experts"]) for r in records if r["panel"].startswith("FLOP-matched")}
    assert flop_matched >= {("topk", "1"), ("twin", "2")} and any(r["architecture"] == "softplus" for r in records)
    with (tmp_path / "figures" / "duplication.csv").open(newline="") as file:
        assert [r["experts"] for r in csv.DictReader(file)] == ["1", "2", "4"]

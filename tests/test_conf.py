"""Hydra composes every file of conf/ into a valid RunConfig, saved configs come back equal, and mistakes are told in one message."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.compose import CONF, register_schemas, run_config
from switch_sae.activations import LanguageModelSource, SyntheticSource
from switch_sae.activations.language_model import BUNDLED
from switch_sae.config import Baseline, RunConfig, config_from_plain, config_to_plain
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.models.topk import EncoderInit
from switch_sae.pipeline import baseline_config, build_members, run_training
from switch_sae.training import LRWidth

register_schemas()


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        return run_config(compose("train", overrides=list(overrides)))


def names(group: str) -> list[str]:
    return sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))


def test_the_default_is_a_switch_sae_on_the_bundled_model():
    config = composed("sae.num_experts=16")
    assert type(config.sae) is SwitchSAE.Config and config.sae.num_experts == 16
    assert type(config.source) is LanguageModelSource.Config and config.source.model == "bundled" and (BUNDLED / "config.json").is_file()


@pytest.mark.parametrize(
    "override", [*(f"model={m}" for m in names("model")), *(f"sae={s}" for s in names("sae")), *(f"preset={p}" for p in names("preset"))]
)
def test_every_choice_composes_and_comes_back_from_json(override):
    config = composed(override, *(["baselines=[]"] if override.startswith("sae=") and override != "sae=switch" else []))
    assert config_from_plain(config_to_plain(config)) == config


def test_an_experiment_overrides_the_defaults_of_a_run():
    assert composed("experiment=compare").baselines == [Baseline.flop_matched, Baseline.width_matched, Baseline.frozen_router]
    assert composed().baselines == [Baseline.flop_matched, Baseline.frozen_router]


def test_the_seed_reaches_the_stream():
    assert composed("seed=5").source.seed == 5 and composed("model=synthetic", "seed=5").source.seed == 5
    assert type(composed("model=synthetic").source) is SyntheticSource.Config


@pytest.mark.parametrize("model", ["gpt2", "bundled"])
def test_preset_paper_is_the_paper(model):
    config = composed("preset=paper", f"model={model}")
    assert (config.sae.encoder_bias, config.sae.auxk, config.sae.load_balance, config.sae.encoder_init) == (False, 0, 3, EncoderInit.linear)
    assert not config.normalize_activations
    trainer = config.trainer
    assert (trainer.warmup_steps, trainer.lr, trainer.lr_at_16k, trainer.lr_width, trainer.decay_fraction) == (0, None, 2e-4, LRWidth.total, 0.2)


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_runs_a_few_steps(name, tmp_path):
    lines = Path(CONF, "experiment", f"{name}.yaml").read_text().splitlines()
    assert [line.split()[1] for line in lines[1:5]] == ["Question:", "Command:", "Time:", "Expected:"]
    config = composed(
        f"experiment={name}", "model=synthetic", "tokens=2048", "batch_size=512", "calibration_rows=1024", "evaluation.rows=512",
        "evaluation.bootstrap=10", "sae.num_latents=128", "wandb.mode=disabled", f"runs={tmp_path}",
    )  # fmt: skip
    run = run_training(config, say=lambda line: None)
    members = run.read_json("results.json")["members"]
    assert set(members) == {"switch", *(b.name for b in config.baselines)} and all(m["metrics"]["fvu"]["value"] > 0 for m in members.values())


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["sae.num_experts=abc"], (HydraException, OmegaConfBaseException), "could not be converted to Integer"),
        (["sae.experts=8"], (HydraException, OmegaConfBaseException), "Could not override 'sae.experts'"),
        (["tokns=8"], (HydraException, OmegaConfBaseException), "tokns"),
        (["trainer.lr_width=both"], (HydraException, OmegaConfBaseException), "both"),
        (["sae.num_latents=4097"], Exception, "num_latents=4097 is not divisible by num_experts"),
        (["tokens=10"], Exception, "tokens=10 is less than one batch"),
        (["sae=topk", "baselines=[width_matched]"], Exception, "baselines are derived from a Switch SAE"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(overrides, error, message):
    with pytest.raises(error) as caught:
        composed(*overrides)
    told = f"{caught.value} {caught.value.__cause__}"
    assert message in told


def test_flop_matched_dense_sae_costs_the_same_per_token():
    switch = SwitchSAE.Config(num_latents=512, k=8, num_experts=8)
    for trained, slots in ((True, 1), (False, 1), (True, 3)):
        switch.train_router, switch.experts_per_token = trained, slots
        dense = baseline_config(switch, Baseline.flop_matched)
        assert TopKSAE(dense, 32).flops().total == SwitchSAE(switch, 32).flops().total
    assert baseline_config(switch, Baseline.width_matched).num_latents == 512


def test_members_start_from_the_seed_whatever_trains_beside_them():
    config = composed("model=synthetic", "baselines=[]")
    alone = build_members(config, 64)["switch"]
    config.baselines = [Baseline.width_matched, Baseline.frozen_router]
    together = build_members(config, 64)
    assert alone.W_enc_MD.equal(together["switch"].W_enc_MD) and alone.W_router_ED.equal(together["frozen_router"].W_router_ED)

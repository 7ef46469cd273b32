"""Hydra composes every file of conf/ into a valid RunConfig, saved configs come back equal, and mistakes are told in one message."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.compose import CONF, register_schemas, run_config, taken_from_bundled
from switch_sae.activations import LanguageModelSource, SyntheticSource
from switch_sae.activations.loading import BUNDLED
from switch_sae.cohort import build_sae
from switch_sae.config import Baseline, RunConfig, config_from_plain, config_to_plain
from switch_sae.models import ROUTERS, SAES, SwitchSAE
from switch_sae.models.topk import EncoderInit
from switch_sae.orchestrator import run_members, run_training
from switch_sae.runs import RunDir
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


CHOICES = [*(f"model={m}" for m in names("model")), *(f"sae={s}" for s in SAES), *(f"sae/router={r}" for r in ROUTERS)]


@pytest.mark.parametrize("preset", [None, *names("preset")])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_with_every_preset_and_comes_back_from_json(choice, preset):
    config = composed(choice, *([] if preset is None else [f"preset={preset}"]))
    assert config_from_plain(config_to_plain(config)) == config
    group, key = choice.split("=")
    if group != "model":
        value, table = (config.sae, SAES) if group == "sae" else (config.sae.router, ROUTERS)
        assert table.key_of(value) == key


def test_a_model_that_names_no_usual_k_is_refused_not_given_one(tmp_path, monkeypatch):
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        without = compose("train", overrides=["~usual.k"])
        assert run_config(compose("train", overrides=["~usual.k", "sae.k=5"])).sae.k == 5
        assert type(run_config(compose("train", overrides=["~usual.k", "sae=relu"])).sae) is SAES["relu"].Config
    with pytest.raises(ValueError, match=r"sae.k is set by nothing: conf/model/MODEL.yaml should say `usual: \{k: ...\}`, or give sae.k=..."):
        run_config(without)


def test_an_experiment_overrides_the_defaults_of_a_run():
    assert composed("experiment=run/compare").baselines == [Baseline.flop_matched, Baseline.width_matched, Baseline.frozen_router]
    assert composed().baselines is None


def test_the_seed_reaches_the_stream():
    assert composed("seed=5").source.seed == 5 and composed("model=synthetic", "seed=5").source.seed == 5
    assert type(composed("model=synthetic").source) is SyntheticSource.Config


@pytest.mark.parametrize("model", ["gpt2", "bundled"])
def test_preset_paper_is_the_paper(model):
    config = composed("preset=paper", f"model={model}")
    assert (config.sae.encoder_bias, config.sae.auxk, config.sae.router.load_balance, config.sae.encoder_init) == (False, 0, 3, EncoderInit.linear)
    assert not config.normalize_activations
    trainer = config.trainer
    assert (trainer.warmup_steps, trainer.lr, trainer.lr_at_16k, trainer.lr_width, trainer.decay_fraction) == (0, None, 2e-4, LRWidth.total, 0.2)


@pytest.mark.parametrize("name", names("experiment/run"))
def test_every_experiment_runs_a_few_steps(name, tmp_path):
    lines = Path(CONF, "experiment", "run", f"{name}.yaml").read_text().splitlines()
    assert [line.split()[1] for line in lines[1:5]] == ["Question:", "Command:", "Time:", "Expected:"]
    config = composed(
        f"experiment=run/{name}", "model=synthetic", "tokens=2048", "batch_size=512", "calibration_rows=1024", "evaluation.rows=512",
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
        (["sae=topk", "baselines=[width_matched]"], Exception, "no width_matched for this SAE: it is the dense TopK SAE that others are compared"),
        (["sae=relu", "baselines=[flop_matched]"], Exception, "no flop_matched for this SAE: relu has no fixed number of active latents (k)"),
        (["sae=batch_topk", "baselines=[frozen_router]"], Exception, "no frozen_router for this SAE: batch_topk has no router"),
        (["sae/router=cosine_kmeans", "baselines=[frozen_router]"], Exception, "no frozen_router for this SAE: its router is not trained"),
        (["+sae.gate=hard"], ValueError, "there are no settings sae.gate; it has inference, num_latents"),
        (["+sae.router.kind=sigmoid"], ValueError, "there are no settings sae.router.kind"),
        (["sae.router=sigmoid"], Exception, "On the command line write sae/router=sigmoid"),
        (["+usual.kk=3"], ValueError, "usual: no architecture and no router has a setting kk"),
        (["sae=topk", "sae.num_experts=8"], (HydraException, OmegaConfBaseException), "sae.num_experts"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(overrides, error, message):
    with pytest.raises(error) as caught:
        composed(*overrides)
    told = f"{caught.value} {caught.value.__cause__}"
    assert message in told


def test_members_start_from_the_seed_whatever_trains_beside_them(tmp_path):
    config = composed("model=synthetic", "baselines=[width_matched,frozen_router]")
    members = {member.key: member for member in run_members(RunDir(tmp_path), config, 64)}
    alone = build_sae(config.sae, 64, config.seed)
    assert build_sae(members["frozen_router"].sae, 64, config.seed).router.W_ED.equal(alone.router.W_ED)
    assert [(key, member.role, member.folder.path) for key, member in members.items()] == [
        ("switch", "main", tmp_path),
        ("width_matched", "baseline", tmp_path / "baselines" / "width_matched"),
        ("frozen_router", "baseline", tmp_path / "baselines" / "frozen_router"),
    ]


@pytest.mark.parametrize(("sae", "expected"), [("switch", ["flop_matched", "frozen_router"]), ("topk", []), ("relu", [])])
def test_what_trains_beside_an_sae_unless_it_is_said(sae, expected, tmp_path):
    assert [member.key for member in run_members(RunDir(tmp_path), composed("model=synthetic", f"sae={sae}"), 64)[1:]] == expected


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["source.model=x"], "'x': source.hook=blocks.2.hook_resid_post, source.text.kind=stdlib, sae.num_latents=4096, trainer.lr=0.003, tokens="),
        (
            ["source.model=x", "source.text.kind=files", "source.text.paths=[y]", "trainer.lr=null"],
            "'x': source.hook=.*post, sae.num_latents=4096, tokens",
        ),
        (["source.model=bundled"], None),
        (["model=gpt2", "source.model=x"], None),
        (["model=synthetic"], None),
    ],
)
def test_another_model_with_the_bundled_models_settings_is_told_so(overrides, told, monkeypatch):
    from hydra.core.hydra_config import HydraConfig

    own = HydraConfig()
    monkeypatch.setattr(HydraConfig, "instance", lambda *_: own)
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        with_hydra = compose("train", overrides=overrides, return_hydra_config=True)
        own.set_config(with_hydra)
        line = taken_from_bundled(compose("train", overrides=overrides))
    assert line is None if told is None else re.search(told, line)

"""Mistyped settings are told in the project's voice, and what people type is read as they mean it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.compose import CONF, register_schemas, run_config, sweep_config
from experiments.mistakes import explained, readable, settings
from switch_sae.invocation import make_variable
from switch_sae.plain import from_plain
from switch_sae.sweep import SweepConfig
from switch_sae.training import TrainerConfig

register_schemas()
ROOT = Path(__file__).resolve().parents[1]

TOLD = [
    ("train", "tokns=8", "there is no setting tokns. Close to it: tokens."),
    ("train", "sae.num_latent=512", "there is no setting sae.num_latent. Close to it: sae.num_latents, sae.max_latents, sae.auxk_latents."),
    ("train", "experts=8", "there is no setting experts. Close to it: sae.num_experts."),
    ("train", "source.text.pths=[x]", "Close to it: source.text.paths"),
    ("train", "sea=topk", "there is no setting sea. Close to it: sae."),
    ("train", "trainer.bogus=1", "there is no setting trainer.bogus. There are lr, lr_at_16k,"),
    ("train", "sae/ruter=sigmoid", "there is no group sae/ruter; groups are experiment, model, preset, sae, sae/router, source."),
    ("train", "sweep.seeds=3", "sweep.seeds is a setting of a sweep: make sweep ARGS=sweep.seeds=..."),
    ("train", "~tokns", "there is no setting tokns. Close to it: tokens."),
    ("train", "+tokens=4", "tokens is a setting already, so it takes no +: write tokens=VALUE."),
    ("train", "sae.k=abc", "sae.k=abc: it must be a whole number."),
    ("train", "tokens=2.5", "tokens=2.5: it must be a whole number."),
    ("train", "tokens=1e-3", "tokens=1e-3: it must be a whole number."),
    ("train", "tokens=null", "tokens=null: it must be a whole number."),
    ("train", "trainer.lr=fast", "trainer.lr=fast: it must be a number (or null)."),
    ("train", "normalize_activations=maybe", "normalize_activations=maybe: it must be true or false."),
    ("train", "wandb.mode=onlin", "wandb.mode=onlin: it must be one of disabled, offline, online."),
    ("train", "sae.router.gate=soft", "sae.router.gate=soft: it must be one of probability, hard, straight_through."),
    ("train", "baselines=[flop]", "each entry one of flop_matched, width_matched"),
    ("train", "trainer=5", "trainer=5: it must be several settings"),
    ("sweep", "sweep.match=flopz", "sweep.match=flopz: it must be one of width, flops, active, parameters, time."),
    ("sweep", "sweep.experts=[a]", "sweep.experts=[a]: it must be a list in brackets, [a,b], and each entry a whole number."),
    ("sweep", "sweep.experts=3", "sweep.experts=3: it must be a list in brackets"),
    ("sweep", "sweep.experts=1,2", "several values are a list: 'sweep.experts=[1,2]'."),
    ("train", "sae.num_experts=4,8", "make sweep EXPERTS=4,8"),
    ("train", "sae.k=8,16", "make sweep K=8,16"),
    ("train", "seed=0,1", "make sweep SEEDS=2"),
    ("sweep", "seed=0,1,2", "make sweep SEEDS=3"),
    ("train", "sae=topk,relu", "--multirun sae=topk,relu"),
    ("train", "sae=swich", "there is no sae=swich. Close to it: sae=switch. sae is one of batch_topk, gated, jumprelu"),
    ("train", "sae/router=sigmoi", "there is no sae/router=sigmoi. Close to it: sae/router=sigmoid."),
    ("train", "preset=papr", "there is no preset=papr. Close to it: preset=paper."),
    ("train", "model=gpt-2x", "source.model=..."),
    ("train", "experiment=run/compar", "Close to it: experiment=run/compare."),
    ("sweep", "experiment=sweep/small/evidnce", "Close to it: experiment=sweep/small/evidence,"),
    ("train", "experiment=sweep/small/evidence", "make sweep ARGS=experiment=sweep/small/evidence"),
    ("train", "hydra/launcher=jobli", "Close to it: hydra/launcher=joblib."),
    ("train", "llama", "'llama' is no setting: settings are KEY=VALUE."),
    ("train", "tokens=[1", "tokens=[1: its value cannot be read. Is a bracket or a quote left open?"),
]


@pytest.mark.parametrize(("name", "word", "message"), TOLD, ids=[word for _, word, _ in TOLD])
def test_hydras_errors_are_told_in_the_projects_voice(name, word, message):
    words = readable([word], name)
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught, initialize_config_dir(version_base="1.3", config_dir=CONF):
        compose(name, overrides=words)
    told = explained(caught.value, words, name)
    assert message in told, told
    assert not any(jargon in told for jargon in ("base_", "HYDRA_FULL_ERROR", "object_type", "append", "Search path", "hydra.cc", "\n"))


def test_a_mistake_in_a_file_is_told_with_the_file(tmp_path):
    (tmp_path / "experiment").mkdir()
    for text, message in (("tokens: many", "conf/experiment/mine.yaml: tokens: it must be a whole number."), ("tokns: 4", "Close to it: tokens.")):
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        words = [f"hydra.searchpath=[{tmp_path}]", "experiment=mine"]
        with pytest.raises(HydraException) as caught, initialize_config_dir(version_base="1.3", config_dir=CONF):
            compose("train", overrides=words)
        assert message in explained(caught.value, words, "train")


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("tokens=1e5", "tokens=100000"),
        ("++tokens=2.3e+6", "++tokens=2300000"),
        ("tokens=1e5,2.5e5", "tokens=100000,250000"),
        ("sae.num_latents=4096.0", "sae.num_latents=4096"),
        ("sweep.experts=[1,2e0,4]", "sweep.experts=[1,2,4]"),
        ("sweep.at_once=1e1", "sweep.at_once=10"),
        ("tokens=2.5", "tokens=2.5"),
        ("tokens=1e400", "tokens=1e400"),
        ("trainer.lr=1e-3", "trainer.lr=1e-3"),
        ("trainer.lr=1.0", "trainer.lr=1.0"),
        ("name=1e5", "name=1e5"),
        ("runs=~/sae", "runs='~/sae'"),
        ("name=ünï", "name='ünï'"),
        ("source.model=a folder/lläma", "source.model='a folder/lläma'"),
        ("name=plain", "name=plain"),
        ("tokens=[1", "tokens=[1"),
        ("--multirun", "--multirun"),
        ("--config-dir=~/x", "--config-dir=~/x"),
    ],
)
def test_what_people_type_becomes_what_hydra_reads(word, read):
    assert readable([word], "sweep") == [read]


def test_whole_numbers_in_the_grids_of_a_sweep_and_in_saved_configs():
    words = readable(["+sweep.grids.g={sae: {num_latents: 4e3}}", "tokens=1e5", "sweep.k=[4,1.6e1]"], "sweep")
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        config = sweep_config(compose("sweep", overrides=words))
    assert isinstance(config, SweepConfig) and config.tokens == 100_000 and config.sweep.k == [4, 16]
    assert from_plain(TrainerConfig, {"warmup_steps": 1e2}).warmup_steps == 100
    for value in ({"warmup_steps": 1.5}, {"warmup_steps": True}, 5, ["lr"]):
        with pytest.raises(ValueError, match=r"wrong type|should be the settings"):
            from_plain(TrainerConfig, value)


def test_the_settings_are_those_that_compose():
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        config = run_config(compose("train"))
    known = settings("train")
    assert {"sae.router.gate", "sae.num_latents", "source.text.paths", "trainer.lr", "tokens"} <= set(known) and "sweep.k" not in known
    assert all(hasattr(config, key.partition(".")[0]) for key in known) and "sweep.experts" in settings("sweep")


NASTY = ("runs/plain", "runs/my run", "runs/it's", 'runs/a "b" $HOME `c`', "runs/a$b (c);d", "ünï/é", "a,b", "runs/two  blanks")


@pytest.mark.parametrize("path", NASTY)
def test_printed_make_commands_can_be_pasted_whatever_the_folder_is_called(path):
    for target, name, paths in (
        ("train", "RESUME", [path]),
        ("evaluate", "RUN", [path]),
        ("sweep", "RESUME", [path]),
        ("results", "RUNS", [path, "b"]),
    ):
        line = f"make --no-print-directory -n {target} {make_variable(name, *paths)} VENV={shlex.quote(sys.prefix)}"
        done = subprocess.run(("bash", "-c", line), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (command,) = [line for line in done.stdout.splitlines() if " -m experiments." in line]
        assert shlex.split(command)[-len(paths) :] == paths


@pytest.mark.parametrize("target, name", [("train", "RESUME"), ("sweep", "RESUME"), ("evaluate", "RUN"), ("figures", "RUNS"), ("figures", "OUT")])
def test_an_empty_folder_on_makes_command_line_is_refused(target, name):
    environment = {key: value for key, value in os.environ.items() if key != "D"}
    line = f"make -n {target} {name}=$D VENV={shlex.quote(sys.prefix)}"
    done = subprocess.run(("bash", "-c", line), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and f"{name}= is empty" in done.stderr and "-m experiments" not in done.stdout


def test_make_evaluate_needs_a_run():
    done = subprocess.run(("make", "-n", "evaluate", f"VENV={sys.prefix}"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "RUN=runs/..." in done.stderr

"""What fails in scoring fails once: what was trained is saved, and can be scored later, with other settings."""

import json

import pytest
import torch

from experiments.evaluate import evaluate_again
from switch_sae import cohort, load_sae
from switch_sae.activations import SyntheticSource
from switch_sae.config import EvaluationConfig, RunConfig
from switch_sae.models import SwitchSAE
from switch_sae.models.baselines import Baseline
from switch_sae.orchestrator import resume_training, run_training
from switch_sae.runs import TRAINING_FILE, RunDir
from switch_sae.scoring import Scorer
from switch_sae.training import Trainer
from switch_sae.wandb_logger import WandbConfig, WandbMode


def config(tmp_path, **changes):
    return RunConfig(
        source=SyntheticSource.Config(d_in=16), sae=SwitchSAE.Config(num_latents=32, k=4, num_experts=2), baselines=[Baseline.flop_matched],
        evaluation=EvaluationConfig(rows=300, bootstrap=20), wandb=WandbConfig(mode=WandbMode.disabled), tokens=1280, batch_size=64,
        calibration_rows=256, runs=str(tmp_path), **changes,
    )  # fmt: skip


def quiet(line):
    pass


def failing(*arguments):
    raise RuntimeError("the model gives no logits")


@pytest.mark.parametrize("checkpoint_every", [0, 7])
@pytest.mark.parametrize("way", [evaluate_again, lambda run: resume_training(run.path, quiet)], ids=["evaluate", "resume"])
def test_a_run_whose_scoring_failed_is_scored_later_without_training_again(tmp_path, monkeypatch, way, checkpoint_every):
    said: list[str] = []
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="no logits"):
        broken.setattr(Scorer, "__init__", failing)
        run_training(config(tmp_path, checkpoint_every=checkpoint_every), said.append)
    (run,) = (RunDir(path) for path in tmp_path.iterdir())
    assert any("only scoring failed. Score it again" in line and "make evaluate RUN=" in line for line in said)
    assert (run.path / TRAINING_FILE).is_file() and not (run.path / "results.json").is_file()
    before = {key: tensor.clone() for key, tensor in load_sae(run.path).state_dict().items()}
    monkeypatch.setattr(Trainer, "step", failing)
    way(run)
    results, whole = run.read_json("results.json"), run_whole(tmp_path / "whole", monkeypatch)
    assert not (run.path / TRAINING_FILE).exists() and not (run.path / "checkpoints").exists()
    assert all(torch.equal(before[key], tensor) for key, tensor in load_sae(run.path).state_dict().items())
    for name, entry in whole["members"].items():
        assert entry.keys() == results["members"][name].keys() and entry["metrics"] == results["members"][name]["metrics"]
    assert whole["controls"] == results["controls"] and whole["ratios"] == results["ratios"]
    assert whole.keys() == results.keys() and {k: v for k, v in whole["outliers"].items()} == results["outliers"]


def run_whole(folder, monkeypatch):
    monkeypatch.undo()
    return run_training(config(folder), quiet).read_json("results.json")


def test_resuming_tries_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort, "untrained_controls", failing)  # any part of it, not only the language model
    with pytest.raises(RuntimeError):
        run_training(config(tmp_path), quiet)
    (run,) = (RunDir(path) for path in tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(Scorer, "group", failing)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            resume_training(run.path, quiet)
    monkeypatch.undo()
    resume_training(run.path, quiet)
    assert json.loads((run.path / "results.json").read_text())["members"].keys() == {"switch", "flop_matched"}


def test_a_run_that_is_not_trained_yet_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "step", failing)
    with pytest.raises(RuntimeError):
        run_training(config(tmp_path), quiet)
    run = RunDir(tmp_path / "x")
    run.write_json("config.json", {})
    with pytest.raises((FileNotFoundError, ValueError)):
        evaluate_again(run)

"""Folders of format version 1 (`tests/data/version1`) are read, scored and gone on with: they are older than a router's own settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from switch_sae import load_sae
from switch_sae.config import config_from_plain, config_to_plain
from switch_sae.models import SwitchSAE
from switch_sae.models.baselines import Baseline
from switch_sae.models.routers import Gate, SoftmaxRouter
from switch_sae.orchestrator import resume_training, run_members
from switch_sae.results import collect
from switch_sae.runs import RunDir

DATA = Path(__file__).parent / "data" / "version1"


def saved(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(("folder", "trained"), [("finished", True), ("finished/baselines/frozen_router", False)])
def test_weights_are_loaded_under_todays_names(folder, trained):
    sae, (tensors, header) = load_sae(DATA / folder), saved(DATA / folder)
    assert header["version"] == "1" and "train_router" in header["config"] and type(sae) is SwitchSAE
    assert sae.config.router == SoftmaxRouter.Config(train=trained, gate=Gate.probability, load_balance=0.2) and (sae.config.num_experts, sae.k) == (
        4,
        3,
    )
    assert torch.equal(sae.router.W_ED, tensors.pop("W_router_ED")) and torch.equal(sae.router.b_D, tensors.pop("b_router_D"))
    assert all(torch.equal(sae.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert sae.router.W_ED.requires_grad == trained and sae.activations["source"] == "synthetic"


@pytest.mark.parametrize("folder", ["finished", "interrupted"])
def test_configs_are_read_as_todays_and_written_as_todays(folder):
    plain = json.loads((DATA / folder / "config.json").read_text())
    assert plain["sae"]["gate"] == "probability" and "router" not in plain["sae"]
    config = config_from_plain(plain)
    assert config.sae.router == SoftmaxRouter.Config(load_balance=0.2) and config.total_steps == 30
    assert config.baselines == [Baseline.flop_matched, Baseline.frozen_router]
    again = config_to_plain(config)
    assert again["sae"]["router"] == {"kind": "softmax", "train": True, "gate": "probability", "load_balance": 0.2} and "gate" not in again["sae"]
    assert config_from_plain(again) == config


def test_results_are_read_with_todays_settings():
    rows = {row.sae: row for row in collect([DATA / "finished"])}
    scored = json.loads((DATA / "finished" / "results.json").read_text())["members"]
    assert {name: row.value("fvu") for name, row in rows.items()} == {name: member["metrics"]["fvu"]["value"] for name, member in scored.items()}
    assert {name: row.settings.get("sae.router.train") for name, row in rows.items()} == {
        "switch": True,
        "frozen_router": False,
        "flop_matched": None,
    }
    assert rows["switch"].settings["sae.router.load_balance"] == 0.2 and "sae.load_balance" not in rows["switch"].settings


def test_a_run_that_stopped_under_version_1_ends_with_the_weights_it_would_have_had(tmp_path):
    shutil.copytree(DATA / "interrupted", tmp_path / "run")
    run = resume_training(tmp_path / "run", lambda line: None)
    for folder in (".", "baselines/frozen_router"):
        found, expected = load_sae(run.path / folder), load_sae(DATA / "finished" / folder)
        assert found.config == expected.config
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-6, atol=1e-6, msg=f"{folder} {name}")
    before, after = (json.loads((path / "results.json").read_text())["members"] for path in (DATA / "finished", run.path))
    assert before.keys() == after.keys()
    for name, member in before.items():
        assert after[name]["metrics"]["fvu"]["value"] == pytest.approx(member["metrics"]["fvu"]["value"], rel=1e-5), name
    steps = [row["step"] for row in run.metrics() if row["sae"] == "switch"]
    assert steps == sorted(set(steps)) and steps[-1] == 30 and not (run.path / "checkpoints").exists()


def test_a_run_whose_router_was_frozen_kept_its_usual_baselines():
    """The default of version 1 named the frozen router also where the main SAE's router was frozen itself."""
    plain = RunDir(DATA / "finished").read_json("config.json")
    plain["sae"]["train_router"] = False
    config = config_from_plain(plain)
    assert [member.key for member in run_members(RunDir("nowhere"), config, 12)] == ["switch", "flop_matched", "frozen_router"]

"""Training that starts from saved weights: its first loss, what fits, what is said, and that its resume is exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_report import tiny_run

from switch_kernels import PYTORCH
from switch_sae import orchestrator
from switch_sae.cohort import Interrupted, saved_start
from switch_sae.config import config_from_plain
from switch_sae.models import BatchTopKSAE, JumpReLUSAE, SwitchPursuitSAE, SwitchRefitSAE, SwitchSAE, TopKSAE
from switch_sae.models.routers import ROUTERS
from switch_sae.models.starting import take_weights
from switch_sae.orchestrator import main_member, resume_training, run_training
from switch_sae.runs import RunDir, load_sae
from switch_sae.stream import Stream

GOLDEN = Path(__file__).parent / "golden" / "formats"
SWITCH = SwitchSAE.Config(num_latents=32, k=4, num_experts=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("start"), SWITCH, baselines=[])


def config_of(run, tmp_path, **changes):
    return replace(config_from_plain(run.read_json("config.json")), start_from=str(run.path), runs=str(tmp_path), log_every=1, **changes)


def first_loss(config, sae):
    """Of an SAE on the first batch that a run of this config trains on."""
    stream = Stream(config.source, config.batch_size, config.rows_read, config.calibration_rows, "cpu", PYTORCH, config.outlier_factor)
    try:
        stream.rewind()
        rows = next(stream.batches())
        sae.train()
        return float(sum(sae.loss_terms(rows, sae(rows.x_TD)).values()).detach())
    finally:
        stream.close()


def test_the_first_loss_is_that_of_the_saved_sae_and_more_tokens_lower_it(run, tmp_path):
    config, said = config_of(run, tmp_path), []
    again = run_training(config, say=said.append)
    assert again.metrics()[0]["loss"] == pytest.approx(first_loss(config, load_sae(run.path)), rel=1e-5)
    after, before = (one.read_json("results.json")["members"]["switch"]["metrics"]["fvu"]["value"] for one in (again, run))
    assert after < before
    assert any(f"starts from the weights of {run.path}, with fresh moments and its own schedule" in line for line in said)
    assert not any("settings that differ" in line for line in said)


def test_settings_that_touch_no_weight_may_differ_and_are_said(run, tmp_path):
    sae = replace(SWITCH, k=2, auxk=0.0, router=ROUTERS["softmax"].Config(load_balance=0.5))
    config, said = config_of(run, tmp_path, sae=sae, tokens=128), []
    again = run_training(config, say=said.append)
    told = "settings that differ: sae.k=2 (saved with 4), sae.auxk=0.0 (saved with 0.03125), sae.router.load_balance=0.5 (saved with 0.1)"
    assert any(line.endswith(told) for line in said)
    assert load_sae(again.path).config == sae
    with_k = load_sae(run.path)
    expected = SwitchSAE(sae, 16)
    expected.load_state_dict(with_k.state_dict())
    assert again.metrics()[0]["loss"] == pytest.approx(first_loss(config, expected), rel=1e-5)


@pytest.mark.parametrize(
    "sae, told",
    [
        (replace(SWITCH, num_latents=64), r"W_dec_MD is \(32, 16\), this run's is \(64, 16\)"),
        (replace(SWITCH, num_experts=8), r"router.W_ED is \(4, 16\), this run's is \(8, 16\)"),
        (replace(SWITCH, encoder_bias=False), r"b_enc_M is \(32,\), this run's is absent"),
        (TopKSAE.Config(num_latents=32, k=4), "it holds a SwitchSAE, and this run trains a TopKSAE"),
        (SwitchRefitSAE.Config(num_latents=32, k=4, num_experts=4), "it holds a SwitchSAE, and this run trains a SwitchRefitSAE"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_leave_no_folder(run, tmp_path, sae, told):
    with pytest.raises(ValueError, match=rf"^start_from={run.path}: .*{told}"):
        run_training(config_of(run, tmp_path, sae=sae), say=lambda _: None)
    assert not list(tmp_path.iterdir())


def test_other_inputs_a_dense_sae_and_another_part_of_shared_latents_are_refused():
    generator = torch.Generator().manual_seed(0)
    dense = TopKSAE(TopKSAE.Config(num_latents=32, k=4), 16, generator)
    with pytest.raises(ValueError, match=r"W_dec_MD is \(32, 16\), this run's is \(32, 8\)"):
        take_weights(TopKSAE(TopKSAE.Config(num_latents=32, k=4), 8, generator), dense)
    with pytest.raises(ValueError, match=r"split it into experts with python -m experiments\.upcycle"):
        take_weights(SwitchSAE(SWITCH, 16, generator), dense)
    with pytest.raises(ValueError, match="it holds a TopKSAE, and this run trains a BatchTopKSAE"):
        take_weights(BatchTopKSAE(BatchTopKSAE.Config(num_latents=32, k=4), 16, generator), dense)
    few, many = (SwitchPursuitSAE(SwitchPursuitSAE.Config(num_latents=36, k=4, num_experts=4, shared=shared), 16, generator) for shared in (4, 8))
    before = many.W_dec_MD.detach().clone()
    with pytest.raises(ValueError, match="shares its latents out otherwise"):
        take_weights(many, few)
    assert torch.equal(many.W_dec_MD, before)


def test_only_the_main_sae_starts_from_it(run, tmp_path):
    config = config_of(run, tmp_path)
    member = main_member(RunDir(tmp_path), config)
    sae = SwitchSAE(SWITCH, 16, torch.Generator().manual_seed(5))
    before = sae.W_dec_MD.detach().clone()
    assert not saved_start(replace(member, role="baseline"), sae, lambda _: None)
    assert not saved_start(replace(member, config=replace(config, start_from=None)), sae, lambda _: None)
    assert torch.equal(sae.W_dec_MD, before)
    assert saved_start(member, sae, lambda _: None) and torch.equal(sae.W_dec_MD, load_sae(run.path).W_dec_MD)


def test_resume_is_exact_and_needs_the_start_no_more(run, tmp_path, monkeypatch):
    start = tmp_path / "start.safetensors"
    start.write_bytes((run.path / "model.safetensors").read_bytes())
    config = replace(config_of(run, tmp_path), start_from=str(start), checkpoint_every=5)
    whole = run_training(replace(config, name="whole"), say=lambda _: None)

    def reached(keeper, step):
        keeper.step = step
        if step == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(orchestrator._RunKeeper, "reached", reached)
    with pytest.raises(Interrupted):
        run_training(replace(config, name="stopped"), say=lambda _: None)
    monkeypatch.undo()
    stopped = RunDir(next(path for path in tmp_path.iterdir() if path.name.endswith("stopped")))
    assert stopped.checkpoint_steps() == [5, 10]
    start.unlink()
    again = resume_training(stopped.path, say=lambda _: None)
    for name, tensor in load_sae(whole.path).state_dict().items():
        assert torch.equal(tensor, load_sae(again.path).state_dict()[name]), name
    assert again.metrics()[-1]["loss"] == whole.metrics()[-1]["loss"]


@pytest.mark.parametrize("golden", ["sae_lens/topk", "dictionary_learning/AutoEncoderTopK", "dictionary_learning/MatryoshkaBatchTopKSAE"])
def test_checkpoints_of_other_libraries_are_continued(golden, run, tmp_path):
    sae = load_sae(GOLDEN / golden)
    source = replace(config_of(run, tmp_path).source, d_in=sae.d_in)
    config = replace(config_of(run, tmp_path), source=source, sae=sae.config, start_from=str(GOLDEN / golden), name="theirs")
    again = run_training(config, say=lambda _: None)
    assert again.metrics()[0]["loss"] == pytest.approx(first_loss(config, load_sae(GOLDEN / golden)), rel=1e-5)
    assert again.metrics()[-1]["fvu"] < again.metrics()[0]["fvu"]
    assert torch.equal(load_sae(again.path).activation_scale, sae.activation_scale)


def test_a_checkpoint_of_an_architecture_that_is_not_trained_is_refused(run, tmp_path):
    path = GOLDEN / "sae_lens" / "jumprelu_constant_norm_rescale"
    config = config_of(run, tmp_path, sae=JumpReLUSAE.Config(num_latents=32))
    with pytest.raises(ValueError, match="it holds a TokenNormSAE, and this run trains a JumpReLUSAE"):
        run_training(replace(config, start_from=str(path)), say=lambda _: None)

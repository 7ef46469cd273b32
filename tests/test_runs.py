"""Run folders: saving and loading is exact, describes itself, and refuses what is broken with one clear message."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from switch_sae import load_sae, save_sae
from switch_sae.models import (
    SAES,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    KronSAE,
    MatryoshkaSAE,
    ProductKeysExactSAE,
    ProductKeysSAE,
    PursuitSAE,
    ReLUSAE,
    SharedPoolSAE,
    SketchSAE,
    SwitchBatchTopKSAE,
    SwitchPursuitSAE,
    SwitchRefitSAE,
    SwitchSAE,
    SwitchScaleSAE,
    SwitchSharedSAE,
    SwitchTranscoderSAE,
    TopKSAE,
    TranscoderSAE,
)
from switch_sae.models.jumprelu import Sparsity
from switch_sae.models.routers.renormalised import RenormalisedRouter, Scores
from switch_sae.models.topk import EncoderInit
from switch_sae.models.transcoder import Skip
from switch_sae.runs import Checkpoint, RunDir, RunError

CONFIGS = {
    "topk": TopKSAE.Config(num_latents=12, k=3, encoder_bias=False),
    "switch": SwitchSAE.Config(num_latents=12, k=3, num_experts=4, encoder_init=EncoderInit.linear, auxk_latents=2),
    "relu": ReLUSAE.Config(num_latents=12, l1=2.0),
    "gated": GatedSAE.Config(num_latents=12, sparsity_warmup=0.5),
    "jumprelu": JumpReLUSAE.Config(num_latents=12, sparsity=Sparsity.tanh),
    "batch_topk": BatchTopKSAE.Config(num_latents=12, k=3),
    "matryoshka": MatryoshkaSAE.Config(num_latents=12, k=3, group_fractions=[0.25, 0.25]),
    "pursuit": PursuitSAE.Config(num_latents=12, k=3, blocks=1, ridge=0.01),
    "switch_pursuit": SwitchPursuitSAE.Config(num_latents=14, k=3, num_experts=2, shared=2, stop=True, gram_tokens=64),
    "transcoder": TranscoderSAE.Config(num_latents=12, k=3, d_out=7, skip=Skip.full),
    "switch_transcoder": SwitchTranscoderSAE.Config(num_latents=12, k=3, num_experts=4, skip=Skip.low_rank, skip_rank=2),
    "switch_refit": SwitchRefitSAE.Config(num_latents=14, k=3, num_experts=2, shared=2, missed=0.5),
    "shared_pool": SharedPoolSAE.Config(num_latents=12, k=3, num_lists=3, multiplicity=1.5, distill=0.1),
    "sketch": SketchSAE.Config(num_latents=12, k=3, rank=2, candidates=6),
    "kron": KronSAE.Config(num_latents=12, k=3, m=2, n=3),
    "product_keys": ProductKeysSAE.Config(num_latents=16, k=3, encoder_bias=False),
    "product_keys_exact": ProductKeysExactSAE.Config(num_latents=12, k=3, keys=2, candidates=5),
    "switch_shared": SwitchSharedSAE.Config(num_latents=14, k=3, num_experts=3, path_rank=2, path_first=True),
    "switch_batch_topk": SwitchBatchTopKSAE.Config(num_latents=14, k=3, num_experts=3, shared=2, gate_in_selection=False, threshold_beta=0.5),
    "switch_scale": SwitchScaleSAE.Config(num_latents=12, k=3, num_experts=3, router=RenormalisedRouter.Config(scores=Scores.relu), omega=0.5),
}


def saved(name: str, folder: Path):
    sae = SAES[name](CONFIGS[name], 5, torch.Generator().manual_seed(0))
    sae.activation_scale.fill_(1.7)
    save_sae(folder / "model.safetensors", sae, {"model": "toy", "hook": "blocks.0"})
    return sae.eval()  # as it is loaded: some select otherwise in training


@pytest.mark.parametrize("name", list(SAES))
def test_save_and_load_is_bit_exact_with_no_arguments(name, tmp_path):
    sae = saved(name, tmp_path)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        loaded = load_sae(path)
        assert type(loaded) is type(sae) and loaded.config == sae.config and not loaded.training
        assert loaded.activations == {"model": "toy", "hook": "blocks.0"}
        assert loaded.state_dict().keys() == sae.state_dict().keys()
        for key, tensor in sae.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[key]), key
        x = torch.randn(7, 5)
        assert torch.equal(loaded(x).recon_TD, sae(x).recon_TD)


def rewrite(path: Path, tensors=None, **header):
    """The same file with some tensors or header entries changed."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        old = opened.metadata()
    save_file({**load_file(path), **(tensors or {})}, path, {**old, **header})


def test_broken_files_are_refused_by_name(tmp_path):
    file = tmp_path / "model.safetensors"
    saved("switch", tmp_path)
    whole = file.read_bytes()

    file.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"cannot be read as safetensors.*truncated, damaged"):
        load_sae(file)
    file.write_bytes(b"\x80\x04pickle, perhaps")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_sae(file)
    save_file({"encoder.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match=r"is not a switch_sae file.*encoder.weight.*another library"):
        load_sae(file)
    for change, message in (
        ({"version": "99"}, "format version 99; this version of switch_sae reads 1"),
        ({"architecture": "mystery"}, "unknown SAE architecture 'mystery'"),
        ({"config": json.dumps({"num_latents": 12, "k": 3, "num_experts": 5})}, "not divisible by num_experts=5"),
        ({"config": json.dumps({"width": 12})}, r"unknown settings \['width'\]"),
        ({"d_in": "6"}, r"tensors contradict the config.*W_dec_MD is \(12, 5\), should be \(12, 6\)"),
        ({"tensors": {"b_pre_D": torch.full((5,), float("nan"))}}, "b_pre_D hold NaN"),
    ):
        file.write_bytes(whole)
        rewrite(file, **change)
        with pytest.raises(ValueError, match=message):
            load_sae(file)


def test_loading_nothing_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist. Give a run folder"):
        load_sae(tmp_path / "nowhere")
    run = RunDir(tmp_path / "unfinished")
    run.save_checkpoint(Checkpoint(3, {"a": torch.zeros(2)}, {}))
    with pytest.raises(FileNotFoundError, match=r"only checkpoints: training did not finish. Go on with make train RESUME="):
        load_sae(run.path)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        RunDir.open(tmp_path)


def test_nan_weights_are_never_saved(tmp_path):
    sae = saved("topk", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        sae.W_enc_MD[0, 0] = float("inf")
    with pytest.raises(ValueError, match="W_enc_MD hold NaN or infinite values"):
        save_sae(tmp_path / "model.safetensors", sae)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.save_checkpoint(Checkpoint(1, {"a": torch.arange(3)}, {"x": 1}))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device. What was there before is untouched"):
        run.save_checkpoint(Checkpoint(2, {"a": torch.arange(4)}, {}))
    last = run.checkpoint_at(run.checkpoint_steps()[-1])
    assert last.step == 1 and last.state == {"x": 1} and torch.equal(last.tensors["a"], torch.arange(3))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.safetensors"]


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    run = RunDir(tmp_path)
    assert run.checkpoint_steps() == []
    for step in (5, 10, 15):
        run.save_checkpoint(Checkpoint(step, {"a": torch.tensor([step])}, {}))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010.safetensors", "step-00000015.safetensors"]
    assert run.checkpoint_at(15).step == 15 and run.checkpoint_steps() == [10, 15]


def test_run_folders_made_in_the_same_second_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "2026-01-01_00-00-00")
    paths = [RunDir.create(tmp_path, "x").path.name for _ in range(3)]
    assert paths == ["2026-01-01_00-00-00_x", "2026-01-01_00-00-00_x_1", "2026-01-01_00-00-00_x_2"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match=r"Choose a writable one|is a file"):
        RunDir.create(file, "x")
    with pytest.raises(RunError, match="cannot write"):
        RunDir(file).write_json("results.json", {})


def test_metrics_survive_a_cut_line_and_forget_what_is_done_again(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 0.1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    run.forget_metrics_after(2)
    assert [row["step"] for row in run.metrics()] == [1, 2]

"""Surgery: copies are found and merged, what is left computes what it did, and the controls differ in nothing else."""

import csv
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_report import tiny_run

from experiments import surgery
from switch_sae.activations import SyntheticSource
from switch_sae.analysis.features.surgery import copied_groups, merged, random_groups
from switch_sae.config import config_from_plain
from switch_sae.models import SwitchPursuitSAE, SwitchRefitSAE, SwitchSAE
from switch_sae.models.inference import Inference, with_inference
from switch_sae.orchestrator import run_training
from switch_sae.results import collect
from switch_sae.runs import load_sae, save_sae

SOURCE = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)


def with_copies(cls=SwitchRefitSAE):
    """4 experts of 10 latents and 2 shared; a concept has copies in experts 0, 1, 3 (two of them in 1), another in 1 and 2. Counts are distinct."""
    sae = cls(cls.Config(num_latents=42, k=3, num_experts=4, shared=2), 64, torch.Generator().manual_seed(0)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sae.named_parameters():
            if name.endswith(("_M", "_MD")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        concepts = F.normalize(torch.randn(2, 64, generator=generator), dim=1)
        sae.W_dec_MD.copy_(F.normalize(sae.W_dec_MD, dim=1))
        for latent, concept in {2 + 3: 0, 12 + 1: 0, 12 + 5: 0, 32 + 0: 0, 12 + 9: 1, 22 + 4: 1, 22 + 8: 1}.items():
            sae.W_dec_MD[latent] = F.normalize(concepts[concept] + 0.01 * torch.randn(64, generator=generator), dim=0)
    count = torch.randperm(42, generator=generator) + 1.0
    count[22 + 8] = 0  # dead: no copy
    return sae, count


def test_groups_hold_the_copy_of_each_expert_that_fires_most():
    sae, count = with_copies()
    best = 13 if count[13] > count[17] else 17
    groups = copied_groups(sae, count, 0.9, 2)
    assert [group.tolist() for group in groups] == [[5, best, 32], [21, 26]]
    assert [group.tolist() for group in copied_groups(sae, count, 0.9, 3)] == [[5, best, 32]]
    assert copied_groups(sae, count, 0.9, 4) == []
    drawn = random_groups(sae, count, groups)
    assert [((group - 2) // 10).tolist() for group in drawn] == [((group - 2) // 10).tolist() for group in groups]
    assert not set(torch.cat(drawn).tolist()) & set(torch.cat(groups).tolist()) and 30 not in torch.cat(drawn)
    assert [group.tolist() for group in random_groups(sae, count, groups)] == [group.tolist() for group in drawn]


@pytest.mark.parametrize("cls", [SwitchRefitSAE, SwitchPursuitSAE])
def test_merging_keeps_what_it_does_not_merge_and_the_cost(cls):
    sae, count = with_copies(cls)
    groups = copied_groups(sae, count, 0.9, 2)
    new = merged(sae, groups, count)
    assert (new.num_shared, new.latents_per_expert, new.num_latents) == (4, 8, 36)
    assert new.flops().forward == sae.flops().forward and not new.training
    kept = [0, 1]
    for expert in range(4):
        mine = list(range(2 + 10 * expert, 12 + 10 * expert))
        gone = [latent for group in groups for latent in group.tolist() if latent in mine]
        rest = sorted((latent for latent in mine if latent not in gone), key=lambda latent: float(count[latent]))
        kept += [latent for latent in mine if latent not in gone + rest[: 2 - len(gone)]]
    places = [0, 1, *range(4, 36)]
    for name in ("W_dec_MD", "W_enc_MD", "b_enc_M") if cls is SwitchRefitSAE else ("W_dec_MD",):
        before, after = sae.get_parameter(name), new.get_parameter(name)
        assert torch.equal(after[places], before[kept])
        for place, group in enumerate(groups):
            mean = sum(float(count[m]) * before[m] for m in group.tolist()) / float(count[group].sum())
            assert torch.allclose(after[2 + place], F.normalize(mean, dim=0) if name == "W_dec_MD" else mean, atol=1e-6)
    for name, tensor in sae.state_dict().items():
        if not name.endswith(("_M", "_MD")):
            assert torch.equal(new.state_dict()[name], tensor)


def test_tokens_that_use_no_latent_of_the_operation_are_reconstructed_as_before():
    sae, count = with_copies()
    groups = copied_groups(sae, count, 0.9, 2)
    new = merged(sae, groups, count)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before, after = sae(x), new(x)
    touched = torch.ones(42, dtype=torch.bool)
    rows_of = {tuple(row.tolist()) for row in new.W_dec_MD}
    for latent in range(42):
        touched[latent] = tuple(sae.W_dec_MD[latent].tolist()) not in rows_of
    chosen = [with_inference(one, Inference.encoder).encode(x).to_dense() != 0 for one in (sae, new)]  # least squares may set one of them to 0
    uses = chosen[0][:, touched].any(1) | chosen[1][:, 2:4].any(1)
    assert 0 < int((~uses).sum()) < 200
    assert torch.allclose(before.recon_TD[~uses], after.recon_TD[~uses], atol=1e-4)
    assert torch.equal(before.routing.expert_TS, after.routing.expert_TS)


def test_what_cannot_be_merged_is_refused():
    sae, count = with_copies()
    with pytest.raises(ValueError, match="no group of copies spans so many experts"):
        merged(sae, [], count)
    with pytest.raises(ValueError, match="two latents of one expert"):
        merged(sae, [torch.tensor([5, 6])], count)
    with pytest.raises(ValueError, match="10 groups leave nothing of experts of 10 latents"):
        merged(sae, [torch.tensor([2 + n, 12 + n]) for n in range(10)], count)
    switch = SwitchSAE(SwitchSAE.Config(num_latents=32, k=4, num_experts=4), 8)
    with pytest.raises(ValueError, match="SwitchSAE has no latents that all experts share"):
        copied_groups(switch, torch.ones(32), 0.9, 2)
    with pytest.raises(ValueError, match="no live latent left"):
        random_groups(sae, (torch.arange(42) < 3).float(), [torch.tensor([2, 12])])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with copies of one concept in all experts, planted into its weights."""
    folder = tmp_path_factory.mktemp("surgery")
    run = tiny_run(folder, SwitchRefitSAE.Config(num_latents=36, k=4, num_experts=4, shared=4), source=SOURCE)
    sae = load_sae(run.path)
    with torch.no_grad():
        for latent in (5, 13, 21, 29):
            for tensor in (sae.W_dec_MD, sae.W_enc_MD, sae.b_enc_M):
                tensor[latent] = tensor[5]
        sae.b_enc_M[[5, 13, 21, 29]] += 10  # so that they fire
    save_sae(run.path / "model.safetensors", sae, sae.activations)
    return run


def test_the_command_operates_and_leaves_runs_to_be_analysed(run, monkeypatch, capsys, tmp_path):
    given = ["surgery", str(run.path), "--out", str(tmp_path), "--experts", "3", "--threshold", "0.95", "--tokens", "1280", "--lr", "0.001"]
    monkeypatch.setattr(sys, "argv", given)
    surgery.main()
    said = capsys.readouterr().out
    assert "in 4 experts, at cosine > 0.95" in said and f"written: {tmp_path}/surgery.csv" in said
    with (tmp_path / "surgery.csv").open(newline="") as file:
        table = {record["sae"]: record for record in csv.DictReader(file)}
    assert list(table) == [f"{name} {when}" for when in ("after", "before") for name in ("untouched", "merged", "random")]
    assert {name: int(record["latents"]) for name, record in table.items() if "after" in name} == {
        "untouched after": 36, "merged after": 33, "random after": 33
    }  # fmt: skip
    assert len({record["flops"] for record in table.values()}) == 1
    rows = {row.path.name.rpartition("-")[2]: row for row in collect([tmp_path])}
    assert set(rows) == {"untouched", "merged", "random"} and all(row.has_weights for row in rows.values())
    for name, row in rows.items():
        assert float(table[f"{name} after"]["fvu_inliers"]) == pytest.approx(row.value("fvu_inliers"))
    ratio = float(table["merged after"]["untouched/fvu_inliers"])
    assert ratio == pytest.approx(rows["untouched"].value("fvu_inliers") / rows["merged"].value("fvu_inliers"))
    start = load_sae(rows["untouched"].path / "start.safetensors")
    assert all(torch.equal(tensor, load_sae(run.path).state_dict()[name]) for name, tensor in start.state_dict().items())
    assert not torch.equal(rows["untouched"].load().W_dec_MD, start.W_dec_MD)


def test_training_starts_from_given_weights(run, tmp_path):
    config = config_from_plain(run.read_json("config.json"))
    start = replace(config, start_from=str(run.path / "model.safetensors"), tokens=128, runs=str(tmp_path), trainer=replace(config.trainer, lr=1e-12))
    again = load_sae(run_training(start, say=lambda _: None).path)
    before = load_sae(run.path)
    assert torch.allclose(again.W_dec_MD, before.W_dec_MD, atol=1e-5) and torch.equal(again.activation_scale, before.activation_scale)

"""Planted blocks of co-active latents are found, experts keep what the dense SAE gave, and the command leaves what training starts from."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_report import tiny_run

from experiments import upcycle
from switch_kernels import Dispatch
from switch_sae.activations import SyntheticSource
from switch_sae.models import BatchTopKSAE, SwitchSAE, TopKSAE
from switch_sae.models.latents import SparseLatents
from switch_sae.models.upcycling import GATE, balanced, co_active_blocks, expert_energies, profiles, upcycled
from switch_sae.rows import Rows
from switch_sae.runs import load_sae

E, F_, K, D = 4, 6, 3, 24


def planted(tokens=600):
    """(rows, block of each token, a dense SAE of orthogonal latents, block of each latent): every token uses K latents of one block."""
    generator = torch.Generator().manual_seed(0)
    block_M = torch.arange(E * F_)[torch.randperm(E * F_, generator=generator)] % E
    dense = TopKSAE(TopKSAE.Config(num_latents=E * F_, k=K), D).eval()
    block_T = torch.randint(E, (tokens,), generator=generator)
    z_TM = torch.zeros(tokens, E * F_)
    for token, block in enumerate(block_T.tolist()):
        mine = (block_M == block).nonzero()[:, 0]
        z_TM[token, mine[torch.randperm(F_, generator=generator)[:K]]] = 1 + torch.rand(K, generator=generator)
    with torch.no_grad():
        rows_MD = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
        dense.W_dec_MD.copy_(rows_MD)
        dense.W_enc_MD.copy_(rows_MD * (1 + torch.rand(D, 1, generator=generator)))
        dense.b_pre_D.copy_(torch.randn(D, generator=generator))
        dense.b_enc_M.copy_(-0.1 * torch.rand(E * F_, generator=generator))
        dense.activation_scale.fill_(0.5)
        x_TD = (z_TM @ rows_MD + dense.b_pre_D) / 0.5
    return Rows.of(x_TD), block_T, dense, block_M


def same_partition(a, b):
    pairs = {(int(i), int(j)) for i, j in zip(a, b, strict=True)}
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def test_planted_blocks_are_recovered_and_a_random_code_has_none():
    rows, block_T, dense, block_M = planted()
    found = upcycled(dense, rows, E)
    expert_M = torch.empty(E * F_, dtype=torch.long)
    expert_M[found.latent_M] = torch.arange(E * F_) // F_
    assert same_partition(expert_M, block_M)
    assert found.kept == pytest.approx(1) and found.routed > 0.95
    with torch.no_grad():
        routing, _ = found.sae.route(rows.x_TD)
    assert (routing.expert_TS[:, 0] == expert_M[[int((block_M == b).nonzero()[0]) for b in block_T]]).float().mean() > 0.95
    assert float(routing.gate_TS.mean()) == pytest.approx(GATE, abs=0.01)
    generator = torch.Generator().manual_seed(2)
    noise = SparseLatents(torch.ones(600, K), torch.rand(600, E * F_, generator=generator).argsort(dim=1)[:, :K], E * F_)
    energy_TE = expert_energies(noise, co_active_blocks(noise, E), E)
    assert float(energy_TE.amax(1).sum() / energy_TE.sum()) < 0.8


def test_experts_with_an_oracle_route_give_what_the_dense_sae_gives():
    rows, block_T, dense, block_M = planted()
    found = upcycled(dense, rows, E)
    sae, x_TD = found.sae.double(), rows.x_TD.double()
    first_E = [int((block_M[found.latent_M] == block).nonzero()[0]) // F_ for block in range(E)]
    oracle_T1 = torch.tensor(first_E)[block_T][:, None]
    with torch.no_grad():
        scaled_TD = x_TD * sae.activation_scale
        latents, by_latent = sae._encode_by(scaled_TD, Dispatch.from_experts(oracle_T1, E), torch.ones(len(x_TD), 1, dtype=torch.float64))
        expected = dense.double().encode(x_TD).to_dense()
        assert torch.allclose(latents.to_dense(), expected[:, found.latent_M], atol=1e-12)
        assert torch.allclose(sae._decode(latents, by_latent), dense(x_TD).recon_TD, atol=1e-12)


def test_weights_are_those_of_the_dense_sae_in_another_order():
    rows, _, dense, _ = planted()
    found = upcycled(dense, rows, E)
    assert sorted(found.latent_M.tolist()) == list(range(E * F_))
    mine, theirs = found.sae.state_dict(), dense.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor[found.latent_M] if name in ("W_dec_MD", "W_enc_MD", "b_enc_M") else tensor), name
    assert set(mine) - set(theirs) == {"router.W_ED", "router.b_D"} and not found.sae.training
    assert mine["router.W_ED"].shape == (E, D) and found.sae.config == SwitchSAE.Config(num_latents=E * F_, k=K, num_experts=E)
    again = upcycled(dense, rows, E).sae.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in mine.items())


def test_profiles_have_about_the_cosines_of_the_rows_of_the_correlation_matrix():
    generator = torch.Generator().manual_seed(1)
    indices_TK = torch.rand(300, 8, generator=generator).argsort(dim=1)[:, :3]
    latents = SparseLatents((torch.rand(300, 3, generator=generator) > 0.2).float(), indices_TK, 9)  # latent 8 never fires
    A_TM = F.normalize((latents.to_dense() > 0).double(), dim=0)
    exact_MM = F.normalize((A_TM - A_TM.mean(0)).T @ A_TM, dim=1)  # rows of C, as A^T (A G - mean) is C G
    profile_MR = profiles(latents, 20_000).double()
    assert torch.allclose(profile_MR @ profile_MR.T, exact_MM @ exact_MM.T, atol=0.05)
    assert not profile_MR[8].any()


def test_balanced_experts_are_full_and_the_dearest_choices_come_first():
    score_ME = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    assert balanced(score_ME).bincount(minlength=3).tolist() == [4, 4, 4]
    assert balanced(torch.zeros(8, 2)).bincount(minlength=2).tolist() == [4, 4]
    assert balanced(torch.tensor([[1.0, 0.9], [1.0, 0.0], [1.0, 0.5], [0.2, 0.1]])).tolist() == [1, 0, 0, 1]


def test_what_cannot_be_split_is_refused():
    rows, _, dense, _ = planted(50)
    with pytest.raises(ValueError, match="num_latents=24 is not divisible by num_experts=5"):
        upcycled(dense, rows, 5)
    with pytest.raises(ValueError, match="k=3 is more than the 2 latents of one expert"):
        upcycled(dense, rows, 12)
    with pytest.raises(ValueError, match="num_experts=1 splits nothing"):
        upcycled(dense, rows, 1)
    with pytest.raises(ValueError, match="3 rows are too few to tell 4 experts apart"):
        upcycled(dense, rows[:3], E)
    for sae in (SwitchSAE(SwitchSAE.Config(num_latents=24, k=3, num_experts=4), D), BatchTopKSAE(BatchTopKSAE.Config(num_latents=24, k=3), D)):
        with pytest.raises(ValueError, match="is no dense TopKSAE"):
            upcycled(sae, rows, E)


def test_the_command_writes_a_start_and_says_what_it_keeps(monkeypatch, capsys, tmp_path):
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    run = tiny_run(tmp_path, TopKSAE.Config(num_latents=32, k=4), source=source)
    monkeypatch.setattr(sys, "argv", ["upcycle", str(run.path), "--experts", "4", "--out", str(tmp_path / "up")])
    upcycle.main()
    said = capsys.readouterr().out
    assert "of its experts before training" in said and "with sae.num_latents=32 sae.k=4 sae.num_experts=4: make train" in said
    assert load_sae(tmp_path / "up").activations == load_sae(run.path).activations
    with pytest.raises(SystemExit):
        upcycle.main()
    assert "exists, and nothing is overwritten" in capsys.readouterr().err

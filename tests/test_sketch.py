"""A low-rank sketch that chooses what is encoded: brute force in float64, its limits, and what it learns."""

from dataclasses import replace

import pytest
import torch
from configs import ARCHITECTURES
from test_pursuit import pursued

from switch_sae.models import SAES, SketchSAE, TopKSAE, with_inference
from switch_sae.models.losses import reconstruction_loss
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 12, 96, 48
SKETCH = ARCHITECTURES["sketch"]


def activations(seed=0, rows=T):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * 3 + torch.linspace(-2, 2, D)


def build(config, dtype=torch.float64):
    sae = SAES.build(config, D, torch.Generator().manual_seed(1)).to(dtype)
    prepare(sae, Rows.of(activations(7, 512).to(dtype)), normalize_activations=True)
    return sae


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_equal_the_masked_dense_formulation(bias):
    sae, x = build(replace(SKETCH, encoder_bias=bias, rank_loss=0.7, sample=1 / 8)), activations().double()
    with torch.no_grad():
        for parameter in (sae.V_MR, sae.c_M, *([sae.b_enc_M] if bias else [])):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)), dtype=torch.float64))
    output = sae(x)
    terms = sae.loss_terms(Rows.of(x), output)
    ours = torch.autograd.grad(sum(terms.values()), list(sae.parameters()))

    scaled = x * sae.activation_scale
    score = (scaled - sae.b_pre_D).detach() @ sae.U_RD.T @ sae.V_MR.T + sae.c_M
    offered = torch.zeros(T, M, dtype=torch.bool).scatter(1, score.topk(12, dim=1).indices, True)
    pre = (scaled - sae.b_pre_D) @ sae.W_enc_MD.T + (sae.b_enc_M if bias else 0)

    def winners(values):
        return values * torch.zeros_like(values).scatter(1, values.topk(4, dim=1).indices, 1.0)

    z, everything = winners(pre.relu() * offered), winners(pre.relu())[: T // 8]
    recon = z @ sae.W_dec_MD + sae.b_pre_D
    share, share_all = (each.detach().square() / each.detach().square().sum(1, keepdim=True) for each in (z, everything))
    among = torch.log_softmax(score.masked_fill(~offered, -torch.inf), dim=1).masked_fill(~offered, 0)
    rank = -(share * among).sum(1).mean() - (share_all * torch.log_softmax(score[: T // 8], dim=1)).sum(1).mean()
    loss = reconstruction_loss(scaled - recon) + 0.7 * rank
    expected = torch.autograd.grad(loss, list(sae.parameters()))

    torch.testing.assert_close(output.latents.to_dense(), z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(output.recon_TD * sae.activation_scale, recon, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sum(terms.values()), loss, rtol=1e-11, atol=1e-11)
    for (name, _), our, their in zip(sae.named_parameters(), ours, expected, strict=True):
        assert (our - their).abs().max() <= 1e-9 * their.abs().max().clamp_min(1e-12), name
    assert sae.offered_counts(x).tolist() == offered.sum(0).tolist()


def test_all_latents_as_candidates_are_a_topk_sae_and_so_are_k_of_a_sketch_that_loses_nothing():
    topk, x = build(TopKSAE.Config(num_latents=M, k=4)), activations().double()
    for config in (replace(SKETCH, candidates=M), replace(SKETCH, rank=D, candidates=4)):
        sketch = build(config)
        ours, theirs = sketch(x), topk(x)
        torch.testing.assert_close(ours.latents.to_dense(), theirs.latents.to_dense(), rtol=1e-11, atol=1e-11)
        gradients = [torch.autograd.grad(reconstruction_loss(out.recon_TD), sae.W_enc_MD)[0] for sae, out in ((sketch, ours), (topk, theirs))]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_the_sketch_starts_as_the_best_of_its_rank_where_encoder_rows_have_no_direction_of_their_own():
    sae = SketchSAE(SketchSAE.Config(num_latents=D, k=2, rank=3, candidates=4), D, torch.Generator().manual_seed(0)).double()
    x = activations(3, 400).double()
    with torch.no_grad():
        sae.W_enc_MD.copy_(torch.eye(D))
    sae.initialize(Rows.of(x))
    centred = x - sae.b_pre_D
    missed = (centred - centred @ sae.U_RD.T @ sae.V_MR.T).square().sum()
    torch.testing.assert_close(missed, torch.linalg.svdvals(centred.detach())[3:].square().sum())  # Eckart & Young


def test_ranking_finds_winners_that_principal_directions_hide():
    """What wins is in directions of little variance: the largest direction of all decides nothing."""
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        x = torch.zeros(count, D)
        x[:, 0] = 12 * torch.randn(count, generator=generator)
        x[torch.arange(count), 1 + torch.randint(2, (count,), generator=generator)] = 3.0
        return x

    sae = SketchSAE(SketchSAE.Config(num_latents=4, k=1, rank=2, candidates=1, sample=1.0), D, torch.Generator().manual_seed(0))
    sae.initialize(Rows.of(rows(512)))
    with torch.no_grad():
        sae.b_pre_D.zero_()
        sae.W_enc_MD.zero_()
        sae.W_enc_MD[[0, 1], [1, 2]] = 1.0
        sae.U_RD.zero_()
        sae.U_RD[0, 0], sae.U_RD[1, 3] = 1.0, 1.0
        sae.V_MR.copy_(torch.randn(4, 2, generator=generator))
    test, learned = rows(256), [sae.U_RD, sae.V_MR, sae.c_M]
    optimizer = torch.optim.Adam(learned, lr=3e-2)

    def found():
        return (sae.encode(test).values[:, 0] > 0).float().mean().item()

    start = found()
    for _ in range(150):
        x = rows(256)
        term = sae.loss_terms(Rows.of(x), sae(x))["rank"]
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    assert start < 0.7 and found() > 0.95


def test_what_the_sketch_never_offers_is_told_apart_from_what_never_wins():
    sae, x = build(SKETCH, torch.float32), activations()
    with torch.no_grad():
        sae.c_M[:20] = -1e3  # never offered
        sae.c_M[20], sae.b_enc_M[20] = 1e3, -1e3  # always offered, never wins
    trainer = Trainer(sae, TrainerConfig(lr=1e-4), total_steps=2, batch_size=T)
    trainer.step(Rows.of(x))
    assert (sae.tokens_since_offered_M[:20] == T).all() and sae.tokens_since_offered_M[20] == 0
    assert (trainer.tokens_since_fired_M[:21] == T).all()


def test_pursuit_searches_the_candidates_of_each_token_and_is_for_scoring_alone():
    sae, x = build(SKETCH).eval(), activations().double()
    other = with_inference(sae, "pursuit")
    found = other.encode(x).to_dense()
    centred = (x * sae.activation_scale - sae.b_pre_D).detach()
    candidates = (centred @ sae.U_RD.T @ sae.V_MR.T + sae.c_M).topk(sae.config.candidates, dim=1).indices
    for t, latents in enumerate(candidates):
        z = torch.tensor(pursued(centred[t].numpy(), sae.W_dec_MD.detach().numpy()[latents], 4, 4, 1e-3)[0])
        assert (found[t, latents] - z).abs().max() <= 1e-9 and (found[t] > 0).sum() == (z > 0).sum() > 0
    assert not torch.equal(found > 0, sae.encode(x).to_dense() > 0)
    with pytest.raises(ValueError, match="cannot be trained"):
        Trainer(build(replace(SKETCH, inference="pursuit")), TrainerConfig(), 4, T)


def test_flops_are_counted_by_hand():
    flops = SketchSAE(SketchSAE.Config(num_latents=640, k=2, rank=3, candidates=20, sample=1 / 64), 10).flops()
    assert (flops.router, flops.encode, flops.decode) == (0, 2 * 10 * 3 + 2 * 3 * 640 + 2 * 10 * 20, 2 * 10 * 2)
    assert flops.backward == 3 * 2 * 10 * 2 + 2 * 2 * 10 * 3 + 2 * 2 * 3 * 20 + 10 * (2 * 10 + 3 * 2 * 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": 3, "k": 4}, "candidates=3 must lie between k=4 and num_latents=4096"),
        ({"candidates": 5000}, "candidates=5000 must lie between"),
        ({"sample": 1.5}, "sample=1.5 is a share: at most 1"),
        ({"sample": 0.0}, "leaves the sketch as it starts: both must be above 0"),
        ({"rank": 0}, "rank=0 must be at least 1"),
    ],
)
def test_impossible_configs_say_value_rule_and_fix(change, message):
    with pytest.raises(ValueError, match=message):
        SketchSAE.Config(**change)


def test_a_sketch_of_more_dimensions_than_activations_is_refused():
    with pytest.raises(ValueError, match=r"rank=13 is more than d_in=12.*Use rank <= 12"):
        build(replace(SKETCH, rank=13))

"""Matching pursuit in lists of each row's own, and several experts per token, against brute force: each token by itself in NumPy."""

from dataclasses import replace

import counted
import numpy as np
import pytest
import torch
from configs import CONTRACTS
from counted import executed_flops
from test_inference import RIDGE, D, E, K, M, S, T, activations, build, own
from test_pursuit import CPU, NUMBA, N, both_ways, by, dense, planted, problem, pursued  # noqa: F401

from switch_kernels import resolve
from switch_kernels.pursuit import NUMBA_SWITCH, gram_matrices, matching_pursuit, matching_pursuit_in_lists, pursuit_macs
from switch_sae.models import SAES, SwitchPursuitSAE, why_no_inference, with_inference
from switch_sae.models.losses import local_auxk_loss
from switch_sae.models.routers.competition import CompetitionRouter
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

LISTED, ALL = 41, 120


def lists(rows=N, seed=5):
    """[N, C]: distinct latents of 120, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(ALL, generator=generator)[:LISTED] for _ in range(rows)])


def listed_problem():
    A_GCD, r_ND, _, _ = problem()
    A_MD, candidate_NC = A_GCD.flatten(0, 1), lists()
    return A_MD, r_ND, candidate_NC, torch.einsum("nd,ncd->nc", r_ND, A_MD[candidate_NC])


@pytest.mark.parametrize(
    ("k", "blocks", "threshold", "limited"), [(6, 2, 0.0, False), (6, 6, 0.0, False), (6, 1, 0.0, False), (8, 4, 0.7, False), (8, 4, 0.0, True)]
)
@both_ways
def test_pursuit_in_lists_equals_brute_force(by, k, blocks, threshold, limited):  # noqa: F811
    A_MD, r_ND, candidate_NC, c_NC = listed_problem()
    limit_N = torch.arange(N) % (k + 3) if limited else None
    found = dense(matching_pursuit_in_lists(c_NC, candidate_NC, gram_matrices(A_MD[None])[0], k, blocks, RIDGE, threshold, limit_N), ALL)
    z_NM, all_drops = torch.zeros(N, ALL, dtype=torch.float64), 0
    for n, (r_D, candidate_C) in enumerate(zip(r_ND, candidate_NC, strict=True)):
        limit = None if limit_N is None else int(limit_N[n])
        z_C, drops = pursued(r_D.numpy(), A_MD[candidate_C].numpy(), k, blocks, RIDGE, threshold, limit)
        z_NM[n, candidate_C] = torch.tensor(z_C)
        all_drops += drops > 0
    assert (found - z_NM).abs().max() <= 1e-9 and torch.equal(found > 0, z_NM > 0)
    assert all_drops >= 3 and (z_NM > 0).sum(dim=1).unique().numel() > 1


@both_ways
def test_lists_that_are_dictionaries_give_the_same_bits_and_what_is_repeated_never_joins(by):  # noqa: F811
    A_GCD, _, group_N, c_NC = problem()
    own_NC = group_N[:, None] * 40 + torch.arange(40)
    gram_MQ = gram_matrices(A_GCD.flatten(0, 1)[None])[0]
    own = matching_pursuit(c_NC, gram_matrices(A_GCD), group_N, 8, 4, RIDGE, 0.3)
    listed = matching_pursuit_in_lists(c_NC, own_NC, gram_MQ, 8, 4, RIDGE, 0.3)
    used_NK = own.values_NK > 0
    assert torch.equal(used_NK, listed.values_NK > 0) and (own.values_NK - listed.values_NK).abs().max() <= 1e-12
    assert torch.equal((own.indices_NK + 40 * group_N[:, None])[used_NK], listed.indices_NK[used_NK])
    twice_NC, twice = torch.cat([own_NC, own_NC[:, :9]], dim=1), torch.cat([c_NC, torch.full_like(c_NC[:, :9], -torch.inf)], dim=1)
    again = matching_pursuit_in_lists(twice, twice_NC, gram_MQ, 8, 4, RIDGE, 0.3)
    assert (dense(again, ALL) - dense(listed, ALL)).abs().max() <= 1e-12


@both_ways
def test_pursuit_in_lists_is_pursuit_over_everything_with_the_rest_masked(by):  # noqa: F811
    A_MD, r_ND, candidate_NC, c_NC = listed_problem()
    gram_MQ = gram_matrices(A_MD[None])[0]
    is_listed_NM = torch.zeros(N, ALL, dtype=torch.bool).scatter_(1, candidate_NC, True)
    masked_NM = (r_ND @ A_MD.T).masked_fill(~is_listed_NM, -torch.inf)
    over_all = matching_pursuit(masked_NM, gram_MQ[None], torch.zeros(N, dtype=torch.int64), 8, 4, RIDGE, 0.2)
    assert (dense(over_all, ALL) - dense(matching_pursuit_in_lists(c_NC, candidate_NC, gram_MQ, 8, 4, RIDGE, 0.2), ALL)).abs().max() <= 1e-9


@NUMBA
@pytest.mark.parametrize(("k", "blocks", "threshold"), [(16, 4, 0.0), (32, 8, 0.45)])
def test_numba_finds_in_lists_the_latents_and_values_of_pytorch(k, blocks, threshold, monkeypatch):
    """In float32, from dictionaries of 170 whose latents are listed in another order, 512 in all."""
    c_NC, gram_GCP, group_N = planted()
    gram_MQ = torch.block_diag(*gram_GCP[..., :170])
    gram_MQ = torch.nn.functional.pad(gram_MQ, (0, 2))
    order_C = torch.randperm(170, generator=torch.Generator().manual_seed(1))
    found = {}
    for on in ("0", "1"):
        monkeypatch.setenv(NUMBA_SWITCH, on)
        found[on] = matching_pursuit_in_lists(c_NC[:, order_C], group_N[:, None] * 170 + order_C, gram_MQ, k, blocks, RIDGE, threshold)
    (values_NK, indices_NK), (others_NK, places_NK) = found["0"], found["1"]
    used_NK = values_NK > 0
    assert torch.equal(used_NK, others_NK > 0) and torch.equal(indices_NK[used_NK], places_NK[used_NK])
    assert ((values_NK - others_NK).abs() <= 1e-5 * values_NK.amax(dim=1, keepdim=True)).all()
    assert not torch.equal(values_NK, others_NK), "one of them was never asked"


@both_ways
def test_impossible_lists_are_refused_and_no_rows_have_no_latents(by):  # noqa: F811
    A_MD, _, candidate_NC, c_NC = listed_problem()
    gram_MQ = gram_matrices(A_MD[None])[0]
    with pytest.raises(ValueError, match=r"k=42 latents cannot join from a dictionary of 41\. Use a smaller k"):
        matching_pursuit_in_lists(c_NC, candidate_NC, gram_MQ, 42, 1, RIDGE)
    with pytest.raises(ValueError, match=r"k=5 latents cannot join in blocks=2"):
        matching_pursuit_in_lists(c_NC, candidate_NC, gram_MQ, 5, 2, RIDGE)
    assert matching_pursuit_in_lists(c_NC[:0], candidate_NC[:0], gram_MQ, 6, 3, RIDGE).indices_NK.shape == (0, 6)


TWO = SwitchPursuitSAE.Config(num_latents=M, k=K, blocks=2, num_experts=E, experts_per_token=2)
CASES = {"two": TWO, "two, stop, shared": replace(TWO, shared=S, stop=True), "three, shared": replace(TWO, experts_per_token=3, shared=S)}


def union(expert_S, shared):
    return np.concatenate([np.arange(shared), *(own(int(expert), shared)[shared:] for expert in expert_S)])


def by_hand(sae, x_TD, expert_TS, theta):
    """[T, M]: pursuit of each token over the union of its experts and the shared latents."""
    most, z_TM = sae.config.most, np.zeros((len(expert_TS), M))
    for t, expert_S in enumerate(expert_TS):
        latents, r_D = union(expert_S, sae.num_shared), (x_TD[t] * sae.activation_scale - sae.b_pre_D).detach().numpy()
        z_TM[t, latents] = pursued(r_D, sae.W_dec_MD.detach().numpy()[latents], most, most // 2, RIDGE, theta)[0]
    return torch.tensor(z_TM)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", list(CASES))
def test_latents_reconstructions_and_gradients_of_several_routes_equal_brute_force(name, training):
    sae, x_TD = build(CASES[name]).train(training), activations()
    for buffer in ("theta", "threshold") if sae.by_threshold else ():
        sae.get_buffer(buffer).fill_(0.8 if buffer == "theta" else 0.5)
    output, theta = sae(x_TD), (0.8 if training else 0.5) if sae.by_threshold else 0.0
    scaled_TD = (x_TD * sae.activation_scale).detach()
    logits_TE = (scaled_TD - sae.router.b_D) @ sae.router.W_ED.T
    expert_TS = logits_TE.argsort(dim=1, descending=True)[:, : sae.experts_per_token]
    assert torch.equal(output.routing.expert_TS, expert_TS)
    z_TM = by_hand(sae, x_TD, expert_TS, theta)
    assert (output.latents.to_dense() - z_TM).abs().max() <= 1e-9
    across = [len({(latent - sae.num_shared) // sae.latents_per_expert for latent in np.flatnonzero(z) if latent >= sae.num_shared}) for z in z_TM]
    assert max(across) == sae.experts_per_token, "no token took latents of all its experts"
    W_MD, b_D = sae.W_dec_MD.detach().requires_grad_(), sae.b_pre_D.detach().requires_grad_()
    recon_TD = z_TM @ W_MD + b_D
    assert (output.recon_TD * sae.activation_scale - recon_TD).abs().max() <= 1e-9
    assert (sae.decode(output.latents) - output.recon_TD).abs().max() <= 1e-12
    loss = (scaled_TD - recon_TD).square().sum(dim=1).mean()
    terms = sae.loss_terms(Rows.of(x_TD), output)
    for gradient, expected in zip(
        torch.autograd.grad(terms["mse"], (sae.W_dec_MD, sae.b_pre_D)), torch.autograd.grad(loss, (W_MD, b_D)), strict=True
    ):
        assert (gradient - expected).abs().max() <= 1e-7 * expected.abs().max()
    if not training:
        assert "competition" not in terms
        return
    rivals, count = sae.router.rivals(output.routing), T // 4
    assert torch.equal(rivals.expert_nS[:, :-1], expert_TS[:count, :-1]) and not (rivals.expert_n1 == expert_TS[:count]).any()
    their_TM, p_TE = by_hand(sae, x_TD[:count], rivals.expert_nS, theta), torch.softmax(logits_TE, dim=1)[:count]
    weakest_n, rival_n = p_TE.gather(1, expert_TS[:count, -1:])[:, 0], p_TE.gather(1, rivals.expert_n1)[:, 0]
    g_n = weakest_n / (weakest_n + rival_n)
    costs = [
        ((scaled_TD[:count] - z @ sae.W_dec_MD - sae.b_pre_D).square().sum(dim=1) + theta**2 * (z > 0).double().sum(dim=1)).detach()
        for z in (z_TM[:count], their_TM)
    ]
    expected = (g_n * costs[0] + (1 - g_n) * costs[1]).mean()
    assert terms["competition"].item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = (torch.autograd.grad(each, sae.router.W_ED, retain_graph=True)[0] for each in (terms["competition"], expected))
    assert theirs.abs().max() > 0 and (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.parametrize("name", ["two", "two, stop, shared"])
def test_dead_latents_of_several_routes_by_formula(name):
    """Each of a token's experts, and the shared latents, reconstruct the residual from at most D / 2 / S of their dead ones."""
    sae, x_TD = build(CASES[name]), activations()
    residual_TD, dead_M = x_TD - x_TD.mean(dim=0), torch.arange(M) % 5 < 3
    expert_TS = sae.route(x_TD)[0].expert_TS
    W_MD = sae.W_dec_MD.detach().requires_grad_()
    recon_TD = torch.zeros_like(residual_TD)
    for t, expert_S in enumerate(expert_TS):
        for latents in ([np.arange(S)] if sae.num_shared else []) + [own(int(expert), sae.num_shared)[sae.num_shared :] for expert in expert_S]:
            dead = torch.tensor(latents)[dead_M[latents]]
            code = W_MD.detach()[dead] @ residual_TD[t]
            kept = code.topk(min(D // 4, len(dead))).indices
            recon_TD[t] = recon_TD[t] + code[kept].relu() @ W_MD[dead[kept]]
    expected = (residual_TD - recon_TD).square().sum() / (residual_TD - residual_TD.mean(dim=0)).square().sum()
    found = local_auxk_loss(residual_TD, sae.W_dec_MD, dead_M, sae.route(x_TD)[1], sae.num_shared)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = torch.autograd.grad(found, sae.W_dec_MD)[0], torch.autograd.grad(expected, W_MD)[0]
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max() and (ours[~dead_M] == 0).all() and (ours[dead_M] != 0).any()


@pytest.mark.parametrize("name", ["switch, two experts, pursuit", "switch_shared, two experts", "switch_batch_topk, two experts, shared"])
def test_encoders_of_two_experts_can_be_searched(name):
    sae, x_TD = build(replace(CONTRACTS[name])).eval(), activations()
    assert why_no_inference(sae, "pursuit") is None
    if sae.by_threshold:
        sae.threshold.fill_(0.5)
    found_TM = with_inference(sae, "pursuit").encode(x_TD).to_dense()
    most, shared = K * (1 + sae.by_threshold), sae.num_shared
    for t, expert_S in enumerate(sae.route(x_TD)[0].expert_TS):
        latents, r_D = union(expert_S, shared), (x_TD[t] * sae.activation_scale - sae.b_pre_D).detach().numpy()
        z_C = pursued(r_D, sae.W_dec_MD.detach().numpy()[latents], most, most, RIDGE, 0.5 * sae.by_threshold)[0]
        assert (found_TM[t, latents] - torch.tensor(z_C)).abs().max() <= 1e-9 and (found_TM[t] > 0).sum() == (z_C > 0).sum()


def test_one_route_searched_over_two_experts_needs_no_other_weights():
    one = build(replace(TWO, experts_per_token=1)).eval()
    two = build(TWO).eval()
    two.load_state_dict(one.state_dict())
    x_TD = activations()
    errors = [(x_TD - sae(x_TD).recon_TD).square().sum(dim=1).mean().item() for sae in (one, two)]
    assert errors[1] < errors[0]


COUNTED = {
    "one": {"architecture": "switch_pursuit", "num_experts": 8},
    "two": {"architecture": "switch_pursuit", "num_experts": 16, "experts_per_token": 2},
    "three, shared": {"architecture": "switch_pursuit", "num_experts": 30, "experts_per_token": 3, "shared": 64},
    "switch, two": {"architecture": "switch", "num_experts": 16, "experts_per_token": 2, "router": {"kind": "competition"}, "inference": "pursuit"},
    "shared_pool, two": {"architecture": "shared_pool", "num_lists": 16, "multiplicity": 2, "lists_per_token": 2, "inference": "pursuit"},
}
SIZE, TOKENS = 32, 1024
SOLVES = 2 * pursuit_macs(0, 16, 4)
"""Of a token: with no candidates, joins and renewals cost nothing."""


@pytest.fixture
def searches_counted(monkeypatch):
    """PyTorch searches, and updates of correlations are counted. Products of factors are not: PyTorch multiplies their zeros, and numba does not."""
    monkeypatch.setenv(NUMBA_SWITCH, "0")
    monkeypatch.setitem(counted.COSTS, "addcmul_", lambda sums, factor: 2 * sums.numel())
    monkeypatch.setitem(counted.COSTS, "bmm", lambda a, b: 2 * a.numel() * b.shape[2] if a.shape[2] == SIZE else 0)


@pytest.mark.parametrize("name", list(COUNTED))
def test_what_several_routes_claim_is_executed(name, searches_counted, monkeypatch):
    for module in ("topk", "gram"):
        monkeypatch.setattr(f"switch_sae.models.{module}.REFRESH_TOKENS", TOKENS)
    sae = SAES.build(SAES.from_plain({"num_latents": 1024, "k": 16, **COUNTED[name]}), SIZE, torch.Generator().manual_seed(0))
    x = torch.randn(TOKENS, SIZE, generator=torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(x), normalize_activations=True)
    claimed = sae.flops()
    searches = 1 + (sae.router.rival_share if isinstance(sae, SwitchPursuitSAE) else 0)  # an encoder's rivals encode
    trainer = Trainer(sae, TrainerConfig(lr=1e-4), total_steps=2, batch_size=TOKENS)
    assert executed_flops(lambda: trainer.step(Rows.of(x))) / TOKENS + searches * SOLVES == pytest.approx(claimed.total, rel=0.02)
    sae.eval()
    with torch.no_grad():
        sae(x)  # the Gram matrices of these weights
        assert executed_flops(lambda: sae(x)) / TOKENS + SOLVES == pytest.approx(claimed.forward, rel=0.02)


@pytest.mark.parametrize("name", ["sketch", "product_keys_exact"])
def test_what_a_search_of_retrieved_candidates_claims_is_executed(name, searches_counted):
    config = SAES.from_plain({"architecture": name, "num_latents": 1024, "k": 16, "candidates": 96, "inference": "pursuit"})
    sae, x = SAES.build(config, SIZE, torch.Generator().manual_seed(0)).eval(), torch.randn(TOKENS, SIZE)
    with torch.no_grad():
        sae(x)
        assert executed_flops(lambda: sae(x)) / TOKENS + SOLVES == pytest.approx(sae.flops().forward, rel=0.02)


def test_flops_are_counted_by_hand():
    d, m, k, e = 10, 64, 4, 4
    blocks = 2 * 32 + (8 / 3 + 2) + (8 + 8 + 8 / 3 + 4 + 8) + 32 * 2  # tests/test_inference.py, with 2 * 16 candidates
    config = SwitchPursuitSAE.Config(num_latents=m, k=k, num_experts=e, blocks=2, experts_per_token=2, gram_tokens=100)
    flops = SwitchPursuitSAE(replace(config, router=CompetitionRouter.Config(rivals=0.5)), d).flops()
    assert flops.router == 2 * d * e and flops.encode == round(2 * (32 * d + blocks)) and flops.decode == 2 * d * k
    gram = round(2 * 5 / 8 * m * m * d / 100)
    assert flops.backward == flops.decode + gram + 2 * flops.router + round(0.5 * (flops.encode + flops.decode))


def test_settings_of_several_routes():
    with pytest.raises(ValueError, match=r"experts_per_token=5 is more than num_experts=4\. Use at most 4"):
        replace(TWO, experts_per_token=5)
    with pytest.raises(ValueError, match=r"num_latents=8 gives a token 4 latents .* of which it may take 6\. Use num_latents >= 12"):
        SwitchPursuitSAE.Config(num_latents=8, k=6, blocks=2, num_experts=4, experts_per_token=2)
    everything = SwitchPursuitSAE(replace(TWO, experts_per_token=E), D)
    assert everything.router.rival_share == 0 and everything.config.candidates == M
    sae = SwitchPursuitSAE(SwitchPursuitSAE.Config(num_latents=64, k=4, num_experts=4, experts_per_token=2), 8)
    trainer = Trainer(sae, TrainerConfig(), total_steps=10, batch_size=32, execution=resolve("auto", "auto", "cpu"))
    assert "(the kernels search dictionaries that many tokens share, and here each has a list of latents of its own" in trainer.choice

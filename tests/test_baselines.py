"""What is particular to each dense baseline, against formulas written out by hand and against the libraries' own outputs."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from experiments.benchmarks.parity import CASES, GOLDEN, LIMIT, PEERS, differences, of_case
from switch_sae.models import SAES, BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, SwitchSAE, TopKSAE
from switch_sae.models.dense import encoder_linear
from switch_sae.models.jumprelu import Sparsity
from switch_sae.models.losses import normalized_auxk_loss
from switch_sae.models.pairs import above, decode_pairs, encode_pairs, largest
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 6, 40, 32


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(seed=0, rows=T):
    return normal(rows, D, seed=seed) * 3 + torch.linspace(-2, 2, D)


def build(owner, dtype=torch.float64, **settings):
    """An SAE whose every parameter is away from its start, on scaled activations."""
    sae = owner(owner.Config(num_latents=M, **settings), D, torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sae.named_parameters()):
            if name != "W_dec_MD":
                parameter.add_(0.2 * normal(*parameter.shape, seed=100 + seed).to(dtype))
    prepare(sae, Rows.of(activations(7, 512).to(dtype)), normalize_activations=True)
    return sae


def parameters(sae):
    return dict(sae.named_parameters())


def assert_same_gradients(ours, theirs, sae):
    values = list(sae.parameters())
    gradients = zip(torch.autograd.grad(ours, values, retain_graph=True), torch.autograd.grad(theirs, values, allow_unused=True), strict=True)
    for name, (found, expected) in zip(parameters(sae), gradients, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_outputs_losses_and_gradients_are_the_librarys_own(case):
    golden = load_file(GOLDEN)
    theirs = of_case(case, golden)
    assert {"latents", "recon"} <= theirs.keys()
    found = differences(case, of_case_inputs(golden), theirs)
    assert max(found.values()) <= LIMIT, found


def of_case_inputs(golden):
    return {key.removeprefix("input:"): tensor for key, tensor in golden.items() if key.startswith("input:")}


def test_the_golden_outputs_come_from_every_library_and_are_not_trivial():
    golden = load_file(GOLDEN)
    assert {case.library for case in CASES} == PEERS.keys()
    own = {"switch", "switch_refit", "switch_pursuit", "pursuit", "transcoder", "switch_transcoder", "kron", "product_keys", "product_keys_exact"}
    own |= {"switch_shared", "switch_batch_topk", "switch_scale", "shared_pool", "sketch"}
    assert {case.ours for case in CASES} == SAES.keys() - own
    for case in CASES:
        latents = of_case(case, golden)["latents"]
        assert 0.02 < (latents > 0).double().mean() < 0.98


def test_relu_loss_is_the_april_update_formula():
    sae, x = build(ReLUSAE, l1=0.7), activations()
    scaled = x * sae.activation_scale
    f = (scaled @ sae.W_enc_MD.T + sae.b_enc_M).relu()
    mse = (scaled - f @ sae.W_dec_MD - sae.b_pre_D).pow(2).sum(1).mean()
    l1 = 0.7 * (f * sae.W_dec_MD.norm(dim=1)).sum(1).mean()
    terms = sae.loss_terms(Rows.of(x), sae(x))
    torch.testing.assert_close(terms, {"mse": mse, "l1": l1}, rtol=1e-12, atol=1e-12)
    assert_same_gradients(sum(terms.values()), mse + l1, sae)


def test_relu_starts_as_published():
    sae = ReLUSAE(ReLUSAE.Config(num_latents=M), D)
    torch.testing.assert_close(sae.W_dec_MD.norm(dim=1), torch.full((M,), 0.1))
    assert torch.equal(sae.W_enc_MD, sae.W_dec_MD) and sae.b_enc_M.abs().sum() == 0 and sae.b_pre_D.abs().sum() == 0


def test_gated_loss_is_the_papers_formula_with_a_frozen_decoder_in_the_auxiliary_term():
    sae, x = build(GatedSAE, l1=0.7), activations()
    scaled = x * sae.activation_scale
    centred = scaled - sae.b_pre_D
    gate = centred @ sae.W_enc_MD.T + sae.b_gate_M
    f = (gate > 0) * (centred @ (sae.W_enc_MD * sae.r_mag_M.exp()[:, None]).T + sae.b_mag_M).relu()
    expected = {
        "mse": (scaled - f @ sae.W_dec_MD - sae.b_pre_D).pow(2).sum(1).mean(),
        "l1": 0.7 * gate.relu().sum(1).mean(),
        "gate_mse": (scaled - gate.relu() @ sae.W_dec_MD.detach() - sae.b_pre_D.detach()).pow(2).sum(1).mean(),
    }
    terms = sae.loss_terms(Rows.of(x), sae(x))
    torch.testing.assert_close(terms, expected, rtol=1e-11, atol=1e-11)
    assert_same_gradients(sum(terms.values()), sum(expected.values()), sae)
    frozen = torch.autograd.grad(terms["gate_mse"], [sae.W_dec_MD], allow_unused=True)[0]
    assert frozen is None or frozen.abs().sum() == 0


def jumprelu_by_hand(sae, x):
    """(scaled, pre, theta, K((pre - theta) / epsilon), latents)."""
    scaled = (x * sae.activation_scale).detach()
    pre = (scaled @ sae.W_enc_MD.T + sae.b_enc_M).detach()
    theta = sae.log_threshold_M.exp().detach()
    return scaled, pre, theta, (((pre - theta) / sae.bandwidth).abs() < 0.5).double(), pre * (pre > theta)


def test_jumprelu_l0_gradients_are_the_papers_estimators():
    sae, x = build(JumpReLUSAE, l0=0.03, threshold=0.5, bandwidth=0.4), activations()
    scaled, pre, theta, window, f = jumprelu_by_hand(sae, x)
    residual = f @ sae.W_dec_MD + sae.b_pre_D - scaled
    assert window.sum() > 20
    terms = sae.loss_terms(Rows.of(x), sae(x))
    torch.testing.assert_close(terms["mse"], residual.pow(2).sum(1).mean())
    torch.testing.assert_close(terms["l0"], 0.03 * D * (pre > theta).double().sum(1).mean())
    of_mse = torch.autograd.grad(terms["mse"], [sae.log_threshold_M, sae.W_enc_MD], retain_graph=True)
    of_l0 = torch.autograd.grad(terms["l0"], [sae.log_threshold_M, sae.W_enc_MD], allow_unused=True)
    downstream = 2 * residual @ sae.W_dec_MD.T / T  # d mse / d f
    # Chain rule from theta to log theta: times theta.
    torch.testing.assert_close(of_mse[0], theta * -(theta / 0.4) * (window * downstream).sum(0))
    torch.testing.assert_close(of_mse[1], ((pre > theta) * downstream).T @ scaled)
    torch.testing.assert_close(of_l0[0], theta * 0.03 * D * -(1 / 0.4) * window.sum(0) / T)
    assert of_l0[1] is None or of_l0[1].abs().sum() == 0


def test_jumprelu_tanh_is_anthropics_loss_and_its_estimator_reaches_the_encoder():
    settings = {"sparsity": Sparsity.tanh, "tanh": 0.3, "pre_act": 0.2, "tanh_steepness": 1.5}
    sae, x = build(JumpReLUSAE, threshold=0.5, bandwidth=0.8, **settings), activations()
    with torch.no_grad():
        sae.W_dec_MD.mul_(torch.linspace(0.5, 2, M, dtype=torch.float64)[:, None])
    scaled, pre, theta, window, f = jumprelu_by_hand(sae, x)
    norm = sae.W_dec_MD.norm(dim=1).detach()
    expected = {
        "mse": (f @ sae.W_dec_MD + sae.b_pre_D - scaled).pow(2).sum(1).mean(),
        "tanh": 0.3 * D * torch.tanh(1.5 * f * norm).sum(1).mean(),
        "pre_act": 0.2 * ((theta - pre).relu() * norm).sum(1).mean(),
    }
    terms = sae.loss_terms(Rows.of(x), sae(x))
    torch.testing.assert_close(terms, expected)
    downstream = 0.3 * D * 1.5 * norm * (1 - torch.tanh(1.5 * f * norm) ** 2) / T  # d tanh / d f
    jump = window * theta / 0.8 * downstream
    of_theta, of_encoder = torch.autograd.grad(terms["tanh"], [sae.log_threshold_M, sae.W_enc_MD])
    torch.testing.assert_close(of_theta, -theta * jump.sum(0))
    torch.testing.assert_close(of_encoder, ((pre > theta) * downstream + jump).T @ scaled)


def test_jumprelu_published_defaults_follow_the_scale_of_activations():
    counts, saturates = (JumpReLUSAE(JumpReLUSAE.Config(num_latents=M, sparsity=sparsity), 64) for sparsity in Sparsity)
    assert (counts.bandwidth, saturates.bandwidth) == (pytest.approx(0.008), 2.0)
    assert (counts.log_threshold_M.exp()[0].item(), saturates.log_threshold_M.exp()[0].item()) == (pytest.approx(0.008), pytest.approx(0.1))
    assert counts.recipe.unit_decoder and not saturates.recipe.unit_decoder


@pytest.mark.parametrize(
    ("owner", "settings", "scales"),
    [
        (ReLUSAE, {}, {0: 0, 1: 0.2, 5: 1, 99: 1}),
        (GatedSAE, {"sparsity_warmup": 0.1}, {0: 0, 5: 0.5, 10: 1, 99: 1}),
        (JumpReLUSAE, {}, {0: 0, 4: 0.8, 5: 1, 99: 1}),
        (JumpReLUSAE, {"sparsity": Sparsity.tanh}, {0: 0, 50: 0.5, 99: 0.99}),
        (ReLUSAE, {"sparsity_warmup": 0.0}, {0: 1, 99: 1}),
    ],
)
def test_the_sparsity_coefficient_rises_linearly_and_depends_on_the_step_alone(owner, settings, scales):
    sae, x = build(owner, **settings), activations()
    term = {ReLUSAE: "l1", GatedSAE: "l1", JumpReLUSAE: settings.get("sparsity", Sparsity.l0).value}[owner]
    full = sae.loss_terms(Rows.of(x), sae(x))
    for step, scale in reversed(scales.items()):
        sae.begin_step(step, 100)
        terms = sae.loss_terms(Rows.of(x), sae(x))
        assert terms[term].item() == pytest.approx(scale * full[term].item(), abs=1e-12)
        assert all(torch.equal(terms[name], full[name]) for name in terms.keys() - {term})


def test_recipes_reach_the_trainer_and_the_config_overrides_them():
    published = {
        "relu": (5e-5, (0.9, 0.999), None),
        "gated": (3e-4, (0.0, 0.999), "W_dec_MD"),
        "jumprelu": (7e-5, (0.0, 0.999), "W_dec_MD"),
        "batch_topk": (2e-4 / math.sqrt(M / 2**14), (0.9, 0.999), "W_dec_MD"),
        "kron": (8e-4, (0.9, 0.999), "W_dec_MD"),
    }
    for name, (lr, betas, unit_rows) in published.items():
        sae = build(SAES[name], torch.float32, **({"k": 2} if name == "batch_topk" else {}))
        trainer = Trainer(sae, TrainerConfig(), total_steps=10, batch_size=T)
        adam = trainer.engine.optimizer
        assert (trainer.schedule.peak, adam.torch_adam.defaults["betas"], adam.unit_rows) == (pytest.approx(lr), betas, unit_rows), name
        assert Trainer(sae, TrainerConfig(lr=0.5), total_steps=10, batch_size=T).schedule.peak == 0.5


def test_training_lowers_the_loss_of_every_baseline():
    for name in (key for key, cls in SAES.items() if not cls.is_routed):
        settings = {"k": 3} if hasattr(SAES[name].Config, "k") else {"l1": 0.1} if name != "jumprelu" else {}
        settings |= {"keys": 4} if hasattr(SAES[name].Config, "keys") else {}
        settings |= {"shared_pool": {"num_lists": 4}, "sketch": {"candidates": 12}}.get(name, {})
        sae = build(SAES[name], torch.float32, **settings)
        trainer = Trainer(sae, TrainerConfig(lr=3e-3, warmup_steps=0, dead_after_tokens=10**9), total_steps=300, batch_size=400)
        x = activations(rows=400).float()
        fvus = [trainer.step(Rows.of(x)).fvu() for _ in range(60)]
        assert fvus[-1] < (0.7 if sae.has_encoder else 0.8) * fvus[0], (name, fvus[0], fvus[-1])


@pytest.mark.parametrize("centred", [True, False])
def test_the_encoder_has_the_gradients_of_its_formula(centred):
    x, b_pre, W, b = (normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(5, D), (D,), (M, D), (M,)]))
    assert torch.autograd.gradcheck(encoder_linear, [x, b_pre if centred else None, W, b])
    torch.testing.assert_close(encoder_linear(x, b_pre if centred else None, W, b), (x - b_pre if centred else x) @ W.T + b)


def test_pairs_have_the_gradients_of_the_dense_formula():
    x, b_pre, W_enc, b_enc, W_dec = tensors = [
        normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(T, D), (D,), (M, D), (M,), (M, D)])
    ]
    pairs = encode_pairs(x, b_pre, W_enc, b_enc, lambda pre: largest(pre, 3 * T))
    recon = decode_pairs(pairs.values_P, pairs.latent_P, pairs.token_P, T, W_dec)
    pre = (x - b_pre) @ W_enc.T + b_enc
    dense = pre * (pairs.to_latents(T, M).to_dense() > 0)
    weights = normal(T, D, seed=9)
    torch.testing.assert_close(recon, dense @ W_dec)
    found, expected = (torch.autograd.grad((out * weights).sum(), tensors) for out in (recon, dense @ W_dec))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("owner", [BatchTopKSAE, MatryoshkaSAE])
def test_batch_topk_trains_without_encoder_biases(owner):
    sae = build(owner, torch.float32, k=3, encoder_bias=False)
    trainer = Trainer(sae, TrainerConfig(lr=1e-2, dead_after_tokens=1), total_steps=3, batch_size=T)
    before = {name: parameter.clone() for name, parameter in sae.named_parameters()}
    for step in range(3):
        trainer.step(Rows.of(activations(step).float()))
    assert before.keys() == {"W_dec_MD", "W_enc_MD", "b_pre_D"}
    assert not any(torch.equal(before[name], parameter) for name, parameter in sae.named_parameters())


@pytest.mark.parametrize(("tokens", "latents", "count"), [(1, 1, 1), (3, 5, 4), (40, 67, 200), (64, 512, 300), (64, 512, 64 * 512), (8, 16, 0)])
def test_largest_is_exact(tokens, latents, count):
    for seed in range(5):
        pre = normal(tokens, latents, seed=seed)
        values, positions = pre.flatten().topk(count)
        expected = positions[values > 0].sort().values
        assert torch.equal(largest(pre, count), expected)


def test_largest_keeps_the_count_among_ties_and_gives_only_what_is_positive():
    assert len(largest(torch.ones(50, 100), 37)) == 37
    few = torch.full((50, 100), -1.0)
    few[3, 7], few[20, 5] = 2.0, 1.0
    assert largest(few, 40).tolist() == [307, 2005] and len(largest(-torch.ones(5, 5), 3)) == 0
    rare = torch.full((100, 670), 0.5)  # every sampled position holds more than all others
    rare.view(-1)[::67] = 1.0
    assert len(largest(rare, 5000)) == 5000


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("most", [1, 3, 20, 50])
def test_at_most_so_many_of_a_row_are_among_the_largest_and_above_a_bound(most, ties):
    pre = normal(60, 40, seed=most) + normal(60, 1, seed=7)  # rows that would take nearly all of their values
    pre = (4 * pre).round() / 4 if ties else pre
    best = pre.topk(min(most, 40), dim=1)
    allowed = torch.zeros_like(pre).scatter(1, best.indices, best.values.clamp_min(0))
    for count in (0, 5, 300, 2000):
        positions = largest(pre, count, most=most)
        expected = allowed.flatten().topk(count).values
        assert torch.equal(pre.flatten()[positions].sort(descending=True).values, expected[expected > 0])
        assert (positions.diff() > 0).all() and torch.bincount(positions // 40, minlength=60).max() <= most
    for bound in (-1.0, 0.0, 0.5, 9.0):
        positions = above(pre, torch.tensor(bound), most)
        expected = allowed[allowed > max(bound, 0)]
        assert torch.equal(pre.flatten()[positions].sort().values, expected.sort().values)
        assert (positions.diff() > 0).all() and torch.bincount(positions // 40, minlength=60).max() <= most


@pytest.mark.parametrize("owner", [BatchTopKSAE, MatryoshkaSAE])
def test_batch_topk_keeps_the_largest_of_the_whole_batch_in_training(owner):
    sae, x = build(owner, k=3), activations()
    pre = (x * sae.activation_scale - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M
    kept = pre.flatten().topk(3 * T)
    expected = torch.zeros(T * M, dtype=torch.float64).scatter(0, kept.indices, kept.values).view(T, M)
    latents = sae.encode(x).to_dense()
    assert (latents > 0).sum() == 3 * T and (latents > 0).sum(1).unique().numel() > 1
    torch.testing.assert_close(latents, expected)


@pytest.mark.parametrize("owner", [BatchTopKSAE, MatryoshkaSAE])
def test_batch_topk_uses_its_threshold_in_evaluation_whatever_the_batch(owner):
    sae, x = build(owner, k=3).eval(), activations()
    pre = (x * sae.activation_scale - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M
    assert sae.threshold > 0
    latents = sae.encode(x).to_dense()
    torch.testing.assert_close(latents, pre * (pre > sae.threshold))
    torch.testing.assert_close(torch.cat([sae.encode(row).to_dense() for row in x.split(7)]), latents)
    assert 0.5 * 3 < (latents > 0).sum(1).double().mean() < 2 * 3


def test_the_threshold_starts_at_calibration_and_follows_the_smallest_kept_latent():
    sae, x = build(BatchTopKSAE, k=3), activations()
    calibration = activations(7, 512)
    smallest = sae.encode(calibration).to_dense()
    assert sae.threshold.item() == pytest.approx(smallest[smallest > 0].min().item())
    sae.begin_step(90, 1000)
    before, output = sae.threshold.item(), sae(x)
    sae.end_step(Rows.of(x), output)
    kept = output.latents.to_dense()
    beta = 91 / 100
    assert sae.threshold.item() == pytest.approx(beta * before + (1 - beta) * kept[kept > 0].min().item())
    sae.begin_step(10**6, 10**7)
    before = sae.threshold.item()
    sae.end_step(Rows.of(x), output)
    assert sae.threshold.item() == pytest.approx(0.999 * before + 0.001 * kept[kept > 0].min().item())
    with torch.no_grad():
        sae.b_enc_M.fill_(-1e6)
    before = sae.threshold.item()
    sae.end_step(Rows.of(x), sae(x))
    assert sae.threshold.item() == before


def test_evaluation_after_training_has_nearly_k_latents_per_token():
    sae = build(BatchTopKSAE, torch.float32, k=3)
    trainer = Trainer(sae, TrainerConfig(lr=3e-3), total_steps=60, batch_size=400)
    for step in range(60):
        trainer.step(Rows.of(activations(step, 400).float()))
    l0 = (sae.eval().encode(activations(99, 2000).float()).to_dense() > 0).sum(1).float().mean().item()
    assert 0.9 * 3 < l0 < 1.1 * 3


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0, 1.0]])
def test_matryoshka_loss_is_the_weighted_mean_over_prefixes(weights):
    sae, x = build(MatryoshkaSAE, k=3, group_fractions=[1 / 8, 1 / 8, 1 / 4], group_weights=weights), activations()
    assert sae.config.group_sizes == [4, 4, 8, 16]
    scaled, latents = x * sae.activation_scale, sae.encode(x).to_dense()
    losses = [(scaled - latents[:, :end] @ sae.W_dec_MD[:end] - sae.b_pre_D).pow(2).sum(1).mean() for end in (4, 8, 16, 32)]
    w = weights or [1.0] * 4
    expected = sum(weight * loss for weight, loss in zip(w, losses, strict=True)) / sum(w)
    output = sae(x)
    terms = sae.loss_terms(Rows.of(x), output)
    torch.testing.assert_close(terms, {"mse": expected})
    assert_same_gradients(terms["mse"], expected, sae)
    for prefix, end in zip(output.prefixes_GTD, (4, 8, 16, 32), strict=True):
        torch.testing.assert_close(prefix, (latents[:, :end] @ sae.W_dec_MD[:end] + sae.b_pre_D) / sae.activation_scale)


def test_auxk_of_matryoshka_looks_at_the_residual_of_all_groups():
    sae, x = build(MatryoshkaSAE, k=3, auxk_latents=M), activations()
    dead_M = torch.arange(M) % 3 == 0
    output, scaled = sae(x), x * sae.activation_scale
    pre = (scaled - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M
    recon = pre.relu()[:, dead_M] @ sae.W_dec_MD[dead_M]
    residual = (x - output.recon_TD) * sae.activation_scale
    torch.testing.assert_close(sae.loss_terms(Rows.of(x), output, dead_M)["auxk"], D / 32 * normalized_auxk_loss(residual, recon))


def test_one_group_is_batch_topk():
    nested, flat = build(MatryoshkaSAE, k=3, group_fractions=[]), build(BatchTopKSAE, k=3)
    x = activations()
    torch.testing.assert_close(nested.loss_terms(Rows.of(x), nested(x)), flat.loss_terms(Rows.of(x), flat(x)))


def test_flops_are_counted_by_hand():
    product = 2 * D * M
    for owner, backward in ((ReLUSAE, 3), (JumpReLUSAE, 3), (GatedSAE, 5)):
        flops = owner(owner.Config(num_latents=M), D).flops()
        assert (flops.router, flops.encode, flops.decode, flops.backward) == (0, product, product, backward * product)
    topk = TopKSAE(TopKSAE.Config(num_latents=M, k=3), D).flops()
    assert (
        topk == BatchTopKSAE(BatchTopKSAE.Config(num_latents=M, k=3), D).flops() == MatryoshkaSAE(MatryoshkaSAE.Config(num_latents=M, k=3), D).flops()
    )


def test_k_is_known_only_where_it_is_set():
    assert [build(owner, k=3).k for owner in (TopKSAE, BatchTopKSAE, MatryoshkaSAE)] == [3, 3, 3] and build(SwitchSAE, k=3).k == 3
    assert [build(owner).k for owner in (ReLUSAE, GatedSAE, JumpReLUSAE)] == [None] * 3


def test_latents_without_fixed_k_log_their_mean_number():
    sae, x = build(ReLUSAE, torch.float32), activations().float()
    numbers = Trainer(sae, TrainerConfig(), total_steps=10, batch_size=T).step(Rows.of(x)).numbers()
    assert numbers["l0"] == pytest.approx((F.linear(x * sae.activation_scale, sae.W_enc_MD, sae.b_enc_M) > 0).sum(1).float().mean().item(), abs=0.1)


@pytest.mark.parametrize(
    ("owner", "settings", "message"),
    [
        (ReLUSAE, {"l1": -1.0}, "l1=-1.0 must be at least 0. 0 switches the term off"),
        (GatedSAE, {"l1": float("nan")}, "l1=nan must be at least 0"),
        (ReLUSAE, {"num_latents": 0}, "num_latents=0 must be at least 1"),
        (GatedSAE, {"sparsity_warmup": 1.5}, r"sparsity_warmup=1.5 must lie between 0 \(full from the start\) and 1"),
        (JumpReLUSAE, {"bandwidth": 0.0}, "bandwidth=0.0 must be a positive number"),
        (JumpReLUSAE, {"l0": -0.1}, "l0=-0.1 must be at least 0"),
        (BatchTopKSAE, {"threshold_beta": 1.0}, r"threshold_beta=1.0 must lie in \[0, 1\)"),
        (BatchTopKSAE, {"k": 5000}, "k=5000 is more than num_latents=4096"),
        (MatryoshkaSAE, {"group_fractions": [0.5, 0.5]}, "must be positive and sum to less than 1"),
        (MatryoshkaSAE, {"num_latents": 16, "k": 2}, r"num_latents=16 gives groups of \[0, 1, 2, 4, 9\] latents"),
        (MatryoshkaSAE, {"group_weights": [1.0]}, r"group_weights=\[1.0\] must be 5 numbers of at least 0"),
    ],
)
def test_impossible_configs_say_value_rule_and_fix(owner, settings, message):
    with pytest.raises(ValueError, match=message):
        owner.Config(**settings)

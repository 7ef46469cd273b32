"""The contract of every architecture in `SAES`, and what is particular to each."""

from dataclasses import replace

import pytest
import torch
from configs import ARCHITECTURES, CONTRACTS, ROUTED

from switch_kernels import encode_topk_reference, sparse_decode_reference
from switch_sae.models import ROUTERS, SAES, Inference, SwitchSAE, TopKSAE
from switch_sae.models.losses import geometric_median
from switch_sae.models.routers import Gate
from switch_sae.models.routers.base import load_balance_loss
from switch_sae.models.topk import EncoderInit
from switch_sae.rows import Rows
from switch_sae.runs import load_sae, save_sae
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T = 12, 96
WITH_AUXK = [name for name, config in CONTRACTS.items() if hasattr(config, "auxk_latents") and "pursuit" not in name]
WITH_ROWS = [name for name in WITH_AUXK if hasattr(SAES.build(CONTRACTS[name], 12), "W_enc_MD")]
B_PRE_STARTS_AT_0 = ("relu", "jumprelu")


def test_every_architecture_and_router_is_under_contract():
    assert ARCHITECTURES.keys() == SAES.keys() and {SAES.key_of(config) for config in CONTRACTS.values()} == SAES.keys()
    assert all(SAES.key_of(config) == name for name, config in ARCHITECTURES.items())
    assert {ROUTERS.key_of(config) for config in ROUTED.values()} == ROUTERS.keys()
    assert {config.gate for config in ROUTED.values() if hasattr(config, "gate")} == set(Gate)


@pytest.fixture(params=list(CONTRACTS))
def name(request):
    return request.param


def encoder_biases(sae):
    return [parameter for name, parameter in sae.named_parameters() if name in ("b_enc_M", "b_gate_M", "b_mag_M", "b_key_P")]


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=generator) * 3 + torch.linspace(-2, 2, D)


def build(config, dtype: torch.dtype = torch.float32):
    sae = SAES.build(config, D, torch.Generator().manual_seed(1)).to(dtype)
    prepare(sae, Rows.of(activations(7, 512).to(dtype)), normalize_activations=True)
    return sae


def losses_of(sae, x, dead=None):
    return sae.loss_terms(Rows.of(x), sae(x), dead)


def test_every_parameter_gets_a_gradient(name):
    sae = build(CONTRACTS[name])
    sum(losses_of(sae, activations()).values()).backward()
    for parameter_name, parameter in sae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", WITH_ROWS)
def test_auxk_reaches_every_parameter_of_dead_latents_and_no_others(name):
    sae = build(replace(CONTRACTS[name], auxk_latents=6))
    with torch.no_grad():
        sae.b_enc_M[::3] = -50.0  # these cannot fire
        sae.b_enc_M[::3].add_(torch.rand(16))
    x = activations(rows=400)
    output = sae(x)
    dead_M = torch.zeros(48, dtype=torch.bool)
    dead_M[::3] = True
    assert output.latents.firing_counts()[dead_M].sum() == 0
    with torch.no_grad():
        sae.b_enc_M[::3] = 0.0
    term = sae.loss_terms(Rows.of(x), output, dead_M)["auxk"]
    gradients = dict(
        zip(("W_enc", "W_dec", "b_enc"), torch.autograd.grad(term, (sae.W_enc_MD, sae.W_dec_MD, sae.b_enc_M), retain_graph=True), strict=True)
    )
    for which, gradient in gradients.items():
        rows = gradient.reshape(48, -1).abs().sum(1)
        assert (rows[dead_M] > 0).all(), which
        assert (rows[~dead_M] == 0).all(), which
    others = [p for n, p in sae.named_parameters() if "router" in n or n == "b_pre_D"]
    assert all(g is None or g.abs().sum() == 0 for g in torch.autograd.grad(term, others, allow_unused=True))


@pytest.mark.parametrize("name", WITH_AUXK)
def test_auxk_lowers_the_residual_of_dead_latents_when_it_is_all_that_trains(name):
    sae = build(replace(CONTRACTS[name], auxk_latents=8))
    x = activations(rows=400)
    dead_M = torch.zeros(48, dtype=torch.bool)
    dead_M[::2] = True
    with torch.no_grad():
        output = sae(x)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    seen = []
    for _ in range(60):
        term = sae.loss_terms(Rows.of(x), output, dead_M)["auxk"]
        seen.append(term.item())
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    assert seen[-1] < 0.8 * seen[0]


@pytest.fixture(params=["training", "evaluation"])
def training(request):
    return request.param == "training"


def test_decode_of_encode_equals_forward_exactly(name, training):
    sae, x = build(CONTRACTS[name]).train(training), activations()
    assert torch.equal(sae.decode(sae.encode(x)), sae(x).recon_TD)


def test_dense_latents_times_decoder_is_the_reconstruction(name, training):
    sae, x = build(CONTRACTS[name], torch.float64).train(training), activations().double()
    dense = sae.encode(x).to_dense() @ sae.W_dec_MD + sae.b_out_D
    torch.testing.assert_close(dense / sae.target_scale, sae(x).recon_TD, rtol=1e-10, atol=1e-10)


def test_latents_that_somebody_made_negative_are_decoded_too(name):
    """An intervention may turn a latent round: decoding is linear in dense latents of either sign."""
    sae = build(CONTRACTS[name], torch.float64).eval()
    dense = sae.encode(activations().double()).to_dense()
    nothing = sae.decode(torch.zeros_like(dense))
    torch.testing.assert_close(sae.decode(-dense) - nothing, nothing - sae.decode(dense), rtol=1e-10, atol=1e-10)


def test_at_most_k_latents_fire_and_only_positive_ones_count(name):
    latents = build(CONTRACTS[name]).encode(activations())
    dense = latents.to_dense()
    assert dense.shape == (T, 48) and (dense >= 0).all()
    if not build(CONTRACTS[name]).by_threshold and hasattr(CONTRACTS[name], "k"):
        assert ((dense > 0).sum(1) <= 4).all()
    assert torch.equal(latents.firing_counts(), (dense > 0).sum(0).float())


def test_zero_valued_slots_do_not_count_as_fired(name, training):
    sae = build(CONTRACTS[name]).train(training)
    if sae.inference is Inference.pursuit:
        pytest.skip("no encoder decides what fires")
    with torch.no_grad():
        for bias in encoder_biases(sae):
            bias.fill_(-1e3)
    output = sae(activations())
    assert output.latents.firing_counts().sum() == 0
    torch.testing.assert_close(output.recon_TD, (sae.b_out_D / sae.target_scale).expand(T, D))


def test_permuting_tokens_permutes_outputs(name, training):
    sae, x = build(CONTRACTS[name], torch.float64).train(training), activations().double()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sae(x).recon_TD[order], sae(x[order]).recon_TD, rtol=1e-11, atol=1e-11)


def test_a_step_keeps_decoder_rows_on_the_unit_sphere_and_is_deterministic(name):
    weights = []
    for _ in range(2):
        trainer = Trainer(build(CONTRACTS[name]), TrainerConfig(lr=1e-2), total_steps=5, batch_size=T)
        for step in range(5):
            trainer.step(Rows.of(activations(step)))
        weights.append(trainer.sae.W_dec_MD.detach().clone())
    assert torch.equal(*weights)
    if trainer.sae.recipe.unit_decoder:
        torch.testing.assert_close(weights[0].norm(dim=1), torch.ones(48), rtol=0, atol=1e-6)


def test_stop_and_resume_equals_a_straight_run_bit_for_bit(name):
    def trainer():
        return Trainer(build(CONTRACTS[name]), TrainerConfig(lr=1e-2, dead_after_tokens=2 * T), total_steps=8, batch_size=T)

    straight, first, second = trainer(), trainer(), trainer()
    for step in range(8):
        straight.step(Rows.of(activations(step)))
        if step < 4:
            first.step(Rows.of(activations(step)))
    tensors, state = first.state_dict()
    second.load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, state)
    for step in range(4, 8):
        second.step(Rows.of(activations(step)))
    expected, found = straight.state_dict()[0], second.state_dict()[0]
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key


def test_save_and_load_is_bit_exact_and_takes_no_arguments(name, tmp_path):
    trainer, x = Trainer(build(CONTRACTS[name]), TrainerConfig(lr=1e-2), total_steps=3, batch_size=T), activations()
    for step in range(3):
        trainer.step(Rows.of(activations(step)))
    save_sae(tmp_path / "model.safetensors", trainer.sae)
    loaded = load_sae(tmp_path / "model.safetensors")
    assert type(loaded) is type(trainer.sae) and loaded.config == trainer.sae.config and not loaded.training
    for key, tensor in trainer.sae.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key
    assert torch.equal(trainer.sae.eval()(x).recon_TD, loaded(x).recon_TD)


def test_folding_the_scale_leaves_the_function_unchanged(name, training):
    sae, x = build(CONTRACTS[name], torch.float64).train(training), activations().double()
    with torch.no_grad():
        for bias in encoder_biases(sae):
            bias.normal_(generator=torch.Generator().manual_seed(5))
    before, scale, W_dec = sae(x), sae.activation_scale.item(), sae.W_dec_MD.clone()
    assert abs(scale - 1) > 0.1
    sae.fold_activation_scale()
    after = sae(x)
    assert sae.activation_scale.item() == 1
    torch.testing.assert_close(after.recon_TD, before.recon_TD, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.latents.to_dense() * scale, before.latents.to_dense(), rtol=1e-10, atol=1e-10)
    assert torch.equal(sae.W_dec_MD, W_dec)
    if sae.recipe.unit_decoder:
        torch.testing.assert_close(sae.W_dec_MD.norm(dim=1), torch.ones(48, dtype=torch.float64))


def test_the_scale_makes_the_mean_squared_norm_d(name):
    sae, x = build(CONTRACTS[name]), activations(7, 512)
    assert abs((x * sae.activation_scale).pow(2).sum(1).mean().item() / D - 1) < 1e-5
    start = torch.zeros(D) if name in B_PRE_STARTS_AT_0 else geometric_median(x)
    torch.testing.assert_close(sae.b_pre_D.detach() / sae.activation_scale, start, rtol=1e-3, atol=1e-3)


def test_wrong_width_is_refused_with_the_rule(name):
    with pytest.raises(ValueError, match=r"shape \(3, 5\); this SAE takes \[\.\.\., d_in=12\]"):
        build(CONTRACTS[name]).encode(torch.zeros(3, 5))


@pytest.mark.parametrize(("experts", "slots", "joint"), [(1, 1, True), (4, 1, True), (8, 1, True), (4, 2, True), (4, 2, False), (4, 4, True)])
def test_outputs_and_gradients_equal_the_masked_dense_formulation(experts, slots, joint):
    """The whole Switch SAE, router included, against the equations as published: every expert computed, then masked."""
    config = SwitchSAE.Config(num_latents=48, k=4, num_experts=experts, experts_per_token=slots, joint_topk=joint)
    sae, x = build(config, torch.float64), activations().double()
    terms = losses_of(sae, x)
    gradients = torch.autograd.grad(sum(terms.values()), list(sae.parameters()))

    scaled = x * sae.activation_scale
    probs = torch.softmax((scaled - sae.router.b_D) @ sae.router.W_ED.T, dim=1)
    gate, expert = probs.topk(slots, dim=1)
    _, dispatch = sae.route(x)
    selection = encode_topk_reference(scaled, sae.b_pre_D, gate, sae.W_enc_MD, sae.b_enc_M, dispatch, 4, joint)
    recon = sparse_decode_reference(selection.values_TK, selection.indices_TK, sae.W_dec_MD) + sae.b_pre_D
    loss = (scaled - recon).pow(2).sum(1).mean() + config.router.load_balance * D * load_balance_loss(expert, probs)
    expected = torch.autograd.grad(loss, list(sae.parameters()))

    torch.testing.assert_close(sum(terms.values()), loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sae(x).recon_TD, recon / sae.activation_scale, rtol=1e-10, atol=1e-10)
    for (parameter_name, _), ours, theirs in zip(sae.named_parameters(), gradients, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max().clamp_min(1e-12), parameter_name


def test_one_expert_equals_topk_exactly_through_training():
    topk = build(ARCHITECTURES["topk"])
    switch = build(SwitchSAE.Config(num_latents=48, k=4, num_experts=1))
    trainers = [Trainer(sae, TrainerConfig(lr=1e-2, dead_after_tokens=200), total_steps=8, batch_size=T) for sae in (topk, switch)]
    for step in range(8):
        for trainer in trainers:
            trainer.step(Rows.of(activations(step)))
    for parameter_name, parameter in topk.named_parameters():
        assert torch.equal(parameter, dict(switch.named_parameters())[parameter_name]), parameter_name
    assert torch.equal(topk(activations()).recon_TD, switch(activations()).recon_TD)


def test_auxk_with_two_experts_per_token_equals_the_dense_formula():
    sae, x = build(SwitchSAE.Config(num_latents=48, k=4, num_experts=4, experts_per_token=2, auxk_latents=6), torch.float64), activations().double()
    dead_M = torch.arange(48) % 3 == 0
    output, scaled = sae(x), x * sae.activation_scale
    residual = (scaled - output.recon_TD * sae.activation_scale).detach()
    pre = (scaled - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M
    recon = torch.zeros_like(scaled)
    for slot in range(2):
        expert, gate = output.routing.expert_TS[:, slot], output.routing.gate_TS[:, slot]
        allowed = dead_M & (torch.arange(48) // 12 == expert[:, None])
        top = pre.masked_fill(~allowed, float("-inf")).topk(3, dim=1)
        recon += gate[:, None] * (torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ sae.W_dec_MD)
    expected = (residual - recon).pow(2).sum() / (residual - residual.mean(0)).pow(2).sum() / 32 * D
    torch.testing.assert_close(sae.loss_terms(Rows.of(x), output, dead_M)["auxk"], expected)


def test_experts_own_consecutive_latents():
    output = build(ARCHITECTURES["switch"])(activations())
    assert torch.equal(output.latents.indices_TK // 12, output.routing.expert_TS.expand(-1, 4))


def test_router_and_centre_have_biases_of_their_own():
    sae = build(ARCHITECTURES["switch"])
    assert sae.b_pre_D.data_ptr() != sae.router.b_D.data_ptr()
    trainer = Trainer(sae, TrainerConfig(lr=1e-2), total_steps=4, batch_size=T)
    for step in range(4):
        trainer.step(Rows.of(activations(step)))
    assert not torch.allclose(sae.b_pre_D, sae.router.b_D)


def test_a_frozen_router_stays_as_it_was():
    sae = build(replace(ARCHITECTURES["switch"], router=replace(ROUTED["softmax"], train=False)))
    before = sae.router.W_ED.clone()
    trainer = Trainer(sae, TrainerConfig(lr=1e-2), total_steps=3, batch_size=T)
    for step in range(3):
        trainer.step(Rows.of(activations(step)))
    assert torch.equal(before, sae.router.W_ED) and "router.W_ED" not in trainer.engine.optimizer.parameters


def test_load_balance_loss_is_1_when_balanced_and_e_when_collapsed():
    even = torch.full((8, 4), 0.25)
    assert load_balance_loss(torch.arange(8)[:, None] % 4, even).item() == pytest.approx(1)
    one_sided = torch.nn.functional.one_hot(torch.zeros(8, dtype=torch.int64), 4).float()
    assert load_balance_loss(torch.zeros(8, 1, dtype=torch.int64), one_sided).item() == pytest.approx(4)


def test_the_paper_initialisation_is_that_of_a_linear_layer():
    config = SwitchSAE.Config(num_latents=2048, k=4, num_experts=4, encoder_init=EncoderInit.linear, encoder_bias=False)
    sae = SwitchSAE(config, D, torch.Generator().manual_seed(0))
    assert sae.b_enc_M is None and sae.W_enc_MD.abs().max() <= D**-0.5 and sae.W_enc_MD.std().item() == pytest.approx((1 / 3 / D) ** 0.5, rel=0.05)
    torch.testing.assert_close(sae.W_dec_MD, torch.nn.functional.normalize(sae.W_enc_MD, dim=1))


def test_flops_are_counted_by_hand():
    flops = SwitchSAE(SwitchSAE.Config(num_latents=64, k=2, num_experts=4), 10).flops()
    assert (flops.router, flops.encode, flops.decode, flops.backward) == (2 * 10 * 4, 2 * 10 * 16, 2 * 10 * 2, 3 * 2 * 10 * 2 + 2 * 2 * 10 * 4)
    two = SwitchSAE(SwitchSAE.Config(num_latents=64, k=2, num_experts=4, experts_per_token=2), 10).flops()
    assert two.encode == 2 * flops.encode and (two.router, two.decode, two.backward) == (flops.router, flops.decode, flops.backward)
    dense = TopKSAE(TopKSAE.Config(num_latents=64, k=2), 10).flops()
    assert dense.router == 0 and dense.encode == 2 * 10 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_latents": 50, "num_experts": 8}, r"num_latents=50 is not divisible by num_experts=8.*nearest that fits is num_latents=48"),
        ({"num_latents": 48, "num_experts": 8, "k": 7}, r"k=7 is more than the 6 latents of one expert.*Use k <= 6, or num_latents >= 56"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"auxk": -1.0}, "auxk=-1.0 must be at least 0. 0 switches AuxK off"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token=5 must lie between 1 and num_experts=4"),
        ({"k": 5, "experts_per_token": 2, "joint_topk": False}, "k=5 does not divide evenly among experts_per_token=2. Use k=4, or joint_topk=true"),
    ],
)
def test_impossible_configs_say_value_rule_and_fix(change, message):
    with pytest.raises(ValueError, match=message):
        SwitchSAE.Config(**change)

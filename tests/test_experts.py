"""Experts as a design space: shared latents, a linear path, gates after selection, a threshold over all experts, scaled features. Each against its
equations with every expert computed and masked (float64, all gradients), and what is particular to it."""

from dataclasses import replace

import pytest
import torch
from configs import ROUTED
from masked import above, best_of_each_token, best_of_the_batch, by_formula, gates, scaled_encoder

from switch_sae.models import SAES, Inference, SwitchBatchTopKSAE, SwitchSAE, SwitchScaleSAE, SwitchSharedSAE, why_no_inference, with_inference
from switch_sae.models.attribution import attribute
from switch_sae.models.inference import RIDGE
from switch_sae.models.routers import ROUTERS, SoftmaxRouter
from switch_sae.models.routers.renormalised import RenormalisedRouter, Scores
from switch_sae.models.routers.two_level import TwoLevelRouter
from switch_sae.rows import Rows
from switch_sae.runs import load_sae, save_sae
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M, K = 12, 96, 48, 4
SHARED = SwitchSharedSAE.Config(num_latents=M, k=K, num_experts=4, shared=8)
BATCH = SwitchBatchTopKSAE.Config(num_latents=M, k=K, num_experts=4)
SCALE = SwitchScaleSAE.Config(num_latents=M, k=K, num_experts=4, omega=0.3)
OF_EACH_TOKEN = {
    "shared": SHARED,
    "always on": SwitchSharedSAE.Config(num_latents=M, k=K, num_experts=3),
    "no shared": replace(SHARED, shared=0),
    "shared, no encoder bias": replace(SHARED, encoder_bias=False),
    "shared, gate after selection": replace(SHARED, gate_in_selection=False),
    "shared, two experts": replace(SHARED, experts_per_token=2),
    "shared, three experts, gate after selection": replace(SHARED, experts_per_token=3, gate_in_selection=False),
    "path": replace(SHARED, path_rank=3),
    "path first": replace(SHARED, path_rank=3, path_first=True, experts_per_token=2),
    "two experts, gate after selection": SwitchSAE.Config(num_latents=M, k=K, num_experts=4, experts_per_token=2, gate_in_selection=False),
    "scale": SCALE,
    "scale, one expert": replace(SCALE, experts_per_token=1),
    "scale, three experts, gate after selection": replace(SCALE, experts_per_token=3, gate_in_selection=False),
}
OF_THE_BATCH = {
    "batch": BATCH,
    "batch, gate after selection": replace(BATCH, gate_in_selection=False),
    "batch, two experts": replace(BATCH, experts_per_token=2),
    "batch, two experts, shared, path first": replace(BATCH, experts_per_token=2, shared=8, path_rank=2, path_first=True),
    "batch, shared, gate after selection": replace(BATCH, shared=8, gate_in_selection=False),
}
ALL = OF_EACH_TOKEN | OF_THE_BATCH


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + torch.linspace(-2, 2, D)


def build(config, dtype: torch.dtype = torch.float64):
    """With biases, T and a path that are not at their starts."""
    sae = SAES.build(config, D, torch.Generator().manual_seed(1)).to(dtype)
    prepare(sae, Rows.of(activations(7, 512).to(dtype)), normalize_activations=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        moved = [sae.b_enc_M, getattr(sae, "T_DD", None), getattr(sae, "omega_E", None), getattr(getattr(sae, "path", None), "W_up_OR", None)]
        for weight in moved:
            if weight is not None:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return sae


def balance(sae, x):
    return sum(sae.router.loss_terms(sae(x).routing, sae.d_out).values())


def selection(sae, training):
    if not sae.by_threshold:
        return best_of_each_token(K)
    return best_of_the_batch(K) if training else above(sae.threshold)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", list(ALL))
def test_outputs_and_all_gradients_are_those_of_computing_every_expert_and_masking(name, training):
    sae, x = build(ALL[name]).train(training), activations()
    output = sae(x)
    terms = sae.loss_terms(Rows.of(x), output)
    latents_TM, recon_TD, loss = by_formula(sae, x, selection(sae, training))
    assert 0.5 * K * T < (latents_TM > 0).sum() <= (K * T if training or not sae.by_threshold else 2 * K * T)
    torch.testing.assert_close(output.latents.to_dense(), latents_TM, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.recon_TD, recon_TD, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["mse"], loss, rtol=1e-11, atol=1e-11)
    parameters = list(sae.parameters())
    found = torch.autograd.grad(sum(terms.values()), parameters)
    for (key, _), ours, theirs in zip(sae.named_parameters(), found, torch.autograd.grad(loss + balance(sae, x), parameters), strict=True):
        assert theirs.abs().max() > 0 and (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), key


@pytest.mark.parametrize(
    "name", ["shared", "shared, two experts", "path first", "always on", "two experts, gate after selection", "batch, two experts"]
)
def test_auxk_and_its_gradients_are_those_of_dead_latents_of_shared_ones_and_of_each_expert(name):
    sae, x = build(replace(ALL[name], auxk_latents=6)), activations()
    dead_M = torch.arange(M) % 2 == 0
    output = sae(x)
    ours = sum(sae.loss_terms(Rows.of(x), output, dead_M).values())
    theirs = by_formula(sae, x, selection(sae, True), dead_M)[2] + balance(sae, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    parameters = list(sae.parameters())
    expected = torch.autograd.grad(theirs, parameters)
    for (key, _), one, other in zip(sae.named_parameters(), torch.autograd.grad(ours, parameters), expected, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max(), key


def test_gates_below_1_favour_shared_latents_unless_they_come_after_the_selection():
    router = SoftmaxRouter.Config(load_balance=0.1)
    shares = {}
    for inside in (True, False):
        sae, x = build(replace(SHARED, router=router, gate_in_selection=inside)), activations()
        dense = sae.encode(x).to_dense()
        shares[inside] = ((dense[:, :8] > 0).sum() / (dense > 0).sum()).item()
    assert shares[True] > shares[False] + 0.1


def test_a_gate_after_selection_changes_nothing_where_each_token_has_one_gate():
    config = SwitchSAE.Config(num_latents=M, k=K, num_experts=4)
    one, other = build(config), build(replace(config, gate_in_selection=False))
    assert torch.equal(one(activations()).recon_TD, other(activations()).recon_TD)


def test_an_expert_that_is_always_on_is_as_wide_as_the_others_and_takes_what_is_left():
    sizes = {M: replace(SHARED, shared=None, num_latents=M) for M in (50, 51, 54)}
    assert [(config.num_shared, config.latents_per_expert) for config in sizes.values()] == [(10, 10), (11, 10), (14, 10)]


def test_no_expert_without_a_choice_of_its_own_is_the_switch_sae():
    """Without shared latents, path and threshold it computes what `SwitchSAE` does."""
    switch, shared = build(SwitchSAE.Config(num_latents=M, k=K, num_experts=4)), build(replace(SHARED, shared=0))
    torch.testing.assert_close(shared(activations()).recon_TD, switch(activations()).recon_TD, rtol=1e-12, atol=1e-12)


def test_a_path_starts_at_0_learns_and_is_folded_saved_and_counted(tmp_path):
    config = replace(SHARED, path_rank=3)
    sae = SAES.build(config, D, torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(activations(7, 512).float()), normalize_activations=True)
    trainer, x = Trainer(sae, TrainerConfig(lr=1e-2), total_steps=20, batch_size=T), activations().float()
    assert (sae.path.weight() == 0).all()
    for step in range(20):
        trainer.step(Rows.of(activations(step).float()))
    assert torch.linalg.matrix_rank(sae.path.weight()) == 3
    save_sae(tmp_path / "model.safetensors", sae.eval())
    before = sae(x).recon_TD
    assert torch.equal(load_sae(tmp_path / "model.safetensors")(x).recon_TD, before)
    sae.fold_activation_scale()
    torch.testing.assert_close(sae(x).recon_TD, before, rtol=1e-4, atol=1e-4)
    plain = build(SHARED).flops()
    assert sae.flops().encode - plain.encode == 2 * 3 * 2 * D, "2 r latents' worth"
    assert sae.flops().backward - plain.backward == 2 * 3 * (D + 2 * D) + 2 * 3 * D
    assert build(replace(config, path_first=True)).flops().backward - sae.flops().backward == 2 * D * K


def test_what_a_path_gave_travels_with_the_latents_and_nothing_is_decoded_without():
    for config in (ALL["path first"], ALL["batch, two experts, shared, path first"]):
        sae, x = build(config).eval(), activations()
        latents = sae.encode(x)
        assert torch.equal(sae.decode(latents), sae(x).recon_TD)
        assert torch.equal(sae.decode(sae.encode(x.view(4, 24, D))), sae(x).recon_TD.view(4, 24, D))
        with pytest.raises(ValueError, match="hold nothing of the linear path"):
            sae.decode(latents.to_dense())
        for inference in ("refit", "pursuit"):
            assert "linear path, which least squares would have to take off first" in why_no_inference(sae, inference)


@pytest.mark.parametrize("name", ["shared, two experts", "path first", "scale", "batch, two experts, shared, path first"])
def test_attribution_knows_what_latents_read_and_what_gates_them(name):
    sae, x = build(ALL[name]).eval(), activations()
    found = attribute(sae, Rows.of(x), torch.linspace(-1, 1, D, dtype=torch.float64))
    torch.testing.assert_close(found.total_T, x @ torch.linspace(-1, 1, D, dtype=torch.float64))
    path_weight = sae.path.weight() if getattr(sae, "path", None) is not None and sae.config.path_first else torch.zeros(D, D, dtype=torch.float64)
    rows_MD = (scaled_encoder(sae) @ (torch.eye(D, dtype=torch.float64) - path_weight)) * sae.activation_scale
    gate_TK = gates(sae, sae(x).routing).gather(1, found.latents.indices_TK)
    fired_TK1 = (found.latents.values_TK > 0)[..., None]
    torch.testing.assert_close(found.readers_TKD, torch.where(fired_TK1, gate_TK[..., None] * rows_MD[found.latents.indices_TK], 0.0))


@pytest.mark.parametrize("name", list(ROUTED))
@pytest.mark.parametrize("config", [replace(SHARED, experts_per_token=2), replace(BATCH, shared=8), SCALE], ids=["shared", "batch", "scale"])
def test_every_router_and_gate_serves_every_kind_of_expert(name, config):
    sae, x = build(replace(config, router=replace(ROUTED[name]))), activations()
    latents_TM, recon_TD, _ = by_formula(sae, x, selection(sae, True))
    output = sae(x)
    torch.testing.assert_close(output.latents.to_dense(), latents_TM, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.recon_TD, recon_TD, rtol=1e-10, atol=1e-10)
    trainer = Trainer(sae.float(), TrainerConfig(lr=1e-2), total_steps=3, batch_size=T)
    assert all(trainer.step(Rows.of(activations(step).float())).terms["mse"] > 0 for step in range(3))


def test_training_keeps_k_latents_per_token_on_average_and_evaluation_looks_at_no_other_token():
    sae, x = build(ALL["batch, two experts"]), activations()
    l0_T = (sae.encode(x).to_dense() > 0).sum(dim=1)
    assert l0_T.sum() == K * T and len(l0_T.unique()) > 3
    per_expert = [l0_T[sae(x).routing.expert_TS[:, 0] == e].float().mean().item() for e in range(4)]
    assert max(per_expert) > 1.1 * min(per_expert), "experts share one threshold, not k"
    sae.eval()
    alone = torch.cat([sae.encode(row[None]).to_dense() for row in x])
    torch.testing.assert_close(alone, sae.encode(x).to_dense(), rtol=1e-12, atol=1e-12)
    sae.train()
    assert not torch.equal(sae.encode(x[:10]).to_dense() > 0, sae.encode(x).to_dense()[:10] > 0)


@pytest.mark.parametrize("name", ["batch", "batch, shared, gate after selection"])
def test_the_threshold_is_a_running_mean_of_the_smallest_score_that_was_selected(name):
    sae = build(ALL[name], torch.float32)
    trainer, expected = Trainer(sae, TrainerConfig(lr=1e-3), total_steps=6, batch_size=T), sae.threshold.item()
    assert expected > 0
    for step in range(6):
        x = activations(step).float()
        with torch.no_grad():
            output = sae(x)
            gate_T1 = output.routing.gate_TS
            dense = output.latents.to_dense()
            own = torch.cat([torch.ones(T, sae.num_shared), gate_T1.expand(T, M - sae.num_shared)], dim=1)
            score = dense if sae.config.gate_in_selection else dense / own
            smallest = score[dense > 0].min().item()
        beta = min(0.999, (1 + step) / (10 + step))
        expected = smallest + beta * (expected - smallest)
        trainer.step(Rows.of(x))
        assert sae.threshold.item() == pytest.approx(expected, rel=1e-5)


def test_of_one_expert_the_gate_is_1_and_the_reconstruction_teaches_the_router_nothing():
    """Scale SAE's trap: its baseline of one expert per token has a softmax over one number."""
    for scores in Scores:
        for experts in (1, 2):
            sae = build(replace(SCALE, experts_per_token=experts, router=RenormalisedRouter.Config(scores=scores)))
            x = activations()
            output = sae(x)
            mse = sae.loss_terms(Rows.of(x), output)["mse"]
            gradients = torch.autograd.grad(mse, list(sae.router.parameters()), allow_unused=True)
            if experts == 1:
                assert (output.routing.gate_TS == 1).all() and all(gradient is None for gradient in gradients)
            else:
                assert (output.routing.gate_TS < 1).all() and all(gradient.abs().max() > 0 for gradient in gradients)
                torch.testing.assert_close(output.routing.gate_TS.sum(dim=1), torch.ones(T, dtype=torch.float64))


def test_a_softmax_of_probabilities_flattens_them():
    router = ROUTERS.build(RenormalisedRouter.Config(), D, 3, 2, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        router.W_ED.zero_()
        router.c_E.copy_(torch.tensor([0.05, 0.9, 0.05]).log())
    routing = router.route(activations(rows=1))
    assert routing.probs_TE[0, 1].item() == pytest.approx(0.9)
    assert routing.gate_TS[0].tolist() == pytest.approx([0.7006, 0.2994], abs=1e-4)


def test_nothing_but_balance_could_train_a_router_whose_gate_is_always_1():
    with pytest.raises(ValueError, match=r"gates of exactly 1, and load_balance=0 leaves nothing that could train it. Use experts_per_token=2"):
        build(SwitchSAE.Config(num_latents=M, k=K, num_experts=4, router=RenormalisedRouter.Config(load_balance=0.0)))


def test_feature_scaling_reaches_no_encoder_that_plain_weights_do_not_and_the_reverse():
    """For any V, omega > -1 and T with (1 + omega) I - omega T invertible there are W whose scaled features are V."""
    sae = build(SCALE)
    wanted_MD = torch.randn(M, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        for e, own in enumerate(range(0, M, 12)):
            omega, V_FD = sae.omega_E[e], wanted_MD[own : own + 12]
            mean_D = torch.linalg.solve((1 + omega) * torch.eye(D, dtype=torch.float64) - omega * sae.T_DD, V_FD.mean(dim=0))
            a_D = sae.T_DD @ mean_D
            sae.W_enc_MD[own : own + 12] = a_D + (V_FD - a_D) / (1 + omega)
    torch.testing.assert_close(sae.encoder_weight(), wanted_MD, rtol=1e-10, atol=1e-10)


def test_feature_scaling_folds_exactly_and_a_switch_sae_computes_the_same():
    sae, x = build(SCALE).eval(), activations()
    before = sae(x)
    folded = sae.folded()
    assert type(folded) is SwitchSAE and not folded.training
    assert torch.equal(folded(x).recon_TD, before.recon_TD) and torch.equal(folded.encode(x).to_dense(), before.latents.to_dense())
    assert not torch.equal(sae.encoder_weight(), sae.W_enc_MD)
    sae.fold_features()
    torch.testing.assert_close(sae(x).recon_TD, before.recon_TD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.encoder_weight(), sae.W_enc_MD, rtol=1e-12, atol=1e-12)


def test_at_the_published_start_scaling_is_the_identity_and_its_transform_has_no_gradient():
    config = replace(SCALE, omega=0.0)
    sae, plain = (SAES.build(c, D, torch.Generator().manual_seed(1)).double() for c in (config, replace(config, experts_per_token=2)))
    prepare(sae, Rows.of(activations(7, 512)), normalize_activations=True)
    torch.testing.assert_close(sae.encoder_weight(), plain.W_enc_MD, rtol=1e-12, atol=1e-12)
    terms = sae.loss_terms(Rows.of(activations()), sae(activations()))
    of_T, of_omega = torch.autograd.grad(terms["mse"], [sae.T_DD, sae.omega_E])
    assert of_T.abs().max() == 0 and of_omega.abs().min() > 0


def test_decoder_rows_have_unit_norm_where_the_publication_divides_by_the_norms_of_columns():
    sae = SAES.build(SCALE, D, torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(activations(7, 512).float()), normalize_activations=True)
    trainer = Trainer(sae, TrainerConfig(lr=1e-2), total_steps=5, batch_size=T)
    for step in range(5):
        trainer.step(Rows.of(activations(step).float()))
    rows_M = sae.W_dec_MD.norm(dim=1)
    torch.testing.assert_close(rows_M, torch.ones(M), rtol=0, atol=1e-6)
    theirs_FD = sae.W_dec_MD[:12] / sae.W_dec_MD[:12].norm(dim=0, keepdim=True)
    assert theirs_FD.norm(dim=1).max() > 1.1 * theirs_FD.norm(dim=1).min(), "so that their latents' magnitudes could not be compared"


def test_auxk_of_scaled_features_moves_dead_rows_alone():
    sae, x = build(replace(SCALE, auxk_latents=6)), activations()
    dead_M = torch.arange(M) % 3 == 0
    rows_LD = sae.encoder_rows(dead_M.nonzero()[:, 0])
    torch.testing.assert_close(rows_LD, sae.encoder_weight()[dead_M], rtol=1e-12, atol=1e-12)
    term = sae.loss_terms(Rows.of(x), sae(x), dead_M)["auxk"]
    of_W, of_T, of_omega = torch.autograd.grad(term, [sae.W_enc_MD, sae.T_DD, sae.omega_E], allow_unused=True)
    assert of_T is None and of_omega is None and (of_W[~dead_M] == 0).all() and (of_W[dead_M].abs().sum(dim=1) > 0).any()


def test_two_levels_cost_the_square_root_and_look_at_no_expert_of_another_group():
    router = ROUTERS.build(TwoLevelRouter.Config(), D, 256, 1, torch.Generator().manual_seed(0)).double()
    assert router.groups == 16 and router.flops()[0] == 2 * D * 32 and router.directions() is None
    x = activations()
    routing = router.route(x)
    seen = (routing.expert_TS[:, 0] // 16).unique()
    with torch.no_grad():
        for group in set(range(16)) - set(seen.tolist()):
            router.W_expert_ED[group * 16 : group * 16 + 16] = torch.nan
    again = router.route(x)
    assert len(seen) < 16 and torch.equal(routing.expert_TS, again.expert_TS) and torch.equal(routing.gate_TS, again.gate_TS)
    torch.testing.assert_close(routing.probs_TE.sum(dim=1), torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SHARED, num_latents=50), r"num_latents=50 less shared=8 is not divisible by num_experts=4.*fits is num_latents=48"),
        (lambda: replace(SHARED, shared=None, num_experts=60), r"num_latents=48 less shared=48 is not divisible by num_experts=60"),
        (lambda: replace(SHARED, k=19), r"k=19 is more than the 18 latents that a token may use.*num_latents >= 52"),
        (lambda: replace(SHARED, shared=-1), "shared=-1 must be at least 0"),
        (lambda: replace(SHARED, shared=47), "num_latents=48 less shared=47 is not divisible by num_experts=4"),
        (lambda: replace(SHARED, experts_per_token=2, joint_topk=False), "joint_topk=false gives each expert its own k, and shared latents none"),
        (lambda: replace(SHARED, path_first=True), "path_first=true with path_rank=0: there is no path. Use path_rank=8"),
        (lambda: replace(BATCH, threshold_beta=1.0), r"threshold_beta=1.0 must lie in \[0, 1\)"),
        (lambda: replace(SCALE, omega=-1.0), "omega=-1.0 must be above -1: there all latents of an expert are one"),
        (
            lambda: build(replace(SHARED, router=TwoLevelRouter.Config(groups=3))),
            r"router.groups=3 must divide num_experts=4.*Use one of \[1, 2, 4\]",
        ),
        (lambda: build(replace(SHARED, experts_per_token=2, router=TwoLevelRouter.Config(groups=1))), r"a group for each. Use one of \[2, 4\]"),
    ],
)
def test_impossible_settings_say_value_rule_and_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("config", [SHARED, replace(SHARED, shared=None, num_experts=3), replace(SHARED, experts_per_token=2)])
def test_the_fewest_latents_that_fit_do(config):
    fewest = replace(config, num_latents=config.least_latents)
    assert fewest.k <= fewest.candidates
    with pytest.raises(ValueError):
        replace(config, num_latents=config.least_latents - config.width_step)


@pytest.mark.parametrize("name", ["shared", "batch", "batch, shared, gate after selection"])
def test_a_refit_solves_least_squares_over_shared_latents_and_the_experts_own(name):
    sae, x = build(replace(ALL[name], k=3)).eval(), activations()
    proposed = sae.encode(x).to_dense() > 0
    refitted = with_inference(sae, Inference.refit)
    latents, target_TD = refitted.encode(x).to_dense(), x * sae.activation_scale - sae.b_pre_D
    assert (proposed | (latents == 0)).all() and torch.equal(refitted.decode(refitted.encode(x)), refitted(x).recon_TD)
    left_TM = (target_TD - latents @ sae.W_dec_MD) @ sae.W_dec_MD.T - RIDGE * latents
    assert left_TM[latents > 0].abs().max() < 1e-9, "the gradient is 0 on the support"
    assert with_inference(sae, Inference.pursuit)(x).latents.to_dense().shape == (T, M)

"""Transcoders: their equations in float64, skip path, scales, folding, attribution, controls, and the sources that have targets for them."""

from dataclasses import replace

import pytest
import torch

from switch_sae.activations.base import EvaluationSet
from switch_sae.analysis.linear import LinearBaseline
from switch_sae.evaluation import evaluate
from switch_sae.models import SAES, Inference, SwitchTranscoderSAE, TranscoderSAE, why_no_inference
from switch_sae.models.attribution import attribute
from switch_sae.models.fused import why_not_fused
from switch_sae.models.latents import DenseLatents
from switch_sae.models.losses import geometric_median
from switch_sae.models.routers.base import load_balance_loss
from switch_sae.models.routers.competition import CompetitionRouter
from switch_sae.models.transcoder import Skip, SkippedLatents
from switch_sae.models.widths import Match, dense_reference, matched
from switch_sae.rows import Rows
from switch_sae.runs import load_sae, save_sae
from switch_sae.training import Trainer, TrainerConfig, prepare

D, OUT, M, K, T = 10, 6, 48, 4, 96
SKIPS = {"none": {}, "full": {"skip": Skip.full}, "rank 3": {"skip": Skip.low_rank, "skip_rank": 3}}
KINDS = {
    "dense": TranscoderSAE.Config(num_latents=M, k=K, d_out=OUT),
    "switch": SwitchTranscoderSAE.Config(num_latents=M, k=K, num_experts=4, d_out=OUT),
}


def rows(seed: int = 0, count: int = T, dtype: torch.dtype = torch.float64) -> Rows:
    """A shifted input, and a target of another size, scale and centre: half of it linear."""
    generator, mixing = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    x_TD = torch.randn(count, D, generator=generator, dtype=torch.float64) * 3 + torch.linspace(-2, 2, D, dtype=torch.float64)
    linear_DO, read_DH, write_HO = (torch.randn(size, generator=mixing, dtype=torch.float64) for size in ((D, OUT), (D, 32), (32, OUT)))
    target_TD = x_TD @ linear_DO + (x_TD @ read_DH).relu() @ write_HO + 7
    return Rows(x_TD, target_TD).map(lambda each: each.to(dtype))


def build(kind: str, skip: str = "none", dtype: torch.dtype = torch.float64, **changes):
    """With a skip path that is no longer 0, and decoder rows of all norms."""
    generator = torch.Generator().manual_seed(1)
    sae = SAES.build(replace(KINDS[kind], **SKIPS[skip], **changes), D, generator).to(dtype)
    prepare(sae, rows(7, 512, dtype), normalize_activations=True)
    with torch.no_grad():
        sae.W_dec_MD.mul_(torch.rand(M, 1, generator=generator) * 5)
        sae.b_enc_M.normal_(generator=generator)
        if sae.skip is not None:
            sae.skip.W_up_OR.normal_(generator=generator)
    return sae


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=SKIPS)
def skip(request):
    return request.param


def test_outputs_losses_and_all_gradients_equal_the_masked_dense_equations(kind, skip):
    """Every expert computed, then masked; AuxK on the target's residual; two scales; all in float64."""
    sae, batch, dead_M = build(kind, skip, auxk_latents=3), rows(), torch.arange(M) % 3 == 0
    output = sae(batch.x_TD)
    terms = sae.loss_terms(batch, output, dead_M)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    gradients = torch.autograd.grad(sum(terms.values()), parameters)

    x, y = batch.x_TD * sae.activation_scale, batch.target_TD * sae.target_scale
    pre = (x - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M
    gate, allowed = torch.ones(T, 1, dtype=torch.float64), torch.ones(T, M, dtype=torch.bool)
    balance = torch.zeros(())
    if kind == "switch":
        probs = torch.softmax((x - sae.router.b_D) @ sae.router.W_ED.T, dim=1)
        gate, expert = probs.max(dim=1, keepdim=True)
        allowed = torch.arange(M) // (M // 4) == expert
        balance = sae.config.router.load_balance * OUT * load_balance_loss(expert, probs)
    kept = pre.masked_fill(~allowed, float("-inf")).topk(K, dim=1)
    z = gate * torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    W_skip = 0 if sae.skip is None else sae.skip.W_up_OR if skip == "full" else sae.skip.W_up_OR @ sae.skip.W_down_RD
    skipped = 0 if sae.skip is None else x @ W_skip.T
    recon = z @ sae.W_dec_MD + sae.b_post_D + skipped
    residual = (y - recon).detach()
    dead_pre = (x - sae.b_pre_D.detach()) @ sae.W_enc_MD.T + sae.b_enc_M
    top = dead_pre.masked_fill(~(allowed & dead_M), float("-inf")).topk(3, dim=1)
    dead_recon = gate.detach() * (torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ sae.W_dec_MD)
    auxk = (residual - dead_recon).pow(2).sum() / (residual - residual.mean(0)).pow(2).sum()
    loss = (y - recon).pow(2).sum(1).mean() + balance + OUT / 32 * auxk
    expected = torch.autograd.grad(loss, parameters)

    torch.testing.assert_close(output.recon_TD, recon / sae.target_scale, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sum(terms.values()), loss, rtol=1e-11, atol=1e-11)
    assert len(names) == 5 + 2 * (kind == "switch") + {"none": 0, "full": 1, "rank 3": 2}[skip]
    for name, ours, theirs in zip(names, gradients, expected, strict=True):
        assert theirs.abs().max() > 0, name
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), name


def test_a_rival_expert_is_judged_on_the_target_with_its_skip_path():
    sae, batch = build("switch", "full", router=CompetitionRouter.Config()), rows()
    output = sae.train()(batch.x_TD)
    term = sae.loss_terms(batch, output)["competition"]
    rivals = sae.router.rivals(output.routing)
    n = len(rivals.expert_n1)
    x, y = batch.x_TD[:n] * sae.activation_scale, batch.target_TD[:n] * sae.target_scale
    pre = (x - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M

    def cost(expert_n1):
        top = pre.masked_fill(torch.arange(M) // 12 != expert_n1, float("-inf")).topk(K, dim=1)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        gate = 1.0 if expert_n1 is rivals.expert_n1 else output.routing.gate_TS[:n]
        return (y - gate * z @ sae.W_dec_MD - sae.b_post_D - x @ sae.skip.W_up_OR.T).pow(2).sum(1)

    with torch.no_grad():
        expected = rivals.loss(cost(output.routing.expert_TS[:n]), cost(rivals.expert_n1))
    torch.testing.assert_close(term.detach(), expected)


def test_each_hook_has_its_scale_and_its_median_and_neither_start_is_tied(kind):
    config, batch = KINDS[kind], rows(7, 512)
    sae = SAES.build(config, D, torch.Generator().manual_seed(1)).double()
    prepare(sae, batch, normalize_activations=True)
    for each, scale, bias in ((batch.x_TD, sae.activation_scale, sae.b_pre_D), (batch.target_TD, sae.target_scale, sae.b_out_D)):
        assert (each * scale).pow(2).sum(1).mean().item() == pytest.approx(each.shape[1])
        torch.testing.assert_close(bias.detach(), geometric_median(each * scale), rtol=1e-4, atol=1e-4)
    assert sae.b_in_D is sae.b_pre_D and sae.b_out_D is sae.b_post_D and sae.W_dec_MD.shape == (M, OUT)
    torch.testing.assert_close(sae.W_enc_MD.norm(dim=1), torch.ones(M, dtype=torch.float64))
    torch.testing.assert_close(sae.W_dec_MD.norm(dim=1), torch.full((M,), 0.1, dtype=torch.float64))
    skipping = SAES.build(replace(config, skip=Skip.full), D)
    assert not skipping.skip(torch.randn(3, D)).any(), "the skip path starts at 0"
    if kind == "switch":
        torch.testing.assert_close(sae.router.b_D.detach(), sae.b_pre_D.detach())


def test_folding_both_scales_leaves_the_function_unchanged(kind, skip):
    sae, x = build(kind, skip), rows().x_TD
    before, scale = sae(x), sae.activation_scale.item()
    assert abs(scale / sae.target_scale.item() - 1) > 0.1
    sae.fold_activation_scale()
    after = sae(x)
    assert sae.activation_scale.item() == sae.target_scale.item() == 1
    torch.testing.assert_close(after.recon_TD, before.recon_TD, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.latents.to_dense() * scale, before.latents.to_dense(), rtol=1e-10, atol=1e-10)
    if sae.skip is None:
        torch.testing.assert_close(after.latents.to_dense() @ sae.decoder_weight() + sae.b_out_D, after.recon_TD, rtol=1e-10, atol=1e-10)
    else:
        dense = after.latents.to_dense() @ sae.decoder_weight() + sae.b_out_D + x @ sae.skip.weight().T
        torch.testing.assert_close(dense, after.recon_TD, rtol=1e-10, atol=1e-10)


def test_latents_bring_their_skip_path_along(kind, skip):
    sae, x = build(kind, skip), rows().x_TD
    latents, recon_TD = sae.encode(x), sae(x).recon_TD
    assert torch.equal(sae.decode(latents), recon_TD)
    torch.testing.assert_close(sae.decode(latents.part(slice(10, 20)).cpu()), recon_TD[10:20], rtol=1e-12, atol=1e-12)
    ablated = sae.decode(replace(latents, values_TK=torch.zeros_like(latents.values_TK)))
    rest_TD = sae.b_out_D.expand_as(recon_TD) if sae.skip is None else sae.b_out_D + sae.skip(x * sae.activation_scale)
    torch.testing.assert_close(ablated, rest_TD / sae.target_scale)
    dense = DenseLatents(latents.to_dense())
    if sae.skip is None:
        torch.testing.assert_close(sae.decode(dense), recon_TD)
    else:
        assert isinstance(latents, SkippedLatents)
        with pytest.raises(ValueError, match=r"DenseLatents hold nothing of the skip path.*dataclasses\.replace"):
            sae.decode(dense)


def test_attributions_bias_skip_and_error_add_up_to_the_output(kind, skip):
    sae, batch, direction_D = build(kind, skip), rows(), torch.linspace(-1, 2, OUT, dtype=torch.float64)
    found = attribute(sae, batch, direction_D)
    torch.testing.assert_close(found.total_T, batch.target_TD @ direction_D, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.total_T - found.error_T, sae(batch.x_TD).recon_TD @ direction_D, rtol=1e-11, atol=1e-11)
    weight = sae.decoder_weight() / sae.target_scale
    for t in (0, 5):
        for slot in range(K):
            share = found.latents.values_TK[t, slot] * (weight[found.latents.indices_TK[t, slot]] @ direction_D)
            assert found.shares_TK[t, slot].item() == pytest.approx(share.item(), abs=1e-12)
    assert (found.skip_T.abs().sum() > 0) == (sae.skip is not None)


def test_readers_are_the_gradients_of_latents_with_the_gate_held_fixed(kind):
    """And no others: with the gate's own gradient they would differ."""
    sae, batch = build(kind), rows()
    found = attribute(sae, batch, torch.ones(OUT, dtype=torch.float64))
    routing, _ = sae.route(batch.x_TD)
    for t in (1, 8):
        x = batch.x_TD[t : t + 1].clone().requires_grad_()
        latents = sae.encode(x)
        gate = 1.0 if routing is None else sae.route(x)[0].gate_TS[0, 0]
        for slot in range(K):
            fixed = latents.values_TK[0, slot] / gate * (1.0 if routing is None else gate.detach())
            (expected,) = torch.autograd.grad(fixed, x, retain_graph=True)
            torch.testing.assert_close(found.readers_TKD[t, slot], expected[0], rtol=1e-9, atol=1e-11)
            (whole,) = torch.autograd.grad(latents.values_TK[0, slot], x, retain_graph=True)
            if kind == "switch" and latents.values_TK[0, slot] > 0:
                assert not torch.allclose(whole, expected, rtol=1e-3)
    values = torch.einsum("tkd,td->tk", found.readers_TKD, batch.x_TD) + found.offsets_TK
    torch.testing.assert_close(values, found.latents.values_TK)
    with pytest.raises(ValueError, match=r"direction has shape \(3,\); it must be \[d_out=6\]"):
        attribute(sae, batch, torch.ones(3))


def test_training_beats_regression_and_survives_saving(kind, tmp_path):
    sae = SAES.build(replace(KINDS[kind], skip=Skip.full), D, torch.Generator().manual_seed(0))
    prepare(sae, rows(7, 512, torch.float32), True)
    trainer = Trainer(sae, TrainerConfig(lr=1e-2), total_steps=400, batch_size=256)
    assert why_not_fused(sae) == f"no Triton kernels train {type(sae).__name__}"
    for step in range(400):
        trainer.step(rows(1000 + step, 256, torch.float32))
    held = rows(5, 600, torch.float32)
    evaluation_set = EvaluationSet(held.x_TD, torch.arange(600) // 20, target_TD=held.target_TD)
    linear = LinearBaseline.regress(rows(7, 512, torch.float32), OUT)
    fvu, regression = (evaluate(each, evaluation_set, bootstrap=0)["fvu"].value for each in (sae.eval(), linear))
    by_hand = (held.target_TD - sae(held.x_TD).recon_TD).pow(2).sum() / (held.target_TD - held.target_TD.mean(0)).pow(2).sum()
    assert fvu == pytest.approx(by_hand.item(), rel=1e-4) and fvu < 0.75 * regression
    save_sae(tmp_path / "model.safetensors", sae)
    loaded = load_sae(tmp_path / "model.safetensors")
    assert type(loaded) is type(sae) and loaded.config == sae.config and torch.equal(loaded(held.x_TD).recon_TD, sae(held.x_TD).recon_TD)


def test_one_expert_is_the_dense_transcoder():
    config = SwitchTranscoderSAE.Config(num_latents=M, k=K, num_experts=1, skip=Skip.low_rank, skip_rank=2, d_out=OUT)
    assert config.simplest() == TranscoderSAE.Config(num_latents=M, k=K, skip=Skip.low_rank, skip_rank=2, d_out=OUT)
    one, dense = (SAES.build(c, D, torch.Generator().manual_seed(3)) for c in (config, config.simplest()))
    x = rows(dtype=torch.float32).x_TD
    assert torch.equal(one(x).recon_TD, dense(x).recon_TD) and one(x).recon_TD.any()
    assert KINDS["switch"].simplest() is KINDS["switch"] and dense_reference(KINDS["switch"]) == KINDS["dense"]


def test_flops_are_counted_by_hand_with_the_skip_path():
    def flops(kind, skip):
        return SAES.build(replace(KINDS[kind], **SKIPS[skip]), D).flops()

    dense, switch = flops("dense", "none"), flops("switch", "none")
    assert (dense.router, dense.encode, dense.decode, dense.backward) == (0, 2 * D * M, 2 * OUT * K, 2 * (2 * OUT + D) * K)
    assert (switch.router, switch.encode, switch.decode) == (2 * D * 4, 2 * D * 12, 2 * OUT * K)
    full, low = flops("dense", "full"), flops("dense", "rank 3")
    assert (full.decode - dense.decode, full.backward - dense.backward) == (2 * D * OUT, 2 * D * OUT)
    assert (low.decode - dense.decode, low.backward - dense.backward) == (2 * 3 * (D + OUT), 2 * 3 * (D + 2 * OUT))
    reference = replace(KINDS["dense"], skip=Skip.full, num_latents=96)
    found = matched(replace(KINDS["switch"], skip=Skip.full), reference, Match.flops, D)
    assert abs(SAES.build(found, D).flops().total - SAES.build(reference, D).flops().total) <= 2 * D


def test_regression_equals_least_squares_and_its_best_approximation():
    batch = rows(0, 400)
    design = torch.cat([batch.x_TD, torch.ones(400, 1, dtype=torch.float64)], dim=1)
    fitted = design @ torch.linalg.lstsq(design, batch.target_TD).solution
    full = LinearBaseline.regress(batch, OUT)
    torch.testing.assert_close(full(batch.x_TD).recon_TD, fitted, rtol=1e-8, atol=1e-8)
    assert torch.equal(full.decode(full.encode(batch.x_TD)), full(batch.x_TD).recon_TD)
    U, S, Vh = torch.linalg.svd(fitted - fitted.mean(0), full_matrices=False)
    torch.testing.assert_close(
        LinearBaseline.regress(batch, 2)(batch.x_TD).recon_TD, fitted.mean(0) + (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-7, atol=1e-7
    )
    assert (full.flops().encode, full.flops().decode) == (0, 2 * D * OUT)
    two = LinearBaseline.regress(batch, 2).flops()
    assert (two.encode, two.decode) == (2 * D * 2, 2 * OUT * 2)
    flat = Rows(torch.cat([batch.x_TD, batch.x_TD[:, :1] * 2], dim=1), batch.target_TD)  # as many dimensions, one more number
    torch.testing.assert_close(LinearBaseline.regress(flat, OUT)(flat.x_TD).recon_TD, fitted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="rank=7 of a map from 10 to 6 numbers: it must lie between 1 and 6"):
        LinearBaseline.regress(batch, 7)


def test_what_a_transcoder_cannot_do_is_said(kind):
    with pytest.raises(ValueError, match=r"skip=full with skip_rank=3: a rank belongs to skip=low_rank\. Use skip=low_rank, or skip_rank=null"):
        replace(KINDS[kind], skip=Skip.full, skip_rank=3)
    with pytest.raises(ValueError, match=r"skip=low_rank with skip_rank=None: .*Give it one: sae\.skip_rank=16"):
        replace(KINDS[kind], skip=Skip.low_rank)
    with pytest.raises(ValueError, match="d_out=0 must be at least 1"):
        replace(KINDS[kind], d_out=0)
    square = SAES.build(replace(KINDS[kind], d_out=None), D)
    assert square.d_out == D
    for way in (Inference.refit, Inference.pursuit):
        assert "does not reconstruct its input" in str(why_no_inference(square, way))
    with pytest.raises(ValueError, match=r"targets have shape \(96, 6\); this SAE's are \[tokens=96, d_out=10\]"):
        square.double().loss_terms(rows(), square(rows().x_TD))

"""Refit and pursuit inside SAEs against brute force, token by token; thresholds, Gram matrices, costs, and what one can and cannot do with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import ARCHITECTURES, CONTRACTS
from test_conf import composed
from test_pursuit import nonnegative_least_squares, pursued
from test_sweep import planned

from switch_sae.models import (
    SAES,
    BatchTopKSAE,
    Inference,
    MatryoshkaSAE,
    PursuitSAE,
    ReLUSAE,
    SwitchPursuitSAE,
    SwitchRefitSAE,
    SwitchSAE,
    TopKSAE,
    gram,
    inference,
)
from switch_sae.models.fused import why_not_fused
from switch_sae.models.gram import GramCache
from switch_sae.models.inference import why_no_inference, with_inference
from switch_sae.models.routers.competition import CompetitionRouter
from switch_sae.models.threshold import calibrate, has_threshold
from switch_sae.rows import Rows
from switch_sae.runs import load_sae, save_sae
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M, K, E, S = 12, 64, 48, 4, 4, 8
RIDGE = 1e-3


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + torch.linspace(-2, 2, D)


def build(config, dtype=torch.float64):
    sae = SAES.build(config, D, torch.Generator().manual_seed(1)).to(dtype)
    prepare(sae, Rows.of(activations(7, 512).to(dtype)), normalize_activations=True)
    if sae.recipe.unit_decoder:
        sae.W_dec_MD.data = torch.nn.functional.normalize(sae.W_dec_MD.data, dim=1)  # in float64 too
    if hasattr(sae, "b_enc_M"):
        torch.nn.init.normal_(sae.b_enc_M, 0.1, 0.2, generator=torch.Generator().manual_seed(2))
    if isinstance(sae, ReLUSAE):  # as it is after some training: about D latents are active
        with torch.no_grad():
            sae.W_enc_MD.mul_(10)
            sae.b_enc_M.sub_(0.7)
    return sae


def own(expert: int, shared: int) -> np.ndarray:
    """The numbers of the latents that a token of the expert may use."""
    width = (M - shared) // E
    return np.concatenate([np.arange(shared), shared + expert * width + np.arange(width)])


def by_hand(sae, x_TD: torch.Tensor) -> np.ndarray:
    """[T, M]: the latents of raw activations, from the equations in the docstrings of the SAE's class and of `Inference`."""
    config, weights = sae.config, {name: tensor.detach().numpy() for name, tensor in sae.state_dict().items()}
    x_TD, b_D, W_MD = x_TD.numpy() * weights["activation_scale"], weights["b_pre_D"], weights["W_dec_MD"]
    shared, threshold = getattr(config, "shared", 0), float(weights.get("theta" if sae.training else "threshold", 0.0))
    allowed = [np.arange(M)] * len(x_TD)
    if "router.W_ED" in weights:
        experts = ((x_TD - weights["router.b_D"]) @ weights["router.W_ED"].T).argmax(axis=1)
        allowed = [own(expert, shared) for expert in experts]
    norm_M = np.linalg.norm(W_MD, axis=1)
    rows_MD = W_MD / norm_M[:, None]
    v_TM = np.zeros((len(x_TD), M))
    if "W_enc_MD" in weights:
        pre_TM = (x_TD if isinstance(sae, ReLUSAE) else x_TD - b_D) @ weights["W_enc_MD"].T + weights["b_enc_M"]
        for v_M, pre_M, latents in zip(v_TM, pre_TM, allowed, strict=True):
            v_M[latents] = np.maximum(pre_M[latents], 0)
            most = {"topk": K, "switch": K, "switch_refit": 2 * K}.get(SAES.key_of(sae))
            if most is not None:
                v_M[np.argsort(-v_M)[most:]] = 0
    if sae.by_threshold and sae.has_encoder:
        bound = np.sort(v_TM, axis=None)[-T * K] if sae.training else np.nextafter(threshold, np.inf)
        v_TM[v_TM < bound] = 0
    z_TM = np.zeros_like(v_TM)
    for t, latents in enumerate(allowed):
        r_D, support = x_TD[t] - b_D, np.flatnonzero(v_TM[t])
        if sae.inference is Inference.refit:
            z_TM[t] = v_TM[t] * norm_M if len(support) > D else nonnegative_least_squares(r_D, rows_MD, support, RIDGE)[0]
        elif isinstance(sae, ReLUSAE):
            z_TM[t] = pursued(r_D, rows_MD, M, M // 4, RIDGE, 0.0, min(len(support), D))[0]
        else:
            stops = sae.by_threshold
            z_TM[t, latents] = pursued(r_D, rows_MD[latents], K * (1 + stops), 2 * (1 + stops), RIDGE, threshold)[0]
    return z_TM / norm_M


CASES = {
    "topk": TopKSAE.Config(num_latents=M, k=K, inference="refit"),
    "switch": SwitchSAE.Config(num_latents=M, k=K, num_experts=E, inference="refit"),
    "batch_topk": BatchTopKSAE.Config(num_latents=M, k=K, inference="refit"),
    "switch_refit": SwitchRefitSAE.Config(num_latents=M, k=K, num_experts=E, missed=0.0),
    "switch_refit, shared": SwitchRefitSAE.Config(num_latents=M, k=K, num_experts=E, shared=S, missed=0.0),
    "relu": ReLUSAE.Config(num_latents=M, l1=0.0, inference="refit"),
    "relu, pursuit": ReLUSAE.Config(num_latents=M, l1=0.0, inference="pursuit"),
    "pursuit": PursuitSAE.Config(num_latents=M, k=K, blocks=2),
    "pursuit, stop": PursuitSAE.Config(num_latents=M, k=K, blocks=2, stop=True),
    "switch_pursuit": SwitchPursuitSAE.Config(num_latents=M, k=K, blocks=2, num_experts=E),
    "switch_pursuit, stop, shared": SwitchPursuitSAE.Config(num_latents=M, k=K, blocks=2, num_experts=E, shared=S, stop=True),
}


@pytest.fixture(params=["training", "evaluation"])
def training(request):
    return request.param == "training"


@pytest.mark.parametrize("name", list(CASES))
def test_latents_reconstructions_and_gradients_equal_brute_force(name, training):
    sae, x_TD = build(CASES[name]).train(training), activations()
    if name.startswith("relu"):
        with torch.no_grad():
            sae.W_dec_MD.mul_(torch.linspace(0.5, 30, M)[:, None])
    for buffer in ("theta", "threshold") if "stop" in name else ():
        sae.get_buffer(buffer).fill_(0.8 if buffer == "theta" else 0.5)
    output = sae(x_TD)
    z_TM = torch.tensor(by_hand(sae, x_TD))
    found_TM = output.latents.to_dense().detach()
    assert (found_TM - z_TM).abs().max() <= 1e-9 and (z_TM > 0).sum() > T
    counts_T = (z_TM > 0).sum(dim=1)
    if name == "relu":
        assert (counts_T > D).any() and (counts_T <= D).any()
    elif sae.by_threshold:
        assert counts_T.min() < K < counts_T.max()
    W_MD, b_D = sae.W_dec_MD.detach().requires_grad_(), sae.b_pre_D.detach().requires_grad_()
    recon_TD = z_TM @ W_MD + b_D
    assert (output.recon_TD * sae.activation_scale - recon_TD).abs().max() <= 1e-9
    loss = (x_TD * sae.activation_scale - recon_TD).square().sum(dim=1).mean()
    mse = sae.loss_terms(Rows.of(x_TD), output)["mse"]
    for gradient, expected in zip(torch.autograd.grad(mse, (sae.W_dec_MD, sae.b_pre_D)), torch.autograd.grad(loss, (W_MD, b_D)), strict=True):
        assert (gradient - expected).abs().max() <= 1e-7 * expected.abs().max()


@pytest.mark.parametrize("name", ["topk", "switch", "batch_topk", "switch_refit, shared"])
def test_the_encoder_learns_the_values_that_were_refitted(name):
    """`match` is mean_t ||v - z||^2 on the support, z fixed, with the gradients of W_enc and b_enc that autograd has for a dense formulation."""
    sae, x_TD = build(CASES[name]).train(), activations()
    output = sae(x_TD)
    scaled_TD, z_TM = x_TD * sae.activation_scale, output.latents.to_dense().detach()
    v_TM = ((scaled_TD - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M).relu()
    if name == "switch":
        v_TM = v_TM * output.routing.gate_TS
    encoder = with_inference(sae, "encoder")
    if isinstance(sae, SwitchRefitSAE):
        encoder.eval().threshold.copy_(sae.theta * (1 - 1e-12))  # just below the smallest that training kept
    proposed_TM = encoder.encode(x_TD).to_dense().detach() > 0
    assert (proposed_TM & (z_TM == 0)).any()  # some were dropped: the encoder learns 0 for them
    match = ((v_TM - z_TM) * proposed_TM).square().sum() / T
    learnt = sae.loss_terms(Rows.of(x_TD), output)["match"]
    torch.testing.assert_close(learnt, match, rtol=1e-10, atol=0)
    weights = (sae.W_enc_MD, sae.b_enc_M)
    for gradient, expected in zip(torch.autograd.grad(learnt, weights), torch.autograd.grad(match, weights), strict=True):
        assert (gradient - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", ["topk", "batch_topk", "switch_refit, shared", "pursuit", "switch_pursuit, stop, shared"])
def test_with_values_held_fixed_the_decoders_gradient_is_that_of_the_least_squares_error(name, monkeypatch):
    """The envelope theorem: d/dW min_z ||x - b - W^T z||^2, here by central differences through the whole minimum on the same support, no ridge."""
    monkeypatch.setattr(inference, "RIDGE", 0.0)
    config = replace(CASES[name], k=2)
    sae, x_TD = build(replace(config, ridge=0.0) if hasattr(config, "ridge") else config).train(), activations(rows=16)
    output = sae(x_TD)
    (gradient_MD,) = torch.autograd.grad(sae.loss_terms(Rows.of(x_TD), output)["mse"], [sae.W_dec_MD])
    used_TM = (output.latents.to_dense().detach() > 0).numpy()
    assert used_TM.sum(axis=1).max() <= D
    r_TD, W_MD = (x_TD * sae.activation_scale - sae.b_pre_D).detach().numpy(), sae.W_dec_MD.detach().numpy()

    def error(W_MD):
        errors = []
        for r_D, used_M in zip(r_TD, used_TM, strict=True):
            z_K = np.linalg.lstsq(W_MD[used_M].T, r_D, rcond=None)[0]
            errors.append(np.square(r_D - z_K @ W_MD[used_M]).sum())
        return np.mean(errors)

    scale = gradient_MD.abs().max().item()
    for latent, d in np.argwhere(gradient_MD.numpy())[:: gradient_MD.numel() // 24]:
        step = np.zeros_like(W_MD)
        step[latent, d] = 1e-5
        numerical = (error(W_MD + step) - error(W_MD - step)) / 2e-5
        assert abs(gradient_MD[latent, d].item() - numerical) <= 1e-6 * scale


def test_another_inference_shares_weights_and_is_saved_and_folded_with_them(tmp_path):
    for name in ("topk", "switch", "batch_topk", "relu", "switch_refit"):
        sae, x_TD = build(ARCHITECTURES[name], torch.float32).eval(), activations().float()
        for way in Inference:
            other = with_inference(sae, way.name)
            assert other is not sae and other.inference is way and sae.inference is type(sae).own_inference
            assert all(a is b for a, b in zip(sae.state_dict(keep_vars=True).values(), other.state_dict(keep_vars=True).values(), strict=True))
            save_sae(tmp_path / "model.safetensors", other)
            loaded = load_sae(tmp_path / "model.safetensors")
            assert loaded.inference is way and torch.equal(loaded.encode(x_TD).to_dense(), other.encode(x_TD).to_dense())
            loaded.fold_activation_scale()
            torch.testing.assert_close(loaded(x_TD).recon_TD, other(x_TD).recon_TD, rtol=1e-4, atol=1e-4)
        latents = [with_inference(sae, way).encode(x_TD).to_dense() for way in Inference]
        assert not any(torch.equal(latents[i], latents[j]) for i, j in ((0, 1), (0, 2), (1, 2))), name


@pytest.mark.parametrize("two_threads", [False, True])
@pytest.mark.parametrize("way", ["refit", "pursuit"])
def test_torch_inference_mode_changes_nothing(way, two_threads):
    sae, x_TD = with_inference(build(ARCHITECTURES["switch"]), way).eval(), activations(rows=600)
    before = torch.get_num_threads()
    torch.set_num_threads(1 + two_threads)
    try:
        with torch.inference_mode():
            found = sae.encode(x_TD).to_dense()
            born_there = with_inference(build(ARCHITECTURES["switch"]), way).eval().encode(x_TD).to_dense()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, sae.encode(x_TD).to_dense()) and torch.equal(found, born_there)


@pytest.mark.parametrize(
    ("config", "way", "why"),
    [
        (ARCHITECTURES["pursuit"], "encoder", "PursuitSAE has no encoder"),
        (ARCHITECTURES["switch_pursuit"], "refit", "SwitchPursuitSAE has no encoder whose choice could be refitted"),
    ],
)
def test_what_cannot_be_inferred_says_why(config, way, why):
    sae = build(config)
    assert why in why_no_inference(sae, way)
    with pytest.raises(ValueError, match=f"inference={way} is not possible: .*{why}"):
        with_inference(sae, way)
    assert why_no_inference(sae, sae.inference) is None


def test_an_sae_that_does_not_reconstruct_its_input_has_its_encoder_alone(monkeypatch):
    sae = build(ARCHITECTURES["topk"])
    monkeypatch.setattr(TopKSAE, "d_out", property(lambda self: 5))
    assert all("does not reconstruct its input" in why_no_inference(sae, way) for way in ("refit", "pursuit"))
    assert why_no_inference(sae, "encoder") is None


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"inference=encoder needs an encoder, which this SAE has not\. Use pursuit"):
        PursuitSAE.Config(num_latents=M, k=K, inference="encoder")
    with pytest.raises(ValueError, match=r"inference='lstsq' is not one of encoder, refit, pursuit"):
        TopKSAE.Config(inference="lstsq")
    with pytest.raises(
        ValueError, match=r"sae\.inference=refit cannot be trained: MatryoshkaSAE trains by inference=encoder; others are for scoring"
    ):
        Trainer(build(MatryoshkaSAE.Config(num_latents=M, k=K, inference="refit")), TrainerConfig(), 1, T)
    with pytest.raises(ValueError, match=r"sae\.inference=encoder cannot be trained: SwitchRefitSAE trains by inference=refit"):
        Trainer(build(replace(ARCHITECTURES["switch_refit"], inference="encoder")), TrainerConfig(), 1, T)


def test_kernels_command_line_and_sweeps_know_inference():
    for way in ("refit", "pursuit"):
        assert why_not_fused(with_inference(build(ARCHITECTURES["switch"]), way)) == f"the Triton kernels train encoders, not by inference={way}"
    assert composed("sae.inference=refit").sae.inference is Inference.refit and composed().sae.inference is None
    grid = {"sae": {"architecture": "topk", "inference": ["encoder", "refit", "pursuit"]}}
    members = planned(experts=[], seeds=1, grids={"g": grid})
    assert list(members) == [f"topk-m64-k4-inference={way}-s0" for way in ("encoder", "refit", "pursuit")]
    assert [member.sae.inference for member in members.values()] == list(Inference)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("batch_topk", "encoder"),
        ("batch_topk", "refit"),
        ("batch_topk", "pursuit"),
        ("switch_refit", "refit"),
        ("switch_pursuit, stop, shared", "pursuit"),
    ],
)
def test_calibration_reaches_the_l0_that_was_asked_for(name, way):
    sae, rows = with_inference(build(CONTRACTS[name], torch.float32), way).train(), Rows.of(activations(3, 800).float())
    for l0 in (3.0, None):
        reached = calibrate(sae, rows, l0)
        assert sae.training
        found = (with_inference(sae, way).eval().encode(rows.x_TD).values > 0).sum().item() / len(rows)
        assert found == pytest.approx(reached, rel=1e-6) == pytest.approx(l0 or K, rel=0.01)
    before = sae.threshold.clone()
    with pytest.raises(ValueError, match=r"no threshold gives a mean L0 of 4000: the nearest is .*Ask for that"):
        calibrate(sae, rows, 4000.0)
    with pytest.raises(ValueError, match=r"calibrating to l0=4.0 on 0 rows is not possible"):
        calibrate(sae, rows[:0])
    with pytest.raises(ValueError, match="this SAE takes"):
        calibrate(sae, Rows.of(torch.zeros(3, D + 1)))
    assert sae.training and torch.equal(sae.threshold, before)


def test_only_a_threshold_can_be_calibrated():
    assert {name for name, config in CONTRACTS.items() if has_threshold(build(config))} == {
        "batch_topk", "batch_topk, refit", "matryoshka", "switch_refit", "switch_pursuit, stop, shared", "switch_batch_topk",
        "switch_batch_topk, two experts, shared", "switch_pursuit, two experts, stop, shared",
    }  # fmt: skip
    with pytest.raises(ValueError, match="the L0 of PursuitSAE is not decided by a threshold"):
        calibrate(build(ARCHITECTURES["pursuit"]), Rows.of(activations()))


def test_the_stop_rule_finds_the_threshold_that_gives_k():
    sae = build(replace(CONTRACTS["switch_pursuit, stop, shared"], eta=0.2), torch.float32)
    trainer = Trainer(sae, TrainerConfig(lr=1e-3), total_steps=60, batch_size=T)
    l0 = [trainer.step(Rows.of(activations(step).float())).numbers()["l0"] for step in range(60)]
    assert abs(l0[0] / K - 1) > 0.2 and sum(l0[-10:]) / 10 == pytest.approx(K, rel=0.05)
    assert sae.threshold.item() == pytest.approx(sae.theta.item(), rel=0.1) != 1.0


@pytest.mark.parametrize(
    "name", ["switch_pursuit, stop, shared", "switch_pursuit, two experts, stop, shared", "switch_refit", "switch, refit", "topk, pursuit"]
)
def test_a_run_goes_on_bit_for_bit_between_two_refreshes_of_its_gram_matrices(name, monkeypatch):
    monkeypatch.setattr(gram, "REFRESH_TOKENS", 3 * T)  # computed for steps 0, 3, 6, and a checkpoint after step 4 (from 0)

    def trainer():
        return Trainer(build(CONTRACTS[name], torch.float32), TrainerConfig(lr=1e-2), total_steps=8, batch_size=T)

    straight, first, second, forgetful = (trainer() for _ in range(4))
    for step in range(5):
        straight.step(Rows.of(activations(step).float()))
        first.step(Rows.of(activations(step).float()))
    tensors, state = first.state_dict()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    grams = (1, 0) if first.sae.searches_lists else (first.sae.num_experts, first.sae.num_shared)
    now = GramCache().current(first.sae.W_dec_MD, *grams)
    assert tensors["training/gram_age"] == 2 * T and not torch.equal(tensors["training/gram"], now)
    second.load_state_dict(tensors, state)
    forgetful.load_state_dict({key: tensor.clone() for key, tensor in tensors.items() if not key.startswith("training/")}, state)
    for buffer in ("theta", "threshold"):
        if buffer in first.sae.state_dict():
            assert torch.equal(second.sae.get_buffer(buffer), first.sae.get_buffer(buffer)) and first.sae.get_buffer(buffer) != 1
    for step in range(5, 8):
        for each in (straight, second, forgetful):
            each.step(Rows.of(activations(step).float()))
    expected, found = straight.state_dict()[0], second.state_dict()[0]
    assert expected.keys() == found.keys() and all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert not torch.equal(expected["sae/W_dec_MD"], forgetful.sae.W_dec_MD), "the age of Gram matrices showed in nothing"


def test_gram_matrices_are_kept_as_long_as_the_weights_are():
    sae = build(ARCHITECTURES["switch_pursuit"], torch.float32).eval()

    def now():
        return sae.grams.current(sae.W_dec_MD, E, 0)

    kept = now()
    assert now() is kept
    with torch.no_grad():
        sae.W_dec_MD[3] *= -1
    changed = now()
    assert changed is not kept and now() is changed and changed.shape == (E, 12, 32)
    own_EFD = sae.W_dec_MD.detach().view(E, 12, D)
    torch.testing.assert_close(changed[..., :12], own_EFD @ own_EFD.transpose(1, 2))
    assert (changed[..., 12:] == 0).all()
    sae.load_state_dict({name: tensor.clone() for name, tensor in sae.state_dict().items()})
    assert now() is not changed
    sae.double()
    assert now().dtype == torch.float64
    sae.to("meta")
    assert now().device.type == "meta"
    half = build(ARCHITECTURES["switch_pursuit"], torch.bfloat16)
    assert half.grams.current(half.W_dec_MD, E, 0).dtype == torch.float32  # a solve needs that
    shared_ECP = GramCache().current(own_EFD.flatten(0, 1), 5, 8)
    latents = [*range(8), *range(8 + 2 * 8, 8 + 3 * 8)]  # of expert 2
    rows_CD = own_EFD.flatten(0, 1)[latents]
    torch.testing.assert_close(shared_ECP[2, :, :16], rows_CD @ rows_CD.T)


def test_flops_are_counted_by_hand():
    d, m, k, e = 10, 64, 4, 4
    encode, decode, selected = 2 * d * m, 2 * d * k, 2 * d * k
    solve = k**3 / 6 + k * k  # a Cholesky factor, two triangular solves
    refit = TopKSAE(TopKSAE.Config(num_latents=m, k=k, inference="refit"), d).flops()
    assert (refit.encode, refit.decode) == (encode + round(2 * (k * d + k * k * d + solve)), decode)
    assert refit.backward == 2 * selected  # W_dec, and W_enc of the match; values have no gradient

    gram = 2 * e * 16 * 16 * d / 8192
    routed = SwitchSAE(SwitchSAE.Config(num_latents=m, k=k, num_experts=e, inference="refit"), d).flops()
    assert routed.encode == encode // e + round(2 * (k * d + solve)) and routed.router == 2 * d * e
    assert routed.backward == 2 * selected + round(gram) + 2 * routed.router

    # Two blocks of two latents among 16: in each one update of all correlations; the factor's part of a block of n = 2 after m = 0, 2 others, n m^2
    # + n^2 m + n^3 / 3, with n m for its right-hand side and (m + n)^2 / 2 for the solution; correlations renewed once, from two latents.
    blocks = 2 * 16 + (8 / 3 + 2) + (8 + 8 + 8 / 3 + 4 + 8) + 16 * 2
    frozen = CompetitionRouter.Config(train=False)
    config = SwitchPursuitSAE.Config(num_latents=m, k=k, num_experts=e, blocks=2, router=frozen)
    routed = SwitchPursuitSAE(replace(config, router=replace(frozen, rivals=0.0)), d).flops()
    assert routed.encode == round(2 * (16 * d + blocks)) and routed.decode == decode
    assert routed.backward == selected + round(gram)
    competing = SwitchPursuitSAE(replace(config, router=CompetitionRouter.Config(rivals=0.5)), d).flops()
    assert competing.backward == routed.backward + round(0.5 * (routed.encode + decode)) + 2 * routed.router and competing.encode == routed.encode
    shared = SwitchPursuitSAE(replace(config, num_latents=m + 8, shared=8), d).flops()
    assert shared.encode == round(2 * (24 * d + blocks + 3 * 8 + 8))  # 8 more candidates: correlations, two updates, a renewal of two

    counts = [1, 3, 4, 5, 8]  # latents of typical tokens where a threshold gives 4
    refits = round(sum(2 * (n * d + n**3 / 6 + n * n) for n in counts) / 5)
    config = SwitchRefitSAE.Config(num_latents=m, k=k, num_experts=e, router=replace(frozen, rivals=0.0), missed=0.0)
    one_shot = SwitchRefitSAE(config, d).flops()
    assert (one_shot.encode, one_shot.decode) == (encode // e + refits, decode) and one_shot.backward == 2 * selected + round(gram)
    assert SwitchRefitSAE(replace(config, inference="encoder"), d).flops().encode == encode // e

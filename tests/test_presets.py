"""conf/preset/: what others published, as Hydra composes it, against their equations in their own order of operations (float64, all gradients)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from experiments.compose import CONF, register_schemas, run_config
from switch_kernels import Backend, Execution, Precision
from switch_sae.engines import TorchEngine
from switch_sae.models import SAES, SwitchSAE, SwitchScaleSAE, SwitchSharedSAE
from switch_sae.models.fused import why_not_fused
from switch_sae.models.topk import EncoderInit
from switch_sae.rows import Rows
from switch_sae.training import LRWidth, Trainer, TrainerConfig, prepare

D, T, M, E, K = 12, 96, 48, 4, 4
PRESETS = {"paper": SwitchSAE, "moe_topk": SwitchSAE, "scale_sae": SwitchScaleSAE, "switch_1on": SwitchSharedSAE}
register_schemas()


def composed(preset, *overrides):
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        return run_config(compose("train", overrides=[f"preset={preset}", *overrides]))


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + torch.linspace(-2, 2, D)


def build(preset, **changes):
    """As the preset says, small, with biases that are not at their starts."""
    config = composed(preset)
    experts = 3 if preset == "switch_1on" else E
    sae = SAES.build(replace(config.sae, num_latents=M, k=K, num_experts=experts, **changes), D, torch.Generator().manual_seed(1)).double()
    prepare(sae, Rows.of(activations(7, 512)), config.normalize_activations)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            if name in ("b_enc_M", "router.c_E", "omega_E", "T_DD", "router.b_D"):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return sae


def of_the_code(gate_TE, z_TM, sae):
    """f = z * repeat(gate); the k largest of all M; decoded."""
    f_TM = z_TM * gate_TE.repeat_interleave(M // gate_TE.shape[1], dim=1)
    top = f_TM.topk(K, dim=1)
    return torch.zeros_like(f_TM).scatter(1, top.indices, top.values)


def paper(sae, x_TD):
    p_TE = torch.softmax((x_TD - sae.router.b_D) @ sae.router.W_ED.T, dim=1)
    best = p_TE.topk(1, dim=1)
    kept_TE = torch.zeros_like(p_TE).scatter(1, best.indices, best.values)
    z_TM = ((x_TD - sae.b_pre_D) @ sae.W_enc_MD.T).relu()
    recon_TD = of_the_code(kept_TE, z_TM, sae) @ sae.W_dec_MD + sae.b_pre_D
    return recon_TD, balance(p_TE)


def balance(p_TE):
    experts = p_TE.shape[1]
    share_E = torch.bincount(p_TE.argmax(dim=1), minlength=experts) / len(p_TE)  # in float32, as ours is
    return 3 * D * experts * (share_E * p_TE.mean(dim=0)).sum()


def moe_topk(sae, x_TD):
    gate_TE = ((x_TD - sae.router.b_D) @ sae.router.W_ED.T + sae.router.c_E).relu()
    z_TM = ((x_TD - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M).relu()
    return of_the_code(renormalised(gate_TE), z_TM, sae) @ sae.W_dec_MD + sae.b_pre_D, 0.0


def renormalised(score_TE):
    top = score_TE.topk(2, dim=1)
    return torch.softmax(torch.full_like(score_TE, -torch.inf).scatter(1, top.indices, top.values), dim=1)


def scale_sae(sae, x_TD):
    p_TE = torch.softmax((x_TD - sae.router.b_D) @ sae.router.W_ED.T + sae.router.c_E, dim=1)
    W_EFD = sae.W_enc_MD.view(E, -1, D)
    low_EFD = F.linear(W_EFD.mean(dim=1), sae.T_DD).unsqueeze(1).expand_as(W_EFD)
    high_EFD = W_EFD - low_EFD
    V_MD = (low_EFD + (sae.omega_E.view(E, 1, 1) + 1) * high_EFD).reshape(M, D)
    z_TM = ((x_TD - sae.b_pre_D) @ V_MD.T + sae.b_enc_M).relu()
    return of_the_code(renormalised(p_TE), z_TM, sae) @ sae.W_dec_MD + sae.b_pre_D, balance(p_TE)


def switch_1on(sae, x_TD):
    """In the layout of the code: the expert that is always on is the last one."""
    order_M = torch.arange(M).roll(-sae.num_shared)
    p_TE = torch.softmax((x_TD - sae.router.b_D) @ sae.router.W_ED.T, dim=1)
    best = p_TE.topk(1, dim=1)
    kept_TE = torch.cat([torch.zeros_like(p_TE).scatter(1, best.indices, best.values), p_TE.new_ones(len(p_TE), 1)], dim=1)
    z_TM = ((x_TD - sae.b_pre_D) @ sae.W_enc_MD[order_M].T).relu()
    return of_the_code(kept_TE, z_TM, sae) @ sae.W_dec_MD[order_M] + sae.b_pre_D, balance(p_TE)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_computes_what_was_published(preset):
    sae, x = build(preset), activations(rows=3 * T)
    if preset == "moe_topk":  # where ReLU leaves fewer than two scores above 0, its choice is arbitrary
        x = x[(sae.router.logits(x) > 0).sum(dim=1) >= 2]
        assert len(x) > T
    assert type(sae) is PRESETS[preset] and sae.activation_scale == 1
    recon_TD, load_balance = globals()[preset](sae, x)
    loss = (x - recon_TD).square().sum(dim=1).mean() + load_balance
    output = sae(x)
    terms = sae.loss_terms(Rows.of(x), output, torch.ones(M, dtype=torch.bool))
    assert "auxk" not in terms
    torch.testing.assert_close(output.recon_TD, recon_TD, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(terms.values()), loss, rtol=1e-11, atol=1e-11)
    parameters = list(sae.parameters())
    found = torch.autograd.grad(sum(terms.values()), parameters)
    for (key, _), ours, theirs in zip(sae.named_parameters(), found, torch.autograd.grad(loss, parameters), strict=True):
        assert theirs.abs().max() > 0 and (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), key


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("model", ["bundled", "gpt2"])
def test_presets_share_the_papers_trainer_and_start(preset, model):
    config = composed(preset, f"model={model}")
    assert (config.sae.auxk, config.sae.encoder_init, config.normalize_activations) == (0, EncoderInit.linear, False)
    assert config.sae.encoder_bias == (preset in ("moe_topk", "scale_sae"))
    assert config.sae.experts_per_token == (2 if preset in ("moe_topk", "scale_sae") else 1)
    assert config.sae.router.load_balance == (0 if preset == "moe_topk" else 3)
    trainer = config.trainer
    assert (trainer.warmup_steps, trainer.lr, trainer.lr_at_16k, trainer.lr_width, trainer.decay_fraction) == (0, None, 2e-4, LRWidth.total, 0.2)


def test_a_preset_gives_way_to_what_is_asked_for():
    assert composed("scale_sae", "sae.num_experts=64").sae.num_experts == 64
    assert SAES.key_of(composed("moe_topk", "sae=topk").sae) == "topk" and composed("moe_topk", "sae/router=sigmoid").sae.experts_per_token == 2


def test_the_default_of_moe_py_is_refused_because_nothing_would_train_its_router():
    with pytest.raises(ValueError, match=r"experts_per_token=1 has gates of exactly 1, and load_balance=0 leaves nothing that could train it"):
        build("moe_topk", experts_per_token=1)


REASONS = {
    "paper": None,
    "moe_topk": "no Triton kernels know its router, RenormalisedRouter(",
    "scale_sae": "no Triton kernels train SwitchScaleSAE",
    "switch_1on": "no Triton kernels train SwitchSharedSAE",
}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_trains_in_triton_kernels_or_the_plan_says_why_not(preset):
    sae = build(preset).float()
    if (reason := REASONS[preset]) is None:
        assert why_not_fused(sae) is None
        return
    trainer = Trainer(sae, TrainerConfig(lr=1e-3), total_steps=2, batch_size=T, execution=Execution(Backend.triton, Precision.bf16, "a GPU"))
    assert type(trainer.engine) is TorchEngine and reason in why_not_fused(sae) and why_not_fused(sae) in trainer.choice
    assert trainer.step(Rows.of(activations().float())).terms["mse"] > 0

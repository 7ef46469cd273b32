"""The whole training step: losses and gradients of the fused kernels against autograd, then training itself against the PyTorch engine."""

import pytest
import torch

from switch_kernels import Backend, Execution, Moments, Precision, Regime
from switch_kernels.gpu.adam import FusedAdam
from switch_kernels.plan import GradientMode, Plan
from switch_sae.engines import TritonEngine, trainable
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 17, 20, 48
EXACT = Execution(Backend.triton, Precision.float32, "test")
LOW = Execution(Backend.triton, Precision.bf16, "test")
CONFIGS = {
    "topk": TopKSAE.Config(num_latents=M, k=3),
    "switch": SwitchSAE.Config(num_latents=M, k=3, num_experts=4),
    "no encoder bias, frozen router": SwitchSAE.Config(num_latents=M, k=3, num_experts=4, encoder_bias=False, train_router=False),
    "two experts per token, joint": SwitchSAE.Config(num_latents=M, k=4, num_experts=4, experts_per_token=2),
    "two experts per token, separate": SwitchSAE.Config(num_latents=M, k=4, num_experts=4, experts_per_token=2, joint_topk=False),
}
PLANS = {
    "dense": Plan(Regime.dense, GradientMode.buffered, "test"),
    "sparse": Plan(Regime.sparse, GradientMode.buffered, "test"),
    "sparse, recomputed": Plan(Regime.sparse, GradientMode.recomputed, "test"),
}


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * 2 + torch.linspace(-1, 1, D)


def build(config, plan: Plan | None = None):
    sae = (SwitchSAE if isinstance(config, SwitchSAE.Config) else TopKSAE)(config, D, torch.Generator().manual_seed(1))
    prepare(sae, activations(7, 256), normalize_activations=True)
    with torch.no_grad():  # away from the start, where decoder and encoder are equal and biases zero
        for n, (name, parameter) in enumerate(sae.named_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
            parameter.add_(noise, alpha=0.05 if name != "b_enc_M" else 0.3)
        sae.W_dec_MD.div_(sae.W_dec_MD.norm(dim=1, keepdim=True))
    if plan is not None:
        sae.plan = lambda tokens: plan
    return sae


def gradients_of(sae, tensors) -> dict[str, torch.Tensor]:
    found = dict(tensors.gradients.small)
    for name in ("W_enc_MD", "W_dec_MD"):
        found[name] = getattr(tensors.gradients, name).float()
    return found


def dead_of(name: str) -> torch.Tensor:
    dead_M = torch.zeros(M, dtype=torch.bool)
    if name == "some dead":
        dead_M[::3] = True
        dead_M[: M // 4] = False  # the first expert has none
    return dead_M


@pytest.mark.parametrize("dead", ["none dead", "some dead"])
@pytest.mark.parametrize("plan", ["dense", "sparse"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_losses_and_gradients_equal_autograd(name, plan, dead, poisoned_memory):
    sae, exact = build(CONFIGS[name], PLANS[plan]), build(CONFIGS[name]).double()
    x_TD, dead_M = activations(), dead_of(dead)
    terms = exact.loss_terms(x_TD.double(), exact(x_TD.double()), dead_M if dead_M.any() else None)
    parameters = trainable(exact)
    expected = dict(zip(parameters, torch.autograd.grad(sum(terms.values()), list(parameters.values())), strict=True))

    with torch.no_grad():
        found = sae.training_step(x_TD, FusedAdam(trainable(sae), "ieee").operands, sae.dead_latents(dead_M), "ieee")
    assert found.terms.keys() == terms.keys()
    for term, value in terms.items():
        assert found.terms[term].item() == pytest.approx(value.item(), rel=2e-5), term
    gradients = gradients_of(sae, found)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (gradients[parameter] - gradient).norm() <= 2e-5 * gradient.norm(), parameter
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert found.gradients.total_square.sqrt().item() == pytest.approx(norm.item(), rel=2e-5)


@pytest.mark.parametrize(
    ("name", "plan"), [*(("switch", plan) for plan in PLANS), *((name, "sparse, recomputed") for name in CONFIGS if name != "switch")]
)
def test_training_equals_the_pytorch_engine(name, plan):
    config = TrainerConfig(lr=1e-2, warmup_steps=0, dead_after_tokens=3 * T)
    fused, plain = build(CONFIGS[name], PLANS[plan]), build(CONFIGS[name])
    trainers = [Trainer(sae, config, 100, T, execution) for sae, execution in ((fused, EXACT), (plain, Execution()))]
    for sae in (fused, plain):
        with torch.no_grad():
            sae.W_enc_MD[44:].mul_(0.01)  # they seldom fire
    trainers[0].engine.optimizer.refresh_operands()
    for step in range(3):
        results = [trainer.step(activations(step)) for trainer in trainers]
        mine, theirs = (result.numbers() for result in results)
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    assert torch.equal(trainers[0].tokens_since_fired_M, trainers[1].tokens_since_fired_M)
    for (key, parameter), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (parameter - other).abs().max() < 2e-4, key
    torch.testing.assert_close(fused.W_dec_MD.norm(dim=1), torch.ones(M))


@pytest.mark.parametrize("plan", list(PLANS))
def test_low_precision_errs_at_most_twice_as_much_as_pytorch_in_bfloat16(plan):
    config = CONFIGS["switch"]
    truth, torch_low, fused = build(config).double(), build(config), build(config, PLANS[plan])
    x_TD = activations(rows=64)
    with torch.no_grad():
        found = fused.training_step(x_TD, FusedAdam(trainable(fused), "bf16").operands, None, "bf16")
        exact = truth(x_TD.double())
        scaled = x_TD * torch_low.activation_scale
        routing, _ = torch_low.route(scaled)
        centred = (scaled - torch_low.b_pre_D).bfloat16()
        pre_TM = centred @ torch_low.W_enc_MD.bfloat16().T + torch_low.b_enc_M.bfloat16()
        mask_TM = torch.nn.functional.one_hot(routing.expert_TS[:, 0], 4).repeat_interleave(M // 4, dim=1)
        dense_TM = torch.zeros(64, M).scatter(1, (top := (pre_TM.relu() * mask_TM).topk(3)).indices, top.values.float())
        recon = (dense_TM.bfloat16() @ torch_low.W_dec_MD.bfloat16()).float() * routing.gate_TS + torch_low.b_pre_D
    mse = (exact.recon_TD * truth.activation_scale - x_TD.double() * truth.activation_scale).pow(2).sum(1).mean()
    theirs = abs((recon - scaled).pow(2).sum(1).mean() - mse)
    assert abs(found.terms["mse"] - mse) <= 2 * theirs + 1e-3 * mse
    mine_TM = torch.zeros(64, M).scatter(1, found.indices_TK.long(), found.values_TK.float()).double() * routing.gate_TS
    exact_TM = exact.latents.to_dense()
    assert (mine_TM - exact_TM).norm() <= 2 * (dense_TM.double() * routing.gate_TS - exact_TM).norm()


def test_a_step_is_bitwise_reproducible_and_resumes_exactly():
    x, config = [activations(step) for step in range(5)], TrainerConfig(lr=1e-2, warmup_steps=0, dead_after_tokens=2 * T, moments=Moments.bfloat16)

    def trainer() -> Trainer:
        sae = build(CONFIGS["switch"], PLANS["dense"])
        with torch.no_grad():
            sae.b_enc_M[44:] = -50.0
        return Trainer(sae, config, 100, T, LOW)

    before = TritonEngine.INTERVAL
    TritonEngine.INTERVAL = 4
    try:
        straight, again, resumed = trainer(), trainer(), trainer()
        for batch in x:
            straight.step(batch)
            again.step(batch)
        for batch in x[:3]:
            resumed.step(batch)
        saved = resumed.state_dict()
        tensors = {key: tensor.clone() for key, tensor in saved[0].items()}
        other = trainer()
        other.load_state_dict(tensors, saved[1])
        for batch in x[3:]:
            result = other.step(batch)
    finally:
        TritonEngine.INTERVAL = before
    assert result.dead_M[44:].all() and "auxk" in result.terms
    for parameter, *others in zip(*(t.sae.parameters() for t in (straight, again, other)), strict=True):
        assert all(torch.equal(parameter, same) for same in others)


def test_a_loss_that_is_not_finite_changes_no_weight_and_is_reported():
    trainer = Trainer(build(CONFIGS["switch"]), TrainerConfig(lr=1e-2), 100, T, EXACT)
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    x_TD = activations()
    x_TD[3, 2] = float("nan")
    trainer.step(x_TD)
    for name, parameter in trainer.sae.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(FloatingPointError, match="the gradient was not finite at a step before step 1"):
        trainer.state_dict()


def test_one_expert_equals_topk_exactly():
    topk, switch = build(CONFIGS["topk"]), build(SwitchSAE.Config(num_latents=M, k=3, num_experts=1))
    with torch.no_grad():
        for name, parameter in topk.named_parameters():
            dict(switch.named_parameters())[name].copy_(parameter)
    trainers = [Trainer(sae, TrainerConfig(lr=1e-2), 100, T, LOW) for sae in (topk, switch)]
    for step in range(3):
        for trainer in trainers:
            trainer.step(activations(step))
    for name, parameter in topk.named_parameters():
        assert torch.equal(parameter, dict(switch.named_parameters())[name]), name

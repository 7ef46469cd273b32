"""The whole training step: losses and gradients of the fused kernels against autograd, then training itself against the PyTorch engine."""

from dataclasses import replace

import pytest
import torch

from experiments.benchmarks.cases import MAIN, Case
from experiments.benchmarks.nodes import is_operator, nodes
from switch_kernels import Backend, Execution, Group, Moments, Precision, Regime
from switch_kernels.adam import Adam
from switch_kernels.gpu.adam import FusedAdam
from switch_kernels.gpu.inference import operand
from switch_kernels.gpu.step import Settings, Weights, training_step
from switch_kernels.gpu.update_small import Schedule
from switch_kernels.plan import GradientMode, Plan
from switch_sae.engines import TritonEngine, trainable
from switch_sae.models import SwitchSAE, TopKSAE, fused
from switch_sae.models.routers import SoftmaxRouter
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 17, 20, 48
SEED = torch.zeros(1, dtype=torch.int32)
EXACT = Execution(Backend.triton, Precision.float32, "test")
LOW = Execution(Backend.triton, Precision.bf16, "test")
CONFIGS = {
    "topk": TopKSAE.Config(num_latents=M, k=3),
    "switch": SwitchSAE.Config(num_latents=M, k=3, num_experts=4),
    "no encoder bias, frozen router": SwitchSAE.Config(
        num_latents=M, k=3, num_experts=4, encoder_bias=False, router=SoftmaxRouter.Config(train=False)
    ),
    "two experts per token, joint": SwitchSAE.Config(num_latents=M, k=4, num_experts=4, experts_per_token=2),
    "two experts per token, separate": SwitchSAE.Config(num_latents=M, k=4, num_experts=4, experts_per_token=2, joint_topk=False),
}
PLANS = {
    "dense": Plan(Regime.dense, GradientMode.buffered, "test"),
    "sparse": Plan(Regime.sparse, GradientMode.buffered, "test"),
    "sparse, recomputed": Plan(Regime.sparse, GradientMode.recomputed, "test"),
}


@pytest.fixture(autouse=True)
def planner(monkeypatch):
    """`build` replaces the planner; the next test has its own again."""
    monkeypatch.setattr(fused, "choose_plan", fused.choose_plan)


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * 2 + torch.linspace(-1, 1, D)


def build(config, plan: Plan | None = None):
    sae = (SwitchSAE if isinstance(config, SwitchSAE.Config) else TopKSAE)(config, D, torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(activations(7, 256)), normalize_activations=True)
    with torch.no_grad():  # away from the start, where decoder and encoder are equal and biases zero
        for n, (name, parameter) in enumerate(sae.named_parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
            parameter.add_(noise, alpha=0.05 if name != "b_enc_M" else 0.3)
        sae.W_dec_MD.div_(sae.W_dec_MD.norm(dim=1, keepdim=True))
    if plan is not None:
        fused.choose_plan = lambda *_: plan
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
    terms = exact.loss_terms(Rows.of(x_TD.double()), exact(x_TD.double()), dead_M if dead_M.any() else None)
    parameters = trainable(exact)
    expected = dict(zip(parameters, torch.autograd.grad(sum(terms.values()), list(parameters.values())), strict=True))

    with torch.no_grad():
        found = sae.training_step(Rows.of(x_TD), FusedAdam(trainable(sae), "ieee").operands, sae.dead_latents(dead_M), "ieee", SEED)
    assert found.terms.keys() == terms.keys()
    for term, value in terms.items():
        assert found.terms[term].item() == pytest.approx(value.item(), rel=2e-5), term
    gradients = gradients_of(sae, found)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (gradients[parameter] - gradient).norm() <= 2e-5 * gradient.norm(), parameter
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found.gradients.square.sqrt().item() == pytest.approx(norm.item(), rel=2e-5)


@pytest.mark.parametrize("plan", ["dense", "sparse"])
def test_gates_that_underflow_give_no_gradient_and_no_nan(plan):
    sae = build(CONFIGS["two experts per token, joint"], PLANS[plan])
    with torch.no_grad():
        sae.router.W_ED.mul_(300)
        x_TD = activations()
        assert (sae.route(x_TD)[0].gate_TS == 0).any()
        exact = build(CONFIGS["two experts per token, joint"]).double()
        exact.router.W_ED.mul_(300)
        found = sae.training_step(Rows.of(x_TD), FusedAdam(trainable(sae), "ieee").operands, None, "ieee", SEED)
    terms = exact.loss_terms(Rows.of(x_TD.double()), exact(x_TD.double()), None)
    parameters = trainable(exact)
    gradients = gradients_of(sae, found)
    for name, gradient in zip(parameters, torch.autograd.grad(sum(terms.values()), list(parameters.values())), strict=True):
        assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-4, name


@pytest.mark.whole_steps
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
        results = [trainer.step(Rows.of(activations(step))) for trainer in trainers]
        mine, theirs = (result.numbers() for result in results)
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    assert torch.equal(trainers[0].tokens_since_fired_M, trainers[1].tokens_since_fired_M)
    for (key, parameter), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (parameter - other).abs().max() < 2e-4, key
    torch.testing.assert_close(fused.W_dec_MD.norm(dim=1), torch.ones(M))


def test_training_towards_targets_of_their_own_equals_the_pytorch_engine():
    fused, plain = build(CONFIGS["switch"], PLANS["dense"]), build(CONFIGS["switch"])
    trainers = [Trainer(sae, TrainerConfig(lr=1e-2, warmup_steps=0), 100, T, execution) for sae, execution in ((fused, EXACT), (plain, Execution()))]
    for step in range(2):
        x_TD = activations(step)
        results = [trainer.step(Rows.of(x_TD, 2 * x_TD)) for trainer in trainers]
        mine, theirs = (result.numbers() for result in results)
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    for (key, parameter), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (parameter - other).abs().max() < 2e-4, key


@pytest.mark.parametrize("plan", list(PLANS))
def test_low_precision_errs_at_most_twice_as_much_as_pytorch_in_bfloat16(plan):
    config = CONFIGS["switch"]
    truth, torch_low, fused = build(config).double(), build(config), build(config, PLANS[plan])
    x_TD = activations(rows=64)
    with torch.no_grad():
        found = fused.training_step(Rows.of(x_TD), FusedAdam(trainable(fused), "bf16").operands, None, "bf16", SEED)
        exact = truth(x_TD.double())
        scaled = x_TD * torch_low.activation_scale
        routing, _ = torch_low.route(x_TD)
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


@pytest.mark.whole_steps
def test_a_step_is_bitwise_reproducible_and_resumes_exactly():
    x, config = [activations(step) for step in range(3)], TrainerConfig(lr=1e-2, warmup_steps=0, dead_after_tokens=2 * T, moments=Moments.bfloat16)

    def trainer() -> Trainer:
        sae = build(CONFIGS["switch"], PLANS["dense"])
        with torch.no_grad():
            sae.b_enc_M[44:] = -50.0
        return Trainer(sae, config, 100, T, LOW)

    before = TritonEngine.INTERVAL
    TritonEngine.INTERVAL = 2
    try:
        straight, again, resumed = trainer(), trainer(), trainer()
        for batch in x:
            straight.step(Rows.of(batch))
            again.step(Rows.of(batch))
        for batch in x[:1]:
            resumed.step(Rows.of(batch))
        saved = resumed.state_dict()
        tensors = {key: tensor.clone() for key, tensor in saved[0].items()}
        other = trainer()
        other.load_state_dict(tensors, saved[1])
        for batch in x[1:]:
            result = other.step(Rows.of(batch))
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
    trainer.step(Rows.of(x_TD))
    for name, parameter in trainer.sae.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(FloatingPointError, match="the gradient was not finite at a step before step 1"):
        trainer.state_dict()


@pytest.mark.whole_steps
def test_one_expert_equals_topk_exactly():
    topk, switch = build(CONFIGS["topk"]), build(SwitchSAE.Config(num_latents=M, k=3, num_experts=1))
    with torch.no_grad():
        for name, parameter in topk.named_parameters():
            dict(switch.named_parameters())[name].copy_(parameter)
    trainers = [Trainer(sae, TrainerConfig(lr=1e-2), 100, T, LOW) for sae in (topk, switch)]
    for step in range(3):
        for trainer in trainers:
            trainer.step(Rows.of(activations(step)))
    for name, parameter in topk.named_parameters():
        assert torch.equal(parameter, dict(switch.named_parameters())[name]), name


def transcoder_losses(x_TD, target_TD, scale, target_scale, w, E, S, k, dead_M, balance, auxk):
    """mse, load balance and AuxK by the equations, every expert computed and then masked; `auxk` is (latents per expert, coefficient)."""
    x_TD, target_TD, F = x_TD * scale, target_TD * target_scale, M // E
    pre_TM, gate_TM = (x_TD - w["b_in_D"]) @ w["W_enc_MD"].T + w["b_enc_M"], torch.ones(len(x_TD), M, dtype=torch.float64)
    terms, expert_TS = {}, torch.zeros(len(x_TD), 1, dtype=torch.int64)
    if E > 1:
        probs_TE = torch.softmax((x_TD - w["b_router_D"]) @ w["W_router_ED"].T, dim=1)
        gate_TS, expert_TS = probs_TE.topk(S, dim=1)
        gate_TM = torch.zeros_like(probs_TE).scatter(1, expert_TS, gate_TS).repeat_interleave(F, dim=1)
        share_E = torch.bincount(expert_TS.flatten(), minlength=E) / expert_TS.numel()
        terms["load_balance"] = balance * E * torch.dot(share_E.double(), probs_TE.mean(0))
    top = (pre_TM.relu() * gate_TM).topk(k, dim=1)
    residual_TD = target_TD - torch.zeros_like(pre_TM).scatter(1, top.indices, top.values) @ w["W_dec_MD"] - w["b_out_D"]
    terms["mse"] = residual_TD.pow(2).sum(1).mean()
    if dead_M is not None:
        recon_TD, fixed_TD = torch.zeros_like(residual_TD), residual_TD.detach()
        pre_TM = (x_TD - w["b_in_D"].detach()) @ w["W_enc_MD"].T + w["b_enc_M"]
        for slot in range(S):
            mine_TM = dead_M & (torch.arange(M) // F == expert_TS[:, slot, None])
            best = pre_TM.masked_fill(~mine_TM, float("-inf")).topk(auxk[0], dim=1)
            z_TM = torch.zeros_like(pre_TM).scatter(1, best.indices, best.values.relu())
            recon_TD = recon_TD + gate_TM.detach().gather(1, expert_TS[:, slot, None] * F) * (z_TM @ w["W_dec_MD"])
        terms["auxk"] = auxk[1] * (fixed_TD - recon_TD).pow(2).sum() / (fixed_TD - fixed_TD.mean(0)).pow(2).sum()
    return terms


@pytest.mark.parametrize("dead", ["none dead", "some dead"])
@pytest.mark.parametrize("plan", ["dense", "sparse"])
@pytest.mark.parametrize(("E", "S"), [(1, 1), (4, 1), (4, 2)])
def test_input_and_target_have_sizes_scales_and_biases_of_their_own(E, S, plan, dead, poisoned_memory):
    """The roles that an autoencoder's b_pre and activation_scale have at once, as a transcoder would split them."""
    D_out, k, generator = 11, 4, torch.Generator().manual_seed(3)
    sizes = {"W_enc_MD": (M, D), "W_dec_MD": (M, D_out), "b_enc_M": (M,), "b_in_D": (D,), "b_out_D": (D_out,)}
    if E > 1:
        sizes |= {"W_router_ED": (E, D), "b_router_D": (D,)}
    w = {name: torch.randn(size, generator=generator) * 0.3 for name, size in sizes.items()}
    x_TD, target_TD, scale, target_scale = activations(), torch.randn(T, D_out, generator=generator), torch.tensor(0.7), torch.tensor(1.6)
    dead_M = torch.arange(M) % 3 == 0 if dead == "some dead" else None
    found_dead = None
    if dead_M is not None:
        sae = build(CONFIGS["switch"] if E > 1 else CONFIGS["topk"])
        found_dead = replace(sae.dead_latents(dead_M), k=3, coefficient=0.4)
    exact = {name: tensor.double().requires_grad_() for name, tensor in w.items()}
    terms = transcoder_losses(x_TD.double(), target_TD.double(), scale.double(), target_scale.double(), exact, E, S, k, dead_M, 2.0, (3, 0.4))
    expected = dict(zip(exact, torch.autograd.grad(sum(terms.values()), list(exact.values())), strict=True))
    with torch.no_grad():
        weights = Weights(**{**w, **{name: operand(w[name], "ieee") for name in ("W_enc_MD", "W_dec_MD")}})
        settings = Settings(E, S, k, True, 2.0, E > 1, "ieee", PLANS[plan])
        found = training_step(x_TD, target_TD, scale, target_scale, weights, settings, found_dead)
    assert found.terms.keys() == terms.keys()
    for term, value in terms.items():
        assert found.terms[term].item() == pytest.approx(value.item(), rel=2e-5), term
    gradients = gradients_of(None, found)
    assert gradients.keys() == expected.keys() and gradients["W_dec_MD"].shape == (M, D_out)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm(), name


def schedule(optimizer: FusedAdam, clip: float) -> Schedule:
    position, seed = (torch.zeros(1, dtype=dtype) for dtype in (torch.int64, torch.int32))
    return Schedule(torch.tensor([optimizer.hyper(0, 1e-2, clip)]), position, seed, torch.zeros(()))


@pytest.mark.parametrize(("E", "S", "regime", "most"), [(32, 1, "dense", 23), (32, 2, "dense", 26), (1, 1, "dense", 22), (32, 1, "sparse", 29)])
def test_a_step_has_few_nodes_and_calls_no_library_for_products(E, S, regime, most):
    """`MAIN` of the benchmark: every node costs about 2 us, of 600; and cuBLAS would keep a workspace that other graphs free."""
    names = nodes(Case(replace(MAIN, E=E, S=S), regime=Regime(regime)))
    assert len(names) <= most
    sorts = {f"aten.{name}" for name in ("_to_copy.default", "sort.stable", "arange.start", "searchsorted.Tensor_out")}
    assert {name for name in names if is_operator(name)} <= {"aten.zeros.default", "aten.add_.Tensor"} | (sorts if regime == "sparse" else set())


class WithAnother(Group):
    """Two processes, of which the other's gradients are known: those of another batch, in the order in which they are averaged."""

    size = 2

    def __init__(self, others: list[torch.Tensor]) -> None:
        self.others = others

    def mean_(self, tensors):
        for tensor, other in zip(tensors, self.others, strict=True):
            tensor.add_(other).div_(2)


@pytest.mark.parametrize("plan", ["dense", "sparse"])
def test_gradients_are_averaged_over_the_group_before_their_norm_is_taken(plan):
    sae, plain = build(CONFIGS["switch"], PLANS[plan]), build(CONFIGS["switch"])
    with torch.no_grad():
        optimizer = FusedAdam(trainable(sae), "ieee")
        mine, other = (sae.training_step(Rows.of(activations(seed)), optimizer.operands, None, "ieee", SEED).gradients for seed in (0, 1))
        mine_by_name, other_by_name = ({**g.small, "W_enc_MD": g.W_enc_MD, "W_dec_MD": g.W_dec_MD} for g in (mine, other))
        averaged = {name: (gradient + other_by_name[name]) / 2 for name, gradient in mine_by_name.items()}
        optimizer.group = WithAnother([other.W_enc_MD, other.W_dec_MD, *(other.small[name] for name in mine.small)])
        expected = Adam(trainable(plain), "W_dec_MD", fused=None).step(averaged, 1e-2, 0.5)
        norm = optimizer.step(mine, schedule(optimizer, clip=0.5))
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5) and norm > 0.5
    for (name, parameter), same in zip(sae.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_that_are_recomputed_cannot_be_averaged():
    sae = build(CONFIGS["switch"], PLANS["sparse, recomputed"])
    optimizer = FusedAdam(trainable(sae), "ieee", group=WithAnother([]))
    with torch.no_grad():
        gradients = sae.training_step(Rows.of(activations()), optimizer.operands, None, "ieee", SEED).gradients
    with pytest.raises(ValueError, match=r"recomputed in the update cannot be averaged over processes\. Use GradientMode\.buffered"):
        optimizer.step(gradients, schedule(optimizer, clip=1.0))

"""The training steps of SAEs that search, or that select under one threshold: losses and gradients of the fused kernels against autograd in float64,
then training against the PyTorch engine. Kernels draw other rivals than PyTorch: what they drew is handed to it (`same_rivals`).
"""

import pytest
import torch

from experiments.benchmarks.cases import MAIN
from experiments.benchmarks.nodes import SEARCHES, engine_on_meta, is_operator, nodes_of
from experiments.benchmarks.searches import same_rivals
from switch_kernels import Backend, Execution, Moments, Plan, Precision, Regime
from switch_kernels.gpu import route
from switch_kernels.gpu.adam import FusedAdam
from switch_kernels.plan import GradientMode
from switch_sae.engines import TritonEngine, trainable
from switch_sae.models import SAES, fused, fused_search
from switch_sae.models.routers import CompetitionRouter
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

pytestmark = pytest.mark.whole_steps
D, T = 17, 24
EXACT, LOW = (Execution(Backend.triton, precision, "test") for precision in (Precision.float32, Precision.bf16))
CONFIGS = {
    "pursuit": ("switch_pursuit", {"num_latents": 36, "k": 4, "num_experts": 3, "blocks": 2}),
    "pursuit, stop rule, shared": ("switch_pursuit", {"num_latents": 42, "k": 4, "num_experts": 3, "shared": 6, "stop": True}),
    "pursuit, no rivals": ("switch_pursuit", {"num_latents": 36, "k": 4, "num_experts": 3, "router": CompetitionRouter.Config(rivals=0)}),
    "refit": ("switch_refit", {"num_latents": 36, "k": 3, "num_experts": 3}),
    "refit, shared": ("switch_refit", {"num_latents": 42, "k": 3, "num_experts": 3, "shared": 6, "max_latents": 5, "missed_share": 0.6}),
    "refit, nothing missed, no rivals": (
        "switch_refit",
        {"num_latents": 36, "k": 3, "num_experts": 3, "missed": 0, "router": CompetitionRouter.Config(rivals=0)},
    ),
    "pursuit, frozen router": ("switch_pursuit", {"num_latents": 36, "k": 4, "num_experts": 3, "router": CompetitionRouter.Config(train=False)}),
    "competition": ("switch", {"num_latents": 51, "k": 4, "num_experts": 3, "router": CompetitionRouter.Config()}),
    "competition, sparse": ("switch", {"num_latents": 51, "k": 4, "num_experts": 3, "router": CompetitionRouter.Config(rivals=0.6)}),
    "threshold, gates": ("switch_batch_topk", {"num_latents": 51, "k": 4, "num_experts": 3}),
    "threshold": ("switch_batch_topk", {"num_latents": 51, "k": 4, "num_experts": 3, "router": CompetitionRouter.Config()}),
    "threshold, frozen router, no encoder bias": (
        "switch_batch_topk",
        {"num_latents": 36, "k": 3, "num_experts": 3, "encoder_bias": False, "router": CompetitionRouter.Config(train=False)},
    ),
}


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * 2 + torch.linspace(-1, 1, D)


def build(name: str):
    architecture, settings = CONFIGS[name]
    sae = SAES.build(SAES[architecture].Config(**settings), D, torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(activations(7, 256)), normalize_activations=True)
    with torch.no_grad():  # away from the start
        for n, parameter in enumerate(sae.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)), alpha=0.05)
        sae.W_dec_MD.div_(sae.W_dec_MD.norm(dim=1, keepdim=True))
    return sae


def set_gram_tokens(sae) -> None:
    """Every second step reads Gram matrices that are older, where there are some."""
    if hasattr(sae.config, "gram_tokens"):
        sae.config.gram_tokens = 2 * T


def dead_of(sae, some: bool) -> torch.Tensor:
    dead_M = torch.zeros(sae.num_latents, dtype=torch.bool)
    if some:
        dead_M[::3] = True
        dead_M[sae.num_shared : sae.num_shared + sae.latents_per_expert] = False  # the first expert has none of its own
    return dead_M


def step_of(sae, x_TD, dead_M, dot: str, seed: int = 5):
    sae.prepare_step()
    with torch.no_grad():
        operands = FusedAdam(trainable(sae), dot).operands
        return sae.training_step(Rows.of(x_TD), operands, sae.dead_latents(dead_M), dot, torch.tensor([seed], dtype=torch.int32))


@pytest.mark.parametrize("some_dead", [False, True], ids=["none dead", "some dead"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_losses_and_gradients_equal_autograd(name, some_dead, monkeypatch, poisoned_memory):
    for module in (fused_search, fused) if "sparse" in name else (fused_search,):
        monkeypatch.setattr(module, "choose_plan", lambda *_, **__: Plan(Regime.sparse, GradientMode.buffered, "test"))
    sae, exact = build(name), build(name).double()
    x_TD, dead_M = activations(), dead_of(sae, some_dead)
    with same_rivals():
        found = step_of(sae, x_TD, dead_M, "ieee")
        terms = exact.loss_terms(Rows.of(x_TD.double()), exact(x_TD.double()), dead_M if some_dead else None)
    assert found.terms.keys() == terms.keys()
    for term, value in terms.items():
        assert found.terms[term].item() == pytest.approx(value.item(), rel=2e-5), term
    parameters = trainable(exact)
    expected = dict(zip(parameters, torch.autograd.grad(sum(terms.values()), list(parameters.values())), strict=True))
    gradients = {**found.gradients.small, "W_dec_MD": found.gradients.W_dec_MD.float()}
    if "W_enc_MD" in expected:
        gradients["W_enc_MD"] = found.gradients.W_enc_MD.float()
    assert gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (gradients[parameter] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, parameter
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found.gradients.square.sqrt().item() == pytest.approx(norm.item(), rel=2e-5)


@pytest.mark.parametrize("name", ["pursuit, stop rule, shared", "refit, shared", "competition", "threshold"])
def test_training_equals_the_pytorch_engine(name):
    config = TrainerConfig(lr=1e-2, warmup_steps=0, dead_after_tokens=9 * T)  # the kernels look for dead latents at readings only
    fused, plain = build(name), build(name)
    for sae in (fused, plain):
        set_gram_tokens(sae)
    trainers = [Trainer(sae, config, 100, T, execution) for sae, execution in ((fused, EXACT), (plain, Execution()))]
    assert (
        type(trainers[0].engine) is TritonEngine and ("sparse" if "," in name and "gates" not in name else "dense") + " latents" in trainers[0].choice
    )
    with same_rivals():
        for step in range(4):
            mine, theirs = (trainer.step(Rows.of(activations(step))).numbers() for trainer in trainers)
            assert mine.keys() == theirs.keys()
            assert mine == pytest.approx(theirs, rel=5e-4, abs=1e-5)
    assert torch.equal(trainers[0].tokens_since_fired_M, trainers[1].tokens_since_fired_M)
    for (key, tensor), other in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert (tensor - other).abs().max() < 5e-4, key
    torch.testing.assert_close(fused.W_dec_MD.norm(dim=1), torch.ones(fused.num_latents))


@pytest.mark.parametrize("name", ["refit", "threshold"])
def test_a_step_is_bitwise_reproducible_and_resumes_exactly(name, monkeypatch):
    x = [activations(step) for step in range(3)]
    config = TrainerConfig(lr=1e-2, warmup_steps=0, dead_after_tokens=9 * T, moments=Moments.bfloat16)
    monkeypatch.setattr(TritonEngine, "INTERVAL", 2)

    def trainer() -> Trainer:
        sae = build(name)
        set_gram_tokens(sae)
        return Trainer(sae, config, 100, T, LOW)

    straight, resumed = trainer(), trainer()
    for batch in x:
        straight.step(Rows.of(batch))
    for batch in x[:1]:
        resumed.step(Rows.of(batch))
    tensors, state = resumed.state_dict()
    other = trainer()
    other.load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, state)
    for batch in x[1:]:
        other.step(Rows.of(batch))
    for (key, tensor), same in zip(straight.sae.state_dict().items(), other.sae.state_dict().values(), strict=True):
        assert torch.equal(tensor, same), key


@pytest.mark.parametrize("name", ["pursuit, stop rule, shared", "refit", "threshold"])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported(name):
    trainer = Trainer(build(name), TrainerConfig(lr=1e-2), 100, T, EXACT)
    before = {key: tensor.clone() for key, tensor in trainer.sae.state_dict().items()}
    x_TD = activations()
    x_TD[3, 2] = float("nan")
    trainer.step(Rows.of(x_TD))
    for key, tensor in trainer.sae.state_dict().items():
        if key != "theta" or "pursuit" in name:  # a refit's is known before the loss is
            assert torch.equal(tensor, before[key]), key
    with pytest.raises(FloatingPointError, match="the gradient was not finite at a step before step 1"):
        trainer.state_dict()
    tensors, state = Trainer(build(name), TrainerConfig(lr=1e-2), 100, T, EXACT).state_dict()
    trainer.load_state_dict(tensors, state)  # a step before it is where to go on from
    trainer.step(Rows.of(activations()))
    trainer.state_dict()


@pytest.mark.parametrize("name", ["pursuit, stop rule, shared", "refit, shared", "threshold, gates"])
def test_low_precision_stays_near(name):
    sae, exact = build(name), build(name).double()
    x_TD = activations(rows=64)
    with same_rivals():
        found = step_of(sae, x_TD, dead_of(sae, False), "bf16")
        terms = exact.loss_terms(Rows.of(x_TD.double()), exact(x_TD.double()))
    for term, value in terms.items():
        assert found.terms[term].item() == pytest.approx(value.item(), rel=2e-2), term


def test_a_residual_without_variance_has_no_auxk():
    """One token: what is left of its variance is rounding, which nothing may be divided by."""
    sae, x_TD = build("refit"), activations(rows=1)
    found = step_of(sae, x_TD, torch.ones(sae.num_latents, dtype=torch.bool), "ieee")
    assert found.terms["auxk"] == 0 and found.gradients.square.isfinite()


def test_more_experts_than_the_router_holds_train_by_autograd():
    assert fused.MOST_EXPERTS == route.TILE
    config = SAES["switch_pursuit"].Config(num_latents=4097, num_experts=4097, k=1)
    sae = SAES.build(config, D, torch.Generator().manual_seed(0))
    assert fused.why_not_fused(sae) == "the Triton kernels route to 4096 experts at most, not to 4097"


@pytest.mark.parametrize(("name", "most"), [("switch_pursuit", 31), ("switch_pursuit, stop rule, 1024 shared", 32), ("switch_refit", 58)])
def test_a_step_has_few_nodes_and_calls_no_library_for_products(name, most):
    """At the benchmark's main sizes, with Gram matrices; autograd's step of `switch_pursuit` had about 175 operators."""
    names = nodes_of(engine_on_meta(SEARCHES[name], MAIN.T, MAIN.D))
    assert len(names) <= most and "_gram" in names
    sorts = {"sort.stable", "arange.start", "searchsorted.Tensor_out", "_to_copy.default"}
    small = {
        "cat.default",
        "full.default",
        "sum.default",
        "sum.dim_IntList",
        "add_.Tensor",
        "zeros.default",
        "ones.default",
        "zeros_like.default",
        "constant_pad_nd.default",
    }
    assert {node for node in names if is_operator(node)} <= {f"aten.{node}" for node in sorts | small}

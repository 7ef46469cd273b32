"""What a step in kernels holds is foretold from a step on meta tensors; here against the tensors of a real one, and against what must be in it."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from switch_kernels import Backend, Execution, Plan, Precision, Regime
from switch_kernels.gpu.launch import Launch, launches_to
from switch_kernels.held import Held
from switch_kernels.plan import GradientMode
from switch_sae.memory import group_bytes, state_bytes
from switch_sae.models import SwitchSAE, TopKSAE, fused
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M, E, K = 16, 8, 32, 2, 2
LOW, EXACT = (Execution(Backend.triton, precision, "test") for precision in (Precision.bf16, Precision.float32))
DENSE = Plan(Regime.dense, GradientMode.buffered, "test")
SPARSE = Plan(Regime.sparse, GradientMode.recomputed, "test")


def build(monkeypatch, plan: Plan, execution: Execution = LOW, experts: int = E) -> Trainer:
    monkeypatch.setattr(fused, "choose_plan", lambda *_: plan)
    kind, fields = (SwitchSAE, {"num_experts": experts}) if experts > 1 else (TopKSAE, {})
    sae = kind(kind.Config(num_latents=M, k=K, **fields), D, torch.Generator().manual_seed(1))
    rows = Rows.of(torch.randn(T, D, generator=torch.Generator().manual_seed(0)))
    prepare(sae, rows, normalize_activations=True)
    return Trainer(sae, TrainerConfig(), 10, T, execution)


def unseen(launch: Launch) -> None:
    """Runs it; neither the interpreter's own tensors count nor those that its cycles hold on to."""
    with _disable_current_modes():
        launch.run()
    gc.collect(1)


@pytest.mark.parametrize(("plan", "experts", "execution"), [(DENSE, E, LOW), (DENSE, 1, EXACT), (SPARSE, E, LOW)])
def test_a_step_holds_what_was_foretold(plan, experts, execution, monkeypatch):
    trainer = build(monkeypatch, plan, execution, experts)
    foretold, weights = trainer.engine.step_bytes(T), {name: p.clone() for name, p in trainer.sae.named_parameters()}
    assert all(torch.equal(p, weights[name]) for name, p in trainer.sae.named_parameters()), "nothing was trained"
    batch = Rows.of(torch.randn(T, D, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad(), Held() as held, launches_to(unseen):
        trainer.engine.rows = batch.clone()
        computed = trainer.engine._compute()
    size = 2 if execution is LOW else 4
    copies = 2 * M * D * size if execution is LOW else 0  # float32 rows of a multiple of 8 are the weights themselves
    assert computed and foretold == pytest.approx(held.peak + copies, rel=0.02), "some operators hold a few bytes more on one of the devices"
    pre, gradients = T * (M // experts) * size, 2 * M * D * size * (plan is DENSE)
    assert foretold >= copies + pre + gradients + T * D * (4 + size), "batch, rows in order"


def test_held_counts_what_lives_once():
    with Held() as held:
        a = torch.zeros(100)
        b = a.view(10, 10)[2:]
        a.add_(1)
        assert (held.bytes, held.peak) == (400, 400)
        del a
        assert held.bytes == 400, "a view keeps it"
        c = torch.zeros(50, device="meta")
        del b
    assert (held.bytes, held.peak) == (200, 600) and len(c) == 50


def test_every_member_of_a_group_keeps_its_own_step(monkeypatch):
    one, other = build(monkeypatch, DENSE), build(monkeypatch, DENSE, experts=1)
    alone = [group_bytes([trainer]) for trainer in (one, other)]
    assert alone == [state_bytes(trainer) + trainer.engine.step_bytes(T) for trainer in (one, other)]
    assert group_bytes([one, other]) == sum(alone)
    by_autograd = [build(monkeypatch, DENSE, Execution()) for _ in range(2)]
    assert group_bytes(by_autograd) == 2 * state_bytes(by_autograd[0]) + sum(p.nbytes for p in by_autograd[0].sae.parameters())

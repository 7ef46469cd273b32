"""Operands of inference: cast once for weights that stay, again for weights that change, and freed with them."""

import gc
import weakref

import pytest
import torch

from switch_kernels import Backend, Execution, Precision
from switch_kernels.gpu import inference
from switch_sae.models import SwitchSAE
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 12, 8, 16
LOW = Execution(Backend.triton, Precision.bf16, "test")


@pytest.fixture
def casts(monkeypatch):
    """A list that grows with every operand that is made."""
    made, real = [], inference.operand
    monkeypatch.setattr(inference, "operand", lambda W_MD, engine: (made.append(engine), real(W_MD, engine))[1])
    return made


def rows(seed: int = 0) -> Rows:
    return Rows.of(torch.randn(T, D, generator=torch.Generator().manual_seed(seed)))


def build(execution: Execution = LOW) -> SwitchSAE:
    sae = SwitchSAE(SwitchSAE.Config(num_latents=M, k=2, num_experts=2), D, torch.Generator().manual_seed(1))
    prepare(sae, rows(), normalize_activations=True)
    sae.execution = execution
    return sae


@torch.no_grad()
def run(sae) -> torch.Tensor:
    return sae.decode(sae.encode(rows().x_TD))


def test_weights_that_stay_are_cast_once_and_those_that_changed_again(casts):
    sae = build()
    before_TD = run(sae)
    assert len(casts) == 2, "encoder and decoder"
    assert torch.equal(run(sae), before_TD) and len(casts) == 2
    with torch.no_grad():
        sae.W_dec_MD.mul_(-2)
    changed_TD = run(sae)
    assert len(casts) == 3 and not torch.equal(changed_TD, before_TD)
    inference._kept.clear()
    assert torch.equal(run(sae), changed_TD)


def test_training_in_kernels_which_pytorch_does_not_see_is_seen():
    sae = build()
    trainer, before_TD = Trainer(sae, TrainerConfig(lr=1e-2), 10, T, LOW), run(sae)
    trainer.step(rows(1))
    after_TD = run(sae)
    assert not torch.equal(after_TD, before_TD)
    inference._kept.clear()
    assert torch.equal(run(sae), after_TD)


def test_operands_die_with_their_weights_and_float32_ones_that_need_no_padding_are_not_kept():
    sae = build()
    run(sae)
    (kept,) = (weakref.ref(found) for key, (_, found) in inference._kept[sae.W_enc_MD.untyped_storage()].items())
    del sae
    gc.collect()
    assert kept() is None and not len(inference._kept)
    W_MD = torch.randn(M, 16)
    assert inference.kept_operand(W_MD, "ieee").data_ptr() == W_MD.data_ptr() and not inference._kept.get(W_MD.untyped_storage())


@pytest.mark.parametrize("change", [lambda W: W[:8], lambda W: W[:, ::2], lambda W: W.T])
def test_another_view_of_the_same_memory_has_an_operand_of_its_own(change):
    W_MD = torch.randn(M, M)
    for view in (W_MD, change(W_MD), W_MD):
        assert torch.equal(inference.kept_operand(view, "bf16")[:, : view.shape[1]], view.bfloat16())


def test_inference_tensors_have_no_version_and_are_cast_every_time():
    with torch.inference_mode():
        W_MD = torch.randn(M, M)
        first = inference.kept_operand(W_MD, "bf16")
        W_MD.mul_(2)
        assert torch.equal(inference.kept_operand(W_MD, "bf16"), 2 * first)

"""Activations of every dtype, under autocast, none at all, and what is no tensor: every architecture and router reads the same values alike."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import CONTRACTS

from switch_sae.models import SAES, DenseLatents, SparseLatents, TopKSAE
from switch_sae.rows import Rows
from switch_sae.runs import load_sae, save_sae
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 12, 96, 48
DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)
LOW = (torch.float16, torch.bfloat16)
ERROR = {torch.float64: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.25}
"""Of a reconstruction by rounded weights, which send some tokens to another expert."""
DEAD_M = torch.arange(M) % 3 == 0


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * 3 + torch.linspace(-2, 2, D)


def build(config, calibration=None):
    sae = SAES.build(config, D, torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(activations(7, 512) if calibration is None else calibration), normalize_activations=True)
    return sae


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def outputs(sae, x, target=None) -> dict[str, torch.Tensor]:
    """Everything that an SAE says about a batch."""
    output, rows = sae(x), Rows.of(x, target)
    found = {
        "recon": output.recon_TD,
        "latents": output.latents.to_dense(),
        "encoded": sae.encode(x).to_dense(),
        "decoded": sae.decode(sae.encode(x)),
    }
    if output.routing is not None:
        found |= {f"forward {key}": value for key, value in vars(output.routing).items()}
        found |= {f"route {key}": value for key, value in vars(sae.route(x)[0]).items()}
    return found | {f"loss {key}": value for key, value in sae.loss_terms(rows, output, DEAD_M).items()}


@pytest.fixture(params=list(CONTRACTS))
def name(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def training(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_values_give_the_float32_result_in_every_dtype(name, training, dtype):
    sae, x, target = build(CONTRACTS[name]).train(training), activations().to(dtype), activations(1).to(dtype)
    found = outputs(sae, x, target)
    same(found, outputs(sae, x.float(), target.float()))
    assert found["recon"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_start_and_training_steps_are_those_of_the_float32_values(name, dtype):
    states = []
    for change in (lambda x: x, lambda x: x.float()):
        sae = build(CONTRACTS[name], change(activations(7, 512).to(dtype)))
        trainer = Trainer(sae, TrainerConfig(lr=1e-2, dead_after_tokens=T), total_steps=3, batch_size=T)
        for step in range(3):
            trainer.step(Rows.of(change(activations(step).to(dtype))))
        states.append(trainer.state_dict()[0])
    same(*states)


def test_autocast_changes_nothing(name, training):
    sae, x = build(CONTRACTS[name]).train(training), activations()
    expected = outputs(sae, x)
    for lower in LOW:
        with torch.autocast("cpu", dtype=lower):
            assert (x @ x.T).dtype == lower, "it is on"
            found = outputs(sae, x)
            assert torch.is_autocast_enabled("cpu"), "and stays on for others"
        same(found, expected)


def test_training_and_the_start_do_not_see_autocast(name):
    states = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            trainer = Trainer(build(CONTRACTS[name]), TrainerConfig(lr=1e-2), total_steps=2, batch_size=T)
            for step in range(2):
                trainer.step(Rows.of(activations(step)))
        states.append(trainer.state_dict()[0])
    same(*states)


def test_a_subclass_that_overrides_is_computed_outside_autocast_too():
    class Mine(TopKSAE):
        def encode(self, x_TD):
            assert not torch.is_autocast_enabled("cpu")
            return super().encode(x_TD)

    sae = Mine(TopKSAE.Config(num_latents=M, k=4), D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = sae.encode(activations())
    assert torch.equal(latents.to_dense(), sae.encode(activations()).to_dense())


def test_empty_batches_are_legal(name, training):
    sae, none = build(CONTRACTS[name]).train(training), activations()[:0]
    output = sae(none)
    latents = sae.encode(none)
    assert output.recon_TD.shape == sae.decode(latents).shape == sae.decode(DenseLatents(latents.to_dense())).shape == (0, D)
    assert latents.to_dense().shape == output.latents.to_dense().shape == (0, M) and latents.firing_counts().tolist() == [0] * M
    output.recon_TD.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in sae.parameters())
    if output.routing is not None:
        assert len(output.routing.expert_TS) == len(sae.route(none)[0].expert_TS) == 0


@pytest.mark.parametrize("dtype", (*LOW, torch.float64), ids=str)
def test_an_sae_that_was_cast_reads_activations_of_any_dtype(name, training, dtype):
    exact = build(CONTRACTS[name]).train(training)
    for given in (torch.float32, torch.bfloat16, torch.float64):
        sae, x = copy.deepcopy(exact).to(dtype), activations().to(given)
        output = sae(x)
        assert output.recon_TD.dtype == dtype and torch.equal(sae.decode(sae.encode(x)), output.recon_TD)
        expected = exact(x).recon_TD
        assert (output.recon_TD.float() - expected).norm() < ERROR[dtype] * expected.norm()
        terms = sae.loss_terms(Rows.of(x), output, DEAD_M)
        assert all(term.isfinite() for term in terms.values())
        sum(terms.values()).backward()
        sae.end_step(Rows.of(x), output)
    prepare(sae, Rows.of(activations(7, 512)), True)
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values()) and sae.W_dec_MD.dtype == dtype
    sae.fold_activation_scale()
    assert sae.activation_scale == 1


def test_latents_of_any_dtype_are_decoded_in_the_weights():
    sae = build(CONTRACTS["topk"])
    latents = sae.encode(activations())
    low = replace(latents, values_TK=latents.values_TK.bfloat16())
    expected = sae.decode(replace(latents, values_TK=low.values_TK.float()))
    assert torch.equal(sae.decode(low), expected)
    for dense in (build(CONTRACTS["batch_topk"]), build(CONTRACTS["relu"]), sae):
        assert torch.equal(dense.decode(DenseLatents(low.to_dense())), dense.decode(DenseLatents(low.to_dense().float())))


NO_TENSORS = {
    "an array": (lambda x: x.numpy(), r"a ndarray; an SAE takes a tensor \[(\.\.\.|tokens), d_(in|out)\]. Use torch.as_tensor"),
    "a list": (lambda x: x.tolist(), "a list; an SAE takes a tensor"),
    "complex": (lambda x: x.to(torch.complex64), "are complex"),
    "too wide": (lambda x: torch.cat([x, x], 1), r"shape \(96, 24\); this SAE"),
}


@pytest.mark.parametrize("change", [lambda x: x.view(8, 12, D), lambda x: x[0]], ids=["contexts", "one row"])
def test_training_takes_rows_alone(name, change):
    sae, x = build(CONTRACTS[name]), activations()
    output = sae(x)
    for call in (lambda bad: sae.set_scale(Rows.of(bad)), lambda bad: sae.loss_terms(Rows.of(bad), output)):
        with pytest.raises(ValueError, match=r"shape \(.*12,?\); this SAE"):
            call(change(x))


@pytest.mark.parametrize("what", list(NO_TENSORS))
def test_what_is_no_batch_is_refused_with_one_message(name, what):
    change, message = NO_TENSORS[what]
    sae, x = build(CONTRACTS[name]), activations()
    output, wrong = sae(x), change(x)
    calls = [sae, sae.encode, lambda bad: sae.set_scale(Rows.of(bad)), lambda bad: sae.loss_terms(Rows.of(bad), output)]
    if output.routing is not None:
        calls.append(sae.route)
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(wrong)


def test_what_are_no_latents_of_this_sae_are_refused(name):
    sae, x = build(CONTRACTS[name]), activations()
    for wrong, message in (
        (x, "latents of an SAE that has 12; this one has 48"),
        (np.zeros((3, M)), r"takes Latents or a tensor \[\.\.\., 48\], not a ndarray"),
        (DenseLatents(torch.zeros(3, 16)), "latents of an SAE that has 16; this one has 48"),
        (SparseLatents(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64), 96), "an SAE that has 96"),
    ):
        with pytest.raises(ValueError, match=message):
            sae.decode(wrong)


@pytest.mark.parametrize("rows", [activations()[:0], torch.zeros(4, D), torch.full((4, D), torch.inf)], ids=["none", "zero", "infinite"])
def test_rows_that_set_no_scale_are_refused(rows):
    with pytest.raises(ValueError, match=r"set no scale. Give finite rows, not all zero"):
        build(CONTRACTS["topk"]).set_scale(Rows.of(rows))


def test_routes_are_those_of_raw_activations(name):
    sae, x = build(CONTRACTS[name]).eval(), activations()
    assert abs(sae.activation_scale.item() - 1) > 0.1
    if not hasattr(sae, "route"):
        return
    routing, dispatch = sae.route(x)
    expected = sae(x).routing
    assert (routing is None) == (expected is None) == (name == "topk" or not name.startswith("switch"))
    if routing is not None:
        same(vars(routing), vars(expected))
        assert torch.equal(dispatch.expert_TS, routing.expert_TS)


def test_a_folded_sae_has_latents_and_directions_in_units_of_raw_activations(name, tmp_path):
    trainer = Trainer(build(CONTRACTS[name]), TrainerConfig(lr=1e-2), total_steps=3, batch_size=T)
    for step in range(3):
        trainer.step(Rows.of(activations(step)))
    save_sae(tmp_path / "model.safetensors", trainer.sae)
    sae, folded, x = load_sae(tmp_path / "model.safetensors"), load_sae(tmp_path / "model.safetensors", fold=True), activations()
    assert folded.activation_scale == 1 != sae.activation_scale and not folded.training
    recon_TD = folded.encode(x).to_dense() @ folded.decoder_weight() + folded.b_out_D
    torch.testing.assert_close(recon_TD, folded(x).recon_TD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(recon_TD, sae(x).recon_TD, rtol=1e-4, atol=1e-4)
    # what `decoder_weight` and `encode` say of an SAE that is not folded
    raw_MD = sae.decoder_weight() / sae.target_scale
    torch.testing.assert_close(sae.encode(x).to_dense() @ raw_MD + sae.b_out_D / sae.target_scale, sae(x).recon_TD, rtol=1e-4, atol=1e-4)


def test_saes_print_their_sizes_and_what_they_give_prints_shapes(name):
    sae = build(CONTRACTS[name])
    output, text = sae(activations()), repr(sae)
    assert text.startswith(f"{type(sae).__name__}(d_in=12, num_latents=48") and text.count("\n") == 0
    assert ("num_experts=4" in text) == sae.is_routed and ("k=4" in text) == (sae.k is not None)
    assert ("SigmoidRouter" in text) == ("sigmoid" in name) and ("experts_per_token=2" in text) == ("two experts" in name)
    assert "recon_TD=float32[96, 12]" in repr(output) and "tensor(" not in repr(output) and "\n" not in repr(output)
    assert f"{type(output.latents).__name__}(values_T" in repr(output)
    if sae.is_routed:
        assert f"Routing(expert_TS=int64[96, {sae.experts_per_token}]" in repr(output)
        assert repr(sae.route(activations())[1]) == f"Dispatch(96 tokens to {sae.experts_per_token} of 4 experts each)"
    assert repr(Rows.of(activations())) == "Rows(x_TD=float32[96, 12], target_TD=float32[96, 12])"

"""SAEs as SAEBench and SAELens' evals take them: their names, layouts and shapes, and our numbers, without either library."""

import json
from dataclasses import asdict

import pytest
import torch
from configs import CONTRACTS

from switch_sae.interop.saebench import wrap
from switch_sae.interop.token_norm import TokenNorm, TokenNormSAE
from switch_sae.models import SAES, TopKSAE
from switch_sae.rows import Rows
from switch_sae.training import prepare

D, M = 12, 48
SAID = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre"}
AUTOENCODERS = {name: config for name, config in CONTRACTS.items() if "transcoder" not in name}


def activations(*leading: int, seed: int = 3) -> torch.Tensor:
    return 3 * torch.randn(*leading, D, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-2, 2, D)


def build(config):
    """Trained as far as a start goes: a scale, biases that matter, and decoder rows that keep their norms."""
    generator = torch.Generator().manual_seed(1)
    sae = SAES.build(config, D, generator)
    prepare(sae, Rows.of(activations(256, seed=2)), normalize_activations=True)
    with torch.no_grad():
        for weight in sae.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return sae.eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-6 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.fixture(params=list(AUTOENCODERS))
def sae(request):
    return build(AUTOENCODERS[request.param])


@torch.no_grad()
def test_it_gives_our_numbers_for_batch_position_and_activation(sae):
    x = activations(3, 5)
    recon = sae(x).recon_TD
    latents = sae.encode(x).to_dense() / sae.activation_scale * sae.decoder_weight().norm(dim=1)  # of unit rows
    peer = wrap(sae, **SAID)
    found = peer.encode(x)
    assert found.shape == (3, 5, M) and found.is_floating_point() and not found.is_sparse
    close(found, latents)
    for made in (peer.decode(found), peer(x), peer.forward(x.reshape(-1, D)).reshape(x.shape)):
        close(made, recon)
    assert torch.equal(peer(x), peer.decode(peer.encode(x)))


@torch.no_grad()
def test_weights_have_their_layout_and_decode_what_an_eval_changed(sae):
    peer = wrap(sae, **SAID)
    assert peer.W_enc.shape == (D, M) and peer.W_dec.shape == (M, D) and peer.b_enc.shape == (M,) and peer.b_dec.shape == (D,)
    torch.testing.assert_close(peer.W_dec.data.norm(dim=1), torch.ones(M), rtol=0, atol=1e-5)
    changed = torch.randn(2, 4, M, generator=torch.Generator().manual_seed(4))  # of both signs, as interventions make them
    torch.testing.assert_close(peer.decode(changed), changed @ peer.W_dec + peer.b_dec, rtol=1e-5, atol=1e-5)


def test_the_sae_that_is_given_stays_as_it_is_and_gradients_reach_latents(sae):
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    peer = wrap(sae.train(), **SAID)
    assert sae.training and not peer.training and not peer.ours.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    latents = peer.encode(activations(2, 3)).detach().requires_grad_()
    peer.decode(latents).sum().backward()
    torch.testing.assert_close(latents.grad, peer.W_dec.sum(dim=1).expand_as(latents))
    assert not any(parameter.requires_grad for parameter in peer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_it_moves_as_their_objects_do(sae, dtype):
    peer = wrap(sae, **SAID)
    assert (peer.device, peer.dtype, peer.cfg.dtype, peer.cfg.device) == (torch.device("cpu"), torch.float32, "float32", "cpu")
    assert peer.to(device="cpu", dtype=dtype) is peer
    assert peer.dtype == peer.W_enc.dtype == peer.W_dec.dtype == dtype and peer.cfg.dtype == str(dtype).removeprefix("torch.")
    assert peer.encode(activations(2, 3).to(dtype)).dtype == peer(activations(2, 3)).dtype == dtype
    assert peer.to("meta").device.type == peer.cfg.device == "meta"


def test_cfg_says_what_they_read(sae):
    peer = wrap(sae, **SAID, context_size=64)
    cfg = peer.cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer, cfg.d_in, cfg.d_sae) == ("gpt2", "blocks.8.hook_resid_pre", 8, D, M)
    assert (cfg.context_size, cfg.prepend_bos, cfg.hook_head_index, cfg.normalize_activations) == (64, True, None, "none")
    assert cfg.metadata is cfg and cfg.architecture_str == cfg.architecture and not callable(cfg.architecture)
    assert cfg.to_dict() == asdict(cfg) == json.loads(json.dumps(cfg.to_dict())) | {"seqpos_slice": (None,)}
    cfg.metadata = object()  # SAEBench puts one of its own there
    assert "metadata" not in cfg.to_dict()


NAMES = {
    "topk": "topk", "batch_topk": "batch_topk", "matryoshka": "matryoshka_batch_topk", "relu": "standard", "gated": "gated", "jumprelu": "jumprelu",
    "pursuit": "pursuit", "switch_refit": "switch_refit", "switch_pursuit": "switch_pursuit", "topk, refit": "topk+refit",
    "switch, pursuit": "switch+pursuit", "switch, softmax hard": "switch",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_architectures_have_the_names_that_saebench_knows(name):
    assert wrap(build(CONTRACTS[name]), **SAID).cfg.architecture_str == NAMES[name]


def test_it_says_what_stands_for_an_encoder_where_none_is_there():
    said = {name: wrap(build(CONTRACTS[name]), **SAID) for name in ("topk", "switch, softmax", "pursuit", "switch_pursuit", "topk, pursuit")}
    assert said["topk"].cfg.W_enc_is == "encoder" and said["switch, softmax"].cfg.W_enc_is.startswith("encoders of all experts")
    for name in ("pursuit", "switch_pursuit"):
        assert said[name].cfg.W_enc_is.startswith("no encoder") and torch.equal(said[name].W_enc, said[name].W_dec.T)
    assert said["topk, pursuit"].cfg.W_enc_is.startswith("an encoder that is not used")


@torch.no_grad()
def test_a_dense_sae_is_its_published_equation_in_their_names():
    peer = wrap(build(TopKSAE.Config(num_latents=M, k=4)), **SAID)
    x = activations(2, 5)
    top = ((x - peer.b_dec) @ peer.W_enc + peer.b_enc).relu().topk(4)
    torch.testing.assert_close(peer.encode(x), torch.zeros(2, 5, M).scatter(-1, top.indices, top.values))


@torch.no_grad()
def test_norms_of_a_free_decoder_go_into_the_latents():
    sae = build(CONTRACTS["relu"])
    sae.decoder_weight().mul_(torch.linspace(0.5, 3, M)[:, None])
    sae.decoder_weight()[7] = 0  # a dead row has no norm to give
    x, peer = activations(4, 3), wrap(sae, **SAID)
    torch.testing.assert_close(peer.encode(x), ((x @ peer.W_enc) + peer.b_enc).relu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peer(x), sae(x).recon_TD, rtol=1e-5, atol=1e-5)
    norms = peer.W_dec.norm(dim=1)
    assert norms[7] == 0 and torch.allclose(norms[torch.arange(M) != 7], torch.ones(M - 1))
    double = peer.to(dtype=torch.float64)
    assert double.encode(x).dtype == double.W_dec.dtype == double(x).dtype == torch.float64


def test_gated_biases_have_their_names():
    gated = wrap(build(CONTRACTS["gated"]), **SAID)
    assert gated.b_mag.shape == gated.b_gate.shape == (M,) and not torch.equal(gated.b_mag, gated.b_gate)
    with pytest.raises(AttributeError):
        wrap(build(CONTRACTS["topk"]), **SAID).b_mag  # noqa: B018


def test_model_and_hook_come_from_what_it_was_trained_on():
    sae = build(CONTRACTS["switch, softmax"])
    sae.activations = {"model": "bundled", "hook": "blocks.2.hook_resid_post", "context_length": 128, "prepend_bos": False}
    cfg = wrap(sae).cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer, cfg.context_size, cfg.prepend_bos) == (
        "bundled",
        "blocks.2.hook_resid_post",
        2,
        128,
        False,
    )
    assert wrap(sae, model_name="gpt2-small").cfg.model_name == "gpt2-small"


@pytest.mark.parametrize("name", ["transcoder", "switch_transcoder"])
def test_a_transcoder_is_refused(name):
    with pytest.raises(ValueError, match="writes to another hook than it reads"):
        wrap(SAES.build(CONTRACTS[name], D), **SAID)


def test_what_is_not_known_is_asked_for():
    sae = build(CONTRACTS["topk"])
    with pytest.raises(ValueError, match=r"which model_name .* wrap\(sae, model_name='gpt2'\)"):
        wrap(sae)
    with pytest.raises(ValueError, match=r"which hook_name .* wrap\(sae, hook_name='blocks"):
        wrap(sae, model_name="gpt2")
    with pytest.raises(ValueError, match="hook_name='hook_embed' names no layer"):
        wrap(sae, model_name="gpt2", hook_name="hook_embed")
    with pytest.raises(ValueError, match=r"not a str\. Use wrap\(load_sae\(PATH\)\)"):
        wrap("runs/some")
    with pytest.raises(ValueError, match=r"normalises tokens \(layer_norm\): its latents alone cannot be decoded"):
        wrap(TokenNormSAE(sae, TokenNorm.layer_norm), **SAID)


def test_latents_of_another_shape_are_refused():
    peer = wrap(build(CONTRACTS["topk"]), **SAID)
    with pytest.raises(ValueError, match=r"shape \(2, 47\); this SAE's are \[..., d_sae=48\]"):
        peer.decode(torch.zeros(2, 47))
    with pytest.raises(ValueError, match=r"latents are a list; an SAE takes a tensor"):
        peer.decode([0.0])
    with pytest.raises(ValueError, match=r"this SAE takes \[..., d_in=12\]"):
        peer.encode(torch.zeros(2, 3, D + 1))


def test_hook_z_needs_no_reshaping():
    peer = wrap(build(CONTRACTS["topk"]), model_name="gpt2", hook_name="blocks.3.attn.hook_z")
    assert peer.hook_z_reshaping_mode is False and peer.turn_off_forward_pass_hook_z_reshaping() is None

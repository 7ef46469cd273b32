"""circuit-tracer's sets: several runs into one, what is no set, and the plug-in that computes what files cannot say.

The library itself reads and writes them in `experiments.benchmarks.formats`; what it made is read in tests/test_formats.py.
"""

import copy
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from experiments import convert
from switch_sae import load_sae, save_sae
from switch_sae.interop import FORMATS
from switch_sae.interop.circuit_tracer_plugin import LargestOfReLU, _class, transcoder_set
from switch_sae.models import SAES

D, M, K = 6, 24, 3
HOOKS = {"hook": "blocks.{}.mlp.hook_in", "target_hook": "blocks.{}.hook_mlp_out"}


def made(layer: int, architecture: str = "transcoder", model: str = "gpt2", hooks=HOOKS, **settings):
    """A transcoder of a layer, with every weight and both scales away from their starts."""
    plain = {"architecture": architecture, "num_latents": M, "k": K, **({"num_experts": 4} if "switch" in architecture else {}), **settings}
    generator = torch.Generator().manual_seed(layer)
    sae = SAES.build(SAES.from_plain(plain), D, generator).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    sae.activation_scale.fill_(0.4)
    if sae.is_transcoder:
        sae.output_scale.fill_(0.7)
    sae.activations = {"model": model, **{name: hook.format(layer) for name, hook in hooks.items()}}
    return sae


def inputs(tokens: int = 20) -> torch.Tensor:
    return 2 * torch.randn(tokens, D, generator=torch.Generator().manual_seed(9)) + 0.5


def dense64(sae, x):
    """(latents, output) of raw inputs, by equations in float64, all experts masked."""
    w = {name: value.detach().double() for name, value in sae.state_dict().items()}
    scaled = x.double() * w["activation_scale"]
    pre = torch.relu((scaled - w["b_pre_D"]) @ w["W_enc_MD"].T + w["b_enc_M"])
    if sae.is_routed:
        probs = torch.softmax((scaled - w["router.b_D"]) @ w["router.W_ED"].T, dim=1)
        pre = pre * torch.zeros_like(probs).scatter(1, probs.argmax(1, keepdim=True), probs.amax(1, keepdim=True)).repeat_interleave(M // 4, dim=1)
    values, indices = pre.topk(sae.k, dim=1)
    latents = torch.zeros_like(pre).scatter(1, indices, values)
    skip = 0 if sae.skip is None else scaled @ sae.skip.weight().detach().double().T
    return latents / w["activation_scale"], (latents @ w["W_dec_MD"] + w["b_post_D"] + skip) / w["output_scale"]


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    convert.main()


@pytest.mark.parametrize("k", [K, M])
def test_several_runs_become_a_set_and_its_layers_runs_again(k, tmp_path, monkeypatch, capsys):
    saes = [made(layer, k=k, skip=skip) for layer, skip in ((2, "full"), (0, "none"), (1, "none"))]
    for sae in saes:
        save_sae(tmp_path / sae.activations["hook"] / "model.safetensors", sae, sae.activations)
    run(monkeypatch, *(tmp_path / sae.activations["hook"] for sae in saes), tmp_path / "set", "--to", "circuit_tracer")
    told = capsys.readouterr().out
    assert f"written: {tmp_path / 'set'}; read again" in told and ("activation: topk, which" in told) == (k == K)
    files = {path.name: path for path in (tmp_path / "set").iterdir()}
    assert set(files) == {"config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors"}
    lines = ['model_name: "gpt2"', 'model_kind: "transcoder_set"', 'scan: "set"', 'feature_input_hook: "mlp.hook_in"']
    lines += ['feature_output_hook: "hook_mlp_out"', *(['activation: "topk"', "k: 3"] if k == K else ['activation: "relu"'])]
    assert files["config.yaml"].read_text().splitlines() == lines
    assert all(load_file(files[f"layer_{layer}.safetensors"])["W_skip"].shape == (D, D) for layer in range(3))  # all or none
    x = inputs()
    for sae in saes:
        layer = int(sae.activations["hook"].split(".")[1])
        for again in (load_sae(tmp_path / "set", layer=layer), load_sae(files[f"layer_{layer}.safetensors"])):
            latents, output = dense64(sae, x)
            torch.testing.assert_close(again(x).recon_TD.double(), output, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(again.encode(x).to_dense().double(), latents, rtol=1e-5, atol=1e-5)
            assert again.activations == sae.activations and again.k == k
    run(monkeypatch, tmp_path / "set", tmp_path / "one", "--to", "switch_sae", "--set", "layer=2")
    assert load_sae(tmp_path / "one").activations["target_hook"] == "blocks.2.hook_mlp_out"


def test_a_folder_asks_for_the_layer(tmp_path):
    FORMATS["circuit_tracer"]().save_all([made(layer) for layer in range(4)], tmp_path / "set")
    for settings, match in (({}, "is a set of transcoders, of layers 0 to 3. Say which one: layer=0"), ({"layer": 4}, "has no layer=4"),
                            ({"layer": True}, "has no layer=True"), ({"layer": "1"}, "has no layer=1"), ({"k": 3}, "k is no setting")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            load_sae(tmp_path / "set", **settings)
    with pytest.raises(ValueError, match=r"is one layer of a set already\. Leave layer=1 out"):
        load_sae(tmp_path / "set" / "layer_1.safetensors", layer=1)
    (tmp_path / "set" / "config.yaml").write_text("{}")  # a set of before `activation`: ReLU, of hooks that nobody says
    assert load_sae(tmp_path / "set", layer=1).k == M and load_sae(tmp_path / "set", layer=1).activations == {}


REFUSED = {
    "a layer that is missing": (lambda: [made(0), made(3)], "for every layer from 0. Given: 0, 3; missing: 1, 2. Give a run of each"),
    "no first layer": (lambda: [made(1), made(2), made(3)], "Given: 1 to 3; missing: 0"),
    "a layer twice": (lambda: [made(0), made(0)], "two transcoders are of layer 0"),
    "another model": (lambda: [made(0), made(1, model="gpt3")], "model is gpt2 and gpt3: it must be the same"),
    "another k": (lambda: [made(0), made(1, k=4)], "k is 3 and 4"),
    "another width": (lambda: [made(0), made(1, num_latents=2 * M)], "num_latents is 24 and 48"),
    "another place": (lambda: [made(0), made(1, hooks={**HOOKS, "hook": "blocks.{}.hook_resid_mid"})], "hook is mlp.hook_in and hook_resid_mid"),
    "two layers of one": (lambda: [made(0, hooks={**HOOKS, "target_hook": "blocks.1.hook_mlp_out"})], "has no place in a set: both must be known"),
    "no place": (lambda: [made(0, hooks={})], "hook=None and target_hook=None has no place"),
    "an output of another size": (lambda: [made(0, d_out=D + 1)], "reads 6 numbers and writes 7"),
    "an autoencoder": (lambda: [made(0, architecture="topk")], "TopKSAE is no (dense )?transcoder"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_set_is_refused_and_nothing_is_written(name, tmp_path, library):
    saes, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        FORMATS["circuit_tracer"]().save_all(saes(), tmp_path / "set")
    assert not (tmp_path / "set").exists()
    with pytest.raises(ValueError, match=match):
        transcoder_set(saes())


def test_experts_and_several_of_other_formats_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for layer in range(2):
        save_sae(f"switch_{layer}/model.safetensors", (sae := made(layer, "switch_transcoder")), sae.activations)
    runs = ["switch_0", "switch_1"]
    for to, told in (
        ("circuit_tracer", r"no place for a router"),
        ("sparsify", "holds one SAE, and 2 were given"),
        ("switch_sae", "a run folder holds one SAE"),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, *runs, "out", "--to", to)
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "switch_0", "out", "--to", "sae_lens", "--revision", "v1")
    assert "is a path of this machine, which has no revision='v1'" in capsys.readouterr().err


def test_a_folder_of_this_machine_is_told_by_its_last_part_alone(tmp_path):
    FORMATS["circuit_tracer"]().save(made(0, model=str(tmp_path / "secret" / "SmolLM2")), tmp_path / "set")
    assert json.loads((tmp_path / "set" / "config.yaml").read_text().splitlines()[0].partition(": ")[2]) == "SmolLM2"


@pytest.fixture
def library(monkeypatch):
    """What the plug-in needs of circuit-tracer, and how that computes with it."""

    class SingleLayerTranscoder(nn.Module):
        def __init__(self, d_model, d_transcoder, activation_function, layer_idx, skip_connection=False, device=None, dtype=torch.bfloat16):
            super().__init__()
            self.d_model, self.d_transcoder, self.activation_function, self.layer_idx = d_model, d_transcoder, activation_function, layer_idx
            shapes = {"W_enc": (d_transcoder, d_model), "W_dec": (d_transcoder, d_model), "b_enc": (d_transcoder,), "b_dec": (d_model,)}
            shapes |= {"W_skip": (d_model, d_model)} if skip_connection else {}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))
            self.dtype = dtype

        def forward(self, x):
            output = self.encode(x) @ self.W_dec + self.b_dec
            return output + x @ self.W_skip.T if hasattr(self, "W_skip") else output

    class TranscoderSet:
        def __init__(self, transcoders, feature_input_hook, feature_output_hook, scan=None):
            self.transcoders, self.hooks, self.scan = transcoders, (feature_input_hook, feature_output_hook), scan

    package, inner = types.ModuleType("circuit_tracer"), types.ModuleType("circuit_tracer.transcoder")
    inner.SingleLayerTranscoder, inner.TranscoderSet = SingleLayerTranscoder, TranscoderSet
    for module in (package, inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    _class.cache_clear()
    yield
    _class.cache_clear()


@pytest.mark.parametrize("settings", [{}, {"skip": "low_rank", "skip_rank": 2}, {"k": M}, {"architecture": "switch_transcoder", "skip": "full"}])
def test_the_plug_in_computes_what_ours_do(settings, library):
    saes = [made(1, **settings), made(0, **{**settings, "skip": "none", "skip_rank": None})]
    before = [copy.deepcopy(sae.state_dict()) for sae in saes]
    found = transcoder_set(saes, scan="tiny")
    assert found.hooks == ("mlp.hook_in", "hook_mlp_out") and found.scan == "tiny" and list(found.transcoders) == [0, 1]
    x = inputs()
    for layer, sae in ((1, saes[0]), (0, saes[1])):
        theirs = found.transcoders[layer]
        latents, output = dense64(sae, x)
        assert (latents > 0).any(1).all()
        torch.testing.assert_close(theirs.encode(x).double(), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x).double(), output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.encode(x.view(4, 5, D)), theirs.encode(x).view(4, 5, M))
        assert torch.equal(theirs.activation_function(theirs.encode(x, apply_activation_function=False)), theirs.encode(x))
    assert all(torch.equal(value, state[name]) for sae, state in zip(saes, before, strict=True) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("architecture", ["transcoder", "switch_transcoder"])
def test_attribution_multiplies_by_the_gradient_with_gates_as_constants(architecture, library):
    """A latent's encoder vector is the gradient of its value, in float64; the first position is left out."""
    theirs, x = transcoder_set([made(0, architecture)], dtype=torch.float64).transcoders[0], inputs(8).double()
    sparse, vectors = theirs.encode_sparse(x)
    position, latent = sparse.indices()
    assert len(vectors) == len(position) > 8 and (position > 0).all()
    x.requires_grad_()
    acts = theirs.encode(x)
    for vector, token, index, value in zip(vectors, position, latent, sparse.values(), strict=True):
        (gradient,) = torch.autograd.grad(acts[token, index], x, retain_graph=True)
        torch.testing.assert_close(gradient[token], vector, rtol=1e-9, atol=1e-12)
        assert value == acts[token, index] and (gradient[torch.arange(8) != token] == 0).all()
    every, _ = theirs.encode_sparse(x.detach(), slice(0, 0))
    assert (every.to_dense() == acts).all()


def test_the_largest_of_relu():
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-1.0, -2.0, 4.0, -3.0]])
    assert torch.equal(LargestOfReLU(2)(pre), torch.tensor([[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 4.0, 0.0]]))
    assert torch.equal(LargestOfReLU(4)(pre), F.relu(pre))

"""Checkpoints that other libraries wrote (tests/golden/formats, by `experiments.benchmarks.formats`) give here what they give there, and go back."""

import copy
import itertools
import json
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from experiments import convert
from experiments.benchmarks.formats import GOLDEN, LIMIT, OUTPUTS, SETTINGS, difference, loaded, our_saes, ours
from switch_sae import load_sae
from switch_sae.activations import EvaluationSet
from switch_sae.evaluation import Probes, evaluate
from switch_sae.interop import FORMATS
from switch_sae.interop.token_norm import TokenNorm, TokenNormSAE
from switch_sae.interop.weights import DenseWeights, fractions, to_sae
from switch_sae.models import SAES, DenseLatents, Inference, with_inference
from switch_sae.rows import Rows
from switch_sae.runs import save_sae

CASES = sorted(path.parent for path in GOLDEN.glob(f"*/*/{OUTPUTS}"))
DIRECT = {
    "dictionary_learning": {"AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", "AutoEncoderNew", "GatedAutoEncoder"},
    "sparsify": {"topk", "topk_by_expansion_factor", "transcoder", "transcoder_skip"},
    "circuit_tracer": set(),
    "sae_lens": {
        "standard_uncentred", "topk", "jumprelu_uncentred", "gated", "topk_layer_norm", "topk_constant_norm_rescale", "transcoder", "skip_transcoder",
    },
}  # fmt: skip
"""What we write exactly as the library does: others are the same function with other weights."""
HELD = {
    "dictionary_learning": {"topk", "topk_unbiased", "batch_topk", "matryoshka", "relu", "gated", "jumprelu"},
    "sparsify": {"topk", "topk_unbiased", "transcoder", "transcoder_skip", "transcoder_relu"},
    "circuit_tracer": {"transcoder", "transcoder_skip", "transcoder_relu"},
}
"""Which of ours a format can hold; SAELens' holds all, some as a plug-in."""
D, M, E, K = 6, 24, 4, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings_of(case: Path) -> dict:
    return SETTINGS.get(f"{case.parent.name}/{case.name}", {})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (
        path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors") and path.name not in (OUTPUTS, "activation_whitening.safetensors")
    )
    return torch.load(file) if file.suffix == ".pt" else load_file(file)


def test_the_golden_files_are_there_and_small():
    assert {path.parent.name for path in CASES} == {"dictionary_learning", "sparsify", "sae_lens", "circuit_tracer"} and len(CASES) >= 36
    assert all(path.stat().st_size < 8192 for path in GOLDEN.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_a_checkpoint_gives_what_its_library_gives(case):
    expected, found = loaded(case.parent.name, case)
    assert difference(found, expected) <= LIMIT


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_a_checkpoint_that_was_read_is_written_so_that_it_gives_the_same(case, tmp_path):
    sae, expected = load_sae(case, **settings_of(case)), load_file(case / OUTPUTS)
    if case.parent.name == "circuit_tracer":  # a set of all its layers
        FORMATS["circuit_tracer"]().save_all(FORMATS["circuit_tracer"]().load_all(case), tmp_path / "again")
        again = load_sae(tmp_path / "again", layer=1)
    else:
        FORMATS[case.parent.name]().save(sae, tmp_path / "again")
        again = load_sae(tmp_path / "again")
    with torch.no_grad():
        output = again(expected["x"])
    scale = sae.activation_scale
    assert difference({"latents": output.latents.to_dense() * scale, "recon": output.recon_TD}, expected) <= LIMIT
    if case.name in DIRECT[case.parent.name]:
        written, theirs = stored(tmp_path / "again"), stored(case)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()} == {name: (t.shape, t.dtype) for name, t in theirs.items()}
        for name in theirs:
            if not (name == "threshold" and case.name == "AutoEncoderTopK"):  # which its TopK keeps without use
                torch.testing.assert_close(written[name], theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("format_name", ["sae_lens", "dictionary_learning", "sparsify", "circuit_tracer"])
@pytest.mark.parametrize(("name", "sae"), [pytest.param(*pair, id=pair[0]) for pair in our_saes()])
def test_what_we_write_gives_the_same_read_again_or_is_refused_with_a_reason(name, sae, format_name, tmp_path):
    before = copy.deepcopy(sae.state_dict())
    if format_name != "sae_lens" and name not in HELD[format_name]:
        with pytest.raises(ValueError, match=r"none|is no dense transcoder|have no place for a router|(transcoders|transcoder) .*one size"):
            FORMATS[format_name]().save(sae, tmp_path / name)
        assert not (tmp_path / name).exists()
        return
    FORMATS[format_name]().save(sae, tmp_path / name)
    again, x = load_sae(tmp_path / name, **({"layer": 0} if format_name == "circuit_tracer" else {})), 3 * normal(40, sae.d_in, seed=1)
    assert difference(ours(again, x), ours(sae, x)) <= LIMIT
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())  # folding happens on a copy
    assert again.activation_scale == 1


def original_switch(heaviside, k, seed=0):
    """(state dict, masked dense float64 reference) of the original Switch SAE."""
    state = {"encoder.weight": normal(M, D, seed=seed), "decoder": F.normalize(normal(M, D, seed=seed + 1), dim=1)}
    state |= {"router.weight": 0.5 * normal(E, D, seed=seed + 2), "b_dec": 0.3 * normal(D, seed=seed + 3), "b_router": 0.2 * normal(D, seed=seed + 4)}

    def reference(x):
        w = {name: value.double() for name, value in state.items()}
        probs = torch.softmax((x.double() - w["b_router"]) @ w["router.weight"].T, dim=1)
        kept = torch.zeros_like(probs).scatter(1, probs.argmax(1, keepdim=True), 1.0) * (1 if heaviside else probs)
        latents = torch.relu((x.double() - w["b_dec"]) @ w["encoder.weight"].T) * kept.repeat_interleave(M // E, dim=1)
        values, indices = latents.topk(k, dim=1)
        latents = torch.zeros_like(latents).scatter(1, indices, values)
        return {"latents": latents, "recon": latents @ w["decoder"] + w["b_dec"]}

    return state, reference


@pytest.mark.parametrize("heaviside", [False, True])
@pytest.mark.parametrize("k", [1, K, M // E, M // E + 3])
def test_the_original_switch_gives_what_its_masked_dense_code_gives(heaviside, k, tmp_path):
    state, reference = original_switch(heaviside, k)
    torch.save(state, tmp_path / "ae.pt")
    x = 2 * normal(50, D, seed=9)
    for path in (tmp_path, tmp_path / "ae.pt"):
        sae = load_sae(path, k=k, num_experts=E, heaviside=heaviside)
        assert difference({name: value.double() for name, value in ours(sae, x).items()}, reference(x)) <= LIMIT
        assert sae.num_experts == E and sae.k == min(k, M // E)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "SwitchAutoEncoder", "k": k, "experts": E, "heaviside": heaviside}}))
    assert torch.equal(load_sae(tmp_path)(x).recon_TD, sae(x).recon_TD)


def test_the_original_codes_dense_topk(tmp_path):
    state = original_switch(False, K)[0] | {"encoder.bias": 0.1 * normal(M, seed=7)}
    del state["router.weight"], state["b_router"]
    torch.save(state, tmp_path / "ae.pt")
    x, w = normal(30, D, seed=9), {name: value.double() for name, value in state.items()}
    pre = torch.relu((x.double() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    latents = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, pre.topk(K).values)
    expected = {"latents": latents, "recon": latents @ w["decoder"] + w["b_dec"]}
    found = ours(load_sae(tmp_path, k=K), x)
    assert difference({name: value.double() for name, value in found.items()}, expected) <= LIMIT


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openais_files(activation, tmp_path):
    """Against its equations in float64: TopK reads tokens of mean 0 and spread 1, ReLU reads them as they are."""
    state = {"pre_bias": 0.3 * normal(D), "encoder.weight": normal(M, D, seed=1), "latent_bias": 0.1 * normal(M, seed=2)}
    state |= {"decoder.weight": normal(D, M, seed=3), "activation": activation, "stats_last_nonzero": torch.zeros(M, dtype=torch.long)}
    state |= {"activation_state_dict": {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {}}
    torch.save(state, tmp_path / "sae.pt")
    sae, x = load_sae(tmp_path / "sae.pt"), 5 * normal(30, D, seed=4) + 2
    w, mean, spread = {name: value.double() for name, value in state.items() if isinstance(value, torch.Tensor)}, 0.0, 1.0
    if activation == "TopK":
        mean = x.double().mean(1, keepdim=True)
        spread = (x.double() - mean).std(1, keepdim=True)
    normalised = (x.double() - mean) / (spread + 1e-5) if activation == "TopK" else x.double()
    pre = torch.relu((normalised - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"])
    latents = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, pre.topk(K).values) if activation == "TopK" else pre
    expected = {"latents": latents, "recon": (latents @ w["decoder.weight"].T + w["pre_bias"]) * spread + mean}
    assert difference({name: value.double() for name, value in ours(sae, x).items()}, expected) <= LIMIT
    assert torch.equal(sae.decode(sae.encode(x)), sae(x).recon_TD)
    with pytest.raises(ValueError, match="are read, not written"):
        FORMATS["openai"]().save(sae, tmp_path / "out")


def test_an_sae_that_normalises_tokens_is_for_use(tmp_path):
    inner = SAES.build(SAES.from_plain({"architecture": "topk", "num_latents": M, "k": K}), D, torch.Generator().manual_seed(0))
    sae, x = TokenNormSAE(inner, TokenNorm.constant_norm_rescale).eval(), normal(7, D)
    x[0] = 0
    latents = sae.encode(x)
    assert (sae(x).recon_TD[0] == 0).all() and latents.firing_counts().sum() > 0 and latents.cpu().select(torch.arange(M)).shape == (7, M)
    assert torch.equal(sae.encode(2 * x).to_dense(), latents.to_dense()) and latents.values.shape == (7, K) and sae.k == K
    halved = replace(latents, inner=DenseLatents(latents.to_dense() / 2))
    torch.testing.assert_close(2 * sae.decode(halved), sae.decode(latents) + sae.decode(replace(latents, inner=DenseLatents(torch.zeros(7, M)))))
    with pytest.raises(ValueError, match=r"replace\(latents, inner=DenseLatents"):
        sae.decode(latents.inner)
    with pytest.raises(ValueError, match="normalises tokens"):
        sae.initialize(Rows.of(x))
    with pytest.raises(ValueError, match="normalises tokens"):
        sae.loss_terms(Rows.of(x), sae(x))
    assert "for use" in sae.why_not_trained()
    with pytest.raises(ValueError, match="at least 2 inputs"):
        TokenNormSAE(SAES.build(SAES.from_plain({"architecture": "topk", "num_latents": 4, "k": 1}), 1), TokenNorm.layer_norm)


@pytest.mark.parametrize("case", ["topk_layer_norm", "jumprelu_constant_norm_rescale", "gated_whitened"])
def test_what_was_read_is_scored_as_ours_are(case):
    sae, x = load_sae(GOLDEN / "sae_lens" / case), normal(200, 8, seed=6) + 1
    held_out = EvaluationSet(x, torch.arange(200) // 20)
    results = evaluate(sae, held_out, bootstrap=5, probes=Probes(held_out))
    with torch.no_grad():
        output = sae(x)
    fvu = (x - output.recon_TD).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(results["fvu"].value, float(fvu), rtol=1e-4, atol=0)
    assert results["l0"].value == pytest.approx(int((output.latents.to_dense() > 0).sum()) / 200)


def test_a_scale_that_was_read_can_be_folded():
    case = GOLDEN / "sae_lens" / "topk_training_checkpoint"
    sae, folded, x = load_sae(case), load_sae(case, fold=True), normal(20, 8, seed=6)
    assert sae.activation_scale == 0.5 and folded.activation_scale == 1 and difference(ours(folded, x), ours(sae, x)) <= LIMIT


def test_a_threshold_of_nothing_lets_all_that_is_positive_through():
    """Ours is kept as a logarithm; the others' may be 0 or less."""
    weights = DenseWeights(
        "jumprelu", normal(M, D), normal(M, D, seed=1), normal(M, seed=2), normal(D, seed=3), False, threshold=torch.full((M,), -1.0)
    )
    sae, x = to_sae(weights), normal(20, D, seed=4)
    assert torch.equal(sae.encode(x).to_dense() > 0, x @ weights.W_enc_MD.T + weights.b_enc_M > 0)
    assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())


@pytest.mark.parametrize("sizes", [[16], [1, 15], [3, 5, 7], [5, 6, 5, 8, 25], [1] * 49, [100, 200, 21]])
def test_groups_keep_their_sizes(sizes):
    config = SAES["matryoshka"].Config(num_latents=sum(sizes), k=1, group_fractions=fractions(sizes))
    assert config.group_sizes == sizes


def test_half_precision_is_read_and_sae_lens_says_where_it_was_trained(tmp_path):
    sae = SAES.build(SAES.from_plain({"architecture": "relu", "num_latents": M}), D, torch.Generator().manual_seed(0))
    sae.activations = {"model": "gpt2", "hook": "blocks.8.hook_resid_pre", "text": {}}
    FORMATS["sae_lens"]().save(sae, tmp_path)
    assert load_sae(tmp_path).activations == {"model": "gpt2", "hook": "blocks.8.hook_resid_pre"}
    file = tmp_path / "sae_weights.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file)
    again = load_sae(file)
    assert again.W_enc_MD.dtype == torch.float32 and torch.equal(again.W_enc_MD, sae.W_enc_MD.bfloat16().float())


def test_sae_lens_configs_from_before_version_6(tmp_path):
    case = GOLDEN / "sae_lens" / "topk"
    config = json.loads((case / "cfg.json").read_text())
    for key in ("architecture", "k", "metadata", "rescale_acts_by_decoder_norm", "reshape_activations"):
        del config[key]
    config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "normalize_activations": False, "hook_point": "h", "model_name": "m"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "sae_weights.safetensors").write_bytes((case / "sae_weights.safetensors").read_bytes())
    sae, expected = load_sae(tmp_path), load_file(case / OUTPUTS)
    with torch.no_grad():
        output = sae(expected["x"])
    assert difference({"latents": output.latents.to_dense(), "recon": output.recon_TD}, expected) <= LIMIT
    assert sae.activations == {"model": "m", "hook": "h"}


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
    convert.main()


def test_convert_goes_round_all_formats(tmp_path, monkeypatch, capsys):
    first = GOLDEN / "dictionary_learning" / "AutoEncoderTopK"
    steps = [first, *(tmp_path / name for name in ("sae_lens", "sparsify", "switch_sae", "dictionary_learning"))]
    for source, out in itertools.pairwise(steps):
        run(monkeypatch, source, out, "--to", out.name)
        assert f"written: {out}; read again" in capsys.readouterr().out
    expected = load_file(first / OUTPUTS)
    with torch.no_grad():
        output = load_sae(steps[-1])(expected["x"])
    assert difference({"latents": output.latents.to_dense(), "recon": output.recon_TD}, expected) <= LIMIT


def test_convert_takes_settings_that_files_lack(tmp_path, monkeypatch):
    state, reference = original_switch(True, K)
    torch.save(state, tmp_path / "ae.pt")
    run(monkeypatch, tmp_path / "ae.pt", tmp_path / "mine", "--to", "switch_sae", "--set", "k=3", "num_experts=4", "heaviside=True")
    x = normal(9, D, seed=5)
    assert difference({name: value.double() for name, value in ours(load_sae(tmp_path / "mine"), x).items()}, reference(x)) <= LIMIT


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "out", "--to", "sae_lens"], "nowhere does not exist"),
        (["sae", "sae", "--to", "sae_lens"], "exists, and nothing is overwritten"),
        (["sae", "out", "--to", "sparsify"], "With --to sae_lens it becomes a plug-in"),
        (["sae", "out", "--to", "openai"], "are read, not written"),
        (["sae", "out", "--to", "original_switch"], "are read, not written|can be read, not written"),
        (["sae", "out", "--to", "sae_lens", "--set", "k=3"], "k cannot be set"),
        (["normed", "out", "--to", "switch_sae"], "run folders cannot hold a TokenNormSAE"),
    ],
)
def test_convert_refuses_with_one_message_and_leaves_nothing(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_sae(Path("sae/model.safetensors"), SAES.build(SAES.from_plain({"architecture": "switch", "num_latents": M, "num_experts": E, "k": K}), D))
    FORMATS["sae_lens"]().save(load_sae(GOLDEN / "sae_lens" / "topk_layer_norm"), Path("normed"))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("error: ") == 1 and any(part in error for part in told.split("|")), error
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["k", "k=", "k=x y"])
def test_convert_says_what_a_setting_is(text, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "a", "b", "--to", "sae_lens", "--set", text)
    assert "is not NAME=VALUE with a number, true or false" in capsys.readouterr().err


def stand_in(monkeypatch) -> dict:
    """What the plug-in needs of SAELens, and what it registers there; the library itself loads it in `experiments.benchmarks.formats`."""
    Config, registered = TypeVar("Config"), {}

    @dataclass
    class SAEConfig:
        d_in: int
        d_sae: int
        dtype: str = "float32"
        metadata: dict = field(default_factory=dict)

    class SAE(torch.nn.Module, Generic[Config]):
        def __init__(self, cfg):
            super().__init__()
            self.cfg, self.dtype, self.d_head = cfg, torch.float32, None
            self.initialize_weights()
            self.hook_sae_input = self.hook_sae_acts_post = self.hook_sae_recons = torch.nn.Identity()
            self.reshape_fn_in = self.run_time_activation_norm_fn_in = self.run_time_activation_norm_fn_out = lambda x: x
            self.reshape_fn_out = lambda x, d_head: x

        def forward(self, x):
            return self.decode(self.encode(x))

    library, saes, base = types.ModuleType("sae_lens"), types.ModuleType("sae_lens.saes"), types.ModuleType("sae_lens.saes.sae")
    library.SAE, library.register_sae_class = SAE, lambda name, cls, config: registered.update({name: (cls, config)})
    base.SAEConfig = SAEConfig
    for module in (library, saes, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return registered


PLUGGED = ["switch", "switch with refits", "transcoder", "transcoder_skip", "transcoder_low_rank", "switch_transcoder"]


@pytest.mark.parametrize("name", PLUGGED)
def test_the_plug_in_computes_with_our_sae(name, tmp_path, monkeypatch):
    from switch_sae.interop.sae_lens_plugin import register

    registered = stand_in(monkeypatch)
    register.cache_clear()
    register()
    assert register() is registered["switch_sae"][0]  # twice does no harm
    register.cache_clear()
    sae = dict(our_saes())[name.split()[0]]
    sae = with_inference(sae, Inference.refit) if name.endswith("refits") else sae
    FORMATS["sae_lens"]().save(sae, tmp_path)
    cls, config = registered["switch_sae"]
    plain = json.loads((tmp_path / "cfg.json").read_text())
    assert plain["architecture"] == config.architecture() == "switch_sae"
    theirs = cls(config(plain["d_in"], plain["d_sae"], switch_sae=plain["switch_sae"]))
    theirs.load_state_dict(load_file(tmp_path / "sae_weights.safetensors"), assign=True)
    x = 2 * normal(3, 5, sae.d_in, seed=8)
    latents = theirs.encode(x)
    found = {"latents": latents.flatten(0, 1), "recon": theirs(x).flatten(0, 1)}
    assert latents.shape == (3, 5, sae.num_latents) and difference(found, ours(sae, x.flatten(0, 1))) <= LIMIT
    assert torch.equal(theirs(x), theirs.decode(latents)) == (getattr(sae, "skip", None) is None)  # decode gives what latents give
    torch.testing.assert_close(latents @ theirs.W_dec + theirs.b_dec, theirs.decode(latents))
    assert theirs.W_enc.shape == (sae.d_in, sae.num_latents) and theirs.b_enc.shape == (sae.num_latents,)
    with pytest.raises(ValueError, match="cfg says d_sae=99"):
        cls(config(plain["d_in"], 99, switch_sae=plain["switch_sae"]))

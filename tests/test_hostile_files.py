"""Files of other libraries that are broken or meant to harm: one message each that names the file, nothing executed, memory bounded."""

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.benchmarks.formats import GOLDEN
from switch_sae import load_sae
from switch_sae.interop import FORMATS, pickled
from switch_sae.models import SAES

D, M, K = 4, 12, 3
DEEP = "[" * 100_000


def make(format_name: str, folder: Path, architecture: str = "topk") -> None:
    if architecture == "skip":  # a transcoder that SAELens has too
        architecture, settings = "transcoder", {"k": M, "skip": "full", **({"d_out": 6} if format_name == "sae_lens" else {})}
    else:
        settings = {"k": K} if architecture in ("topk", "matryoshka", "batch_topk", "switch", "transcoder", "switch_transcoder") else {}
        settings |= {"num_experts": 4} if "switch" in architecture else {"group_fractions": [0.25]} if architecture == "matryoshka" else {}
    plain = {"architecture": architecture, "num_latents": M, **settings}
    sae = SAES.build(SAES.from_plain(plain), D)
    sae.activations = {"model": "tiny", "hook": "blocks.0.mlp.hook_in", "target_hook": "blocks.0.hook_mlp_out"}
    FORMATS[format_name]().save(sae, folder)


def state(**changed):
    """The state dict of a TopK SAE of dictionary_learning, with some tensors replaced (None: left out)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "encoder.weight": torch.randn(M, D, generator=generator), "encoder.bias": torch.zeros(M), "b_dec": torch.zeros(D),
        "decoder.weight": torch.randn(D, M, generator=generator), "k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(-1.0),
    }  # fmt: skip
    changed = {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in (tensors | changed).items() if value is not None}


def trainer(folder: Path, dict_class="AutoEncoderTopK", **settings) -> None:
    plain = {"trainer": {"dict_class": dict_class, "activation_dim": D, "dict_size": M, "k": K, **settings}}
    (folder / "config.json").write_text(json.dumps(plain))


def torch_file(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED) -> None:
    """The zip that torch.save writes, with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for name, content in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", content)
        archive.writestr("archive/version", "3\n")


def parts_of(value) -> dict[str, bytes]:
    """Records of torch.save, by name without the folder."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


class Runs:
    """Unpickled by `pickle.load`, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Allocates:
    """A bytearray of a terabyte, which torch's weights_only allows."""

    def __reduce__(self):
        return bytearray, (10**12,)


def saved(*args, **changed):
    """Damage: another state dict."""

    def damage(folder: Path) -> None:
        torch.save(args[0] if args else state(**changed), folder / "ae.pt")

    return damage


def rewritten(name: str, content):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def configured(**settings):
    return lambda folder: trainer(folder, **settings)


def cut(name: str, share: float):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def removed(name: str):
    return lambda folder: (folder / name).unlink()


def grown(name: str, size: int):
    """A file of that size, which takes no room on the disk."""

    def damage(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return damage


def code(protocol: int):
    return lambda folder: torch_file(folder / "ae.pt", pickle.dumps({"encoder.weight": Runs(folder / "executed")}, protocol=protocol))


def packed(*names: str):
    """Some records are compressed: 64 MB of zeros take 64 kB."""

    def damage(folder: Path) -> None:
        with zipfile.ZipFile(folder / "ae.pt", "w") as archive:
            for name, content in parts_of(state()).items():
                content = bytes(2**26) if name == "data/0" and name in names else content
                archive.writestr(f"archive/{name}", content, zipfile.ZIP_DEFLATED if name in names else zipfile.ZIP_STORED)

    return damage


def claims(folder: Path) -> None:
    """The table of contents says that a record is a terabyte long, stored as it is."""
    torch.save(state(), folder / "ae.pt")
    content = bytearray((folder / "ae.pt").read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = (2**31).to_bytes(4, "little") * 2
    (folder / "ae.pt").write_bytes(bytes(content))


def long_storage(folder: Path) -> None:
    """The pickle says that a storage of M * D numbers has a billion, and the tensor is a line of so many."""
    parts = parts_of({"encoder.weight": torch.zeros(M * D)})
    old = b"K" + bytes([M * D])
    pickled = parts["data.pkl"].replace(old, b"J" + (10**9).to_bytes(4, "little"))
    assert pickled != parts["data.pkl"]
    torch_file(folder / "ae.pt", pickled, {"0": parts["data/0"]})


def twice(folder: Path) -> None:
    parts = parts_of(state())
    with zipfile.ZipFile(folder / "ae.pt", "w") as archive:
        for name in ("a/data.pkl", "b/data.pkl"):
            archive.writestr(name, parts["data.pkl"])


def matryoshka(**changed):
    def damage(folder: Path) -> None:
        make("dictionary_learning", folder, "matryoshka")
        torch.save(torch.load(folder / "ae.pt") | changed, folder / "ae.pt")

    return damage


NAN, INF = torch.full((M, D), torch.nan), torch.full((D, M), torch.inf)
PICKLED = {
    "code in the pickle": (code(2), r"asks for \w+\.mkdir: .*never run"),
    "code in the pickle, newer protocol": (code(4), r"instruction|asks for"),
    "a bare pickle with code": (lambda f: (f / "ae.pt").write_bytes(pickle.dumps(Runs(f / "executed"))), "no zip file of torch.save"),
    "a terabyte that weights_only allows": (lambda f: torch_file(f / "ae.pt", pickle.dumps({"k": Allocates()}, 2)), "asks for __builtin__.bytearray"),
    "a zip bomb": (packed("data/0"), r"data/0 are compressed"),
    "a packed pickle": (packed("data.pkl"), r"data\.pkl are compressed"),
    "a record that claims a terabyte": (claims, "its records claim more than that"),
    "a storage that claims a billion numbers": (long_storage, "more numbers than the file holds|cannot be read|no state dict"),
    "two pickles": (twice, "no pickle of a state dict"),
    "a shape of a trillion from one number": (saved(encoder__weight=torch.zeros(1).expand(10**6, 10**6)), r"claims shape \(1000000, 1000000\)"),
    "cut in the middle": (cut("ae.pt", 0.5), "no zip file of torch.save"),
    "cut at the end": (cut("ae.pt", 0.99), "no zip file of torch.save"),
    "empty": (rewritten("ae.pt", b""), "no zip file of torch.save"),
    "text": (rewritten("ae.pt", "hello"), "no zip file of torch.save"),
    "a pickle of noise": (lambda f: torch_file(f / "ae.pt", bytes(range(255))), r"its pickle is damaged"),
    "an empty pickle": (lambda f: torch_file(f / "ae.pt", b""), r"its pickle is damaged"),
    "a pickle that pops too often": (lambda f: torch_file(f / "ae.pt", b"\x80\x02tR."), r"no state dict that torch can read"),
    "a pickle of a megabyte": (lambda f: torch_file(f / "ae.pt", b"N" * 2**21), "no pickle of a state dict"),
    "torch's old form": (lambda f: torch.save(state(), f / "ae.pt", _use_new_zipfile_serialization=False), "before torch 1.6"),
    "a whole module": (saved(torch.nn.Linear(2, 3)), r"asks for torch\.nn\.modules\.linear\.Linear"),
    "a list": (saved([torch.zeros(3)]), "holds a list, not a state dict"),
    "keys that are no names": (saved({1: torch.zeros(3)}), "not a state dict with names"),
    "sparse weights": (saved(encoder__weight=torch.eye(D).to_sparse()), "_rebuild_sparse_tensor"),
    "a parameter on the meta device": (saved(encoder__weight=torch.empty(M, D, device="meta")), "asks for torch"),
    "NaN": (saved(encoder__weight=NAN), r"encoder\.weight holds NaN"),
    "infinite": (saved(decoder__weight=INF), r"decoder\.weight holds NaN or infinite"),
    "too large for float32": (saved(encoder__weight=torch.full((M, D), 1e300, dtype=torch.float64)), r"encoder\.weight holds NaN or infinite"),
    "a bias of another length": (saved(encoder__bias=torch.zeros(M + 1)), r"encoder\.bias has shape \(13,\), .* should be \(12,\)"),
    "a transposed decoder": (saved(decoder__weight=torch.zeros(M, D)), r"decoder\.weight has shape \(12, 4\), .* should be \(4, 12\)"),
    "no decoder": (saved(decoder__weight=None), r"no tensor decoder\.weight; it has b_dec, encoder\.bias"),
    "a tensor more": (saved(W_skip=torch.zeros(D, D)), r"also holds W_skip"),
    "no latents": (saved(encoder__weight=torch.zeros(0, D)), "none of them 0"),
    "three dimensions": (saved(encoder__weight=torch.zeros(2, 3, 4)), "must have 2 dimensions"),
    "integers": (saved(encoder__weight=torch.ones(M, D, dtype=torch.int64)), "holds int64; it must hold real numbers"),
    "complex": (saved(encoder__weight=torch.ones(M, D, dtype=torch.complex64)), "asks for torch.ComplexFloatStorage"),
    "k with a fraction": (saved(k=torch.tensor(3.0)), "k holds float32; it must hold integers"),
    "k of two places": (configured(k=5), r"k is 5 in config\.json but 3 in the tensor k"),
    "k beyond the latents": (lambda f: (configured(k=13)(f), saved(k=torch.tensor(13))(f)), "k=13 must be a whole number .* at most 12"),
    "no k": (lambda f: (configured(k=None)(f), saved(k=None)(f)), "k=None must be a whole number"),
    "k below one": (lambda f: (configured(k=0)(f), saved(k=None)(f)), "k=0 must be a whole number of at least 1"),
    "k that is true": (lambda f: (configured(k=True)(f), saved(k=None)(f)), "k=True must be a whole number"),
    "another class": (configured(dict_class="CrossCoder"), "dict_class='CrossCoder' is not one .* AutoEncoderTopK"),
    "a class that is a list": (configured(dict_class=["x"]), "dict_class=.* is not one"),
    "sizes that contradict": (configured(dict_size=10**9), r"dict_size is 1000000000 in config\.json but 12 in the shape"),
    "groups that do not add up": (matryoshka(group_sizes=torch.tensor([3, 10])), r"group_sizes=\[3, 10\] must be positive and sum to the 12"),
    "groups without end": (matryoshka(group_sizes=torch.ones(20_000, dtype=torch.int64)), "has 20000 values; a few were expected"),
    "no config": (removed("config.json"), r"config\.json is missing"),
    "a config that is no JSON": (rewritten("config.json", '{"trainer": {'), r"config\.json is not valid JSON"),
    "a config of bytes": (rewritten("config.json", b"\xff\xfe\x00"), r"config\.json is not valid JSON"),
    "a config without end": (rewritten("config.json", DEEP), r"config\.json is not valid JSON"),
    "a number of 5000 digits": (rewritten("config.json", '{"trainer": {"k": ' + "9" * 5000 + "}}"), r"config\.json is not valid JSON"),
    "a config of a terabyte": (grown("config.json", 2**40), "a configuration has at most"),
    "a config that is a list": (rewritten("config.json", "[]"), r"no JSON object"),
    "a config of something else": (rewritten("config.json", "{}"), r"no object 'trainer'"),
}  # fmt: skip


@pytest.fixture
def topk(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save(state(), folder / "ae.pt")
    trainer(folder)
    assert load_sae(folder).num_latents == M
    return folder


def refused(folder: Path, match: str, **settings) -> str:
    """The message, in which the file or folder is named."""
    with pytest.raises(ValueError, match=match) as error:
        load_sae(folder, **settings)
    text = str(error.value)
    assert type(error.value) is ValueError and str(folder) in text and "\n" not in text and len(text) < 700
    assert not (folder / "executed").exists()
    return text


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickled_file_that_is_broken_or_hostile_is_refused(name, topk):
    damage, match = PICKLED[name]
    damage(topk)
    refused(topk, match)


def test_the_hostile_pickle_would_have_run_code(topk):
    """The marker is what the tests above look for."""
    with open(topk / "code", "wb") as file:
        pickle.dump(Runs(topk / "executed"), file)
    with open(topk / "code", "rb") as file:
        pickle.load(file)
    assert (topk / "executed").exists()


def test_code_is_not_run_even_where_the_instructions_were_not_looked_at(topk, monkeypatch):
    """Two walls: torch's own, weights_only, stands behind ours."""
    code(2)(topk)
    monkeypatch.setattr(pickled, "_instructions", lambda path: set())
    refused(topk, "no state dict that torch can read")


def config(**settings):
    def damage(folder: Path) -> None:
        file = folder / "cfg.json"
        file.write_text(json.dumps({key: value for key, value in (json.loads(file.read_text()) | settings).items() if value != "absent"}))

    return damage


def tensors(**changed):
    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        found = load_file(file) | {name.replace("__", "."): value for name, value in changed.items()}
        save_file({name: value.contiguous() for name, value in found.items() if value is not None}, file)

    return damage


def header(text: str, size: int | None = None, body: int = 0):
    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        file.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text.encode() + bytes(body))

    return damage


def declared(shape: list[int], end: int) -> str:
    return json.dumps({"encoder.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}})


def skipped(W_skip: torch.Tensor):
    return lambda folder: (config(skip_connection=True)(folder), tensors(W_skip=W_skip)(folder))


SPARSIFY = {
    "a header of an exabyte": (header("{}", 2**60), "cannot be read"),
    "a tensor of a terabyte": (header(declared([10**6, 10**6], 4 * 10**12), body=64), "cannot be read"),
    "a shape that its bytes contradict": (header(declared([10**6, 10**6], 64), body=64), "cannot be read"),
    "a header that is no JSON": (header("{{{"), "cannot be read"),
    "cut": (cut("sae.safetensors", 0.5), "cannot be read"),
    "empty": (rewritten("sae.safetensors", b""), "cannot be read"),
    "a decoder on its side": (tensors(W_dec=torch.zeros(D, M)), r"W_dec has shape \(4, 12\), .* should be \(12, 4\)"),
    "a skip path that the config denies": (tensors(W_skip=torch.zeros(D, D)), "holds W_skip, but .* skip_connection=false. One of them"),
    "a skip path that is only said": (config(skip_connection=True), "no tensor W_skip"),
    "a skip path of another size": (skipped(torch.zeros(D + 1, D)), r"W_skip has shape \(5, 4\), .* should be \(4, 4\)"),
    "a skip path in one dimension": (skipped(torch.zeros(D * D)), "W_skip has shape .* must have 2 dimensions"),
    "a skip path of NaN": (skipped(torch.full((D, D), torch.nan)), "W_skip holds NaN or infinite values"),
    "a skip path without end": (skipped(torch.full((D, D), torch.inf)), "W_skip holds NaN or infinite values"),
    "a skip path of integers": (skipped(torch.ones(D, D, dtype=torch.int32)), "W_skip holds int32; it must hold real numbers"),
    "a skip path that is perhaps there": (config(skip_connection="yes"), "skip_connection='yes' must be true or false"),
    "a transcoder that is perhaps one": (config(transcode=1), "transcode='1' must be true or false"),
    "groups": (config(activation="groupmax"), "activation=groupmax cannot be represented"),
    "no k": (config(k="absent"), "k=None must be a whole number"),
    "k beyond the latents": (config(k=99), "k=99 must be .* at most 12"),
    "sizes that contradict": (config(num_latents=10**12), "num_latents is 1000000000000"),
    "booleans": (tensors(encoder__bias=torch.ones(M, dtype=torch.bool)), "holds bool; it must hold real numbers"),
    "float8": (tensors(encoder__bias=torch.ones(M).to(torch.float8_e4m3fn)), "holds float8_e4m3fn; it must hold real numbers"),
    "NaN": (tensors(b_dec=torch.full((D,), torch.nan)), "b_dec holds NaN"),
    "no config": (removed("cfg.json"), r"cfg\.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPARSIFY)
def test_a_folder_of_sparsify_that_is_broken_is_refused(name, tmp_path):
    make("sparsify", tmp_path / "theirs")
    damage, match = SPARSIFY[name]
    damage(tmp_path / "theirs")
    refused(tmp_path / "theirs", match)


PLUGIN = {"architecture": "switch", "num_latents": M, "num_experts": 4, "k": K, "router": {"kind": "softmax"}}
WIDE = {**PLUGIN, "architecture": "switch_transcoder"}
LENS = {
    "an unknown architecture": ("topk", config(architecture="temporal"), "architecture='temporal' is not one"),
    "an SAE that says it is a transcoder": ("topk", config(architecture="skip_transcoder"), "apply_b_dec_to_input=true is for autoencoders"),
    "thresholds of a transcoder": ("topk", config(architecture="jumprelu_skip_transcoder"), "the thresholds of JumpReLU. Transcoders here"),
    "k of a transcoder": ("skip", config(activation_fn="topk"), "cannot be represented: activation_fn=topk"),
    "a transcoder of another kind": ("skip", config(architecture="temporal_transcoder"), "cannot be represented: its kind"),
    "a transcoder of normed inputs": ("skip", config(normalize_activations="layer_norm"), "layer_norm of a transcoder cannot be represented"),
    "an output of another size": ("skip", config(d_out=7), r"d_out is 7 in cfg\.json but 6 in the shape of W_dec"),
    "no skip path": ("skip", tensors(W_skip=None), "no tensor W_skip"),
    "a skip path that is not said": ("skip", config(architecture="transcoder"), "also holds W_skip"),
    "a skip path on its side": ("skip", tensors(W_skip=torch.zeros(D, 6)), r"W_skip has shape \(4, 6\), .* should be \(6, 4\)"),
    "a skip path of NaN": ("skip", tensors(W_skip=torch.full((6, D), torch.nan)), "W_skip holds NaN"),
    "a bias of the input's size": ("skip", tensors(b_dec=torch.zeros(D)), r"b_dec has shape \(4,\), .* should be \(6,\)"),
    "an architecture that is a list": ("topk", config(architecture=[]), "architecture=.* is not one"),
    "another activation function": ("topk", config(activation_fn="tanh-relu"), "activation_fn='tanh-relu' cannot be represented"),
    "another normalisation": ("topk", config(normalize_activations="batch_norm"), "normalize_activations='batch_norm' is not known"),
    "a scale that nobody knows": ("topk", config(normalize_activations="expected_average_only_in"), "scaling_factor=1.0"),
    "whitening without its matrix": ("topk", config(normalize_activations="covariance_whitening"), "needs activation_whitening.safetensors"),
    "a centre that is neither": ("topk", config(apply_b_dec_to_input="yes"), "apply_b_dec_to_input='yes' must be true or false"),
    "a rescaling that is neither": ("topk", config(rescale_acts_by_decoder_norm=1), "rescale_acts_by_decoder_norm='1' must be true or false"),
    "k beyond the latents": ("topk", config(k=13), "k=13 must be"),
    "decoder rows of norm 0": ("topk", lambda f: (config(rescale_acts_by_decoder_norm=True)(f), tensors(W_dec=torch.zeros(M, D))(f)), "rows are 0"),
    "no threshold": ("jumprelu", tensors(threshold=None), "no tensor threshold"),
    "a factor of fine-tuning": ("relu", tensors(finetuning_scaling_factor=torch.ones(M)), "also holds finetuning_scaling_factor"),
    "sizes that contradict": ("topk", config(d_in=5), "d_in is 5"),
    "prefixes that fall": (
        "topk",
        lambda f: (config(architecture="matryoshka_batchtopk", matryoshka_widths=[6, 3])(f), tensors(topk_threshold=torch.tensor(1.0))(f)),
        r"matryoshka_widths=\[6, 3\] must rise",
    ),
    "a plug-in of a billion latents": ("switch", config(switch_sae={**PLUGIN, "num_latents": 10**9}), "no tensor has more than 12 rows"),
    "a plug-in of nothing": ("switch", config(switch_sae={"architecture": "none"}), "unknown SAE architecture 'none'"),
    "a plug-in without settings": ("switch", config(switch_sae=3), "no object 'switch_sae'"),
    "a plug-in of wide inputs": ("switch", config(d_in=10**9), "d_in=1000000000 must be .* at most"),
    "a plug-in of wide outputs": ("switch_transcoder", config(switch_sae={**WIDE, "d_out": 10**12}), "W_dec_MD would have shape"),
    "a plug-in of a wide skip path": ("switch_transcoder", config(switch_sae={**WIDE, "skip": "low_rank", "skip_rank": 10**12}), "would have shape"),
    "a plug-in with another gate": ("switch", config(switch_sae={**PLUGIN, "router": {"gate": "soft"}}), "does not describe an SAE"),
}  # fmt: skip


@pytest.mark.parametrize("name", LENS)
def test_a_folder_of_sae_lens_that_is_broken_is_refused(name, tmp_path):
    architecture, damage, match = LENS[name]
    make("sae_lens", tmp_path / "theirs", architecture)
    damage(tmp_path / "theirs")
    refused(tmp_path / "theirs", match)


def yaml(**settings):
    """config.yaml with other settings, None for none."""

    def damage(folder: Path) -> None:
        lines = dict(line.split(": ", 1) for line in (folder / "config.yaml").read_text().splitlines())
        lines |= {key: json.dumps(value) for key, value in settings.items() if value is not None}
        (folder / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items() if settings.get(key, 0) is not None))

    return damage


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)), "activation: *a39", "k: *a39"])
SETS = {
    "no config": (removed("config.yaml"), r"config\.yaml is missing"),
    "a config that is no YAML": (rewritten("config.yaml", "a: [1, 2"), r"config\.yaml is not valid YAML"),
    "a config that runs code": (rewritten("config.yaml", "a: !!python/object/apply:os.mkdir [executed]"), r"config\.yaml is not valid YAML"),
    "a config of bytes": (rewritten("config.yaml", b"\xff\xfe\x00"), r"config\.yaml is not valid YAML"),
    "a config without end": (rewritten("config.yaml", DEEP), r"config\.yaml is not valid YAML"),
    "a config of a terabyte": (grown("config.yaml", 2**40), "a configuration has at most"),
    "a config that is a list": (rewritten("config.yaml", "- a"), "no names with values"),
    "a config of nothing": (rewritten("config.yaml", ""), "no names with values"),
    "a config of 9 ** 39 references": (lambda f: (rewritten("config.yaml", BOMB)(f), tensors(W_skip=None, W_enc=None)(f)), "no tensor W_enc"),
    "a transcoder across layers": (yaml(model_kind="cross_layer_transcoder"), "model_kind=cross_layer_transcoder cannot be represented"),
    "another activation function": (yaml(activation="jumprelu"), "activation=jumprelu cannot be represented; relu and topk can"),
    "an activation function that is a number": (yaml(activation=3), "activation=3 cannot be represented"),
    "no k": (yaml(activation="topk"), "k=None must be a whole number"),
    "k beyond the latents": (yaml(activation="topk", k=13), "k=13 must be .* at most 12"),
    "k that is true": (yaml(activation="topk", k=True), "k=True must be a whole number"),
    "thresholds": (tensors(activation_function__threshold=torch.ones(M)), r"holds activation_function\.threshold, of JumpReLU"),
    "a skip path of another size": (tensors(W_skip=torch.zeros(D, D + 1)), r"W_skip has shape \(4, 5\), .* should be \(4, 4\)"),
    "a skip path of NaN": (tensors(W_skip=torch.full((D, D), torch.nan)), "W_skip holds NaN"),
    "an encoder on its side": (tensors(W_enc=torch.zeros(D, M)), r"should be \(4, 12\)"),
    "a tensor more": (tensors(W_router=torch.zeros(D, D)), "also holds W_router"),
    "cut": (cut("layer_0.safetensors", 0.5), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_set_of_circuit_tracer_that_is_broken_is_refused(name, tmp_path):
    make("circuit_tracer", tmp_path / "theirs", "skip")
    assert load_sae(tmp_path / "theirs" / "layer_0.safetensors").k == M
    damage, match = SETS[name]
    damage(tmp_path / "theirs")
    refused(tmp_path / "theirs", match, layer=0)
    assert not Path("executed").exists()


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_scaling_factor_must_be_a_positive_number(factor, tmp_path):
    make("sae_lens", tmp_path / "theirs")
    config(normalize_activations="expected_average_only_in")(tmp_path / "theirs")
    refused(tmp_path / "theirs", "must be a positive number", scaling_factor=factor)
    (tmp_path / "theirs" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    refused(tmp_path / "theirs", "must be a positive number")


SWITCH = {"encoder.weight": torch.ones(M, D), "decoder": torch.ones(M, D), "router.weight": torch.ones(4, D), "b_dec": torch.zeros(D)}
SWITCH["b_router"] = SWITCH["b_dec"]
GIVEN = {"k": K, "num_experts": 4, "heaviside": False}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, r"do not say k, num_experts, heaviside.*k=64, num_experts=16, heaviside=False"),
        ({"k": 3, "num_experts": 4}, r"do not say heaviside"),
        (GIVEN | {"num_experts": 5}, "num_experts=5, but router.weight has 4 rows; one row fewer is an expert that is always on"),
        (GIVEN | {"num_experts": 3}, "num_experts=3, but router.weight has 4 rows"),
        (GIVEN | {"heaviside": "yes"}, "heaviside=yes must be True"),
        (GIVEN | {"k": 13}, "k=13 must be"),
        (GIVEN | {"k": 2.0}, "k=2.0 must be"),
        (GIVEN | {"experts": 4}, "experts is no setting of the format OriginalSwitch; it takes k=64, num_experts=16, heaviside=False"),
    ],
)
def test_what_the_original_switch_does_not_store_is_asked_for(given, match, tmp_path):
    torch.save(SWITCH, tmp_path / "ae.pt")
    refused(tmp_path, match, **given)


def test_what_is_stored_is_not_overruled(tmp_path):
    torch.save(SWITCH, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"k": 2, "experts": 4, "heaviside": True}}))
    assert load_sae(tmp_path).k == 2
    refused(tmp_path, "k is 2 in config.json but 3 in what was given", k=3)
    torch.save(SWITCH | {"router.weight": torch.ones(5, D)}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no object 'trainer'")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "12 latents are not divisible by num_experts=5", **GIVEN | {"num_experts": 5})


def test_settings_are_for_formats_that_need_them(topk):
    refused(topk, "k is no setting of the format DictionaryLearning; it needs no settings", k=3)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"activation": "Sigmoid"}, "activation='Sigmoid' cannot be represented"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "postact_fn='Identity' cannot be represented"),
        ({"activation_state_dict": {}}, "k=None must be"),
        ({"activation_state_dict": 3}, "k=None must be"),
        ({"latent_bias": torch.zeros(3)}, "latent_bias has shape"),
        ({"more": torch.zeros(3)}, "also holds more"),
    ],
)
def test_a_file_of_openai_that_cannot_be_represented_is_refused(changed, match, tmp_path):
    plain = {"pre_bias": torch.zeros(D), "encoder.weight": torch.ones(M, D), "latent_bias": torch.zeros(M), "decoder.weight": torch.ones(D, M)}
    plain |= {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    torch.save(plain | changed, tmp_path / "ae.pt")
    refused(tmp_path / "ae.pt", match)


@pytest.mark.parametrize("case", ["dictionary_learning/MatryoshkaBatchTopKSAE", "sae_lens/gated_whitened", "sparsify/topk"])
def test_any_damage_gives_an_sae_or_one_message(case, tmp_path):
    """Bytes changed, put in or left out at random, mostly where names and shapes are."""
    draw, folder = random.Random(0), tmp_path / "theirs"
    shutil.copytree(GOLDEN / case, folder)
    (folder / "outputs.safetensors").unlink()
    refusals = 0
    for _ in range(120):
        file = draw.choice(sorted(folder.iterdir()))
        whole = file.read_bytes()
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 8])):
            at = draw.randrange(min(len(whole), draw.choice([900, len(whole)])))
            damaged[at : at + draw.choice([0, 1])] = bytes([draw.randrange(256)])
        file.write_bytes(damaged[: draw.choice([len(damaged), len(damaged), draw.randrange(len(damaged))])])
        try:
            load_sae(folder)
        except ValueError as error:
            refusals += 1
            assert str(folder) in str(error) and "\n" not in str(error)
        file.write_bytes(whole)
    assert refusals > 60
    load_sae(folder)


def test_bombs_are_refused_within_little_memory(tmp_path):
    """In a process that may not take 100 MB more than it has once everything is imported."""
    bombs = {name: PICKLED[name] for name in PICKLED if any(word in name for word in ("bomb", "terabyte", "trillion", "billion", "packed", "end"))}
    for index, (damage, _) in enumerate(bombs.values()):
        folder = tmp_path / str(index)
        folder.mkdir()
        torch.save(state(), folder / "ae.pt")
        trainer(folder)
        damage(folder)
    make("sparsify", tmp_path / "sparsify")
    SPARSIFY["a tensor of a terabyte"][0](tmp_path / "sparsify")
    make("sae_lens", tmp_path / "lens", "switch")
    LENS["a plug-in of a billion latents"][1](tmp_path / "lens")
    script = """
import re, resource, sys
from pathlib import Path
import torch
from switch_sae import load_sae
torch.set_num_threads(1)
load_sae(sys.argv[2])
now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + 100 * 2**20,) * 2)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load_sae(folder)
    except ValueError as error:
        print(folder.name, "alloc" in str(error))
"""
    good = tmp_path.with_name(tmp_path.name + "_good")
    good.mkdir()
    torch.save(state(), good / "ae.pt")
    trainer(good)
    done = subprocess.run((sys.executable, "-c", script, str(tmp_path), str(good)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(bombs) + 2 >= 8 and all(line.endswith("False") for line in lines), done.stdout

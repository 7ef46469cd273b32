"""The folders of dictionary_learning (github.com/saprmarks/dictionary_learning): ae.pt, a pickled state dict, and config.json."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from switch_sae.interop.base import Format, write
from switch_sae.interop.pickled import read_pickled
from switch_sae.interop.reading import TensorFile, agree, count, read_json, section
from switch_sae.interop.weights import DenseWeights, fold_decoder_norms, of_sae, to_sae, unit_norms
from switch_sae.models import SparseAutoencoder

WEIGHTS, CONFIG = "ae.pt", "config.json"
_CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}
"""Its dictionaries, and our architecture of the same function."""
_WRITTEN = {architecture: name for name, architecture in _CLASSES.items() if name != "AutoEncoder"}
"""`AutoEncoder` subtracts the decoder's bias from its input, which our ReLU does not."""
_LINEAR = {"W_enc_MD": "encoder.weight", "b_enc_M": "encoder.bias", "W_dec_MD": "decoder.weight", "b_out_D": "b_dec"}
_DIRECT = {"W_enc_MD": "W_enc", "b_enc_M": "b_enc", "W_dec_MD": "W_dec", "b_out_D": "b_dec"}
_GATED = {
    "W_enc_MD": "encoder.weight", "b_enc_M": "gate_bias", "W_dec_MD": "decoder.weight", "b_out_D": "decoder_bias",
    "b_mag_M": "mag_bias", "r_mag_M": "r_mag",
}  # fmt: skip
_NAMES = {name: _LINEAR for name in _CLASSES} | {
    "AutoEncoder": {**_LINEAR, "b_out_D": "bias"},
    "AutoEncoderNew": {**_LINEAR, "b_out_D": "decoder.bias"},
    "GatedAutoEncoder": _GATED,
    "JumpReluAutoEncoder": _DIRECT,
    "MatryoshkaBatchTopKSAE": _DIRECT,
}
_UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")
_WITH_K, _BY_THRESHOLD = ("topk", "batch_topk", "matryoshka"), ("batch_topk", "matryoshka")


class DictionaryLearning(Format):
    """What its `load_dictionary` gives: `AutoEncoder` with decoder rows of norm 1, BatchTopK and Matryoshka by their threshold.

    TopK: f = the k largest of ReLU(W_enc (x - b_dec) + b_enc), recon = W_dec f + b_dec.
    """

    files: ClassVar = (WEIGHTS, CONFIG)

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS).is_file() or (path.is_file() and path.suffix == ".pt")

    def load(self, path: Path, **settings: Any) -> SparseAutoencoder:
        self.check_settings(path, settings)
        folder, file = (path, path / WEIGHTS) if path.is_dir() else (path.parent, path)
        # checkpoints/ae_1000.pt lies one folder below its config.
        config_file = next((place / CONFIG for place in (folder, folder.parent) if (place / CONFIG).is_file()), folder / CONFIG)
        trainer = section(config_file, read_json(config_file), "trainer")
        name = trainer.get("dict_class")
        if not isinstance(name, str) or name not in _CLASSES:
            raise ValueError(f"{config_file}: dict_class={str(name)[:60]!r} is not one that can be computed here; those are {', '.join(_CLASSES)}.")
        tensors, _ = read_pickled(file)
        weights = _weights(name, tensors, trainer, config_file)
        tensors.finish()
        return to_sae(weights)

    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        weights = of_sae(sae)
        name, (num_latents, d_in) = _WRITTEN[weights.architecture], weights.W_enc_MD.shape
        state: OrderedDict[str, Tensor] = OrderedDict()
        for ours, theirs in _NAMES[name].items():
            value = getattr(weights, ours)
            state[theirs] = value.T.contiguous() if _is_transposed(theirs) else value.clone()
        trainer = {"dict_class": name, "activation_dim": d_in, "dict_size": num_latents}
        if weights.k is not None:
            trainer["k"], state["k"] = weights.k, torch.tensor(weights.k, dtype=torch.int32)
            state["threshold"] = torch.tensor(-1.0)
        if weights.threshold is not None:
            state["threshold"] = weights.threshold.clone()
        if weights.group_sizes:
            state["group_sizes"] = torch.tensor(weights.group_sizes)
        write(path / WEIGHTS, lambda part: torch.save(state, part))
        write(path / CONFIG, (json.dumps({"trainer": trainer}, indent=1) + "\n").encode())


def _is_transposed(name: str) -> bool:
    """Whether it is kept as [D, M] where ours is [M, D], or the other way round."""
    return name in ("decoder.weight", "W_enc")


def _weights(name: str, tensors: TensorFile, trainer: dict[str, Any], config_file: Path) -> DenseWeights:
    names = _NAMES[name]
    encoder = names["W_enc_MD"]
    num_latents, d_in = tensors.size(encoder)[::-1] if _is_transposed(encoder) else tensors.size(encoder)
    for setting, size in (("dict_size", num_latents), ("activation_dim", d_in)):
        agree(config_file, setting, (CONFIG, trainer.get(setting)), (f"the shape of {encoder}", size))
    shapes = {"M": (num_latents,), "D": (d_in,), "MD": (num_latents, d_in)}
    found: dict[str, Any] = {}
    for ours, theirs in names.items():
        shape = shapes[ours.split("_")[-1]]
        found[ours] = tensors.take(theirs, *shape[::-1]).T.contiguous() if _is_transposed(theirs) else tensors.take(theirs, *shape)
    architecture = _CLASSES[name]
    if architecture in _WITH_K:
        (stored,) = tensors.take_integers("k") if "k" in tensors else [None]
        k = agree(config_file, "k", (CONFIG, trainer.get("k")), ("the tensor k", stored))
        found["k"] = count(config_file, "k", k, num_latents)
        threshold = tensors.take("threshold") if "threshold" in tensors else torch.tensor(-1.0)
        if architecture in _BY_THRESHOLD:
            found["threshold"] = threshold
    elif name == "JumpReluAutoEncoder":
        found["threshold"] = tensors.take("threshold", num_latents)
    if name == "MatryoshkaBatchTopKSAE":
        sizes = tensors.take_integers("group_sizes", *tensors.size("group_sizes", 1))
        if min(sizes) < 1 or sum(sizes) != num_latents:
            raise ValueError(f"{tensors.path}: group_sizes={sizes[:8]} must be positive and sum to the {num_latents} latents.")
        found["group_sizes"] = sizes
    weights = DenseWeights(architecture, centred=name not in _UNCENTRED, **found)
    if name != "AutoEncoder":
        return weights
    norms_M = unit_norms(tensors.path, weights)
    return weights if torch.allclose(norms_M, torch.ones_like(norms_M)) else fold_decoder_norms(weights, norms_M)

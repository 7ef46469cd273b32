"""circuit-tracer's sets of transcoders: layer_0.safetensors and so on, one for each layer of a language model, and config.yaml."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from switch_sae.files import tell
from switch_sae.interop.base import Format, write
from switch_sae.interop.reading import count, listed, read_safetensors, read_yaml
from switch_sae.interop.transcoder_weights import TranscoderWeights, of_transcoder, to_transcoder, why_not_dense_transcoder
from switch_sae.models import SparseAutoencoder

CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"
IN_MEMORY = "In Python, switch_sae.interop.circuit_tracer_plugin.transcoder_set gives circuit-tracer the same function without files"
_HAS_K = {"relu": False, "topk": True}
"""What `activation` may be, and whether `k` stands beside it."""
_LAYER = re.compile(r"layer_(\d{1,6})\.safetensors")
_HOOK = re.compile(r"blocks\.(\d{1,6})\.(.+)")


class CircuitTracer(Format):
    """f = act(W_enc x + b_enc), recon = W_dec f + b_dec (+ W_skip x) at each layer; act is ReLU, here one of the M largest, or `activation: topk`.

    circuit-tracer's own TopK has no ReLU: where fewer than k are positive it also lets the largest negative ones through, which here are 0.
    """

    files: ClassVar = (CONFIG,)
    settings: ClassVar = {"layer": "layer=3"}

    def recognises(self, path: Path) -> bool:
        return _LAYER.fullmatch(path.name) is not None if path.is_file() else bool(_layers(path))

    def load(self, path: Path, **settings: Any) -> SparseAutoencoder:
        """One layer of a set; a folder needs to be told which."""
        self.check_settings(path, settings)
        if path.is_dir():
            layer, layers = settings.get("layer"), _layers(path)
            if isinstance(layer, bool) or layer not in layers:
                said = "is a set of transcoders" if layer is None else f"has no layer={str(layer)[:40]}"
                raise ValueError(f"{path} {said}, of layers {_ranges(layers)}. Say which one: layer={min(layers)}; in a terminal --set layer=...")
            path = layers[layer]
        elif "layer" in settings:
            raise ValueError(f"{path} is one layer of a set already. Leave layer={str(settings['layer'])[:40]} out.")
        config, tensors = read_yaml(path.parent / CONFIG), read_safetensors(path)
        num_latents, d_in = tensors.size("W_enc")
        if THRESHOLD in tensors:
            raise ValueError(f"{path} holds {THRESHOLD}, of JumpReLU, which no transcoder here computes: they keep the k largest of ReLU, or all.")
        weights = TranscoderWeights(
            tensors.take("W_enc", num_latents, d_in),
            tensors.take("W_dec", num_latents, d_in),
            tensors.take("b_enc", num_latents),
            tensors.take("b_dec", d_in),
            _k(path.parent / CONFIG, config, num_latents),
            tensors.take("W_skip", d_in, d_in) if "W_skip" in tensors else None,
        )
        tensors.finish()
        sae = to_transcoder(weights)
        sae.activations = _activations(config, int(_LAYER.fullmatch(path.name)[1]))  # type: ignore[index]
        return sae

    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        """A set of one layer, which must be the first."""
        self.save_all([sae], path)

    def load_all(self, path: Path) -> list[SparseAutoencoder]:
        """Of layers 0, 1, ..."""
        return [self.load(file) for _, file in sorted(_layers(path).items())]

    def save_all(self, saes: Sequence[SparseAutoencoder], path: Path) -> list[SparseAutoencoder]:
        """A set of one transcoder for each layer. Raises ValueError for what is no set (`in_order`), and for transcoders with a router."""
        for sae in saes:
            if why := why_not_dense_transcoder(sae):
                raise ValueError(f"{why} {IN_MEMORY}." if sae.is_transcoder else why)
        about = in_order(saes)
        weights = [of_transcoder(sae) for sae in about.saes]
        skips = any(w.W_skip_OD is not None for w in weights)  # a set has them in all layers or in none, and zeros are none
        for layer, w in enumerate(weights):
            tensors = {"W_enc": w.W_enc_MD, "W_dec": w.W_dec_MO, "b_enc": w.b_enc_M, "b_dec": w.b_out_O}
            if skips:
                tensors["W_skip"] = torch.zeros(len(w.b_out_O), len(w.b_out_O)) if w.W_skip_OD is None else w.W_skip_OD
            write(path / f"layer_{layer}.safetensors", lambda part, tensors=tensors: save_file(tensors, part))  # type: ignore[misc]
        config: dict[str, Any] = {"model_name": about.model, "model_kind": "transcoder_set", "scan": path.name}
        config |= {"feature_input_hook": about.input_hook, "feature_output_hook": about.output_hook}
        config |= {"activation": "relu"} if about.k == about.num_latents else {"activation": "topk", "k": about.k}
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in config.items()]  # JSON is YAML
        write(path / CONFIG, "".join(lines).encode())
        if about.k != about.num_latents:
            tell(
                f"{path / CONFIG} says activation: topk, which circuit-tracer reads since April 2026. Its release 0.5.0 does not look, and would let "
                f"all that is positive through. {IN_MEMORY}."
            )
        return about.saes


@dataclass(frozen=True)
class InOrder:
    """Transcoders of layers 0, 1, ... of one language model, and what a set says of all of them."""

    saes: list[SparseAutoencoder]
    model: str
    input_hook: str
    """Without its layer."""
    output_hook: str
    num_latents: int
    k: int


def in_order(saes: Sequence[SparseAutoencoder]) -> InOrder:
    """Transcoders sorted by the layers that they were trained on.

    Raises ValueError where these are not known, and for what is no set: layers that are missing or there
    twice; hooks, models, sizes or k that differ.
    """
    found: dict[int, SparseAutoencoder] = {}
    shared: dict[str, Any] = {}
    for sae in saes:
        layer, same = _place(sae)
        if layer in found:
            raise ValueError(f"two transcoders are of layer {layer}; a set has one for each. Leave one out.")
        found[layer] = sae
        for name, value in same.items():
            if shared.setdefault(name, value) != value:
                raise ValueError(f"{name} is {shared[name]} and {value}: it must be the same in all layers of a set. Train them alike.")
    if missing := set(range(max(found, default=0) + 1)) - found.keys():
        raise ValueError(
            f"a set of circuit-tracer has a transcoder for every layer from 0. Given: {_ranges(found)}; missing: {_ranges(missing)}. "
            "Give a run of each."
        )
    return InOrder([found[layer] for layer in sorted(found)], *shared.values())


def _place(sae: SparseAutoencoder) -> tuple[int, dict[str, Any]]:
    """(its layer, what it shares with all others of a set, as `InOrder` has it)."""
    about = sae.activations
    hook, target = about.get("hook"), about.get("target_hook")
    places = [_HOOK.fullmatch(name) if isinstance(name, str) else None for name in (hook, target)]
    if places[0] is None or places[1] is None or places[0][1] != places[1][1]:
        raise ValueError(
            f"a transcoder of hook={hook!r} and target_hook={target!r} has no place in a set: both must be known and of one layer, such as "
            "blocks.3.mlp.hook_in and blocks.3.hook_mlp_out. Give transcoders that were trained on an MLP."
        )
    if sae.d_out != sae.d_in:
        raise ValueError(f"circuit-tracer's transcoders have one size, but that of {hook} reads {sae.d_in} numbers and writes {sae.d_out}.")
    model = str(about.get("model") or "unknown")
    is_folder = Path(model).exists() or model.count("/") > 1 or model.startswith((".", "/", "~"))  # of which only the last part is told
    same = {"model": PurePath(model).name if is_folder else model, "hook": places[0][2], "target_hook": places[1][2]}
    return int(places[0][1]), {**same, "num_latents": sae.num_latents, "k": sae.k}


def _k(file: Path, config: dict[str, Any], num_latents: int) -> int:
    kind, activation = config.get("model_kind", "transcoder_set"), config.get("activation", "relu")
    if kind != "transcoder_set":
        raise ValueError(f"{file}: model_kind={str(kind)[:40]} cannot be represented: here a transcoder reads and writes one layer (transcoder_set).")
    if activation not in _HAS_K:
        raise ValueError(f"{file}: activation={str(activation)[:40]} cannot be represented; {' and '.join(_HAS_K)} can.")
    return num_latents if not _HAS_K[activation] else count(file, "k", config.get("k"), num_latents)


def _activations(config: dict[str, Any], layer: int) -> dict[str, str]:
    hooks = {"hook": config.get("feature_input_hook"), "target_hook": config.get("feature_output_hook")}
    found = {name: f"blocks.{layer}.{value}" for name, value in hooks.items() if isinstance(value, str)}
    return {**found, **({"model": config["model_name"]} if isinstance(config.get("model_name"), str) else {})}


def _layers(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {int(match[1]): path for path in folder.iterdir() if (match := _LAYER.fullmatch(path.name))}


def _ranges(layers: Any) -> str:
    numbers = sorted(layers)
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return listed([str(number) for number in numbers])

"""SAELens' folders: sae_weights.safetensors and cfg.json, of version 6 and of those before it; also its training checkpoints."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from switch_sae.interop.base import Format, write
from switch_sae.interop.reading import TensorFile, agree, count, read_json, read_safetensors, section
from switch_sae.interop.token_norm import TokenNorm, TokenNormSAE
from switch_sae.interop.weights import DenseWeights, fold_decoder_norms, fold_whitening, of_sae, to_sae, unit_norms, why_not_dense
from switch_sae.models import SAES, SparseAutoencoder

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
PLUGIN = "switch_sae"
"""The architecture that `sae_lens_plugin` adds to SAELens: any of ours, as it is."""


@dataclass(frozen=True)
class _Architecture:
    """What its files hold, beside encoder and decoder."""

    ours: str
    """Our architecture of the same function."""
    bias: str = "b_enc"
    magnitudes: bool = False
    """b_mag and r_mag."""
    thresholds: bool = False
    """One for each latent."""
    k: bool = False
    """In the config: exact, or with a threshold for all (`topk_threshold`) an average."""
    one_threshold: bool = False
    groups: bool = False
    rescales: bool = False
    """Its default of `rescale_acts_by_decoder_norm`."""


_ARCHITECTURES = {
    "standard": _Architecture("relu"),
    "topk": _Architecture("topk", k=True),
    "gated": _Architecture("gated", bias="b_gate", magnitudes=True),
    "jumprelu": _Architecture("jumprelu", thresholds=True),
    "batchtopk": _Architecture("batch_topk", k=True, one_threshold=True, rescales=True),
    "matryoshka_batchtopk": _Architecture("matryoshka", k=True, one_threshold=True, groups=True, rescales=True),
}
_FUNCTIONS = {"relu": None, "topk": "topk"}
"""Activation functions before version 6, and the architecture of today that one of them made of a standard SAE."""
_WRITTEN = {"relu": "standard", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu", "batch_topk": "jumprelu", "matryoshka": "jumprelu"}
"""Its inference has BatchTopK and Matryoshka as JumpReLU with one threshold."""


class SAELens(Format):
    """f = act(W_enc (norm(x) - b_dec) + b_enc), recon = norm^-1(W_dec f + b_dec); b_dec is subtracted with `apply_b_dec_to_input` alone.

    With `rescale_acts_by_decoder_norm` latents are those of unit decoder rows. Of `normalize_activations`, `expected_average_only_in` and
    `covariance_whitening` are folded in from the files beside a checkpoint; the former's factor may be given instead, and 1.0 stands for activations
    that are scaled already, as SAELens takes them. `layer_norm` and `constant_norm_rescale` give a `TokenNormSAE`. A `hook_z` SAE takes heads side by
    side, [tokens, heads * d_head].
    """

    files: ClassVar = (WEIGHTS, CONFIG, SCALER, WHITENING)
    settings: ClassVar = {"scaling_factor": "scaling_factor=0.1"}

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS).is_file() or (path.is_file() and path.name == WEIGHTS)

    def load(self, path: Path, **settings: Any) -> SparseAutoencoder:
        self.check_settings(path, settings)
        folder = path if path.is_dir() else path.parent
        file, config, tensors = folder / CONFIG, read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)
        name = _architecture(file, config)
        if name == PLUGIN:
            return _ours(file, config, tensors)
        said = config.get("normalize_activations")
        norm = str(said) if not isinstance(said, bool | None) else "expected_average_only_in" if said else "none"
        if "scaling_factor" in settings and norm != "expected_average_only_in":
            raise ValueError(f"{file}: scaling_factor is no setting of normalize_activations={norm}. Leave it out.")
        weights = _weights(file, name, config, tensors)
        tensors.finish()
        if norm == "expected_average_only_in":
            weights = _scaled(folder, weights, settings.get("scaling_factor"))
        elif norm == "covariance_whitening":
            weights = _whitened(folder, weights)
        elif norm != "none" and norm not in TokenNorm.__members__:
            raise ValueError(f"{file}: normalize_activations={norm[:40]!r} is not known here.")
        sae = TokenNormSAE(to_sae(weights), TokenNorm[norm]).eval() if norm in TokenNorm.__members__ else to_sae(weights)
        sae.activations = _activations(config)
        return sae

    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        inner, norm = (sae.inner, sae.norm.name) if isinstance(sae, TokenNormSAE) else (sae, "none")
        config: dict[str, Any] = {
            "d_in": sae.d_in,
            "d_sae": sae.num_latents,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": norm,
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, "trained_by": "switch_sae", **_origin(sae)},
        }
        if why_not_dense(inner):
            folded = copy.deepcopy(inner)
            folded.fold_activation_scale()
            config |= {"architecture": PLUGIN, PLUGIN: SAES.to_plain(inner.config)}
            state = folded.state_dict(prefix=f"{PLUGIN}.")
            tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
        else:
            weights = of_sae(inner)
            config |= {"architecture": _WRITTEN[weights.architecture], "apply_b_dec_to_input": weights.centred}
            if weights.k is not None and weights.threshold is None:
                config |= {"k": weights.k, "rescale_acts_by_decoder_norm": False}
            tensors = _tensors(weights)
        write(path / WEIGHTS, lambda part: save_file(tensors, part))
        write(path / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def _activations(config: dict[str, Any]) -> dict[str, str]:
    """What the SAE was trained on, as far as it is said: before version 6 beside the other settings, after it among the metadata."""
    metadata = config.get("metadata")
    known = {**config, **(metadata if isinstance(metadata, dict) else {})}
    found = {"model": known.get("model_name"), "hook": known.get("hook_name", known.get("hook_point"))}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _origin(sae: SparseAutoencoder) -> dict[str, str]:
    """What is known of the activations, in SAELens' words."""
    known = {"model_name": sae.activations.get("model"), "hook_name": sae.activations.get("hook")}
    return {name: value for name, value in known.items() if isinstance(value, str)}


def _architecture(file: Path, config: dict[str, Any]) -> str:
    """Its name of today. Before version 6 TopK was a standard SAE with another activation function."""
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if not isinstance(function, str) or function not in _FUNCTIONS:
        raise ValueError(f"{file}: activation_fn={str(function)[:40]!r} cannot be represented; {' and '.join(_FUNCTIONS)} can.")
    name = _FUNCTIONS[function] or config.get("architecture", "standard")
    if name != PLUGIN and (not isinstance(name, str) or name not in _ARCHITECTURES):
        raise ValueError(
            f"{file}: architecture={str(name)[:40]!r} is not one that can be computed here; those are {', '.join(_ARCHITECTURES)}. "
            "Transcoders cannot be loaded yet."
        )
    return str(name)


def _weights(file: Path, name: str, config: dict[str, Any], tensors: TensorFile) -> DenseWeights:
    d_in, num_latents = tensors.size("W_enc")
    for key, size in (("d_in", d_in), ("d_sae", num_latents)):
        agree(file, key, (CONFIG, config.get(key)), ("the shape of W_enc", size))
    architecture, found = _ARCHITECTURES[name], dict[str, Any]()
    centred = _switch(file, config, "apply_b_dec_to_input", True)
    rescales = _switch(file, config, "rescale_acts_by_decoder_norm", architecture.rescales)
    if architecture.magnitudes:
        found |= {"b_mag_M": tensors.take("b_mag", num_latents), "r_mag_M": tensors.take("r_mag", num_latents)}
    if architecture.thresholds:
        is_log = "log_threshold" in tensors
        threshold_M = tensors.take("log_threshold" if is_log else "threshold", num_latents)
        found["threshold"] = threshold_M.exp() if is_log else threshold_M
    if architecture.k:
        kwargs = config.get("activation_fn_kwargs")
        k = config.get("k", kwargs.get("k") if isinstance(kwargs, dict) else None)
        if architecture.one_threshold:
            found["threshold"] = tensors.take("topk_threshold")
            k = max(1, round(k)) if isinstance(k, float) and 0 < k <= num_latents else k  # an average, which only says what to train with
        found["k"] = count(file, "k", k, num_latents)
    if architecture.groups:
        found["group_sizes"] = _groups(file, config.get("matryoshka_widths"), num_latents)
    weights = DenseWeights(
        architecture.ours,
        tensors.take("W_enc", d_in, num_latents).T.contiguous(),
        tensors.take("W_dec", num_latents, d_in),
        tensors.take(architecture.bias, num_latents),
        tensors.take("b_dec", d_in),
        centred=centred,
        **found,
    )
    if architecture.k and rescales:
        return fold_decoder_norms(weights, unit_norms(file, weights))
    return weights


def _switch(file: Path, config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {key}={str(value)[:40]!r} must be true or false.")
    return value


def _groups(file: Path, widths: Any, num_latents: int) -> list[int]:
    """Sizes of groups from the ends of prefixes; the whole SAE is the last one, said or not."""
    if not isinstance(widths, list) or not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"{file}: matryoshka_widths={str(widths)[:40]} must be a list of positive widths.")
    ends = widths if widths[-1] == num_latents else [*widths, num_latents]
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if min(sizes) < 1:
        raise ValueError(f"{file}: matryoshka_widths={str(widths)[:40]} must rise to at most d_sae={num_latents}.")
    return sizes


def _scaled(folder: Path, weights: DenseWeights, given: Any) -> DenseWeights:
    stored = read_json(folder / SCALER).get("scaling_factor") if (folder / SCALER).is_file() else None
    factor = agree(folder, "scaling_factor", (SCALER, stored), ("what was given", given))
    if factor is None:
        raise ValueError(
            f"{folder / CONFIG}: normalize_activations=expected_average_only_in needs the factor that activations are multiplied by, which is in "
            f'{SCALER} beside a checkpoint and not here. Say it: load_sae("{folder}", scaling_factor=...), 1.0 where yours are scaled already; in a '
            "terminal, --set scaling_factor=1.0."
        )
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise ValueError(f"{folder}: scaling_factor={str(factor)[:40]} must be a positive number.")
    return replace(weights, scale=float(factor))


def _whitened(folder: Path, weights: DenseWeights) -> DenseWeights:
    if not (folder / WHITENING).is_file():
        raise ValueError(
            f"{folder / CONFIG}: normalize_activations=covariance_whitening needs {WHITENING}, which is not here. Save the SAE's inference form with "
            "SAELens, where it is folded into the weights."
        )
    tensors, d_in = read_safetensors(folder / WHITENING), weights.W_enc_MD.shape[1]
    return fold_whitening(weights, tensors.take("mean", d_in), tensors.take("matrix", d_in, d_in), tensors.take("inverse_matrix", d_in, d_in))


def _tensors(weights: DenseWeights) -> dict[str, Tensor]:
    assert weights.b_enc_M is not None
    tensors = {"W_enc": weights.W_enc_MD.T.contiguous(), "W_dec": weights.W_dec_MD, "b_dec": weights.b_out_D}
    if weights.b_mag_M is not None and weights.r_mag_M is not None:
        return {**tensors, "b_gate": weights.b_enc_M, "b_mag": weights.b_mag_M, "r_mag": weights.r_mag_M}
    tensors["b_enc"] = weights.b_enc_M
    if weights.threshold is not None:
        tensors["threshold"] = weights.threshold.expand(len(weights.W_enc_MD)).contiguous()
    return tensors


def _ours(file: Path, config: dict[str, Any], tensors: TensorFile) -> SparseAutoencoder:
    """What `sae_lens_plugin` reads: settings and weights as a run folder has them."""
    plain = section(file, config, PLUGIN)
    try:
        typed = SAES.from_plain(plain)
        bound = max((shape[0] for shape in tensors.shapes.values() if shape), default=0)
        if typed.num_latents > bound:
            raise ValueError(f"num_latents={typed.num_latents}, but no tensor has more than {bound} rows")
        sae = SAES.build(typed, count(file, "d_in", config.get("d_in"), max((shape[-1] for shape in tensors.shapes.values() if shape), default=1)))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: its object {PLUGIN!r} does not describe an SAE: {error}") from error
    state = {name: tensors.take(f"{PLUGIN}.{name}", *tensor.shape) for name, tensor in sae.state_dict().items()}
    tensors.finish()
    sae.load_state_dict(state)
    norm = config.get("normalize_activations", "none")
    if norm == "none":
        return sae.eval()
    if norm not in TokenNorm.__members__:
        raise ValueError(f"{file}: normalize_activations={str(norm)[:40]!r} is not one that an SAE of switch_sae has.")
    return TokenNormSAE(sae, TokenNorm[norm]).eval()

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
from switch_sae.interop.reading import TensorFile, agree, count, flag, read_json, read_safetensors, section
from switch_sae.interop.token_norm import TokenNorm, TokenNormSAE
from switch_sae.interop.transcoder_weights import TranscoderWeights, of_transcoder, to_transcoder, why_not_dense_transcoder
from switch_sae.interop.weights import DenseWeights, fold_decoder_norms, fold_whitening, of_sae, to_sae, unit_norms, why_not_dense
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.models.widths import without_memory

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
_TRANSCODERS = {"transcoder": False, "skip_transcoder": True}
"""Of ReLU, and whether they hold W_skip."""
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

    A transcoder is f = ReLU(W_enc x + b_enc), recon = W_dec f + b_dec (+ W_skip x): here one of the k largest with k = d_sae, and so it is written;
    SAELens has none of fewer, so that those are written as a plug-in.
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
        if name in _TRANSCODERS:
            return _transcoder(file, name, config, tensors, norm)
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
        if not why_not_dense_transcoder(inner) and inner.k == inner.num_latents:
            tensors = _transcoder_tensors(inner)
            architecture = "skip_transcoder" if "W_skip" in tensors else "transcoder"
            config |= {"architecture": architecture, "d_out": inner.d_out, "apply_b_dec_to_input": False}
        elif why_not_dense(inner):
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
    found = {"model": known.get("model_name"), "hook": known.get("hook_name", known.get("hook_point")), "target_hook": known.get("hook_name_out")}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _origin(sae: SparseAutoencoder) -> dict[str, str]:
    """What is known of the activations, in SAELens' words."""
    names = {"model_name": "model", "hook_name": "hook", "hook_name_out": "target_hook"}
    known = {theirs: sae.activations.get(name) for theirs, name in names.items()}
    return {name: value for name, value in known.items() if isinstance(value, str)}


def _architecture(file: Path, config: dict[str, Any]) -> str:
    """Its name of today. Before version 6 TopK was a standard SAE with another activation function."""
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if not isinstance(function, str) or function not in _FUNCTIONS:
        raise ValueError(f"{file}: activation_fn={str(function)[:40]!r} cannot be represented; {' and '.join(_FUNCTIONS)} can.")
    name = config.get("architecture", "standard")
    if isinstance(name, str) and name.endswith("transcoder") and (name not in _TRANSCODERS or _FUNCTIONS[function]):
        what = f"activation_fn={function}" if name in _TRANSCODERS else "the thresholds of JumpReLU" if name.startswith("jumprelu") else "its kind"
        raise ValueError(f"{file}: architecture={name[:40]!r} cannot be represented: {what}. Transcoders here keep the k largest of ReLU, or all.")
    name = _FUNCTIONS[function] or name
    known = (*_ARCHITECTURES, *_TRANSCODERS)
    if name != PLUGIN and (not isinstance(name, str) or name not in known):
        raise ValueError(f"{file}: architecture={str(name)[:40]!r} is not one that can be computed here; those are {', '.join(known)}.")
    return str(name)


def _transcoder(file: Path, name: str, config: dict[str, Any], tensors: TensorFile, norm: str) -> SparseAutoencoder:
    (d_in, num_latents), (_, d_out) = tensors.size("W_enc"), tensors.size("W_dec")
    for key, size, where in (("d_in", d_in, "W_enc"), ("d_sae", num_latents, "W_enc"), ("d_out", d_out, "W_dec")):
        agree(file, key, (CONFIG, config.get(key)), (f"the shape of {where}", size))
    if norm != "none":
        raise ValueError(
            f"{file}: normalize_activations={norm[:40]} of a transcoder cannot be represented: transcoders here read activations as they are."
        )
    if flag(file, config, "apply_b_dec_to_input", False):
        raise ValueError(f"{file}: apply_b_dec_to_input=true is for autoencoders: a transcoder's b_dec belongs to another hook. Correct one of them.")
    weights = TranscoderWeights(
        tensors.take("W_enc", d_in, num_latents).T.contiguous(),
        tensors.take("W_dec", num_latents, d_out),
        tensors.take("b_enc", num_latents),
        tensors.take("b_dec", d_out),
        num_latents,
        tensors.take("W_skip", d_out, d_in) if _TRANSCODERS[name] else None,
    )
    tensors.finish()
    sae = to_transcoder(weights)
    sae.activations = _activations(config)
    return sae


def _transcoder_tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    weights = of_transcoder(sae)
    tensors = {"W_enc": weights.W_enc_MD.T.contiguous(), "b_enc": weights.b_enc_M, "W_dec": weights.W_dec_MO, "b_dec": weights.b_out_O}
    return tensors if weights.W_skip_OD is None else {**tensors, "W_skip": weights.W_skip_OD}


def _weights(file: Path, name: str, config: dict[str, Any], tensors: TensorFile) -> DenseWeights:
    d_in, num_latents = tensors.size("W_enc")
    for key, size in (("d_in", d_in), ("d_sae", num_latents)):
        agree(file, key, (CONFIG, config.get(key)), ("the shape of W_enc", size))
    architecture, found = _ARCHITECTURES[name], dict[str, Any]()
    centred = flag(file, config, "apply_b_dec_to_input", True)
    rescales = flag(file, config, "rescale_acts_by_decoder_norm", architecture.rescales)
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
        d_in = count(file, "d_in", config.get("d_in"), max((shape[-1] for shape in tensors.shapes.values() if shape), default=1))
        for name, tensor in without_memory(typed, d_in).state_dict().items():  # before anything is as large as the file says
            if tensors.shapes.get(f"{PLUGIN}.{name}") != tuple(tensor.shape):
                raise ValueError(f"its {name} would have shape {tuple(tensor.shape)}, but the file's is {tensors.shapes.get(f'{PLUGIN}.{name}')}")
        sae = SAES.build(typed, d_in)
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

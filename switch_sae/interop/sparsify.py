"""The folders of EleutherAI's sparsify (eai-sparsify): sae.safetensors and cfg.json."""

import json
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor

from switch_sae.interop.base import Format, write
from switch_sae.interop.reading import agree, count, flag, read_json, read_safetensors
from switch_sae.interop.transcoder_weights import TranscoderWeights, of_transcoder, to_transcoder
from switch_sae.interop.weights import DenseWeights, of_sae, to_sae
from switch_sae.models import SparseAutoencoder

WEIGHTS, CONFIG, ACTIVATION = "sae.safetensors", "cfg.json", "topk"


class Sparsify(Format):
    """f = the k largest of ReLU(W_enc (x - b_dec) + b_enc), recon = W_dec f + b_dec, with decoder rows as they are.

    A transcoder (`transcode`) encodes x as it is. With `skip_connection` W_skip x is added, of x as it is, to a transcoder or an autoencoder;
    both are transcoders here. Input and output have one size.
    """

    files: ClassVar = (WEIGHTS, CONFIG)

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS).is_file() or (path.is_file() and path.name == WEIGHTS)

    def load(self, path: Path, **settings: Any) -> SparseAutoencoder:
        self.check_settings(path, settings)
        folder = path if path.is_dir() else path.parent
        config, tensors = read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)
        if (activation := config.get("activation", ACTIVATION)) != ACTIVATION:
            reason = "only the k largest of ReLU are computed here, not groups"
            raise ValueError(f"{folder / CONFIG}: activation={str(activation)[:40]} cannot be represented: {reason}.")
        transcodes, skips = (flag(folder / CONFIG, config, key, False) for key in ("transcode", "skip_connection"))
        if "W_skip" in tensors and not skips:
            raise ValueError(f"{folder / WEIGHTS} holds W_skip, but {CONFIG} says skip_connection=false. One of them is wrong.")
        num_latents, d_in = tensors.size("encoder.weight")
        agree(folder / CONFIG, "d_in", (CONFIG, config.get("d_in")), ("the shape of encoder.weight", d_in))
        # 0 latents are what expansion_factor says.
        agree(folder / CONFIG, "num_latents", (CONFIG, config.get("num_latents") or None), ("the shape of encoder.weight", num_latents))
        k = count(folder / CONFIG, "k", config.get("k"), num_latents)
        W_enc_MD, W_dec_MD = tensors.take("encoder.weight", num_latents, d_in), tensors.take("W_dec", num_latents, d_in)
        b_enc_M, b_dec_D = tensors.take("encoder.bias", num_latents), tensors.take("b_dec", d_in)
        W_skip_DD = tensors.take("W_skip", d_in, d_in) if skips else None
        tensors.finish()
        if transcodes or skips:
            return to_transcoder(TranscoderWeights(W_enc_MD, W_dec_MD, b_enc_M, b_dec_D, k, W_skip_DD, None if transcodes else b_dec_D))
        return to_sae(DenseWeights("topk", W_enc_MD, W_dec_MD, b_enc_M, b_dec_D, centred=True, k=k))

    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        tensors, k = _of_transcoder(sae) if sae.is_transcoder else _of_sae(sae)
        num_latents, d_in = tensors["encoder.weight"].shape
        config = {
            "activation": ACTIVATION,
            "expansion_factor": max(1, num_latents // d_in),
            "normalize_decoder": not sae.is_transcoder,
            "num_latents": num_latents,
            "k": k,
            "multi_topk": False,
            "skip_connection": "W_skip" in tensors,
            "transcode": sae.is_transcoder,
            "d_in": d_in,
        }
        write(path / WEIGHTS, lambda part: save_file(tensors, part))
        write(path / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def _of_sae(sae: SparseAutoencoder) -> tuple[dict[str, Tensor], int]:
    """(tensors by their names there, k). Raises ValueError for what has no k."""
    weights = of_sae(sae)
    if weights.threshold is not None or weights.k is None:
        raise ValueError(f"sparsify has only SAEs with the k largest latents, and a {sae.label} is none. Write it with --to sae_lens.")
    assert weights.b_enc_M is not None
    tensors = {"encoder.weight": weights.W_enc_MD, "encoder.bias": weights.b_enc_M, "W_dec": weights.W_dec_MD, "b_dec": weights.b_out_D}
    return tensors, weights.k


def _of_transcoder(sae: SparseAutoencoder) -> tuple[dict[str, Tensor], int]:
    """As `_of_sae`. Raises ValueError for an output of another size than the input's."""
    weights = of_transcoder(sae)
    if sae.d_out != sae.d_in:
        raise ValueError(f"sparsify's transcoders have one size, but this one reads {sae.d_in} numbers and writes {sae.d_out}. Use --to sae_lens.")
    tensors = {"encoder.weight": weights.W_enc_MD, "encoder.bias": weights.b_enc_M, "W_dec": weights.W_dec_MO, "b_dec": weights.b_out_O}
    return tensors if weights.W_skip_OD is None else {**tensors, "W_skip": weights.W_skip_OD}, weights.k

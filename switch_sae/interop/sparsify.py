"""The folders of EleutherAI's sparsify (eai-sparsify): sae.safetensors and cfg.json."""

import json
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file

from switch_sae.interop.base import Format, write
from switch_sae.interop.reading import agree, count, read_json, read_safetensors
from switch_sae.interop.weights import DenseWeights, of_sae, to_sae
from switch_sae.models import SparseAutoencoder

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
_REFUSED = {
    "activation": ("topk", "only the k largest of ReLU are computed here, not groups"),
    "skip_connection": (False, "W_skip, a linear path from input to output, is a transcoder's, and transcoders cannot be loaded yet"),
    "transcode": (False, "it predicts another hook than it reads, and transcoders cannot be loaded yet"),
}
"""Settings with the one value that can be represented, and why others cannot."""


class Sparsify(Format):
    """f = the k largest of ReLU(W_enc (x - b_dec) + b_enc), recon = W_dec f + b_dec, with decoder rows as they are."""

    files: ClassVar = (WEIGHTS, CONFIG)

    def recognises(self, path: Path) -> bool:
        return (path / WEIGHTS).is_file() or (path.is_file() and path.name == WEIGHTS)

    def load(self, path: Path, **settings: Any) -> SparseAutoencoder:
        self.check_settings(path, settings)
        folder = path if path.is_dir() else path.parent
        config, tensors = read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)
        for key, (value, reason) in _REFUSED.items():
            if config.get(key, value) != value:
                raise ValueError(f"{folder / CONFIG}: {key}={str(config[key])[:40]} cannot be represented: {reason}.")
        if "W_skip" in tensors:
            raise ValueError(f"{folder / WEIGHTS} holds W_skip: {_REFUSED['skip_connection'][1]}.")
        num_latents, d_in = tensors.size("encoder.weight")
        agree(folder / CONFIG, "d_in", (CONFIG, config.get("d_in")), ("the shape of encoder.weight", d_in))
        # 0 latents are what expansion_factor says.
        agree(folder / CONFIG, "num_latents", (CONFIG, config.get("num_latents") or None), ("the shape of encoder.weight", num_latents))
        weights = DenseWeights(
            "topk",
            tensors.take("encoder.weight", num_latents, d_in),
            tensors.take("W_dec", num_latents, d_in),
            tensors.take("encoder.bias", num_latents),
            tensors.take("b_dec", d_in),
            centred=True,
            k=count(folder / CONFIG, "k", config.get("k"), num_latents),
        )
        tensors.finish()
        return to_sae(weights)

    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        weights = of_sae(sae)
        if weights.threshold is not None or weights.k is None:
            raise ValueError(f"sparsify has only SAEs with the k largest latents, and a {sae.label} is none. Write it with --to sae_lens.")
        num_latents, d_in = weights.W_enc_MD.shape
        config = {
            "activation": "topk",
            "expansion_factor": max(1, num_latents // d_in),
            "normalize_decoder": True,
            "num_latents": num_latents,
            "k": weights.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": d_in,
        }
        assert weights.b_enc_M is not None
        tensors = {"encoder.weight": weights.W_enc_MD, "encoder.bias": weights.b_enc_M, "W_dec": weights.W_dec_MD, "b_dec": weights.b_out_D}
        write(path / WEIGHTS, lambda part: save_file(tensors, part))
        write(path / CONFIG, (json.dumps(config, indent=1) + "\n").encode())

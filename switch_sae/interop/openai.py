"""OpenAI's sparse_autoencoder (github.com/openai/sparse_autoencoder): one .pt file with a pickled state dict."""

from pathlib import Path
from typing import Any

from switch_sae.interop.base import Format
from switch_sae.interop.pickled import pickled_names, read_pickled
from switch_sae.interop.reading import count
from switch_sae.interop.token_norm import TokenNorm, TokenNormSAE
from switch_sae.interop.weights import DenseWeights, to_sae
from switch_sae.models import SparseAutoencoder

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


class OpenAI(Format):
    """f = act(W_enc (x - pre_bias) + latent_bias), recon = W_dec f + pre_bias; with TopK, not with ReLU, x is layer-normalised first.

    That normalisation (`TokenNormSAE`) goes with TopK is a rule of its own `from_state_dict`: files do not say it.
    """

    def recognises(self, path: Path) -> bool:
        return path.is_file() and {"pre_bias", "latent_bias", "encoder.weight"} <= pickled_names(path)

    def load(self, path: Path, **settings: Any) -> SparseAutoencoder:
        self.check_settings(path, settings)
        tensors, others = read_pickled(path)
        num_latents, d_in = tensors.size("encoder.weight")
        activation = others.get("activation", "ReLU")
        if activation not in ("ReLU", "TopK"):
            raise ValueError(f"{path}: activation={str(activation)[:40]!r} cannot be represented; TopK and ReLU can.")
        state, k = others.get("activation_state_dict", {}), None
        if activation == "TopK":
            state = state if isinstance(state, dict) else {}
            k = count(path, "activation_state_dict: k", state.get("k"), num_latents)
            if state.get("postact_fn") != "ReLU":
                reason = "latents that are not cut at 0 can be negative, and those here cannot"
                raise ValueError(f"{path}: postact_fn={str(state.get('postact_fn'))[:40]!r} cannot be represented: {reason}.")
        weights = DenseWeights(
            "topk" if k else "relu",
            tensors.take("encoder.weight", num_latents, d_in),
            tensors.take("decoder.weight", d_in, num_latents).T.contiguous(),
            tensors.take("latent_bias", num_latents),
            tensors.take("pre_bias", d_in),
            centred=True,
            k=k,
        )
        tensors.finish(_STATISTICS)
        return TokenNormSAE(to_sae(weights), TokenNorm.layer_norm).eval() if k else to_sae(weights)

    def save(self, sae: SparseAutoencoder, path: Path) -> None:
        raise ValueError(
            "files of OpenAI's sparse_autoencoder are read, not written: its loader normalises the tokens of every TopK SAE. Write sae_lens instead."
        )

"""What formats of transcoders have in common: a dense transcoder's weights in one form, from which ours are built and into which ours are written.

Shapes: M latents, D size of the input, O size of the output.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.models.transcoder import Skip

OURS = "transcoder"
"""Our architecture of the same function."""


@dataclass(frozen=True)
class TranscoderWeights:
    """f = the k largest of ReLU(W_enc (x - centre) + b_enc), recon = W_dec f + b_out + W_skip x, of raw activations; k = M is ReLU alone."""

    W_enc_MD: Tensor
    W_dec_MO: Tensor
    b_enc_M: Tensor
    b_out_O: Tensor
    k: int
    W_skip_OD: Tensor | None = None
    centre_D: Tensor | None = None
    """None is 0."""


def to_transcoder(weights: TranscoderWeights) -> SparseAutoencoder:
    """The same function as one of ours, in evaluation mode."""
    (num_latents, d_in), d_out = weights.W_enc_MD.shape, weights.W_dec_MO.shape[1]
    skip = Skip.none if weights.W_skip_OD is None else Skip.full
    config = SAES[OURS].Config(num_latents=num_latents, k=weights.k, d_out=None if d_out == d_in else d_out, skip=skip)
    sae = SAES.build(config, d_in)
    centre_D = torch.zeros(d_in) if weights.centre_D is None else weights.centre_D
    state = {"W_enc_MD": weights.W_enc_MD, "W_dec_MD": weights.W_dec_MO, "b_enc_M": weights.b_enc_M, "b_pre_D": centre_D, "b_post_D": weights.b_out_O}
    state |= {"activation_scale": torch.tensor(1.0), "output_scale": torch.tensor(1.0)}
    sae.load_state_dict(state if weights.W_skip_OD is None else {**state, "skip.W_up_OR": weights.W_skip_OD})
    return sae.eval()


@torch.no_grad()
def of_transcoder(sae: SparseAutoencoder) -> TranscoderWeights:
    """A dense transcoder's weights, with both scales folded in, the centre in the encoder's bias and a skip path of low rank multiplied out.

    Raises ValueError as `why_not_dense_transcoder` says.
    """
    if why := why_not_dense_transcoder(sae):
        raise ValueError(why)
    folded: Any = copy.deepcopy(sae).to("cpu", torch.float64)
    folded.fold_activation_scale()
    b_enc_M = folded.b_enc - folded.W_enc_MD @ folded.b_in_D
    skip_OD = None if folded.skip is None else _float32(folded.skip.weight())
    return TranscoderWeights(
        _float32(folded.W_enc_MD), _float32(folded.W_dec_MD), _float32(b_enc_M), _float32(folded.b_out_D), folded.config.k, skip_OD
    )


def why_not_dense_transcoder(sae: SparseAutoencoder) -> str | None:
    """Why other libraries' transcoders cannot compute it; None where they can."""
    if type(sae) is SAES[OURS]:
        return None
    if sae.is_transcoder and sae.is_routed:
        return (
            f"a {type(sae).__name__} sends each input to some of {sae.num_experts} experts and multiplies their latents by the router's gate; "
            "transcoders of other libraries compute all latents from one matrix and have no place for a router. With --to sae_lens it becomes a "
            "plug-in of SAELens."
        )
    return f"a {type(sae).__name__} is no dense transcoder, which reads one hook and writes another. Give one that was trained with sae=transcoder."


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True).contiguous()

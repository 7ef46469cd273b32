"""Whose work a component of the output is: exact, linear shares of latents, bias, skip path and error, with the gate held fixed.

Shapes: T tokens, D activation size, S experts per token, K slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.models.factored import FactoredSAE
from switch_sae.models.latents import SparseLatents
from switch_sae.models.topk import TopKSAE
from switch_sae.rows import Rows, Shapes


@dataclass(frozen=True, repr=False)
class Attribution(Shapes):
    """<target, direction> of each token, taken apart; raw units. The parts sum to it (`total`)."""

    latents: SparseLatents
    shares_TK: Tensor
    """What each active latent adds: value * <decoder row, direction>."""
    bias: Tensor
    """Scalar: <b_out, direction>."""
    skip_T: Tensor
    """What the skip path adds; zeros without one."""
    error_T: Tensor
    """What the target has and the reconstruction has not."""
    readers_TKD: Tensor
    """For each active latent, d value / d x with the gate and the choice of latents held fixed: gate * encoder row, in units of raw inputs; 0 for
    slots that did not fire. <readers, v> is what an upstream direction v adds to a latent's value."""
    offsets_TK: Tensor
    """value - <readers, x>: what the biases add."""

    @property
    def total_T(self) -> Tensor:
        """The sum of all parts."""
        return self.shares_TK.sum(dim=1) + self.bias + self.skip_T + self.error_T


@torch.no_grad()
def attribute(sae: TopKSAE, rows: Rows, direction_D: Tensor) -> Attribution:
    """Shares of <target, direction> for a direction in the space of raw targets; of an autoencoder the target is the input.

    The gate of a routed SAE is a number, as attention patterns are in attribution graphs: the choice of an expert is attributed to nothing.
    Raises ValueError for an SAE that is no TopK one by its own encoder with one row for each latent and a list of those that fired, and for another
    shape of direction.
    """
    if not isinstance(sae, TopKSAE) or sae.inference.name != "encoder":
        raise ValueError(f"{type(sae).__name__} with inference={sae.inference.name}: attribution needs a TopK SAE's encoder.")
    if isinstance(sae, FactoredSAE):
        raise ValueError(
            f"{type(sae).__name__} has no one encoder row for each latent that its value would be linear in. Attribute a TopK or Switch SAE."
        )
    if direction_D.shape != (sae.d_out,):
        raise ValueError(f"the direction has shape {tuple(direction_D.shape)}; it must be [d_out={sae.d_out}].")
    output = sae(rows.x_TD)
    latents, routing = output.latents, output.routing
    if not isinstance(latents, SparseLatents):
        raise ValueError(f"{type(sae).__name__} gives {type(latents).__name__}, which list no active latents. Attribute a TopK or Switch SAE.")
    weight = sae.decoder_weight()
    direction_D = direction_D.to(weight.dtype) / sae.target_scale
    fired_TK = (latents.values_TK > 0).to(weight.dtype)
    shares_TK = latents.values_TK * (weight @ direction_D)[latents.indices_TK]
    gate_TK = fired_TK
    if routing is not None:
        own_TK = latents.indices_TK - sae.num_shared
        slot_TKS = torch.div(own_TK, sae.latents_per_expert, rounding_mode="floor")[:, :, None] == routing.expert_TS[:, None, :]
        gate_TK = fired_TK * torch.where(own_TK < 0, 1.0, (slot_TKS * routing.gate_TS[:, None, :]).sum(dim=2))
    readers_TKD = gate_TK[:, :, None] * sae.reading_rows(latents.indices_TK) * sae.activation_scale
    offsets_TK = latents.values_TK - torch.einsum("tkd,td->tk", readers_TKD, rows.x_TD.to(weight.dtype))
    error_T = (rows.target_TD.to(weight.dtype) - output.recon_TD) @ (direction_D * sae.target_scale)
    bias = sae.b_out_D @ direction_D
    skip_T = (sae.base(latents) - sae.b_out_D).expand(len(rows), -1) @ direction_D
    return Attribution(latents, shares_TK, bias, skip_T, error_T, readers_TKD, offsets_TK)

"""Transcoders of switch_sae inside circuit-tracer, exactly: those of k latents, which its release 0.5.0 cannot read from files, and those of experts.

    from switch_sae.interop.circuit_tracer_plugin import transcoder_set
    model = ReplacementModel.from_pretrained_and_transcoders("gpt2", transcoder_set([load_sae("runs/layer_0"), ...]))

circuit-tracer is imported when `transcoder_set` is called, and not before.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_sae.interop.circuit_tracer import in_order
from switch_sae.models import SparseAutoencoder


class LargestOfReLU(nn.Module):
    """The k largest of ReLU, zeros elsewhere."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre_TM: Tensor) -> Tensor:
        values_TK, indices_TK = torch.relu(pre_TM).topk(self.k, dim=-1)
        return torch.zeros_like(pre_TM).scatter(-1, indices_TK, values_TK)


def transcoder_set(saes: Sequence[SparseAutoencoder], scan: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """circuit-tracer's `TranscoderSet` of transcoders of layers 0, 1, ... of one language model, in any order, dense or with experts.

    Its features are latents by their global indices, gates inside. In attribution gates are constants, as attention patterns are there. Copies hold
    the weights: the transcoders stay as they are. Raises ImportError without circuit-tracer, and ValueError for what is no set.
    """
    from circuit_tracer.transcoder import TranscoderSet

    for sae in saes:
        if not sae.is_transcoder:
            raise ValueError(f"a {type(sae).__name__} is no transcoder: it gives its input back. Train with sae=transcoder or sae=switch_transcoder.")
    about = in_order(saes)
    skips = any(getattr(sae, "skip", None) is not None for sae in about.saes)
    layers = {layer: _layer(sae, layer, skips, dtype) for layer, sae in enumerate(about.saes)}
    return TranscoderSet(layers, about.input_hook, about.output_hook, scan)


@torch.no_grad()
def _layer(sae: SparseAutoencoder, layer: int, skips: bool, dtype: torch.dtype) -> Any:
    ours: Any = copy.deepcopy(sae).to(dtype).eval()
    ours.fold_activation_scale()
    theirs = _class()(ours.d_in, ours.num_latents, LargestOfReLU(ours.k), layer, skips, device=ours.device, dtype=dtype)
    theirs.W_enc.copy_(ours.W_enc_MD)
    theirs.W_dec.copy_(ours.decoder_weight())
    theirs.b_enc.copy_(ours.b_enc - ours.W_enc_MD @ ours.b_in_D)
    theirs.b_dec.copy_(ours.b_out_D)
    if ours.skip is not None:
        theirs.W_skip.copy_(ours.skip.weight())
    theirs.routed = ours if ours.is_routed else None
    return theirs


@functools.cache
def _class() -> type[Any]:
    from circuit_tracer.transcoder import SingleLayerTranscoder

    class SwitchLayerTranscoder(SingleLayerTranscoder):
        """act(gate(x) * (W_enc x + b_enc)): the gate of a latent is that of its expert where x is routed to it, else 0; 1 without experts."""

        routed: Any
        """The transcoder whose router gives gates; None without one."""

        def gates(self, x: Tensor) -> Tensor:
            """[..., M], without gradient."""
            with torch.no_grad():
                routing, _ = self.routed.route(x.reshape(-1, self.d_model).to(self.dtype))
            gate_TE = x.new_zeros(len(routing.gate_TS), self.routed.num_experts, dtype=self.dtype)
            gate_TE.scatter_(1, routing.expert_TS, routing.gate_TS.to(self.dtype))
            return gate_TE.repeat_interleave(self.routed.latents_per_expert, dim=1).view(*x.shape[:-1], self.d_transcoder)

        def encode(self, input_acts: Tensor, apply_activation_function: bool = True) -> Tensor:
            pre = F.linear(input_acts.to(self.dtype), self.W_enc, self.b_enc)
            pre = pre if self.routed is None else pre * self.gates(input_acts)
            return self.activation_function(pre) if apply_activation_function else pre

        def encode_sparse(self, input_acts: Tensor, zero_positions: slice = slice(0, 1)) -> tuple[Tensor, Tensor]:
            acts = self.encode(input_acts)
            acts[zero_positions] = 0
            sparse = acts.to_sparse()
            position, latent = sparse.indices()
            encoders = self.W_enc[latent]
            return sparse, encoders if self.routed is None else encoders * self.gates(input_acts)[position, latent][:, None]

    return SwitchLayerTranscoder

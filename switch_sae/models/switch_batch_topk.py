"""`SwitchBatchTopKSAE`: one threshold for a whole batch and all its experts, so that easy tokens and easy experts use fewer latents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switch_kernels import Dispatch, Regime
from switch_kernels.backend import Dot
from switch_sae.models.base import SAEOutput
from switch_sae.models.batch_topk import CALIBRATION_BATCH, CALIBRATION_BATCHES, BatchTopKSAE
from switch_sae.models.expert_candidates import candidate_indices, gates_of
from switch_sae.models.inference import Inference, pursue_with_threshold, refit
from switch_sae.models.latents import Latents, SparseLatents
from switch_sae.models.pairs import above, decode_pairs, largest
from switch_sae.models.routers import Routing
from switch_sae.models.switch_shared import SwitchSharedSAE
from switch_sae.models.topk import TopKSAE
from switch_sae.models.transcoder import SkippedLatents
from switch_sae.rows import Rows

if TYPE_CHECKING:
    from switch_kernels.gpu.auxk import DeadLatents
    from switch_kernels.gpu.step import StepTensors


@dataclass(frozen=True, kw_only=True, repr=False)
class ThresholdOutput(SAEOutput):
    """Of a training step, with what the threshold is a mean of."""

    smallest: Tensor
    """The smallest score that was selected; NaN where nothing was."""


class SwitchBatchTopKSAE(SwitchSharedSAE, BatchTopKSAE):
    """Scores s = p_i ReLU(W_enc^i (x - b) + b_enc^i), or without p_i (`gate_in_selection=false`); in training, of the scores of T tokens the T * k
    largest remain, in whichever experts; in evaluation, those above `threshold`, a running mean of the smallest that training kept.

    BatchTopK (Bussmann et al., arXiv 2412.06410) jointly over experts. What is selected is multiplied by its gate, as in `SwitchSharedSAE`, whose
    shared latents and linear path it can have too. A token has as many slots as it has candidates; most of them are 0.
    """

    @dataclass
    class Config(SwitchSharedSAE.Config, BatchTopKSAE.Config):
        num_experts: int = 8
        """E; must divide num_latents - shared."""
        shared: int | None = 0
        """The first latents, which every token may use, without a gate. null is as many as one expert has."""
        k: int = 32
        """Active latents per token, on average."""

    config: "SwitchBatchTopKSAE.Config"
    label, marker = "Switch BatchTopK", "*"
    trains_by = (Inference.encoder,)
    has_kernels = True

    @torch.no_grad()
    def initialize(self, rows: Rows) -> None:
        super().initialize(rows)
        smallest = []
        for x_TD in self._read(rows.x_TD).split(CALIBRATION_BATCH)[:CALIBRATION_BATCHES]:
            routing, dispatch = self._route(self._scaled(x_TD))
            smallest.append(self._encoded(self._scaled(x_TD), dispatch, routing.gate_TS, keep=True)[1])
        self.threshold.copy_(torch.stack(smallest).nan_to_num(0.0).mean())

    def why_not_in_kernels(self) -> str | None:
        config = self.config
        if self.num_shared or self.path is not None:
            return "the Triton kernels of one threshold know no shared latents and no linear path"
        if self.experts_per_token > 1 or not config.gate_in_selection:
            return "the Triton kernels of one threshold know one expert per token, whose gate is in the selection"
        if (plan := self.plan(1)).regime is not Regime.dense:
            return f"the Triton kernels of one threshold hold latents dense, which large experts do not pay for: {plan.reason}"
        return None

    def training_step(self, rows: Rows, operands: Mapping[str, Tensor], dead: "DeadLatents | None", dot: Dot, seed: Tensor) -> "StepTensors":
        return self._rival_step(rows, operands, dead, dot, seed, self.threshold)

    def follow_step(self, computed: "StepTensors", step: Tensor) -> None:
        from switch_kernels.gpu.thresholds import follow_theta_

        assert computed.theta is not None
        follow_theta_(computed.theta, self.threshold, step, computed.gradients.square, self.config.threshold_beta)

    def encode(self, x_TD: Tensor) -> Latents:
        return self._found(self._scaled(x_TD))[0]

    def decode(self, latents: Latents) -> Tensor:
        self._check_path(latents)
        return TopKSAE.decode(self, latents)

    def forward(self, x_TD: Tensor) -> ThresholdOutput:
        latents, routing, smallest = self._found(self._scaled(x_TD))
        return ThresholdOutput(self._decode(latents, None), latents, routing, smallest=smallest)

    def _found(self, x_TD: Tensor) -> tuple[SparseLatents, Routing, Tensor]:
        """(latents by `inference`, routing, smallest score of the encoder's) of scaled activations."""
        routing, dispatch = self._route(x_TD)
        if self.inference is Inference.pursuit:
            return pursue_with_threshold(self, x_TD, dispatch, self.config.k, self.threshold), routing, self.threshold
        latents, smallest = self._encoded(x_TD, dispatch, routing.gate_TS, keep=self.training)
        if self.inference is Inference.encoder:
            return latents, routing, smallest
        refitted = refit(self, x_TD, latents, routing.expert_TS[:, 0] if self.refits_by_gram() else None)
        assert isinstance(refitted, SparseLatents)
        return refitted, routing, smallest

    def _encode_by(self, x_TD: Tensor, dispatch: Dispatch, gate_TS: Tensor | None) -> tuple[SparseLatents, Any]:
        return self._encoded(x_TD, dispatch, gate_TS, keep=False)[0], None

    def _encoded(self, x_TD: Tensor, dispatch: Dispatch, gate_TS: Tensor | None, keep: bool) -> tuple[SparseLatents, Tensor]:
        """(latents, smallest selected score or NaN) of scaled activations: the T * k largest scores of them all if `keep`, otherwise those above the
        threshold."""
        read_TD, path_TD = self._split(x_TD)
        gates_TC = gates_of(gate_TS, self.num_shared, self.latents_per_expert)

        def select(score_TC: Tensor) -> Tensor:
            return largest(score_TC, len(score_TC) * self.config.k, self.group) if keep else above(score_TC, self.threshold)

        chosen = self._choose(read_TD, dispatch, gates_TC, select)
        gated_P = self._gated(chosen, gates_TC)
        score_P = (gated_P if self.config.gate_in_selection else chosen.values_P).detach()
        smallest = score_P.min() if len(score_P) else score_P.new_tensor(torch.nan)
        values_TC = gated_P.new_zeros(len(x_TD), self.candidates).index_put((chosen.token_P, chosen.column_P), gated_P)
        indices_TC = candidate_indices(dispatch, self.num_shared, self.latents_per_expert)
        if path_TD is None:
            return SparseLatents(values_TC, indices_TC, self.num_latents), smallest
        return SkippedLatents(values_TC, indices_TC, self.num_latents, path_TD), smallest

    def _decode(self, latents: SparseLatents, by_latent: Any) -> Tensor:
        token_P, slot_P = (latents.values_TK > 0).nonzero(as_tuple=True)
        values_P, latent_P = latents.values_TK[token_P, slot_P], latents.indices_TK[token_P, slot_P]
        recon_TD = decode_pairs(values_P, latent_P, token_P, len(latents.values_TK), self.W_dec_MD)
        return (recon_TD + self.base(latents)) / self.target_scale

    @torch.no_grad()
    def _rival(self, theirs: SparseLatents) -> Tensor:
        return self._decode(theirs, None) * self.target_scale  # most of their columns hold nothing

    def _smallest_kept(self, output: SAEOutput) -> Tensor:
        assert isinstance(output, ThresholdOutput)
        return output.smallest

"""`BatchTopKSAE`: the k latents per token that a batch may use on average go to the tokens that need them (Bussmann et al., arXiv 2412.06410)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from switch_kernels import Dispatch
from switch_sae.models.base import Flops, SAEOutput
from switch_sae.models.inference import Inference, equal_blocks, pursue_with_threshold, pursuit_flops, refit, refit_flops
from switch_sae.models.latents import DenseLatents, Latents
from switch_sae.models.pairs import Pairs, decode_pairs, encode_pairs, largest
from switch_sae.models.topk import TopKSAE
from switch_sae.rows import Rows

CALIBRATION_BATCH, CALIBRATION_BATCHES = 1024, 8


@dataclass(frozen=True, kw_only=True, repr=False)
class PairsOutput(SAEOutput):
    """With the latents that the encoder chose as pairs."""

    pairs: Pairs


class BatchTopKSAE(TopKSAE):
    """In training, of the latents ReLU(W_enc (x - b_pre) + b_enc) of T tokens the T * k largest remain; in evaluation, those above `threshold`.

    The threshold is a running mean of the smallest latent that training kept, so that a token's latents do not depend on its batch. AuxK and
    everything else are `TopKSAE`'s. Tokens differ in L0: the latents are dense, K = M.
    """

    @dataclass
    class Config(TopKSAE.Config):
        k: int = 32
        """Active latents per token, on average."""
        threshold_beta: float = 0.999
        """Decay per step of the threshold's running mean; at first less, (1 + step) / (10 + step), so that the random start is soon forgotten."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.threshold_beta < 1:
                raise ValueError(f"threshold_beta={self.threshold_beta} must lie in [0, 1): at 1 the threshold would never move. Use 0.999.")

    config: "BatchTopKSAE.Config"
    colour, marker = "#4D4D4D", "*"
    trains_by: tuple[Inference, ...] = (Inference.encoder, Inference.refit)
    by_threshold = True
    step = 0

    def __init__(self, config: "BatchTopKSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.register_buffer("threshold", torch.tensor(0.0))

    @torch.no_grad()
    def initialize(self, rows: Rows) -> None:
        super().initialize(rows)
        batches = self._read(rows.x_TD).split(CALIBRATION_BATCH)[:CALIBRATION_BATCHES]
        smallest = [self._smallest(self._pairs(self._scaled(x_TD), keep=True)) for x_TD in batches]
        self.threshold.copy_(torch.stack(smallest).nan_to_num(0.0).mean())

    def begin_step(self, step: int, total_steps: int) -> None:
        self.step = step

    def end_step(self, rows: Rows, output: SAEOutput) -> None:
        smallest = torch.cat(self.group.gather(self._smallest_kept(output)[None])).nan_to_num(torch.inf).min()
        smallest = torch.where(smallest.isinf(), torch.nan, smallest)
        beta = min(self.config.threshold_beta, (1 + self.step) / (10 + self.step))
        self.threshold.copy_(torch.where(smallest.isnan(), self.threshold, torch.lerp(smallest, self.threshold, beta)))

    def encode(self, x_TD: Tensor) -> Latents:
        x_TD = self._scaled(x_TD)
        if self.inference is Inference.pursuit:
            return self._pursued(x_TD)
        return self._better(x_TD, self._pairs(x_TD, keep=self.training))[0].to_latents(len(x_TD), self.num_latents)

    def decode(self, latents: Latents) -> Tensor:
        dense_TM = self._dense(latents)
        return self._reconstruct(Pairs.from_dense(dense_TM), len(dense_TM))

    def forward(self, x_TD: Tensor) -> SAEOutput:
        x_TD = self._scaled(x_TD)
        if self.inference is Inference.pursuit:
            latents = self._pursued(x_TD)
            return SAEOutput(self._reconstruct(Pairs.from_dense(latents.values_TM), len(x_TD)), latents)
        proposed = self._pairs(x_TD, keep=self.training)
        pairs, match = self._better(x_TD, proposed)
        return self._output(proposed, pairs, match, len(x_TD))

    def flops(self) -> Flops:
        if self.inference is Inference.refit:
            better = refit_flops(self.d_in, self.config.k, from_gram=False, by_threshold=True)
            return replace(super().flops(), encode=2 * self.d_in * self.candidates + better)
        if self.inference is not Inference.pursuit:
            return super().flops()
        by_pursuit = pursuit_flops(self.d_in, self.candidates, self.config.k, equal_blocks(self.config.k), by_threshold=True)
        return replace(super().flops(), encode=by_pursuit)

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        self.threshold.div_(self.activation_scale)
        super().fold_activation_scale()

    def _pairs(self, x_TD: Tensor, keep: bool) -> Pairs:
        """The active latents of scaled activations: the T * k largest of them all if `keep`, otherwise those above the threshold."""

        def select(pre_TM: Tensor) -> Tensor:
            if keep:
                return largest(pre_TM, len(pre_TM) * self.config.k, self.group)
            return (pre_TM > self.threshold.clamp_min(0)).flatten().nonzero()[:, 0]

        return encode_pairs(x_TD, self.b_in_D, self.W_enc_MD, self.b_enc_M, select)

    def _output(self, proposed: Pairs, pairs: Pairs, match: Tensor | None, tokens: int) -> PairsOutput:
        latents = pairs.to_latents(tokens, self.num_latents)
        return PairsOutput(self._reconstruct(pairs, tokens), latents, match=match, pairs=proposed)

    def _pursued(self, x_TD: Tensor) -> DenseLatents:
        dispatch = Dispatch.to_one_expert(len(x_TD), x_TD.device)
        return DenseLatents(pursue_with_threshold(self, x_TD, dispatch, self.config.k, self.threshold).to_dense())

    def _better(self, x_TD: Tensor, proposed: Pairs) -> tuple[Pairs, Tensor | None]:
        """(pairs by `inference`, the encoder's loss against them) of scaled activations."""
        if self.inference is Inference.encoder:
            return proposed, None
        tokens = len(x_TD)
        refitted_TM = refit(self, x_TD, proposed.to_latents(tokens, self.num_latents), None).to_dense()
        values_P = refitted_TM[proposed.token_P, proposed.latent_P]
        kept_P = values_P > 0
        match = (proposed.values_P - values_P).square().sum() / tokens if self.training and torch.is_grad_enabled() else None
        return Pairs(values_P[kept_P], proposed.token_P[kept_P], proposed.latent_P[kept_P]), match

    def _reconstruct(self, pairs: Pairs, tokens: int) -> Tensor:
        recon_TD = decode_pairs(pairs.values_P, pairs.latent_P, pairs.token_P, tokens, self.W_dec_MD)
        return (recon_TD + self.b_out_D) / self.target_scale

    def _smallest_kept(self, output: SAEOutput) -> Tensor:
        """Of a training step; NaN where nothing fired."""
        assert isinstance(output, PairsOutput)
        return self._smallest(output.pairs)

    @staticmethod
    def _smallest(pairs: Pairs) -> Tensor:
        """NaN where nothing fired."""
        return pairs.values_P.detach().min() if len(pairs.values_P) else pairs.values_P.new_tensor(float("nan"))

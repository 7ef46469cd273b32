"""`SketchSAE`: a low-rank sketch of the encoder scores all latents, and only those that score best are encoded."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_kernels import LatentOrder
from switch_kernels.decode import row_products
from switch_sae.checks import all_at_least
from switch_sae.models.base import Flops, SAEOutput
from switch_sae.models.candidates import Sample, energy_shares, known_products, sampled, tell_offered
from switch_sae.models.entrances import outside_autocast
from switch_sae.models.inference import Inference, equal_blocks, match_loss, pursue_in_lists, pursuit_flops, refit, refit_flops
from switch_sae.models.latents import SparseLatents
from switch_sae.models.topk import TopKSAE
from switch_sae.rows import Rows, Shapes

_TOKENS = 1024
"""That are scored together."""


class SketchSAE(TopKSAE):
    """s = V U (x - b_pre) + c, of rank r; C = the latents with the `candidates` largest s; z = TopK(ReLU(W_enc[C] (x - b_pre) + b_enc[C]));
    recon = W_dec z + b_pre.

    The sketch costs r + M r / D products with a row and decides only which latents are encoded; what is on C has its own full row, and no score
    multiplies it. Predictors of that kind stand in the Spark Transformer (arXiv 2506.06644) and SVD-softmax (Shim et al., NeurIPS 2017). It is taught
    to rank, as screens of vocabularies are (arXiv 1810.12406): the cross-entropy between softmax(s) and each winner's share z_j^2 / sum z^2 of its
    token's energy, over the candidates of all tokens, and over all M latents, encoded exactly, of a sample of them. Both have one solution if shares
    follow softmax(s): the first is that law given C, the second finds what C lacks. Regression on pre-activations would spend the few dimensions on
    how negative losers are. No gradient reaches b_pre and W_enc from there. U starts as the activations' first principal directions and V as
    W_enc U^T, the best sketch in least squares of an encoder with random rows.
    """

    @dataclass
    class Config(TopKSAE.Config):
        rank: int = 4
        """r."""
        candidates: int = 124
        """Latents that are encoded for each token."""
        rank_loss: float = 1.0
        """Coefficient of both cross-entropies, in nats."""
        sample: float = 1 / 128
        """Share of a batch's tokens for which all M latents are encoded in training: it costs M * sample products with a row per token."""

        def __post_init__(self) -> None:
            super().__post_init__()
            all_at_least(self, rank=1, candidates=1, rank_loss=0, sample=0)
            if self.sample > 1:
                raise ValueError(f"sample={self.sample} is a share: at most 1.")
            if not self.k <= self.candidates <= self.num_latents:
                raise ValueError(f"candidates={self.candidates} must lie between k={self.k} and num_latents={self.num_latents}.")
            if self.rank_loss == 0 or self.sample == 0:
                raise ValueError(f"rank_loss={self.rank_loss} with sample={self.sample} leaves the sketch as it starts: both must be above 0.")

        @property
        def least_latents(self) -> int:
            return self.candidates

    config: "SketchSAE.Config"
    label, colour, marker = "Sketch", "#B15928", "p"
    trains_by = (Inference.encoder, Inference.refit)
    searches_lists = True
    tokens_since_offered_M: Tensor
    """Tokens of training since a latent was last a candidate of one; a buffer."""

    def __init__(self, config: "SketchSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        if config.rank > d_in:
            raise ValueError(f"rank={config.rank} is more than d_in={d_in}: a sketch has fewer dimensions than activations. Use rank <= {d_in}.")
        self.U_RD = nn.Parameter(F.normalize(torch.randn(config.rank, d_in, generator=generator), dim=1))
        with outside_autocast(self.U_RD.device):
            self.V_MR = nn.Parameter(self.W_enc_MD.detach() @ self.U_RD.detach().T)
        self.c_M = nn.Parameter(torch.zeros(config.num_latents))
        self.register_buffer("tokens_since_offered_M", torch.zeros(config.num_latents, dtype=torch.int64))

    @torch.no_grad()
    def initialize(self, rows: Rows) -> None:
        super().initialize(rows)
        centred_TD = (self._scaled(rows.x_TD) - self.b_in_D).double()
        directions_DD = torch.linalg.eigh(centred_TD.T @ centred_TD).eigenvectors.flip(1)
        self.U_RD.copy_(directions_DD[:, : self.config.rank].T)
        self.V_MR.copy_(self.W_enc_MD @ self.U_RD.T)

    @torch.no_grad()
    def offered_counts(self, x_TD: Tensor) -> Tensor:
        """[M]: of how many of these raw activations each latent is a candidate. One of none cannot win, however good it is."""
        chosen_TC = self._candidates(self._scaled(x_TD) - self.b_in_D)[0]
        return torch.bincount(chosen_TC.flatten(), minlength=self.num_latents)

    def forward(self, x_TD: Tensor) -> SAEOutput:
        x_TD = self._scaled(x_TD)
        latents, sketched, by_latent, match = self._infer(x_TD)
        return SketchOutput(self._decode(latents, by_latent), latents, match=match, sketched=sketched)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss_terms(rows, output, dead_M)
        assert isinstance(output, SketchOutput)
        if output.sketched is not None:
            terms["rank"] = self.config.rank_loss * self._rank_loss(self._scaled(rows.x_TD), output.sketched)
        return terms

    def end_step(self, rows: Rows, output: SAEOutput) -> None:
        assert isinstance(output, SketchOutput)
        if output.sketched is None:
            return
        offered_M = torch.zeros_like(self.tokens_since_offered_M, dtype=torch.bool).index_fill_(0, output.sketched.indices_TC.flatten(), True)
        tell_offered(self.tokens_since_offered_M, offered_M, len(rows), self.group)

    def flops(self) -> Flops:
        """In training the ranking of the candidates, and of all latents of the sample, come on top. Pursuit, which is for scoring, searches the
        candidates; the Gram matrix of all latents is computed once for given weights and not counted."""
        config, row, k, rank, M = self.config, 2 * self.d_in, self.config.k, self.config.rank, self.num_latents
        by_encoder = self.inference is not Inference.refit
        encode = rank * (row + 2 * M) + row * config.candidates + (0 if by_encoder else refit_flops(self.d_in, k, from_gram=False))
        if self.inference is Inference.pursuit:
            encode = rank * (row + 2 * M) + pursuit_flops(self.d_in, config.candidates, k, equal_blocks(k))
        ranking = 2 * rank * row + 2 * 2 * rank * config.candidates + round(config.sample * M * (row + 3 * 2 * rank))
        return Flops(router=0, encode=encode, decode=row * k, backward=(1 + by_encoder + config.train_decoder) * row * k + ranking)

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        self.U_RD.mul_(self.activation_scale)
        super().fold_activation_scale()

    def _infer(self, x_TD: Tensor) -> tuple[SparseLatents, Any, Any, Tensor | None]:
        learns, k = self.training and torch.is_grad_enabled(), self.config.k
        with torch.no_grad():
            centred_TD = x_TD - self.b_in_D
            chosen_TC, score_TC = self._candidates(centred_TD)
            if self.inference is Inference.pursuit:
                return pursue_in_lists(self, x_TD, chosen_TC, k, equal_blocks(k)), None, None, None
            pre_TC = row_products(centred_TD.contiguous(), chosen_TC, self.W_enc_MD)
            if self.b_enc_M is not None:
                pre_TC += self.b_enc_M[chosen_TC]
            pre_TK, place_TK = pre_TC.topk(k, dim=1, sorted=False)
            indices_TK = chosen_TC.gather(1, place_TK)
        order, values_TK = None, pre_TK.clamp(min=0)
        if torch.is_grad_enabled():
            order = LatentOrder.from_indices(indices_TK, self.num_latents)
            values_TK = known_products(pre_TK, x_TD, self.b_in_D, self.W_enc_MD, self.b_enc_M, indices_TK, order).relu()
        proposed = SparseLatents(values_TK, indices_TK, self.num_latents)
        sketched = None
        if learns:
            share_TC = torch.zeros_like(pre_TC).scatter_(1, place_TK, energy_shares(values_TK.detach()))
            count = math.ceil(self.config.sample * len(x_TD))
            sketched = Sketched(chosen_TC, score_TC, share_TC, sampled(centred_TD[:count], self.W_enc_MD, self.b_enc_M, k))
        if self.inference is Inference.encoder:
            return proposed, sketched, order, None
        found = refit(self, x_TD, proposed, None)
        assert isinstance(found, SparseLatents)
        return found, sketched, order, match_loss(proposed, found) if learns else None

    @torch.no_grad()
    def _candidates(self, centred_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(latents, scores), [T, C], of those with the largest scores."""
        h_TR = centred_TD @ self.U_RD.T
        found = [torch.addmm(self.c_M, h_tR, self.V_MR.T).topk(self.config.candidates, dim=1, sorted=False) for h_tR in h_TR.split(_TOKENS)]
        return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])

    def _rank_loss(self, x_TD: Tensor, sketched: "Sketched") -> Tensor:
        """mean_t of the cross-entropy over the candidates, and of that over all latents of the sample."""
        h_TR = (x_TD - self.b_in_D).detach() @ self.U_RD.T
        order = LatentOrder.from_indices(sketched.indices_TC, self.num_latents)
        score_TC = known_products(sketched.score_TC, h_TR, None, self.V_MR, self.c_M, sketched.indices_TC, order)
        among = -(sketched.share_TC * torch.log_softmax(score_TC, dim=1)).sum(dim=1).mean()
        sample = sketched.sample
        log_nM = torch.log_softmax(torch.addmm(self.c_M, h_TR[: len(sample.values_nK)], self.V_MR.T), dim=1)
        return among - (sample.shares() * log_nM.gather(1, sample.indices_nK)).sum(dim=1).mean()


@dataclass(frozen=True, repr=False)
class Sketched(Shapes):
    """The candidates of a training step, and what they should have scored."""

    indices_TC: Tensor
    score_TC: Tensor
    share_TC: Tensor
    """Each candidate's share of its token's energy."""
    sample: Sample = field(repr=False)


@dataclass(frozen=True, repr=False)
class SketchOutput(SAEOutput):
    """With what the sketch learns from; None outside training."""

    sketched: Sketched | None = field(default=None, kw_only=True)

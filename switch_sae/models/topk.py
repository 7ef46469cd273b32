"""`TopKSAE`: the dense baseline, which every token uses whole (Gao et al., arXiv 2406.04093)."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_kernels import Dispatch, encode_topk, sparse_decode
from switch_sae.checks import all_at_least, at_least
from switch_sae.models.base import Flops, SAEConfig, SAEOutput
from switch_sae.models.fused import FusedEncoder
from switch_sae.models.gram import REFRESH_TOKENS
from switch_sae.models.inference import Inference, equal_blocks, gram_flops, match_loss, pursue, pursuit_flops, refit, refit_flops
from switch_sae.models.latents import Latents, SparseLatents
from switch_sae.models.losses import geometric_median, normalized_auxk_loss, reconstruction_loss
from switch_sae.models.routers.base import Routing
from switch_sae.rows import Rows


class EncoderInit(Enum):
    """How W_enc starts; W_dec always starts as the same rows at unit norm."""

    unit = "unit"
    """W_enc = W_dec."""
    linear = "linear"
    """torch.nn.Linear's default, uniform in +-1/sqrt(D): the paper's start."""


class TopKSAE(FusedEncoder):
    """z = TopK(ReLU(W_enc (x - b_pre) + b_enc)), recon = W_dec z + b_pre, W_dec's rows on the unit sphere."""

    @dataclass
    class Config(SAEConfig):
        num_latents: int = 4096
        """M, in all."""
        k: int = 32
        """Active latents per token, at most."""
        encoder_bias: bool = True
        encoder_init: EncoderInit = EncoderInit.unit
        auxk: float = 1 / 32
        """Coefficient of AuxK, which revives dead latents: adds auxk * D * (variance of the residual that dead latents leave). 0 switches it off."""
        auxk_latents: int | None = None
        """Dead latents that reconstruct each token's residual; None is D / 2 (Gao et al.)."""
        train_decoder: bool = True
        """False leaves decoder rows at their random start while all else trains: the control that shows what a learned dictionary is worth
        (arXiv 2602.14111)."""

        def __post_init__(self) -> None:
            all_at_least(self, num_latents=1, k=1, auxk_latents=1)
            at_least("auxk", self.auxk, 0, "0 switches AuxK off; a usual coefficient is 0.03125.")
            if self.k > self.num_latents:
                raise ValueError(f"k={self.k} is more than num_latents={self.num_latents}. Use k <= {self.num_latents}.")

    colour, marker, is_reference = "#000000", "o", True
    has_kernels = True
    trains_by = tuple(Inference)
    num_experts = 1
    experts_per_token = 1
    joint_topk = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "route" in vars(cls) and "_route" not in vars(cls):
            raise TypeError(f"{cls.__qualname__} overrides route, which nothing computes with. Override _route, which takes scaled activations.")

    def __init__(self, config: "TopKSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        at_least("d_in", d_in, 1)
        self.config, self.d_in, self.num_latents = config, d_in, config.num_latents
        self.activations = {}
        init_MD = (torch.rand(config.num_latents, d_in, generator=generator) * 2 - 1) / d_in**0.5
        self.W_dec_MD = nn.Parameter(F.normalize(init_MD, dim=1), requires_grad=config.train_decoder)
        self.W_enc_MD = nn.Parameter(init_MD if config.encoder_init is EncoderInit.linear else self.W_dec_MD.detach().clone())
        self.b_enc_M = nn.Parameter(torch.zeros(config.num_latents)) if config.encoder_bias else None
        self.b_pre_D = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("activation_scale", torch.tensor(1.0))

    @property
    def k(self) -> int:
        return self.config.k

    def initialize(self, rows: Rows) -> None:
        self.b_pre_D.data.copy_(geometric_median(self._scaled(rows.x_TD)))

    def route(self, x_TD: Tensor) -> tuple[Routing | None, Dispatch]:
        """Which experts compute each raw activation, and with which gates: what `forward` gives as its `routing`. Raises ValueError as `encode`.

        Subclasses override `_route`, which `forward` calls.
        """
        return self._route(self._scaled(x_TD))

    def _route(self, x_TD: Tensor) -> tuple[Routing | None, Dispatch]:
        """Of scaled activations. A dense SAE is one expert that takes them all."""
        return None, Dispatch.to_one_expert(x_TD.shape[0], x_TD.device)

    def encode(self, x_TD: Tensor) -> Latents:
        return self._infer(self._scaled(x_TD))[0]

    def decode(self, latents: Latents) -> Tensor:
        latents = self._own(latents)
        if isinstance(latents, SparseLatents):
            return self._decode(replace(latents, values_TK=latents.values_TK.to(self.W_dec_MD.dtype)), None)
        return (self._dense(latents) @ self.W_dec_MD + self.b_out_D) / self.target_scale

    def forward(self, x_TD: Tensor) -> SAEOutput:
        latents, routing, by_latent, match = self._infer(self._scaled(x_TD))
        return SAEOutput(self._decode(latents, by_latent), latents, routing, match)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        residual_TD = (self._target(rows) - output.recon_TD) * self.target_scale
        terms = {"mse": reconstruction_loss(residual_TD)} | ({} if output.match is None else {"match": output.match})
        if self.config.auxk > 0 and dead_M is not None:
            auxk = self._auxk(self._scaled(rows.x_TD), residual_TD.detach(), output.routing, dead_M)
            terms["auxk"] = self.config.auxk * self.d_out * auxk
        return terms

    def flops(self) -> Flops:
        """Backward: gradients of values and W_dec (2DK each) and of W_enc (2DK), on selected rows only; those of values not where they were refitted.

        A decoder that stays has none. AuxK, which runs only on dead latents, is left out. Pursuit at inference needs no encoder; in training the
        encoder learns beside it.
        """
        k, per_row, latents = self.config.k, 2 * self.d_in, self.candidates
        out_row, trained = 2 * self.d_out, int(self.config.train_decoder)
        encode = per_row * latents
        if self.inference is Inference.encoder:
            return Flops(router=0, encode=encode, decode=out_row * k, backward=((1 + trained) * out_row + per_row) * k)
        backward, gram = (1 + trained) * per_row * k, gram_flops(self.d_in, *self.searched_grams(), REFRESH_TOKENS)
        if self.inference is Inference.refit:
            is_routed = self.refits_by_gram()
            better = refit_flops(self.d_in, k, is_routed)
            return Flops(router=0, encode=encode + better, decode=per_row * k, backward=backward + is_routed * gram)
        better = pursuit_flops(self.d_in, latents, k, equal_blocks(k))
        return Flops(router=0, encode=better, decode=per_row * k, backward=backward + encode + gram)

    @property
    def candidates(self) -> int:
        """Latents that one token may use."""
        return self.num_shared + self.experts_per_token * self.latents_per_expert

    def searched_grams(self) -> tuple[int, int]:
        """(how many Gram matrices refits and pursuit need, of how many latents each)."""
        return (1, self.num_latents) if self.searches_lists else (self.num_experts, self.candidates)

    def decoder_weight(self) -> nn.Parameter:
        return self.W_dec_MD

    @torch.no_grad()
    def _rival(self, theirs: SparseLatents) -> Tensor:
        """The scaled reconstruction from a rival expert's latents."""
        return sparse_decode(theirs.values_TK, theirs.indices_TK, self.W_dec_MD) + self.base(theirs)

    def encoder_weight(self) -> Tensor:
        """W_enc_MD as it multiplies activations, with its gradient."""
        return self.W_enc_MD

    def reading_rows(self, latent_TK: Tensor) -> Tensor:
        """[T, K, D]: what the pre-activations of some latents are the products of scaled activations with."""
        return self.encoder_weight()[latent_TK]

    def encoder_rows(self, latent_L: Tensor) -> Tensor:
        """Some rows of it, for AuxK: their gradients reach those rows of W_enc_MD and nothing else."""
        return self.W_enc_MD.index_select(0, latent_L)

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        # ReLU and top-k are positively homogeneous: with both biases divided by the scale, the latents are divided by it too.
        self.b_pre_D.div_(self.activation_scale)
        if self.b_enc_M is not None:
            self.b_enc_M.div_(self.activation_scale)
        self.activation_scale.fill_(1.0)

    def _infer(self, x_TD: Tensor) -> tuple[SparseLatents, Routing | None, Any, Tensor | None]:
        """(latents by `inference`, routing, what spares `_decode` a sort, the encoder's loss against them) of scaled activations."""
        learns = self.training and torch.is_grad_enabled()
        if self.inference is Inference.pursuit and not learns:
            routing, dispatch = self._route(x_TD)
            return self._pursue(x_TD, dispatch), routing, None, None
        proposed, routing, by_latent = self._encode(x_TD)
        if self.inference is Inference.encoder:
            return proposed, routing, by_latent, None
        if self.inference is Inference.refit:
            by_gram = routing is not None and self.refits_by_gram()
            latents = refit(self, x_TD, proposed, routing.expert_TS[:, 0] if by_gram and routing is not None else None)
            assert isinstance(latents, SparseLatents)
        else:
            latents, by_latent = self._pursue(x_TD, self._dispatch(routing, len(x_TD))), None
        return latents, routing, by_latent, match_loss(proposed, latents) if learns else None

    def _pursue(self, x_TD: Tensor, dispatch: Dispatch) -> SparseLatents:
        return pursue(self, x_TD, dispatch, self.config.k, equal_blocks(self.config.k))

    def refits_by_gram(self) -> bool:
        """Where each token has one expert: its Gram matrix is small. Of a whole dictionary the few rows themselves cost less."""
        return self.num_experts > 1 and self.experts_per_token == 1

    def _dispatch(self, routing: Routing | None, tokens: int) -> Dispatch:
        if routing is None:
            return Dispatch.to_one_expert(tokens, self.W_dec_MD.device)
        return Dispatch.from_experts(routing.expert_TS, self.num_experts)

    def _encode(self, x_TD: Tensor) -> tuple[SparseLatents, Routing | None, Any]:
        """The encoder's own (latents, routing, what spares `_decode` a sort) of scaled activations."""
        routing, dispatch = self._route(x_TD)
        latents, by_latent = self._encode_by(x_TD, dispatch, None if routing is None else routing.gate_TS)
        return latents, routing, by_latent

    def _encode_by(self, x_TD: Tensor, dispatch: Dispatch, gate_TS: Tensor | None) -> tuple[SparseLatents, Any]:
        """(latents, what spares `_decode` a sort) of scaled activations, by the experts that the dispatch names."""
        values_TK, indices_TK, by_latent = encode_topk(
            x_TD, self.b_in_D, gate_TS, self.encoder_weight(), self.b_enc_M, dispatch, self.config.k, self.joint_topk, self.execution
        )
        return SparseLatents(values_TK, indices_TK, self.num_latents), by_latent

    def _decode(self, latents: SparseLatents, by_latent: Any) -> Tensor:
        recon_TD = sparse_decode(latents.values_TK, latents.indices_TK, self.W_dec_MD, by_latent, self.execution)
        return (recon_TD + self.base(latents)) / self.target_scale

    def base(self, latents: SparseLatents) -> Tensor:
        """What the decoder adds to the latents' part, in units of scaled targets."""
        return self.b_out_D

    def _auxk(self, x_TD: Tensor, residual_TD: Tensor, routing: Routing | None, dead_M: Tensor) -> Tensor:
        """Reconstructs each token's residual from the dead latents of its own experts: cost grows with the number of dead latents, not with M.

        Gradients reach the dead rows of W_enc, b_enc and W_dec and nothing else: gate, centre and residual are held fixed.
        """
        return normalized_auxk_loss(residual_TD, self._from_dead(x_TD, routing, dead_M), self.group)

    def _from_dead(self, x_TD: Tensor, routing: Routing | None, dead_M: Tensor) -> Tensor:
        dispatch = self._dispatch(routing, len(x_TD))
        dead_own_M = dead_M[self.num_shared :]
        dead_latents = dead_own_M.nonzero()[:, 0] + self.num_shared
        dead_per_expert = dead_own_M.view(self.num_experts, -1).sum(dim=1).tolist()
        x_ND = dispatch.gather(x_TD - self.b_in_D.detach())
        W_enc = self.encoder_rows(dead_latents).split(dead_per_expert)
        W_dec = self.W_dec_MD.index_select(0, dead_latents).split(dead_per_expert)
        b_enc = None if self.b_enc_M is None else self.b_enc_M.index_select(0, dead_latents).split(dead_per_expert)
        gate_N = None if routing is None else dispatch.gather_pairs(routing.gate_TS.detach().flatten())
        auxk_latents = self.auxk_latents()
        recon = []
        for e, dead in enumerate(dead_per_expert):
            rows = slice(dispatch.offsets[e], dispatch.offsets[e + 1])
            if dead == 0:
                recon.append(x_ND.new_zeros(rows.stop - rows.start, self.d_out))
                continue
            made_ND = from_best(x_ND[rows], W_enc[e], None if b_enc is None else b_enc[e], W_dec[e], auxk_latents)
            recon.append(made_ND if gate_N is None else made_ND * gate_N[rows, None])
        recon_TSD = dispatch.scatter(torch.cat(recon)).view(x_TD.shape[0], self.experts_per_token, self.d_out)
        return recon_TSD.sum(dim=1)

    def auxk_latents(self) -> int:
        """Dead latents that each of a token's experts may use for AuxK."""
        return max(1, (self.config.auxk_latents or max(1, self.d_out // 2)) // self.experts_per_token)


def from_best(x_ND: Tensor, W_enc_BD: Tensor, b_enc_B: Tensor | None, W_dec_BD: Tensor, most: int) -> Tensor:
    """[N, D]: what the `most` largest of ReLU(W_enc x + b_enc) reconstruct."""
    pre_NB = F.linear(x_ND, W_enc_BD, b_enc_B)
    values, indices = pre_NB.topk(min(most, pre_NB.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(pre_NB).scatter(1, indices, values.relu()) @ W_dec_BD

"""`PursuitSAE`: one dictionary without an encoder, whose latents are found by matching pursuit with refits.

Mallat & Zhang (1993) and Pati et al. (1993) in the Gram domain (Rubinstein et al. 2008), trained end to end as dictionary learning is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_kernels import Backend, Dispatch, Execution, Precision, sparse_decode
from switch_sae.checks import all_at_least, at_least
from switch_sae.models.base import Flops, SAEConfig, SAEOutput, SparseAutoencoder
from switch_sae.models.gram import refresh_tokens
from switch_sae.models.inference import RIDGE, Inference, equal_blocks, gram_flops, pursue, pursuit_flops, why_not_searched_in_kernels
from switch_sae.models.latents import Latents, SparseLatents
from switch_sae.models.losses import coherence_loss, geometric_median, local_auxk_loss, reconstruction_loss
from switch_sae.models.pairs import decode_pairs
from switch_sae.models.routers.base import Routing
from switch_sae.rows import Rows

THRESHOLD_RATE = 0.1
"""Of the running mean of theta, per step, with which evaluation stops."""


class PursuitSAE(SparseAutoencoder):
    """z = pursuit(W_dec (x - b), W_dec W_dec^T): blocks of k / blocks latents of largest correlation, refitted after each; recon = W_dec^T z + b.

    Fixed k: every token takes k latents while any correlation is above 0. Stop rule (`stop`): a latent joins only while its correlation is above
    theta, which descends ||x - recon||^2 + theta^2 L0; after each batch theta *= exp(eta * (L0 / k - 1)), so that k is the mean. Loss: the squared
    error with z held fixed, which is its exact gradient.
    """

    @dataclass
    class Config(SAEConfig):
        num_latents: int = 4096
        """M, in all."""
        k: int = 32
        """Active latents per token: at most, or on average with `stop`."""
        blocks: int | None = None
        """After every k / blocks latents values are refitted and correlations renewed; must divide k. None is the most up to 4 that do."""
        stop: bool = False
        """Whether tokens take as many latents as they need, k on average, instead of k each."""
        max_latents: int | None = None
        """With `stop`: the most that one token may take, a multiple of k / blocks; None is 2 k."""
        eta: float = 0.05
        """With `stop`: how fast theta follows the mean L0."""
        auxk: float = 1 / 32
        """Coefficient of AuxK with tied codes, which revives dead latents; 0 switches it off."""
        ridge: float = RIDGE
        """Added to the diagonal of Gram matrices in refits."""
        gram_tokens: int | None = None
        """Gram matrices are computed anew after so many tokens of training; None is 8,192."""
        coherence: float = 0.0
        """Coefficient of a penalty on close pairs in a dictionary: coherence * D * mean_i sum_{j != i} ReLU(cos_ij - 0.3)^2."""

        def __post_init__(self) -> None:
            all_at_least(self, num_latents=1, k=1, blocks=1, eta=0, auxk=0, coherence=0, ridge=0, gram_tokens=1, max_latents=1)
            if self.blocks is not None and self.k % self.blocks:
                raise ValueError(f"k={self.k} latents cannot join in blocks={self.blocks} equal blocks. Use a number of blocks that divides k.")
            if self.max_latents is not None and (self.max_latents % self.step or self.max_latents < self.k):
                raise ValueError(
                    f"max_latents={self.max_latents} must be at least k={self.k} and a multiple of k / blocks = {self.step}. Use {2 * self.k}."
                )
            if self.most > self.candidates:
                raise ValueError(
                    f"num_latents={self.num_latents} gives a token {self.candidates} latents to choose from, of which it may take {self.most}. "
                    f"Use num_latents >= {self.least_latents}, or a smaller k."
                )
            if self.inference not in (None, Inference.pursuit):
                raise ValueError(f"inference={self.inference.name} needs an encoder, which this SAE has not. Use pursuit, or leave it out.")

        @property
        def step(self) -> int:
            """Latents per block."""
            return self.k // (self.blocks or equal_blocks(self.k))

        @property
        def most(self) -> int:
            """The most that one token may take."""
            return (self.max_latents or 2 * self.k) if self.stop else self.k

        @property
        def candidates(self) -> int:
            """Latents that one token may use."""
            return self.num_latents

        @property
        def least_latents(self) -> int:
            return self.most

    config: "PursuitSAE.Config"
    colour, marker = "#6A4C93", "P"
    own_inference, has_encoder = Inference.pursuit, False
    trains_by = (Inference.pursuit,)
    num_experts = 1
    theta: Tensor
    """With `stop`: theta of the next training step, of which `threshold` is a running mean; both 0 without."""

    def __init__(self, config: "PursuitSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        at_least("d_in", d_in, 1)
        self.config, self.d_in, self.num_latents = config, d_in, config.num_latents
        self.activations = {}
        self.W_dec_MD = nn.Parameter(F.normalize(torch.rand(config.num_latents, d_in, generator=generator) * 2 - 1, dim=1))
        self.b_pre_D = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("activation_scale", torch.tensor(1.0))
        self.register_buffer("theta", torch.tensor(float(self.by_threshold)))
        self.register_buffer("threshold", torch.tensor(float(self.by_threshold)))

    @property
    def k(self) -> int:
        return self.config.k

    @property
    def by_threshold(self) -> bool:
        return bool(self.config.stop)

    def initialize(self, rows: Rows) -> None:
        self.b_pre_D.data.copy_(geometric_median(self._scaled(rows.x_TD)))

    def encode(self, x_TD: Tensor) -> SparseLatents:
        return self._infer(self._scaled(x_TD))[0]

    def decode(self, latents: Latents) -> Tensor:
        latents = self._own(latents)
        if isinstance(latents, SparseLatents):
            return self._decode(latents.values_TK.to(self.W_dec_MD.dtype), latents.indices_TK)
        return (self._dense(latents) @ self.W_dec_MD + self.b_out_D) / self.target_scale

    def forward(self, x_TD: Tensor) -> SAEOutput:
        latents, routing = self._infer(self._scaled(x_TD))
        return SAEOutput(self._decode(latents.values_TK, latents.indices_TK), latents, routing)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        residual_TD = (self._target(rows) - output.recon_TD) * self.target_scale
        terms = {"mse": reconstruction_loss(residual_TD)}
        if self.config.auxk > 0 and dead_M is not None:
            terms["auxk"] = self.config.auxk * self.d_out * self._auxk(rows, residual_TD.detach(), output, dead_M)
        if self.config.coherence > 0:
            terms["coherence"] = self.config.coherence * self.d_out * coherence_loss(self.W_dec_MD, self.num_experts, self.num_shared)
        return terms

    def end_step(self, rows: Rows, output: SAEOutput) -> None:
        self._update_threshold(output)

    def _update_threshold(self, output: SAEOutput) -> None:
        if self.config.stop:
            (l0,) = self.group.mean([(output.latents.values > 0).sum().to(self.theta.dtype) / len(output.latents.values)])
            self.theta.mul_(torch.exp(self.config.eta * (l0 / self.config.k - 1)))
            self.threshold.lerp_(self.theta, THRESHOLD_RATE)

    def flops(self) -> Flops:
        """Encoding counts the pursuit's products; backward: the gradient of W_dec (2DK) on selected rows, and Gram matrices."""
        config, decode = self.config, 2 * self.d_in * self.config.k
        encode = pursuit_flops(self.d_in, config.candidates, config.k, config.k // config.step, config.stop)
        experts, latents = (1, self.num_latents) if self.searches_lists else (self.num_experts, config.candidates)
        gram = gram_flops(self.d_in, experts, latents, refresh_tokens(self.config))
        return Flops(router=0, encode=encode, decode=decode, backward=decode + gram)

    def decoder_weight(self) -> nn.Parameter:
        return self.W_dec_MD

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        # Pursuit is positively homogeneous: with b and theta divided by the scale, the latents are divided by it too.
        for value in (self.b_pre_D, self.theta, self.threshold):
            value.div_(self.activation_scale)
        self.activation_scale.fill_(1.0)

    def _dispatch(self, routing: Routing | None, tokens: int) -> Dispatch:
        return Dispatch.to_one_expert(tokens, self.W_dec_MD.device)

    def _infer(self, x_TD: Tensor) -> tuple[SparseLatents, Routing | None]:
        """Of scaled activations."""
        return self._find(x_TD, self._dispatch(None, len(x_TD))), None

    def _find(self, x_TD: Tensor, dispatch: Dispatch, gram_ECP: Tensor | None = None) -> SparseLatents:
        """The latents of scaled activations in the dictionaries that the dispatch names."""
        config = self.config
        return pursue(self, x_TD, dispatch, config.most, config.most // config.step, self._theta(), gram_ECP=gram_ECP)

    def _auxk(self, rows: Rows, residual_TD: Tensor, output: SAEOutput, dead_M: Tensor) -> Tensor:
        return local_auxk_loss(residual_TD, self.W_dec_MD, dead_M, self._dispatch(output.routing, len(rows)), self.num_shared, self.group)

    def _theta(self) -> Tensor:
        return self.theta if self.training else self.threshold

    def _decode(self, values_TK: Tensor, indices_TK: Tensor) -> Tensor:
        execution, learns = self.execution, self.training and torch.is_grad_enabled()
        if self.by_threshold and (learns or why_not_searched_in_kernels(self) is not None):  # about half of the slots are not in use
            token_P, slot_P = (values_TK != 0).nonzero(as_tuple=True)
            recon_TD = decode_pairs(values_TK[token_P, slot_P], indices_TK[token_P, slot_P], token_P, len(values_TK), self.W_dec_MD)
        else:
            if self.by_threshold and not execution.is_triton:  # whose kernel skips them, and the host need not know which they are
                execution = Execution(Backend.triton, Precision.float32, "as the search")
            recon_TD = sparse_decode(values_TK, indices_TK, self.W_dec_MD, None, execution)
        return (recon_TD + self.b_out_D) / self.target_scale

"""What SAEs share whose number of active latents training finds: every product is dense, and the loss, not a selection, makes latents sparse."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_sae.checks import at_least
from switch_sae.models.base import Flops, SAEConfig, SAEOutput, SparseAutoencoder
from switch_sae.models.inference import Inference, pursue_like, refit
from switch_sae.models.latents import DenseLatents, Latents
from switch_sae.models.losses import reconstruction_loss
from switch_sae.rows import Rows


@dataclass(frozen=True, kw_only=True, repr=False)
class DenseOutput(SAEOutput):
    """With what the sparsity losses need."""

    pre_TM: Tensor
    """What decides whether a latent fires, before any non-linearity."""


class DenseSAE(SparseAutoencoder):
    """recon = W_dec f + b_pre, with f from `_activate`. Parameters W_enc_MD, W_dec_MD, b_pre_D and whatever `_activate` needs."""

    @dataclass
    class Config(SAEConfig):
        num_latents: int = 4096
        """M, in all."""
        sparsity_warmup: float | None = None
        """The sparsity coefficient rises linearly from 0 over this share of the run; None is the publication's."""

        def __post_init__(self) -> None:
            at_least("num_latents", self.num_latents, 1)
            if self.sparsity_warmup is not None and not 0 <= self.sparsity_warmup <= 1:
                raise ValueError(
                    f"sparsity_warmup={self.sparsity_warmup} must lie between 0 (full from the start) and 1 (rising over the whole run)."
                )

    num_experts = 1
    published_warmup: float = 0.05
    """What `sparsity_warmup=None` stands for."""
    sparsity_scale: float = 1.0
    """What the sparsity coefficient is multiplied by now: 0 to 1 during its warm-up."""

    def __init__(self, config: Any, d_in: int, generator: torch.Generator | None = None, decoder_norm: float = 1.0) -> None:
        """Decoder rows start in random directions with norm `decoder_norm`, and the encoder as the same rows; biases start at 0."""
        super().__init__()
        at_least("d_in", d_in, 1)
        self.config, self.d_in, self.num_latents = config, d_in, config.num_latents
        self.activations = {}
        self.W_dec_MD = nn.Parameter(F.normalize(torch.randn(config.num_latents, d_in, generator=generator), dim=1) * decoder_norm)
        self.W_enc_MD = nn.Parameter(self.W_dec_MD.detach().clone())
        self.b_pre_D = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("activation_scale", torch.tensor(1.0))

    @abstractmethod
    def _activate(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(latents, what decides whether they fire), both [T, M], of scaled activations."""

    @abstractmethod
    def sparsity_terms(self, target_TD: Tensor, output: DenseOutput) -> dict[str, Tensor]:
        """The loss terms beside the reconstruction, of scaled targets; already weighted."""

    def begin_step(self, step: int, total_steps: int) -> None:
        share = self.config.sparsity_warmup
        warmup_steps = (self.published_warmup if share is None else share) * total_steps
        self.sparsity_scale = min(1.0, step / warmup_steps) if warmup_steps else 1.0

    def initialize(self, rows: Rows) -> None:
        """Nothing depends on data: biases start at 0."""

    def encode(self, x_TD: Tensor) -> Latents:
        x_TD = self._scaled(x_TD)
        return DenseLatents(self._better(x_TD, self._activate(x_TD)[0]))

    def decode(self, latents: Latents) -> Tensor:
        return self._decode(self._dense(latents))

    def forward(self, x_TD: Tensor) -> DenseOutput:
        x_TD = self._scaled(x_TD)
        proposed_TM, pre_TM = self._activate(x_TD)
        latents_TM = self._better(x_TD, proposed_TM)
        return DenseOutput(self._decode(latents_TM), DenseLatents(latents_TM), pre_TM=pre_TM)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        assert isinstance(output, DenseOutput)
        target_TD = self._target(rows)
        residual_TD = (target_TD - output.recon_TD) * self.target_scale
        return {"mse": reconstruction_loss(residual_TD), **self.sparsity_terms(target_TD * self.target_scale, output)}

    def flops(self) -> Flops:
        """Backward: dense products for the gradients of the latents, of W_dec and of W_enc."""
        product = 2 * self.d_in * self.num_latents
        return Flops(router=0, encode=product, decode=product, backward=3 * product)

    def decoder_weight(self) -> nn.Parameter:
        return self.W_dec_MD

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        for bias in (self.b_pre_D, *self._thresholds()):
            bias.div_(self.activation_scale)
        self.activation_scale.fill_(1.0)

    @abstractmethod
    def _thresholds(self) -> tuple[Tensor, ...]:
        """The biases, beside b_pre, in units of the activations."""

    def _better(self, x_TD: Tensor, proposed_TM: Tensor) -> Tensor:
        """Latents by `inference`, from those of the encoder."""
        if self.inference is Inference.encoder:
            return proposed_TM
        proposed = DenseLatents(proposed_TM)
        return (refit(self, x_TD, proposed, None) if self.inference is Inference.refit else pursue_like(self, x_TD, proposed)).to_dense()

    def _decode(self, latents_TM: Tensor) -> Tensor:
        return (latents_TM @ self.W_dec_MD + self.b_out_D) / self.target_scale

    def _decoder_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.W_dec_MD, dim=1)


class _EncoderLinear(torch.autograd.Function):
    """Both biases' gradients come from column sums; for b_pre autograd would make a gradient for every row first, at the cost of a dense product."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, b_pre_D: Tensor | None, W_MD: Tensor, b_M: Tensor) -> Tensor:
        centred_TD = x_TD if b_pre_D is None else x_TD - b_pre_D
        ctx.save_for_backward(centred_TD, W_MD)
        return torch.addmm(b_M, centred_TD, W_MD.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TM,) = grads
        centred_TD, W_MD = ctx.saved_tensors
        sums_M = column_sums(grad_TM)
        grad_x_TD = grad_TM @ W_MD if ctx.needs_input_grad[0] else None
        grad_b_pre_D = -(sums_M @ W_MD) if ctx.needs_input_grad[1] else None
        return grad_x_TD, grad_b_pre_D, grad_TM.T @ centred_TD, sums_M


def encoder_linear(x_TD: Tensor, b_pre_D: Tensor | None, W_MD: Tensor, b_M: Tensor) -> Tensor:
    """[T, M]: (x - b_pre) W^T + b, or x W^T + b with `b_pre_D` None; with gradients for all."""
    return _EncoderLinear.apply(x_TD, b_pre_D, W_MD, b_M)


def column_sums(values_TM: Tensor) -> Tensor:
    """[M] as a matrix-vector product, which on a CPU takes a tenth of the time of `sum(dim=0)`."""
    return values_TM.new_ones(values_TM.shape[0]) @ values_TM

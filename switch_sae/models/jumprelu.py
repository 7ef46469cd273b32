"""`JumpReLUSAE`: a learned threshold for every latent (Rajamanoharan et al., arXiv 2407.14435; Anthropic's variant of January 2025)."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from switch_sae.checks import all_at_least
from switch_sae.models.base import Recipe
from switch_sae.models.dense import DenseOutput, DenseSAE, column_sums, encoder_linear


class Sparsity(Enum):
    """Which recipe makes latents sparse."""

    l0 = "l0"
    """The number of active latents (arXiv 2407.14435): gradients to the thresholds alone, unit-norm decoder."""
    tanh = "tanh"
    """A saturating penalty (https://transformer-circuits.pub/2025/january-update): gradients to the encoder too, free decoder."""


class JumpReLUSAE(DenseSAE):
    """f = pre * [pre > theta] with pre = W_enc x + b_enc and theta = exp(log_threshold), recon = W_dec f + b_pre.

    With K the rectangle of width 1 and height 1, and epsilon the bandwidth, the straight-through gradients are
    df/dtheta = -(theta / epsilon) K((pre - theta) / epsilon) and d[pre > theta]/dtheta = -(1 / epsilon) K((pre - theta) / epsilon).
    `sparsity=l0`: reconstruction + l0 * D * mean_t sum_i [pre_i > theta_i].
    `sparsity=tanh`: reconstruction + tanh * D * mean_t sum_i tanh(tanh_steepness * f_i ||W_dec,i||) + pre_act * mean_t sum_i ReLU(theta_i - pre_i)
    ||W_dec,i||, where the estimator also gives pre the gradient that theta gets, negated. Both start from W_enc = W_dec on the unit sphere and zero
    biases, the former's start: the latter's sets b_enc so that a latent fires on 10,000 / M of the rows, which needs M well above 10,000.
    """

    @dataclass
    class Config(DenseSAE.Config):
        sparsity: Sparsity = Sparsity.l0
        l0: float = 1e-3
        """Coefficient with sparsity=l0. It is multiplied by D: the publication scales activations to mean squared norm 1, we to D."""
        tanh: float = 5e-3
        """Coefficient with sparsity=tanh, also multiplied by D; the default is SAELens' example, lambda_S = 5 at D = 1024."""
        tanh_steepness: float = 4.0
        pre_act: float = 3e-6
        """With sparsity=tanh: coefficient of the pull on latents that do not fire."""
        threshold: float | None = None
        """Where every theta starts; None is the publication's: 0.001 * sqrt(D) with sparsity=l0, 0.1 with tanh."""
        bandwidth: float | None = None
        """epsilon; None is the publication's: 0.001 * sqrt(D) with sparsity=l0, 2 with tanh."""

        def __post_init__(self) -> None:
            super().__post_init__()
            all_at_least(self, l0=0, tanh=0, pre_act=0)
            for name in ("threshold", "bandwidth", "tanh_steepness"):
                value = getattr(self, name)
                if value is not None and not (value > 0 and math.isfinite(value)):
                    raise ValueError(f"{name}={value} must be a positive number.")

    config: "JumpReLUSAE.Config"
    colour, marker = "#5C5C5C", "h"

    def __init__(self, config: "JumpReLUSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        counts = config.sparsity is Sparsity.l0
        self.recipe = Recipe(lr=7e-5, betas=(0.0, 0.999)) if counts else Recipe(lr=2e-4, unit_decoder=False)
        self.published_warmup = 0.05 if counts else 1.0
        published = (0.001 * d_in**0.5, 0.001 * d_in**0.5) if counts else (0.1, 2.0)
        threshold, self.bandwidth = (
            value if value is not None else default for value, default in zip((config.threshold, config.bandwidth), published, strict=True)
        )
        self.b_enc_M = nn.Parameter(torch.zeros(config.num_latents))
        self.log_threshold_M = nn.Parameter(torch.full((config.num_latents,), math.log(threshold)))

    def _activate(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        pre_TM = encoder_linear(x_TD, None, self.W_enc_MD, self.b_enc_M)
        return _JumpReLU.apply(pre_TM, self.log_threshold_M.exp(), self.bandwidth, self.config.sparsity is Sparsity.tanh), pre_TM

    def sparsity_terms(self, target_TD: Tensor, output: DenseOutput) -> dict[str, Tensor]:
        config, pre_TM, threshold_M = self.config, output.pre_TM, self.log_threshold_M.exp()
        if config.sparsity is Sparsity.l0:
            return {"l0": config.l0 * self.d_out * self.sparsity_scale * _MeanL0.apply(pre_TM, threshold_M, self.bandwidth)}
        norm_M = self._decoder_norms()
        saturated_TM = torch.tanh(output.latents.to_dense() * (config.tanh_steepness * norm_M))
        return {
            "tanh": config.tanh * self.d_out * self.sparsity_scale * saturated_TM.sum(dim=1).mean(),
            "pre_act": config.pre_act * torch.dot((threshold_M - pre_TM).relu().mean(dim=0), norm_M),
        }

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        self.log_threshold_M.sub_(self.activation_scale.log())
        super().fold_activation_scale()

    def _thresholds(self) -> tuple[Tensor, ...]:
        return (self.b_enc_M,)


def _near_threshold(pre_TM: Tensor, threshold_M: Tensor, bandwidth: float) -> Tensor:
    """K((pre - theta) / epsilon), as bool."""
    return (pre_TM - threshold_M).abs_() < bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    """pre * [pre > theta], and its straight-through gradients (arXiv 2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, pre_TM: Tensor, threshold_M: Tensor, bandwidth: float, through_pre: bool) -> Tensor:
        ctx.save_for_backward(pre_TM, threshold_M)
        ctx.bandwidth, ctx.through_pre = bandwidth, through_pre
        return torch.where(pre_TM > threshold_M, pre_TM, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TM,) = grads
        pre_TM, threshold_M = ctx.saved_tensors
        jump_TM = torch.where(_near_threshold(pre_TM, threshold_M, ctx.bandwidth), grad_TM, 0.0)
        steepness_M = threshold_M / ctx.bandwidth
        grad_pre_TM = torch.where(pre_TM > threshold_M, grad_TM, 0.0)
        if ctx.through_pre:
            grad_pre_TM.addcmul_(jump_TM, steepness_M)
        return grad_pre_TM, -steepness_M * column_sums(jump_TM), None, None


class _MeanL0(torch.autograd.Function):
    """mean_t sum_i [pre_i > theta_i]; its gradient reaches theta alone (arXiv 2407.14435, eq. 12)."""

    @staticmethod
    def forward(ctx: Any, pre_TM: Tensor, threshold_M: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_TM, threshold_M)
        ctx.bandwidth = bandwidth
        return torch.count_nonzero(pre_TM > threshold_M).to(pre_TM.dtype) / pre_TM.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        pre_TM, threshold_M = ctx.saved_tensors
        near_M = column_sums(_near_threshold(pre_TM, threshold_M, ctx.bandwidth).to(pre_TM.dtype))
        return None, near_M * (-grad / (ctx.bandwidth * pre_TM.shape[0])), None

"""What is left after the latents, coded down to a distortion; and the bits of a whole code at distortions that others have too.

Shapes: T tokens, D activation size, N documents, H water levels, P distortions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.rows import Shapes

LEVELS = 64
"""Water levels of a curve."""
LN2 = math.log(2)


@dataclass(frozen=True, repr=False)
class ResidualLaw(Shapes):
    """A Gaussian law of residuals: their mean and the variances along their principal axes, of the documents that were fitted."""

    mean_D: Tensor
    axes_DD: Tensor
    """Columns are axes."""
    variance_D: Tensor

    @classmethod
    def fit(cls, residual_TD: Tensor) -> "ResidualLaw":
        mean_D = residual_TD.mean(0)
        centred_TD = (residual_TD - mean_D).double()
        variance_D, axes_DD = torch.linalg.eigh(centred_TD.T @ centred_TD / len(residual_TD))
        return cls(mean_D, axes_DD.float(), variance_D.clamp(min=1e-12))

    @property
    def parameters(self) -> int:
        return len(self.mean_D) * (len(self.mean_D) + 5) // 2

    def energies(self, residual_TD: Tensor, document_T: Tensor, num_documents: int) -> Tensor:
        """[N, D] sums of squares along the axes, float64."""
        squares_TD = ((residual_TD - self.mean_D) @ self.axes_DD).square().double()
        return squares_TD.new_zeros(num_documents, squares_TD.shape[1]).index_add_(0, document_T, squares_TD)

    def curve(self, energy_ND: Tensor, tokens_N: Tensor, level_H: Tensor) -> tuple[Tensor, Tensor]:
        """(bits, squared error), both [N, H], of documents at water levels theta: reverse water-filling (Cover & Thomas 2006, section 10.3.3) by the
        fitted variances l_i, paid on what the documents have.

        Where l > theta the axis passes a Gaussian test channel, y = a x + noise of variance a theta with a = 1 - theta / l; its bits are
        E log2 p(y|x) / q(y) with the fitted q(y) = N(0, l - theta): 1/2 log2(l / theta) where x has the variance l, and more where it has more.
        """
        share_HD = level_H[:, None] / self.variance_D
        pass_HD = (1 - share_HD).clamp(min=0)
        fixed_H = (-0.5 * share_HD.clamp(max=1).log2() + (share_HD - 1).clamp(max=0) / (2 * LN2)).sum(1)
        bits_NH = tokens_N[:, None] * fixed_H + energy_ND @ (pass_HD / self.variance_D / (2 * LN2)).T
        noise_H = (pass_HD * level_H[:, None]).sum(1)
        return bits_NH, tokens_N[:, None] * noise_H + energy_ND @ (1 - pass_HD).square().T


@dataclass(frozen=True, repr=False)
class Curve(Shapes):
    """Bits and squared errors of documents along one step's water levels."""

    bits_NH: Tensor
    """Of values and residual."""
    error_NH: Tensor

    def at(self, distortion_P: Tensor, weights_RN: Tensor, tokens_N: Tensor, variance: float) -> Tensor:
        """[R, P] bits per token at most so much distortion, a share of `variance`, in documents that count as often as weights say.

        Between water levels by the line through the logarithms of distortions. Distortions that the values alone do not exceed take no residual.
        """
        tokens_R1 = (weights_RN @ tokens_N)[:, None]
        bits_RH = weights_RN @ self.bits_NH / tokens_R1
        share_RH = (weights_RN @ self.error_NH / tokens_R1 / variance).cummax(1).values
        place_RP = torch.searchsorted(share_RH.contiguous(), distortion_P.expand(len(share_RH), -1).contiguous())
        low_RP, high_RP = (place_RP - 1).clamp(0, share_RH.shape[1] - 1), place_RP.clamp(max=share_RH.shape[1] - 1)
        (x0, x1), (y0, y1) = ([of_RH.gather(1, where) for where in (low_RP, high_RP)] for of_RH in (share_RH.log(), bits_RH))
        part_RP = ((distortion_P.log() - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)
        bits_RP = y0 + part_RP * (y1 - y0)
        return bits_RP.masked_fill((place_RP == 0) & (share_RH[:, :1] > distortion_P), math.inf)


def water_levels(total_variance: float, size: int) -> Tensor:
    """[H] rising, from 2^-14 of the mean variance of an axis to all of the variance in one axis."""
    return total_variance / size * torch.logspace(-14, math.log2(size) + 0.01, LEVELS, 2.0, dtype=torch.float64)

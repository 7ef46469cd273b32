"""Linear regression, the control of every transcoder: what its skip path could do alone."""

from typing import Self

import torch
from torch import Tensor

from switch_sae.analysis.pca import PCABaseline
from switch_sae.metrics.base import check_finite
from switch_sae.models.base import Flops
from switch_sae.models.latents import SparseLatents
from switch_sae.rows import Rows

_NO_VARIANCE = 1e-10
"""Directions with less than this share of the largest variance are none: what a LayerNorm gives has one dimension less than it seems."""


class LinearBaseline(PCABaseline):
    """recon = mean_y + V V^T W (x - mean_x): least squares from inputs to targets, W, through the k directions V that matter most to it.

    Reduced-rank regression (Izenman 1975): the best linear map from k numbers per token; of full rank it is what a transcoder without latents can do.
    Scored like an SAE; as in PCA each direction is two latents, one per sign.
    """

    input_mean_D: Tensor
    encoder_KD: Tensor

    def __init__(self, input_mean_D: Tensor, mean_D: Tensor, encoder_KD: Tensor, components_KD: Tensor) -> None:
        super().__init__(mean_D, components_KD)
        self.register_buffer("input_mean_D", input_mean_D)
        self.register_buffer("encoder_KD", encoder_KD)
        self.d_in, self.d_out = len(input_mean_D), len(mean_D)

    @classmethod
    def regress(cls, rows: Rows, rank: int) -> Self:
        """From *training* rows. Raises ValueError for a rank out of [1, size of the smaller hook], and for rows that are not finite."""
        x_TD, y_TD = rows.x_TD, rows.target_TD
        most = min(x_TD.shape[1], y_TD.shape[1])
        if not 1 <= rank <= most:
            raise ValueError(f"rank={rank} of a map from {x_TD.shape[1]} to {y_TD.shape[1]} numbers: it must lie between 1 and {most}.")
        check_finite("activations", x_TD)
        check_finite("targets", y_TD)
        mean_x, mean_y = (torch.stack([part.double().sum(0) for part in each.split(2048)]).sum(0) / len(rows) for each in (x_TD, y_TD))
        xx, xy = (torch.zeros(x_TD.shape[1], size, dtype=torch.float64, device=x_TD.device) for size in (x_TD.shape[1], y_TD.shape[1]))
        for x, y in zip(x_TD.split(2048), y_TD.split(2048), strict=True):
            centred = x.double() - mean_x
            xx.addmm_(centred.T, centred)
            xy.addmm_(centred.T, y.double() - mean_y)
        W = torch.linalg.pinv(xx, rtol=_NO_VARIANCE, hermitian=True) @ xy
        V_DK = torch.linalg.eigh(W.T @ xx @ W).eigenvectors[:, -rank:].flip(1)
        made = mean_x, mean_y, (W @ V_DK).T, V_DK.T
        return cls(*(each.to(x_TD.dtype).contiguous() for each in made))

    def encode(self, x_TD: Tensor) -> SparseLatents:
        projection_TK = (x_TD - self.input_mean_D) @ self.encoder_KD.T
        indices_TK = torch.arange(self.k, device=x_TD.device) + self.k * (projection_TK < 0)
        return SparseLatents(projection_TK.abs(), indices_TK, self.num_latents)

    def flops(self) -> Flops:
        """Two products of rank k, or one of full rank, which a skip path is; nothing is trained by gradients."""
        if self.k == min(self.d_in, self.d_out):
            return Flops(router=0, encode=0, decode=2 * self.d_in * self.d_out, backward=0)
        return Flops(router=0, encode=2 * self.d_in * self.k, decode=2 * self.d_out * self.k, backward=0)

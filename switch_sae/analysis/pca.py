"""PCA, the control of every evaluation: what k directions leave unexplained that are the same for all tokens."""

from typing import Self

import torch
from torch import Tensor, nn

from switch_sae.metrics.base import check_finite
from switch_sae.models.base import Flops, SAEOutput
from switch_sae.models.latents import SparseLatents


class PCABaseline(nn.Module):
    """recon = mean + V_k^T V_k (x - mean): the best linear reconstruction from k numbers per token (Eckart & Young 1936).

    `evaluate` scores it like an SAE. A sparse autoencoder with k latents that does no better has gained nothing from choosing them per token. Each
    component is two latents, one per sign, so values are >= 0 as in `SparseLatents`, M = 2k, and L0 is k.
    """

    num_experts = 1
    mean_D: Tensor
    components_KD: Tensor

    def __init__(self, mean_D: Tensor, components_KD: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_D", mean_D)
        self.register_buffer("components_KD", components_KD)
        self.d_in, self.k = mean_D.shape[0], components_KD.shape[0]
        self.num_latents = 2 * self.k

    @classmethod
    def fit(cls, x_TD: Tensor, k: int) -> Self:
        """The mean and the k leading principal components of *training* rows. Raises ValueError for k out of [1, D] or fewer than k + 1 rows."""
        if not 1 <= k <= x_TD.shape[1]:
            raise ValueError(f"k={k} components of {x_TD.shape[1]}-dimensional activations: k must lie between 1 and {x_TD.shape[1]}.")
        if x_TD.shape[0] <= k:
            raise ValueError(f"{x_TD.shape[0]} rows cannot fix {k} principal components. Give more than {k} rows, best at least 10 per dimension.")
        mean_D, covariance_DD = mean_and_covariance(x_TD)
        components_DK = torch.linalg.eigh(covariance_DD).eigenvectors[:, -k:].flip(1)
        return cls(mean_D.to(x_TD.dtype), components_DK.T.to(x_TD.dtype).contiguous())

    def encode(self, x_TD: Tensor) -> SparseLatents:
        """Component i of positive sign is latent i, of negative sign latent k + i."""
        projection_TK = (x_TD - self.mean_D) @ self.components_KD.T
        indices_TK = torch.arange(self.k, device=x_TD.device) + self.k * (projection_TK < 0)
        return SparseLatents(projection_TK.abs(), indices_TK, self.num_latents)

    def decode(self, latents: SparseLatents) -> Tensor:
        """recon_TD."""
        negative_TK = latents.indices_TK >= self.k
        return torch.where(negative_TK, -latents.values_TK, latents.values_TK) @ self.components_KD + self.mean_D

    def forward(self, x_TD: Tensor) -> SAEOutput:
        latents = self.encode(x_TD)
        return SAEOutput(self.decode(latents), latents)

    def flops(self) -> Flops:
        """Two matrix-vector products with V_k; nothing is trained by gradients."""
        return Flops(router=0, encode=2 * self.d_in * self.k, decode=2 * self.d_in * self.k, backward=0)


def mean_and_covariance(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(mean_D, C_DD) in float64, C = sum_t (x_t - mean)(x_t - mean)^T / T. Raises ValueError for rows that are not finite."""
    check_finite("activations", x_TD)
    mean_D = torch.stack([rows.double().sum(0) for rows in x_TD.split(2048)]).sum(0) / len(x_TD)
    covariance_DD = torch.zeros(x_TD.shape[1], x_TD.shape[1], dtype=torch.float64, device=x_TD.device)
    for rows in x_TD.split(2048):
        centred_TD = rows.double() - mean_D
        covariance_DD.addmm_(centred_TD.T, centred_TD)
    return mean_D, covariance_DD / len(x_TD)


def participation_ratio(x_TD: Tensor) -> float:
    """(tr C)^2 / tr C^2 of the centred covariance: the effective number of dimensions, between 1 and D (Gao et al. 2017, bioRxiv 214262).

    Raises ValueError when all rows are equal.
    """
    covariance_DD = mean_and_covariance(x_TD)[1]
    trace = covariance_DD.trace()
    if trace == 0:
        raise ValueError(f"all {len(x_TD)} rows are equal, so their covariance is 0 and has no participation ratio. Give more varied rows.")
    return float(trace.square() / covariance_DD.square().sum())

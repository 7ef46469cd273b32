"""Parts of activation space: what lies in them, and what can be read from them linearly.

Shapes: T rows, D activation size, R rank of a subspace, C things to be read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.analysis.pca import mean_and_covariance

_TOLERANCE = 1e-6
"""Singular values below this share of the largest one are rounding."""
RIDGE = 1e-3
"""Added to the diagonal of the covariance, in units of its mean."""


def span(rows_ED: Tensor) -> Tensor:
    """[D, R] float64: an orthonormal basis of what rows span; E centred rows span E - 1 dimensions at most. R is 0 where all rows are 0."""
    _, size_R, basis_RD = torch.linalg.svd(rows_ED.double(), full_matrices=False)
    return basis_RD[size_R > _TOLERANCE * size_R[:1].clamp_min(1e-300)].T


def random_span(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """[D, R] float64: an orthonormal basis of a uniformly random subspace."""
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]


def complement(basis_DR: Tensor) -> Tensor:
    """[D, D - R]: an orthonormal basis of everything orthogonal to a basis."""
    full_DD = torch.linalg.qr(torch.cat([basis_DR, torch.eye(len(basis_DR), dtype=basis_DR.dtype)], dim=1))[0]
    return full_DD[:, basis_DR.shape[1] :]


def energy_share(x_TD: Tensor, basis_DR: Tensor) -> tuple[Tensor, Tensor]:
    """(squared norm in the subspace, squared norm), [T] each, float64."""
    return torch.cat([(rows.double() @ basis_DR).square().sum(1) for rows in x_TD.split(4096)]), x_TD.double().square().sum(1)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the rows that readers are fitted on, and covariances with what they shall read: enough for every subspace."""

    mean_D: Tensor
    covariance_DD: Tensor
    mean_C: Tensor
    variance_C: Tensor
    cross_DC: Tensor

    def reader(self, basis_DR: Tensor) -> tuple[Tensor, Tensor]:
        """(weight_DC, bias_C): ridge regression of C targets on an activation's coordinates in the subspace, written for the whole activation."""
        small_RR = basis_DR.T @ self.covariance_DD @ basis_DR
        ridge = RIDGE * small_RR.diagonal().mean().clamp_min(1e-300) * torch.eye(len(small_RR), dtype=small_RR.dtype)
        weight_DC = basis_DR @ torch.linalg.solve(small_RR + ridge, basis_DR.T @ self.cross_DC)
        return weight_DC, self.mean_C - self.mean_D @ weight_DC


def moments(x_TD: Tensor, wanted_TC: Tensor) -> Moments:
    """Of rows and what shall be read from them, float64."""
    mean_D, covariance_DD = mean_and_covariance(x_TD)
    mean_C, cross_DC = wanted_TC.double().mean(0), torch.zeros(x_TD.shape[1], wanted_TC.shape[1], dtype=torch.float64)
    for x_tD, wanted_tC in zip(x_TD.split(4096), wanted_TC.split(4096), strict=True):
        cross_DC.addmm_((x_tD.double() - mean_D).T, wanted_tC.double() - mean_C)
    variance_C = (wanted_TC.double() - mean_C).square().mean(0)
    return Moments(mean_D, covariance_DD, mean_C, variance_C, cross_DC / len(x_TD))


def read(x_TD: Tensor, reader: tuple[Tensor, Tensor]) -> Tensor:
    """[T, C] what a reader reads, float64."""
    weight_DC, bias_C = reader
    return torch.cat([rows.double() @ weight_DC + bias_C for rows in x_TD.split(4096)])


def squared_errors(read_TC: Tensor, wanted_TC: Tensor, variance_C: Tensor) -> tuple[Tensor, Tensor]:
    """([T] squared error, [T] squared distance from the mean), each target in units of a variance of its own, so that 1 - sum / sum is a mean R^2.

    The variances are those of the rows that readers were fitted on: a target that hardly varies on these rows must not outweigh all others.
    """
    wanted_TC, weight_C = wanted_TC.double(), torch.where(variance_C > 0, 1 / variance_C.double().clamp_min(1e-300), 0.0)
    return ((read_TC - wanted_TC).square() * weight_C).sum(1), ((wanted_TC - wanted_TC.mean(0)).square() * weight_C).sum(1)


def one_hot(label_T: Tensor, labels: Sequence[int] | Tensor) -> Tensor:
    """[T, len(labels)] float32: 1 where a row has the label."""
    return (label_T[:, None] == torch.as_tensor(labels)[None, :]).float()

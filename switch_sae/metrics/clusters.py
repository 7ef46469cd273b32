"""Spherical k-means, the same on every call."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """Directions, of unit norm; a row belongs to the one with the largest cosine."""

    centre_CD: Tensor

    def nearest(self, x_TD: Tensor) -> Tensor:
        """[T] int64, ties to the lowest."""
        return torch.cat([(rows @ self.centre_CD.T).argmax(dim=1) for rows in x_TD.split(8192)])


def spherical_kmeans(x_TD: Tensor, clusters: int, rounds: int = 25, seed: int = 0) -> Clusters:
    """Dhillon & Modha 2001: rows to the nearest direction, each direction to the mean of its rows' unit vectors; from random rows. As many clusters
    as rows where those are fewer; a cluster that loses all rows stays where it is."""
    unit_TD = F.normalize(x_TD, dim=1)
    found = Clusters(unit_TD[torch.randperm(len(unit_TD), generator=torch.Generator().manual_seed(seed))[:clusters]])
    before_T: Tensor | None = None
    for _ in range(rounds):
        of_T = found.nearest(unit_TD)
        if before_T is not None and torch.equal(of_T, before_T):
            break
        member_CT = F.one_hot(of_T, len(found.centre_CD)).to(unit_TD.dtype).T
        sum_CD = member_CT @ unit_TD
        is_empty_C = member_CT.sum(1) == 0
        found, before_T = Clusters(F.normalize(torch.where(is_empty_C[:, None], found.centre_CD, sum_CD), dim=1)), of_T
    return found

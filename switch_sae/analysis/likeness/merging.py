"""Codes in which duplicated latents are one: by clusters of decoder rows, or softly by how alike they are.

Shapes: M latents, D activation size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.features.neighbours import BLOCK_ELEMENTS

MOST_MIXED = 12_288
"""Latents that a mixing matrix is made for: 600 MB in float32."""


def duplicate_clusters(decoder_MD: Tensor, alive_M: Tensor, threshold: float) -> Tensor:
    """[M] int64, numbered from 0: latents that a chain of cosines >= `threshold` joins are one cluster; those that are not alive join none."""
    unit_MD = F.normalize(decoder_MD.detach().float(), dim=1)
    live = alive_M.nonzero()[:, 0]
    firsts, seconds = [], []
    for rows in live.split(max(1, BLOCK_ELEMENTS // max(1, len(live)))):
        first, second = (unit_MD[rows] @ unit_MD[live].T >= threshold).nonzero(as_tuple=True)
        firsts.append(rows[first])
        seconds.append(live[second])
    first_L, second_L = (torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64) for parts in (firsts, seconds))
    cluster_M = torch.arange(len(decoder_MD))
    while True:  # every latent takes the smallest number among its neighbours, until none changes
        lower_M = cluster_M.scatter_reduce(0, first_L, cluster_M[second_L], "amin")
        lower_M = lower_M[lower_M]
        if torch.equal(lower_M, cluster_M):
            return cluster_M.unique(return_inverse=True)[1]
        cluster_M = lower_M


def likeness(decoder_MD: Tensor, gamma: float) -> Tensor | None:
    """[M, M] float32: S_ij = max(cos(d_i, d_j), 0)^gamma, so that k = z' S z joins latents as far as their directions are one; None for more than
    `MOST_MIXED` latents. gamma of infinity is the code itself; cosines with their signs and gamma = 1 would be the reconstruction."""
    if len(decoder_MD) > MOST_MIXED:
        return None
    unit_MD = F.normalize(decoder_MD.detach().float(), dim=1)
    return (unit_MD @ unit_MD.T).clamp_(0, 1).pow_(gamma).fill_diagonal_(1)

"""Fitting laws of supports with several classes per group: where to start, how strongly to draw classes together, and which restart to keep."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.codes.supports import PRIORS, SupportLaw, Supports, fit_law

SEEDS = (0, 1)
"""Restarts."""


def fit_classes(
    supports: Supports, x_TD: Tensor, document_T: Tensor, per_group: int, looks_back: bool = False, more_starts: Sequence[Tensor] = ()
) -> tuple[SupportLaw, SupportLaw | None]:
    """The law of `per_group` classes in each group, and the one that looks back to the token before (None unless asked for).

    The prior is the one of `PRIORS` with which every second document is coded best by what the others taught. Then the best of several starts for all
    of these tokens: k-means of their activations with the seeds of `SEEDS`, and [T] classes of `more_starts`.
    """
    starts = [kmeans_classes(x_TD, supports.group_T, per_group, seed) for seed in SEEDS] + list(more_starts)
    one_hot = [F.one_hot(class_T, per_group * supports.num_groups) for class_T in starts]
    number_T = document_T.unique(return_inverse=True)[1]
    taught_T, tried_T = ((number_T % 2 == part).nonzero()[:, 0] for part in (0, 1))
    prior = PRIORS[-1]
    if len(tried_T):
        part, other = supports[taught_T], supports[tried_T]
        lengths = {
            prior: float(sum(law.sum() for law in fit_law(part, one_hot[0][taught_T], per_group, prior=prior, rounds=10).bits(other)))
            for prior in PRIORS
        }
        prior = min(lengths, key=lambda one: lengths[one])
    laws = [fit_law(supports, start_TC, per_group, prior=prior) for start_TC in one_hot]
    best = min(laws, key=lambda law: float(sum(bits_T.sum() for bits_T in law.bits(supports))))
    if not looks_back:
        return best, None
    return best, fit_law(supports, best.posterior(supports)[0], per_group, looks_back=True, rounds=10, prior=prior)


def kmeans_classes(x_TD: Tensor, group_T: Tensor, per_group: int, seed: int, rounds: int = 15) -> Tensor:
    """[T] int64 classes, numbered on from group to group: k-means of directions around the mean, in each group by itself."""
    generator = torch.Generator().manual_seed(seed)
    class_T = group_T * per_group
    for group in group_T.unique().tolist():
        row_N = (group_T == group).nonzero()[:, 0]
        x_ND = F.normalize(x_TD[row_N] - x_TD[row_N].mean(0), dim=1)
        centre_CD = x_ND[torch.randperm(len(row_N), generator=generator)[:per_group]]
        for _ in range(rounds):
            near_N = (x_ND @ centre_CD.T).argmax(1)
            centre_CD = F.normalize(centre_CD.clone().mul_(1e-3).index_add_(0, near_N, x_ND), dim=1)
        class_T[row_N] += near_N
    return class_T

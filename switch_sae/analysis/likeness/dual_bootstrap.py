"""Intervals of similarities between SAEs that were trained with several seeds: over seeds and documents at once.

Shapes: R resamples, A and B seeds of two kinds of SAE, N documents.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.metrics.bootstrap import expanded_tail, t_quantile


def dual_variance(both: float, seeds: float, documents: float, num_seeds: int, num_documents: float) -> float:
    """The variance over two factors from three bootstraps, in which both, seeds alone and documents alone are resampled (Schütt et al. 2023, eLife
    82566): s v_s + d v_d - s d (v_both - v_s - v_d) with s = n_s / (n_s - 1) and d alike, not below the larger single one nor above v_both.

    Adding both bootstraps would count what is left when neither varies twice, and resampling both counts it three times.
    """
    s, d = num_seeds / (num_seeds - 1), num_documents / (num_documents - 1)
    variance = s * seeds + d * documents - s * d * (both - seeds - documents)
    return min(max(variance, s * seeds, d * documents), both)


def seed_mean(similarity_AB: Tensor, weight_A: Tensor, weight_B: Tensor, same: bool) -> Tensor:
    """[...]: the weighted mean over pairs of seeds; with `same`, A and B are one kind and pairs of a seed with itself do not count. NaN for none."""
    weight_AB = weight_A[..., :, None] * weight_B[..., None, :]
    if same:
        weight_AB = weight_AB * (1 - torch.eye(weight_AB.shape[-1], dtype=weight_AB.dtype))
    total = weight_AB.sum((-2, -1))
    return (similarity_AB * weight_AB).sum((-2, -1)) / torch.where(total > 0, total, torch.nan)


def drawn_weights(size: int, replicates: int, seed: int) -> Tensor:
    """[R, size] float64: how often each is drawn among `size` draws with replacement."""
    drawn = torch.randint(size, (replicates, size), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(replicates, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(replicates, size, dtype=torch.float64))


@dataclass(frozen=True)
class Spread:
    """An interval, and what it is over."""

    interval: tuple[float, float] | None
    note: str = ""


def spread(
    value: float, similarity_AB: Tensor, resampled_RAB: Tensor, same: bool, num_documents: float, coverage: float = 0.95, seed: int = 1
) -> Spread:
    """The interval of the mean over pairs of seeds around `value`, from similarities of all rows and those of R resamples of documents.

    value ± t sqrt(`dual_variance`), t's degrees of freedom being Satterthwaite's of the two single variances. Over documents alone (expanded
    percentiles), with a note, where no side has enough seeds: two, or three of one kind among themselves (two have one pair). None where some
    resample has no value.
    """
    ones_A, ones_B = (torch.ones(size, dtype=torch.float64) for size in similarity_AB.shape)
    documents_R = seed_mean(resampled_RAB, ones_A, ones_B, same)
    if not bool(documents_R.isfinite().all()) or num_documents < 2 or len(documents_R) < 2:
        return Spread(None, "no interval: too few documents, or a resample without a value")
    middle = float(seed_mean(similarity_AB, ones_A, ones_B, same))
    seeds = [size for size in similarity_AB.shape if size > (2 if same else 1)]
    if not seeds:
        tail = expanded_tail(coverage, num_documents)
        low, high = documents_R.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return Spread((value + low - middle, value + high - middle), f"interval over documents alone: {'two seeds' if same else 'one seed each'}")
    weight_RA, weight_RB = (drawn_weights(size, len(documents_R), seed + side) for side, size in enumerate(similarity_AB.shape))
    if same:
        weight_RB = weight_RA
    seeds_R, both_R = (seed_mean(matrix, weight_RA, weight_RB, same) for matrix in (similarity_AB, resampled_RAB))
    v_both, v_seeds, v_documents = (float(x[x.isfinite()].var()) for x in (both_R, seeds_R, documents_R))
    variance = dual_variance(v_both, v_seeds, v_documents, min(seeds), num_documents)
    parts = ((v_seeds, min(seeds)), (v_documents, num_documents))
    uncertain = sum(v * v / (n - 1) for v, n in parts)
    freedom = (v_seeds + v_documents) ** 2 / uncertain if uncertain > 0 else math.inf
    reach = (t_quantile(coverage, min(freedom, 1e4))) * math.sqrt(variance)
    return Spread((value - reach, value + reach))

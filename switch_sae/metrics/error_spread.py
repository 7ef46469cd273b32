"""How unevenly the error is spread over tokens."""

from itertools import pairwise

import torch
from torch import Tensor

from switch_sae.metrics.base import DocumentMetric, MetricBatch

EDGES = (10, 50, 200, 1000)
"""Occurrences at which one class of tokens ends and the next begins."""
CLASSES = (f"lt{EDGES[0]}", *(f"{low}_{high}" for low, high in pairwise(EDGES)), f"ge{EDGES[-1]}")


class ErrorSpread(DocumentMetric[MetricBatch]):
    """error_cv = std_t(e_t) / mean_t(e_t), e_t = ||x_t - recon_t||^2 over the rows that are no outliers, std of the population: 0 where every token
    has the same error. fvu_seen_10_50 and the like = sum e_t / sum ||x_t - mean(x)||^2 over those of them whose token stands on 10 to 49 of the
    evaluation rows, with the mean of all of them.

    At equal FVU an uneven error costs the language model more. The classes of frequency need text; one without rows is left out.
    """

    def rows(self, batch: MetricBatch) -> dict[str, Tensor]:
        inlier_T = batch.inlier_T(self.setup.norm_limit)
        error_T = batch.residual_sq_T * inlier_T
        columns = {"rows": inlier_T, "error": error_T, "error_sq": error_T.square()}
        if batch.occurrences_T is not None:
            variance_T = (batch.target_TD.double() - self.setup.inlier_mean_D).square().sum(1) * inlier_T
            of_T = torch.bucketize(batch.occurrences_T, torch.tensor(EDGES), right=True)
            class_TB = torch.nn.functional.one_hot(of_T, len(CLASSES)).double()
            columns |= {"class_error": class_TB * error_T[:, None], "class_variance": class_TB * variance_T[:, None]}
        return columns

    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        mean, mean_sq = totals["error"] / totals["rows"], totals["error_sq"] / totals["rows"]
        numbers = {"error_cv": (mean_sq - mean.square()).clamp_min(0).sqrt() / mean}
        if "class_error" in totals:
            seen = self.sums["class_variance"].sum(0) > 0
            fvu_RB = totals["class_error"] / totals["class_variance"]
            numbers |= {f"fvu_seen_{name}": fvu_RB[:, b] for b, name in enumerate(CLASSES) if seen[b]}
        return numbers


def occurrences(tokens_CS: Tensor, keep_CS: Tensor) -> Tensor:
    """[T] on how many rows the token of each row stands."""
    _, token_T, count_V = tokens_CS[keep_CS].unique(return_inverse=True, return_counts=True)
    return count_V[token_T]

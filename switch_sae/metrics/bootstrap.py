"""Intervals by resampling documents: rows of one document are alike, so resampling rows would make every interval far too narrow."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from switch_sae.metrics.base import Metric

BLOCK_ELEMENTS = 2**24


def document_weights(num_documents: int, replicates: int, seed: int = 0) -> Iterator[Tensor]:
    """How often each of N documents is drawn in each of R resamples of N with replacement (multinomial), as blocks of [R', N], float64.

    The same seed gives the same resamples to every SAE, so differences between SAEs can be bootstrapped too.
    """
    generator = torch.Generator().manual_seed(seed)
    block = max(1, BLOCK_ELEMENTS // num_documents)
    for start in range(0, replicates, block):
        drawn_RN = torch.randint(num_documents, (min(block, replicates - start), num_documents), generator=generator)
        weights_RN = torch.zeros(drawn_RN.shape, dtype=torch.float64)
        yield weights_RN.scatter_add_(1, drawn_RN, torch.ones_like(weights_RN))


def bootstrap_intervals(
    metrics: Iterable[Metric], num_documents: int, replicates: int = 1000, coverage: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile interval of every number that can be resampled (Efron & Tibshirani 1993, ch. 13): the (1 -+ coverage) / 2 quantiles over resamples.

    Empty when there is one document or none: nothing can be said about others then. The evaluation mean and the outlier limit are held fixed.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage={coverage} must lie between 0 and 1, such as 0.95.")
    if replicates < 0:
        raise ValueError(f"replicates={replicates} is negative. Use 0 for no intervals, or 1000.")
    if num_documents < 2 or replicates == 0:
        return {}
    metrics = list(metrics)
    values: dict[str, list[Tensor]] = {}
    for weights_RN in document_weights(num_documents, replicates, seed):
        for metric in metrics:
            for name, value_R in metric.replicates(weights_RN).items():
                values.setdefault(name, []).append(value_R)
    tails = torch.tensor([(1 - coverage) / 2, (1 + coverage) / 2], dtype=torch.float64)
    quantiles = {name: torch.cat(blocks).quantile(tails) for name, blocks in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}

"""Direction of the reconstruction."""

import torch
from torch import Tensor

from switch_sae.metrics.base import DocumentMetric, MetricBatch


class Cosine(DocumentMetric[MetricBatch]):
    """mean_t <x_t, recon_t> / (||x_t|| ||recon_t||), neither centred, over rows with x != 0; a reconstruction of 0 counts as 0."""

    def rows(self, batch: MetricBatch) -> dict[str, Tensor]:
        dot_T = (batch.target_TD.double() * batch.output.recon_TD.double()).sum(1)
        norms_T = (batch.target_sq_T * batch.recon_sq_T).sqrt()
        return {"cosine": torch.where(norms_T > 0, dot_T / norms_T, 0.0), "rows": (batch.target_sq_T > 0).double()}

    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"cosine": totals["cosine"] / totals["rows"]}

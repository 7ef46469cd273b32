"""Length of the reconstruction."""

import torch
from torch import Tensor

from switch_sae.metrics.base import DocumentMetric, MetricBatch


class RelativeNorm(DocumentMetric[MetricBatch]):
    """mean_t ||recon_t|| / ||x_t|| over rows with x != 0: below 1 when the SAE shrinks (Wright & Sharkey 2024; SAELens' shrinkage)."""

    def rows(self, batch: MetricBatch) -> dict[str, Tensor]:
        ratio_T = torch.where(batch.target_sq_T > 0, (batch.recon_sq_T / batch.target_sq_T).sqrt(), 0.0)
        return {"ratio": ratio_T, "rows": (batch.target_sq_T > 0).double()}

    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"relative_norm": totals["ratio"] / totals["rows"]}

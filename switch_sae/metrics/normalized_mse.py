"""Per-token normalised squared error."""

import torch
from torch import Tensor

from switch_sae.metrics.base import DocumentMetric, MetricBatch


class NormalizedMSE(DocumentMetric[MetricBatch]):
    """mean_t ||x_t - recon_t||^2 / ||x_t||^2, not centred: the per-token form of Gao et al. (arXiv 2406.04093) and its code.

    Every token weighs the same, so outliers do not dominate. Rows with x = 0 have no such ratio and are left out; `normalized_mse_inliers` also
    leaves out rows with more than 10 median norms.
    """

    def rows(self, batch: MetricBatch) -> dict[str, Tensor]:
        defined_T = (batch.target_sq_T > 0).double()
        inlier_T = defined_T * batch.inlier_T(self.setup.norm_limit)
        ratio_T = torch.where(batch.target_sq_T > 0, batch.residual_sq_T / batch.target_sq_T, 0.0)
        return {"ratio": ratio_T, "rows": defined_T, "inlier_ratio": ratio_T * inlier_T, "inlier_rows": inlier_T}

    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"normalized_mse": totals["ratio"] / totals["rows"], "normalized_mse_inliers": totals["inlier_ratio"] / totals["inlier_rows"]}

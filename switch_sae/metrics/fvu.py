"""Fraction of variance unexplained."""

from torch import Tensor

from switch_sae.metrics.base import DocumentMetric, MetricBatch


class FVU(DocumentMetric[MetricBatch]):
    """FVU = sum_t ||x_t - recon_t||^2 / sum_t ||x_t - mean(x)||^2 over all evaluation rows: the global centred form (sparsify; SAELens >= 6.54).

    1 for a constant reconstruction at the mean, 0 for a perfect one. The mean is that of the evaluation rows, not of a batch. `fvu_inliers` leaves
    out rows with more than 10 median norms and uses the mean of the others. Other codes' "FVU" centre the residual, average per-token ratios or
    do not centre at all, and are not comparable.
    """

    def rows(self, batch: MetricBatch) -> dict[str, Tensor]:
        inlier_T = batch.inlier_T(self.setup.norm_limit)
        target_TD = batch.target_TD.double()
        return {
            "residual": batch.residual_sq_T,
            "variance": (target_TD - self.setup.mean_D).square().sum(1),
            "inlier_residual": batch.residual_sq_T * inlier_T,
            "inlier_variance": (target_TD - self.setup.inlier_mean_D).square().sum(1) * inlier_T,
        }

    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"fvu": totals["residual"] / totals["variance"], "fvu_inliers": totals["inlier_residual"] / totals["inlier_variance"]}

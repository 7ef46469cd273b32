"""Latents that never or almost always fire."""

import torch

from switch_sae.metrics.base import Metric, MetricBatch, MetricSetup


class Firing(Metric[MetricBatch]):
    """Shares of the M latents by how often they fire (have a nonzero value) on the T evaluation rows.

    dead_latents = #{m: n_m = 0} / M, which falls as T grows: compare it only at equal T. dense_latents_1pct = #{m: n_m / T > 0.01} / M and
    dense_latents_10pct likewise (SAEBench's thresholds). No interval: a resample of documents misses about a third of them, and so has more dead
    latents than the data.
    """

    def __init__(self, setup: MetricSetup) -> None:
        super().__init__(setup)
        self.firing_counts = torch.zeros(setup.num_latents, dtype=torch.int64)
        """[M] rows on which each latent fired."""
        self.num_rows = 0

    def update(self, batch: MetricBatch) -> None:
        self.firing_counts += batch.output.latents.firing_counts().long()
        self.num_rows += len(batch.target_TD)

    def compute(self) -> dict[str, float]:
        if self.num_rows == 0:
            raise ValueError("Firing has seen no rows. Call update before compute.")
        rate_M = self.firing_counts.double() / self.num_rows
        return {
            "dead_latents": float((rate_M == 0).double().mean()),
            "dense_latents_1pct": float((rate_M > 0.01).double().mean()),
            "dense_latents_10pct": float((rate_M > 0.1).double().mean()),
        }

    def vectors(self) -> dict[str, list[float]]:
        """The share of dead latents among each expert's own; shared ones come first and belong to none."""
        own_EF = self.firing_counts[self.setup.num_shared :].view(self.setup.num_experts, -1)
        return {"expert_dead_latents": (own_EF == 0).double().mean(1).tolist()}

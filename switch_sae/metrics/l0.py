"""How many latents are active."""

import torch
from torch import Tensor

from switch_sae.metrics.base import DocumentMetric, MetricBatch


class L0(DocumentMetric[MetricBatch]):
    """l0 = mean_t #{active latents with a nonzero value}, after top-k; unused_slots = 1 - l0 / K.

    Slots that top-k filled with zeros are unused. Counting latents before top-k instead gave the original Switch SAE code an L0 of 209 for k = 64.
    """

    def rows(self, batch: MetricBatch) -> dict[str, Tensor]:
        active_TK = batch.output.latents.values != 0
        return {"active": active_TK.sum(1), "slots": torch.full((len(active_TK),), active_TK.shape[1]), "rows": torch.ones(len(active_TK))}

    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"l0": totals["active"] / totals["rows"], "unused_slots": 1 - totals["active"] / totals["slots"]}

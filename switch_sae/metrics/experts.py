"""How the router spreads tokens over experts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.metrics.base import DocumentMetric, MetricBatch, MetricSetup


class Experts(DocumentMetric[MetricBatch]):
    """Load and confidence, from f_i = share of (row, slot) pairs routed to expert i, P_i = mean probability of expert i, gate = the chosen experts'
    probability.

    load_cv = std(f) / mean(f) over experts; load_max = E max f and load_min = E min f (1 is a fair share); load_min_over_max is 0 when an expert
    is idle; load_entropy = H(f) / log E, 1 when balanced; router_entropy = mean_t H(p_t) / log E, 0 when the router is certain;
    gate = mean_t gate_t; load_balance = E sum_i f_i P_i, the loss of Fedus et al. (arXiv 2101.03961, eq. 4) before its coefficient: 1 when balanced,
    at most E.
    Only router_entropy and gate have intervals: resampling adds noise to every f_i, so that resampled loads are less even than the truth, always.
    """

    MEANS = ("router_entropy", "gate")
    """Numbers that are means over rows."""

    @classmethod
    def applies(cls, setup: MetricSetup) -> bool:
        return setup.num_experts > 1

    def rows(self, batch: MetricBatch) -> dict[str, Tensor]:
        routing = batch.output.routing
        if routing is None:
            raise ValueError(f"the SAE says it has {self.setup.num_experts} experts, but its output has no routing. Return a Routing in SAEOutput.")
        probs_TE = routing.probs_TE.double()
        return {
            "routed": F.one_hot(routing.expert_TS, self.setup.num_experts).sum(1),
            "probs": probs_TE,
            "entropy": torch.special.entr(probs_TE).sum(1),
            "gate": routing.gate_TS.sum(1),
            "rows": torch.ones(len(probs_TE)),
        }

    def ratios(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        experts = self.setup.num_experts
        rows_R = totals["rows"]
        load_RE, probs_RE = totals["routed"] / totals["routed"].sum(1, keepdim=True), totals["probs"] / rows_R[:, None]
        return {
            "load_cv": load_RE.std(1, correction=0) * experts,
            "load_max": load_RE.amax(1) * experts,
            "load_min": load_RE.amin(1) * experts,
            "load_min_over_max": load_RE.amin(1) / load_RE.amax(1),
            "load_entropy": torch.special.entr(load_RE).sum(1) / math.log(experts),
            "router_entropy": totals["entropy"] / rows_R / math.log(experts),
            "gate": totals["gate"] / rows_R,
            "load_balance": experts * (load_RE * probs_RE).sum(1),
        }

    def replicates(self, weights_RN: Tensor) -> dict[str, Tensor]:
        return {name: value_R for name, value_R in super().replicates(weights_RN).items() if name in self.MEANS}

    def vectors(self) -> dict[str, list[float]]:
        """f_i and P_i."""
        totals = self.totals()
        load, probability = totals["routed"][0] / totals["routed"].sum(), totals["probs"][0] / totals["rows"][0]
        return {"expert_load": load.tolist(), "expert_probability": probability.tolist()}

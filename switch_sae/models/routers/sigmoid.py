"""Experts judged one by one: sigmoid gates that do not compete (as in DeepSeek-V3, arXiv 2412.19437, but not renormalised)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.checks import at_least
from switch_sae.models.routers.base import LinearRouter, Routing, largest, load_balance_loss


class SigmoidRouter(LinearRouter):
    """s = sigmoid(W (x - b)); experts and gates: the S largest s, not renormalised: with one expert per token the quotient would be 1 and carry no
    gradient.

    Loss: load_balance * D * E * sum_i f_i P_i with P_i = mean_t s_ti / sum_j s_tj (arXiv 2412.19437, eq. 17 to 20, over the batch).
    """

    @dataclass
    class Config(LinearRouter.Config):
        load_balance: float = 0.1
        """Coefficient of the load-balance loss; 0 switches it off."""

        def __post_init__(self) -> None:
            at_least("load_balance", self.load_balance, 0, "Use 0 to switch it off.")

    config: "SigmoidRouter.Config"

    def route(self, x_TD: Tensor) -> Routing:
        score_TE = torch.sigmoid(self.logits(x_TD))
        gate_TS, expert_TS = largest(score_TE, self.experts_per_token)
        return Routing(expert_TS, gate_TS, shares(score_TE))

    def loss_terms(self, routing: Routing, unit: float) -> dict[str, Tensor]:
        if self.config.load_balance == 0:
            return {}
        return {"load_balance": self.config.load_balance * unit * load_balance_loss(routing.expert_TS, routing.probs_TE, self.group)}


def shares(score_TE: Tensor) -> Tensor:
    """Scores above 0 as shares that sum to 1."""
    return score_TE / score_TE.sum(dim=1, keepdim=True).clamp_min(torch.finfo(score_TE.dtype).tiny)

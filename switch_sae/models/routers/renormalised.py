"""Gates that sum to 1 over the chosen experts, as several experts per token are published: Scale SAE (arXiv 2511.05745), and `moe.py` of
github.com/amudide/switch_sae.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from switch_sae.checks import at_least
from switch_sae.models.routers.base import LinearRouter, Routing, largest, load_balance_loss


class Scores(Enum):
    """What the softmax over the chosen experts is taken of."""

    probability = "probability"
    """Probabilities of all experts, as in Scale SAE's code: a softmax of a softmax. (0.9, 0.05) becomes (0.70, 0.30)."""
    relu = "relu"
    """ReLU of the logits, as in `moe.py`."""


class RenormalisedRouter(LinearRouter):
    """h = W (x - b) + c; s = softmax(h) or ReLU(h); experts: the S largest h; gates: softmax of their s alone, which sum to 1.

    With one expert per token the gate is exactly 1, and the reconstruction teaches the router nothing: use `softmax` or `sigmoid` there. Loss:
    load_balance * D * E * sum_i f_i P_i, where f_i counts each token's first expert alone, as published, and P is the softmax of s (of h) over all.
    Where ReLU makes several s 0 the larger h is chosen; the publication takes any.
    """

    @dataclass
    class Config(LinearRouter.Config):
        scores: Scores = Scores.probability
        load_balance: float = 0.1
        """Coefficient of the load-balance loss; 0 switches it off, as in `moe.py`."""

        def __post_init__(self) -> None:
            at_least("load_balance", self.load_balance, 0, "Use 0 to switch it off.")

    config: "RenormalisedRouter.Config"

    def __init__(self, config: Config, d_in: int, num_experts: int, experts_per_token: int, generator: torch.Generator | None = None) -> None:
        if experts_per_token == 1 and config.train and config.load_balance == 0:
            raise ValueError(
                "router=renormalised with experts_per_token=1 has gates of exactly 1, and load_balance=0 leaves nothing that could train it. "
                "Use experts_per_token=2, load_balance above 0, train=false, or router=softmax."
            )
        super().__init__(config, d_in, num_experts, experts_per_token, generator)
        self.c_E = nn.Parameter(torch.zeros(num_experts), requires_grad=config.train)

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(x_TD) + self.c_E

    def route(self, x_TD: Tensor) -> Routing:
        logits_TE = self.logits(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=1)
        expert_TS = largest(logits_TE, self.experts_per_token)[1]
        if self.config.scores is Scores.probability:
            score_TE = probs_TE
        else:
            score_TE = logits_TE.relu()
            probs_TE = torch.softmax(score_TE, dim=1)
        if self.experts_per_token == 1:
            return Routing(expert_TS, torch.ones_like(probs_TE[:, :1]), probs_TE)
        return Routing(expert_TS, torch.softmax(score_TE.gather(1, expert_TS), dim=1), probs_TE)

    def loss_terms(self, routing: Routing, unit: float) -> dict[str, Tensor]:
        if self.config.load_balance == 0:
            return {}
        return {"load_balance": self.config.load_balance * unit * load_balance_loss(routing.expert_TS[:, :1], routing.probs_TE, self.group)}

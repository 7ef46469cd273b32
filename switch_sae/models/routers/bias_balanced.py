"""Balance without a loss: a bias that only selects moves against the load (Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.checks import at_least
from switch_sae.models.routers.base import LinearRouter, Routing, largest
from switch_sae.models.routers.sigmoid import shares


class BiasBalancedRouter(LinearRouter):
    """s = sigmoid(W (x - b)); experts: the S largest s + balance; gates: their s, not renormalised. After each step

    balance_i += rate * sign(1/E - f_i), f_i the share of (token, slot) pairs that went to expert i: it biases the choice and nothing else.
    """

    @dataclass
    class Config(LinearRouter.Config):
        rate: float = 1e-3
        """How far an expert's bias moves per step; scores lie in (0, 1). 0 leaves the load alone."""

        def __post_init__(self) -> None:
            at_least("rate", self.rate, 0, "Use 0 to switch balancing off.")

    config: "BiasBalancedRouter.Config"
    balance_E: Tensor

    def __init__(self, config: Config, d_in: int, num_experts: int, experts_per_token: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, num_experts, experts_per_token, generator)
        self.register_buffer("balance_E", torch.zeros(num_experts))

    def route(self, x_TD: Tensor) -> Routing:
        score_TE = torch.sigmoid(self.logits(x_TD))
        expert_TS = largest(score_TE.detach() + self.balance_E, self.experts_per_token)[1]
        return Routing(expert_TS, score_TE.gather(1, expert_TS), shares(score_TE))

    def end_step(self, x_TD: Tensor, routing: Routing) -> None:
        if self.config.train:
            # Whole numbers: shares would round, and an even load would move, otherwise for several processes than for one.
            (pairs_E,) = self.group.mean([torch.bincount(routing.expert_TS.flatten(), minlength=self.num_experts).to(self.balance_E.dtype)])
            missing_E = routing.expert_TS.numel() - self.num_experts * pairs_E
            self.balance_E.add_(torch.sign(missing_E), alpha=self.config.rate)

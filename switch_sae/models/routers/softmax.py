"""The paper's router: softmax probabilities, the likeliest expert, a load-balance loss (Mudide et al., arXiv 2410.08201)."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from switch_sae.checks import at_least
from switch_sae.models.routers.base import LinearRouter, RouterKernel, Routing, largest, load_balance_loss


class Gate(Enum):
    """What multiplies the latents of the routed expert."""

    probability = "probability"
    """The router's probability, as in the paper: through it the router learns from the reconstruction."""
    hard = "hard"
    """1, the paper's ablation: no gradient of the reconstruction reaches the router."""
    straight_through = "straight_through"
    """1, with the gradient of the probability: the router learns and latents are not scaled (Bengio et al., arXiv 1308.3432)."""


class SoftmaxRouter(LinearRouter):
    """p = softmax(W (x - b)); experts: the S largest p, not renormalised; loss: load_balance * D * E * sum_i f_i P_i."""

    @dataclass
    class Config(LinearRouter.Config):
        gate: Gate = Gate.probability
        load_balance: float = 0.1
        """Coefficient alpha of the load-balance loss, which adds alpha * D * E * sum_i f_i P_i. With scaled activations (mean squared norm D)
        it does not depend on the model; the paper's alpha=3 on unscaled activations equals 3 * activation_scale^2 here."""

        @property
        def learns_by_gate(self) -> bool:
            return self.train and self.gate is not Gate.hard

        def __post_init__(self) -> None:
            at_least("load_balance", self.load_balance, 0, "Use 0 to switch it off.")
            if self.gate is Gate.hard and self.train and self.load_balance == 0:
                raise ValueError(
                    "gate=hard with load_balance=0 leaves nothing that could train the router. Use train=false, or load_balance above 0."
                )

    config: "SoftmaxRouter.Config"

    def route(self, x_TD: Tensor) -> Routing:
        probs_TE = torch.softmax(self.logits(x_TD), dim=1)
        gate_TS, expert_TS = largest(probs_TE, self.experts_per_token)
        if self.config.gate is not Gate.probability:
            one_TS = torch.ones_like(gate_TS)
            gate_TS = one_TS if self.config.gate is Gate.hard else one_TS + (gate_TS - gate_TS.detach())
        return Routing(expert_TS, gate_TS, probs_TE)

    def loss_terms(self, routing: Routing, unit: float) -> dict[str, Tensor]:
        if self.config.load_balance == 0:
            return {}
        return {"load_balance": self.config.load_balance * unit * load_balance_loss(routing.expert_TS, routing.probs_TE, self.group)}

    def kernel(self) -> RouterKernel | None:
        if self.config.gate is not Gate.probability:
            return None
        return RouterKernel(self.W_ED, self.b_D, self.config.load_balance, self.config.train)

"""`SwitchSAE`: a router sends every activation to one expert SAE (Mudide et al., arXiv 2410.08201), or to several."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from switch_kernels import Dispatch
from switch_sae.models.base import Flops, Routing, SAEOutput, at_least
from switch_sae.models.losses import geometric_median, load_balance_loss
from switch_sae.models.topk import TopKSAE


class Gate(Enum):
    """What multiplies the latents of the routed expert."""

    probability = "probability"
    """The router's probability, as in the paper: through it the router learns from the reconstruction."""
    hard = "hard"
    """1, the paper's ablation: no gradient of the reconstruction reaches the router."""


class SwitchSAE(TopKSAE):
    """p = softmax(W_router (x - b_router)), i = argmax p; z = p_i * TopK(ReLU(W_enc^i (x - b_pre) + b_enc^i)); recon = W_dec z + b_pre.

    Only expert i is computed. With `experts_per_token` = S > 1, i runs over the S likeliest experts, each with its own p_i (not renormalised), and
    TopK selects among all their gated latents, p_i already inside (or K / S of each: `joint_topk=false`). Latents are numbered expert-major: expert e owns latents e*F to (e+1)*F - 1, F = M / E. With one expert it equals
    `TopKSAE` exactly. In the paper b_router and b_pre share their storage (a bug of its code) and experts have no b_enc: `preset=paper`.
    """

    @dataclass
    class Config(TopKSAE.Config):
        num_experts: int = 8
        """E; must divide num_latents."""
        experts_per_token: int = 1
        """S: how many experts compute each token, 1 in the paper. The cost of encoding grows with it and nothing else does."""
        joint_topk: bool = True
        """With several experts per token: the k largest gated latents of all of them together, or k / S of each."""
        gate: Gate = Gate.probability
        load_balance: float = 0.1
        """Coefficient alpha of the load-balance loss, which adds alpha * D * E * sum_i f_i P_i. With scaled activations (mean squared norm D)
        it does not depend on the model; the paper's alpha=3 on unscaled activations equals 3 * activation_scale^2 here."""
        train_router: bool = True
        """False freezes the router at its random start: the control that shows what learned routing is worth."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least("num_experts", self.num_experts, 1)
            if self.num_latents % self.num_experts:
                nearest = max(1, round(self.num_latents / self.num_experts)) * self.num_experts
                raise ValueError(
                    f"num_latents={self.num_latents} is not divisible by num_experts={self.num_experts}: all experts have the same width. "
                    f"The nearest that fits is num_latents={nearest}."
                )
            if not 1 <= self.experts_per_token <= self.num_experts:
                raise ValueError(
                    f"experts_per_token={self.experts_per_token} must lie between 1 and num_experts={self.num_experts}: a token takes distinct experts."
                )
            if not self.joint_topk and self.k % self.experts_per_token:
                raise ValueError(
                    f"k={self.k} does not divide evenly among experts_per_token={self.experts_per_token}. "
                    f"Use k={max(1, self.k // self.experts_per_token) * self.experts_per_token}, or joint_topk=true."
                )
            if self.k > self.latents_per_expert:
                raise ValueError(
                    f"k={self.k} is more than the {self.latents_per_expert} latents of one expert (num_latents={self.num_latents} / "
                    f"num_experts={self.num_experts}). Use k <= {self.latents_per_expert}, or num_latents >= {self.k * self.num_experts}."
                )
            if self.load_balance < 0:
                raise ValueError(f"load_balance={self.load_balance} is negative. Use 0 to switch it off.")
            if self.gate is Gate.hard and self.train_router and self.load_balance == 0:
                raise ValueError(
                    "gate=hard with load_balance=0 leaves nothing that could train the router. Use train_router=false, or load_balance above 0."
                )

        @property
        def latents_per_expert(self) -> int:
            """F."""
            return self.num_latents // self.num_experts

    config: "SwitchSAE.Config"
    has_kernels = True

    def __init__(self, config: "SwitchSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.num_experts = config.num_experts
        self.experts_per_token, self.joint_topk = config.experts_per_token, config.joint_topk
        init_ED = (torch.rand(config.num_experts, d_in, generator=generator) * 2 - 1) / d_in**0.5
        self.W_router_ED = nn.Parameter(init_ED, requires_grad=config.train_router)
        self.b_router_D = nn.Parameter(torch.zeros(d_in), requires_grad=config.train_router)

    def initialize(self, x_TD: Tensor) -> None:
        median_D = geometric_median(x_TD * self.activation_scale)
        self.b_pre_D.data.copy_(median_D)
        self.b_router_D.data.copy_(median_D)

    def route(self, x_TD: Tensor) -> tuple[Routing, Dispatch]:
        """The likeliest experts and their probabilities; a tie for one expert per token goes to the lowest expert."""
        probs_TE = torch.softmax((x_TD - self.b_router_D) @ self.W_router_ED.T, dim=1)
        if self.experts_per_token == 1:
            gate_TS, expert_TS = probs_TE.max(dim=1, keepdim=True)
        else:
            gate_TS, expert_TS = probs_TE.topk(self.experts_per_token, dim=1)
        if self.config.gate is Gate.hard:
            gate_TS = torch.ones_like(gate_TS)
        return Routing(expert_TS, gate_TS, probs_TE), Dispatch.from_experts(expert_TS, self.num_experts)

    def fused_router(self) -> dict[str, Any]:
        config = self.config
        router = {"W_router_ED": self.W_router_ED, "b_router_D": self.b_router_D}
        return router | {"balance": config.load_balance * self.d_in, "train_router": config.train_router}

    def why_router_is_not_fused(self) -> str | None:
        return None if self.config.gate is Gate.probability else f"no Triton kernels know a router with gate={self.config.gate.value}"

    def loss_terms(self, x_TD: Tensor, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss_terms(x_TD, output, dead_M)
        if self.config.load_balance > 0 and output.routing is not None:
            balance = load_balance_loss(output.routing.expert_TS, output.routing.probs_TE)
            terms["load_balance"] = self.config.load_balance * self.d_in * balance
        return terms

    def flops(self) -> Flops:
        dense = super().flops()
        router = 2 * self.d_in * self.num_experts
        return replace(dense, router=router, backward=dense.backward + (2 * router if self.config.train_router else 0))

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        self.W_router_ED.mul_(self.activation_scale)
        self.b_router_D.div_(self.activation_scale)
        super().fold_activation_scale()

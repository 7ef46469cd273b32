"""A router that learns which expert is better: a rival expert computes a share of the batch too, and whichever costs less gains."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.checks import at_least
from switch_sae.models.routers.base import LinearRouter, Rivals, RouterKernel, Routing, largest, load_balance_loss


class CompetitionRouter(LinearRouter):
    """p = softmax(W (x - b)); experts: the S largest p; gates 1: nothing multiplies the latents, so nothing shrinks them.

    On the first `rivals` of each batch (of each process's part of it) another expert e' ~ p without those chosen takes the place of e, the last of
    them, and the token is computed so as well. The costs L of both (squared error of scaled activations, and what the SAE counts for its latents) are
    fixed numbers, and the loss is mean(g L_e + (1 - g) L_e'), g = p_e / (p_e + p_e'): the router moves towards the cheaper. With S = 1 that is one
    expert against another; with S > 1 the S - 1 likelier ones stand in both. Balance: load_balance * D * E * sum_i f_i P_i, as with `softmax`.
    """

    @dataclass
    class Config(LinearRouter.Config):
        load_balance: float = 0.1
        """Coefficient of the load-balance loss; 0 switches it off."""
        rivals: float = 0.25
        """Share of a batch's tokens that a second expert computes in training; 0 leaves balance as the only thing that trains the router."""

        @property
        def learns_by_gate(self) -> bool:
            return False

        def __post_init__(self) -> None:
            at_least("load_balance", self.load_balance, 0, "Use 0 to switch it off.")
            if not 0 <= self.rivals <= 1:
                raise ValueError(f"rivals={self.rivals} must lie between 0 (no competition) and 1 (every token). Use 0.25.")
            if self.train and self.rivals == 0 and self.load_balance == 0:
                raise ValueError("rivals=0 with load_balance=0 leaves nothing that could train the router. Use train=false, or either above 0.")

    config: "CompetitionRouter.Config"
    step = 0

    def begin_step(self, step: int, total_steps: int) -> None:
        self.step = step

    def route(self, x_TD: Tensor) -> Routing:
        probs_TE = torch.softmax(self.logits(x_TD), dim=1)
        expert_TS = largest(probs_TE, self.experts_per_token)[1]
        return Routing(expert_TS, torch.ones_like(probs_TE[:, : self.experts_per_token]), probs_TE)

    @property
    def rival_share(self) -> float:
        return self.config.rivals if self.num_experts > self.experts_per_token and self.config.train else 0.0

    def rivals(self, routing: Routing) -> Rivals | None:
        count = math.ceil(self.rival_share * len(routing.probs_TE))
        if count == 0:
            return None
        probs_nE, expert_nS = routing.probs_TE[:count], routing.expert_TS[:count]
        # Drawn by the step's number alone (Gumbel's trick), for all processes at once: the same in every company, and after a resume. Triton kernels
        # draw other numbers than PyTorch does, by the same rule.
        generator = torch.Generator().manual_seed(self.step)
        shape = (self.group.size, *probs_nE.shape)
        uniform_nE = torch.rand(shape, generator=generator, dtype=torch.float64)[self.group.rank].to(probs_nE.dtype).to(probs_nE.device)
        tiny = torch.finfo(probs_nE.dtype).tiny
        keys_nE = probs_nE.detach().clamp_min(tiny).log() - (-uniform_nE.clamp_min(tiny).log()).clamp_min(tiny).log()
        rival_n1 = keys_nE.scatter(1, expert_nS, -torch.inf).argmax(dim=1, keepdim=True)
        log_odds_n = (probs_nE.gather(1, expert_nS[:, -1:]).clamp_min(tiny).log() - probs_nE.gather(1, rival_n1).clamp_min(tiny).log())[:, 0]
        return Rivals(torch.cat([expert_nS[:, :-1], rival_n1], dim=1), torch.sigmoid(log_odds_n))

    def loss_terms(self, routing: Routing, unit: float) -> dict[str, Tensor]:
        if self.config.load_balance == 0:
            return {}
        return {"load_balance": self.config.load_balance * unit * load_balance_loss(routing.expert_TS, routing.probs_TE, self.group)}

    def kernel(self) -> RouterKernel | None:
        return RouterKernel(self.W_ED, self.b_D, self.config.load_balance, self.config.train, self.rival_share)

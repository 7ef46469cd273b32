"""A router for many experts: it chooses a group of them first, and looks at no expert of another group. 2 sqrt(E) products instead of E."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switch_kernels import Dispatch
from switch_sae.checks import all_at_least, at_least
from switch_sae.models.routers.base import LinearRouter, Router, Routing, largest, load_balance_loss


class TwoLevelRouter(Router):
    """p = softmax(W_group (x - b)) over G groups; q = softmax(W_expert (x - b)) over the E / G experts of a group; expert i of group g: p_g q_i.

    The S groups of largest p give a token their best expert each, whose gate is p q, not renormalised: distinct experts, for S <= G. Expert i belongs
    to group i // (E / G). What is not looked at counts in `probs_TE` as p_g G / E each, so that shares sum to 1. Loss: load_balance * D * E * sum f_i
    P_i (arXiv 2101.03961, eq. 4) with these.
    """

    @dataclass
    class Config(LinearRouter.Config):
        groups: int | None = None
        """G; must divide num_experts. None is the divisor nearest to its square root."""
        load_balance: float = 0.1
        """Coefficient of the load-balance loss; 0 switches it off."""

        def __post_init__(self) -> None:
            all_at_least(self, groups=1)
            at_least("load_balance", self.load_balance, 0, "Use 0 to switch it off.")

    config: "TwoLevelRouter.Config"

    def __init__(self, config: Config, d_in: int, num_experts: int, experts_per_token: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, num_experts, experts_per_token, generator)
        divisors = [groups for groups in range(1, num_experts + 1) if num_experts % groups == 0]
        self.groups = config.groups or min(divisors, key=lambda groups: abs(groups - math.sqrt(num_experts)))
        if self.groups not in divisors or self.groups < experts_per_token:
            fitting = [groups for groups in divisors if groups >= experts_per_token]
            raise ValueError(
                f"router.groups={self.groups} must divide num_experts={num_experts} and be at least experts_per_token={experts_per_token}, "
                f"a group for each. Use one of {fitting}."
            )
        init_GD, init_ED = ((torch.rand(rows, d_in, generator=generator) * 2 - 1) / d_in**0.5 for rows in (self.groups, num_experts))
        self.W_group_GD = nn.Parameter(init_GD, requires_grad=config.train)
        self.W_expert_ED = nn.Parameter(init_ED, requires_grad=config.train)
        self.b_D = nn.Parameter(torch.zeros(d_in), requires_grad=config.train)

    def initialize(self, x_TD: Tensor, centre_D: Tensor) -> None:
        self.b_D.data.copy_(centre_D)

    def route(self, x_TD: Tensor) -> Routing:
        centred_TD, tokens, size = x_TD - self.b_D, len(x_TD), self.num_experts // self.groups
        group_TG = torch.softmax(centred_TD @ self.W_group_GD.T, dim=1)
        p_TS, group_TS = largest(group_TG, self.experts_per_token)
        q_TSL = torch.softmax(self._within(centred_TD, group_TS), dim=2)
        best_TS, place_TS = q_TSL.max(dim=2)
        gate_TS, expert_TS = p_TS * best_TS, group_TS * size + place_TS
        order_TS = gate_TS.argsort(dim=1, descending=True, stable=True)
        seen_TSL = group_TS[..., None].expand_as(q_TSL)
        unseen_TGL = (group_TG / size)[..., None].expand(tokens, self.groups, size)
        probs_TE = unseen_TGL.scatter(1, seen_TSL, p_TS[..., None] * q_TSL).flatten(1)
        return Routing(expert_TS.gather(1, order_TS), gate_TS.gather(1, order_TS), probs_TE)

    def _within(self, centred_TD: Tensor, group_TS: Tensor) -> Tensor:
        """[T, S, E / G]: logits of the experts of the chosen groups, and of no others."""
        dispatch = Dispatch.from_experts(group_TS, self.groups)
        centred_ND = dispatch.gather(centred_TD)
        parts = zip(centred_ND.split(_lengths(dispatch)), self.W_expert_ED.chunk(self.groups), strict=True)
        logits_NL = torch.cat([F.linear(rows_ND, W_LD) for rows_ND, W_LD in parts])
        return dispatch.scatter(logits_NL).view(*group_TS.shape, self.num_experts // self.groups)

    def loss_terms(self, routing: Routing, unit: float) -> dict[str, Tensor]:
        if self.config.load_balance == 0:
            return {}
        return {"load_balance": self.config.load_balance * unit * load_balance_loss(routing.expert_TS, routing.probs_TE, self.group)}

    def flops(self) -> tuple[int, int]:
        product = 2 * self.d_in * (self.groups + self.experts_per_token * self.num_experts // self.groups)
        return product, 2 * product if self.config.train else 0

    @torch.no_grad()
    def fold_scale(self, scale: Tensor) -> None:
        for weight in (self.W_group_GD, self.W_expert_ED):
            weight.mul_(scale)
        self.b_D.div_(scale)


def _lengths(dispatch: Dispatch) -> list[int]:
    """Rows of each group."""
    return [end - start for start, end in zip(dispatch.offsets[:-1], dispatch.offsets[1:], strict=True)]

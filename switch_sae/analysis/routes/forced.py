"""Every token through every expert: what each expert of an SAE makes of rows that the router may have sent elsewhere.

Shapes: T rows, D activation size, E experts. Everything is on the CPU, and errors are float64.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

from switch_sae.countdown import Countdown
from switch_sae.files import Say, tell
from switch_sae.metrics.forward import device_of, sae_outputs, untouched
from switch_sae.models import Routing, SparseAutoencoder
from switch_sae.models.inference import Inference
from switch_sae.models.routers import Router
from switch_sae.rows import Rows, Shapes

Scale = Literal["gate", "pair", "token"]
SCALES: dict[Scale, str] = {
    "gate": "each expert with the router's own gate for it",
    "pair": "gate replaced by one scalar per pair of the router's expert and the one that computes, fitted on other documents",
    "token": "gate replaced by the best scalar of each token: a bound, since it is chosen with the target",
}
"""What multiplies the code of an expert. The gate of an expert that the router did not choose is small where gates are probabilities, and a small
gate alone makes an error large."""


@dataclass(frozen=True, repr=False)
class Forced(Shapes):
    """For targets x and the part u = recon - b that an expert's code adds with a gate of 1. A gate g leaves the error

    ||x - b||^2 - 2 g <x - b, u> + g^2 ||u||^2, since top-k and decoder are linear in it. In raw units.
    """

    left_T: Tensor
    """||x - b||^2."""
    product_TE: Tensor
    """<x - b, u>."""
    norm_TE: Tensor
    """||u||^2."""
    gate_TE: Tensor
    """What multiplies an expert's code when the token goes to it; 1 where values are refitted or found by pursuit."""
    rank_TE: Tensor
    """The experts of each row as the router prefers them, best first, int64."""

    @property
    def chosen_T(self) -> Tensor:
        """The router's expert."""
        return self.rank_TE[:, 0]

    def errors(self, scale: Scale, halves: tuple[Tensor, Tensor]) -> Tensor:
        """[T, E] ||x - recon||^2 by every expert. Scalars per pair that score one half of the documents are fitted on the other."""
        return scaled_errors(self.left_T, self.product_TE, self.norm_TE, scale, self.gate_TE, self.chosen_T, halves)

    @cached_property
    def num_experts(self) -> int:
        return self.gate_TE.shape[1]


def scaled_errors(
    left_T: Tensor, product_TE: Tensor, norm_TE: Tensor, scale: Scale, gate_TE: Tensor, group_T: Tensor, halves: tuple[Tensor, Tensor]
) -> Tensor:
    """||x - b||^2 - 2 s <x - b, u> + s^2 ||u||^2 with the scalars s >= 0 that `SCALES` names; rows of one `group_T` share theirs."""
    if scale == "gate":
        scale_TE = gate_TE
    elif scale == "token":
        scale_TE = (product_TE / norm_TE.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)
    else:
        scale_TE = torch.empty_like(product_TE)
        for fitted, scored in (halves, halves[::-1]):
            scale_TE[scored] = pair_scales(product_TE[fitted], norm_TE[fitted], group_T[fitted], int(group_T.max()) + 1)[group_T[scored]]
    return (left_T[:, None] - 2 * scale_TE * product_TE + scale_TE.square() * norm_TE).clamp_min(0)


def pair_scales(product_TE: Tensor, norm_TE: Tensor, group_T: Tensor, groups: int) -> Tensor:
    """[G, E] scalars s >= 0 of least squares, for each group's rows and each expert.

    A group without rows takes those of all rows; an expert whose code is always 0 takes 1.
    """
    sums_GE = [value.new_zeros(groups, value.shape[1]).index_add_(0, group_T, value) for value in (product_TE, norm_TE)]
    product_GE, norm_GE = (torch.where(sums_GE[1] > 0, sums, sums.sum(0)) for sums in sums_GE)
    return torch.where(norm_GE > 0, product_GE / norm_GE, 1.0).clamp_min(0)


def through_every_expert(sae: SparseAutoencoder, rows: Rows, say: Say = tell) -> Forced:
    """Rows through all experts of an SAE that has one for each token: its own encoding (top-k, refit or pursuit) inside each.

    E times the cost of a pass. Raises ValueError for an SAE without a router, or with several experts for each token.
    """
    if why := why_not_forced(sae):
        raise ValueError(why)
    experts = sae.num_experts
    grams = sae.grams  # one cache for all copies
    forced, router = copy.copy(sae), _OneExpert(sae.d_in, experts)
    forced._modules = {**sae._modules, "router": router}
    forced.__dict__["_grams"] = grams
    ahead = Countdown("every expert", experts * len(rows), "rows", say)
    product_TE, norm_TE = (torch.empty(len(rows), experts, dtype=torch.float64) for _ in range(2))
    left_T = torch.empty(len(rows), dtype=torch.float64)
    bias_D = (sae.b_out_D / sae.target_scale).detach().double()
    for expert in range(experts):
        router.expert = expert
        for chosen, target_TD, output in sae_outputs(forced, rows):
            centred_TD, added_TD = target_TD.double() - bias_D, output.recon_TD.double() - bias_D
            left_T[chosen] = centred_TD.square().sum(1).cpu()
            product_TE[chosen, expert] = (centred_TD * added_TD).sum(1).cpu()
            norm_TE[chosen, expert] = added_TD.square().sum(1).cpu()
            ahead(expert * len(rows) + chosen.stop)
    rank_TE, gate_TE = _preferences(sae, rows.x_TD)
    return Forced(left_T, product_TE, norm_TE, gate_TE, rank_TE)


def why_not_forced(sae: SparseAutoencoder) -> str | None:
    """Why no token of an SAE can be forced through an expert; None if it can."""
    if not sae.is_routed or sae.num_experts < 2:
        return f"{type(sae).__name__} has no experts to choose from. Give an SAE with a router and at least two experts."
    if (several := getattr(sae, "experts_per_token", 1)) > 1:
        return (
            f"experts_per_token={several}: the experts of a token compete in one top-k, so one expert's error is not defined, and routes are sets. "
            "Give SAEs with one expert for each token."
        )
    return None


@torch.no_grad()
def _preferences(sae: SparseAutoencoder, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(experts by the router's preference, gates by expert), [T, E] each: the same router, asked for all experts."""
    everyone = copy.copy(cast(Router, sae.router))
    everyone.experts_per_token = sae.num_experts
    with untouched(sae):
        parts = [everyone.route(part.to(device_of(sae)) * sae.activation_scale) for part in x_TD.to(sae.activation_scale.dtype).split(2048)]
    rank_TE, gate_TS = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("expert_TS", "gate_TS"))
    gate_TE = torch.empty_like(gate_TS, dtype=torch.float64).scatter_(1, rank_TE, gate_TS.double())
    return rank_TE, gate_TE if sae.inference is Inference.encoder else torch.ones_like(gate_TE)


class _OneExpert(Router):
    """Sends everything to `expert`, with a gate of 1."""

    expert = 0

    def __init__(self, d_in: int, num_experts: int) -> None:
        super().__init__(None, d_in, num_experts, 1)

    def initialize(self, x_TD: Tensor, centre_D: Tensor) -> None: ...

    def route(self, x_TD: Tensor) -> Routing:
        expert_T1 = torch.full((len(x_TD), 1), self.expert, device=x_TD.device)
        probs_TE = x_TD.new_zeros(len(x_TD), self.num_experts)
        probs_TE[:, self.expert] = 1
        return Routing(expert_T1, torch.ones_like(expert_T1, dtype=x_TD.dtype), probs_TE)

    def flops(self) -> tuple[int, int]:
        return 0, 0

    def fold_scale(self, scale: Any) -> None: ...

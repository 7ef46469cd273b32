"""A control without parameters: the nearest centroid of centred activations, found by online spherical k-means (Banerjee & Ghosh 2004;
Zhong 2005).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.checks import Settings, at_least
from switch_sae.models.routers.base import Router, Routing, largest

_LLOYD_STEPS = 10


class CosineKMeansRouter(Router):
    """u = (x - b) / ||x - b||; experts: the S largest cosines <u, c_i>; gates 1, so that no gradient reaches it. After each step

    m_i = decay * m_i + (1 - decay) * sum of the u of expert i / T where it has any, and c_i = m_i / ||m_i||. b is the activations' centre, and stays.
    Starts from spread rows of the calibration batch and ten of Lloyd's steps. `probs_TE` is 1 for the nearest centroids, 1/S each.
    """

    @dataclass
    class Config(Settings):
        decay: float = 0.99
        """Of the running means behind the centroids, per step; 1 leaves the centroids where they start."""

        def __post_init__(self) -> None:
            at_least("decay", self.decay, 0)
            if self.decay > 1:
                raise ValueError(f"decay={self.decay} must lie between 0 (this batch alone) and 1 (centroids stay). Use 0.99.")

    config: "CosineKMeansRouter.Config"
    directions_are = "unit centroids"
    mean_ED: Tensor
    centre_D: Tensor

    def __init__(self, config: Config, d_in: int, num_experts: int, experts_per_token: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, num_experts, experts_per_token, generator)
        self.register_buffer("mean_ED", F.normalize(torch.randn(num_experts, d_in, generator=generator), dim=1) / num_experts)
        self.register_buffer("centre_D", torch.zeros(d_in))

    @torch.no_grad()
    def initialize(self, x_TD: Tensor, centre_D: Tensor) -> None:
        self.centre_D.copy_(centre_D)
        unit_TD = self._unit(x_TD)
        # Each further centroid starts at the row that is farthest from the nearest one so far, the first at the row nearest to the random start.
        chosen = [int((unit_TD @ self.mean_ED[0]).argmax())]
        nearest_T = unit_TD @ unit_TD[chosen[0]]
        for _ in range(self.num_experts - 1):
            chosen.append(int(nearest_T.argmin()))
            nearest_T = torch.maximum(nearest_T, unit_TD @ unit_TD[chosen[-1]])
        self.mean_ED.copy_(unit_TD[chosen] / self.num_experts)
        for _ in range(_LLOYD_STEPS):
            expert_T = self.route(x_TD).expert_TS[:, 0]
            sums_ED = torch.zeros_like(self.mean_ED).index_add_(0, expert_T, unit_TD)
            self.mean_ED.copy_(torch.where((sums_ED != 0).any(dim=1, keepdim=True), sums_ED / len(x_TD), self.mean_ED))

    def route(self, x_TD: Tensor) -> Routing:
        cosine_TE = self._unit(x_TD) @ F.normalize(self.mean_ED, dim=1).T
        expert_TS = largest(cosine_TE, self.experts_per_token)[1]
        probs_TE = torch.zeros_like(cosine_TE).scatter(1, expert_TS, 1 / self.experts_per_token)
        return Routing(expert_TS, torch.ones_like(expert_TS, dtype=x_TD.dtype), probs_TE)

    def end_step(self, x_TD: Tensor, routing: Routing) -> None:
        sums_ED = torch.zeros_like(self.mean_ED).index_add_(0, routing.expert_TS[:, 0], self._unit(x_TD))
        (mean_ED,) = self.group.mean([sums_ED / len(x_TD)])
        moved_ED = self.mean_ED.lerp(mean_ED, 1 - self.config.decay)
        has_rows_E1 = (mean_ED != 0).any(dim=1, keepdim=True)
        self.mean_ED.copy_(torch.where(has_rows_E1, moved_ED, self.mean_ED))  # an idle expert stays: it must not fade to 0

    def directions(self) -> Tensor | None:
        return F.normalize(self.mean_ED, dim=1)

    def flops(self) -> tuple[int, int]:
        return 2 * self.d_in * self.num_experts, 0

    @torch.no_grad()
    def fold_scale(self, scale: Tensor) -> None:
        self.centre_D.div_(scale)

    def _unit(self, x_TD: Tensor) -> Tensor:
        return F.normalize(x_TD - self.centre_D, dim=1)

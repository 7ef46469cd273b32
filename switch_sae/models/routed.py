"""What every SAE with a router does for it, whichever way the routed expert finds latents."""

import torch

from switch_kernels import Group
from switch_sae.models.base import SAEOutput, SparseAutoencoder
from switch_sae.models.losses import geometric_median
from switch_sae.models.routers import Router
from switch_sae.rows import Rows


class RoutedSAE(SparseAutoencoder):
    """Stands before the architecture that it adds `router` to: `class SwitchSAE(RoutedSAE, TopKSAE)`."""

    is_routed = True
    router: Router

    def share_batches(self, group: Group) -> None:
        super().share_batches(group)
        self.router.group = group

    def initialize(self, rows: Rows) -> None:
        x_TD = self._scaled(rows.x_TD)
        median_D = geometric_median(x_TD)
        self.b_pre_D.data.copy_(median_D)
        self.router.initialize(x_TD, median_D)

    def begin_step(self, step: int, total_steps: int) -> None:
        super().begin_step(step, total_steps)
        self.router.begin_step(step, total_steps)

    def end_step(self, rows: Rows, output: SAEOutput) -> None:
        super().end_step(rows, output)
        assert output.routing is not None
        if type(self.router).end_step is not Router.end_step:  # scaling the batch once more is worth it only where somebody looks
            self.router.end_step(self._scaled(rows.x_TD), output.routing)

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        self.router.fold_scale(self.activation_scale)
        super().fold_activation_scale()  # type: ignore[safe-super]  # the architecture's, which comes behind

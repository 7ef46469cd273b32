"""The optimiser step that SAEs share: clip by the global norm, project decoder gradients, Adam, decoder rows back to unit norm."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from switch_kernels.group import ALONE, Group

BETAS, EPS = (0.9, 0.999), 1e-8


class Adam:
    """Adam (Kingma & Ba, arXiv 1412.6980) on a CPU or any device that PyTorch serves; `switch_kernels.gpu.adam.FusedAdam` is its Triton twin.

    In order: gradients are averaged over `group`, the processes that share the batch; gradients of all parameters are scaled to a global norm of
    at most `clip`; rows of `unit_rows` lose the part of their gradient along the row, which would only change the norm that is projected out; Adam;
    rows of `unit_rows` return to the unit sphere. With `unit_rows` None all rows are free. Weights change in place.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        unit_rows: str | None,
        fused: bool | None = True,
        betas: tuple[float, float] = BETAS,
        group: Group = ALONE,
    ) -> None:
        self.parameters, self.unit_rows, self.group = dict(parameters), unit_rows, group
        self.torch_adam = torch.optim.Adam(self.parameters.values(), lr=0.0, betas=betas, eps=EPS, fused=fused)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], lr: float, clip: float) -> Tensor:
        """One step; returns the gradient's norm before clipping. The gradients are overwritten."""
        self.group.mean_([gradients[name] for name in self.parameters])
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), clip)
        if self.unit_rows is not None:
            W_MD, grad_MD = self.parameters[self.unit_rows], gradients[self.unit_rows]
            grad_MD.addcmul_(W_MD, (grad_MD * W_MD).sum(dim=1, keepdim=True), value=-1)
        for group in self.torch_adam.param_groups:
            group["lr"] = lr
        self.torch_adam.step()
        if self.unit_rows is not None:
            W_MD.div_(torch.linalg.vector_norm(W_MD, dim=1, keepdim=True))
        for parameter in self.parameters.values():
            parameter.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """`name/step`, `name/exp_avg`, `name/exp_avg_sq` for every parameter that has been stepped."""
        return {
            f"{name}/{key}": value for name, parameter in self.parameters.items() for key, value in self.torch_adam.state.get(parameter, {}).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            saved: dict[str, Any] = {key.removeprefix(f"{name}/"): t for key, t in state.items() if key.startswith(f"{name}/")}
            self.torch_adam.state[parameter] = {key: t.to(parameter.device) for key, t in saved.items()}

"""`switch_kernels.adam.Adam` for Triton: one pass over weights and moments, fused with the gradients where they are recomputed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from switch_kernels.adam import BETAS
from switch_kernels.backend import Dot
from switch_kernels.gpu import pairs, update
from switch_kernels.gpu.inference import operand
from switch_kernels.gpu.step import Gradients
from switch_kernels.gpu.update import MatrixState
from switch_kernels.gpu.update_small import Schedule, SmallState, begin_update_, update_small_
from switch_kernels.group import ALONE, Group

MATRICES = ("W_enc_MD", "W_dec_MD")


class FusedAdam:
    """Adam on the parameters of an SAE, of which matrices are `MATRICES`: same order of operations and same state as `Adam`, all on the device.

    Weights, moments and the operands that matrix products read change in place, so a CUDA graph may hold their addresses. A gradient whose norm is
    not finite changes nothing.
    """

    def __init__(self, parameters: Mapping[str, Tensor], dot: Dot, moments: torch.dtype = torch.float32, group: Group = ALONE) -> None:
        """`group` shares the batch: gradients are averaged over it before their norm is taken, so they must be buffered (`GradientMode`)."""
        self.parameters, self.dot, self.group = dict(parameters), dot, group
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, p in self.parameters.items():
            dtype = moments if name in MATRICES else torch.float32
            self.moments[name] = torch.zeros_like(p, dtype=dtype), torch.zeros_like(p, dtype=dtype)
        self.operands = {name: operand(self.parameters[name], dot) for name in MATRICES if name in self.parameters}
        self.steps_taken = 0

    @torch.no_grad()
    def refresh_operands(self) -> None:
        """After weights were changed from outside."""
        for name, copy in self.operands.items():
            if self._is_copy(name):
                copy.copy_(operand(self.parameters[name], self.dot))

    def hyper(self, step: int, lr: float, clip: float) -> list[float]:
        """What the kernels need to know of step number `step`, counted from 0: lr, betas, bias corrections, clip."""
        beta1, beta2 = BETAS
        return [lr, beta1, beta2, 1 / (1 - beta1 ** (step + 1)), 1 / (1 - beta2 ** (step + 1)), clip]

    @torch.no_grad()
    def step(self, gradients: Gradients, schedule: Schedule) -> Tensor:
        """The next step of `schedule`, whose rows are `hyper`'s; returns the norm before clipping, float32 [].

        Raises ValueError for a recipe of gradients with several processes: what is never written cannot be averaged.
        """
        square = self._reduced_square(gradients)
        hyper, norm = begin_update_(schedule, square)
        states = {name: self._matrix(name) for name in self.operands}
        if gradients.recipe is not None:
            pairs.update_from_pairs_(gradients.recipe, states["W_dec_MD"], states.get("W_enc_MD"), hyper, square, schedule.seed)
        else:
            for name, state in states.items():
                update.update_rows_(state, gradients.of_matrix(name), hyper, square, schedule.seed)
        small = [SmallState(self.parameters[name].detach(), *self.moments[name], grad) for name, grad in gradients.small.items()]
        update_small_(small, hyper, square)
        return norm

    def _reduced_square(self, gradients: Gradients) -> Tensor:
        """Averages the gradients over the group and returns the squared norm of the result."""
        if self.group.size == 1:
            return gradients.square
        if gradients.recipe is not None:
            raise ValueError("gradients that are recomputed in the update cannot be averaged over processes. Use GradientMode.buffered.")
        averaged = [*map(gradients.of_matrix, self.operands), *gradients.small.values()]
        self.group.mean_(averaged)
        return torch.stack([gradient.float().square().sum() for gradient in averaged]).sum()

    def _matrix(self, name: str) -> MatrixState:
        exp_avg, exp_avg_sq = self.moments[name]
        copy = self.operands[name] if self._is_copy(name) else None
        return MatrixState(self.parameters[name].detach(), exp_avg, exp_avg_sq, copy, unit_norm=name == "W_dec_MD")

    def _is_copy(self, name: str) -> bool:
        """Float32 operands whose rows need no padding are the master weights themselves."""
        copy, weight = self.operands[name], self.parameters[name]
        return copy.dtype != weight.dtype or copy.shape != weight.shape

    def state(self) -> dict[str, Tensor]:
        """As `Adam.state`, moments in the precision they are kept in."""
        if self.steps_taken == 0:
            return {}
        tensors: dict[str, Tensor] = {}
        for name, (exp_avg, exp_avg_sq) in self.moments.items():
            tensors |= {f"{name}/step": torch.tensor(float(self.steps_taken)), f"{name}/exp_avg": exp_avg, f"{name}/exp_avg_sq": exp_avg_sq}
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Moments of a run that has not stepped yet are zero."""
        for name, (exp_avg, exp_avg_sq) in self.moments.items():
            for moment, key in ((exp_avg, "exp_avg"), (exp_avg_sq, "exp_avg_sq")):
                saved = state.get(f"{name}/{key}")
                moment.zero_() if saved is None else moment.copy_(saved)
            if f"{name}/step" in state:
                self.steps_taken = int(state[f"{name}/step"])
        self.refresh_operands()

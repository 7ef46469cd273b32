"""Training steps as fused Triton kernels: the same losses and gradients as autograd through `loss_terms`.

Kernels opt in, by exact class: what they do not know, autograd computes. `why_not_fused` is the only rule.
"""

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from switch_kernels import Plan, Regime, choose_plan
from switch_kernels.adam import BETAS
from switch_kernels.backend import Dot
from switch_kernels.plan import can_select
from switch_sae.models.base import SparseAutoencoder
from switch_sae.models.inference import Inference
from switch_sae.models.routers.base import Router, RouterKernel
from switch_sae.rows import Rows

if TYPE_CHECKING:
    from switch_kernels.gpu.auxk import DeadLatents
    from switch_kernels.gpu.step import Settings, StepTensors, Weights


MOST_DEAD = 16384
"""Most dead latents of an expert that AuxK works on at once: it bounds their share of a step's memory and time."""

MOST_EXPERTS = 4096
"""Whose logits the router's kernels hold in registers."""


class FusedTraining(SparseAutoencoder):
    """For SAEs whose whole training step kernels compute: what `TritonEngine` asks of them."""

    has_kernels: bool = False
    """True in the body of exactly those classes that `training_step` computes; a subclass does not inherit it (`why_not_fused`)."""
    kernels_train_by: Inference = Inference.encoder
    """The way of inference that `training_step` computes."""

    @abstractmethod
    def auxk_latents(self) -> int:
        """Dead latents that each of a token's experts may use for AuxK."""

    def router_kernel(self) -> RouterKernel | None:
        """What the kernels need of the router; None where there is none, or where they do not know it."""
        return None

    def why_not_in_kernels(self) -> str | None:
        """Which of its own settings the kernels do not know, in words; None where there is none."""
        return None

    @abstractmethod
    def plan(self, tokens: int) -> Plan:
        """How the kernels will compute a batch of so many tokens, and why."""

    def prepare_step(self) -> Hashable:
        """What the host decides before a step: the kind of work it does, and on what, each of which is captured in a graph of its own."""
        return None

    def stepped(self, tokens: int) -> None:
        """What the host notes after a step."""

    @abstractmethod
    def training_step(self, rows: Rows, operands: Mapping[str, Tensor], dead: "DeadLatents | None", dot: Dot, seed: Tensor) -> "StepTensors":
        """Losses and gradients of raw activations. `operands` are the weight matrices as `FusedAdam` keeps them for the kernels; `seed` (int32
        [1]) is the number of the step.
        """

    def follow_step(self, computed: "StepTensors", step: Tensor) -> None:
        """Called after the update: running statistics follow what the step saw, on the device. `step`, int32 [1], is the number of the next one."""

    def _named(self, computed: "StepTensors") -> "StepTensors":
        """With the small gradients under the parameters' own names."""
        small, router = computed.gradients.small, self.router_kernel()
        small["b_pre_D"] = small.pop("b_in_D")  # an autoencoder's bias has both roles
        if router is not None and router.is_trained:
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            small[names[id(router.W_ED)]], small[names[id(router.b_D)]] = small.pop("W_router_ED"), small.pop("b_router_D")
        return computed

    def dead_latents(self, dead_M: Tensor) -> "DeadLatents | None":
        """What AuxK needs of the dead latents; None if there are none. Reads the device: not for use inside a captured step.

        Each expert's dead latents, shared ones first, are padded to the same power of two, at least 64, so that shapes seldom change. Of more than
        `MOST_DEAD` in an expert those of the lowest numbers take part, until they live: AuxK uses D / 2 of them for a token in any case.
        """
        from switch_kernels.gpu.auxk import DeadLatents

        if self.config.auxk == 0 or not bool(dead_M.any()):
            return None
        experts, shared, device = self.num_experts, self.num_shared, dead_M.device
        latent_M = torch.arange(self.num_latents, device=device)
        latent_EC, dead_EC = (
            torch.cat([of_M[:shared].expand(experts, -1), of_M[shared:].view(experts, -1)], dim=1) for of_M in (latent_M, dead_M)
        )  # fmt: skip
        place_EC = dead_EC.cumsum(dim=1) - 1
        dead_EC = dead_EC & (place_EC < MOST_DEAD)
        width = max(64, 1 << (int(dead_EC.sum(dim=1).max()) - 1).bit_length())
        place_EC += torch.arange(experts, device=device)[:, None] * width
        latent_B = torch.zeros(experts * width, dtype=torch.int64, device=device)
        latent_B[place_EC[dead_EC]] = latent_EC[dead_EC]
        is_padding_B = torch.ones_like(latent_B, dtype=torch.bool)
        is_padding_B[place_EC[dead_EC]] = False
        slot_M = torch.full((self.num_latents,), -1, dtype=torch.int32, device=device)
        slot_M[latent_EC[dead_EC]] = place_EC[dead_EC].int()
        dead_S = dead_EC[0, :shared]
        slot_M[:shared][dead_S] = experts * width + place_EC[0, :shared][dead_S].int()
        return DeadLatents(latent_B, is_padding_B, slot_M, self.auxk_latents(), self.config.auxk * self.d_out, shared > 0)


class FusedEncoder(FusedTraining):
    """For SAEs that select k latents among those of the experts of each token, with the reconstruction, load-balance and AuxK losses."""

    W_enc_MD: nn.Parameter
    W_dec_MD: nn.Parameter
    b_enc_M: nn.Parameter | None
    b_pre_D: nn.Parameter
    experts_per_token: int
    joint_topk: bool
    regime: Regime | None = None
    """Overrides the planner's choice."""

    def why_not_in_kernels(self) -> str | None:
        F, k = self.num_latents // self.num_experts, self.config.k if self.joint_topk else self.config.k // self.experts_per_token
        return None if can_select(F, k) else f"the Triton kernels' registers cannot hold what top-k searches for k={k} of {F} latents"

    def plan(self, tokens: int) -> Plan:
        return choose_plan(tokens, self.num_latents, self.num_experts, self.config.k, self.experts_per_token, self.regime)

    def kernel_arguments(self, operands: Mapping[str, Tensor], dot: Dot, tokens: int) -> "tuple[Weights, Settings]":
        """The SAE as the kernels read it."""
        from switch_kernels.gpu.step import Settings, Weights

        router = self.router_kernel()
        routing = (None, None) if router is None else (router.W_ED, router.b_D)
        weights = Weights(operands["W_enc_MD"], operands["W_dec_MD"], self.b_enc_M, self.b_in_D, self.b_out_D, *routing)
        settings = Settings(
            self.num_experts, self.experts_per_token, self.config.k, self.joint_topk, router.balance * self.d_out if router else 0.0,
            router is not None and router.is_trained, dot, self.plan(tokens),
        )  # fmt: skip
        return weights, settings

    def training_step(self, rows: Rows, operands: Mapping[str, Tensor], dead: "DeadLatents | None", dot: Dot, seed: Tensor) -> "StepTensors":
        from switch_kernels.gpu.step import training_step

        weights, settings = self.kernel_arguments(operands, dot, len(rows))
        return self._named(training_step(rows.x_TD, rows.target_TD, self.activation_scale, self.target_scale, weights, settings, dead))


def why_not_fused(sae: SparseAutoencoder) -> str | None:
    """Why Triton kernels cannot train this SAE, in words for its plan line; None if they can.

    The only rule for who trains in kernels: they know the exact classes that say `has_kernels`, unchanged, by the default recipe, with all weights
    trained. Anything that overrides, hooks or freezes would be lost in them without a word.
    """
    name = type(sae).__name__
    if not isinstance(sae, FusedTraining) or not vars(type(sae)).get("has_kernels"):
        return f"no Triton kernels train {name}"
    if changed := _changed(sae):
        return f"this {name} has {', '.join(changed)} of its own, which the Triton kernels would not call"
    if sae.recipe.betas != BETAS or not sae.recipe.unit_decoder:
        return f"the Triton kernels train with Adam's betas {BETAS} and unit decoder rows, not by {sae.recipe}"
    if sae.inference is not sae.kernels_train_by:
        trained = "encoders" if sae.kernels_train_by is Inference.encoder else f"{name} by {sae.kernels_train_by.name}"
        return f"the Triton kernels train {trained}, not by inference={sae.inference.name}"
    if why := sae.why_not_in_kernels():
        return why
    if sae.num_experts > MOST_EXPERTS:
        return f"the Triton kernels route to {MOST_EXPERTS} experts at most, not to {sae.num_experts}"
    frozen = [key for key, parameter in sae.named_parameters(recurse=False) if not parameter.requires_grad]
    if frozen:
        return f"{', '.join(frozen)} are frozen, which the Triton kernels do not know"
    if hooked := [key for key, parameter in sae.named_parameters() if parameter._backward_hooks or parameter._post_accumulate_grad_hooks]:
        return f"{', '.join(hooked)} have hooks on their gradients, which the Triton kernels would not call"
    if sae.group.size > 1:
        return f"{sae.group.size} processes share a batch, and the Triton kernels' statistics of a batch are those of one"
    return next((why for name, module in sae.named_children() if (why := _why_no_part(name, module, sae.router_kernel()))), None)


def _why_no_part(name: str, part: nn.Module, kernel: RouterKernel | None) -> str | None:
    """As for the SAE itself: only a router whose own class has `kernel`, and only where that knows its settings."""
    if not isinstance(part, Router):
        return f"the Triton kernels know nothing of its part {name}, {type(part).__name__}"
    if kernel is None or "kernel" not in vars(type(part)) or _changed(part):
        return f"no Triton kernels know its router, {type(part).__name__}({part.config})"
    if {parameter.requires_grad for parameter in part.parameters()} != {kernel.is_trained}:
        return "its router is frozen in part, which the Triton kernels do not know"
    return None


def _changed(module: nn.Module) -> list[str]:
    """Methods and hooks that this one object has and its class has not."""
    own = [key for key in vars(module) if callable(getattr(type(module), key, None))]
    return own + [hooks for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks") if getattr(module, hooks)]

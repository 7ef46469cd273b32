"""`SwitchSAE`: a router sends every activation to one expert SAE (Mudide et al., arXiv 2410.08201), or to several."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from switch_kernels import Dispatch
from switch_kernels.backend import Dot
from switch_sae.checks import at_least
from switch_sae.models.base import Flops, SAEOutput
from switch_sae.models.latents import SparseLatents
from switch_sae.models.losses import competition_loss
from switch_sae.models.routed import RoutedSAE
from switch_sae.models.routers import ROUTERS, RouterKernel, Routing
from switch_sae.models.topk import TopKSAE
from switch_sae.rows import Rows

if TYPE_CHECKING:
    from switch_kernels.gpu.auxk import DeadLatents
    from switch_kernels.gpu.step import StepTensors


class SwitchSAE(RoutedSAE, TopKSAE):
    """p = softmax(W_router (x - b_router)), i = argmax p; z = p_i * TopK(ReLU(W_enc^i (x - b_pre) + b_enc^i)); recon = W_dec z + b_pre.

    That is with the paper's router, `softmax`; `config.router` chooses another, and then p_i is what it calls the gate. Only expert i is computed.
    With `experts_per_token` = S > 1, i runs over the S best experts, each with its own p_i (not renormalised), and TopK selects among all their gated
    latents, p_i already inside (`gate_in_selection=false`: among ungated ones), or K / S of each (`joint_topk=false`). Latents are numbered
    expert-major: expert e owns latents e*F to (e+1)*F - 1, F = M / E. With one expert it equals `TopKSAE` exactly. In the paper b_router and b_pre
    share their storage (a bug of its code) and experts have no b_enc: `preset=paper`.
    """

    @dataclass
    class Config(TopKSAE.Config):
        num_experts: int = 8
        """E; must divide num_latents."""
        experts_per_token: int = 1
        """S: how many experts compute each token, 1 in the paper. The cost of encoding grows with it and nothing else does."""
        joint_topk: bool = True
        """With several experts per token: the k largest gated latents of all of them together, or k / S of each."""
        gate_in_selection: bool = True
        """Whether latents of several experts compete with their gates inside. False: they compete as they are, and the gate scales what is chosen."""
        router: Any = ROUTERS.field("softmax")
        """The `Config` of one of `ROUTERS`."""

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least("num_experts", self.num_experts, 1)
            self._check_width()
            if not 1 <= self.experts_per_token <= self.num_experts:
                raise ValueError(
                    f"experts_per_token={self.experts_per_token} must lie between 1 and num_experts={self.num_experts}: "
                    "a token takes distinct experts."
                )
            if not self.joint_topk and self.k % self.experts_per_token:
                raise ValueError(
                    f"k={self.k} does not divide evenly among experts_per_token={self.experts_per_token}. "
                    f"Use k={max(1, self.k // self.experts_per_token) * self.experts_per_token}, or joint_topk=true."
                )
            self._check_k()

        def _check_width(self) -> None:
            if self.num_latents % self.num_experts:
                nearest = max(1, round(self.num_latents / self.num_experts)) * self.num_experts
                raise ValueError(
                    f"num_latents={self.num_latents} is not divisible by num_experts={self.num_experts}: all experts have the same width. "
                    f"The nearest that fits is num_latents={nearest}."
                )

        def _check_k(self) -> None:
            if self.k > self.latents_per_expert:
                raise ValueError(
                    f"k={self.k} is more than the {self.latents_per_expert} latents of one expert (num_latents={self.num_latents} / "
                    f"num_experts={self.num_experts}). Use k <= {self.latents_per_expert}, or num_latents >= {self.k * self.num_experts}."
                )

        @property
        def latents_per_expert(self) -> int:
            """F."""
            return self.num_latents // self.num_experts

        def simplest(self) -> TopKSAE.Config:
            """One expert is `TopKSAE`, to the last bit."""
            return self if self.num_experts > 1 else TopKSAE.Config(**{f.name: getattr(self, f.name) for f in fields(TopKSAE.Config)})

        @property
        def width_step(self) -> int:
            return self.num_experts

    former_names: ClassVar[dict[str, str]] = {"router.W_ED": "W_router_ED", "router.b_D": "b_router_D"}
    config: "SwitchSAE.Config"
    has_kernels = True

    def __init__(self, config: "SwitchSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.num_experts = config.num_experts
        self.experts_per_token, self.joint_topk = config.experts_per_token, config.joint_topk
        self.router = ROUTERS.build(config.router, d_in, config.num_experts, config.experts_per_token, generator)

    @staticmethod
    def upgrade(fields: dict[str, Any]) -> dict[str, Any]:
        """Of format version 1, where the router's settings stood beside the SAE's."""
        former = {"gate": "gate", "load_balance": "load_balance", "train_router": "train"}
        router = {name: fields[old] for old, name in former.items() if old in fields}
        others = {key: value for key, value in fields.items() if key not in former}
        return others | ({"router": {"kind": "softmax", **router, **others.get("router", {})}} if router else {})

    def _route(self, x_TD: Tensor) -> tuple[Routing, Dispatch]:
        routing = self.router.route(x_TD)
        return routing, Dispatch.from_experts(routing.expert_TS, self.num_experts)

    def _encode_by(self, x_TD: Tensor, dispatch: Dispatch, gate_TS: Tensor | None) -> tuple[SparseLatents, Any]:
        if gate_TS is None or not self._gates_after_selection():
            return super()._encode_by(x_TD, dispatch, gate_TS)
        latents, by_latent = super()._encode_by(x_TD, dispatch, None)
        is_slot_TKS = (latents.indices_TK // self.latents_per_expert)[..., None] == dispatch.expert_TS[:, None]
        gate_TK = torch.where(is_slot_TKS, gate_TS[:, None], 0.0).sum(dim=2)
        return replace(latents, values_TK=latents.values_TK * gate_TK), by_latent

    def _gates_after_selection(self) -> bool:
        """Where it makes a difference: latents of one expert share their gate."""
        return self.experts_per_token > 1 and self.joint_topk and not self.config.gate_in_selection

    def why_not_in_kernels(self) -> str | None:
        if self._gates_after_selection():
            return "the Triton kernels select gated latents, not by gate_in_selection=False"
        kernel = self.router_kernel()
        if kernel is not None and kernel.rivals is not None and self.experts_per_token > 1:
            return "the Triton kernels know the competition of two experts, not of several per token"
        return super().why_not_in_kernels()

    def router_kernel(self) -> RouterKernel | None:
        return self.router.kernel()

    def training_step(self, rows: Rows, operands: Mapping[str, Tensor], dead: "DeadLatents | None", dot: Dot, seed: Tensor) -> "StepTensors":
        kernel = self.router_kernel()
        if kernel is None or kernel.rivals is None:
            return super().training_step(rows, operands, dead, dot, seed)
        return self._rival_step(rows, operands, dead, dot, seed)

    def _rival_step(
        self, rows: Rows, operands: Mapping[str, Tensor], dead: "DeadLatents | None", dot: Dot, seed: Tensor, bound: Tensor | None = None
    ) -> "StepTensors":
        from switch_kernels.gpu.rival_step import rival_step

        kernel = self.router_kernel()
        assert kernel is not None
        weights, settings = self.kernel_arguments(operands, dot, len(rows))
        return self._named(rival_step(rows.x_TD, self.activation_scale, weights, settings, kernel.rivals, bound, seed, dead))

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        terms = super().loss_terms(rows, output, dead_M)
        if output.routing is None:
            return terms
        terms |= self.router.loss_terms(output.routing, self.d_out)
        if (rivals := self.router.rivals(output.routing)) is None:
            return terms
        first, recon_TD = rows[: len(rivals.expert_nS)], output.recon_TD * self.target_scale
        target_nD = self._target(first) * self.target_scale
        with torch.no_grad():
            theirs = self._encode_by(self._scaled(first.x_TD), Dispatch.from_experts(rivals.expert_nS, self.num_experts), None)[0]
        return terms | {"competition": competition_loss(rivals, target_nD, recon_TD, output.latents, theirs, self._rival(theirs))}

    def flops(self) -> Flops:
        """With the router, and with what rivals cost in training: encoding and decoding once more for a share of the tokens."""
        dense, (router, backward) = super().flops(), self.router.flops()
        rivals = round(self.router.rival_share * 2 * (self.d_in * self.candidates + self.d_out * self.config.k))
        return replace(dense, router=router, backward=dense.backward + backward + rivals)

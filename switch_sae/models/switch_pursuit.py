"""`SwitchPursuitSAE`: a router sends every activation to one small dictionary, or to several at once, in which pursuit finds the latents."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from switch_kernels import Dispatch, sparse_decode
from switch_sae.checks import at_least
from switch_sae.models.base import Flops, SAEOutput
from switch_sae.models.fused_search import FusedSearch
from switch_sae.models.inference import gram_now
from switch_sae.models.latents import SparseLatents
from switch_sae.models.losses import competition_loss
from switch_sae.models.pursuit import PursuitSAE
from switch_sae.models.routed import RoutedSAE
from switch_sae.models.routers import ROUTERS, Routing
from switch_sae.models.routers.base import Rivals
from switch_sae.rows import Rows


class SwitchPursuitSAE(RoutedSAE, PursuitSAE, FusedSearch):
    """e = router(x); A = [W_shared; W_dec of expert e]; z = pursuit(A (x - b), A A^T); recon = A^T z + b.

    An expert is small, so its Gram matrix is, and the search costs less than the correlations. The gate is hard: no latent is scaled. With a router
    that learns by `competition`, a rival expert computes a share of each batch, and the cost of either is its squared error + theta^2 L0. Latents:
    S0 shared ones, then F = (M - S0) / E of each expert.

    Several routes, S = `experts_per_token`: one pursuit over the union, A = [W_shared; W_dec of experts e_1 .. e_S], those of largest p. Its Gram
    matrix has the products of each expert with the others, so it is read out of that of all M latents: M^2 numbers, 66 MB in float32 for 4,096 and
    1 GB for 16,384, computed anew after `gram_tokens`. With 4,096 latents and 8,192 tokens that costs as much as a third of a dense encoder, and half
    as often is too seldom: at a rate of 8e-3 values and directions drift apart (experiments/LOG.md). The rival r ~ p of none of the S takes the place
    of the weakest: loss mean(g L(e_1 .. e_S) + (1 - g) L(e_1 .. e_S-1, r)), g = p_S / (p_S + p_r).
    The penalty `coherence` is of pairs within an expert.
    """

    @dataclass
    class Config(PursuitSAE.Config):
        num_experts: int = 32
        """E; must divide num_latents - shared."""
        shared: int = 0
        """S0: the first latents, which every token may use beside its expert's."""
        experts_per_token: int = 1
        """S: whose latents a token may use together. More than 1 needs the Gram matrix of all latents, M^2 numbers."""
        router: Any = ROUTERS.field("competition")
        """The `Config` of one of `ROUTERS`."""

        def __post_init__(self) -> None:
            at_least("num_experts", self.num_experts, 1)
            at_least("shared", self.shared, 0)
            at_least("experts_per_token", self.experts_per_token, 1)
            if self.experts_per_token > self.num_experts:
                raise ValueError(
                    f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}. Use at most {self.num_experts}."
                )
            check_even_experts(self.num_latents, self.num_experts, self.shared)
            check_router(self.router)
            super().__post_init__()

        @property
        def candidates(self) -> int:
            return self.shared + self.experts_per_token * ((self.num_latents - self.shared) // self.num_experts)

        @property
        def width_step(self) -> int:
            return self.num_experts

        @property
        def least_latents(self) -> int:
            return self.num_experts * max(1, -(-(self.most - self.shared) // self.experts_per_token)) + self.shared

    config: "SwitchPursuitSAE.Config"
    colour, marker = "#1B9E77", "P"
    has_kernels = True

    def __init__(self, config: "SwitchPursuitSAE.Config", d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(config, d_in, generator)
        self.num_experts, self.num_shared = config.num_experts, config.shared
        self.experts_per_token = int(getattr(config, "experts_per_token", 1))
        self.router = ROUTERS.build(config.router, d_in, config.num_experts, self.experts_per_token, generator)

    @property
    def _in_step(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.inference in self.trains_by

    def encode(self, x_TD: Tensor) -> SparseLatents:
        return self.forward(x_TD).latents if self._in_step else super().encode(x_TD)  # type: ignore[return-value]

    def forward(self, x_TD: Tensor) -> SAEOutput:
        if not self._in_step:
            return super().forward(x_TD)
        x_TD = self._scaled(x_TD)
        routing, tokens, gram_ECP = self.router.route(x_TD), len(x_TD), gram_now(self, len(x_TD))
        both_TD, expert_TS = x_TD, routing.expert_TS
        if (rivals := self.router.rivals(routing)) is not None:  # in one search, so that threads have many rows to share
            both_TD, expert_TS = torch.cat([x_TD, x_TD[: len(rivals.expert_nS)]]), torch.cat([expert_TS, rivals.expert_nS])
        found = self._find(both_TD, Dispatch.from_experts(expert_TS, self.num_experts), gram_ECP)
        own, theirs = found.part(slice(tokens)), None if rivals is None else found.part(slice(tokens, None))
        return StepOutput(self._decode(own.values_TK, own.indices_TK), own, routing, rivals=rivals, theirs=theirs)

    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        assert output.routing is not None
        terms = super().loss_terms(rows, output, dead_M) | self.router.loss_terms(output.routing, self.d_out)
        if not isinstance(output, StepOutput) or output.rivals is None or output.theirs is None:
            return terms
        rivals, theirs, price = output.rivals, output.theirs, self._theta().square()
        x_nD, recon_TD = self._scaled(rows.x_TD[: len(rivals.expert_nS)]), output.recon_TD * self.target_scale
        with torch.no_grad():
            rival_nD = sparse_decode(theirs.values_TK, theirs.indices_TK, self.W_dec_MD) + self.b_out_D
        return terms | {"competition": competition_loss(rivals, x_nD, recon_TD, output.latents, theirs, rival_nD, price)}

    def flops(self) -> Flops:
        return self._with_router(super().flops())

    def _with_router(self, one: Flops) -> Flops:
        """With the router, and with what rivals cost in training: the inference and the reconstruction of a share of the tokens once more."""
        router, backward = self.router.flops()
        return replace(one, router=router, backward=one.backward + backward + round(self.router.rival_share * (one.encode + one.decode)))

    def route(self, x_TD: Tensor) -> tuple[Routing, Dispatch]:
        """Which expert takes each raw activation: what `forward` gives as its `routing`. Raises ValueError as `encode`."""
        routing = self.router.route(self._scaled(x_TD))
        return routing, self._dispatch(routing, len(x_TD))

    def _dispatch(self, routing: Routing | None, tokens: int) -> Dispatch:
        assert routing is not None
        return Dispatch.from_experts(routing.expert_TS, self.num_experts)

    def _infer(self, x_TD: Tensor) -> tuple[SparseLatents, Routing]:
        routing = self.router.route(x_TD)
        return self._find(x_TD, self._dispatch(routing, len(x_TD))), routing


@dataclass(frozen=True, repr=False)
class StepOutput(SAEOutput):
    """Of a training step, with what the router's competition needs."""

    rivals: Rivals | None = field(kw_only=True)
    theirs: SparseLatents | None = field(kw_only=True)
    """The latents that the rival experts find for the first tokens."""


def check_router(router: Any) -> None:
    """Raises ValueError for a router that learns through gates: least squares values undo them."""
    if getattr(router, "learns_by_gate", False):
        raise ValueError(
            f"router={ROUTERS.key_of(router)} learns through its gate, which no latent is multiplied by where values are those of least squares. "
            "Use router=competition, cosine_kmeans, or softmax with gate=hard."
        )


def check_even_experts(num_latents: int, num_experts: int, shared: int) -> None:
    """Raises ValueError where the latents that are not shared cannot be split evenly over the experts."""
    left = num_latents - shared
    if left < num_experts or left % num_experts:
        nearest = max(1, round(left / num_experts)) * num_experts + shared
        raise ValueError(
            f"num_latents={num_latents} less shared={shared} is not divisible by num_experts={num_experts}: all experts have the same width. "
            f"The nearest that fits is num_latents={nearest}."
        )

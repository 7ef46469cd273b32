"""The training step of SAEs that search the dictionary of one expert per token as fused Triton kernels; its gradients are those of autograd."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from switch_kernels import Backend, Execution, Plan, Regime, choose_plan
from switch_kernels.backend import Dot
from switch_kernels.pursuit import padded_columns, why_not_in_kernels
from switch_sae.models.fused import FusedTraining
from switch_sae.models.gram import refresh_tokens
from switch_sae.models.inference import Inference, ridge_of
from switch_sae.models.pursuit import THRESHOLD_RATE
from switch_sae.models.routers import Router
from switch_sae.models.routers.base import RouterKernel
from switch_sae.rows import Rows

if TYPE_CHECKING:
    from switch_kernels.gpu.auxk import DeadLatents
    from switch_kernels.gpu.pursuit_step import SearchSettings, SearchWeights
    from switch_kernels.gpu.step import StepTensors


class FusedSearch(FusedTraining):
    """Stands behind the architecture: `class SwitchPursuitSAE(RoutedSAE, PursuitSAE, FusedSearch)`."""

    W_dec_MD: nn.Parameter
    b_pre_D: nn.Parameter
    router: Router
    theta: Tensor
    kernels_train_by = Inference.pursuit
    renew_gram = False
    """Whether the next step computes Gram matrices anew."""

    def auxk_latents(self) -> int:
        return max(1, self.d_out // 2)

    def router_kernel(self) -> RouterKernel | None:
        kernel = self.router.kernel()
        return kernel if kernel is not None and kernel.rivals is not None else None

    def why_not_in_kernels(self) -> str | None:
        if self.searches_lists:
            return "the Triton kernels search the dictionary of one expert per token"
        if self.config.coherence > 0:
            return "the Triton kernels know no loss of coherence"
        if self.W_dec_MD.dtype != torch.float32:
            return f"the Triton kernels train weights of float32, not {str(self.W_dec_MD.dtype).removeprefix('torch.')}"
        columns = padded_columns(self.config.candidates)
        return why_not_in_kernels(Execution(Backend.triton), torch.float32, self.config.most, columns)

    def plan(self, tokens: int) -> Plan:
        plan = choose_plan(tokens, self.num_latents, self.num_experts, self.config.k, regime=Regime.sparse)
        return replace(plan, reason=plan.reason.replace("as asked", "what a search finds"))

    def prepare_step(self, tokens: int) -> Hashable:
        self.renew_gram = self.grams.is_due(self.W_dec_MD, self.num_experts, self.num_shared, tokens, refresh_tokens(self.config))
        return self.renew_gram, self.grams.of_step.data_ptr()

    def training_step(self, rows: Rows, operands: Mapping[str, Tensor], dead: "DeadLatents | None", dot: Dot, seed: Tensor) -> "StepTensors":
        from switch_kernels.gpu.gram import gram_matrices_
        from switch_kernels.gpu.pursuit_step import SearchSettings, SearchWeights

        router, gram_ECP = self.router_kernel(), self.grams.of_step
        assert router is not None and router.rivals is not None
        if self.renew_gram:
            gram_matrices_(gram_ECP, self.W_dec_MD, self.num_shared, dot)
        weights = SearchWeights(operands["W_dec_MD"], self.b_pre_D, router.W_ED, router.b_D, gram_ECP, self.theta)
        settings = SearchSettings(
            self.num_experts, self.num_shared, self.config.most, ridge_of(self), router.balance * self.d_out, router.is_trained, router.rivals, dot,
            self.plan(len(rows)),
        )  # fmt: skip
        return self._named(self._search_step(rows.x_TD.to(torch.float32), operands, weights, settings, seed, dead))

    def _search_step(
        self,
        x_TD: Tensor,
        operands: Mapping[str, Tensor],
        weights: "SearchWeights",
        settings: "SearchSettings",
        seed: Tensor,
        dead: "DeadLatents | None",
    ) -> "StepTensors":
        from switch_kernels.gpu.pursuit_step import pursuit_step

        return pursuit_step(x_TD, self.activation_scale, weights, settings, self.config.most // self.config.step, seed, dead)

    def follow_step(self, computed: "StepTensors", step: Tensor) -> None:
        from switch_kernels.gpu.thresholds import follow_l0_

        if self.config.stop:
            assert computed.active is not None
            tokens = len(computed.values_TK)
            follow_l0_(self.theta, self.threshold, computed.active, computed.gradients.square, tokens, self.config.k, self.config.eta, THRESHOLD_RATE)

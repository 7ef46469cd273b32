"""Two ways to compute what follows the selection, and where each wins."""

from dataclasses import dataclass
from enum import Enum


class Regime(Enum):
    """How decoding and the gradients are computed on a GPU."""

    dense = "dense"
    """Masked dense [N, F] latents through grouped matrix products: for small experts, at the speed of tensor cores."""
    sparse = "sparse"
    """Gathers of K rows per token, weight gradients latent by latent: for large experts and dense SAEs, at the speed of the L2 cache."""


class GradientMode(Enum):
    """Clipping needs the norm of the whole gradient before the first update."""

    buffered = "buffered"
    """Weight gradients are written once in the operands' precision, then read by the update."""
    recomputed = "recomputed"
    """Weight gradients are computed twice and never written: once for their norm, once inside the update. Sparse regime only."""


@dataclass(frozen=True)
class Plan:
    regime: Regime
    gradients: GradientMode
    reason: str

    def __str__(self) -> str:
        return f"{self.regime.value} latents, {self.gradients.value} gradients ({self.reason})"


# A masked dense product over F latents against a gather of K rows: one gather serves reconstruction and latent gradients, the weight gradients take
# another each. From 790 TFLOP/s and 5.5 TB/s of L2 (modelled; `make benchmark` on a GPU prints the crossover it measures).
DENSE_UP_TO = 112
# Gathering T * K pairs again (4 D bytes each, at 5.5 TB/s) against writing and reading two bf16 gradients (8 M D bytes at 4.3 TB/s).
RECOMPUTE_FROM = 0.39


def choose_plan(tokens: int, num_latents: int, num_experts: int, k: int, slots: int = 1, regime: Regime | None = None, why: str = "as asked") -> Plan:
    """The plan for T tokens, M latents, E experts, K active latents and S experts per token; `regime` overrides the choice, for the reason `why`.

    dense if S * F <= 112 * K, sparse otherwise; gradients recomputed if sparse and M > 0.39 * T * K, buffered otherwise.
    """
    width, limit = slots * num_latents // num_experts, DENSE_UP_TO * k
    if regime is None:
        regime = Regime.dense if width <= limit else Regime.sparse
        reason = f"{width} latents per token {'<=' if regime is Regime.dense else '>'} {DENSE_UP_TO} * k = {limit}"
    else:
        regime, reason = Regime(regime), why
    if regime is Regime.dense:
        return Plan(regime, GradientMode.buffered, reason)
    pairs = round(RECOMPUTE_FROM * tokens * k)
    many = num_latents > pairs
    return Plan(
        regime, GradientMode.recomputed if many else GradientMode.buffered, f"{reason}; M {'>' if many else '<='} {RECOMPUTE_FROM} * T * k = {pairs}"
    )

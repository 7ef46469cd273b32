"""How the kernels select, two ways to compute what follows, and where each wins."""

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


# What `switch_kernels.gpu.topk` searches, which keeps a row's candidates in registers.

MOST_COLUMNS = 32768
"""Columns that a program searches at once: 64 in the registers of each lane of 16 warps."""
LEVEL_COLUMNS = 256
"""What a second search costs beside the columns that it searches, as so many of them."""
GROUPS = (8, 32)
"""Columns per group maximum; few sizes, as each is a kernel of its own, where maxima are written and where they are searched."""


def padded_k(k: int) -> int:
    """The power of two that holds k."""
    return max(2, 1 << (k - 1).bit_length())


def searched_columns(F: int, k: int, group: int) -> tuple[int, int]:
    """Columns, padded, of the search among the maxima of groups, or among all where `group` is 1, and of that among the k best groups' columns."""
    return 1 << (-(-F // group) - 1).bit_length(), padded_k(k) * group if group > 1 else 0


def group_of(F: int, k: int) -> int:
    """Columns per group maximum in top-k of F columns: of `GROUPS` what searches fewest of them, cdiv(F, G) maxima then k * G; 1 for no groups.

    The k groups with the largest maxima hold the k largest columns, ties included: a column outside them is beaten by, or ties with and comes
    after, the maximum of each. At least k groups remain.
    """
    best, fewest = 1, searched_columns(F, k, 1)[0]
    for group in GROUPS:
        columns = sum(searched_columns(F, k, group)) + LEVEL_COLUMNS
        if -(-F // group) >= k and columns < fewest:
            best, fewest = group, columns
    return best


def can_select(F: int, k: int) -> bool:
    """Whether a program holds what top-k of F columns searches: up to 2^20 columns with k up to 1,024."""
    return max(searched_columns(F, k, group_of(F, k))) <= MOST_COLUMNS

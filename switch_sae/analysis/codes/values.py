"""What it costs to say how strongly latents are active, to a step Delta that all share.

Shapes: T tokens, K slots, M latents, B bins of expected values, Q levels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from switch_sae.rows import Shapes

BINS = 24
"""Laws of levels: one for each of so many ranges of what a value is expected to be."""
GATES = 4
"""Levels of the gate, equally frequent."""
HEAVY = 0.01
"""Share of a law whose tail no level is too large for."""
CENTRED = 8
"""Levels that have a centre of their own; all above share one."""
LN2 = math.log(2)


@dataclass(frozen=True, repr=False)
class Values(Shapes):
    """Values of active latents, slots by latent number, comparable between SAEs: each is the length of what its latent adds to the reconstruction."""

    value_TK: Tensor
    """>= 0; 0 in unused slots. The gate is inside."""
    latent_TK: Tensor
    gate_TK: Tensor
    """The factor of each slot's expert; 1 for shared latents and without experts."""
    gated_TK: Tensor
    """Which slots hold latents with a gate, bool: none for SAEs without one."""
    num_latents: int

    @property
    def active_TK(self) -> Tensor:
        return self.value_TK != 0

    def __getitem__(self, rows_T: Tensor) -> "Values":
        return Values(self.value_TK[rows_T], self.latent_TK[rows_T], self.gate_TK[rows_T], self.gated_TK[rows_T], self.num_latents)

    def gates(self) -> tuple[Tensor, Tensor]:
        """([T] the gate of each token, [T] whether one of its latents has one)."""
        gated_T = self.gated_TK.any(1)
        return self.gate_TK.gather(1, self.gated_TK.int().argmax(1, keepdim=True))[:, 0].where(gated_T, 1.0), gated_T


@dataclass(frozen=True, repr=False)
class Quantizer(Shapes):
    """level = floor(value / step); read back as (level + centre) step, centre being the mean of what was there on the documents that were fitted."""

    step: float
    centre_Q: Tensor

    @classmethod
    def fit(cls, values: Values, step: float) -> "Quantizer":
        scaled_P = values.value_TK[values.active_TK] / step
        level_P = scaled_P.floor().long().clamp(max=CENTRED)
        count_Q = level_P.bincount(minlength=CENTRED + 1).double()
        total_Q = torch.zeros(CENTRED + 1, dtype=torch.float64).index_add_(0, level_P, scaled_P.double() % 1)
        return cls(step, (total_Q + 0.5) / (count_Q + 1))

    def levels(self, values: Values) -> Tensor:
        """[T, K] int64, 0 in unused slots too."""
        return (values.value_TK / self.step).floor().long()

    def read(self, level_TK: Tensor, active_TK: Tensor) -> Tensor:
        """[T, K] what the receiver has; 0 in unused slots."""
        return (self.step * (level_TK + self.centre_Q.float()[level_TK.clamp(max=CENTRED)])).masked_fill(~active_TK, 0.0)


@dataclass(frozen=True, repr=False)
class LevelLaw(Shapes):
    """P(level | bin): frequencies, and where these are few or none a geometric law of the bin's mean with a little of 1 / ((q + 1) (q + 2)), which
    has as much weight as there are distinct levels (Witten & Bell 1991, method C). So every level can be coded, without an escape of its own."""

    count_BQ: Tensor
    weight_B: Tensor
    ratio_B: Tensor
    """Of the geometric law: (1 - r) r^q."""

    @classmethod
    def fit(cls, level_P: Tensor, bin_P: Tensor, bins: int) -> "LevelLaw":
        most = int(level_P.max()) if len(level_P) else 0
        count_BQ = torch.zeros(bins * (most + 1), dtype=torch.float64)
        count_BQ.index_add_(0, bin_P * (most + 1) + level_P, torch.ones(len(level_P), dtype=torch.float64))
        count_BQ = count_BQ.reshape(bins, most + 1)
        overall = float(level_P.double().mean()) if len(level_P) else 0.0
        mean_B = (count_BQ @ torch.arange(most + 1.0, dtype=torch.float64) + overall) / (count_BQ.sum(1) + 1)
        return cls(count_BQ, (count_BQ > 0).sum(1).clamp(min=1).double(), (mean_B / (1 + mean_B)).clamp(1e-9, 1 - 1e-9))

    @property
    def parameters(self) -> int:
        return int((self.count_BQ > 0).sum()) + len(self.ratio_B)

    def probability(self, level_P: Tensor, bin_P: Tensor) -> Tensor:
        """[P] float64."""
        seen_P = self.count_BQ[bin_P, level_P.clamp(max=self.count_BQ.shape[1] - 1)] * (level_P < self.count_BQ.shape[1])
        ratio_P, weight_P = self.ratio_B[bin_P], self.weight_B[bin_P]
        unseen_P = (1 - HEAVY) * (1 - ratio_P) * ratio_P**level_P + HEAVY / ((level_P + 1.0) * (level_P + 2.0))
        return (seen_P + weight_P * unseen_P) / (self.count_BQ.sum(1)[bin_P] + weight_P)


@dataclass(frozen=True, repr=False)
class ValueLaw(Shapes):
    """How values of one SAE are coded at one step. `way`: "after the gate", levels by what their latent has on average; "gate once", the gate's level
    first, then levels by the gate times what their latent has before it; "running", levels by their latent's average times how far the values before
    it in the same token were above theirs.
    """

    way: str
    quantizer: Quantizer
    mean_M: Tensor
    """What each latent has on average, before the gate where that is coded."""
    edge_B: Tensor
    """Inner edges of the bins, in logarithms of expected values."""
    levels: LevelLaw
    gate_edges: Tensor
    gate_levels: Tensor
    gate_log_share: Tensor

    @property
    def parameters(self) -> int:
        return len(self.mean_M) + len(self.edge_B) + self.levels.parameters + 3 * len(self.gate_levels)

    def bits(self, values: Values) -> Tensor:
        """[T] of a token's values, and of its gate where that is coded, float64."""
        level_TK, active_TK = self.quantizer.levels(values), values.active_TK
        bins_P = self.bins(values)[active_TK]
        bits_TK = torch.zeros(level_TK.shape, dtype=torch.float64)
        bits_TK[active_TK] = -self.levels.probability(level_TK[active_TK], bins_P).log() / LN2
        return bits_TK.sum(1) + self.gate_bits(values)

    def bins(self, values: Values) -> Tensor:
        """[T, K] the law of each slot, from what the receiver has by then."""
        return torch.bucketize(_expected(self, values).log(), self.edge_B)

    def gate_bits(self, values: Values) -> Tensor:
        """[T] of the gate, 0 for tokens without a gated latent or where it is not coded."""
        gate_T, gated_T = values.gates()
        if self.way != "gate once":
            return torch.zeros(len(gated_T), dtype=torch.float64)
        return torch.where(gated_T, -self.gate_log_share[torch.bucketize(gate_T, self.gate_edges)] / LN2, 0.0)


WAYS = ("after the gate", "gate once", "running")


def fit_values(values: Values, step: float, ways: tuple[str, ...] = WAYS) -> ValueLaw:
    """The shortest of the ways on these tokens."""
    quantizer = Quantizer.fit(values, step)
    laws = [_fit(values, quantizer, way) for way in ways if way != "gate once" or bool(values.gated_TK.any())]
    return min(laws, key=lambda law: float(law.bits(values).sum()))


def _fit(values: Values, quantizer: Quantizer, way: str) -> ValueLaw:
    active_TK = values.active_TK
    edges = levels = share = torch.zeros(0)
    before_TK = values.value_TK
    if way == "gate once":
        gate_T, gated_T = values.gates()
        gate_T = gate_T[gated_T]
        edges = gate_T.quantile(torch.arange(1, GATES) / GATES)
        place_T = torch.bucketize(gate_T, edges)
        count_G = place_T.bincount(minlength=GATES).double()
        levels = ((torch.zeros(GATES).index_add_(0, place_T, gate_T) + 0.5 * gate_T.mean()) / (count_G + 0.5)).float()
        share = ((count_G + 0.5) / (len(gate_T) + GATES / 2)).log()
        before_TK = before_TK / values.gate_TK
    value_P, latent_P = before_TK[active_TK].double(), values.latent_TK[active_TK]
    overall = value_P.mean() if len(value_P) else torch.tensor(1.0)
    total_M = torch.zeros(values.num_latents, dtype=torch.float64).index_add_(0, latent_P, value_P)
    mean_M = ((total_M + 2 * overall) / (latent_P.bincount(minlength=values.num_latents) + 2)).float()
    law = ValueLaw(way, quantizer, mean_M, torch.zeros(0), LevelLaw.fit(latent_P[:0], latent_P[:0], 1), edges, levels, share)
    expected_P = _expected(law, values)[active_TK].log()
    edge_B = expected_P[:: max(1, len(expected_P) // 100_000)].quantile(torch.arange(1, BINS) / BINS) if len(expected_P) else torch.zeros(BINS - 1)
    level_P = quantizer.levels(values)[active_TK]
    fitted = LevelLaw.fit(level_P, torch.bucketize(expected_P, edge_B), BINS)
    return ValueLaw(way, quantizer, mean_M, edge_B, fitted, edges, levels, share)


def _expected(law: ValueLaw, values: Values) -> Tensor:
    """[T, K] > 0: what a slot's value is expected to be, from the latents' averages and what was coded before it."""
    mean_TK = law.mean_M[values.latent_TK]
    if law.way == "gate once":
        level_T = law.gate_levels[torch.bucketize(values.gates()[0], law.gate_edges)]
        return torch.where(values.gated_TK, mean_TK * level_T[:, None], mean_TK)
    if law.way == "running":
        read_TK = law.quantizer.read(law.quantizer.levels(values), values.active_TK)
        usual_TK = mean_TK.masked_fill(~values.active_TK, 0.0)
        typical = law.mean_M.mean()
        above_TK = (typical + read_TK.cumsum(1) - read_TK) / (typical + usual_TK.cumsum(1) - usual_TK)
        return mean_TK * above_TK.clamp(min=1e-3)
    return mean_TK

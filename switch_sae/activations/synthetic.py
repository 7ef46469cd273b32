"""Activations with a known dictionary and routable structure: features common to all topics, plus a block of features per topic.

Every row has one topic. With one expert per topic and the common features shared, the best router and the best split of latents are known,
so recovery and routing can be scored against the truth.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource, EvaluationSet
from switch_sae.activations.buffer import seeded
from switch_sae.checks import Settings, all_at_least
from switch_sae.rows import Rows

_EVALUATION_CHUNK = 4096


@dataclass(frozen=True)
class Truth:
    """The world behind a `SyntheticSource`. Shapes: G features (common ones first, then topic by topic), D activation size."""

    dictionary_GD: Tensor
    """Unit rows."""
    topic_G: Tensor
    """The topic each feature belongs to, int64; -1 for common features."""
    probability_G: Tensor
    """How often a feature fires: a common one in any row, a topic's in rows of that topic when nothing leaks."""
    bias_D: Tensor
    """Added to every row."""

    @property
    def is_common_G(self) -> Tensor:
        return self.topic_G < 0


@dataclass(frozen=True)
class RowTruth:
    """What made the rows of an evaluation set, in their order."""

    topic_T: Tensor
    """int64 in [0, topics)."""
    coefficients_TG: Tensor
    """>= 0; `coefficients_TG @ dictionary_GD + bias_D` is x_TD without its noise."""


class SyntheticSource(ActivationSource):
    """x = sum_i c_i d_i + bias + noise, with d_i random unit vectors and c_i = |mean + std * normal| where feature i fires.

    Features fire independently: the common ones in any row, those of the row's topic in that row; with chance `leakage` a topic's feature is
    replaced by its counterpart in another topic. Batch number n is a function of (config, seed, n), so resuming is exact and immediate.
    """

    @dataclass
    class Config(Settings):
        d_in: int = 64
        common: int = 32
        """Features that fire under every topic; 0 for none."""
        topics: int = 8
        """1 makes data without routable structure."""
        per_topic: int = 28
        common_active: float = 4.0
        """Expected number of common features in a row."""
        topic_active: float = 4.0
        """Expected number of topic features in a row."""
        zipf: float = 1.0
        """Common feature r fires in proportion to r^-zipf; 0 makes all alike."""
        topic_skew: float = 0.0
        """Topic t is chosen in proportion to t^-topic_skew; 0 makes all alike."""
        leakage: float = 0.0
        """Chance that a topic feature comes from another topic."""
        magnitude_mean: float = 1.0
        magnitude_std: float = 0.25
        noise: float = 0.01
        """Standard deviation of the noise in each dimension."""
        bias: float = 1.0
        """Length of the bias vector."""
        world_seed: int = 0
        """Chooses the dictionary, the bias and the evaluation rows."""
        seed: int = 0
        """Chooses the training rows."""

        def __post_init__(self) -> None:
            all_at_least(self, d_in=1, common=0, topics=1, per_topic=1, world_seed=0, seed=0)
            all_at_least(self, zipf=0, topic_skew=0, magnitude_std=0, noise=0, bias=0)
            if not 0 < self.magnitude_mean < math.inf:
                raise ValueError(f"magnitude_mean={self.magnitude_mean} must be above 0.")
            for active, available in (("common_active", "common"), ("topic_active", "per_topic")):
                if not 0 <= getattr(self, active) <= getattr(self, available):
                    raise ValueError(
                        f"{active}={getattr(self, active)} must lie between 0 and {available}={getattr(self, available)}: no more features can fire."
                    )
            if not 0 <= self.leakage <= 1:
                raise ValueError(f"leakage={self.leakage} is a chance and must lie between 0 and 1.")
            if self.leakage and self.topics == 1:
                raise ValueError(f"leakage={self.leakage} needs another topic to leak from, but topics=1. Set leakage=0 or topics=2.")

    def __init__(self, config: Config, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.config = config
        self.batch_size = batch_size
        self.d_in = config.d_in
        self._batch = 0
        features = config.common + config.topics * config.per_topic
        generator = seeded("synthetic world", config.world_seed)
        dictionary_GD = torch.nn.functional.normalize(torch.randn(features, config.d_in, generator=generator), dim=1)
        bias_D = torch.nn.functional.normalize(torch.randn(config.d_in, generator=generator), dim=0) * config.bias
        common_G = firing_probabilities(config.common, config.common_active, config.zipf)
        topic_G = torch.full((config.topics * config.per_topic,), config.topic_active / config.per_topic)
        owner_G = torch.cat([torch.full((config.common,), -1), torch.arange(config.topics).repeat_interleave(config.per_topic)])
        self._truth = Truth(dictionary_GD, owner_G, torch.cat([common_G, topic_G]), bias_D)
        self._topic_weights = torch.arange(1, config.topics + 1, dtype=torch.float64) ** -config.topic_skew

    def truth(self) -> Truth:
        return self._truth

    def __next__(self) -> Rows:
        x_TD, _ = self._rows(self.batch_size, seeded("synthetic rows", self.config.seed, self.batch_size, self._batch))
        self._batch += 1
        return Rows.of(x_TD)

    def _rows(self, rows: int, generator: torch.Generator) -> tuple[Tensor, RowTruth]:
        config, truth = self.config, self._truth
        P = config.per_topic
        topic_T = torch.multinomial(self._topic_weights, rows, replacement=True, generator=generator)
        common_TG = torch.rand(rows, config.common, generator=generator) < truth.probability_G[: config.common]
        own_TP = torch.rand(rows, P, generator=generator) < config.topic_active / P
        leaks_TP = torch.rand(rows, P, generator=generator) < config.leakage
        elsewhere_TP = torch.randint(1, max(config.topics, 2), (rows, P), generator=generator)
        from_TP = (topic_T[:, None] + leaks_TP * elsewhere_TP) % config.topics
        fires_TG = torch.zeros(rows, len(truth.topic_G))
        fires_TG[:, : config.common] = common_TG.float()
        fires_TG.scatter_(1, config.common + from_TP * P + torch.arange(P), own_TP.float())
        magnitude_TG = (config.magnitude_mean + config.magnitude_std * torch.randn(fires_TG.shape, generator=generator)).abs()
        coefficients_TG = fires_TG * magnitude_TG
        noise_TD = config.noise * torch.randn(rows, config.d_in, generator=generator)
        return coefficients_TG @ truth.dictionary_GD + truth.bias_D + noise_TD, RowTruth(topic_T, coefficients_TG)

    def evaluation_set(self, rows: int) -> EvaluationSet:
        """Exactly `rows` rows from a stream of their own, each a document of its own; a longer set begins with the shorter one."""
        x_TD = torch.cat([chunk_TD for chunk_TD, _ in self._evaluation_chunks(rows)])[:rows]
        return EvaluationSet(x_TD, torch.arange(rows))

    def evaluation_truth(self, rows: int) -> RowTruth:
        """Topics and coefficients of `evaluation_set(rows)`."""
        truths = [truth for _, truth in self._evaluation_chunks(rows)]
        return RowTruth(torch.cat([t.topic_T for t in truths])[:rows], torch.cat([t.coefficients_TG for t in truths])[:rows])

    def _evaluation_chunks(self, rows: int) -> list[tuple[Tensor, RowTruth]]:
        if rows < 1:
            raise ValueError(f"an evaluation set of {rows} rows cannot be made. Ask for at least 1.")
        chunks = range(-(-rows // _EVALUATION_CHUNK))
        return [self._rows(_EVALUATION_CHUNK, seeded("synthetic evaluation", self.config.world_seed, chunk)) for chunk in chunks]

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._batch, "batch_size": self.batch_size, "config": vars(self.config).copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state that another config or batch size made: its rows would be different ones."""
        mine = {"batch_size": self.batch_size, **vars(self.config)}
        saved = {"batch_size": state["batch_size"], **state["config"]}
        differs = [f"{key}: saved {saved.get(key)!r}, now {mine.get(key)!r}" for key in sorted({*saved, *mine}) if saved.get(key) != mine.get(key)]
        if differs:
            raise ValueError(f"this source cannot go on where the saved one stopped; they differ in {'; '.join(differs)}. Restore these.")
        self._batch = int(state["batch"])

    def describe(self) -> dict[str, Any]:
        return {"source": "synthetic", **vars(self.config), "features": len(self._truth.topic_G)}


def firing_probabilities(features: int, active: float, zipf: float) -> Tensor:
    """p_r proportional to r^-zipf with sum `active`, none above 1: what the most frequent ones cannot take goes to the rest in proportion."""
    weight_G = torch.arange(1, features + 1, dtype=torch.float64) ** -zipf
    certain = 0
    while certain < features:
        p_G = weight_G[certain:] / weight_G[certain:].sum() * (active - certain)
        if p_G[0] <= 1:
            return torch.cat([torch.ones(certain, dtype=torch.float64), p_G]).float()
        certain += int((p_G > 1).sum())
    return torch.ones(features)

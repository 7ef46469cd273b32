"""What latents mean, as far as the tokens at and before a position can tell: a judge that is the same on every machine and needs no other model."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from switch_sae.activations.base import EvaluationSet
from switch_sae.metrics.clusters import spherical_kmeans
from switch_sae.metrics.forward import sae_outputs
from switch_sae.metrics.probe import Halves, Probe, Quotients
from switch_sae.models import SparseAutoencoder, SparseLatents
from switch_sae.rows import NormLimit, Rows

BAG = 8
GROUPS = (slice(BAG, BAG + 1), slice(BAG - 1, BAG), slice(0, BAG))
"""Columns of `TextRows.token_TB` that each group of features reads: the current token, the previous one, all eight before."""
SUBSETS = torch.tensor([[bool(n & 1), bool(n & 2), bool(n & 4)] for n in range(1, 8)], dtype=torch.float64)
"""[7, groups]: which groups a latent's judge adds up."""
LATENTS, LEAST_FIT, LEAST_SCORE = 300, 40, 20
MOST_FIT, MOST_SCORE = 200, 50
PRIOR = 1.0
"""So many made-up positives, distributed as the negatives are, are added to the real ones."""
CLUSTERS, TRIES, BLOCK = 24, 16, 64


class Meaning(Probe):
    """Balanced accuracy (TPR + TNR) / 2 of a naive Bayes judge that guesses from tokens whether a latent fires: the mean over 300 latents, drawn
    among those with at least 40 firings on documents A and 20 on documents B (`EvaluationSet.halves`); all of them where there are fewer.

    score(t) = sum over groups of sum over their tokens v of log P(v | fires) / P(v), for the groups current token, previous token, and the eight
    before as a bag. Every other firing on A (at most 200, evenly over values) fits P(v | fires); as many of the others, with as many negatives,
    choose the groups and the threshold; at most 50 firings on B, evenly over values, with as many negatives, are scored.

    judge_easy: negatives from anywhere. judge_hard: each negative is a row in the cluster of a positive (spherical k-means of A's centred x, 24
    clusters, the same for all SAEs), and P(v) is that of the positives' clusters: what a router alone explains counts for nothing. judge_null: the
    mean of both with codes permuted over rows, 0.5 for any SAE. 95 % intervals over latents. judged_latents of eligible_latents were drawn. The
    judge knows tokens only: a low score need not mean that a latent means nothing. Rows that are outliers are left out.
    """

    @classmethod
    def applies(cls, evaluation_set: EvaluationSet, halves: Halves | None) -> bool:
        """Tokens, and documents to choose on that are not scored."""
        return evaluation_set.tokens_CS is not None and (halves is not None or len(evaluation_set.document_T.unique()) > 1)

    def __init__(self, evaluation_set: EvaluationSet, halves: Halves | None) -> None:
        self.evaluation_set, self.given = evaluation_set, halves

    @cached_property
    def halves(self) -> "tuple[TextRows, TextRows]":
        return TextRows.of(self.given or replace(self.evaluation_set, dropped_TD=None).halves())

    def measure(self, sae: SparseAutoencoder) -> Quotients:
        fit, score = self.halves
        codes = [Firings.of(sae, half.rows) for half in (fit, score)]
        count_A, count_B = (firings.latent_P.bincount(minlength=sae.num_latents) for firings in codes)
        eligible_M = (count_A >= LEAST_FIT) & (count_B >= LEAST_SCORE)
        generator = torch.Generator().manual_seed(0)
        latent_L = (drawn_M := torch.randperm(sae.num_latents, generator=generator))[eligible_M[drawn_M]][:LATENTS]
        plain = {"judged_latents": float(len(latent_L)), "eligible_latents": float(eligible_M.sum())}
        if not len(latent_L):
            return Quotients({}, {}, 0.0, plain)
        codes = [firings.of_latents(latent_L, sae.num_latents) for firings in codes]
        real = _judged(fit, score, codes[0], codes[1], len(latent_L))
        codes = [firings.permuted(len(half), generator) for firings, half in zip(codes, (fit, score), strict=True)]
        null = _judged(fit, score, codes[0], codes[1], len(latent_L))
        above = {"judge_easy": real[0], "judge_hard": real[1], "judge_null": (null[0] + null[1]) / 2}
        known = {name: accuracy_L.isfinite().double() for name, accuracy_L in above.items()}
        return Quotients({name: accuracy_L.nan_to_num(0.0) for name, accuracy_L in above.items()}, known, float(len(latent_L)), plain)


@dataclass(frozen=True)
class TextRows:
    """Rows that are no outliers, with the tokens at and before each, and the cluster of each."""

    rows: Rows
    token_TB: Tensor
    """[T, 9] the eight tokens before, then the row's own; numbered from 0, `no_token` before the start of the context."""
    no_token: int
    cluster_T: Tensor
    by_cluster_T: Tensor
    """Rows in order of their clusters."""
    start_C: Tensor
    """[clusters + 1] where each cluster begins in that order."""

    @classmethod
    def of(cls, halves: Halves) -> "tuple[TextRows, TextRows]":
        """Limits, mean and clusters are those of the first half."""
        limit = NormLimit.of(halves[0].rows)
        inliers = [limit.inlier_T(half.rows).cpu() for half in halves]
        tokens = [_before_and_at(*half.text())[inlier_T] for half, inlier_T in zip(halves, inliers, strict=True)]
        known = torch.cat([part.flatten() for part in tokens]).unique()
        known = known[known >= 0]
        x = [half.x_TD[inlier_T.to(half.x_TD.device)].cpu().float() for half, inlier_T in zip(halves, inliers, strict=True)]
        mean_D = x[0].mean(0)
        clusters = spherical_kmeans(x[0] - mean_D, CLUSTERS)
        made = []
        for half, inlier_T, token_TB, x_TD in zip(halves, inliers, tokens, x, strict=True):
            token_TB = torch.where(token_TB < 0, len(known), torch.searchsorted(known, token_TB))
            cluster_T = clusters.nearest(x_TD - mean_D)
            start_C = torch.cat([torch.zeros(1, dtype=torch.int64), cluster_T.bincount(minlength=len(clusters.centre_CD)).cumsum(0)])
            rows = half.rows[inlier_T.to(half.x_TD.device)]
            made.append(cls(rows, token_TB, len(known), cluster_T, cluster_T.argsort(stable=True), start_C))
        return made[0], made[1]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def token_shares(self) -> list[Tensor]:
        """[clusters, V] for each group: P(v) in each cluster, drawn towards P(v) in all rows by `PRIOR`, and that towards equal shares."""
        shares, clusters = [], len(self.start_C) - 1
        for group in GROUPS:
            token_TB = self.token_TB[:, group]
            count_CV = _counts(self.cluster_T[:, None].expand_as(token_TB), token_TB, clusters, self.no_token + 1)
            all_V = (count_CV.sum(0) + PRIOR / (self.no_token + 1)) / (count_CV.sum() + PRIOR)
            shares.append((count_CV + PRIOR * all_V) / (count_CV.sum(1, keepdim=True) + PRIOR))
        return shares


@dataclass(frozen=True)
class Firings:
    """(row, latent, value) of everything that fires, 12 bytes each."""

    row_P: Tensor
    latent_P: Tensor
    value_P: Tensor

    @classmethod
    def of(cls, sae: SparseAutoencoder, rows: Rows) -> "Firings":
        """In order of rows."""
        parts = []
        for chosen, _, output in sae_outputs(sae, rows):
            latents = output.latents
            row_P, slot_P = latents.values.nonzero(as_tuple=True)
            latent_P = latents.indices_TK[row_P, slot_P] if isinstance(latents, SparseLatents) else slot_P
            values = latents.values[row_P, slot_P].float()
            parts.append(((row_P + chosen.start).int().cpu(), latent_P.int().cpu(), values.cpu()))
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def of_latents(self, latent_L: Tensor, num_latents: int) -> "Firings":
        """Those of some latents, which are numbered from 0 then."""
        place_M = torch.full((num_latents,), -1)
        place_M[latent_L] = torch.arange(len(latent_L))
        place_P = place_M[self.latent_P.long()]
        chosen = place_P >= 0
        return Firings(self.row_P[chosen].long(), place_P[chosen], self.value_P[chosen])

    def permuted(self, rows: int, generator: torch.Generator) -> "Firings":
        """Every row with the whole code of another."""
        return Firings(torch.randperm(rows, generator=generator)[self.row_P], self.latent_P, self.value_P)

    def by_value(self, latents: int) -> tuple[Tensor, Tensor]:
        """(rows in order of latents, the largest values first and ties by row; firings of each latent [L])."""
        order = self.row_P.argsort(stable=True)
        order = order[self.value_P[order].argsort(descending=True, stable=True)]
        order = order[self.latent_P[order].argsort(stable=True)]
        return self.row_P[order], self.latent_P.bincount(minlength=latents)


@dataclass(frozen=True)
class Drawn:
    """Rows drawn for each latent, [L, R]; a slot where `is_real` is False holds none."""

    row_LR: Tensor
    is_real_LR: Tensor

    @classmethod
    def evenly(cls, row_P: Tensor, count_L: Tensor, most: int, step: int = 1, first: int = 0) -> "Drawn":
        """At most so many of every latent's rows `first`, `first + step`, ..., evenly spaced."""
        of_L = (count_L - first + step - 1) // step
        taken_L, slot_R = of_L.clamp_max(most), torch.arange(most)
        is_real_LR = slot_R < taken_L[:, None]
        place_LR = first + step * (slot_R * of_L[:, None] // taken_L[:, None].clamp_min(1))
        start_L = count_L.cumsum(0) - count_L
        return cls(row_P[torch.where(is_real_LR, start_L[:, None] + place_LR, 0)], is_real_LR)

    def negatives(self, half: TextRows, firings: Firings, hard: bool, generator: torch.Generator) -> "Drawn":
        """For every row one on which the latent does not fire: of all rows, or (`hard`) of those in the same cluster. Random ones are tried until
        one does not fire, at most `TRIES`; then there is none."""
        share_LRN = torch.rand(*self.row_LR.shape, TRIES, generator=generator, dtype=torch.float64)
        if hard:
            cluster_LR = half.cluster_T[self.row_LR]
            start_LR, end_LR = half.start_C[cluster_LR], half.start_C[cluster_LR + 1]
            candidate_LRN = half.by_cluster_T[start_LR[..., None] + (share_LRN * (end_LR - start_LR)[..., None]).long()]
        else:
            candidate_LRN = (share_LRN * len(half)).long()
        fired = (firings.latent_P * len(half) + firings.row_P).sort().values
        asked_LRN = torch.arange(len(self.row_LR))[:, None, None] * len(half) + candidate_LRN
        fires_LRN = fired[torch.searchsorted(fired, asked_LRN).clamp_max(len(fired) - 1)] == asked_LRN
        first_LR = fires_LRN.byte().argmin(dim=2, keepdim=True)
        does_LR = fires_LRN.gather(2, first_LR)[..., 0]
        return Drawn(candidate_LRN.gather(2, first_LR)[..., 0], self.is_real_LR & ~does_LR)

    def __getitem__(self, block: slice) -> "Drawn":
        return Drawn(self.row_LR[block], self.is_real_LR[block])


@dataclass(frozen=True)
class Judge:
    """Of some latents: log odds of every token in each group, the groups that count, and the threshold."""

    odds: list[Tensor]
    """[L, V] for each group."""
    uses_LG: Tensor
    threshold_L: Tensor

    none: ClassVar[float] = torch.inf

    @classmethod
    def fit(cls, half: TextRows, fit: Drawn, positives: Drawn, negatives: Drawn, hard: bool) -> "Judge":
        odds = _log_odds(half, fit, hard)
        scores = [_scores(odds, half, drawn) @ SUBSETS.T for drawn in (positives, negatives)]
        real = [drawn.is_real_LR for drawn in (positives, negatives)]
        value_LSR = torch.cat([score.masked_fill(~is_real[..., None], cls.none) for score, is_real in zip(scores, real, strict=True)], 1).transpose(
            1, 2
        )
        share_LR = torch.cat([-_weights(real[0]), _weights(real[1])], dim=1)  # what a threshold above a row does to TPR + TNR
        value_LSR, order_LSR = value_LSR.sort(dim=2, stable=True)
        gain_LSR = share_LR[:, None].expand_as(value_LSR).gather(2, order_LSR).cumsum(2)[..., :-1]
        below, above = value_LSR[..., :-1], value_LSR[..., 1:]
        gain_LSR = gain_LSR.masked_fill(~((below < above) & above.isfinite()), -torch.inf)  # a threshold stands between two different scores
        best_L = gain_LSR.flatten(1).argmax(dim=1)
        threshold_L = ((below + above) / 2).flatten(1).gather(1, best_L[:, None])[:, 0]
        return cls(odds, SUBSETS[best_L // gain_LSR.shape[2]], threshold_L)

    def balanced_accuracy(self, half: TextRows, positives: Drawn, negatives: Drawn) -> Tensor:
        """[L] (TPR + TNR) / 2; NaN for a latent without a negative."""
        said = [(_scores(self.odds, half, drawn) * self.uses_LG[:, None]).sum(2) > self.threshold_L[:, None] for drawn in (positives, negatives)]
        right = [said[0] & positives.is_real_LR, ~said[1] & negatives.is_real_LR]
        of = [positives.is_real_LR.sum(1), negatives.is_real_LR.sum(1)]
        return sum(((right[n].sum(1).double() / of[n]) for n in range(2)), torch.zeros(())) / 2


def _judged(fit: TextRows, score: TextRows, on_fit: Firings, on_score: Firings, latents: int) -> tuple[Tensor, Tensor]:
    """(easy, hard) balanced accuracy of each latent, [L] each."""
    generator = torch.Generator().manual_seed(1)
    row_P, count_L = on_fit.by_value(latents)
    to_fit, to_choose = (Drawn.evenly(row_P, count_L, MOST_FIT, 2, first) for first in range(2))
    to_score = Drawn.evenly(*on_score.by_value(latents), MOST_SCORE)
    accuracies = []
    for hard in (False, True):
        unlike_choose, unlike_score = to_choose.negatives(fit, on_fit, hard, generator), to_score.negatives(score, on_score, hard, generator)
        parts = []
        for start in range(0, latents, BLOCK):
            block = slice(start, start + BLOCK)
            judge = Judge.fit(fit, to_fit[block], to_choose[block], unlike_choose[block], hard)
            parts.append(judge.balanced_accuracy(score, to_score[block], unlike_score[block]))
        accuracies.append(torch.cat(parts))
    return accuracies[0], accuracies[1]


def _log_odds(half: TextRows, fit: Drawn, hard: bool) -> list[Tensor]:
    """log P(v | fires) / P(v), [L, V] for each group, P(v | fires) = (count + PRIOR P(v)) / (n + PRIOR)."""
    latent_LR = torch.arange(len(fit.row_LR))[:, None].expand_as(fit.row_LR)
    latent_P, row_P = latent_LR[fit.is_real_LR], fit.row_LR[fit.is_real_LR]
    cluster_LC = _counts(latent_P, half.cluster_T[row_P], len(latent_LR), len(half.start_C) - 1)
    if not hard:
        cluster_LC = half.start_C.diff().double().expand_as(cluster_LC)
    share_LC = cluster_LC / cluster_LC.sum(1, keepdim=True)
    odds = []
    for group, share_CV in zip(GROUPS, half.token_shares, strict=True):
        token_PB = half.token_TB[row_P, group]
        count_LV = _counts(latent_P[:, None].expand_as(token_PB), token_PB, len(latent_LR), half.no_token + 1)
        odds_LV = torch.log(count_LV / (share_LC @ share_CV) + PRIOR)
        odds.append(odds_LV - torch.log(count_LV.sum(1, keepdim=True) + PRIOR))
    return odds


def _scores(odds: list[Tensor], half: TextRows, drawn: Drawn) -> Tensor:
    """[L, R, groups]."""
    token_LRB = half.token_TB[drawn.row_LR]
    latents = len(token_LRB)
    by_group = [odds_LV.gather(1, token_LRB[..., group].reshape(latents, -1)) for odds_LV, group in zip(odds, GROUPS, strict=True)]
    return torch.stack([score.view(*drawn.row_LR.shape, -1).sum(2) for score in by_group], dim=2)


def _counts(row_P: Tensor, column_P: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] how often each pair occurs, float64."""
    return (row_P * columns + column_P).flatten().bincount(minlength=rows * columns).view(rows, columns).double()


def _weights(is_real_LR: Tensor) -> Tensor:
    """1 / number of real slots in them, 0 elsewhere; float64."""
    return is_real_LR.double() / is_real_LR.sum(1, keepdim=True).clamp_min(1)


def _before_and_at(tokens_CS: Tensor, keep_CS: Tensor) -> Tensor:
    """[T, 9] tokens of each kept position, the eight before it first; -1 where the context has not begun."""
    start = torch.full((len(tokens_CS), BAG), -1, dtype=torch.int64)
    return torch.cat([start, tokens_CS.long()], dim=1).unfold(1, BAG + 1, 1)[keep_CS]

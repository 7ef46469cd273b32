"""What it costs to say which latents are active: codes of supports that a receiver can decode.

Shapes: T tokens, K slots, L latents that a token can choose from, C classes, G groups (routes), J = most + 1 numbers of active latents.

A code is a law of the support alone, never of the activation, which the receiver does not have. The route follows from the support, so it is paid
for as part of it: L(support) = L(route) + L(support | route).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.codes.exact_k import SMALL, about_log_elementary, expected_counts, fitted_log_odds
from switch_sae.analysis.observed import Sample, Seen
from switch_sae.rows import Shapes

PRIORS = (32.0, 128.0, 512.0)
"""How many tokens the law of a group may weigh in the law of its classes; one is chosen on documents that are not scored."""
LN2 = math.log(2)


@dataclass(frozen=True, repr=False)
class Supports(Shapes):
    """The active latents of tokens in reading order, numbered anew within each group."""

    local_TK: Tensor
    """int64, rising: shared latents first, then those of the token's expert; L in unused slots."""
    group_T: Tensor
    """The route: the expert of the active latents, the last group for tokens that have none but shared ones. Without experts 0."""
    context_T: Tensor
    num_latents: int
    """L."""
    num_groups: int
    most: int
    """The most latents that a token has active; with the other sizes, what a receiver knows beforehand."""
    shared: int = 0

    @property
    def count_T(self) -> Tensor:
        return (self.local_TK < self.num_latents).sum(1)

    def __len__(self) -> int:
        return len(self.local_TK)

    def __getitem__(self, rows_T: Tensor) -> "Supports":
        """Those of some rows, in reading order."""
        parts = (self.local_TK[rows_T], self.group_T[rows_T], self.context_T[rows_T])
        return Supports(*parts, self.num_latents, self.num_groups, self.most, self.shared)

    def chains(self) -> Tensor:
        """[contexts, longest] rows of each context in reading order, -1 behind its end."""
        length_X = self.context_T.unique_consecutive(return_counts=True)[1]
        place_XP = torch.arange(int(length_X.max()))[None]
        return torch.where(place_XP < length_X[:, None], (length_X.cumsum(0) - length_X)[:, None] + place_XP, -1)


def order_of_slots(seen: Seen) -> Tensor:
    """[T, K] slots by their latent's number, unused ones last. As encoders give them, the order of slots tells which value is the largest."""
    indices_TK = torch.where(seen.latents.values_TK != 0, seen.latents.indices_TK, seen.latents.num_latents)
    return indices_TK.argsort(dim=1, stable=True)


def supports_of(sample: Sample, seen: Seen) -> Supports:
    """The supports of an SAE. Raises ValueError where a token uses latents of several experts."""
    row, order_TK = seen.row, order_of_slots(seen)
    values_TK, indices_TK = seen.latents.values_TK.gather(1, order_TK), seen.latents.indices_TK.gather(1, order_TK)
    active_TK, most = values_TK != 0, max(1, int((values_TK != 0).sum(1).max()))
    if row.num_experts == 1:
        local_TK = torch.where(active_TK, indices_TK, row.num_latents)
        return Supports(local_TK, torch.zeros(len(sample), dtype=torch.int64), sample.context_T, row.num_latents, 1, most)
    expert_TK = torch.where(active_TK, seen.expert_M[indices_TK], -1)
    group_T = expert_TK.amax(1)
    if bool(((expert_TK != group_T[:, None]) & (expert_TK >= 0)).any()):
        raise ValueError(
            f"{row.name} takes {row.kind.experts_per_token} experts per token; description lengths are known for one, whose latents say which it is. "
            "Leave it out."
        )
    size = row.num_shared + row.latents_per_expert
    local_TK = torch.where(indices_TK < row.num_shared, indices_TK, row.num_shared + (indices_TK - row.num_shared) % row.latents_per_expert)
    local_TK = torch.where(active_TK, local_TK, size)
    group_T = torch.where(group_T < 0, row.num_experts, group_T)
    return Supports(local_TK, group_T, sample.context_T, size, row.num_experts + 1, most, row.num_shared)


@dataclass(frozen=True, repr=False)
class SupportLaw(Shapes):
    """P(support) = sum_c P(c | earlier supports) P(j | c) P(set | c, j): a class, then how many latents are active, then which.

    Each class belongs to a group. With one class per group it is the route. With several the receiver never learns which one it was: their
    probabilities add up.
    """

    log_odds_CL: Tensor
    """ln o; a set of j has the probability prod o_i / e_j(o) (`exact_k`)."""
    log_e_CJ: Tensor
    log_number_CJ: Tensor
    """ln P(j | c)."""
    log_share_C: Tensor
    """ln P(c) at a context's start, or everywhere for a law that does not look back."""
    log_step_CC: Tensor | None
    """[from, to] ln P(c | the class of the token before); None for a law that does not look back."""
    group_C: Tensor

    @property
    def parameters(self) -> int:
        """Numbers that a receiver must be told."""
        steps = 0 if self.log_step_CC is None else self.log_step_CC.numel()
        return self.log_odds_CL.numel() + self.log_number_CJ.numel() + len(self.log_share_C) + steps

    def log_likelihood(self, supports: Supports) -> Tensor:
        """[T, C] ln P(support | c), -inf for classes of other groups."""
        table_LC = F.pad(self.log_odds_CL.T, (0, 0, 0, 1))
        log_TC = F.embedding_bag(supports.local_TK, table_LC, mode="sum")
        log_TC += (self.log_number_CJ - self.log_e_CJ).T[supports.count_T]
        return log_TC.masked_fill(self.group_C != supports.group_T[:, None], -math.inf)

    def bits(self, supports: Supports) -> tuple[Tensor, Tensor]:
        """([T] of the route, [T] of the support once the route is known), float64."""
        log_TC = self.log_likelihood(supports)
        before_TC, _ = self.filtered(supports, log_TC)
        route_T = before_TC.masked_fill(self.group_C != supports.group_T[:, None], -math.inf).logsumexp(1)
        if int(self.group_C.max()) == 0:
            route_T = torch.zeros_like(route_T)  # there is one group, so it says nothing
        return (-route_T) / LN2, (route_T - (before_TC + log_TC).logsumexp(1)) / LN2

    def filtered(self, supports: Supports, log_TC: Tensor) -> tuple[Tensor, Tensor]:
        """([T, C] ln P(c | earlier supports), ln P(c | these and its own)): the forward pass of a hidden Markov model (Rabiner 1989)."""
        before_TC = self.log_share_C.expand_as(log_TC)
        if self.log_step_CC is None:
            return before_TC, (before_TC + log_TC).log_softmax(1)
        before_TC, after_TC = before_TC.clone(), torch.empty_like(log_TC)
        for place, row_X in enumerate(supports.chains().T):
            row_X = row_X[row_X >= 0]
            if place:
                before_TC[row_X] = _log_matmul(after_TC[row_X - 1], self.log_step_CC)
            after_TC[row_X] = (before_TC[row_X] + log_TC[row_X]).log_softmax(1)
        return before_TC, after_TC

    def posterior(self, supports: Supports) -> tuple[Tensor, Tensor | None]:
        """([T, C] P(c | all supports), [C, C] expected numbers of steps from class to class, None for a law that does not look back)."""
        before_TC, after_TC = self.filtered(supports, self.log_likelihood(supports))
        if self.log_step_CC is None:
            return after_TC.exp(), None
        smooth_TC, steps_CC = after_TC.clone(), torch.zeros_like(self.log_step_CC)
        for row_X in supports.chains().T[1:].flip(0):
            row_X = row_X[row_X >= 0]
            ratio_XC = (smooth_TC[row_X] - before_TC[row_X]).clamp(min=-700)
            steps_CC += self.log_step_CC.exp() * (after_TC[row_X - 1].exp().T @ ratio_XC.exp())
            smooth_TC[row_X - 1] = (after_TC[row_X - 1] + _log_matmul(ratio_XC, self.log_step_CC.T)).log_softmax(1)
        return smooth_TC.exp(), steps_CC


def _log_matmul(log_XC: Tensor, log_CC: Tensor) -> Tensor:
    top_X1 = log_XC.amax(1, keepdim=True)
    return top_X1 + ((log_XC - top_X1).exp() @ log_CC.exp()).clamp(min=1e-300).log()


def fit_law(
    supports: Supports, start_TC: Tensor, per_group: int = 1, looks_back: bool = False, rounds: int = 20, prior: float = PRIORS[0]
) -> SupportLaw:
    """The law of `per_group` classes in each group, by expectation-maximisation from P(class) of each token.

    The laws of groups are smoothed by half a count (Krichevsky & Trofimov 1981), those of their classes by `prior` tokens of their group.
    """
    counts, group_C, steps_CC = _Counts(supports), torch.arange(start_TC.shape[1]) // per_group, None
    resp_TC = start_TC.double().masked_fill(group_C != supports.group_T[:, None], 0.0)
    resp_TC = resp_TC / resp_TC.sum(1, keepdim=True)
    rounds = rounds if per_group > 1 else int(looks_back)  # a class that is the route is known
    for _ in range(rounds):
        law = counts.law(resp_TC, group_C, steps_CC, looks_back, prior, exact=False)
        resp_TC, steps_CC = law.posterior(supports)
    return counts.law(resp_TC, group_C, steps_CC, looks_back, prior, exact=True)


def routes_alone(supports: Supports) -> Tensor:
    """[T, G] where to start a law whose classes are the routes."""
    return F.one_hot(supports.group_T, supports.num_groups).double()


class _Counts:
    """How often which latents were active, over and over for other classes."""

    def __init__(self, supports: Supports) -> None:
        self.supports = supports
        slots = supports.local_TK.flatten()
        count_L = slots.bincount(minlength=supports.num_latents + 1)[: supports.num_latents]
        self.token_P = (slots.argsort(stable=True) // supports.local_TK.shape[1])[: int(count_L.sum())]
        self.offset_L = count_L.cumsum(0) - count_L

    def fired(self, resp_TC: Tensor) -> Tensor:
        """[C, L] on how many tokens of each class each latent was active."""
        return F.embedding_bag(self.token_P, resp_TC, self.offset_L, mode="sum").T

    def group_shares(self, resp_TG: Tensor) -> Tensor:
        """[G, L] on which share of a group's tokens each latent was active, smoothed by half a count."""
        share_GL = (self.fired(resp_TG) + 0.5) / (resp_TG.sum(0)[:, None] + 1)
        if self.supports.num_groups > 1:  # tokens that have none but shared latents
            share_GL[-1, self.supports.shared :] = SMALL
        return share_GL

    def law(self, resp_TC: Tensor, group_C: Tensor, steps_CC: Tensor | None, looks_back: bool, prior: float, exact: bool) -> SupportLaw:
        supports, tokens_C = self.supports, resp_TC.sum(0)
        number_CJ = resp_TC.new_zeros(len(tokens_C), supports.most + 1).index_add_(1, supports.count_T, resp_TC.T.contiguous())
        member_GC = F.one_hot(group_C, supports.num_groups).T.double()
        tokens_G1 = (member_GC @ tokens_C)[:, None]
        share_CL = (self.fired(resp_TC) + prior * self.group_shares(resp_TC @ member_GC.T)[group_C]) / (tokens_C[:, None] + prior)
        number_J = (number_CJ.sum(0) + 0.5) / (len(supports) + (supports.most + 1) / 2)
        number_GJ = (member_GC @ number_CJ + PRIORS[0] * number_J) / (tokens_G1 + PRIORS[0])
        number_CJ = (number_CJ + prior * number_GJ[group_C]) / (tokens_C[:, None] + prior)
        log_odds_CL = fitted_log_odds(share_CL, number_CJ, steps=6 if exact else 0)
        share_C = (tokens_C + 0.5) / (len(supports) + len(tokens_C) / 2)
        log_step_CC = None
        if looks_back:
            prior_CC = len(tokens_C) / 2 * share_C.expand(len(share_C), -1)
            steps_CC = prior_CC if steps_CC is None else steps_CC + prior_CC
            log_step_CC = (steps_CC / steps_CC.sum(1, keepdim=True)).log()
        log_e_CJ = expected_counts(log_odds_CL, number_CJ)[1] if exact else about_log_elementary(log_odds_CL, supports.most)
        return SupportLaw(log_odds_CL, log_e_CJ, number_CJ.log(), share_C.log(), log_step_CC, group_C)


def uniform_bits(fitted: Supports, paid: Supports) -> tuple[Tensor, Tensor]:
    """([T] of the route, [T] of the support) where all routes are alike and all sets of as many latents: log2 C(L, j). The number of active latents
    and of tokens without own latents has the frequencies of `fitted`."""
    law = fit_law(fitted, routes_alone(fitted))
    even_T = -law.log_number_CJ[paid.group_T, paid.count_T] / LN2
    size_T = torch.where(paid.group_T < max(1, paid.num_groups - 1), paid.num_latents, max(1, paid.shared)).double()
    sets_T = (torch.lgamma(size_T + 1) - torch.lgamma(paid.count_T + 1.0) - torch.lgamma(size_T - paid.count_T + 1)) / LN2
    if paid.num_groups == 1:
        return torch.zeros_like(even_T), even_T + sets_T
    alone = law.log_share_C[-1]
    own = torch.log1p(-alone.exp()) - math.log(paid.num_groups - 1)
    return -torch.where(paid.group_T == paid.num_groups - 1, alone, own) / LN2, even_T + sets_T


def independent_bits(fitted: Supports, paid: Supports) -> tuple[Tensor, Tensor]:
    """([T] of the route, [T] of the support) where each latent is active by itself, with its frequency in its group: sum_i H(p_i), which also pays
    for the number of active latents."""
    law = fit_law(fitted, routes_alone(fitted))
    log_odds_GL = _Counts(fitted).group_shares(routes_alone(fitted)).logit()
    none_G = -F.softplus(log_odds_GL).sum(1)
    size = paid.num_latents + 1
    place_TK = paid.group_T[:, None] * size + paid.local_TK
    set_T = F.embedding_bag(place_TK, F.pad(log_odds_GL, (0, 1)).reshape(-1, 1), mode="sum")[:, 0] + none_G[paid.group_T]
    return law.bits(paid)[0], -set_T / LN2

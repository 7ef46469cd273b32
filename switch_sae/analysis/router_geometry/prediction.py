"""Predicting routes: from a few latents of another SAE, from components of the activation, from tokens.

Shapes: T rows, K slots of latents, M latents, E experts, S features. Everything is fitted on some rows and used on others.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.models import SparseLatents

FEWEST = 10
"""Rows on which a latent must fire to be a candidate: with fewer its scale says nothing."""
_RIDGE = 1e-3
"""Coefficient of the squared weights of features at unit scale, in the cross-entropy per row."""


@dataclass(frozen=True)
class _Pairs:
    """Codes as (row, latent, value) from both sides, so that both products of a linear model are sums over the active latents only."""

    indices_TK: Tensor
    values_TK: Tensor
    token_P: Tensor
    value_P: Tensor
    start_M: Tensor

    @classmethod
    def of(cls, latents: SparseLatents, scale_M: Tensor) -> "_Pairs":
        values_TK = latents.values_TK.float() * scale_M[latents.indices_TK]
        latent_P, order_P = latents.indices_TK.flatten().sort(stable=True)
        counts_M = latent_P.bincount(minlength=latents.num_latents)
        token_P = order_P // latents.indices_TK.shape[1]
        return cls(latents.indices_TK, values_TK, token_P, values_TK.flatten()[order_P], counts_M.cumsum(0) - counts_M)

    def times(self, weight_ME: Tensor) -> Tensor:
        """codes_TM @ weight_ME."""
        return F.embedding_bag(self.indices_TK, weight_ME, per_sample_weights=self.values_TK, mode="sum")

    def transposed(self, grad_TE: Tensor) -> Tensor:
        """codes_TM^T @ grad_TE."""
        return F.embedding_bag(self.token_P, grad_TE, self.start_M, per_sample_weights=self.value_P, mode="sum")


@torch.no_grad()
def order_of_entry(latents: SparseLatents, route_T: Tensor, num_experts: int, most: int, steps: int = 25, grid: int = 60) -> Tensor:
    """[<= most] latents in the order in which they enter a multinomial group lasso of the route on the codes, int64.

    min_W cross-entropy(b + z W, route) + lambda * sum_m ||W_m||, z at unit root mean square, by accelerated proximal gradient with restarts
    (Simon, Friedman & Hastie, arXiv 1311.6529; Beck & Teboulle 2009), warm-started along `grid` falling lambda; those that enter together by their
    norms. Latents that fire on fewer than `FEWEST` rows are no candidates.
    """
    M, T = latents.num_latents, len(route_T)
    power_M = torch.zeros(M).scatter_add_(0, latents.indices_TK.flatten(), latents.values_TK.float().square().flatten()) / T
    candidate_M = (latents.firing_counts() >= FEWEST) & (power_M > 0)
    pairs = _Pairs.of(latents, torch.where(candidate_M, power_M.clamp_min(1e-30).rsqrt(), 0.0))
    wanted_TE = F.one_hot(route_T, num_experts).float()
    bias_E = (wanted_TE.mean(0) + 1 / T).log()
    weight_ME = torch.zeros(M, num_experts)
    start = float((pairs.transposed(torch.softmax(bias_E.expand(T, -1), 1) - wanted_TE) / T).norm(dim=1).max())
    curvature = _curvature(pairs, T, M) / 2  # of the cross-entropy: at most half the largest eigenvalue of the codes' second moments
    entered: list[int] = []
    for lam in torch.logspace(0, -2.5, grid)[1:].mul(start).tolist():
        ahead_ME, momentum = weight_ME, 1.0
        for _ in range(steps):
            error_TE = torch.softmax(pairs.times(ahead_ME) + bias_E, 1) - wanted_TE
            bias_E = bias_E - error_TE.mean(0)
            stepped_ME = ahead_ME - pairs.transposed(error_TE) / (T * curvature)
            new_ME = stepped_ME * (1 - lam / curvature / stepped_ME.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_min(0)
            if float(((ahead_ME - new_ME) * (new_ME - weight_ME)).sum()) > 0:
                momentum = 1.0
            next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead_ME = new_ME + (momentum - 1) / next_momentum * (new_ME - weight_ME)
            weight_ME, momentum = new_ME, next_momentum
        norm_M = weight_ME.norm(dim=1)
        fresh = [m for m in norm_M.argsort(descending=True, stable=True)[: int((norm_M > 0).sum())].tolist() if m not in set(entered)]
        entered += fresh
        if len(entered) >= most:
            break
    return torch.tensor(entered[:most], dtype=torch.int64)


def _curvature(pairs: _Pairs, T: int, M: int) -> float:
    """The largest eigenvalue of codes^T codes / T by power iteration, and a little more."""
    direction_M1 = torch.ones(M, 1) / M**0.5
    size = 1.0
    for _ in range(30):
        direction_M1 = pairs.transposed(pairs.times(direction_M1)) / T
        size = float(direction_M1.norm())
        direction_M1 = direction_M1 / max(size, 1e-30)
    return max(1.05 * size, 1e-12)


def fitted_logits(features_TS: Tensor, route_T: Tensor, other_US: Tensor, num_experts: int, steps: int = 60) -> Tensor:
    """[U, E] logits of other rows, of a multinomial regression fitted on (features_TS, route_T): no group penalty, a small ridge, features at unit
    root mean square of the rows that it is fitted on; by L-BFGS."""
    scale_S = features_TS.double().square().mean(0).sqrt().float().clamp_min(1e-12)
    features_TS, other_US = features_TS.float() / scale_S, other_US.float() / scale_S
    weight_SE = torch.zeros(features_TS.shape[1], num_experts, requires_grad=True)
    share_E = (torch.bincount(route_T, minlength=num_experts).float() + 1) / (len(route_T) + num_experts)
    bias_E = share_E.log().requires_grad_()
    optimiser = torch.optim.LBFGS([weight_SE, bias_E], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(features_TS @ weight_SE + bias_E, route_T) + _RIDGE * weight_SE.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    with torch.no_grad():
        return other_US @ weight_SE + bias_E


def by_table(key_T: Tensor, route_T: Tensor, key_U: Tensor, otherwise_U: Tensor) -> Tensor:
    """[U] each key's most frequent route among (key_T, route_T), the lowest of several; `otherwise_U` for keys that it does not hold, and below 0."""
    known, place_T = key_T.unique(return_inverse=True)
    counts = torch.zeros(len(known), int(route_T.max()) + 1, dtype=torch.int64).index_put_(
        (place_T, route_T), torch.ones_like(route_T), accumulate=True
    )
    place_U = torch.searchsorted(known, key_U).clamp(max=len(known) - 1)
    return torch.where((known[place_U] == key_U) & (key_U >= 0), counts.argmax(1)[place_U], otherwise_U)


def bigram_keys(previous_T: Tensor, token_T: Tensor) -> Tensor:
    """One number per pair of tokens; -1 where there is no token before."""
    return torch.where(previous_T >= 0, previous_T * (int(token_T.max()) + 1) + token_T, -1)


def nearest_centroid(x_TD: Tensor, route_T: Tensor, other_UD: Tensor, num_experts: int) -> Tensor:
    """[U] the expert whose mean activation is nearest; experts without rows are nobody's."""
    counts_E = torch.bincount(route_T, minlength=num_experts)
    mean_ED = torch.zeros(num_experts, x_TD.shape[1]).index_add_(0, route_T, x_TD.float()) / counts_E.clamp_min(1)[:, None]
    score_UE = other_UD.float() @ mean_ED.T - mean_ED.square().sum(1) / 2
    return score_UE.masked_fill(counts_E == 0, -torch.inf).argmax(1)

"""Cheap screens: which latents of a dense SAE are worth encoding exactly, found with far fewer products of size D than there are latents.

Shapes: t rows of a chunk, D activation size, M latents, K active latents, C candidates. Activations u = x - b are scaled and centred by the encoder's
bias; a latent's score is W_enc[m] u + b_enc[m]. Cost is counted in products of D-dimensional vectors per token, screen and candidates together.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LLOYD_STEPS = 10
CALIBRATED = ", calibrated"
"""Families whose names end so rank latents by their chance of being active, not by approximate scores."""


@dataclass(frozen=True)
class Fitting:
    """What screens are fitted on: rows of documents A, and the dense SAE with what it made of them."""

    u_TD: Tensor
    values_TK: Tensor
    """The dense SAE's latents, 0 where a slot is not in use."""
    indices_TK: Tensor
    W_MD: Tensor
    """Encoder rows."""
    b_M: Tensor
    """The encoder's biases."""
    expert_T: Tensor | None = None
    """The experts that a trained router gives these rows."""
    experts: int = 0
    memo: dict[Any, Any] = field(default_factory=dict)
    """What many screens are made of: centroids, keys, a root of the covariance."""

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed at the first call with that name."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    @property
    def root_DD(self) -> Tensor:
        """Sigma^(1/2) of the rows."""
        root_DD: Tensor = self.once("root", lambda: covariance_root(self.u_TD))
        return root_DD

    def missing(self, approximate_MD: Tensor) -> Tensor:
        """[M] what scores approximate_MD u lack on average."""
        return self.b_M + (self.W_MD - approximate_MD) @ self.u_TD.mean(0)

    def part(self, chosen: Tensor) -> "Fitting":
        """Some rows."""
        expert_T = None if self.expert_T is None else self.expert_T[chosen]
        return Fitting(self.u_TD[chosen], self.values_TK[chosen], self.indices_TK[chosen], self.W_MD, self.b_M, expert_T, self.experts)


@dataclass(frozen=True)
class Seeking:
    """A chunk of rows that ask for candidates."""

    u_tD: Tensor
    values_tK: Tensor
    """What the dense SAE makes of them: only oracles look at it."""
    indices_tK: Tensor
    expert_t: Tensor | None
    first: int
    """The number of the first of these rows in the sample."""


class Screen(ABC):
    """Fitted once, then asked for each chunk."""

    cost: int
    """Products per token, without those with candidates."""
    setting: str = ""

    @abstractmethod
    def candidates(self, rows: Seeking) -> Tensor:
        """[t, C] latents, all different within a row."""


class Lists(Screen):
    """Every row has one of E clusters, and a cluster the F latents with the largest sum of z^2 over its rows.

    Each cluster counts one average row more, which fills lists that its own rows leave open. `oracle` takes, for each row, the list that holds
    most of its energy: a bound for any router to these lists.
    """

    def __init__(self, fitting: Fitting, centroid_ED: Tensor | None, size: int, oracle: bool = False) -> None:
        self.centroid_ED, self.oracle = centroid_ED, oracle
        experts = fitting.experts if centroid_ED is None else len(centroid_ED)
        expert_T = fitting.expert_T if centroid_ED is None else nearest(fitting.u_TD, centroid_ED)
        assert expert_T is not None
        energy_EM = energies(fitting, expert_T, experts)
        self.list_EF = (energy_EM + energy_EM.sum(0) / max(1, len(fitting.u_TD))).topk(size, dim=1).indices
        self.member_ME = torch.zeros(experts, len(fitting.W_MD)).scatter_(1, self.list_EF, 1.0).T.contiguous()
        self.cost, self.setting = experts, f"{experts} lists of {size}"

    def candidates(self, rows: Seeking) -> Tensor:
        if self.oracle:
            expert_t = torch.einsum("tk,tke->te", rows.values_tK.square(), self.member_ME[rows.indices_tK]).argmax(1)
        elif self.centroid_ED is None:
            assert rows.expert_t is not None
            expert_t = rows.expert_t
        else:
            expert_t = nearest(rows.u_tD, self.centroid_ED)
        return self.list_EF[expert_t]


class ProductKeys(Screen):
    """W_enc[m] ~ a_i + b_j by k-means of the rows and of what is left, n centroids each; the cells (i, j) with the largest a_i u + b_j u + the mean
    bias of their latents give candidates until there are C, as a staircase over sorted a_i u and b_j u finds them (Babenko & Lempitsky 2012).

    Distances are those of scores over documents A: ||(w - w') Sigma^(1/2)||. `calibrated` ranks latents by their chance instead (`chances`), which no
    staircase can: a multiplication for each latent, M / D products more, rounded up.
    """

    def __init__(self, fitting: Fitting, keys: int, size: int, calibrated: bool = False) -> None:
        first_M, second_M, self.a_nD, self.b_nD = fitting.once(("keys", keys), lambda: residual_keys(fitting, keys))
        self.cell_M = first_M * keys + second_M
        self.scale_M, self.bias_M = torch.ones_like(fitting.b_M), means(fitting.b_M[:, None], self.cell_M, keys**2)[self.cell_M, 0]
        if calibrated:
            self.scale_M, self.bias_M = chances(fitting, self.a_nD[first_M] + self.b_nD[second_M])
        self.cost, self.size = keys_cost(keys, calibrated, *fitting.W_MD.shape), size
        self.setting = f"2 x {keys} keys, {size} candidates"

    def candidates(self, rows: Seeking) -> Tensor:
        cells_tP = ((rows.u_tD @ self.a_nD.T)[:, :, None] + (rows.u_tD @ self.b_nD.T)[:, None, :]).flatten(1)
        return (cells_tP[:, self.cell_M] * self.scale_M + self.bias_M).topk(self.size, dim=1, sorted=False).indices


class LowRank(Screen):
    """Scores of rank r with the least squared error over documents A (reduced-rank regression, Izenman 1975): U U^T W_enc (u - mean) + W_enc mean
    + b_enc, with the r leading left singular vectors U of W_enc Sigma^(1/2). M scores of r numbers each cost M r / D products, rounded up.
    `calibrated` ranks latents by their chance (`chances`), at the same cost.
    """

    def __init__(self, fitting: Fitting, rank: int, size: int, calibrated: bool = False) -> None:
        left_MR = fitting.once("left", lambda: torch.linalg.svd(fitting.W_MD @ fitting.root_DD, full_matrices=False).U)[:, :rank]
        self.key_RD = left_MR.T @ fitting.W_MD
        scale_M, self.bias_M = chances(fitting, left_MR @ self.key_RD) if calibrated else (None, fitting.missing(left_MR @ self.key_RD))
        self.left_MR = left_MR if scale_M is None else left_MR * scale_M[:, None]
        self.cost, self.size = low_rank_cost(rank, *fitting.W_MD.shape), size
        self.setting = f"rank {rank}, {size} candidates"

    def candidates(self, rows: Seeking) -> Tensor:
        return torch.addmm(self.bias_M, rows.u_tD @ self.key_RD.T, self.left_MR.T).topk(self.size, dim=1, sorted=False).indices


class Fixed(Screen):
    """The latents that fire most often over documents A, for every row."""

    cost = 0

    def __init__(self, fitting: Fitting, size: int) -> None:
        count_M = torch.zeros(len(fitting.W_MD)).index_add_(0, fitting.indices_TK.flatten(), (fitting.values_TK != 0).float().flatten())
        self.latent_C, self.setting = count_M.topk(size).indices, f"{size} latents"

    def candidates(self, rows: Seeking) -> Tensor:
        return self.latent_C.expand(len(rows.u_tD), -1)


class Drawn(Screen):
    """Latents at random, others for every row: C in a row of a random order, from a random place."""

    cost = 0

    def __init__(self, latents: int, size: int) -> None:
        self.size, self.setting = size, f"{size} latents"
        self.order_M = torch.randperm(latents, generator=torch.Generator().manual_seed(0))

    def candidates(self, rows: Seeking) -> Tensor:
        start_t = torch.randint(len(self.order_M), (len(rows.u_tD), 1), generator=torch.Generator().manual_seed(rows.first))
        return self.order_M[(start_t + torch.arange(self.size)) % len(self.order_M)]


def made(family: str, setting: tuple[int, int], fitting: Fitting, oracle: bool = False) -> Screen:
    """The screen of a family with one of its `options`."""
    number, size = setting
    if family == "lists":
        return Lists(fitting, fitting.once(("means", number), lambda: spherical_means(fitting.u_TD, number)), size, oracle)
    screen = ProductKeys if family.startswith("product keys") else LowRank
    return screen(fitting, number, size, family.endswith(CALIBRATED))


def chances(fitting: Fitting, approximate_MD: Tensor) -> tuple[Tensor, Tensor]:
    """(scale_M, bias_M) that turn approximate scores s into (s - theta) / sigma_m: the larger, the likelier an exact score above theta, if errors are
    normal. theta: the mean of the rows' least active latents; sigma_m: the deviation of latent m's error over documents A, with a thousandth of that
    of its score added in quadrature. Without it the worst approximated latents, mostly rare ones, crowd out the others.
    """
    wide_M, narrow_M = ((rows_MD @ fitting.root_DD).square().sum(1) for rows_MD in (fitting.W_MD - approximate_MD, fitting.W_MD))
    scale_M = (wide_M + 1e-6 * narrow_M).clamp_min(torch.finfo(wide_M.dtype).tiny).rsqrt()
    least_T = fitting.values_TK.masked_fill(fitting.values_TK == 0, torch.inf).amin(1)
    return scale_M, (fitting.missing(approximate_MD) - least_T[least_T.isfinite()].mean().nan_to_num()) * scale_M


def best_setting(family: str, budget: int, fitted: Fitting, judged: Fitting) -> tuple[int, int] | None:
    """The option with the largest energy recall on rows that it was not fitted on; None where there is no option."""
    known = options(family, budget, *fitted.W_MD.shape)
    rows = Seeking(judged.u_TD, judged.values_TK, judged.indices_TK, None, 0)

    def recall(setting: tuple[int, int]) -> float:
        return float(found(made(family, setting, fitted).candidates(rows), judged.values_TK, judged.indices_TK, len(fitted.W_MD))[2].sum())

    return max(known, key=recall, default=None) if len(known) != 1 else known[0]


def found(latent_tC: Tensor, values_tK: Tensor, indices_tK: Tensor, latents: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row's active latents: (how many are candidates, how many there are, sum of z^2 of those that are candidates, of all), float64."""
    is_candidate_tM = torch.zeros(len(latent_tC), latents, dtype=torch.bool).scatter_(1, latent_tC, True)
    hit_tK, active_tK, energy_tK = is_candidate_tM.gather(1, indices_tK), values_tK != 0, values_tK.double().square()
    return (hit_tK & active_tK).sum(1).double(), active_tK.sum(1).double(), (energy_tK * hit_tK).sum(1), energy_tK.sum(1)


def low_rank_cost(rank: int, latents: int, d_in: int) -> int:
    """r products for the sketch, M of length r for the scores."""
    return rank + -(-latents * rank // d_in)


def keys_cost(keys: int, calibrated: bool, latents: int, d_in: int) -> int:
    """n products for each side, and M multiplications where each latent has a scale of its own."""
    return 2 * keys + calibrated * -(-latents // d_in)


def residual_keys(fitting: Fitting, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(first key of each latent, second, first keys, second keys) for `ProductKeys`."""
    first_M = clusters(fitting.W_MD @ fitting.root_DD, keys)
    a_nD = means(fitting.W_MD, first_M, keys)
    left_MD = fitting.W_MD - a_nD[first_M]
    second_M = clusters(left_MD @ fitting.root_DD, keys)
    return first_M, second_M, a_nD, means(left_MD, second_M, keys)


def energies(fitting: Fitting, expert_T: Tensor, experts: int) -> Tensor:
    """[E, M] sum of z^2 over each cluster's rows."""
    latents = len(fitting.W_MD)
    flat_TK = expert_T[:, None] * latents + fitting.indices_TK
    return torch.zeros(experts * latents).index_add_(0, flat_TK.flatten(), fitting.values_TK.square().flatten()).view(experts, latents)


def nearest(u_TD: Tensor, centroid_ED: Tensor) -> Tensor:
    """The centroid of unit norm with the largest cosine, int64."""
    return (u_TD @ centroid_ED.T).argmax(1)


def spherical_means(u_TD: Tensor, experts: int) -> Tensor:
    """[E, D] centroids of unit norm by spherical k-means (Dhillon & Modha 2001) from `spread` rows, the same on every call. An empty cluster takes
    the row that is farthest from its own centroid."""
    unit_TD = F.normalize(u_TD, dim=1)
    centroid_ED = spread(unit_TD, experts)
    for _ in range(LLOYD_STEPS):
        cosine_T, expert_T = (unit_TD @ centroid_ED.T).max(dim=1)
        sums_ED = torch.zeros_like(centroid_ED).index_add_(0, expert_T, unit_TD)
        empty_e = (expert_T.bincount(minlength=experts) == 0).nonzero()[:, 0]
        sums_ED[empty_e] = unit_TD[cosine_T.topk(len(empty_e), largest=False).indices]
        centroid_ED = F.normalize(sums_ED, dim=1)
    return centroid_ED


def clusters(rows_MD: Tensor, number: int) -> Tensor:
    """[M] cluster of each row by k-means (Lloyd 1982), the same on every call; empty clusters take the rows that are farthest from their own."""
    centroid_nD = spread(rows_MD, number)
    for _ in range(LLOYD_STEPS):
        away_M, cluster_M = (centroid_nD.square().sum(1) - 2 * rows_MD @ centroid_nD.T).min(dim=1)
        centroid_nD = means(rows_MD, cluster_M, number)
        empty_n = (cluster_M.bincount(minlength=number) == 0).nonzero()[:, 0]
        centroid_nD[empty_n] = rows_MD[(away_M + rows_MD.square().sum(1)).topk(len(empty_n)).indices]
    return (centroid_nD.square().sum(1) - 2 * rows_MD @ centroid_nD.T).argmin(1)


def spread(rows_MD: Tensor, number: int) -> Tensor:
    """[n, D] rows to start k-means from, each drawn with a probability of its squared distance to the nearest one before (Arthur & Vassilvitskii
    2007), the same on every call."""
    draw_n = torch.rand(number, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    norm_M = rows_MD.square().sum(1)
    chosen = [int(draw_n[0] * len(rows_MD))]
    away_M = torch.full_like(norm_M, torch.inf)
    for draw in draw_n[1:]:
        row_D = rows_MD[chosen[-1]]
        away_M = torch.minimum(away_M, (norm_M - 2 * rows_MD @ row_D + row_D.square().sum()).clamp_min(0))
        total_M = away_M.double().cumsum(0)
        chosen.append(min(int(torch.searchsorted(total_M, draw * float(total_M[-1]))), len(rows_MD) - 1))
    return rows_MD[chosen].clone()


def means(rows_MD: Tensor, cluster_M: Tensor, number: int) -> Tensor:
    """[n, D] mean of each cluster's rows, 0 for an empty one."""
    sums_nD = torch.zeros(number, rows_MD.shape[1], dtype=rows_MD.dtype).index_add_(0, cluster_M, rows_MD)
    return sums_nD / cluster_M.bincount(minlength=number).clamp_min(1)[:, None]


def covariance_root(u_TD: Tensor) -> Tensor:
    """[D, D] symmetric root of the rows' covariance."""
    centred_TD = (u_TD - u_TD.mean(0)).double()
    value_D, vector_DD = torch.linalg.eigh(centred_TD.T @ centred_TD / len(u_TD))
    return ((vector_DD * value_D.clamp_min(0).sqrt()) @ vector_DD.T).to(u_TD.dtype)


def options(family: str, budget: int, latents: int, d_in: int) -> list[tuple[int, int]]:
    """(clusters, keys per side or rank; candidates) that together cost `budget`, at least a quarter of it candidates; none where it is too small."""
    if family == "lists":
        return [(experts, budget - experts) for share in (16, 8, 4, 2) if (experts := budget // share) >= 2]
    if family.startswith("product keys"):
        costs = {keys: keys_cost(keys, family.endswith(CALIBRATED), latents, d_in) for keys in (2, 4, 8, 16, 32, 64, 128, 256) if 4 * keys <= latents}
    else:
        costs = {rank: low_rank_cost(rank, latents, d_in) for rank in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if rank <= min(latents, d_in)}
    return [(number, budget - cost) for number, cost in costs.items() if budget / 8 <= cost <= 3 * budget / 4]

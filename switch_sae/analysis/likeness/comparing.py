"""All similarities of several representations of the same rows, with resamples of documents and permutations of them.

Shapes: T rows, P pairs, N documents, V views (representations), W views and routes, R resamples, K permutations, Q pairs of pairs.
Similarities among all views come at once: ranks are found per view, and one matrix product compares each with each.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from switch_sae.analysis.likeness.calibration import Balanced, orders, pair_slots
from switch_sae.analysis.likeness.cka import centred_inner, hsic, normalised_hsic
from switch_sae.analysis.likeness.mutual_knn import is_near, nearest_rows, overlap
from switch_sae.analysis.likeness.representation import Codes, Representation
from switch_sae.analysis.likeness.rsa import Pairs, Ranked, correlation_distances, cosine_distances, normalised, rank_scale, rho_a_matrix, tau_a
from switch_sae.metrics.bootstrap import document_weights

RESAMPLED_PAIRS = 50_000
"""Pairs that resamples and permutations look at."""
ORDERED_PAIRS = 25_000
"""Pairs that tau-a counts inversions of."""
PAIRS_OF_PAIRS = 50_000


@dataclass
class Comparison:
    """Every measure by name, as matrices over views; rank measures over views and then routes."""

    value: dict[str, Tensor] = field(default_factory=dict)
    """[W, W] on all rows; mutual_knn on balanced ones."""
    resampled: dict[str, Tensor] = field(default_factory=dict)
    """[R, W, W]."""
    middle: dict[str, Tensor] = field(default_factory=dict)
    """[W, W]: on all documents once, from the same pairs as the resamples."""
    null: dict[str, Tensor] = field(default_factory=dict)
    """[K, W, W]: the first view in its place, the second's documents permuted."""
    observed: dict[str, Tensor] = field(default_factory=dict)
    """[W, W]: unpermuted, from the same balanced rows and pairs as the permutations."""
    most: dict[str, Tensor] = field(default_factory=dict)
    """[W, W]: the highest value there can be: less than 1 for rank measures of RDMs with ties."""
    entries_WP: Tensor = field(default_factory=lambda: torch.empty(0))
    """Cosine distances at the pairs of different documents."""
    pairs: Pairs | None = None


@dataclass
class Plan:
    """What all stages share."""

    document_T: Tensor
    pairs: Pairs
    balanced: Balanced | None
    neighbours: int
    bootstrap: int
    permutations: int
    done: Callable[[int], None]
    """Called after each resample and each permutation (1), and before them all (with as many: about half of the work is then done)."""


def compare(views: Sequence[Representation], routes: Sequence[Codes], plan: Plan) -> Comparison:
    """rho_a, spearman, tau_a of cosine RDMs (and rho_a_correlation of correlation RDMs) over pairs of different documents; cka of all rows;
    mutual_knn of balanced rows. Routes only have ranks: they are models of an RDM, not representations.
    """
    found = Comparison()
    _all_rows(found, views, routes, plan)
    plan.done(plan.bootstrap + plan.permutations)
    _resamples(found, views, plan)
    if plan.balanced is not None:
        _permutations(found, views, routes, plan, plan.balanced)
    return found


def _all_rows(found: Comparison, views: Sequence[Representation], routes: Sequence[Codes], plan: Plan) -> None:
    pairs = found.pairs = plan.pairs.where(plan.document_T[plan.pairs.left_P] != plan.document_T[plan.pairs.right_P])
    found.entries_WP = torch.stack([cosine_distances(view, pairs) for view in (*views, *routes)])
    found.value["rho_a"] = rho_a_matrix([Ranked(entries_P) for entries_P in found.entries_WP])
    found.value["spearman"] = normalised(found.value["rho_a"])
    plain = [view for view in views if not (isinstance(view, Codes) and view.mix_MM is not None)]
    if len(plain) == len(views):
        found.value["rho_a_correlation"] = rho_a_matrix([Ranked(correlation_distances(view, pairs)) for view in views])
    step = -(-len(pairs) // ORDERED_PAIRS)
    found.value["tau_a"] = _symmetric(len(views), lambda i, j: tau_a(found.entries_WP[i, ::step], found.entries_WP[j, ::step]), itself=True)
    if len(plain) == len(views):
        own = [hsic(view, view) for view in views]
        found.value["cka"] = _symmetric(len(views), lambda i, j: normalised_hsic(hsic(views[i], views[j]), own[i], own[j]))


def _symmetric(size: int, of: Callable[[int, int], float], itself: bool = False) -> Tensor:
    """[V, V]; 1 on the diagonal unless that is asked for `itself`."""
    matrix = torch.ones(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(i if itself else i + 1, size):
            matrix[i, j] = matrix[j, i] = of(i, j)
    return matrix


def _resamples(found: Comparison, views: Sequence[Representation], plan: Plan) -> None:
    """RSA at pairs of different documents, CKA at all: a document that is drawn twice has w^2 pairs with itself, none of a row with its copy."""
    assert found.pairs is not None
    pairs, step = found.pairs, -(-len(found.pairs) // RESAMPLED_PAIRS)
    pairs = pairs.where(torch.arange(0, len(pairs), step))
    entries_WP = found.entries_WP[:, ::step]
    ranked = [Ranked(entries_P) for entries_P in entries_WP]
    sign_VQ, first_Q, second_Q = _order_of_pairs(entries_WP[: len(views)])
    every = plan.pairs.where(torch.arange(0, len(plan.pairs), -(-len(plan.pairs) // RESAMPLED_PAIRS)))
    centred_VP = torch.stack([centred_inner(view, every) for view in views]).float()

    def measures(weight_N: Tensor) -> dict[str, Tensor]:
        weight_P = pairs.weights(weight_N, plan.document_T)
        rho = rho_a_matrix(ranked, weight_P)
        weight_Q = (weight_P[first_Q] * weight_P[second_Q]).float()
        tau = (sign_VQ * weight_Q) @ sign_VQ.T / weight_Q.sum()
        inner = (centred_VP * every.weights(weight_N, plan.document_T).float()) @ centred_VP.T
        return {"rho_a": rho, "spearman": normalised(rho), "tau_a": tau.double(), "cka": normalised(inner.double())}

    documents = int(plan.document_T.max()) + 1
    found.middle = measures(torch.ones(documents, dtype=torch.float64))
    found.value.setdefault("cka", found.middle["cka"])
    weights = (weight_N for weights_RN in document_weights(documents, plan.bootstrap) for weight_N in weights_RN)
    resamples = _each(measures, weights, plan)
    if resamples:
        found.resampled = {name: torch.stack([one[name] for one in resamples]) for name in found.middle}


def _each(measures: Callable[[Tensor], dict[str, Tensor]], rounds: Iterable[Tensor], plan: Plan) -> list[dict[str, Tensor]]:
    """What every round measures, in their order; rounds are independent and of small operations, so threads take one each."""
    found = []
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for measured in pool.map(measures, rounds):
            found.append(measured)
            plan.done(1)
    return found


def _order_of_pairs(entries_VP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sign_VQ, first_Q, second_Q): whether the first of two random pairs is farther apart (1), nearer (-1) or as far (0). tau-a is the mean product
    of two views' signs."""
    generator = torch.Generator().manual_seed(0)
    first_Q, second_Q = torch.randint(entries_VP.shape[1], (2, PAIRS_OF_PAIRS), generator=generator)
    differ_Q = first_Q != second_Q
    first_Q, second_Q = first_Q[differ_Q], second_Q[differ_Q]
    return (entries_VP[:, first_Q] - entries_VP[:, second_Q]).sign().float(), first_Q, second_Q


def _permutations(found: Comparison, views: Sequence[Representation], routes: Sequence[Codes], plan: Plan, balanced: Balanced) -> None:
    slots, document_T = pair_slots(balanced, RESAMPLED_PAIRS), balanced.document_T
    rows_T, pairs, (documents, length) = balanced.row_NL.flatten(), slots.pairs(), balanced.row_NL.shape
    parts, route_parts = [view.part(rows_T) for view in views], [route.part(rows_T) for route in routes]
    entries_WP = torch.stack([cosine_distances(part, pairs) for part in (*parts, *route_parts)])
    rank_WP = torch.stack([Ranked(entries_P).centred() for entries_P in entries_WP]) * math.sqrt(rank_scale(len(pairs)))
    own_W = rank_WP.square().sum(1).sqrt()
    rank_WP = rank_WP.float()
    centred_VP = torch.stack([centred_inner(part, pairs) for part in parts])
    centred_VP = (centred_VP / centred_VP.square().sum(1, keepdim=True).sqrt()).float()
    _, first_Q, second_Q = _order_of_pairs(entries_WP[: len(parts)])
    place_VP = torch.stack([Ranked(entries_P).group_P for entries_P in entries_WP[: len(parts)]]).int()

    def signs(place_VP: Tensor) -> Tensor:
        return (place_VP[:, first_Q] - place_VP[:, second_Q]).sign().float()

    sign_VQ = signs(place_VP)
    can_have_neighbours = (documents - 1) * length >= plan.neighbours
    nearest = [nearest_rows(part, plan.neighbours, document_T, seed) for seed, part in enumerate(parts)] if can_have_neighbours else []
    near = [is_near(one) for one in nearest]

    def measures(order_N: Tensor) -> dict[str, Tensor]:
        moved_P = slots.moved(order_N)
        rho = (rank_WP @ rank_WP[:, moved_P].T).double()
        tau = (sign_VQ @ signs(place_VP[:, moved_P]).T / len(first_Q)).double()
        measured = {"rho_a": rho, "spearman": rho / (own_W[:, None] * own_W), "tau_a": tau}
        measured["cka"] = (centred_VP @ centred_VP[:, moved_P].T).double()
        if nearest:
            moved_T = (order_N[:, None] * length + torch.arange(length)).flatten()
            back_T = moved_T.argsort()
            moved = [back_T[one[moved_T]] for one in nearest]
            measured["mutual_knn"] = _symmetric(len(near), lambda i, j: float(overlap(near[i], moved[j]).mean()))
        return measured

    found.observed = measures(torch.arange(documents))
    found.most = {name: torch.ones_like(matrix) for name, matrix in found.observed.items()}
    found.most["rho_a"] = own_W[:, None] * own_W
    tied_V = found.observed["tau_a"].diagonal().sqrt()
    found.most["tau_a"] = tied_V[:, None] * tied_V
    permuted = _each(measures, orders(documents, plan.permutations), plan)
    if permuted:
        found.null = {name: torch.stack([one[name] for one in permuted]) for name in found.observed}
    if nearest:
        _neighbours(found, nearest, near, document_T, plan)


def _neighbours(found: Comparison, nearest: list[Tensor], near: list[Tensor], document_T: Tensor, plan: Plan) -> None:
    """Resamples of documents count rows that ask; the rows that may be neighbours stay."""
    documents, length = int(document_T.max()) + 1, len(document_T) // (int(document_T.max()) + 1)
    shared_VVN = torch.stack([torch.stack([overlap(mine, other).view(documents, length).mean(1) for other in nearest]) for mine in near])
    found.value["mutual_knn"] = found.middle["mutual_knn"] = shared_VVN.mean(-1)
    blocks = [torch.einsum("rn,ijn->rij", weights_RN, shared_VVN) / documents for weights_RN in document_weights(documents, plan.bootstrap)]
    if plan.bootstrap:
        found.resampled["mutual_knn"] = torch.cat(blocks)

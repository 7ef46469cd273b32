"""The sections of the router analysis about routes as a partition of tokens: what predicts them, and whether other seeds find them too.

Shapes: T rows, E experts, S features. Documents A fit, documents B score.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from switch_sae.analysis.assignment import one_to_one
from switch_sae.analysis.base import Table
from switch_sae.analysis.findings import finding
from switch_sae.analysis.observed import Sample, Seen
from switch_sae.analysis.pca import mean_and_covariance
from switch_sae.analysis.recovery import cosines, normalized_mutual_information
from switch_sae.analysis.router_geometry.parts import SIZES, Routed
from switch_sae.analysis.router_geometry.prediction import bigram_keys, by_table, fitted_logits, nearest_centroid, order_of_entry
from switch_sae.analysis.router_geometry.statistics import adjusted_rand, co_routing, null_of, over_documents, shuffled
from switch_sae.metrics.bootstrap import middle_of
from switch_sae.models import SparseLatents

FEATURES = tuple(size for size in SIZES if size & (size - 1) == 0)
"""1, 2, 4, ...: numbers of features at which routes are predicted."""


def prediction(one: Routed, dense: Seen | None, other: Seen | None, sample: Sample, halves: tuple[Tensor, Tensor], most: int) -> Table:
    """Share of routes on documents B that are predicted from few latents of a dense SAE, against components of the activations, tokens, the nearest
    mean, the routes of another seed, and the most frequent expert (the null)."""
    row, E, first, second = one.seen.row, one.seen.row.num_experts, *halves
    expert_T, x_TD = one.expert_T(), sample.rows.x_TD
    route_A, route_B = expert_T[first], expert_T[second]
    majority_B = torch.full_like(route_B, int(torch.bincount(route_A, minlength=E).argmax()))
    guesses: dict[tuple[str, int | str], Tensor] = {("majority", ""): majority_B}
    notes: dict[str, str] = {}
    guesses["nearest mean", ""] = nearest_centroid(x_TD[first], route_A, x_TD[second], E)
    if sample.token_T is None or sample.previous_T is None:
        notes |= dict.fromkeys(("token", "bigram"), "these activations have no tokens")
    else:
        guesses["token", ""] = by_table(sample.token_T[first], route_A, sample.token_T[second], majority_B)
        keys_T = bigram_keys(sample.previous_T, sample.token_T)
        guesses["bigram", ""] = by_table(keys_T[first], route_A, keys_T[second], guesses["token", ""])
    if other is None:
        notes["other seed"] = "no second seed"
    else:
        theirs_T = other.expert_T()
        guesses["other seed", ""] = by_table(theirs_T[first], route_A, theirs_T[second], majority_B)
    centre_D = x_TD[first].mean(0)
    components_DD = torch.linalg.eigh(mean_and_covariance(x_TD[first])[1]).eigenvectors.flip(1).float()
    sources = {"components": (x_TD - centre_D) @ components_DD[:, :most]}
    if dense is None:
        notes["dense latents"] = "no dense SAE"
    else:
        codes_A = SparseLatents(dense.latents.values_TK[first], dense.latents.indices_TK[first], dense.latents.num_latents)
        order_S = order_of_entry(codes_A, route_A, E, most)
        sources["dense latents"] = dense.latents.select(order_S)
    for name, features_TS in sources.items():
        for size in (size for size in FEATURES if size <= features_TS.shape[1]):
            part_TS = features_TS[:, :size]
            guesses[name, size] = fitted_logits(part_TS[first], route_A, part_TS[second], E).argmax(1)
    right = {key: (guess_B == route_B).double() for key, guess_B in guesses.items()}
    ratios: dict[str, tuple[Tensor, Tensor | None]] = {f"{name} {at}": (right_B, None) for (name, at), right_B in right.items()}
    if ("bigram", "") in right:
        ratios |= {f"gain {at}": (right_B - right["bigram", ""], None) for (name, at), right_B in right.items() if name == "dense latents"}
    found = over_documents(sample.document_T[second], ratios)
    null, null_interval = found["majority "]
    table, n = [], len(second)
    for name, at in right:
        value, interval = found[f"{name} {at}"]
        extra = {"interval": interval, "null": null, "null_interval": null_interval, "n": n}
        note = f"latents of {dense.name}" if dense is not None and name == "dense latents" else ""
        table.append(finding(row, "prediction", "accuracy", value, against=name, at=at, note=note, **extra))  # type: ignore[arg-type]
        if name == "dense latents" and f"gain {at}" in found:
            value, interval = found[f"gain {at}"]
            table.append(finding(row, "prediction", "accuracy over bigram", value, against=name, at=at, interval=interval, null=0.0, n=n, note=note))
    return table + [finding(row, "prediction", "accuracy", None, against=name, note=note) for name, note in notes.items()]


def stability(group: Sequence[Routed], sample: Sample, halves: tuple[Tensor, Tensor], draws: int) -> Table:
    """For each pair of seeds: experts matched one to one by the rows that they share on documents A; how often matched experts agree on documents B,
    NMI and ARI of the two partitions there, and the cosine of matched router rows. Nulls: one partition's routes shuffled within documents, and
    matched anew; for rows, all assignments alike."""
    if len(group) < 2:
        return [finding(one.seen.row, "stability", "agreement", None, note="no second seed of this SAE") for one in group]
    table: Table = []
    first, second = halves
    for one, other in combinations(group, 2):
        row, sizes = one.seen.row, (one.seen.row.num_experts, other.seen.row.num_experts)
        mine_T, theirs_T = one.expert_T(), other.expert_T()

        def matched(route_T: Tensor, theirs_T: Tensor = theirs_T, sizes: tuple[int, int] = sizes) -> tuple[Tensor, Tensor]:
            """(rows of B on which matched experts agree, the match)."""
            match_E = one_to_one(co_routing(route_T[first], theirs_T[first], sizes).double())[1]
            return (match_E[route_T[second]] == theirs_T[second]).double(), match_E

        agrees_B, match_E = matched(mine_T)
        value, interval = over_documents(sample.document_T[second], {"agreement": (agrees_B, None)})["agreement"]
        null = null_of(lambda route_T: float(matched(route_T)[0].mean()), mine_T, sample.document_T, draws)
        extra = {"against": other.seen.name, "n": len(second)}
        known = {"interval": interval, "null": float(null.mean()), "null_interval": middle_of(null)}
        table.append(finding(row, "stability", "agreement", value, **known, **extra))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        mixed = [shuffled(mine_T, sample.document_T, generator)[second] for _ in range(draws)]
        for name, statistic in (
            ("NMI", lambda route_T: normalized_mutual_information(route_T, theirs_T[second])),  # noqa: B023
            ("ARI", lambda route_T: adjusted_rand(co_routing(route_T, theirs_T[second], sizes))),  # noqa: B023
        ):
            null = torch.tensor([statistic(route_T) for route_T in mixed], dtype=torch.float64)
            known = {"null": float(null.mean()), "null_interval": middle_of(null)}
            table.append(finding(row, "stability", name, statistic(mine_T[second]), **known, **extra))  # type: ignore[arg-type]
        cosine_EE = cosines(one.rows_ED, other.rows_ED)
        permuted = torch.stack([cosine_EE[torch.arange(sizes[0]), torch.randperm(sizes[0], generator=generator)].mean() for _ in range(draws)])
        value = float(cosine_EE[torch.arange(sizes[0]), match_E].mean())
        known = {"null": float(permuted.mean()), "null_interval": middle_of(permuted)}
        table.append(finding(row, "stability", "cosine of matched rows", value, against=other.seen.name, n=sizes[0], **known))  # type: ignore[arg-type]
    return table

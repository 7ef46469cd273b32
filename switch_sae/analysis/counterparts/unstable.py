"""Whether latents that no other seed finds still span the same directions in every seed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.counterparts.pairing import Side
from switch_sae.analysis.findings import finding

RANKS = (4, 16, 64)
DRAWS = 20


def overlaps(first: Side, second: Side, chosen_A: Tensor, chosen_B: Tensor) -> list[dict[str, Any]]:
    """Findings about the subspaces of the chosen latents of two seeds, at every rank r that both fill.

    `overlap`: mean cos^2 of the principal angles between the spans of the first r right singular vectors of both seeds' unit decoder rows,
    |V V'|^2 / r; its null, random subspaces, has mean r / D (and the span of `DRAWS` of them as interval). `angle`: the median angle in degrees.
    `variance`: the share of the rows' squares that r directions of their own hold, against as many random rows. `overlap of any`: the same overlap
    for as many live latents of each seed drawn at random, chosen or not; mean and span of `DRAWS` draws.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = [side.unit_AD[chosen] for side, chosen in ((first, chosen_A), (second, chosen_B))]
    size = first.unit_AD.shape[1]
    ranks = [rank for rank in RANKS if rank < size and rank <= min(map(len, chosen))]
    about: dict[str, Any] = {"against": second.seen.name, "n": min(map(len, chosen))}
    if not ranks:
        note = f"{len(chosen[0])} and {len(chosen[1])} latents recur in no other seed: too few to span {RANKS[0]} of {size} dimensions"
        return [finding(first.seen.row, "subspace", "overlap", None, note=note, **about)]
    (basis, share), (other, _) = (principal(rows) for rows in chosen)
    random_share = principal(F.normalize(torch.randn(chosen[0].shape, generator=generator), dim=1))[1]
    drawn = [
        [principal(_drawn(side.unit_AD, len(rows), generator))[0] for side, rows in zip((first, second), chosen, strict=True)] for _ in range(DRAWS)
    ]
    turned = [torch.linalg.qr(torch.randn(size, ranks[-1], generator=generator))[0] for _ in range(DRAWS)]
    table = []
    for rank in ranks:
        cosine = torch.linalg.svdvals(basis[:, :rank].T @ other[:, :rank]).clamp(max=1)
        any_overlap = [overlap(one, two, rank) for one, two in drawn]
        chance = [overlap(basis, one, rank) for one in turned]
        at: dict[str, Any] = {"at": rank, **about}
        table += [
            finding(
                first.seen.row, "subspace", "overlap", overlap(basis, other, rank), null=rank / size, null_interval=(min(chance), max(chance)), **at
            ),
            finding(
                *(first.seen.row, "subspace", "overlap of any", sum(any_overlap) / DRAWS),
                interval=(min(any_overlap), max(any_overlap)),
                null=rank / size,
                null_interval=(min(chance), max(chance)),
                **at,
            ),
            finding(first.seen.row, "subspace", "angle", float(cosine.acos().rad2deg().median()), **at),
            finding(first.seen.row, "subspace", "variance", float(share[rank - 1]), null=float(random_share[rank - 1]), **at),
        ]
    return table


def principal(rows_AD: Tensor) -> tuple[Tensor, Tensor]:
    """([D, D] right singular vectors as columns, largest first; [D] the share of all squares that the first 1, 2, ... D of them hold)."""
    value_D, vector_DD = torch.linalg.eigh(rows_AD.double().T @ rows_AD.double())
    value_D = value_D.flip(0).clamp(min=0)
    return vector_DD.flip(1).float(), value_D.cumsum(0) / value_D.sum()


def overlap(basis_DR: Tensor, other_DR: Tensor, rank: int) -> float:
    """Mean squared cosine of the principal angles between the spans of the first `rank` columns, orthonormal each: 0 to 1."""
    return float((basis_DR[:, :rank].T @ other_DR[:, :rank]).square().sum() / rank)


def _drawn(rows_AD: Tensor, number: int, generator: torch.Generator) -> Tensor:
    return rows_AD[torch.randperm(len(rows_AD), generator=generator)[:number]]

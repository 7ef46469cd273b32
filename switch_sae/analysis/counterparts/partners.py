"""What another SAE makes of a dense SAE's latent: one latent, copies, parts in several experts, part of a broader one, or nothing.

Shapes: A live latents of the dense SAE, B of the other one, N groups of documents, R resamples.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from switch_sae.analysis.counterparts.coactivation import PAIRS, firing, groups, products, sums, values_of
from switch_sae.analysis.counterparts.pairing import Side
from switch_sae.rows import Shapes

KINDS = ("matched", "copied", "split", "refined", "absorbed", "lost")


class Limits(Protocol):
    """Thresholds; `Fates.Config` has them."""

    near: float
    part: float
    inside: float
    cover: float
    whole: float
    copy: float
    min_count: int


@dataclass(frozen=True, repr=False)
class Judged(Shapes):
    """Partners of each dense latent, chosen on documents A, and what they cover of its activation on documents B."""

    limits: Limits
    partner_AB: Tensor
    """bool."""
    cosine_AB: Tensor
    share_AB: Tensor
    """Share of a's activation on documents A that falls on rows where b fires."""
    experts_A: Tensor
    """In how many experts its partners lie; all shared latents count as one more."""
    alike_A: Tensor
    """Mean cosine between partners in different experts; NaN where all are in one."""
    judged_A: Tensor
    """bool: fires on at least `min_count` rows of documents B too."""
    rows_N: Tensor
    mass_NA: Tensor
    """Sum of its activations, by group of documents B."""
    covered_NA: Tensor
    """The same on rows where some partner fires."""
    strongest_NA: Tensor
    """On rows where the partner with the largest share on A fires."""
    broadest_NA: Tensor
    """On rows where the latent fires that has, of all those at cosine >= `near`, the largest share on A; 0 where that is below `cover`."""

    def cover_A(self) -> Tensor:
        """Share of its activation on documents B that its partners cover."""
        return self.covered_NA.sum(0) / self.mass_NA.sum(0)

    def kind_A(self) -> Tensor:
        """Place in `KINDS`; -1 for latents that are not judged."""
        return self.kinds(torch.ones(1, len(self.rows_N), dtype=torch.float64))[0][0]

    def kinds(self, weights_RN: Tensor) -> tuple[Tensor, Tensor]:
        """(place in `KINDS`, activation), both [R, A], on resampled documents B; -1 for latents that do not fire there."""
        limits = self.limits
        mass_RA = weights_RN @ self.mass_NA
        covered_RA, strongest_RA, broadest_RA = ((weights_RN @ part) / mass_RA for part in (self.covered_NA, self.strongest_NA, self.broadest_NA))
        several_A = self.experts_A >= 2
        matched, copied, split, refined, absorbed, lost = (torch.tensor(place) for place in range(len(KINDS)))
        kind_RA = torch.where(several_A, split, refined).expand_as(mass_RA)
        kind_RA = torch.where(strongest_RA >= limits.whole * covered_RA, matched, kind_RA)
        kind_RA = torch.where(several_A & (self.alike_A >= limits.copy), copied, kind_RA)
        kind_RA = torch.where(covered_RA >= limits.cover, kind_RA, torch.where(broadest_RA >= limits.cover, absorbed, lost))
        return kind_RA.masked_fill(~self.judged_A | (mass_RA == 0), -1), mass_RA

    def shares(self, weights_RN: Tensor, part_A: Tensor) -> dict[str, Tensor]:
        """[R] each, of the latents in `part_A`: shares of each kind among them ("latents/KIND") and of their activation ("activation/KIND")."""
        kind_RA, mass_RA = self.kinds(weights_RN)
        kind_RA, mass_RA = kind_RA[:, part_A], mass_RA[:, part_A]
        known_RA = kind_RA >= 0
        found = {}
        for place, name in enumerate(KINDS):
            of_RA = kind_RA == place
            found[f"latents/{name}"] = of_RA.sum(1) / known_RA.sum(1).double()
            found[f"activation/{name}"] = (mass_RA * of_RA).sum(1) / (mass_RA * known_RA).sum(1)
        return found


def judge(dense: Side, other: Side, expert_B: Tensor, limits: Limits) -> Judged:
    """`expert_B` says in which expert each live latent of the other SAE is, -1 for shared ones."""
    cosine_AB = dense.unit_AD @ other.unit_AD.T
    near_AB = cosine_AB >= limits.near
    share_AB = products(dense.on_a, firing(other.on_a)) / sums(dense.on_a)[0].float()[:, None]
    inside_AB = products(firing(dense.on_a), other.on_a) / sums(other.on_a)[0].float()
    partner_AB = near_AB & (share_AB >= limits.part) & (inside_AB >= limits.inside)
    del inside_AB
    experts_A, alike_A = _spread(partner_AB, other.unit_AD, expert_B)
    strongest_share, strongest_A = share_AB.masked_fill(~partner_AB, -1).max(1)
    broadest_share, broadest_A = share_AB.masked_fill(~near_AB, -1).max(1)
    group_T, rows_N = groups(dense.document_b_T)
    size = len(rows_N), dense.on_b.num_latents
    fires = firing(other.on_b)
    place_TK = group_T[:, None] * size[1] + dense.on_b.indices_TK

    def summed(on_TK: Tensor) -> Tensor:
        value_TK = dense.on_b.values_TK.double() * on_TK
        return torch.zeros(size[0] * size[1], dtype=torch.float64).index_add_(0, place_TK.flatten(), value_TK.flatten()).view(size)

    def of(latent_A: Tensor, known_A: Tensor) -> Tensor:
        return summed(values_of(fires, latent_A[dense.on_b.indices_TK]) * known_A[dense.on_b.indices_TK])

    return Judged(
        limits,
        partner_AB,
        cosine_AB,
        share_AB,
        experts_A,
        alike_A,
        dense.on_b.firing_counts() >= limits.min_count,
        rows_N,
        summed(torch.ones_like(dense.on_b.values_TK)),
        summed(_covered(dense, other, partner_AB)),
        of(strongest_A, strongest_share >= 0),
        of(broadest_A, broadest_share >= limits.cover),
    )


def _covered(dense: Side, other: Side, partner_AB: Tensor) -> Tensor:
    """[T, K] bool, on documents B: whether some partner of the dense latent in this slot fires."""
    first, second = dense.on_b, other.on_b
    step = max(1, PAIRS // (first.values_TK.shape[1] * second.values_TK.shape[1]))
    blocks = []
    for start in range(0, len(first.values_TK), step):
        rows = slice(start, start + step)
        known_TKK = partner_AB[first.indices_TK[rows, :, None], second.indices_TK[rows, None, :]]
        blocks.append((known_TKK & (second.values_TK[rows, None, :] != 0)).any(2))
    return torch.cat(blocks)


def _spread(partner_AB: Tensor, unit_BD: Tensor, expert_B: Tensor) -> tuple[Tensor, Tensor]:
    """(in how many experts partners lie, mean cosine between partners in different ones): the sum over such pairs is |sum of all|^2 - sum over
    experts of |sum of its own|^2."""
    partners_A = partner_AB.sum(1)
    experts_A, own_pairs_A, own_A = torch.zeros(3, len(partner_AB), dtype=torch.float64)
    total_AD = torch.zeros(len(partner_AB), unit_BD.shape[1], dtype=torch.float64)
    for expert in expert_B.unique():
        in_AB = partner_AB[:, expert_B == expert]
        number_A, sum_AD = in_AB.sum(1), in_AB.float() @ unit_BD[expert_B == expert]
        experts_A += number_A > 0
        own_pairs_A += number_A**2
        own_A += sum_AD.double().square().sum(1)
        total_AD += sum_AD
    pairs_A = partners_A.double() ** 2 - own_pairs_A
    return experts_A.long(), torch.where(pairs_A > 0, (total_AD.square().sum(1) - own_A) / pairs_A, torch.nan)

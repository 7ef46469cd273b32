"""SAEs whose latents are known: what two of them share, split, copy and lose, on rows of documents with a route each."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from switch_sae.analysis.observed import Sample, sparse
from switch_sae.models import DenseLatents
from switch_sae.results.kind import Kind
from switch_sae.rows import Rows

D, EXPERTS = 128, 4
SIZES = {"matched": 40, "copied": 30, "split": 30, "refined": 20, "absorbed": 21, "lost": 30}
"""Latents of the dense SAE, in this order."""
STRANGE = 40
"""Latents of the Switch SAE alone, in each expert 10."""


def directions(number, seed):
    return F.normalize(torch.randn(number, D, generator=torch.Generator().manual_seed(seed)), dim=1)


@dataclass
class World:
    """Rows with a topic (the expert) each, the dense SAE's latents on them, and the Switch SAE's."""

    sample: Sample
    dense_TA: torch.Tensor
    dense_AD: torch.Tensor
    kind_A: list
    switch_TB: torch.Tensor
    switch_BD: torch.Tensor
    expert_B: torch.Tensor


def sample_of(rows, per_document=20, text=False):
    document_T = torch.arange(rows) // per_document
    token_T = torch.arange(rows) % 50 if text else None
    return Sample(Rows.of(torch.zeros(rows, D)), document_T, document_T, torch.arange(rows) % per_document, token_T, token_T)


def world(rows=4000, seed=0, noise=0.1):
    """Copies lie at a cosine of about 0.98 to the dense latent, parts at 0.74, halves of a refined one at 0.98, the broader one of three at 0.58.
    Each firing of the Switch SAE is missed with probability `noise`, and values differ by up to a fifth."""
    generator = torch.Generator().manual_seed(seed)
    topic_T = torch.randint(EXPERTS, (rows,), generator=generator)
    kind_A = [kind for kind, size in SIZES.items() for _ in range(size)]
    dense_AD = directions(len(kind_A), seed)
    everywhere = ("copied", "split", "absorbed", "lost")
    home_A = torch.arange(len(kind_A)) % EXPERTS
    rate_TA = torch.where(torch.tensor([kind in everywhere for kind in kind_A]), 0.04, 0.12 * (topic_T[:, None] == home_A))
    dense_TA = (torch.rand(rows, len(kind_A), generator=generator) < rate_TA) * (0.5 + torch.rand(rows, len(kind_A), generator=generator))
    latents = []  # (expert, direction, values)

    def near(direction, distance):
        return F.normalize(direction + distance * F.normalize(torch.randn(D, generator=generator), dim=0), dim=0)

    for a, kind in enumerate(kind_A):
        value_T, home = dense_TA[:, a], int(home_A[a])
        if kind == "matched":
            latents.append((home, near(dense_AD[a], 0.2), value_T))
        if kind in ("copied", "split"):
            distance = 0.2 if kind == "copied" else 0.9
            latents += [(expert, near(dense_AD[a], distance), value_T * (topic_T == expert)) for expert in range(EXPERTS)]
        if kind == "refined":
            half_T = torch.rand(rows, generator=generator) < 0.5
            latents += [(home, near(dense_AD[a], 0.2), value_T * part_T) for part_T in (half_T, ~half_T)]
        if kind == "absorbed" and kind_A[:a].count("absorbed") % 3 == 0:
            latents.append((0, F.normalize(dense_AD[a : a + 3].sum(0), dim=0), dense_TA[:, a : a + 3].sum(1)))
    for number, direction in enumerate(directions(STRANGE, seed + 100)):
        latents.append((number % EXPERTS, direction, (torch.rand(rows, generator=generator) < 0.04) * torch.rand(rows, generator=generator)))
    latents.sort(key=lambda latent: latent[0])
    switch_TB = torch.stack([values for _, _, values in latents], 1)
    switch_TB *= torch.rand(switch_TB.shape, generator=generator) >= noise
    switch_TB *= 0.8 + 0.4 * torch.rand(switch_TB.shape, generator=generator)
    expert_B = torch.tensor([expert for expert, _, _ in latents])
    return World(sample_of(rows), dense_TA, dense_AD, kind_A, switch_TB, torch.stack([direction for _, direction, _ in latents]), expert_B)


def seen(name, codes_TM, decoder_MD, expert_M=None, seed=0, architecture=None):
    """What `observe` gives of an SAE with these codes and this decoder, as far as matching looks."""
    experts = 1 if expert_M is None else int(expert_M.max()) + 1
    kind = Kind(architecture or ("topk" if experts == 1 else "switch"), experts)
    row = SimpleNamespace(name=name, kind=kind, num_latents=codes_TM.shape[1], num_experts=experts, k=8, seed=seed, num_shared=0)
    expert_M = torch.zeros(codes_TM.shape[1], dtype=torch.int64) if expert_M is None else expert_M
    return SimpleNamespace(
        row=row, name=name, sae=SimpleNamespace(decoder_weight=lambda: decoder_MD), latents=sparse(DenseLatents(codes_TM.float())), expert_M=expert_M
    )


def again(codes_TM, decoder_MD, seed, distance=0.2, noise=0.1):
    """(order, codes, decoder): the same latents in another order, as another seed finds them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(decoder_MD), generator=generator)
    turned_MD = F.normalize(decoder_MD + distance * F.normalize(torch.randn(decoder_MD.shape, generator=generator), dim=1), dim=1)
    return order, (codes_TM * (torch.rand(codes_TM.shape, generator=generator) >= noise))[:, order], turned_MD[order]

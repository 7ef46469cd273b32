"""Examples of what became of dense latents, with the text that activates them and their partners."""

from collections.abc import Callable
from typing import Any

import torch

from switch_sae.analysis.base import Table
from switch_sae.analysis.counterparts.coactivation import correlation, kept
from switch_sae.analysis.counterparts.pairing import Side
from switch_sae.analysis.counterparts.partners import KINDS, Judged
from switch_sae.analysis.findings import finding
from switch_sae.analysis.observed import Sample, Seen
from switch_sae.analysis.text_examples import Example, format_example
from switch_sae.models import SparseLatents

Decode = Callable[[list[int]], str]
EMPTY: dict[str, Any] = {"partner": None, "expert": None, "cosine": None, "correlation": None, "share": None, "text": ""}
"""What records of partners have beside a finding's columns: its number and expert, cosine with the dense latent, correlation of both activations on
documents B, share of the dense latent's activation on A where it fires, and where it is most active."""
OFTEN = 20
PARTNERS = 4
CONTEXTS = 2
WINDOW = 6


def examples(dense: Side, other: Side, judged: Judged, sample: Sample, decode: Decode | None, number: int) -> Table:
    """`number` latents of each kind, at random, because a choice of the nicest ones says little; each followed by its partners, the largest share
    first. For absorbed ones the broader latent; for lost ones without any, the latent with the largest cosine."""
    kind_A, generator = judged.kind_A(), torch.Generator().manual_seed(0)
    counts_A = dense.on_b.firing_counts() + dense.on_a.firing_counts()
    expert_B = other.seen.expert_M[other.keep_A]
    table: Table = []
    for place, kind in enumerate(KINDS):
        candidates = ((kind_A == place) & (counts_A >= OFTEN)).nonzero()[:, 0]
        for a in candidates[torch.randperm(len(candidates), generator=generator)[:number]].tolist():
            about: dict[str, Any] = {"against": other.seen.name, "at": int(dense.keep_A[a]), "n": int(counts_A[a])}
            record = finding(dense.seen.row, "example", kind, float(judged.cover_A()[a]), **about)
            table.append(record | EMPTY | {"text": text_of(dense.seen, int(dense.keep_A[a]), sample, decode)})
            partners = judged.partner_AB[a].nonzero()[:, 0]
            partners = partners[judged.share_AB[a, partners].argsort(descending=True, stable=True)][:PARTNERS]
            note = "partner" if len(partners) else "no partner: the nearest latent"
            others = partners.tolist() or [int(judged.cosine_AB[a].argmax())]
            if kind == "absorbed":
                note, others = "broader latent", [int(judged.share_AB[a].masked_fill(judged.cosine_AB[a] < judged.limits.near, -1).argmax())]
            for b in others:
                pair = correlation(_alone(dense.on_b, a), _alone(other.on_b, b))
                known = {"partner": int(other.keep_A[b]), "expert": int(expert_B[b]), "cosine": float(judged.cosine_AB[a, b])}
                known |= {"correlation": float(pair), "share": float(judged.share_AB[a, b])}
                text = text_of(other.seen, int(other.keep_A[b]), sample, decode)
                table.append(finding(dense.seen.row, "example", kind, None, note=note, **about) | known | {"text": text})
    return table


def text_of(seen: Seen, latent: int, sample: Sample, decode: Decode | None) -> str:
    """The contexts where a latent is most active, one line each (`format_example`), its rows of the sample around the maximum; empty without text."""
    if decode is None or sample.token_T is None:
        return ""
    value_T = (seen.latents.values_TK * (seen.latents.indices_TK == latent)).sum(1)
    best_C = torch.zeros(int(sample.context_T.max()) + 1).scatter_reduce_(0, sample.context_T, value_T, "amax")
    lines = []
    for context in best_C.argsort(descending=True, stable=True)[:CONTEXTS].tolist():
        if best_C[context] <= 0:
            break
        rows = (sample.context_T == context).nonzero()[:, 0]
        centre = int(value_T[rows].argmax())
        view = rows[max(0, centre - WINDOW) : centre + WINDOW + 1]
        tokens = tuple(decode([token]) for token in sample.token_T[view].tolist())
        row = rows[centre]
        example = Example(
            *(latent, context, int(sample.position_T[row]), float(value_T[row]), tokens, tuple(value_T[view].tolist()), min(centre, WINDOW)),
            str(int(sample.document_T[row])),
        )
        lines.append(format_example(example))
    return "\n".join(lines)


def _alone(latents: SparseLatents, latent: int) -> SparseLatents:
    return kept(latents, torch.arange(len(latents.values_TK)), torch.tensor([latent]))

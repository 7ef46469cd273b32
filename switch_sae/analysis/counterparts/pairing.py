"""Latents of two SAEs as pairs: by decoder rows or by activations, one to one or many to one, paired on documents A and scored on documents B.

Shapes: A live latents of the first SAE, B of the second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.assignment import LARGEST, one_to_one
from switch_sae.analysis.counterparts.coactivation import PairSums, correlation, kept, over_documents
from switch_sae.analysis.observed import Sample, Seen
from switch_sae.models import SparseLatents
from switch_sae.rows import Shapes

DECODER, ACTIVATIONS = "decoder", "activations"


@dataclass(frozen=True, repr=False)
class Side(Shapes):
    """The live latents of one SAE: those that fire on documents A often enough to be paired."""

    seen: Seen
    keep_A: Tensor
    """Their numbers, ascending."""
    unit_AD: Tensor
    frequency_A: Tensor
    """Share of the rows of documents A on which it fires."""
    on_a: SparseLatents
    on_b: SparseLatents
    fires_on_b_A: Tensor
    document_b_T: Tensor
    elsewhere_a_T: Tensor
    """For each row of documents A a row of another document of A."""
    elsewhere_b_T: Tensor


def sides(sample: Sample, seen: Sequence[Seen], min_count: int) -> list[Side]:
    """One per SAE, with the latents that fire on at least `min_count` rows of documents A. Raises ValueError where fewer than two do."""
    rows_a, rows_b = sample.halves()
    elsewhere = [other_documents(sample.document_T[rows]) for rows in (rows_a, rows_b)]
    found = []
    for one in seen:
        everything = torch.arange(one.latents.num_latents)
        counts_M = kept(one.latents, rows_a, everything).firing_counts()
        keep_A = (counts_M >= min_count).nonzero()[:, 0]
        if len(keep_A) < 2:
            raise ValueError(
                f"{len(keep_A)} latents of {one.name} fire on at least min_count={min_count} of {len(rows_a)} rows, too few to pair. Use more rows."
            )
        unit_AD = F.normalize(one.sae.decoder_weight().detach().cpu().float()[keep_A], dim=1)
        on_a, on_b = (kept(one.latents, rows, keep_A) for rows in (rows_a, rows_b))
        frequency_A = counts_M[keep_A] / len(rows_a)
        found.append(Side(one, keep_A, unit_AD, frequency_A, on_a, on_b, on_b.firing_counts() > 0, sample.document_T[rows_b], *elsewhere))
    return found


SAME_START = "same seed: decoders start from the same random numbers"


def same_start(first: Side, second: Side) -> str:
    """What is to be said of a pair: SAEs of one seed have latents in common from the start, also of other widths."""
    return SAME_START if first.seen.row.seed == second.seen.row.seed else ""


def other_documents(document_T: Tensor, seed: int = 0) -> Tensor:
    """[T]: a row of another document for every row, each used once: documents in a random order, half a turn apart. Rows of a document stay in
    order. Where one document has more than half of all rows, some of its rows meet its own."""
    number_T = document_T.unique(return_inverse=True)[1]
    rank_N = torch.randperm(int(number_T.max()) + 1, generator=torch.Generator().manual_seed(seed))
    order_T = rank_N[number_T].argsort(stable=True)
    return torch.empty_like(order_T).scatter_(0, order_T, order_T.roll(len(order_T) // 2))


def rotated(unit_AD: Tensor, seed: int = 0) -> Tensor:
    """The same rows after a random rotation: how they lie to each other stays, their directions do not."""
    size = unit_AD.shape[1]
    q, r = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return unit_AD @ (q * r.diagonal().sign()).to(unit_AD)


@dataclass(frozen=True, repr=False)
class Matched(Shapes):
    """A partner for latents of the first SAE, and how well it fits."""

    first: Side
    second: Side
    kind: str
    """one_to_one or many_to_one; shuffled for one-to-one pairs whose partners were dealt out again."""
    by: str
    """What they were paired by: `DECODER` or `ACTIVATIONS`."""
    partner_A: Tensor
    """Place among the second's live latents; -1 without one."""
    cosine_A: Tensor
    on_a_A: Tensor
    """Correlation of activations on documents A."""
    on_b_A: Tensor
    """The same on documents B, which no pairing saw."""
    null: "Matched | None" = None
    """The same after a rotation of the second dictionary (by decoder), or with its rows from other documents (by activations)."""

    def close(self, near: float) -> Tensor:
        """[A] bool: has a partner in nearly its direction."""
        return (self.partner_A >= 0) & (self.cosine_A >= near)

    def values(self, near: float, alike: float, chosen_A: Tensor | None = None) -> dict[str, tuple[float, int]]:
        """(number, how many latents it is over) of `chosen_A`: mean `cosine` and mean `correlation` on B of those with a partner, shares of all that
        are `close` (cosine >= `near`) and `alike` (correlation on B >= `alike`), and `correlation_on_a`, which pairing has flattered. Correlations
        are over latents that fire on B. What is over no latent is left out."""
        chosen_A = torch.ones_like(self.partner_A, dtype=torch.bool) if chosen_A is None else chosen_A
        paired_A, fires_A = chosen_A & (self.partner_A >= 0), chosen_A & self.first.fires_on_b_A
        over = {
            "cosine": (self.cosine_A, paired_A),
            "close": (self.close(near), chosen_A),
            "correlation": (self.on_b_A, paired_A & fires_A),
            "alike": ((self.on_b_A >= alike) & paired_A, fires_A),
            "correlation_on_a": (self.on_a_A, paired_A),
        }
        return {name: (float(value_A[of_A].double().mean()), int(of_A.sum())) for name, (value_A, of_A) in over.items() if bool(of_A.any())}

    def intervals(self, near: float, alike: float, parts: dict[str, Tensor], replicates: int) -> dict[str, tuple[float, float]]:
        """Over documents B, of `correlation` and `alike` of each part [A] bool, by "PART/MEASURE"; the pairs are held fixed."""
        paired_A = self.partner_A >= 0
        pairs = PairSums.of(self.first.on_b, self.second.on_b, self.partner_A.clamp(min=0), self.first.document_b_T)
        values = {f"{part}/{name}": value for part, of_A in parts.items() for name, (value, _) in self.values(near, alike, of_A).items()}

        def resampled(weights_RN: Tensor) -> dict[str, Tensor]:
            value_RA = pairs.correlations(weights_RN)
            found = {}
            for name, part_A in parts.items():
                found[f"{name}/correlation"] = value_RA[:, part_A & paired_A].nanmean(1)
                known_RA = value_RA[:, part_A].isfinite()
                found[f"{name}/alike"] = ((value_RA[:, part_A] >= alike) & paired_A[part_A]).double().sum(1) / known_RA.sum(1)
            return found

        spans = over_documents(resampled, values, pairs.rows_N, replicates)
        return {name: (max(low, 0.0), min(high, 1.0)) if name.endswith("alike") else (low, high) for name, (low, high) in spans.items()}


@dataclass(frozen=True, repr=False)
class Scores(Shapes):
    """All pairs of live latents of two SAEs, [A, B] each."""

    cosine: Tensor
    on_a: Tensor
    on_b: Tensor

    @property
    def turned(self) -> "Scores":
        return Scores(self.cosine.T, self.on_a.T, self.on_b.T)

    @classmethod
    def of(cls, first: Side, second: Side) -> "Scores":
        return cls(first.unit_AD @ second.unit_AD.T, correlation(first.on_a, second.on_a), correlation(first.on_b, second.on_b))


def stranger(side: Side) -> Side:
    """The same latents with their directions rotated, on other documents: nothing of it can match but by chance."""
    everything_A = torch.arange(len(side.keep_A))
    on_a, on_b = (kept(codes, rows_T, everything_A) for codes, rows_T in ((side.on_a, side.elsewhere_a_T), (side.on_b, side.elsewhere_b_T)))
    return replace(side, unit_AD=rotated(side.unit_AD), on_a=on_a, on_b=on_b)


def matches(first: Side, second: Side, true: Scores) -> Iterator[Matched]:
    """Every matching of two SAEs, of the first's latents and then of the second's: one to one, many to one and shuffled, by decoder and by
    activations.

    One to one maximises the sum of signed scores (Hungarian algorithm); many to one takes each latent's best. More than `LARGEST` latents on both
    sides get no partner one to one. The null is paired by scores with a `stranger`; its pairs by decoder are scored by true activations, those by
    activations by true directions.
    """
    strange = stranger(second)
    chance = Scores.of(first, strange)
    for by in (DECODER, ACTIVATIONS):
        scored = [true.cosine, chance.cosine] if by == DECODER else [true.on_a, chance.on_a]
        scores = [true, replace(true, cosine=chance.cosine) if by == DECODER else replace(chance, cosine=true.cosine)]
        answers = [second, second if by == DECODER else strange]
        single = [_assigned(score_AB) for score_AB in scored]
        for side in (0, 1):
            asks = [(first, answer) if side == 0 else (answer, first) for answer in answers]
            sided = [one.turned for one in scores] if side else scores
            for kind in ("one_to_one", "many_to_one"):
                partners = [pair[side] for pair in single] if kind == "one_to_one" else [score_AB.argmax(1 - side) for score_AB in scored]
                null = _matched(*asks[1], kind, by, partners[1], sided[1], None)
                yield _matched(*asks[0], kind, by, partners[0], sided[0], null)
            yield _matched(*asks[0], "shuffled", by, _dealt_again(single[0][side]), sided[0], None)


def _assigned(score_AB: Tensor) -> tuple[Tensor, Tensor]:
    """(partner of each row, partner of each column), -1 without one."""
    partner_A, partner_B = (torch.full((size,), -1) for size in score_AB.shape)
    if min(score_AB.shape) <= LARGEST:
        a, b = one_to_one(score_AB)
        partner_A[a], partner_B[b] = b, a
    return partner_A, partner_B


def _dealt_again(partner_A: Tensor) -> Tensor:
    """Those that have a partner get another's, at random."""
    paired = (partner_A >= 0).nonzero()[:, 0]
    mixed = torch.randperm(len(paired), generator=torch.Generator().manual_seed(0))
    return partner_A.scatter(0, paired, partner_A[paired[mixed]])


def _matched(first: Side, second: Side, kind: str, by: str, partner_A: Tensor, scores: Scores, null: Matched | None) -> Matched:
    at = torch.arange(len(partner_A)), partner_A.clamp(min=0)
    cosine_A, on_a_A, on_b_A = (torch.where(partner_A >= 0, score_AB[at], 0.0) for score_AB in (scores.cosine, scores.on_a, scores.on_b))
    return Matched(first, second, kind, by, partner_A, cosine_A, on_a_A, on_b_A, null)

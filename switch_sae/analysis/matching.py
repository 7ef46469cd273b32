"""Whether SAEs find the same latents: one-to-one and many-to-one matches between architectures, against what seeds of one architecture reach."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.assignment import LARGEST
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.counterparts.matching_figure import drawn, means
from switch_sae.analysis.counterparts.pairing import ACTIVATIONS, DECODER, Matched, Scores, Side, matches, rotated, same_start, sides
from switch_sae.analysis.counterparts.unstable import overlaps
from switch_sae.analysis.findings import chosen, compact, finding
from switch_sae.analysis.observed import observe, only_dense, series, series_name
from switch_sae.analysis.recovery import mean_best_match
from switch_sae.checks import Settings, at_least
from switch_sae.countdown import Countdown
from switch_sae.results.rows import ResultRow, grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDGES = (0.001, 0.003, 0.01)
"""Bins of firing frequency, on documents A, lie between these."""
BINS = ("below 0.1 %", "0.1 to 0.3 %", "0.3 to 1 %", "above 1 %")

MEASURES = ("cosine", "close", "correlation", "alike", "correlation_on_a")

RECURRING: dict[str, Callable[[Tensor], float]] = {
    "recurs": lambda found_SA: float(found_SA.double().mean()),
    "recurs in all": lambda found_SA: float(found_SA.all(0).double().mean()),
    "recurs in none": lambda found_SA: float((~found_SA.any(0)).double().mean()),
}


class Matching(Analysis):
    """Matches between every dense SAE and every other one, and between seeds of each kind, which are the ceiling.

    Live latents fire on at least `min_count` rows of documents A. Parts of the table, with `at` saying what pairs were made by:

    - `one_to_one` (Hungarian) and `many_to_one` (each latent's best), by `decoder` (signed cosine) and by `activations` (Pearson correlation on
      documents A). Measures: mean `cosine`; `close`, share of live latents with a partner at cosine >= `near`; mean `correlation` on documents B;
      `alike`, share at correlation >= `alike` there; `correlation_on_a`, which the pairing itself flatters. Null: rotated dictionary (by decoder),
      permuted documents (by activations). Ceiling: what the same latents
      reach in other seeds of their own kind.
    - `shuffled`: cosine and correlation after the one-to-one partners are dealt out again.
    - `by_frequency`: the one-to-one measures by how often a latent fires.
    - `stability`: over all other seeds of a kind, the mean share of latents that recur (`close`, one to one by decoder), shares that recur in `all`
      and in `none`; PW-MCC, the mean |cosine| of one-to-one matches (2505.20254). Null: rotated.
    - `subspace`: of latents that recur in no other seed (`unstable`), against as many random ones (`any`): `overlap` = mean cos^2 of the principal
      angles between seeds' first r right singular vectors, `angle` = their median in degrees, and `variance` = what the r directions hold; at = r.
      Null of the overlap: random subspaces, r / D.

    Intervals resample documents B. SAEs of one seed start from the same random numbers, which helps their match: `note` says so, and means
    over seeds, in figures and on terminals, leave them out where pairs of different seeds are there.
    """

    @dataclass
    class Config(Settings):
        rows: int = 20_000
        near: float = 0.7
        """Paulo & Belrose's (2501.16615)."""
        alike: float = 0.5
        min_count: int = 5
        bootstrap: int = 300
        """Resamples of documents B; nulls take at most 100."""

        def __post_init__(self) -> None:
            for name in ("near", "alike"):
                if not 0 < getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1, as cosines and correlations do.")
            at_least("min_count", self.min_count, 2)
            at_least("bootstrap", self.bootstrap, 0)

    needs, each_alone = "rows", False
    config: "Matching.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """Records of `finding`. Raises ValueError for fewer than two SAEs or none that is dense."""
        if len(saes) < 2:
            raise ValueError(f"matching needs at least two SAEs, and only {', '.join(row.name for row in saes)} was given. Add runs to the paths.")
        dense = {id(row) for row in only_dense(saes, "matching")}
        sample, seen = observe(saes, source, self.config.rows)
        found = sides(sample, seen, self.config.min_count)
        pairs = [pair for pair in combinations(found, 2) if _kind(pair[0]) == _kind(pair[1]) or dense & {id(side.seen.row) for side in pair}]
        place = {id(side): number for number, side in enumerate(found)}
        ahead = Countdown("matching", len(pairs), "pairs of SAEs")
        table: Table = []
        recurs: dict[tuple[int, int], Matched] = {}
        for done, (first, second) in enumerate(pairs):
            true, seeds = Scores.of(first, second), _kind(first) == _kind(second)
            for match in matches(first, second, true):
                table += self._records(match)
                if seeds and (match.kind, match.by) == ("one_to_one", DECODER):
                    recurs[place[id(match.first)], place[id(match.second)]] = match
            table += self._pw_mcc(first, second, true) if seeds else []
            ahead(done + 1)
        return _with_ceilings(table) + self._stability(found, recurs)

    def _records(self, match: Matched) -> Iterator[dict[str, Any]]:
        near, alike, resamples = self.config.near, self.config.alike, self.config.bootstrap
        bin_A = torch.bucketize(match.first.frequency_A, torch.tensor(EDGES), right=True)
        parts = {"": torch.ones_like(bin_A, dtype=torch.bool)}
        if match.kind == "one_to_one":
            parts |= {name: bin_A == place for place, name in enumerate(BINS)}
        spans = match.intervals(near, alike, parts, resamples)
        null_spans = {} if match.null is None else match.null.intervals(near, alike, parts, min(100, resamples))
        note = same_start(match.first, match.second)
        if not bool((match.partner_A >= 0).any()):
            note, parts = f"more than {LARGEST} live latents on both sides: not matched one to one", {"": torch.zeros_like(bin_A, dtype=torch.bool)}
        for at, chosen_A in parts.items():
            values = match.values(near, alike, chosen_A)
            nulls = {} if match.null is None else match.null.values(near, alike, chosen_A)
            for measure in ("cosine", "correlation") if match.kind == "shuffled" else MEASURES[: 4 if at else None]:
                value, n = values.get(measure, (None, 0))
                yield finding(
                    match.first.seen.row,
                    "by_frequency" if at else match.kind,
                    f"{measure} by {match.by}" if at else measure,
                    value,
                    against=match.second.seen.name,
                    at=at or match.by,
                    interval=spans.get(f"{at}/{measure}") if n else None,
                    null=nulls.get(measure, (None, 0))[0],
                    null_interval=null_spans.get(f"{at}/{measure}") if n else None,
                    n=n,
                    note=note,
                )

    def _pw_mcc(self, first: Side, second: Side, true: Scores) -> Table:
        if min(true.cosine.shape) > LARGEST:
            return []
        value, null = mean_best_match(true.cosine), mean_best_match(first.unit_AD @ rotated(second.unit_AD).T)
        return [
            finding(one.seen.row, "stability", "pw_mcc", value, against=other.seen.name, null=null, n=min(true.cosine.shape))
            for one, other in ((first, second), (second, first))
        ]

    def _stability(self, found: Sequence[Side], recurs: dict[tuple[int, int], Matched]) -> Table:
        table: Table = []
        for group in grouped(range(len(found)), lambda place: _kind(found[place])).values():
            row = found[group[0]].seen.row
            if len(group) < 2:
                table.append(finding(row, "stability", "recurs", None, note="one seed of this kind: whether its latents recur is unknown"))
                continue
            unstable = {}
            for place in group:
                matched = [recurs[place, other] for other in group if other != place]
                recurring = torch.stack([one.close(self.config.near) for one in matched])
                by_chance = torch.stack([one.null.close(self.config.near) for one in matched if one.null is not None])
                unstable[place] = ~recurring.any(0)
                shares = [(name, how(recurring), how(by_chance)) for name, how in RECURRING.items()]
                note = f"over {len(group) - 1} other seed{'s' * (len(group) > 2)}"
                table += [
                    finding(found[place].seen.row, "stability", name, value, at=self.config.near, null=null, n=recurring.shape[1], note=note)
                    for name, value, null in shares
                ]
            for one, other in combinations(group, 2):
                table += overlaps(found[one], found[other], unstable[one], unstable[other])
        return table

    def shown(self, table: Table) -> Table:
        """Means over the pairs of runs of each two kinds: of decoders for pairs by decoder, of activations for pairs by activations."""
        records = means(table)
        shown = chosen(records, part=("one_to_one", "many_to_one"), at=DECODER, measure=MEASURES[:2])
        shown += chosen(records, part=("one_to_one", "many_to_one"), at=ACTIVATIONS, measure=MEASURES[2:])
        shown += chosen(records, part="stability")
        return compact(shown + [record for record in chosen(records, part="subspace") if record["at"] in ("", 16)])

    def draw(self, table: Table) -> "Figure":
        """Matches with their nulls and ceilings, then by frequency, and the subspaces of latents that do not recur."""
        return drawn(table, self.config.near, self.config.alike)


def _kind(side: Side) -> str:
    return series(side.seen.row)


def _with_ceilings(table: Table) -> Table:
    """Between kinds: what the same latents reach in other seeds of their own kind."""
    own = {}
    for record in means(table):
        if record["sae"] == record["against"]:
            own[record["sae"], record["part"], record["measure"], record["at"]] = record["value"]
    filled = []
    for record in table:
        kind = series_name(record["sae"])
        if kind != series_name(record["against"]) and record["part"] != "shuffled" and record["value"] is not None:
            ceiling = own.get((kind, record["part"], record["measure"], record["at"]))
            note = "" if ceiling is not None else f"no ceiling: one seed of {kind}"
            record = record | {"ceiling": ceiling, "note": "; ".join(filter(None, (record["note"], note)))}
        filled.append(record)
    return filled

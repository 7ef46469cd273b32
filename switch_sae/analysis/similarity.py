"""Whether two SAEs represent the same tokens alike, along the path from activations over codes to reconstructions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.findings import chosen, compact, finding
from switch_sae.analysis.likeness.calibration import LEAST_DOCUMENTS, balanced, calibrated
from switch_sae.analysis.likeness.comparing import Comparison, Plan, compare
from switch_sae.analysis.likeness.dual_bootstrap import seed_mean, spread
from switch_sae.analysis.likeness.figure import similarity_figure
from switch_sae.analysis.likeness.merging import MOST_MIXED, duplicate_clusters, likeness
from switch_sae.analysis.likeness.representation import Codes, Representation, Vectors
from switch_sae.analysis.likeness.rsa import noise_ceiling, partialled, sampled_pairs
from switch_sae.analysis.likeness.strata import stratum
from switch_sae.analysis.observed import Sample, Seen, by_series, observe
from switch_sae.checks import Settings, all_at_least
from switch_sae.countdown import Countdown
from switch_sae.metrics.bootstrap import effective_documents
from switch_sae.results.rows import ResultRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("ungated", "codes", "merged", "soft", "reconstructions")
"""Codes before and after the gate, with duplicates merged (clusters; softly), and what they decode to."""
MEASURES = ("rho_a", "spearman", "tau_a", "rho_a_correlation", "cka", "mutual_knn")
ACTIVATIONS, SEEDS = "activations", "its other seeds"


class Similarity(Analysis):
    """For every two kinds of SAE (seeds together), every kind and its own seeds, and every kind and the activations: how alike they represent the
    same held-out rows at each of `STAGES`, by each of `MEASURES`.

    `part` "path": the measures. "noise ceiling": what seeds of one kind agree on. "route": how well "same expert or not" alone predicts the other's
    codes, and what is left of the codes' similarity without it. "strata": among pairs of one expert, and of different ones, against as many pairs of
    random groups. Beside each number its interval (seeds and documents, `dual_bootstrap`), what permuted documents give (`calibration`: null,
    `calibrated` = s_cal, `p`), and as its ceiling the geometric mean of what the seeds of both sides agree on among themselves.
    """

    @dataclass
    class Config(Settings):
        rows: int = 10_000
        pairs: int = 200_000
        merge: float = 0.9
        """Decoder cosine from which latents of one SAE are one unit of its merged code."""
        gamma: float = 4.0
        """Soft merging weighs two latents by max(cosine, 0)^gamma."""
        neighbours: int = 10
        permutations: int = 200
        bootstrap: int = 200

        def __post_init__(self) -> None:
            all_at_least(self, rows=8, pairs=1000, gamma=0, neighbours=1, permutations=19, bootstrap=2)
            if not 0 < self.merge <= 1:
                raise ValueError(f"merge={self.merge} is a cosine: it must lie above 0 and at most at 1, such as 0.9.")

    needs = "rows"
    each_alone = False
    config: "Similarity.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """Raises ValueError for one SAE, for SAEs of other activations, and for rows of one document."""
        if len(saes) < 2:
            raise ValueError(f"similarity compares SAEs, and only {saes[0].name} was given. Give at least two runs, or two seeds of one.")
        sample, seen = observe(sorted(saes, key=lambda row: (*row.kind.order, row.num_latents, row.name)), source, self.config.rows)
        if sample.num_documents < 2:
            raise ValueError("all rows come from one document, so nothing can be said about others. Ask for more rows.")
        found = _Found(self.config, sample, seen)
        return [record for stage in STAGES for record in found.records(stage)]

    def shown(self, table: Table) -> Table:
        """Codes and reconstructions by the main measures, and the other parts of codes."""
        main = chosen(table, part="path", at=("codes", "merged", "reconstructions"), measure=("rho_a", "cka", "mutual_knn"))
        records = main + [record for record in table if record["part"] != "path" and record["at"] == "codes"]
        return [line | {"s_cal": record["calibrated"], "p": record["p"]} for line, record in zip(compact(records), records, strict=True)]

    def draw(self, table: Table) -> "Figure":
        """The path from codes to reconstructions for all kinds against the first, and what the route explains."""
        return similarity_figure(table, STAGES)


class _Found:
    """One sample, several SAEs, stage by stage."""

    def __init__(self, config: Similarity.Config, sample: Sample, seen: Sequence[Seen]) -> None:
        self.config, self.sample, self.seen = config, sample, list(seen)
        self.mean_D = sample.rows.x_TD.mean(0)
        self.places = {name: [self.seen.index(one) for one in group] for name, group in by_series(seen).items()}
        self.routed = [place for place, one in enumerate(self.seen) if one.routing is not None]
        self.documents = effective_documents(sample.document_T.bincount())
        self.countdown = Countdown("comparing", len(STAGES) * 2 * (config.permutations + config.bootstrap), "rounds")
        self.rounds = 0
        self.plan = Plan(
            sample.document_T,
            sampled_pairs(len(sample), config.pairs),
            balanced(sample.document_T),
            config.neighbours,
            config.bootstrap,
            config.permutations,
            self._done,
        )

    def _done(self, rounds: int) -> None:
        self.rounds += rounds
        self.countdown(self.rounds)

    def view(self, one: Seen, stage: str) -> Representation | None:
        """One SAE at a stage; None for a soft code of too many latents."""
        if stage == "reconstructions":
            return Vectors(one.recon_TD - self.mean_D)
        if stage in ("ungated", "codes"):
            return Codes.of(one.ungated() if stage == "ungated" else one.latents)
        decoder_MD = one.sae.decoder_weight().detach()
        if stage == "merged":
            return Codes.of(one.latents, duplicate_clusters(decoder_MD, one.latents.firing_counts() > 0, self.config.merge))
        fires_M = one.latents.firing_counts() > 0
        mix_MM = likeness(decoder_MD[fires_M], self.config.gamma)
        return None if mix_MM is None else Codes.of(one.latents, (fires_M.cumsum(0) - 1).clamp(min=0), mix_MM)

    def records(self, stage: str) -> Iterator[dict[str, Any]]:
        views = [self.view(one, stage) for one in self.seen]
        known = [view for view in views if view is not None]
        if len(known) < len(views):
            row = next(one.row for one, view in zip(self.seen, views, strict=True) if view is None)
            note = f"no mixing matrix for more than {MOST_MIXED} latents"
            yield finding(row, "path", "rho_a", None, at=stage, note=note) | {"calibrated": None, "p": None}
            return
        has_routes = stage in ("ungated", "codes", "merged")
        routes = [self._route(place) for place in self.routed] if has_routes else []
        found = compare([*known, Vectors(self.sample.rows.x_TD - self.mean_D)], routes, self.plan)
        for first, second in combinations_with_replacement(self.places, 2):
            if first != second or len(self.places[first]) > 1:
                yield from self._path(found, stage, first, second)
        for name in self.places:
            yield from self._path(found, stage, name, ACTIVATIONS)
            yield from self._ceilings(found, stage, name)
        if has_routes:
            yield from self._routes(found, stage)

    def _route(self, place: int) -> Codes:
        """A code with one unit per expert: cosine 1 for rows of the same (likeliest) one, else 0."""
        expert_T = self.seen[place].expert_T()[:, None]
        return Codes(torch.ones(expert_T.shape), expert_T, self.seen[place].row.num_experts)

    def _of(self, name: str) -> list[int]:
        return [len(self.seen)] if name == ACTIVATIONS else self.places[name]

    def _record(self, name: str, part: str, measure: str, value: float, calibration: Any = None, **more: Any) -> dict[str, Any]:
        first = self.seen[self.places[name][0]].row
        usable = value if math.isfinite(value) else None
        null = {} if calibration is None else {"null": calibration.null, "null_interval": calibration.interval}
        record = finding(first, part, measure, usable, **null, **more) | {"sae": name}
        if len(self.places[name]) > 1:
            record["seed"] = None
        return record | {"calibrated": calibration and calibration.score, "p": calibration and calibration.p}

    def _summary(
        self, name: str, against: str, part: str, measure: str, stage: str, found: tuple[Tensor, ...], ceiling: float | None = None, note: str = ""
    ) -> dict[str, Any]:
        """A record of matrices over seeds of both sides: value, middle, resampled, observed, null, most; the last three may be missing."""
        value_AB, middle_AB, resampled_RAB, *calibration = found
        same = name == against
        ones_A, ones_B = (torch.ones(size, dtype=torch.float64) for size in value_AB.shape)

        def mean(matrix: Tensor) -> Tensor:
            return seed_mean(matrix, ones_A, ones_B, same)

        value = float(mean(value_AB))
        around = spread(value, middle_AB, resampled_RAB, same, self.documents) if len(resampled_RAB) else None
        against_chance = None
        if calibration and math.isfinite(float(mean(calibration[0]))):
            against_chance = calibrated(float(mean(calibration[0])), mean(calibration[1]), float(mean(calibration[2])))
        notes = [note, around.note if around else "", "" if calibration or not len(resampled_RAB) else self._uncalibrated()]
        return self._record(
            *(name, part, measure, value, against_chance),
            against=SEEDS if same else against,
            at=stage,
            interval=around and around.interval,
            ceiling=ceiling,
            n=len(self._of(name)) * len(self._of(against)) if not same else math.comb(len(self._of(name)), 2),
            note="; ".join(part for part in notes if part),
        )

    def _uncalibrated(self) -> str:
        return f"not calibrated: fewer than {LEAST_DOCUMENTS} documents" if self.plan.balanced is None else ""

    def _path(self, found: Comparison, stage: str, name: str, against: str) -> Iterator[dict[str, Any]]:
        rows, columns = torch.meshgrid(torch.tensor(self._of(name)), torch.tensor(self._of(against)), indexing="ij")
        for measure in MEASURES:
            if measure not in found.value:
                continue
            value = found.value[measure][..., rows, columns]
            if measure == "rho_a_correlation":
                note = "" if stage == "reconstructions" else "orders codes without a common latent by their size: do not trust"
                yield self._summary(name, against, "path", measure, stage, (value, value, value[None][:0]), note=note)
                continue
            matrices = [value, found.middle[measure][..., rows, columns], found.resampled[measure][..., rows, columns]]
            if measure in found.null:
                matrices += [of[measure][..., rows, columns] for of in (found.observed, found.null, found.most)]
            note = "" if measure != "cka" or stage != "soft" else "of sampled pairs"
            ceiling, missing = (None, "") if name == against else self._ceiling(found.value[measure], name, against)
            notes = "; ".join(part for part in (note, missing) if part)
            yield self._summary(name, against, "path", measure, stage, tuple(matrices), ceiling, notes)

    def _ceiling(self, value_WW: Tensor, name: str, against: str) -> tuple[float | None, str]:
        """sqrt(a b) of the mean similarities among both sides' own seeds; activations agree with themselves."""
        sides = [side for side in (name, against) if side != ACTIVATIONS]
        if alone := [side for side in sides if len(self.places[side]) < 2]:
            return None, f"no ceiling: one seed of {', '.join(alone)}"
        product = 1.0
        for side in sides:
            among = value_WW[self.places[side]][:, self.places[side]]
            ones = torch.ones(len(among), dtype=torch.float64)
            product *= float(seed_mean(among, ones, ones, True))
        return (math.sqrt(product), "") if product > 0 else (None, "no ceiling: seeds do not agree")

    def _ceilings(self, found: Comparison, stage: str, name: str) -> Iterator[dict[str, Any]]:
        if len(self.places[name]) < 2:
            more: dict[str, Any] = {"at": stage, "against": SEEDS, "note": "no noise ceiling: one seed"}
            yield self._record(name, "noise ceiling", "rho_a lower", math.nan, **more)
            return
        for bound, value in zip(("lower", "upper"), noise_ceiling(found.entries_WP[self.places[name]]), strict=True):
            yield self._record(name, "noise ceiling", f"rho_a {bound}", value, at=stage, against=SEEDS, n=len(self.places[name]))

    def _routes(self, found: Comparison, stage: str) -> Iterator[dict[str, Any]]:
        route = {place: len(self.seen) + 1 + number for number, place in enumerate(self.routed)}
        for name, places in self.places.items():
            if places[0] not in route:
                continue
            for against, others in self.places.items():
                if against == name:
                    continue
                rows, columns = torch.meshgrid(torch.tensor([route[place] for place in places]), torch.tensor(others), indexing="ij")
                for measure in ("rho_a", "spearman"):
                    matrices = [of[measure][..., rows, columns] for of in (found.value, found.middle, found.resampled)]
                    if found.null:
                        matrices += [of[measure][..., rows, columns] for of in (found.observed, found.null, found.most)]
                    yield self._summary(name, against, "route", f"{measure} of the route", stage, tuple(matrices))
                without = [self._without_routes(of["spearman"], places, others, route) for of in (found.value, found.middle, found.resampled)]
                yield self._summary(name, against, "route", "spearman without routes", stage, (*without,), note="each side without its own route")
                if stage != "ungated":
                    yield from self._strata(found, stage, name, against)

    def _without_routes(self, correlation: Tensor, places: list[int], others: list[int], route: dict[int, int]) -> Tensor:
        return torch.stack(
            [
                torch.stack([partialled(correlation, a, b, [route[a]], [route[b]] if b in route else []) for b in others], -1)
                for a in places
            ],
            -2,
        )  # fmt: skip

    def _strata(self, found: Comparison, stage: str, name: str, against: str) -> Iterator[dict[str, Any]]:
        assert found.pairs is not None
        for same_expert, measure in ((True, "spearman, same expert"), (False, "spearman, different experts")):
            seeds = [
                stratum(
                    *(found.entries_WP[a], found.entries_WP[b], found.pairs, self.seen[a].expert_T(), self.sample.document_T),
                    same_expert=same_expert,
                    replicates=self.config.bootstrap,
                )
                for a, b in _paired(self.places[name], self.places[against])
            ]
            if any(one is None for one in seeds):
                note = "all distances of one side tie: these rows share no latent"
                yield self._record(name, "strata", measure, math.nan, against=against, at=stage, note=note)
                continue
            values, resampled, null = (torch.stack([getattr(one, part) for one in seeds]).mean(0) for part in ("value", "resampled_R", "null_S"))
            around = spread(float(values), values[None, None], resampled[:, None, None], False, self.documents)
            yield self._record(
                *(name, "strata", measure, float(values)),
                against=against,
                at=stage,
                interval=around.interval,
                null=float(null.mean()),
                null_interval=(float(null.min()), float(null.max())),
                n=min(one.pairs for one in seeds if one is not None),
                note=f"{len(seeds)} pairs of seeds, over documents alone; null: as many pairs by random groups of the experts' sizes",
            )


def _paired(first: list[int], second: list[int]) -> list[tuple[int, int]]:
    """Each of the longer list with one of the other: as many pairs of seeds as there are seeds."""
    count = max(len(first), len(second))
    return [(first[n % len(first)], second[n % len(second)]) for n in range(count)]

"""What a router is geometrically, and what its routes follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.findings import compact, finding
from switch_sae.analysis.observed import Sample, Seen, observe, only_routed
from switch_sae.analysis.router_geometry.control import Wanted, control
from switch_sae.analysis.router_geometry.figure import draw_router
from switch_sae.analysis.router_geometry.partitions import prediction, stability
from switch_sae.analysis.router_geometry.parts import Routed, alike, coupling, margins, sparsity
from switch_sae.analysis.router_geometry.subspaces import one_hot
from switch_sae.checks import Settings, all_at_least
from switch_sae.countdown import Countdown
from switch_sae.results.rows import ResultRow
from switch_sae.results.summary import summary
from switch_sae.style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {
    "sparsity": (
        "R2 encoder",
        "R2 encoder >= 0",
        "R2 decoder",
        "R2 another seed",
        "rows for half, encoder",
        "rows for half, decoder",
        "rows for half, components",
    ),
    "prediction": ("accuracy",),
    "control": (
        *("share of x", "share of error", "accuracy token", "R2 position", "R2 dense latents"),
        *("swap, route of the partner", "swap, FVU", "swap, FVU of the content"),
    ),
    "coupling": (
        "cosine encoder centred mean",
        "cosine decoder centred mean",
        "AUC cosine encoder centred mean",
        "AUC cosine decoder centred mean",
        "AUC cosine encoder singular",
        "AUC cosine dense encoder centred mean",
        "AUC cosine dense decoder centred mean",
        "AUC correlation top k",
        "strongest expert is routed",
        "similarity of rows",
    ),
    "margins": ("flips, noise 1%", "flips, reconstruction", "flips, next token", "information, next token"),
    "stability": ("agreement", "NMI", "ARI", "cosine of matched rows"),
}
"""What a terminal shows of a table, of curves at `SHOWN_AT` only; the CSV holds all."""
SHOWN_AT = ("", 1, 4, 16, 64)


class RouterGeometry(Analysis):
    """For every SAE with experts, on rows that all SAEs see: router rows as sparse sums of a dense SAE's rows (`sparsity`), routes from few dense
    latents (`prediction`), the part of activations that the router sees and the part that it does not (`control`), router rows beside their experts
    (`coupling`), what flips routes and how they follow each other (`margins`), and the same partition with other seeds (`stability`).

    With several experts per token a row's route is the likeliest. The dense SAE is that of the nearest width, of another seed where there is one:
    equal seeds start from the same rows.
    """

    @dataclass
    class Config(Settings):
        rows: int = 20_000
        most: int = 64
        """Rows in a sparse sum at most."""
        features: int = 256
        """Latents or components that routes are predicted from at most."""
        draws: int = 5
        """Of null dictionaries, and of random subspaces."""
        permutations: int = 100
        """Of routes, and of experts."""
        tokens: int = 32
        """The most frequent tokens, to be read from parts of activations."""
        latents: int = 64
        """Latents of the dense SAE, to be read from parts of activations."""
        swaps: int = 4_000
        """Pairs of rows that exchange what the router sees."""

        def __post_init__(self) -> None:
            all_at_least(self, rows=2, most=1, features=1, draws=2, permutations=10, tokens=2, latents=1, swaps=2)

    needs, each_alone = "rows", False
    config: "RouterGeometry.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """Findings of every SAE with experts. Raises ValueError where there is none; without a dense SAE some have no value and a note."""
        routed = only_routed(saes, "router")
        dense = [row for row in saes if row.num_experts == 1]
        partners = {row.model_file: partner(row, dense) for row in routed}
        needed = {row.model_file: row for row in [*routed, *(each for each in partners.values() if each is not None)]}
        sample, observed = observe(list(needed.values()), source, self.config.rows)
        seen = dict(zip(needed, observed, strict=True))
        seeds, twins = repetitions(routed), repetitions(dense)
        known = {row.model_file: Routed.of(seen[row.model_file]) for row in routed}
        ahead, table = Countdown("router", len(routed), "SAEs"), []
        for done, row in enumerate(routed, start=1):
            mine, again = partners[row.model_file], partner(row, others_of(row, seeds))
            twin = None if mine is None else partner(mine, others_of(mine, twins))
            table += self._about(
                known[row.model_file],
                None if mine is None else seen[mine.model_file],
                None if again is None else seen[again.model_file],
                twin,
                sample,
            )
            ahead(done)
        for group in {tuple(row.model_file for row in group): None for group in seeds.values()}:
            table += stability([known[file] for file in group], sample, sample.halves(), self.config.permutations)
        return table

    def _about(self, one: Routed, dense: Seen | None, again: Seen | None, twin: ResultRow | None, sample: Sample) -> Table:
        """Of one SAE, with a dense SAE beside it, another seed of it (`again`) and another seed of the dense one (`twin`)."""
        settings, row = self.config, one.seen.row
        if dense is None:
            table = [finding(row, "sparsity", "R2 encoder", None, note="no dense SAE: add a dense run")]
        else:
            table = sparsity(one, dense, twin, sample, settings.most, settings.draws)
        halves = sample.halves()
        table += alike(one, again, settings.most, settings.draws)
        table += prediction(one, dense, again, sample, halves, settings.features)
        wanted, notes = self._wanted(sample, dense, halves)
        table += control(one, sample, wanted, settings.draws, settings.swaps, halves, dense)
        table += [finding(row, "control", measure, None, note=note) for measure, note in notes.items()]
        return table + coupling(one, dense, sample, settings.permutations) + margins(one, sample, settings.permutations)

    def _wanted(self, sample: Sample, dense: Seen | None, halves: tuple[Tensor, Tensor]) -> tuple[list[Wanted], dict[str, str]]:
        """What shall be read from parts of activations, and why something cannot be."""
        wanted: list[Wanted] = []
        notes: dict[str, str] = {}
        fit = halves[0]
        if sample.token_T is None:
            notes |= dict.fromkeys(("accuracy token", "R2 position"), "these activations have no text")
        else:
            tokens = sample.token_T[fit].bincount().argsort(descending=True, stable=True)[: self.config.tokens]
            wanted.append(Wanted.of("token", sample, halves, one_hot(sample.token_T, tokens), is_label=True))
            wanted.append(Wanted.of("position", sample, halves, sample.position_T[:, None].float().log1p(), is_label=False))
        if dense is None:
            notes["R2 dense latents"] = "no dense SAE: add a dense run"
        else:
            latent_L = spread_latents(dense, fit, self.config.latents)
            wanted.append(Wanted.of("dense latents", sample, halves, dense.latents.select(latent_L), is_label=False))
        return wanted, notes

    def shown(self, table: Table) -> Table:
        return compact([record for record in table if self._is_shown(record)])

    @staticmethod
    def _is_shown(record: dict[str, Any]) -> bool:
        if record["part"] == "sparsity" and "null" in record["against"] and not record["against"].endswith("rotated"):
            return False
        return record["value"] is None or (record["measure"] in SHOWN[record["part"]] and record["at"] in SHOWN_AT)

    @styled
    def draw(self, table: Table) -> "Figure":
        """A column of panels per question; one mark per SAE or, of several seeds, their mean."""
        return draw_router(table)


def repetitions(rows: Sequence[ResultRow]) -> dict[Path, tuple[ResultRow, ...]]:
    """By file of weights: the SAEs that differ from it only in their seed, itself among them, one per seed."""
    groups = {row.model_file: group.rows for group in summary(rows) for row in group.rows}
    return {row.model_file: groups.get(row.model_file, (row,)) for row in rows}


def others_of(row: ResultRow, groups: dict[Path, tuple[ResultRow, ...]]) -> list[ResultRow]:
    """Of its repetitions those of other seeds."""
    return [other for other in groups[row.model_file] if other.seed != row.seed]


def partner(row: ResultRow, others: Sequence[ResultRow]) -> ResultRow | None:
    """Of SAEs on the same activations the one whose width is nearest, of another seed where there is one: the next higher, then the lowest."""
    return min(
        others,
        key=lambda other: (abs(other.num_latents - row.num_latents), other.seed == row.seed, other.seed < row.seed, other.seed, other.name),
        default=None,
    )


def spread_latents(seen: Seen, rows: Tensor, count: int) -> Tensor:
    """[<= count] latents of all frequencies between 1 and 50 % of these rows, evenly spaced in the order of their frequency, int64."""
    fired_M = torch.zeros(seen.latents.num_latents).scatter_add_(
        0, seen.latents.indices_TK[rows].flatten(), (seen.latents.values_TK[rows] != 0).float().flatten()
    )
    share_M = fired_M / len(rows)
    within = ((share_M >= 0.01) & (share_M <= 0.5)).nonzero()[:, 0]
    within = within if len(within) else share_M.topk(min(count, len(share_M))).indices
    ordered = within[share_M[within].argsort(stable=True)]
    return ordered[torch.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().long()]

"""What becomes of a dense SAE's latents in a Switch SAE: found again, copied into several experts, split over them, or lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.counterparts.coactivation import over_documents
from switch_sae.analysis.counterparts.fate_examples import EMPTY, Decode, examples
from switch_sae.analysis.counterparts.fates_figure import drawn
from switch_sae.analysis.counterparts.matching_figure import means
from switch_sae.analysis.counterparts.pairing import Side, same_start, sides, stranger
from switch_sae.analysis.counterparts.partners import KINDS, Judged, judge
from switch_sae.analysis.findings import chosen, compact, finding
from switch_sae.analysis.matching import BINS, EDGES
from switch_sae.analysis.observed import observe, only_dense, only_routed, series
from switch_sae.checks import Settings, at_least
from switch_sae.countdown import Countdown
from switch_sae.results.rows import ResultRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Fates(Analysis):
    """The fate of every live dense latent in every SAE with experts. Live: it fires on at least `min_count` rows of documents A and of documents B.

    Its partners are chosen on documents A: latents of the other SAE whose decoder row has a cosine of at least `near` with its own, that fire where
    at least `part` of its activation is (sums of values), and that have at least `inside` of their own activation where it fires. On documents B its
    partners cover the share of its activation that falls on rows where one of them fires. Of the kinds below the first that is true:

    1. `copied`: covered by at least `cover`; partners lie in at least two experts, and those in different experts have a mean cosine of at least
       `copy` with each other.
    2. `matched`: covered by at least `cover`, and the partner with the largest share on A alone covers at least `whole` of what all cover.
    3. `split`: covered by at least `cover`, partners lie in at least two experts.
    4. `refined`: covered by at least `cover`, by several partners in one expert.
    5. `absorbed`: one latent at cosine >= `near` fires on at least `cover` of its activation on A and on B, but mostly elsewhere (a broader latent).
    6. `lost`: none of these.

    Parts of the table: `latents`, shares of live latents of each kind; `activation`, shares of their summed activation; `by_frequency`, shares of
    latents by how often they fire; `partners`, how many a latent has (at = kind). The null gives the other SAE's rows of other documents. `ceiling`
    is the control: another seed of the dense SAE, its latents cut into as many arbitrary blocks as there are experts. Intervals resample documents B.
    `example`: `examples` latents of each kind, drawn at random among those that fire on at least 20 rows, of the first dense and the first other
    SAE: one record with the latent's text (measure = kind, at = latent, value = what is covered) and one for each partner, at most four.
    """

    @dataclass
    class Config(Settings):
        rows: int = 20_000
        near: float = 0.5
        part: float = 0.02
        """Below what each of 32 experts gets of an even split."""
        inside: float = 0.5
        cover: float = 0.5
        whole: float = 0.8
        copy: float = 0.9
        min_count: int = 5
        bootstrap: int = 300
        """Resamples of documents B; nulls take at most 100."""
        examples: int = 3

        def __post_init__(self) -> None:
            for name in ("near", "part", "inside", "cover", "whole", "copy"):
                if not 0 < getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1, as shares and cosines do.")
            at_least("min_count", self.min_count, 2)
            at_least("bootstrap", self.bootstrap, 0)
            at_least("examples", self.examples, 0)

    needs, each_alone = "rows", False
    config: "Fates.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """Records of `finding`, with columns for partners in examples. Raises ValueError without a dense SAE or one with experts."""
        chosen_rows = only_dense(saes, "fates") + only_routed(saes, "fates")
        sample, seen = observe(chosen_rows, source, self.config.rows)
        found = sides(sample, seen, self.config.min_count)
        dense = [side for side in found if side.seen.row.num_experts == 1]
        routed = [side for side in found if side.seen.row.num_experts > 1]
        ahead = Countdown("fates", len(dense) * len(routed), "pairs of SAEs")
        table: Table = []
        shown: Table = []
        controls: dict[tuple[str, int], dict[str, float]] = {}
        for number, (one, other) in enumerate((one, other) for one in dense for other in routed):
            judged = judge(one, other, other.seen.expert_M[other.keep_A], self.config)
            experts = other.seen.row.num_experts
            if (one.seen.name, experts) not in controls:
                controls[one.seen.name, experts] = self._control(one, dense, experts)
            strange = stranger(other)
            null = judge(one, Side(**(vars(strange) | {"unit_AD": other.unit_AD})), other.seen.expert_M[other.keep_A], self.config)
            table += self._records(one, other, judged, null, controls[one.seen.name, experts])
            if number == 0 and self.config.examples:
                decode: Decode | None = None if source is None or source.language_model is None else source.language_model.tokenizer.decode
                shown = examples(one, other, judged, sample, decode, self.config.examples)
            ahead(number + 1)
        return [record | EMPTY for record in table] + shown

    def _parts(self, side: Side) -> dict[str, Tensor]:
        bin_A = torch.bucketize(side.frequency_A, torch.tensor(EDGES), right=True)
        return {"": torch.ones_like(bin_A, dtype=torch.bool)} | {name: bin_A == place for place, name in enumerate(BINS)}

    def _shares(self, side: Side, judged: Judged, weights_RN: Tensor) -> dict[str, Tensor]:
        """By "AT/latents/KIND" and "AT/activation/KIND"."""
        return {f"{at}/{name}": value_R for at, part_A in self._parts(side).items() for name, value_R in judged.shares(weights_RN, part_A).items()}

    def _values(self, side: Side, judged: Judged) -> dict[str, float]:
        once = torch.ones(1, len(judged.rows_N), dtype=torch.float64)
        return {name: float(value) for name, value in self._shares(side, judged, once).items() if bool(value.isfinite().all())}

    def _control(self, one: Side, dense: Sequence[Side], experts: int) -> dict[str, float]:
        """Mean over the other seeds of this kind; empty without any."""
        values = []
        for other in dense:
            if other is not one and series(other.seen.row) == series(one.seen.row):
                values.append(self._values(one, judge(one, other, other.keep_A * experts // other.seen.row.num_latents, self.config)))
        return {name: sum(value[name] for value in values) / len(values) for name in (values[0] if values else ())}

    def _records(self, one: Side, other: Side, judged: Judged, null: Judged, control: dict[str, float]) -> Table:
        values, chance = self._values(one, judged), self._values(one, null)
        spans = over_documents(lambda weights_RN: self._shares(one, judged, weights_RN), values, judged.rows_N, self.config.bootstrap)
        null_spans = over_documents(lambda weights_RN: self._shares(one, null, weights_RN), chance, null.rows_N, min(100, self.config.bootstrap))
        about: dict[str, Any] = {"against": other.seen.name}
        notes = [same_start(one, other), "" if control else f"no control: one seed of {series(one.seen.row)}"]
        kind_A, table = judged.kind_A(), []
        for at, part_A in self._parts(one).items():
            n = int((kind_A[part_A] >= 0).sum())
            for part in ("latents",) if at else ("latents", "activation"):
                for kind in KINDS:
                    name = f"{at}/{part}/{kind}"
                    table.append(
                        finding(
                            *(one.seen.row, "by_frequency" if at else part, kind, values.get(name)),
                            at=at,
                            interval=_share_span(spans.get(name)),
                            null=chance.get(name),
                            null_interval=_share_span(null_spans.get(name)),
                            ceiling=control.get(name),
                            n=n,
                            note="; ".join(filter(None, notes)),
                            **about,
                        )
                    )
        for place, kind in enumerate(KINDS[:4]):
            numbers = judged.partner_AB.sum(1)[kind_A == place].double()
            mean = float(numbers.mean()) if len(numbers) else None
            table.append(
                finding(one.seen.row, "partners", "number", mean, at=kind, n=len(numbers), note=notes[0] if len(numbers) else "none", **about)
            )
        return table

    def shown(self, table: Table) -> Table:
        """Shares of latents and of activation, means over the pairs of runs of each two kinds; examples are in the table."""
        return compact(chosen(means(table), part=("latents", "activation", "partners")))

    def draw(self, table: Table) -> "Figure":
        """Shares of each kind with null and control, and by firing frequency."""
        return drawn(table)


def _share_span(span: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if span is None else (max(0.0, span[0]), min(1.0, span[1]))

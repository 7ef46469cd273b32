"""The screening frontier: what a trained dense SAE loses when a cheap screen offers its top-k only some of its latents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.findings import chosen, compact, finding
from switch_sae.analysis.observed import Seen, observe, only_dense, series
from switch_sae.analysis.routes.scored import Ratio, Scored
from switch_sae.analysis.routes.screens import CALIBRATED, Drawn, Fitting, Fixed, Lists, Screen, Seeking, best_setting, found, made
from switch_sae.checks import Settings, at_least
from switch_sae.countdown import Countdown
from switch_sae.files import tell
from switch_sae.metrics.forward import ROWS_PER_CHUNK
from switch_sae.models import SparseAutoencoder, SparseLatents
from switch_sae.models.inference import Inference
from switch_sae.results.kind import Kind
from switch_sae.results.rows import ResultRow
from switch_sae.style import COLOURS, legends, log_ticks, look, mark, panels, power_of_two_ticks, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKED_ON = 512
"""Rows on which an SAE must choose as `Choice` does."""
CHOSEN_ON = 2048
"""The most rows on which settings are chosen."""
SHARES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
"""Budgets, as shares of the dense encoder's M products."""
FAMILIES = ("lists", "product keys", "product keys" + CALIBRATED, "low rank", "low rank" + CALIBRATED)
ORACLE = ", oracle"
STYLES: dict[str, dict[str, Any]] = {
    "lists": {"color": COLOURS[0], "marker": "o"},
    "product keys": {"color": COLOURS[1], "marker": "s"},
    "low rank": {"color": COLOURS[2], "marker": "^"},
    "random": {"color": "0.7", "marker": "x"},
    "most frequent": {"color": "0.45", "marker": "+"},
}
"""How screens are drawn, beside those of routers."""


class Screening(Analysis):
    """FVU of a dense SAE whose top-k (or threshold) chooses among the candidates of a screen only: exact encoder values, decoder unchanged, top-k
    selected anew. Beside it the share of the SAE's own active latents that were among the candidates (`recall`), and of their sum of z^2
    (`energy_recall`). Budgets are shares of the dense encoder's M products of size D per token, and include the screen's.

    Families: `lists` (spherical k-means of x - b; a cluster's candidates are the latents with most energy in it), the same with the best list for
    each token (`lists, oracle`: a bound for any router to these lists), `product keys` and `low rank` scores, ranked as they are or `calibrated` (by
    each latent's chance of being active), and lists over the experts of a trained router (`router of ...`). Nulls: `random` candidates, and the
    `most frequent` latents, both with the whole budget. Everything is fitted on documents A, settings chosen by energy recall on A alone (fitted on
    one half of it, scored on the other), and scored on documents B. Nothing is trained: SAEs that learn with a screen may do better.
    """

    @dataclass
    class Config(Settings):
        rows: int = 20_000
        """Held-out rows, half of them to fit."""

        def __post_init__(self) -> None:
            at_least("rows", self.rows, 8)

    needs, each_alone = "rows", False
    config: "Screening.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """The widest dense SAEs are screened; all others are points to compare with. Raises ValueError where none can be screened."""
        dense_rows = only_dense(saes, "screening")
        widest = max(row.num_latents for row in dense_rows)
        sample, seen = observe(saes, source, self.config.rows)
        scored = Scored.of(sample)
        dense = [one for one in seen if one.row.num_experts == 1 and one.row.num_latents == widest]
        refused = {one.name: why for one in dense if (why := why_not_screened(one, sample.rows.x_TD))}
        if len(refused) == len(dense):
            raise ValueError(f"screening has nothing to work on: {next(iter(refused))}: {next(iter(refused.values()))}")
        table: Table = []
        is_one_kind = len({series(one.row) for one in seen if one.routing is not None}) == 1
        for one in dense:
            if one.name in refused:
                table.append(finding(one.row, "frontier", "fvu", None, note=refused[one.name]))
                continue
            same_seed = [other for other in seen if other.row.seed == one.row.seed and other not in dense]
            others = same_seed or [other for other in seen if other not in dense]
            table += _whole_and_trained(one, others, scored, sample.rows.x_TD.shape[1])
            table += _frontier(one, [other for other in others if other.routing is not None], is_one_kind, scored)
        return table

    def shown(self, table: Table) -> Table:
        """FVU and energy recall."""
        return compact([record for record in table if record["measure"] != "recall"])

    @styled
    def draw(self, table: Table) -> "Figure":
        """FVU and energy recall over the budget, means over the SAEs that were screened."""
        measures = {"fvu": "FVU", "energy_recall": "share of the code's energy kept"}
        figure, axes = panels(2, 1, width=4.6, height=4.4)
        for axis, (measure, label) in zip(axes, measures.items(), strict=True):
            for name, style in _lines(table).items():
                records = chosen(table, part="frontier", measure=measure, against=name)
                shares = sorted({record["at"] for record in records if record["value"] is not None})
                ends: dict[str, list[float | None]] = {
                    key: [_mean([record[key] for record in records if record["at"] == share]) for share in shares] for key in ("value", "low", "high")
                }
                axis.plot([1 / share for share in shares], [value or 0.0 for value in ends["value"]], zorder=3, **style)
                for share, bottom, top in zip(shares, ends["low"], ends["high"], strict=True):
                    if bottom is not None and top is not None:
                        axis.plot([1 / share] * 2, [bottom, top], color=style["color"], linewidth=1, zorder=2)
            power_of_two_ticks(axis.xaxis, [1 / share for share in SHARES])
            axis.set_xlabel("dense encoder's products / products spent")
            axis.set_ylabel(label)
            axis.grid(linewidth=0.4, color="0.88")
        log_ticks(axes[0].yaxis, [record["value"] for record in chosen(table, measure="fvu") if record["value"]])
        whole = chosen(table, part="whole", measure="fvu")
        axes[0].axhline(_mean([record["value"] for record in whole]) or 0, color="0.2", linestyle="--", linewidth=1)
        kinds: dict[str, dict[str, Any]] = {}
        for record in chosen(table, part="trained", measure="fvu"):
            style = look(*Kind.of(record)).style() | {"linestyle": "none", "markeredgecolor": "black", "markersize": 6}
            kinds.setdefault(look(*Kind.of(record)).label, style)
            axes[0].plot(1 / record["at"], record["value"], zorder=4, **style)
        handles = [mark(name, **style) for name, style in _lines(table).items()]
        handles += [mark("dense, whole", color="0.2", linestyle="--")] + [mark(f"trained {name}", **style) for name, style in kinds.items()]
        legends(
            figure,
            "A screen's candidates for the top-k of a trained dense SAE, exact encoder values. Energy: sum of z^2 of the SAE's own code that is "
            "among the candidates. Vertical lines: 95 % intervals over documents (means of their ends where several SAEs are averaged). Oracles take "
            "for each token the list that holds most of its energy. Trained: SAEs that were trained with so many products, on the same rows. Grey: "
            "nulls with the whole budget.",
            handles,
            columns=4,
        )
        return figure


def why_not_screened(one: Seen, x_TD: Tensor) -> str | None:
    """Why the latents of an SAE cannot be chosen among some of them; None if they can. What it does itself on these rows of the sample must be what
    `Choice` does with all latents as candidates."""
    sae = one.sae
    if sae.inference is not Inference.encoder:
        return f"inference={sae.inference.name} finds latents otherwise than by the encoder. Give runs with inference=encoder."
    why = f"a {type(sae).__name__} does not choose by top-k or one threshold among all latents. Give TopK or BatchTopK runs."
    if not isinstance(getattr(sae, "W_enc_MD", None), Tensor) or not (sae.by_threshold or sae.k):
        return why
    encoder, part = Choice(sae), x_TD[:CHECKED_ON]
    own_TM = one.latents.part(slice(len(part))).to_dense()
    code = encoder.choose(encoder.scores(encoder.centred(part)), torch.arange(sae.num_latents).expand(len(part), -1))
    differs = float((code.to_dense() - own_TM).double().square().sum())
    return why if differs > 1e-4 * float(own_TM.double().square().sum()) else None


@dataclass(frozen=True)
class Choice:
    """A dense SAE's choice among candidates: its k largest scores, or those above its threshold."""

    sae: SparseAutoencoder

    @property
    def W_MD(self) -> Tensor:
        """Encoder rows."""
        weight_MD = self.sae.W_enc_MD
        assert isinstance(weight_MD, Tensor)
        return weight_MD.detach()

    @property
    def b_M(self) -> Tensor:
        """The encoder's biases."""
        bias_M = getattr(self.sae, "b_enc_M", None)
        return torch.zeros(self.sae.num_latents) if bias_M is None else bias_M.detach()

    def centred(self, x_TD: Tensor) -> Tensor:
        """What the encoder multiplies."""
        return (x_TD.to(self.sae.activation_scale.dtype) * self.sae.activation_scale - self.sae.b_in_D).detach()

    def scores(self, u_tD: Tensor) -> Tensor:
        """[t, M]."""
        return torch.addmm(self.b_M, u_tD, self.W_MD.T)

    def choose(self, score_tM: Tensor, latent_tC: Tensor) -> SparseLatents:
        """The active latents of rows that may use `latent_tC`."""
        score_tC = score_tM.gather(1, latent_tC)
        slots = self.sae.k or 1
        if self.sae.by_threshold:
            active_tC = score_tC > self.sae.threshold.clamp_min(0)
            score_tC, slots = score_tC * active_tC, max(1, int(active_tC.sum(1).max()))
        values_tK, slot_tK = score_tC.topk(min(slots, score_tC.shape[1]), dim=1)
        return SparseLatents(values_tK.relu(), latent_tC.gather(1, slot_tK), self.sae.num_latents)


def _whole_and_trained(one: Seen, others: Sequence[Seen], scored: Scored, d_in: int) -> Table:
    """FVU on documents B without a screen, and of SAEs that were trained with fewer products."""
    held = scored.part(scored.halves[1])
    table: Table = []
    for other in (one, *others):
        error_T = (scored.rows.target_TD.double() - other.recon_TD[scored.kept_T].double()).square().sum(1)[scored.halves[1]]
        values, spans = held.ratios({"error": error_T, "variance": held.variance_T}, {"fvu": lambda sums: sums["error"] / sums["variance"]})
        cost = (other.row.flops_encode or 0) / (2 * d_in)
        share = cost / one.row.num_latents
        where: dict[str, Any] = {"at": 1.0} if other is one else {"at": share, "against": one.name, "note": f"{cost:.0f} products"}
        if other is one or cost:
            part = "whole" if other is one else "trained"
            table.append(finding(other.row, part, "fvu", values["fvu"], interval=spans.get("fvu"), n=len(held.rows), **where))
    return table


def _frontier(one: Seen, routers: Sequence[Seen], is_one_kind: bool, scored: Scored) -> Table:
    encoder, (first, second) = Choice(one.sae), scored.halves
    u_TD, values_TK, indices_TK = encoder.centred(scored.rows.x_TD), one.latents.values_TK[scored.kept_T], one.latents.indices_TK[scored.kept_T]
    fitting = Fitting(u_TD[first], values_TK[first], indices_TK[first], encoder.W_MD, encoder.b_M)
    names = {other.name: "router" if is_one_kind else f"router of {series(other.row)}" for other in routers}
    routes = {names[other.name]: (other.expert_T()[scored.kept_T], other.row.num_experts) for other in routers}
    latents = len(fitting.W_MD)
    document_T = scored.document_T[first].unique(return_inverse=True)[1]
    fold_T = document_T % 2 == 1 if int(document_T.max()) else torch.arange(len(first)) % 2 == 1
    folds = fitting.part(~fold_T), fitting.part(fold_T.nonzero()[:CHOSEN_ON, 0])
    screens = {(name, share): screen for share in SHARES for name, screen in _screens(fitting, folds, int(share * latents), routes, first).items()}
    sums: dict[Any, list[Tensor]] = {key: [] for key, screen in screens.items() if screen is not None}
    ahead = Countdown(f"screening {one.name}", len(second), "rows", tell)
    for start in range(0, len(second), ROWS_PER_CHUNK):
        row_t = second[start : start + ROWS_PER_CHUNK]
        score_tM = encoder.scores(u_TD[row_t])
        for name, share in sums:
            screen, route = screens[name, share], routes.get(name.removesuffix(ORACLE))
            assert screen is not None
            asking = Seeking(u_TD[row_t], values_TK[row_t], indices_TK[row_t], None if route is None else route[0][row_t], start)
            latent_tC = screen.candidates(asking)
            with torch.no_grad():
                recon_tD = one.sae.decode(encoder.choose(score_tM, latent_tC))
            error_t = (scored.rows.target_TD[row_t].double() - recon_tD.double()).square().sum(1)
            sums[name, share].append(torch.stack([error_t, *found(latent_tC, asking.values_tK, asking.indices_tK, latents)], dim=1))
        ahead(start + len(row_t))
    return _records(one, scored.part(second), screens, {key: torch.cat(parts) for key, parts in sums.items()})


def _screens(
    fitting: Fitting, folds: tuple[Fitting, Fitting], budget: int, routes: dict[str, tuple[Tensor, int]], first: Tensor
) -> dict[str, Screen | None]:
    """All screens of one budget by name; None where it is too small for any."""
    screens: dict[str, Screen | None] = {"random": None, "most frequent": None}
    if budget:
        screens = {"random": Drawn(len(fitting.W_MD), budget), "most frequent": Fixed(fitting, budget)}
    for family in FAMILIES:
        setting = best_setting(family, budget, *folds)
        screens[family] = None if setting is None else made(family, setting, fitting)
        if family == "lists":
            screens[family + ORACLE] = None if setting is None else made(family, setting, fitting, oracle=True)
    for name, (expert_T, experts) in routes.items():
        routed = replace(fitting, expert_T=expert_T[first], experts=experts)
        for oracle in (False, True):
            screens[name + ORACLE * oracle] = Lists(routed, None, budget - experts, oracle) if budget > experts else None
    return screens


def _records(one: Seen, held: Scored, screens: dict[tuple[str, float], Screen | None], sums: dict[Any, Tensor]) -> Table:
    names = ("error", "hits", "active", "hit energy", "energy")
    wanted: dict[str, Ratio] = {
        "fvu": lambda sums: sums["error"] / sums["variance"],
        "recall": lambda sums: sums["hits"] / sums["active"],
        "energy_recall": lambda sums: sums["hit energy"] / sums["energy"],
    }
    numbers = {
        key: held.ratios({**dict(zip(names, columns_TC.unbind(1), strict=True)), "variance": held.variance_T}, wanted)
        for key, columns_TC in sums.items()
    }
    table: Table = []
    for (name, share), screen in screens.items():
        for measure in wanted:
            if screen is None:
                note = f"a budget of {int(share * one.row.num_latents)} products leaves no candidates"
                table.append(finding(one.row, "frontier", measure, None, against=name, at=share, note=note))
                continue
            (values, spans), (null, null_spans) = numbers[name, share], numbers["most frequent", share]
            beside: dict[str, Any] = {} if name == "most frequent" else {"null": null[measure], "null_interval": null_spans.get(measure)}
            where: dict[str, Any] = {"against": name, "at": share, "interval": spans.get(measure), "n": len(held.rows), "note": screen.setting}
            table.append(finding(one.row, "frontier", measure, values[measure], **where, **beside))
    return table


def _lines(table: Table) -> dict[str, dict[str, Any]]:
    """The names of all screens of a table, with their looks; every router has a colour of its own. Bounds are dotted, raw scores dashed."""
    names = list(dict.fromkeys(record["against"] for record in chosen(table, part="frontier", measure="fvu") if record["value"] is not None))
    routers = list(dict.fromkeys(name.removesuffix(ORACLE) for name in names if name.startswith("router")))
    looks = {}
    for name in names:
        base = name.removesuffix(ORACLE).removesuffix(CALIBRATED)
        place = routers.index(base) if base in routers else 0
        looks[name] = STYLES.get(base) or {"color": COLOURS[(3 + place) % len(COLOURS)], "marker": "Dvp<>h"[place % 6]}
        if name.endswith(ORACLE):
            looks[name] = looks[name] | {"markerfacecolor": "white", "linestyle": ":"}
        elif base + CALIBRATED in names and name == base:
            looks[name] = looks[name] | {"linestyle": "--", "linewidth": 0.9}
    return looks


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None

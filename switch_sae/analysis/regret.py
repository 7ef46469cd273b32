"""What a router costs: every token through every expert, and the gap to a dense SAE split into a part of the routes and a part of the experts."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switch_sae.activations.base import ActivationSource
from switch_sae.analysis.base import Analysis, Table
from switch_sae.analysis.findings import chosen, compact, finding
from switch_sae.analysis.observed import Seen, observe, only_routed
from switch_sae.analysis.routes.forced import SCALES, Forced, Scale, scaled_errors, through_every_expert, why_not_forced
from switch_sae.analysis.routes.scored import Ratio, Scored
from switch_sae.checks import Settings, at_least
from switch_sae.results.kind import Kind
from switch_sae.results.rows import ResultRow
from switch_sae.style import canvas, legends, log_ticks, look, mark, matrix, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROUTES = ("router", "oracle", "second best", "random")
MARKS: dict[str, dict[str, Any]] = {
    "oracle": {"color": "0.2", "marker": "4", "markersize": 9},
    "second best": {"color": "0.45", "marker": "|", "markersize": 8},
    "random": {"color": "0.7", "marker": "|", "markersize": 8},
    "dense": {"color": "0.2", "marker": "o", "markerfacecolor": "white", "markersize": 4},
}
"""Of what is not the SAE with its own routes."""
MAPS, MAP_COLUMNS = 8, 4
"""Transfer matrices in a figure, one for each kind of SAE; how many stand beside each other."""


class Regret(Analysis):
    """FVU of the same experts by other routes: `router`, its `second best` choice, `random` (the mean over all experts), and `oracle`, the expert
    with the least error for each token, which is chosen with the target and which no router can know.

    regret = FVU(router) / FVU(oracle) - 1. Against a dense SAE

        FVU - FVU(dense) = [FVU(router) - FVU(oracle)] + [FVU(oracle) - FVU(dense)] = routing + partition:

    what better routes to these experts could repair at most, and what they could not. The experts were trained with these routes and with no others.
    Each number with three scales of the code (`SCALES`), which the dense SAE gets too: none, one scalar, and one for each token.

    T[e, f] = sum ||x - recon by f||^2 / sum ||x - mean(x)||^2 over the tokens that the router sends to e, with mean(x) of all rows. Rows that are
    outliers are left out. Intervals over documents, with fitted scalars held fixed.
    """

    @dataclass
    class Config(Settings):
        rows: int = 20_000
        """Held-out rows."""

        def __post_init__(self) -> None:
            at_least("rows", self.rows, 2)

    needs, each_alone = "rows", False
    config: "Regret.Config"

    def compute(self, saes: Sequence[ResultRow], source: ActivationSource | None) -> Table:
        """Raises ValueError where no SAE has experts, or all have several for each token."""
        only_routed(saes, "regret")
        sample, seen = observe(saes, source, self.config.rows)
        scored = Scored.of(sample)
        dense = [one for one in seen if one.row.num_experts == 1]
        table = [record for one in dense for record in _of_dense(one, scored)]
        routed = [one for one in seen if one.row.num_experts > 1]
        refused = {one.name: why for one in routed if (why := why_not_forced(one.sae))}
        if len(refused) == len(routed):
            raise ValueError(f"regret has nothing to work on: {next(iter(refused))} has {next(iter(refused.values()))}")
        for one in routed:
            if one.name in refused:
                table.append(finding(one.row, "routes", "fvu", None, against="router", note=refused[one.name]))
                continue
            beside = [other for other in dense if other.row.seed == one.row.seed] or dense
            table += _of_routed(one, beside, scored)
        return table

    def shown(self, table: Table) -> Table:
        """Without the single cells of transfer matrices."""
        return compact([record for record in table if "->" not in str(record["at"])])

    @styled
    def draw(self, table: Table) -> "Figure":
        """FVU by route and the split of the gap, one line for each SAE; below, transfer matrices of one seed of each kind."""
        routed = list(dict.fromkeys(record["sae"] for record in chosen(table, part="routes", against="router") if record["value"] is not None))
        first: dict[str, str] = {}
        for record in chosen(table, part="transfer", measure="own"):
            first.setdefault(record["sae"].removesuffix(f"-s{record['seed']}"), record["sae"])
        maps = list(first.values())[:MAPS]
        rows = math.ceil(len(maps) / MAP_COLUMNS)
        top = 1.2 + 0.22 * len(routed)
        figure = canvas(11, top + 2.8 * rows)
        grid = figure.add_gridspec(1 + bool(maps), 1, height_ratios=[top, 2.8 * rows][: 1 + bool(maps)])
        above = grid[0].subgridspec(1, 2, width_ratios=(3, 2))
        routes = figure.add_subplot(above[0])
        _draw_routes(routes, table, routed)
        _draw_split(figure.add_subplot(above[1], sharey=routes), table, routed)
        below = grid[-1].subgridspec(max(1, rows), MAP_COLUMNS)
        cells = chosen(table, sae=tuple(maps), part="transfer", measure="fvu", against="pair")
        high = max((record["value"] for record in cells if record["value"] is not None), default=1)
        for place, name in enumerate(maps):
            axis = figure.add_subplot(below[place // MAP_COLUMNS, place % MAP_COLUMNS])
            image = _draw_transfer(axis, table, name, high)
        if maps:
            figure.colorbar(image, ax=figure.axes[2:], shrink=0.7, label="T[e, f]", pad=0.01)
        handles = [mark("router", color="0.2", marker="o", linestyle="none")]
        handles += [mark(route, linestyle="none", **style) for route, style in MARKS.items()]
        legends(
            figure,
            "Lines: 95 % intervals over documents. Above, every expert with the router's own gate for it; below, with one refitted scalar per pair "
            "of experts. Routing: FVU(router) - FVU(oracle), what better routes to the same experts could repair at most; partition: FVU(oracle) - "
            "FVU(dense), of the same seed where there is one. T[e, f]: FVU of the tokens that the router sends to e, forced through f; a white "
            "cell has no tokens.",
            handles,
        )
        return figure


def _dense_errors(one: Seen, scored: Scored) -> dict[Scale, Tensor]:
    """||x - recon||^2 of a dense SAE, with the scales of its code that experts get too: none, one scalar of other documents, one for each token."""
    bias_D = (one.sae.b_out_D / one.sae.target_scale).detach().double()
    centred_TD, added_TD = scored.rows.target_TD.double() - bias_D, one.recon_TD[scored.kept_T].double() - bias_D
    left_T, product_T1, norm_T1 = centred_TD.square().sum(1), (centred_TD * added_TD).sum(1, keepdim=True), added_TD.square().sum(1, keepdim=True)
    one_T1, group_T = torch.ones_like(norm_T1), torch.zeros(len(left_T), dtype=torch.int64)
    return {scale: scaled_errors(left_T, product_T1, norm_T1, scale, one_T1, group_T, scored.halves)[:, 0] for scale in SCALES}


def _fvu(name: str) -> Ratio:
    return lambda sums: sums[name] / sums["variance"]


def _of_dense(one: Seen, scored: Scored) -> Table:
    columns: dict[str, Tensor] = {str(scale): error_T for scale, error_T in _dense_errors(one, scored).items()}
    values, spans = scored.ratios(columns | {"variance": scored.variance_T}, {scale: _fvu(scale) for scale in SCALES})
    return [
        finding(one.row, "routes", "fvu", values[scale], against="dense", at=scale, interval=spans.get(scale), n=len(scored.rows)) for scale in SCALES
    ]


def _of_routed(one: Seen, dense: Sequence[Seen], scored: Scored) -> Table:
    forced = through_every_expert(one.sae, scored.rows)
    table: Table = []
    for scale in SCALES:
        error_TE = forced.errors(scale, scored.halves)
        table += _routes_and_split(one.row, forced, error_TE, scale, [(other.name, _dense_errors(other, scored)[scale]) for other in dense], scored)
        if scale != "token":
            table += _transfer(one.row, forced, error_TE, scale, scored)
    return table


def _routes_and_split(row: ResultRow, forced: Forced, error_TE: Tensor, scale: Scale, dense: Sequence[tuple[str, Tensor]], scored: Scored) -> Table:
    oracle_T, best_T = error_TE.min(dim=1)
    own_T, second_T = error_TE.gather(1, forced.rank_TE[:, :2]).unbind(1)
    columns = {**dict(zip(ROUTES, (own_T, oracle_T, second_T, error_TE.mean(1)), strict=True)), "variance": scored.variance_T}
    columns |= {"best": best_T == forced.chosen_T, "rows": torch.ones_like(own_T), **{f"dense {n}": error_T for n, (_, error_T) in enumerate(dense)}}
    wanted: dict[str, Any] = {route: _fvu(route) for route in ROUTES}
    wanted |= {"regret": lambda sums: sums["router"] / sums["oracle"] - 1, "null": lambda sums: sums["second best"] / sums["oracle"] - 1}
    wanted |= {"routing": lambda sums: (sums["router"] - sums["oracle"]) / sums["variance"], "best": lambda sums: sums["best"] / sums["rows"]}
    for n in range(len(dense)):
        wanted[f"gap {n}"] = lambda sums, n=n: (sums["router"] - sums[f"dense {n}"]) / sums["variance"]
        wanted[f"partition {n}"] = lambda sums, n=n: (sums["oracle"] - sums[f"dense {n}"]) / sums["variance"]
        wanted[f"share {n}"] = lambda sums, n=n: (sums["router"] - sums["oracle"]) / (sums["router"] - sums[f"dense {n}"])
    values, spans = scored.ratios(columns, wanted)

    def found(part: str, measure: str, name: str, **more: Any) -> dict[str, Any]:
        return finding(row, part, measure, values[name], at=scale, interval=spans.get(name), n=len(scored.rows), **more)

    random = {"null": values["random"], "null_interval": spans.get("random"), "ceiling": values["oracle"]}
    table = [found("routes", "fvu", route, against=route, **(random if route == "router" else {})) for route in ROUTES]
    experts = forced.num_experts
    chance = float((forced.chosen_T.bincount(minlength=experts).double() * best_T.bincount(minlength=experts)).sum()) / len(best_T) ** 2
    table.append(found("routes", "best_share", "best", against="oracle", null=chance))
    table.append(found("split", "regret", "regret", against="oracle", null=values["null"], null_interval=spans.get("null")))
    table.append(found("split", "routing", "routing", against="oracle"))
    if not dense:
        table.append(finding(row, "split", "partition", None, at=scale, note="no dense SAE among the runs: the gap to it cannot be split"))
    for n, (name, _) in enumerate(dense):
        table += [found("split", measure, f"{measure} {n}", against=name) for measure in ("partition", "gap")]
        if (spans.get(f"gap {n}") or (values[f"gap {n}"],))[0] > 0:
            table.append(found("split", "routing_share", f"share {n}", against=name))
        else:
            table.append(finding(row, "split", "routing_share", None, against=name, at=scale, note="no gap above 0 that could be divided"))
    return table


def _transfer(row: ResultRow, forced: Forced, error_TE: Tensor, scale: Scale, scored: Scored) -> Table:
    experts, chosen_T = forced.num_experts, forced.chosen_T
    error_EE = torch.zeros(experts, experts, dtype=torch.float64).index_add_(0, chosen_T, error_TE)
    variance_E = torch.zeros(experts, dtype=torch.float64).index_add_(0, chosen_T, scored.variance_T)
    count_E = chosen_T.bincount(minlength=experts).tolist()
    fvu_EE = error_EE / variance_E[:, None]
    own_T = error_TE.gather(1, chosen_T[:, None])[:, 0]
    columns = {"own": own_T, "others": (error_TE.sum(1) - own_T) / (experts - 1), "variance": scored.variance_T}
    values, spans = scored.ratios(columns, {name: _fvu(name) for name in ("own", "others")})
    table = [
        finding(row, "transfer", name, values[name], against=scale, interval=spans.get(name), n=len(scored.rows), note=note)
        for name, note in (("own", "T[e, e], weighted by tokens"), ("others", "T[e, f] over all other f, weighted by tokens"))
    ]
    used = [e for e in range(experts) if count_E[e]]
    best = sum(int(fvu_EE[e].argmin()) == e for e in used) / len(used)
    table.append(finding(row, "transfer", "own_is_best", best, against=scale, null=1 / experts, n=len(used), note="share of experts"))
    for e in range(experts):
        for f in range(experts):
            value, note = (float(fvu_EE[e, f]), "") if count_E[e] else (None, "no tokens")
            table.append(finding(row, "transfer", "fvu", value, against=scale, at=f"{e}->{f}", n=count_E[e], note=note))
    return table


def transfer_matrix(table: Table, sae: str, scale: Scale = "pair") -> Tensor:
    """[E, E] T[e, f] of an SAE by name, NaN where an expert has no tokens."""
    cells = {record["at"]: record["value"] for record in chosen(table, sae=sae, part="transfer", measure="fvu", against=scale)}
    experts = math.isqrt(len(cells))
    return torch.tensor([[math.nan if (value := cells[f"{e}->{f}"]) is None else value for f in range(experts)] for e in range(experts)])


def _draw_routes(axis: "Axes", table: Table, names: Sequence[str]) -> None:
    values = []
    for place, name in enumerate(names):
        beside = [record["against"] for record in chosen(table, sae=name, part="split", measure="partition", at="gate")][:1]
        for record in chosen(table, sae=(name, *beside), part="routes", measure="fvu", at="gate"):
            values.append(record["value"])
            style = MARKS.get(record["against"]) or look(*Kind.of(record)).style() | {"linestyle": "none"}
            axis.plot(record["value"], place, zorder=3, **style)
            if record["low"] is not None:
                axis.plot([record["low"], record["high"]], [place, place], color=style["color"], linewidth=1.2, zorder=2)
    log_ticks(axis.xaxis, values)
    axis.set_xlabel("FVU by route")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", linewidth=0.4, color="0.88")


def _draw_split(axis: "Axes", table: Table, names: Sequence[str]) -> None:
    """Routing from 0, then partition from there; from 0 downwards where it is negative."""
    for place, name in enumerate(names):
        (routing,) = chosen(table, sae=name, part="split", measure="routing", at="gate")
        colour = look(*Kind.of(routing)).colour
        axis.barh(place, routing["value"], height=0.62, color=colour, edgecolor="0.2", linewidth=0.5)
        of_dense = [record for record in chosen(table, sae=name, part="split", measure="partition", at="gate") if record["value"] is not None]
        if of_dense:
            start = routing["value"] if of_dense[0]["value"] > 0 else 0.0
            axis.barh(place, of_dense[0]["value"], left=start, height=0.62, color="white", edgecolor=colour, hatch="////", linewidth=0.5)
            (gap,) = chosen(table, sae=name, part="split", measure="gap", at="gate", against=of_dense[0]["against"])
            if gap["low"] is not None:
                axis.plot([gap["low"], gap["high"]], [place, place], color="0.2", linewidth=1.2)
            axis.plot(gap["value"], place, "|", color="0.2", markersize=8)
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set_xlabel("FVU - FVU(dense) = routing (full)\n+ partition (hatched)")
    axis.tick_params(labelleft=False)
    axis.grid(axis="x", linewidth=0.4, color="0.88")


def _draw_transfer(axis: "Axes", table: Table, name: str, high: float) -> Any:
    values_EE = transfer_matrix(table, name)
    image = matrix(axis, values_EE.numpy(), 0, high, None)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("forced through f", fontsize=7)
    axis.set_ylabel("routed to e", fontsize=7)
    (own,) = chosen(table, sae=name, part="transfer", measure="own", against="pair")
    (others,) = chosen(table, sae=name, part="transfer", measure="others", against="pair")
    axis.set_title("\n".join(textwrap.wrap(name, 32)) + f"\nown {own['value']:.3f}, others {others['value']:.3f}", fontsize=7)
    return image

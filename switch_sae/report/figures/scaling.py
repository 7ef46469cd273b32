"""Scaling laws: final error against width and against training compute, one line per number of experts, with fitted power laws."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.analysis.scaling import PowerLaw, choose_power_law, fit_power_law, mean_over_seeds
from switch_sae.results.kind import Kind
from switch_sae.results.rows import grouped
from switch_sae.results.selection import Material, NotEnough, by_kind, outliers
from switch_sae.results.selection import mean_over_seeds as over_seeds
from switch_sae.results.settings import HEADLINE
from switch_sae.results.summary import Summary
from switch_sae.style import Drawing, canvas, curve, exponent_ticks, handle, legends, log_ticks, look, mark, power_of_two_ticks, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_WIDTHS = 3
"""Widths that a line needs: two fix a power law and leave nothing to judge it by."""
METRICS = {HEADLINE: "FVU", "normalized_mse": "normalised MSE per token"}
AXES = {"latents": "latents in all M, log scale", "flops": "training FLOPs, log scale"}
Lines = dict[Kind, list[Summary]]
Laws = dict[tuple[Kind, str, str], PowerLaw]


@styled
def draw(material: Material) -> Drawing:
    """Final FVU and per-token normalised MSE by M and by training FLOPs, at one k, with L(x) = c x^-alpha fitted to the means over seeds.

    Raises NotEnough unless one kind of SAE was trained at 3 widths or more with the same k, ImportError without scipy.
    """
    k, lines = _lines(material)
    points: list[dict[str, Any]] = []
    laws: Laws = {}
    plain: Laws = {}
    for kind, groups in lines.items():
        for metric in METRICS:
            records = [record for group in groups if (record := _record(kind, group, metric))]
            points += records
            for axis in AXES:
                if len({record["latents"] for record in records}) >= LEAST_WIDTHS:
                    means = mean_over_seeds([record[axis] for record in records], [record["mean"] for record in records])
                    laws[kind, metric, axis], plain[kind, metric, axis] = choose_power_law(*means), fit_power_law(*means)
    fits = [
        {"fit": f"{METRICS[metric]} by {axis}", **kind._asdict(), "metric": metric, "coefficient": law.coefficient, "exponent": law.exponent}
        | {"exponent_low": law.low, "exponent_high": law.high, "irreducible": law.floor, "widths": law.points}
        for (kind, metric, axis), law in (*laws.items(), *((key, law) for key, law in plain.items() if law != laws[key]))
    ]
    return Drawing(_figure(k, lines, points, laws), [*points, *fits], _gaps(points))


def _lines(material: Material) -> tuple[int, Lines]:
    """(k, lines) for the k with most lines of enough widths."""
    best: tuple[int, Lines] = (0, {})
    for k in sorted({group.first.k for group in material.standard() if group.first.k is not None}):
        kinds = by_kind([group for group in material.standard() if group.first.k == k])
        long = {kind: groups for kind, groups in kinds.items() if len({group.first.num_latents for group in groups}) >= LEAST_WIDTHS}
        if sum(map(len, long.values())) > sum(map(len, best[1].values())):
            best = k, long
    if not best[1]:
        raise NotEnough(f"no kind of SAE was trained at {LEAST_WIDTHS} or more widths with one k. Sweep sae.num_latents.")
    return best


def _record(kind: Kind, group: Summary, metric: str) -> dict[str, Any] | None:
    spread, flops, tokens = group.spreads.get(metric), group.mean("flops_total"), group.mean("tokens")
    if spread is None or spread.mean <= 0 or not flops:
        return None
    where = {"latents": group.first.num_latents, "flops": flops * (tokens or 1)}
    return {**kind._asdict(), "metric": metric, **where, "mean": spread.mean, "sd": spread.sd, "seeds": spread.n}


def _figure(k: int, lines: Lines, points: Sequence[dict[str, Any]], laws: Laws) -> "Figure":
    figure = canvas(6.8, 6.4)
    for axes, (metric, label) in zip(figure.subplots(2, 2, squeeze=False, sharey="row"), METRICS.items(), strict=True):
        mine = [point for point in points if point["metric"] == metric]
        for axis, (x, name) in zip(axes, AXES.items(), strict=True):
            _panel(axis, x, mine, {kind: law for (kind, of, by), law in laws.items() if (of, by) == (metric, x)})
            (power_of_two_ticks if x == "latents" else exponent_ticks)(axis.xaxis, [point[x] for point in points])
            axis.set_xlabel(name)
        log_ticks(axes[0].yaxis, [point["mean"] for point in mine])
        axes[0].set_ylabel(f"{label}, k = {k}, log scale")
    groups = [group for chosen in lines.values() for group in chosen]
    words = [over_seeds(groups), "Fits: log error on the width means, by least squares; [ ]: 95 % interval of the exponent.", outliers(groups)]
    if any(law.floor for law in laws.values()):
        words.append("*: with an irreducible error; such exponents compare only with each other.")
    handles = [*(handle(kind, linestyle="none") for kind in lines), mark("fit", color="0.4")]
    legends(figure, " ".join(filter(None, words)), handles)
    return figure


def _panel(axis: "Axes", x: str, points: Sequence[dict[str, Any]], laws: Mapping[Kind, PowerLaw]) -> None:
    words = []
    for kind, records in grouped(points, Kind.of).items():
        at = [record[x] for record in records]
        curve(axis, kind, at, [record["mean"] for record in records], [record["sd"] for record in records], linestyle="none")
        if kind in laws:
            law, style = laws[kind], look(*kind)
            steps = [min(at) * (max(at) / min(at)) ** (i / 60) for i in range(61)]
            axis.plot(steps, [law(step) for step in steps], color=style.colour, linestyle=style.dash, linewidth=1.1, zorder=2)
            interval = f" [{law.low:.3f}, {law.high:.3f}]" if math.isfinite(law.low) else ""
            words.append(f"{style.label}: {law.exponent:.3f}{interval}{'*' if law.floor else ''}")
    axis.set_title("\n".join(["exponent of the fit", *words]), loc="left", fontsize=7.5, color="0.25")


def _gaps(points: Sequence[dict[str, Any]]) -> list[str]:
    """Error of each SAE with experts above (+) that of dense TopK at the narrowest and the widest M that both have."""
    fvu = {
        kind: {record["latents"]: record["mean"] for record in records}
        for kind, records in grouped((point for point in points if point["metric"] == HEADLINE), Kind.of).items()
    }
    dense = next((line for kind, line in fvu.items() if kind.is_reference), {})
    notes = []
    for kind, line in fvu.items():
        if kind.is_routed and (shared := sorted(line.keys() & dense.keys())):
            ends = dict.fromkeys((shared[0], shared[-1]))
            gaps = ", ".join(f"{line[width] / dense[width] - 1:+.1%} at M = {width:,}" for width in ends)
            notes.append(f"FVU of {look(*kind).label} against dense TopK: {gaps}")
    return notes

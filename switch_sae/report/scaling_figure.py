"""Scaling laws: final error against width and against training compute, one line per number of experts, with fitted power laws."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.analysis.scaling import PowerLaw, choose_power_law, fit_power_law, mean_over_seeds
from switch_sae.report.selection import Drawing, Material, NotEnough, by_kind, seeds
from switch_sae.report.style import STYLE, exponent_ticks, legends, log_ticks, look, power_of_two_ticks
from switch_sae.report.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_WIDTHS = 3
"""Widths that a line needs: two fix a power law and leave nothing to judge it by."""
METRICS = {"fvu": "FVU", "normalized_mse": "normalised MSE per token"}
AXES = {"latents": "latents in all, M", "flops": "training FLOPs"}


def scaling(material: Material) -> Drawing:
    """Final FVU and per-token normalised MSE by M and by training FLOPs, at one k, with L(x) = c x^-alpha fitted to the means over seeds.

    Raises NotEnough unless one kind of SAE was trained at 3 widths or more with the same k.
    """
    k, lines = _lines(material)
    table: list[dict[str, Any]] = []
    laws: dict[tuple[tuple[str, int, int], str, str], PowerLaw] = {}
    plain: dict[tuple[tuple[str, int, int], str, str], PowerLaw] = {}
    for kind, groups in lines.items():
        for metric in METRICS:
            points = [record for group in groups if (record := _record(kind, group, metric))]
            table += points
            for axis in AXES:
                if len({point["latents"] for point in points}) >= LEAST_WIDTHS:
                    means = mean_over_seeds([p[axis] for p in points], [p["mean"] for p in points])
                    laws[kind, metric, axis], plain[kind, metric, axis] = choose_power_law(*means), fit_power_law(*means)
    for (kind, metric, axis), law in (*laws.items(), *((key, law) for key, law in plain.items() if law != laws[key])):
        names = dict(zip(("architecture", "experts", "experts_per_token"), kind, strict=True))
        table.append(
            {"fit": f"{METRICS[metric]} by {axis}", **names, "metric": metric, "coefficient": law.coefficient, "exponent": law.exponent}
            | {"exponent_low": law.low, "exponent_high": law.high, "irreducible": law.floor, "widths": law.points}
        )
    columns = dict.fromkeys(key for record in table for key in record)
    return Drawing(_draw(k, lines, table, laws), [{key: record.get(key) for key in columns} for record in table], _gaps(table))


def _lines(material: Material) -> tuple[int, dict[tuple[str, int, int], list[Summary]]]:
    """(k, lines) for the k with most lines of enough widths."""
    best: tuple[int, dict[tuple[str, int, int], list[Summary]]] = (0, {})
    for k in sorted({group.first.k for group in material.standard() if group.first.k is not None}):
        kinds = by_kind([group for group in material.standard() if group.first.k == k])
        long = {kind: groups for kind, groups in kinds.items() if len({group.first.num_latents for group in groups}) >= LEAST_WIDTHS}
        if sum(map(len, long.values())) > sum(map(len, best[1].values())):
            best = k, long
    if not best[1]:
        raise NotEnough(f"no kind of SAE was trained at {LEAST_WIDTHS} or more widths with one k. Sweep sae.num_latents.")
    return best


def _record(kind: tuple[str, int, int], group: Summary, metric: str) -> dict[str, Any] | None:
    spread, flops, tokens = group.spreads.get(metric), group.mean("flops_total"), group.mean("tokens")
    if spread is None or spread.mean <= 0 or not flops:
        return None
    names = dict(zip(("architecture", "experts", "experts_per_token"), kind, strict=True))
    return {
        **names, "metric": metric, "latents": group.first.num_latents, "flops": flops * (tokens or 1), "mean": spread.mean, "sd": spread.sd,
        "seeds": spread.n,
    }  # fmt: skip


def _draw(k: int, lines: Any, table: Sequence[dict[str, Any]], laws: Any) -> Any:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 6.4), layout="constrained")
        grid = figure.subplots(2, 2, squeeze=False, sharey="row")
        for axes, (metric, label) in zip(grid, METRICS.items(), strict=True):
            for axis, (x, name) in zip(axes, AXES.items(), strict=True):
                _panel(axis, x, metric, lines, table, laws)
                axis.set_xlabel(name)
            values = [record["mean"] for record in table if record.get("metric") == metric and "mean" in record]
            log_ticks(axes[0].yaxis, values)
            axes[0].set_ylabel(f"{label}, k = {k}")
        handles = [Line2D([], [], label=look(*kind).label, **(look(*kind).style() | {"linestyle": "none"})) for kind in lines]
        handles.append(Line2D([], [], color="0.4", label="fit"))
        floors = any(law.floor for law in laws.values())
        text = (
            f"Points: mean over {seeds([g for groups in lines.values() for g in groups])}; bars: ± 1 standard deviation. Fits: least squares of log error on "
            "the width means; [ ]: 95 % t interval of the exponent, with as many degrees of freedom as widths less parameters"
            + (
                "; * with an irreducible error, where at least 5 widths support it (F test, 5 %): such exponents compare only with each other."
                if floors
                else "."
            )
        )
        legends(figure, text, handles)
    return figure


def _panel(axis: "Axes", x: str, metric: str, lines: Any, table: Sequence[dict[str, Any]], laws: Any) -> None:
    words = []
    for kind in lines:
        mine = (kind[0], kind[1], kind[2], metric)
        points = [r for r in table if "mean" in r and (r["architecture"], r["experts"], r["experts_per_token"], r["metric"]) == mine]
        style = look(*kind).style()
        at = [point[x] for point in points]
        axis.errorbar(
            at, [p["mean"] for p in points], [p["sd"] or 0.0 for p in points], capsize=2, elinewidth=0.9, zorder=3, **(style | {"linestyle": "none"})
        )
        law = laws.get((kind, metric, x))
        if law is not None:
            steps = [min(at) * (max(at) / min(at)) ** (i / 60) for i in range(61)]
            axis.plot(steps, [law(step) for step in steps], color=style["color"], linestyle=style["linestyle"], linewidth=1.1, zorder=2)
            interval = f" [{law.low:.3f}, {law.high:.3f}]" if math.isfinite(law.low) else ""
            words.append((look(*kind).label, f"{law.exponent:.3f}{interval}{'*' if law.floor else ''}"))
    if x == "latents":
        power_of_two_ticks(axis.xaxis, [r["latents"] for r in table if "mean" in r])
    else:
        exponent_ticks(axis.xaxis, [r["flops"] for r in table if "mean" in r])
    axis.set_title("exponent of the fit\n" + "\n".join(f"{name}: {text}" for name, text in words), loc="left", fontsize=7.5, color="0.25")


def _gaps(table: Sequence[dict[str, Any]]) -> list[str]:
    """Error of each Switch SAE above (+) that of dense TopK at the narrowest and the widest M that both have."""
    points = {
        (r["architecture"], r["experts"], r["experts_per_token"], r["latents"]): r["mean"] for r in table if r.get("mean") and r["metric"] == "fvu"
    }
    notes = []
    for kind in dict.fromkeys(key[:3] for key in points if key[0] == "switch"):
        shared = sorted(key[3] for key in points if key[:3] == kind and ("topk", 1, 1, key[3]) in points)
        if shared:
            gaps = [
                f"{points[(*kind, width)] / points['topk', 1, 1, width] - 1:+.1%} at M = {width:,}"
                for width in dict.fromkeys((shared[0], shared[-1]))
            ]
            notes.append(f"FVU of {look(*kind).label} against dense TopK: {', '.join(gaps)}")
    return notes

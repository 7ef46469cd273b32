"""Duplicates by experts and k, at equal width: the paper's figure of what the analysis `duplication` finds."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.analysis import analyze
from switch_sae.results.kind import Kind
from switch_sae.results.rows import grouped
from switch_sae.results.selection import Material, NotEnough, references, width_matched
from switch_sae.results.summary import Spread
from switch_sae.runs import MODEL_FILE
from switch_sae.style import Drawing, canvas, curve, legends, matrix, percent, power_of_two_ticks, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {"duplicates": "live latents with a neighbour\nof cosine > 0.9", "nearest_cosine": "mean cosine of live latents\nto the nearest neighbour"}


@styled
def draw(material: Material) -> Drawing:
    """Share of live latents whose nearest other decoder row has cosine > 0.9, and the mean of that cosine, by experts and k, at equal width.

    Heat maps, or lines over experts where there is one k. Raises NotEnough as `width_matched` does, and where the weights are not there.
    """
    width, groups = width_matched([group for group in material.standard() if group.first.k is not None])
    routed = grouped((g for g in groups if g.first.kind.is_routed and g.first.kind.experts_per_token == 1), lambda group: group.first.architecture)
    compared = references(groups) + max(routed.values(), key=len, default=[])
    notes = [f"of {', '.join(routed)} only the one with most SAEs is drawn"] if len(routed) > 1 else []
    kinds: list[Kind] = []
    table: list[dict[str, Any]] = []
    for group in sorted(compared, key=lambda group: (group.first.num_experts, group.first.k)):
        rows, kind = [row for row in group.rows if row.has_weights], group.first.kind
        if not rows:
            continue
        record: dict[str, Any] = {"latents": width, "experts": kind.experts, "k": group.first.k, "seeds": len(rows)}
        measured = analyze("duplication", rows)
        for measure in MEASURES:
            known = [one[measure] for one in measured if one[measure] is not None]
            spread = Spread.of(known) if known else Spread(math.nan, None, 0)
            record |= {measure: spread.mean, f"{measure}_sd": spread.sd}
        kinds.append(kind)
        table.append(record)
    if len({record["experts"] for record in table}) < 2:
        raise NotEnough(f"fewer than two numbers of experts at {width:,} latents have their {MODEL_FILE}.")
    return Drawing(_figure(width, kinds, table), table, notes)


def _figure(width: int, kinds: Sequence[Kind], table: Sequence[dict[str, Any]]) -> "Figure":
    experts, ks = sorted({record["experts"] for record in table}), sorted({record["k"] for record in table})
    counts = sorted({record["seeds"] for record in table})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    figure = canvas(6.4, 2.9) if len(ks) == 1 else canvas(min(10.0, max(6.4, 3.2 + len(ks))), max(2.9, 1.55 + 0.42 * len(experts)))
    for axis, (measure, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        if len(ks) == 1:
            _lines(axis, kinds, table, measure)
            axis.set_ylabel(label, fontsize=8.5)
            if measure == "duplicates":
                axis.yaxis.set_major_formatter(percent())
        else:
            _heat_map(axis, table, measure, experts, ks)
            axis.set_title(label, fontsize=8.5)
    what = "bars: ± 1 standard deviation" if len(ks) == 1 else "n: how many, where not all"
    k = f", k = {ks[0]}" if len(ks) == 1 else ""
    several = f" Mean over {many} seeds{f' ({what})' if len(ks) == 1 or len(counts) > 1 else ''}." if counts[-1] > 1 else " One seed each, no bars."
    legends(figure, f"{width:,} latents in all{k}; 1 expert is dense TopK.{several}")
    return figure


def _heat_map(axis: "Axes", table: Sequence[dict[str, Any]], measure: str, experts: Sequence[int], ks: Sequence[int]) -> None:
    import numpy as np

    cells = np.full((len(experts), len(ks)), np.nan)
    for record in table:
        cells[experts.index(record["experts"]), ks.index(record["k"])] = record[measure]
    most = max(record["seeds"] for record in table)
    counts = {k: {record["seeds"] for record in table if record["k"] == k} for k in ks}
    columns = [f"{k}" + (f"\nn = {min(counts[k])}" if len(counts[k]) == 1 and counts[k] != {most} else "") for k in ks]
    low = 0.0 if measure == "duplicates" else float(np.nanmin(cells))
    top = max(float(np.nanmax(cells)), low + 0.1)  # what hardly differs shall not look as if it did
    matrix(axis, cells, low, top, (columns, [str(e) for e in experts]), aspect="auto", cmap="Blues")
    for record in table:
        value, place = record[measure], (ks.index(record["k"]), experts.index(record["experts"]))
        if not math.isfinite(value):
            continue
        text = f"{100 * value:.1f}%" if measure == "duplicates" else f"{value:.2f}"
        text += f"\nn = {record['seeds']}" if record["seeds"] != most and len(counts[record["k"]]) > 1 else ""
        axis.text(*place, text, ha="center", va="center", fontsize=7, color="white" if (value - low) > 0.55 * (top - low) else "black")
    axis.set_xlabel("k")
    axis.set_ylabel("experts")


def _lines(axis: "Axes", kinds: Sequence[Kind], table: Sequence[dict[str, Any]], measure: str) -> None:
    axis.plot([record["experts"] for record in table], [record[measure] for record in table], color="0.6", linewidth=1, zorder=1)
    for kind, record in zip(kinds, table, strict=True):
        curve(axis, kind, [record["experts"]], [record[measure]], [record[f"{measure}_sd"]], clip_on=False)
    power_of_two_ticks(axis.xaxis, [record["experts"] for record in table])
    axis.set_xlabel("experts")
    axis.grid(axis="y", linewidth=0.4, color="0.88")
    axis.set_ylim(bottom=0 if measure == "duplicates" else None)

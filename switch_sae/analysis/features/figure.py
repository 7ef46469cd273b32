"""The figure of `FeatureGeometry`."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from switch_sae.analysis.base import Table
from switch_sae.analysis.features.maps import scatter
from switch_sae.analysis.findings import chosen
from switch_sae.results.kind import Kind
from switch_sae.results.rows import grouped
from switch_sae.style import DASHES, canvas, log_ticks, look, note, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
NULL, RESAMPLED = "0.75", "0.45"
HOLLOW = {"markerfacecolor": "white"}


def geometry_figure(table: Table, threshold: float) -> "Figure":
    """Rows of panels: neighbours, copies and sizes, sparseness, and maps where there are any."""
    names = sorted({_line(record) for record in table}, key=lambda name: _order(table, name))
    beside = chosen(table, part="neighbours", measure=("own_share", "cosine_within"))
    lines = [(name, cut) for name in names for cut in dict.fromkeys(record["against"] for record in beside if _line(record) == name)]
    maps = [record for record in chosen(table, part="map", measure="preservation") if record["value"] is not None]
    heights = [0.9 + 0.2 * max(1, len(lines)), 1.3 + 0.2 * len(names), 0.9 + 0.2 * len(names), *([2.9] if maps else [])]
    figure = canvas(12.8, sum(heights) + 0.7)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _neighbours(parts[0].subplots(1, 4, sharey=True), table, lines)
    _copies(parts[1].subplots(1, 4), table, names, threshold)
    _sparseness(parts[2].subplots(1, 4, sharey=True), table, names)
    if maps:
        for axis, record in zip(parts[3].subplots(1, max(2, len(maps)), squeeze=False)[0], maps, strict=False):
            _map(axis, table, record)
    text = (
        "A mark for each seed. Grey bars and ticks: nulls (experts drawn at random, of the same sizes; for sizes random directions), with the middle "
        "95 % of draws. Black lines: 95 % intervals over documents. Live latents are those that fire on the sample. Copies: cosine of decoder rows > "
        f"{threshold:g}. Components: latents joined wherever a cosine exceeds it. Maps: t-SNE of unit rows; 'kept' is the share "
        "of nearest neighbours that stay near, in brackets that of chance. Dashes tell kinds of one colour apart, in the order of the lines."
    )
    note(figure, text)
    return figure


def _neighbours(axes: "Sequence[Axes]", table: Table, lines: Sequence[tuple[str, str]]) -> None:
    labels = [f"{name}\n{cut}" if cut else name for name, cut in lines]
    parts = [("own_share", "decoder"), ("own_share", "encoder"), ("cosine", "decoder"), ("cosine", "encoder")]
    for axis, (measure, at) in zip(axes, parts, strict=True):
        for place, (name, cut) in enumerate(lines):
            for full, wanted in ((True, f"{measure}_within"), (False, f"{measure}_across")) if measure == "cosine" else ((True, measure),):
                found = chosen(table, part="neighbours", measure=wanted, at=at, against=cut)
                _marks(axis, place, [record for record in found if _line(record) == name], full)
        title = "nearest row\nis in the own expert" if measure == "own_share" else "mean highest cosine\nin the own expert (full), in others (hollow)"
        axis.set_title(f"{at} rows: {title}", fontsize=8)
        if measure == "own_share":
            axis.xaxis.set_major_formatter(percent())
            axis.set_xlim(left=0)
    _ticks(axes, [label.replace("\n", ", ") for label in labels])


def _copies(axes: "Sequence[Axes]", table: Table, names: Sequence[str], threshold: float) -> None:
    copies, curve, sizes, spectrum = axes
    kinds = grouped(names, lambda name: Kind.of(next(record for record in table if _line(record) == name)))
    for place, name in enumerate(names):
        mine = [record for record in table if _line(record) == name]
        routed = chosen(mine, part="copies", measure="across")
        _marks(copies, place, routed or chosen(mine, part="copies", measure="any", at=threshold), True)
        _marks(copies, place, chosen(mine, part="copies", measure="within"), False)
        live = chosen(mine, part="size", measure="live")
        _marks(sizes, place, live, True)
        _marks(sizes, place, chosen(mine, part="size", measure="components", at=threshold), False)
        for record in live:
            sizes.plot(record["latents"], place, "|", color=NULL, markersize=8)
        for full, at in ((True, "decoder"), (False, "encoder")):
            _marks(spectrum, place, chosen(mine, part="size", measure="spectrum", at=at), full)
        kind = Kind.of(mine[0])
        dash = DASHES[kinds[kind].index(name) % len(DASHES)]
        style = look(*kind).style() | {"markersize": 3, "linewidth": 1, "linestyle": dash}
        for measure, changes in (("any", {}), ("dense_of_same_rate", {"color": RESAMPLED, "linestyle": ":", "marker": ""})):
            points = [record for record in chosen(mine, part="by_rate", measure=measure) if record["value"] is not None]
            deciles = grouped(points, lambda record: record["note"]).values()
            x, y = ([sum(record[key] for record in part) / len(part) for part in deciles] for key in ("at", "value"))
            curve.plot(x, y, **(style | changes))
    copies.set_title("have a copy in another expert (full;\ndense: anywhere), in the own (hollow)", fontsize=8)
    copies.xaxis.set_major_formatter(percent())
    copies.set_xlim(left=0)
    sizes.set_title("latents: live (full),\ncomponents (hollow), all (grey)", fontsize=8)
    spectrum.set_title("exp(entropy) of the spectrum,\ndecoder (full), encoder (hollow)", fontsize=8)
    curve.set_title("share with a copy, by firing rate\n(grey: dense latents of those rates)", fontsize=8)
    curve.set_xlabel("share of rows on which a latent fires", fontsize=7)
    curve.tick_params(labelsize=7)
    rates = [record["at"] for record in chosen(table, part="by_rate") if record["value"] is not None]
    log_ticks(curve.xaxis, rates)
    curve.yaxis.set_major_formatter(percent())
    curve.set_ylim(bottom=0)
    for axis in (copies, sizes, spectrum):
        _ticks([axis], names if axis is copies else [""] * len(names))


def _sparseness(axes: "Sequence[Axes]", table: Table, names: Sequence[str]) -> None:
    titles = {
        "treves_rolls": "Treves-Rolls sparseness of a row's code\n(small is sparse)",
        "participation": "latents that carry a row's energy\n(participation ratio)",
        "lifetime_in_expert": "lifetime sparseness over the rows of a\nlatent's expert (1: one row)",
        "evenness": "evenness of a latent's values where it\nfires; hollow: before the gate",
    }
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for place, name in enumerate(names):
            mine = [record for record in chosen(table, part="sparseness", measure=measure) if _line(record) == name]
            _marks(axis, place, chosen(mine, against="before the gate"), False)
            _marks(axis, place, chosen(mine, against=("", "after the gate")), True)
        axis.set_title(title, fontsize=8)
    _ticks(axes, names)


def _map(axis: "Axes", table: Table, summary: Record) -> None:
    points = chosen(table, part="map", measure="point", sae=summary["sae"], at=summary["at"])
    xy = torch.tensor([[record["x"], record["y"]] for record in points])
    expert = torch.tensor([record["expert"] for record in points])
    scatter(axis, xy, expert, len(expert.unique()))
    kept = f"{summary['note']}: {summary['value']:.0%} kept ({summary['null']:.1%})"
    axis.set_title(f"{summary['at']} rows of {_line(summary)}\n({summary['against']}); {kept}", fontsize=7.5)


def _marks(axis: "Axes", place: int, records: Table, full: bool) -> None:
    """Seeds one below the other, with their intervals and nulls."""
    known = [record for record in records if record["value"] is not None]
    for number, record in enumerate(known):
        y = place + 0.5 * ((number + 0.5) / len(known) - 0.5)
        if record["null"] is not None:
            low, high = (record[name] if record[name] is not None else record["null"] for name in ("null_low", "null_high"))
            axis.plot([low, high], [y, y], color=NULL, linewidth=3, solid_capstyle="butt", zorder=1)
            axis.plot(record["null"], y, "|", color=RESAMPLED, markersize=4, zorder=2)
        style = look(*Kind.of(record)).style() | {"linestyle": "none", "markersize": 3.6, "markeredgewidth": 0.8} | ({} if full else HOLLOW)
        if record["low"] is not None:
            axis.plot([record["low"], record["high"]], [y, y], color="0.1", linewidth=0.8, zorder=3)
        axis.plot(record["value"], y, clip_on=False, zorder=4, **style)


def _ticks(axes: "Sequence[Axes]", labels: Sequence[str]) -> None:
    for axis in axes:
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="x", linewidth=0.4, color="0.88")


def _line(record: Record) -> str:
    """An SAE's name without date and seed: the line that it shares with other seeds."""
    return re.sub(r"-s\d+(?=$|/)", "", re.sub(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_", "", record["sae"]))


def _order(table: Table, name: str) -> tuple[Any, ...]:
    first = next(record for record in table if _line(record) == name)
    return (*Kind.of(first).order, -first["latents"], name)

"""The figure of the analysis of similarity."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.analysis.base import Table
from switch_sae.analysis.findings import chosen, dot
from switch_sae.results.kind import Kind
from switch_sae.style import canvas, legends, look, mark, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"spearman": "Spearman of cosine RDMs", "cka": "debiased CKA", "mutual_knn": "mutual 10 nearest neighbours"}
LABELS = {
    "ungated": "codes\nbefore\ngate",
    "codes": "codes",
    "merged": "merged\ncodes",
    "soft": "softly\nmerged",
    "reconstructions": "recon-\nstructions",
}


@styled
def similarity_figure(table: Table, stages: Sequence[str]) -> "Figure":
    """Above, the path of every kind against the first one's; below, at the codes, what pairs of one expert agree on and what the route explains."""
    path = chosen(table, part="path")
    reference = path[0]["sae"]
    below = [record for record in table if record["part"] in ("route", "strata") and record["at"] == "codes" and record["value"] is not None]
    below = [record for record in below if reference in (record["sae"], record["against"])]
    lines = list(dict.fromkeys((record["sae"], record["against"]) for record in path if _is_line(record, reference)))
    names = list(dict.fromkeys(record["sae"] for record in below))
    figure = canvas(9.2, 3.9 + (0.8 + 0.45 * len(names)) * bool(below))
    grid = figure.add_gridspec(1 + bool(below), 1, height_ratios=[3.0, 0.8 + 0.45 * len(names)] if below else None)
    above = list(grid[0].subgridspec(1, len(PANELS)).subplots(squeeze=False).flat)
    for axis, (measure, title) in zip(above, PANELS.items(), strict=True):
        for place, line in enumerate(lines):
            records = chosen(path, measure=measure, sae=line[0], against=line[1])
            _line(axis, records, stages, _style(line, path, reference), (place - (len(lines) - 1) / 2) * 0.08)
        axis.set_title(title)
        axis.set_xticks(range(len(stages)), [LABELS.get(stage, stage) for stage in stages], fontsize=7)
        axis.set_xlim(-0.5, len(stages) - 0.5)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]), top=max(1.0, axis.get_ylim()[1]))
        axis.grid(axis="y", linewidth=0.4, color="0.88")
    if below:
        _below(list(grid[1].subgridspec(1, 2).subplots(squeeze=False, sharey=True).flat), below, names)
    handles = [mark(_label(line, reference), **_style(line, path, reference)) for line in lines]
    text = (
        f"Above: each kind's representation of the same tokens against that of {reference} (its own other seeds: dashed), mean over pairs of seeds. "
        "Bars: 95 % over seeds and documents, or documents alone with one seed. Dashes of its colour: the ceiling, what seeds of both kinds agree on "
        "among themselves (geometric mean). Grey: whole documents permuted, 2.5 to 97.5 %."
    )
    if below:
        text += (
            " Below, Spearman at the codes. Left: among pairs of tokens that the router sends to one expert (full) or to different ones (hollow; "
            "missing where all tie); grey: as many pairs of random groups. Right: of the other's codes with 'same expert or not' alone (full; grey: "
            "documents permuted), and with the codes when that is taken out (hollow)."
        )
    legends(figure, text, handles, columns=4)
    return figure


def _is_line(record: dict[str, Any], reference: str) -> bool:
    return record["sae"] == reference and record["against"] != "activations"


def _kind(line: tuple[str, str], path: Table, reference: str) -> dict[str, Any]:
    """The record of the side that is not the reference."""
    name = line[1] if any(record["sae"] == line[1] for record in path) else reference
    return next(record for record in path if record["sae"] == name)


def _style(line: tuple[str, str], path: Table, reference: str) -> dict[str, Any]:
    style = look(*Kind.of(_kind(line, path, reference))).style()
    return style | ({"linestyle": (0, (4, 1.5))} if line[1] == "its other seeds" else {})


def _label(line: tuple[str, str], reference: str) -> str:
    return f"{reference}, other seeds" if line[1] == "its other seeds" else line[1]


def _line(axis: "Axes", records: Table, stages: Sequence[str], style: dict[str, Any], shift: float) -> None:
    records = [record for record in records if record["value"] is not None]
    if not records:
        return
    x = [stages.index(record["at"]) + shift for record in records]
    for place, record in zip(x, records, strict=True):
        if record["null_low"] is not None:
            axis.plot([place, place], [record["null_low"], record["null_high"]], color="0.75", linewidth=3, solid_capstyle="butt", zorder=1)
        if record["low"] is not None:
            axis.plot([place, place], [record["low"], record["high"]], color=style["color"], linewidth=1.0, zorder=2)
        if record["ceiling"] is not None:
            axis.plot(place, record["ceiling"], "_", color=style["color"], markersize=7, zorder=2)
    axis.plot(x, [record["value"] for record in records], zorder=3, **style)


def _below(axes: Sequence["Axes"], below: Table, names: Sequence[str]) -> None:
    """A line for each SAE: a full mark, and a hollow one below it."""
    groups = (
        ("strata", ("spearman, same expert", "spearman, different experts"), "Spearman within one expert (full),\nacross experts (hollow)"),
        ("route", ("spearman of the route", "spearman without routes"), "Spearman of the route alone (full),\nof codes without routes (hollow)"),
    )
    for axis, (part, measures, title) in zip(axes, groups, strict=True):
        for place, name in enumerate(names):
            for measure, shift in zip(measures, (-0.15, 0.15), strict=True):
                for record in chosen(below, part=part, sae=name, measure=measure):
                    dot(axis, record, place + shift, hollow=shift > 0)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", linewidth=0.4, color="0.88")
        axis.set_xlabel(title)

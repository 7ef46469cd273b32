"""The figure of `Fates`."""

from typing import TYPE_CHECKING, Any

from switch_sae.analysis.base import Table
from switch_sae.analysis.counterparts.matching_figure import means
from switch_sae.analysis.counterparts.partners import KINDS
from switch_sae.analysis.findings import chosen, dot
from switch_sae.results.kind import Kind
from switch_sae.style import COLOURS, canvas, legends, look, mark, percent, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HATCHES = ("", "//", "..", "xx", "\\\\", "")
"""Beside colours, for a grey print."""


@styled
def drawn(table: Table) -> "Figure":
    """Above: share of each kind for every dense and routed kind of SAE. Below: the kinds by firing frequency, one panel for each two SAEs."""
    from matplotlib.patches import Patch

    rows = means([record for record in table if record["part"] != "example"])
    pairs = list(dict.fromkeys((record["sae"], record["against"]) for record in chosen(rows, part="latents")))
    controls = {one: other for one, other in reversed(pairs) if chosen(rows, part="latents", sae=one, against=other)[0]["ceiling"] is not None}
    stacks = [(one, other, "value", f"{one}\nin {other}") for one, other in pairs]
    stacks += [(one, other, "ceiling", f"control: {one}\nin another seed") for one, other in controls.items()]
    columns = min(3, len(stacks))
    below = -(-len(stacks) // columns)
    upper_height, lower_height = 0.9 + 0.4 * len(pairs), 2.3 * below
    figure = canvas(10.4, 1.2 + upper_height + lower_height)
    parts: Any = figure.subfigures(2, 1, height_ratios=(upper_height, lower_height))
    upper, lower = parts
    axes = list(upper.subplots(1, len(KINDS), sharey=True))
    for axis, kind in zip(axes, KINDS, strict=True):
        for part, shift, hollow in (("latents", -0.16, False), ("activation", 0.16, True)):
            for record in chosen(rows, part=part, measure=kind):
                dot(axis, record, pairs.index((record["sae"], record["against"])) + shift, hollow)
        axis.set_xlabel(kind)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(percent())
        axis.grid(axis="x", linewidth=0.4, color="0.88")
    axes[0].set_yticks(range(len(pairs)), [f"{one}\nin {other}" for one, other in pairs], fontsize=7)
    axes[0].set_ylim(len(pairs) - 0.5, -0.5)
    fills: list[dict[str, Any]] = [
        {"facecolor": colour, "hatch": hatch, "edgecolor": "white"} for colour, hatch in zip((*COLOURS[:5], "0.8"), HATCHES, strict=True)
    ]
    panels = list(lower.subplots(below, columns, squeeze=False, sharey=True).flat)
    for axis, (one, other, column, title) in zip(panels, stacks, strict=False):
        records = chosen(rows, part="by_frequency", sae=one, against=other)
        bins = list(dict.fromkeys(str(record["at"]) for record in records))
        base = [0.0] * len(bins)
        for kind, fill in zip(KINDS, fills, strict=True):
            share = [record[column] or 0.0 for record in chosen(records, measure=kind)]
            axis.bar(range(len(bins)), share, bottom=base, width=0.8, linewidth=0.5, **fill)
            base = [low + more for low, more in zip(base, share, strict=True)]
        axis.set_xticks(range(len(bins)), [name.replace(" to ", "-") for name in bins], fontsize=7)
        axis.set_title(title, fontsize=7)
        axis.yaxis.set_major_formatter(percent())
    for place, axis in enumerate(panels):
        if place % columns == 0:
            axis.set_ylabel("share of latents", fontsize=8)
        if place + columns >= len(stacks):
            axis.set_xlabel("share of rows on which they fire", fontsize=8)
        axis.set_visible(place < len(stacks))
    style = look(*Kind.of(rows[0])).style() | {"linestyle": "none"}
    handles: list[Any] = [
        mark("share of latents", **style),
        mark("share of activation", **(style | {"markerfacecolor": "white"})),
        mark("null", marker="|", color="0.45", linestyle="none", markersize=8),
        mark("control: dense seed in blocks", marker="4", color="0.2", linestyle="none", markersize=9),
    ]
    handles += [Patch(label=kind, **fill) for kind, fill in zip(KINDS, fills, strict=True)]
    text = (
        "Means over all pairs of different seeds; bars hold the 95 % intervals over documents B of all pairs. Null: the other SAE's rows come "
        "from other documents. Control: another seed of the dense SAE, cut into as many arbitrary blocks as there are experts."
    )
    legends(figure, text, handles, columns=5)
    return figure

"""Training curves: error against tokens and against FLOPs, at equal width and at equal FLOPs per token."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.results.kind import Kind
from switch_sae.results.rows import ResultRow, grouped
from switch_sae.results.selection import Material, NotEnough, by_kind, common_k, matched_panels, mean_over_seeds
from switch_sae.results.summary import Summary
from switch_sae.runs import RunDir
from switch_sae.style import Drawing, canvas, engineering, exponent_ticks, handle, legends, log_ticks, look, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"width_matched": "width-matched: {:,} latents in all, k = {}", "flop_matched": "FLOP-matched: {:,} latents per expert, k = {}"}
SMOOTHED = 0.05
"""Share of the logged steps that one point averages over."""
UNSETTLED = 0.05
"""First share of the tokens that is not drawn: the fall from FVU 1 would flatten all that follows."""


@styled
def draw(material: Material) -> Drawing:
    """FVU of training batches by tokens and by training FLOPs (tokens * FLOPs per token), at the k that most kinds of SAE have.

    Raises NotEnough where nothing matches in width or FLOPs, and where no steps were logged.
    """
    found, missing = matched_panels([group for group in material.standard() if group.first.k is not None])
    panels: dict[str, list[Summary]] = {}
    table: list[dict[str, Any]] = []
    window = 1
    for match, (width, groups) in found.items():
        k = common_k(groups)
        title = TITLES[match].format(width, k)
        panels[title] = [group for group in groups if group.first.k == k]
        for kind, (group, *_) in by_kind(panels[title]).items():
            records = _records(title, kind, group)
            table += records
            window = max(window, window_of(len(records)))
    if not table:
        raise NotEnough("no training step was logged (log_every=0).")
    return Drawing(_figure(panels, table, window), table, [*missing, *_crossings(table)])


def window_of(points: int) -> int:
    """Logged steps that one point of a curve averages over: odd, about `SMOOTHED` of them all."""
    return 2 * round(SMOOTHED * points / 2) + 1


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running mean over `window` neighbours, centred; near the ends over as many as lie on both sides."""
    half = window // 2
    reach = [min(half, place, len(values) - 1 - place) for place in range(len(values))]
    return [math.fsum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def logged(row: ResultRow) -> dict[int, float]:
    """FVU of training batches by tokens."""
    return {line["tokens"]: line["fvu"] for line in RunDir(row.path).metrics() if line["sae"] == row.sae and "fvu" in line}


def _records(title: str, kind: Kind, group: Summary) -> list[dict[str, Any]]:
    curves = [curve for row in group.rows if (curve := logged(row))]
    if not curves:
        return []
    tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
    smoothed = [smooth([curve[at] for at in tokens], window_of(len(tokens))) for curve in curves]
    flops = group.mean("flops_total") or math.nan
    return [
        {"panel": title, **kind._asdict(), "latents": group.first.num_latents, "tokens": at, "flops": at * flops, "seeds": len(values)}
        | {"fvu": math.fsum(values) / len(values), "fvu_low": min(values), "fvu_high": max(values)}
        for at, values in zip(tokens, zip(*smoothed, strict=True), strict=True)
    ]


def _figure(panels: dict[str, list[Summary]], table: Sequence[dict[str, Any]], window: int) -> "Figure":
    figure = canvas(6.8, 2.4 * len(panels) + 0.7)
    for title, axes in zip(panels, figure.subplots(len(panels), 2, squeeze=False, sharey="row"), strict=True):
        records = [record for record in table if record["panel"] == title]
        if records:
            _panel(axes, records)
            axes[0].set_title(title, loc="left")
        else:
            for axis in axes:
                axis.set_axis_off()
    groups = [group for chosen in panels.values() for group in chosen]
    drawn = {Kind.of(record) for record in table}
    smoothing = f"Each curve is a running mean over {window} logged steps ({SMOOTHED:.0%} of the run), fewer at its ends."
    text = (
        f"{mean_over_seeds(groups, 'bands: from the lowest to the highest')} {smoothing if window > 1 else 'Not smoothed.'} "
        "FLOPs: tokens times forward and backward FLOPs per token, router and decoder included."
    )
    legends(figure, text, [handle(kind) for kind in by_kind(groups) if kind in drawn])
    return figure


def _panel(axes: "Sequence[Axes]", records: Sequence[dict[str, Any]]) -> None:
    late = [record for record in records if record["tokens"] >= UNSETTLED * max(r["tokens"] for r in records)]
    lines = grouped(late, Kind.of)
    for kind, points in lines.items():
        style = look(*kind).style() | {"markevery": (0.08 + 0.02 * (len(lines) % 4), 0.2), "markersize": 3.5}
        for axis, x in zip(axes, ("tokens", "flops"), strict=True):
            at = [point[x] for point in points]
            axis.fill_between(at, [p["fvu_low"] for p in points], [p["fvu_high"] for p in points], color=style["color"], alpha=0.25, linewidth=0)
            axis.plot(at, [point["fvu"] for point in points], **style)
    settled = [record[name] for record in late for name in ("fvu_low", "fvu_high")]
    log_ticks(axes[0].yaxis, settled)
    axes[0].set_ylim(min(settled) / 1.03, max(settled) * 1.03)
    axes[0].set_ylabel("FVU of training batches" + ", log scale" * (axes[0].get_yscale() == "log"))
    axes[0].set_xlabel("training tokens")
    axes[0].set_xlim(left=0)
    axes[0].xaxis.set_major_formatter(engineering())
    exponent_ticks(axes[1].xaxis, [record["flops"] for record in late])
    axes[1].set_xlabel("training FLOPs, log scale")
    axes[1].set_xlim(left=min(record["flops"] for record in late))


def _crossings(table: Sequence[dict[str, Any]]) -> list[str]:
    """When each kind reaches the final error of dense TopK in the same panel: the paper's sample efficiency.

    Only points that average over a whole window count, so "final" is the mean over the last window and not one batch.
    """

    def settled(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
        half = window_of(len(curve)) // 2
        return curve[half : len(curve) - half]

    notes = []
    for panel, records in grouped(table, lambda record: record["panel"]).items():
        curves = grouped(records, Kind.of)
        dense = next((curve for kind, curve in curves.items() if kind.is_reference), None)
        if dense is None:
            continue
        last, tokens = settled(dense)[-1], dense[-1]["tokens"]
        words = []
        for kind, curve in curves.items():
            if not kind.is_reference:
                reached = next((record for record in settled(curve) if record["fvu"] <= last["fvu"]), None)
                words.append(f"{look(*kind).label} " + (f"after {reached['tokens'] / tokens:.0%} of the tokens" if reached else "never"))
        if words:
            notes.append(f"{panel}: TopK's final FVU is reached by {', '.join(words)}")
    return notes

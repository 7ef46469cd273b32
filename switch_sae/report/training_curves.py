"""Training curves: error against tokens and against FLOPs, at equal width and at equal FLOPs per token."""

import math
from collections.abc import Sequence
from typing import Any

from switch_sae.report.results import ResultRow
from switch_sae.report.selection import Drawing, Material, NotEnough, by_kind, common_k, flop_matched, seeds, width_matched
from switch_sae.report.style import STYLE, engineering, exponent_ticks, legends, log_ticks, look
from switch_sae.report.summary import Summary
from switch_sae.runs import RunDir

SMOOTHED = 0.05
"""Share of the logged steps that one point averages over."""
QUANTITY = "fvu"
UNSETTLED = 0.05
"""First share of the tokens that may lie outside the axes: the fall from FVU 1 would flatten all that follows."""


def training_curves(material: Material) -> Drawing:
    """FVU of training batches by tokens and by training FLOPs (tokens * FLOPs per token), at the k that most kinds of SAE have.

    Raises NotEnough where nothing matches in width or FLOPs, and where no steps were logged.
    """
    panels: dict[str, list[Summary]] = {}
    missing = []
    for match, title in (
        (width_matched, "width-matched: {:,} latents in all, k = {}"),
        (flop_matched, "FLOP-matched: {:,} latents per expert, k = {}"),
    ):
        try:
            width, groups = match([group for group in material.standard() if group.first.k is not None])
            k = common_k(groups)
            panels[title.format(width, k)] = [group for group in groups if group.first.k == k]
        except NotEnough as error:
            missing.append(str(error))
    if not panels:
        raise NotEnough(" ".join(missing))
    table: list[dict[str, Any]] = []
    windows = {1}
    for title, groups in panels.items():
        for kind, (group, *_) in by_kind(groups).items():
            records, window = _records(title, kind, group)
            table += records
            windows.add(window)
    if not table:
        raise NotEnough("no training step was logged (log_every=0).")
    figure = _draw(panels, table, max(windows))
    return Drawing(figure, table, [*material.left_out(), *missing, *_crossings(table)])


def window_of(points: int) -> int:
    """Logged steps that one point of a curve averages over: odd, about `SMOOTHED` of them all."""
    return 2 * round(SMOOTHED * points / 2) + 1


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running mean over `window` neighbours, centred; near the ends over as many as lie on both sides."""
    half = window // 2
    reach = [min(half, place, len(values) - 1 - place) for place in range(len(values))]
    return [math.fsum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def logged(row: ResultRow, quantity: str = QUANTITY) -> dict[int, float]:
    """A logged quantity by tokens."""
    return {line["tokens"]: line[quantity] for line in RunDir(row.path).metrics() if line["sae"] == row.sae and quantity in line}


def _records(title: str, kind: tuple[str, int, int], group: Summary) -> tuple[list[dict[str, Any]], int]:
    curves = [curve for row in group.rows if (curve := logged(row))]
    if not curves:
        return [], 1
    tokens = sorted(set.intersection(*(set(curve) for curve in curves)))
    window = window_of(len(tokens))
    smoothed = [smooth([curve[at] for at in tokens], window) for curve in curves]
    flops = group.mean("flops_total") or math.nan
    names = dict(zip(("architecture", "experts", "experts_per_token"), kind, strict=True))
    return [
        {"panel": title, **names, "latents": group.first.num_latents, "tokens": at, "flops": at * flops, "seeds": len(values)}
        | {"fvu": math.fsum(values) / len(values), "fvu_low": min(values), "fvu_high": max(values)}
        for at, values in zip(tokens, zip(*smoothed, strict=True), strict=True)
    ], window


def _draw(panels: dict[str, list[Summary]], table: Sequence[dict[str, Any]], window: int) -> Any:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 2.4 * len(panels) + 0.7), layout="constrained")
        grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
        for title, axes in zip(panels, grid, strict=True):
            records = [record for record in table if record["panel"] == title]
            if not records:
                for axis in axes:
                    axis.set_axis_off()
                continue
            lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
            for record in records:
                lines.setdefault((record["architecture"], record["experts"], record["experts_per_token"]), []).append(record)
            for kind, points in lines.items():
                style = look(*kind).style() | {"markevery": (0.08 + 0.02 * (len(lines) % 4), 0.2), "markersize": 3.5}
                for axis, x in zip(axes, ("tokens", "flops"), strict=True):
                    at = [point[x] for point in points]
                    axis.fill_between(
                        at, [p["fvu_low"] for p in points], [p["fvu_high"] for p in points], color=style["color"], alpha=0.25, linewidth=0
                    )
                    axis.plot(at, [point["fvu"] for point in points], **style)
            late = [record for record in records if record["tokens"] >= UNSETTLED * max(r["tokens"] for r in records)]
            settled = [record["fvu"] for record in late]
            axes[0].set_ylabel("FVU of training batches")
            log_ticks(axes[0].yaxis, settled)
            axes[0].set_ylim(min(settled) / 1.03, max(settled) * 1.03)
            axes[0].set_title(title, loc="left")
            axes[0].set_xlabel("training tokens")
            axes[0].set_xlim(left=0)
            axes[0].xaxis.set_major_formatter(engineering())
            exponent_ticks(axes[1].xaxis, [record["flops"] for record in late])
            axes[1].set_xlabel("training FLOPs")
            axes[1].set_xlim(left=min(record["flops"] for record in late))
        groups = [group for chosen in panels.values() for group in chosen]
        drawn = {(record["architecture"], record["experts"], record["experts_per_token"]) for record in table}
        handles = [Line2D([], [], label=look(*kind).label, **look(*kind).style()) for kind in by_kind(groups) if kind in drawn]
        bands = "; bands from the lowest to the highest" if any(len(group.rows) > 1 for group in groups) else ""
        smoothing = (
            f"Each curve is a running mean over {window} logged steps ({SMOOTHED:.0%} of the run), fewer at its ends."
            if window > 1
            else "Not smoothed."
        )
        text = (
            f"Lines: mean over {seeds(groups)}{bands}. {smoothing} "
            "FLOPs: tokens times forward and backward FLOPs per token, router and decoder included."
        )
        legends(figure, text, handles)
    return figure


def _crossings(table: Sequence[dict[str, Any]]) -> list[str]:
    """When each kind reaches the final error of dense TopK in the same panel: the paper's sample efficiency.

    Only points that average over a whole window count, so "final" is the mean over the last window and not one batch.
    """

    def settled(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
        half = window_of(len(curve)) // 2
        return curve[half : len(curve) - half]

    notes = []
    for panel in dict.fromkeys(record["panel"] for record in table):
        records = [record for record in table if record["panel"] == panel]
        dense = [record for record in records if record["architecture"] == "topk"]
        if not dense:
            continue
        last, tokens = settled(dense)[-1], dense[-1]["tokens"]
        words = []
        for kind in dict.fromkeys((r["architecture"], r["experts"], r["experts_per_token"]) for r in records if r["architecture"] != "topk"):
            curve = [r for r in records if (r["architecture"], r["experts"], r["experts_per_token"]) == kind]
            reached = next((record for record in settled(curve) if record["fvu"] <= last["fvu"]), None)
            words.append(f"{look(*kind).label} " + (f"after {reached['tokens'] / tokens:.0%} of the tokens" if reached else "never"))
        if words:
            notes.append(f"{panel}: TopK's final FVU is reached by {', '.join(words)}")
    return notes

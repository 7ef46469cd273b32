"""Figures of single runs, for paper and screen.

Each function makes one `matplotlib.figure.Figure` without any global state; `render` turns it into bytes.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from switch_sae.analysis.features.neighbours import DecoderGeometry
from switch_sae.results.rows import TRAINED, ResultRow, grouped
from switch_sae.results.settings import EXACT, HEADLINE, without_outliers
from switch_sae.runs import RunDir
from switch_sae.style import (
    COLOURS,
    DASHES,
    MARKERS,
    canvas,
    engineering,
    inference_style,
    legends,
    log_if_wide,
    log_ticks,
    matrix,
    member,
    panels,
    percent,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = {"fvu": "FVU of the batch", "loss": "loss, all terms", "loss/mse": "reconstruction loss", "dead": "share of dead latents"}


@styled
def curves_figure(runs: Sequence[RunDir], quantities: Sequence[str] = ("fvu",)) -> "Figure":
    """Logged quantities of training batches by tokens, one panel each, one line per trained SAE. Raises ValueError where nothing was logged."""
    series = _series(runs, quantities)
    figure, axes = panels(len(quantities), 1, width=3.6 if len(quantities) > 1 else 4.6, height=2.8)
    for axis, quantity in zip(axes, quantities, strict=True):
        for (number, name), points in series.items():
            style: dict[str, Any] = {"linestyle": DASHES[(number - 1) % len(DASHES)], "label": name if len(runs) == 1 else f"{number} {name}"}
            every = max(1, len(points["tokens"]) // 8)
            axis.plot(points["tokens"], points[quantity], markevery=every, **member(name), **style)
        axis.set_xlabel("training tokens")
        log_ticks(axis.yaxis, [value for points in series.values() for value in points[quantity] if math.isfinite(value)])
        axis.set_ylabel(QUANTITIES.get(quantity, quantity) + (", log scale" if axis.get_yscale() == "log" else ""))
        axis.xaxis.set_major_formatter(engineering())
        axis.set_xlim(left=0)
        axis.grid(axis="y", linewidth=0.4, color="0.88")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@styled
def scores_figure(rows: Sequence[ResultRow]) -> "Figure":
    """FVU, and delta CE where it was measured, with 95 % intervals over documents; controls are hollow. A score of 0 lies on the axis."""
    metrics = {HEADLINE: "FVU", "delta_ce": "delta CE (nats)"}
    shown = [metric for metric in metrics if any(row.estimate(metric) for row in rows)]
    figure, axes = panels(len(shown), 1, width=3.4 if len(shown) > 1 else 4.4, height=1.15 + 0.26 * len(rows), sharey=True)
    for axis, metric in zip(axes, shown, strict=True):
        found = [(place, row, estimate) for place, row in enumerate(rows) if (estimate := row.estimate(metric))]
        ends = [end for *_, e in found for end in (e.value, e.low, e.high) if end is not None and e.value >= EXACT]
        log_if_wide(axis, ends or [1.0], factor=3.0)
        for place, row, estimate in found:
            value, low, high = (estimate.value if end is None else end for end in (estimate.value, estimate.low, estimate.high))
            if value < EXACT and axis.get_xscale() == "log":
                value = low = high = min(ends) / 1.5  # further left than all others: it is no number of this axis
            style = member(row.of or row.sae)
            axis.hlines(place, low, high, color=style["color"], linewidth=1.6)
            fill = inference_style(style["color"], row.inference if row.of else "")
            axis.plot(value, place, **style | fill | ({"markerfacecolor": "white"} if row.role == "control" else {}))
            axis.annotate(f"{estimate.value:z.3f}", (high, place), (6, 0), textcoords="offset points", va="center", fontsize=8, color="0.25")
        axis.set_xlabel(metrics[metric] + (", log scale" if axis.get_xscale() == "log" else ""))
        axis.grid(axis="x", linewidth=0.4, color="0.88")
        axis.margins(x=0.18)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle(_about(rows), fontsize=8.5)
    outliers = without_outliers(rows)
    told = [" Under refit hollow as well, under pursuit half full: no other weights."] if any(row.of for row in rows) else []
    legends(figure, "Bars: 95 % intervals over documents. Hollow: controls, not trained." + "".join(told) + f" FVU {outliers}." * bool(outliers))
    return figure


def _about(rows: Sequence[ResultRow]) -> str:
    """What the SAEs of a figure were trained on, where all of them agree."""
    words = {"source.model": "{}", "source.hook": "{}", "sae.k": "k = {}", "tokens": "{:,} tokens"}
    known = {key: {row.config.get(key) for row in rows if row.role == "main"} - {None} for key in words}
    return ", ".join(words[key].format(*values) for key, values in known.items() if len(values) == 1)


@styled
def load_figure(rows: Sequence[ResultRow]) -> "Figure":
    """Share of evaluation rows that each expert receives, one panel per trained SAE with experts, against the even share.

    Raises ValueError where no SAE has experts.
    """
    shares = [(row, row.results.vectors) for row in rows if has_load(row) and row.results is not None]
    if not shares:
        raise ValueError("no SAE here has experts, so there is no load to draw. Give a run of a Switch SAE.")
    columns = min(3, len(shares))
    figure, axes = panels(columns, -(-len(shares) // columns), width=4.2 if columns == 1 else 2.8, height=2.3, sharey=True)
    for axis, (row, vectors) in zip(axes, shares, strict=False):
        load = vectors["expert_load"]
        axis.bar(range(len(load)), load, width=0.75, color="#A6CBE3", edgecolor=COLOURS[0], linewidth=0.7, label="rows routed")
        axis.plot(range(len(load)), vectors["expert_probability"], MARKERS[3], color=COLOURS[6], markersize=3, label="mean router probability")
        axis.axhline(1 / len(load), color=COLOURS[1], linestyle=DASHES[1], linewidth=1.2, label="even share")
        axis.set_title(", ".join(filter(None, [row.label, "" if (cv := row.value("load_cv")) is None else f"load CV {cv:.2f}"])))
        axis.set_xlabel("expert")
        if len(load) <= 16:
            axis.set_xticks(range(len(load)))
        axis.yaxis.set_major_formatter(percent())
    for axis in axes[len(shares) :]:
        axis.set_axis_off()
    for axis in axes[::columns]:
        axis.set_ylabel("share of rows")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=3)
    return figure


def has_load(row: ResultRow) -> bool:
    """Whether it was trained and has experts."""
    return row.role in TRAINED and row.results is not None and "expert_load" in row.results.vectors


@styled
def geometry_figure(geometries: Mapping[str, DecoderGeometry], blocks: Collection[str] = ()) -> "Figure":
    """Per decoder: between which experts rows are close (heat map), and how close each row's nearest other row is, in its own expert and in others.

    `blocks` are the labels of dense decoders that were cut into arbitrary blocks, the control: other experts hold E - 1 times as many rows as a
    latent's own, so by chance alone the nearest of them is closer.
    """
    routed = {label: geometry for label, geometry in geometries.items() if geometry.cosine_ME.shape[1] > 1}
    figure = canvas(6.8 if routed else 4.6, 2.7 * len(geometries) + 0.2 * bool(routed))
    grid = figure.add_gridspec(len(geometries), 2, width_ratios=(1, 1.25))
    cosines = [cosine_M[~cosine_M.isnan()] for g in geometries.values() for cosine_M in (g.within_M, g.across_M)]
    low = min((float(cosine.min()) for cosine in cosines if len(cosine)), default=0.0)
    known = [cosine for geometry in routed.values() for cosine in geometry.similarity_EE().flatten().tolist() if math.isfinite(cosine)] or [0.0, 1.0]
    for place, (label, geometry) in enumerate(geometries.items()):
        part, title = "block" if label in blocks else "expert", label if len(geometries) > 1 else ""
        if label in routed:
            left, right = figure.add_subplot(grid[place, 0]), figure.add_subplot(grid[place, 1])
            places = [str(expert) for expert in range(geometry.cosine_ME.shape[1])]
            labels = (places, places) if len(places) <= 16 else None
            image = matrix(left, geometry.similarity_EE().numpy(), min(known), max(known), labels)
            left.set_title(title)
            left.set_xlabel(f"nearest row in {part}")
            left.set_ylabel(f"rows of {part}")
            figure.colorbar(image, ax=left, label="mean highest cosine", shrink=0.9)
            kinds = {f"in its own {part}": geometry.within_M, f"in any other {part}": geometry.across_M}
        else:
            right, kinds = figure.add_subplot(grid[place, :]), {"anywhere": geometry.nearest_M}
        _cosine_histogram(right, kinds, low)
        right.set_title(title)
    if routed:
        legends(figure, "Others hold E - 1 times as many rows as a latent's own expert: the nearest of them is closer by chance alone.")
    return figure


def _cosine_histogram(axis: "Axes", kinds: Mapping[str, Tensor], low: float) -> None:
    import numpy as np

    bins = np.linspace(min(low, 0.95), 1.0, 41).tolist()
    for place, (kind, cosine_M) in enumerate(kinds.items()):
        live = cosine_M[~cosine_M.isnan()].numpy()
        if len(live) == 0:
            continue
        weights = np.full(len(live), 1 / len(live))
        axis.hist(
            live, bins=bins, weights=weights, histtype="step", color=COLOURS[place], linestyle=DASHES[place], linewidth=1.4,
            label=f"{kind} (median {np.median(live):.2f})",
        )  # fmt: skip
    axis.set_xlabel("cosine to the nearest other decoder row")
    axis.set_ylabel("share of latents")
    axis.yaxis.set_major_formatter(percent())
    axis.margins(y=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper right")


def _series(runs: Sequence[RunDir], quantities: Sequence[str]) -> dict[tuple[int, str], dict[str, list[float]]]:
    lines = grouped(((number, row) for number, run in enumerate(runs, start=1) for row in run.metrics()), lambda line: (line[0], str(line[1]["sae"])))
    if not lines:
        raise ValueError(f"{', '.join(str(run.path) for run in runs)} logged nothing in training (log_every=0), so there are no curves.")
    return {name: {key: [row.get(key, float("nan")) for _, row in line] for key in ("tokens", *quantities)} for name, line in lines.items()}

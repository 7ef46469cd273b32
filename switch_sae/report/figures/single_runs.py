"""Figures of single runs, for paper and screen.

Each function makes one `matplotlib.figure.Figure` without any global state; `render` turns it into bytes.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from switch_sae.analysis.geometry import DecoderGeometry
from switch_sae.results.rows import ResultRow, grouped
from switch_sae.runs import RunDir
from switch_sae.style import COLOURS, DASHES, MARKERS, canvas, engineering, log_if_wide, matrix, nth, panels, percent, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = {"fvu": "FVU of the batch", "loss": "loss, all terms", "loss/mse": "reconstruction loss", "dead": "share of dead latents"}


@styled
def curves_figure(runs: Sequence[RunDir], quantities: Sequence[str] = ("fvu",)) -> "Figure":
    """Logged quantities of training batches by tokens, one panel each, one line per trained SAE. Raises ValueError where nothing was logged."""
    series = _series(runs, quantities)
    names = list(dict.fromkeys(name for _, name in series))
    figure, axes = panels(len(quantities), 1, width=3.6 if len(quantities) > 1 else 4.6, height=2.8)
    for axis, quantity in zip(axes, quantities, strict=True):
        for (number, name), points in series.items():
            style: dict[str, Any] = {"linestyle": DASHES[(number - 1) % len(DASHES)], "label": name if len(runs) == 1 else f"{number} {name}"}
            every = max(1, len(points["tokens"]) // 8)
            axis.plot(points["tokens"], points[quantity], markevery=every, **nth(names.index(name)), **style)
        axis.set_xlabel("training tokens")
        axis.set_ylabel(QUANTITIES.get(quantity, quantity))
        axis.xaxis.set_major_formatter(engineering())
        axis.set_xlim(left=0)
        axis.grid(axis="y", linewidth=0.4, color="0.88")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@styled
def scores_figure(rows: Sequence[ResultRow]) -> "Figure":
    """FVU, and delta CE where it was measured, with 95 % intervals over documents; controls are hollow."""
    metrics = {"fvu": "FVU", "delta_ce": "delta CE (nats)"}
    shown = [metric for metric in metrics if any(row.estimate(metric) for row in rows)]
    figure, axes = panels(len(shown), 1, width=3.4 if len(shown) > 1 else 4.4, height=0.7 + 0.26 * len(rows), sharey=True)
    names = list(dict.fromkeys(row.sae for row in rows))
    for axis, metric in zip(axes, shown, strict=True):
        estimates = [(place, row, row.estimate(metric)) for place, row in enumerate(rows)]
        for place, row, estimate in estimates:
            if estimate is None:
                continue
            low = estimate.value if estimate.low is None else estimate.low
            high = estimate.value if estimate.high is None else estimate.high
            style = nth(names.index(row.sae))
            axis.hlines(place, low, high, color=style["color"], linewidth=1.6)
            axis.plot(estimate.value, place, markerfacecolor="white" if row.role == "control" else style["color"], **style)
            axis.annotate(f"{estimate.value:.3f}", (high, place), (6, 0), textcoords="offset points", va="center", fontsize=8, color="0.25")
        log_if_wide(axis, [value for _, _, e in estimates if e for value in (e.value, e.low, e.high) if value is not None])
        axis.set_xlabel(metrics[metric] + (", log scale" if axis.get_xscale() == "log" else ""))
        axis.grid(axis="x", linewidth=0.4, color="0.88")
        axis.margins(x=0.18)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


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
        axis.set_title(row.label if len(shares) > 1 else "")
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
    return row.role != "control" and row.results is not None and "expert_load" in row.results.vectors


@styled
def geometry_figure(geometries: Mapping[str, DecoderGeometry]) -> "Figure":
    """Per decoder: between which experts rows are close (heat map), and how close each row's nearest other row is, in its own expert and in others.

    Other experts hold E - 1 times as many rows as a latent's own, so by chance alone the nearest of them is closer: compare with a dense SAE that is
    cut into E arbitrary blocks.
    """
    figure = canvas(6.8, 2.7 * len(geometries))
    grid = figure.subplots(len(geometries), 2, squeeze=False, width_ratios=(1, 1.25))
    cosines = [cosine_M[~cosine_M.isnan()] for g in geometries.values() for cosine_M in (g.within_M, g.across_M)]
    low = min((float(cosine.min()) for cosine in cosines if len(cosine)), default=0.0)
    similarities = [g.similarity_EE().nan_to_num(0) for g in geometries.values()]
    span = (min(0.0, *(float(s.min()) for s in similarities)), max(float(s.max()) for s in similarities))
    for (label, geometry), (left, right) in zip(geometries.items(), grid, strict=True):
        experts = geometry.cosine_ME.shape[1]
        if experts > 1:
            places = [str(expert) for expert in range(experts)]
            labels = (places, places) if experts <= 16 else None
            image = matrix(left, geometry.similarity_EE().numpy(), *span, labels, cmap="viridis")
            left.set_title(label if len(geometries) > 1 else "")
            left.set_xlabel("nearest row in expert")
            left.set_ylabel("rows of expert")
            figure.colorbar(image, ax=left, label="mean highest cosine", shrink=0.9)
            kinds = {"in its own expert": geometry.within_M, "in any other expert": geometry.across_M}
        else:
            left.set_axis_off()
            kinds = {"anywhere": geometry.nearest_M}
        _cosine_histogram(right, kinds, low)
        right.set_title(label if len(geometries) > 1 else "")
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

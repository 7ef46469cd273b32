"""The frontier of inference: error, its cost in the language model, stability and meaning against what finding a token's latents costs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.results.contenders import MEASURES, Contender, Frontier, Standing, frontier, share_of
from switch_sae.results.leverage import DenseCurve
from switch_sae.results.rows import grouped
from switch_sae.results.selection import Material, mean_over_seeds, outliers
from switch_sae.results.settings import HEADLINE
from switch_sae.style import Drawing, canvas, family_style, inference_style, log_ticks, mark, note, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLUMNS = 3
WIDE = 5
"""Factor between errors from which their axis is logarithmic."""
CHEAPER: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 1.1, "marker": "_", "markersize": 5.0}
SIZE: dict[str, Any] = {"markersize": 5.0, "linewidth": 1.1, "markeredgewidth": 1.1}


@styled
def draw(material: Material) -> Drawing:
    """Up to five panels, one for each of `MEASURES` that is known, with one line for each contender over its numbers of experts.

    Raises NotEnough as `frontier` does.
    """
    found = frontier(material)
    missing = [f"{measure.label} was not measured" for name, measure in MEASURES.items() if name not in found.known]
    return Drawing(_figure(found), [standing.record() for standing in found.standings], [*missing, *found.notes])


def _figure(found: Frontier) -> "Figure":
    lines = grouped(found.standings, lambda standing: standing.contender)
    styles = {contender: _style(contender, list(lines)) for contender in lines}
    rows = -(-(len(found.known) + 1) // COLUMNS)
    figure = canvas(9.6, 2.95 * rows + 0.3)
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    curve = found.standings[0].curve
    for axis, name in zip(axes, found.known, strict=False):
        if curve is not None and name == HEADLINE:
            axis.plot(*_cheaper_dense(curve, found), zorder=1, **CHEAPER)
        for contender, standings in lines.items():
            _line(axis, name, standings, styles[contender])
        _finish(axis, name, found)
    for axis in axes[len(found.known) :]:
        axis.set_axis_off()
    handles = [mark(contender.label, **style, **SIZE) for contender, style in styles.items()]
    handles += [mark("TopK of fewer latents (FVU)", **CHEAPER)] * (curve is not None)
    small = {"fontsize": 7.5, "handlelength": 2.6, "labelspacing": 0.3, "borderaxespad": 0.0}
    legend = axes[len(found.known)].legend(handles=handles, loc="upper left", **small)
    legend.set_in_layout(False)  # it may hang over its cell: below is room, and panels keep their width
    groups = [standing.group for standing in found.standings]
    first = found.reference.first
    words = [
        f"Compute: FLOPs per token of router and encoder, or pursuit, relative to dense TopK's encoder, M = {first.num_latents:,}, k = {first.k}.",
        "+ refit, + pursuit: the same weights under another inference (hollow, half full). Thin line: dense TopK.",
        mean_over_seeds(groups),
        outliers(groups),
    ]
    note(figure, " ".join(filter(None, words)))
    return figure


def _cheaper_dense(curve: DenseCurve, found: Frontier) -> tuple[list[float], list[float]]:
    """(compute, FVU) of dense TopK SAEs up to the reference: what a cheap encoder is worth only where it lies below."""
    width = found.reference.first.num_latents
    points = [(latents / width, error) for latents, error in curve.points if latents <= width]
    return [compute for compute, _ in points], [error for _, error in points]


def _style(contender: Contender, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Its architecture's colour, a marker for each variant, and the fill and dash of the inference under which it was scored."""
    alike = list(dict.fromkeys(other._replace(inference="") for other in contenders if other.architecture == contender.architecture))
    style = family_style(contender.architecture, alike.index(contender._replace(inference="")))
    return style | inference_style(style["color"], contender.inference)


def _line(axis: "Axes", name: str, standings: Sequence[Standing], style: dict[str, Any]) -> None:
    points = [(standing.compute, spread) for standing in standings if (spread := standing.group.spreads.get(name)) is not None]
    if points:
        x, y, bars = zip(*((compute, spread.mean, spread.sd or 0.0) for compute, spread in points), strict=True)
        axis.errorbar(x, y, bars, capsize=2, elinewidth=0.9, zorder=3, **style, **SIZE)


def _finish(axis: "Axes", name: str, found: Frontier) -> None:
    measure = MEASURES[name]
    values = [value for standing in found.standings if (value := standing.group.mean(name)) is not None]
    if (dense := found.reference.mean(name)) is not None:
        axis.axhline(dense, color="0.6", linewidth=0.8, zorder=1)
    if measure.is_error and max(values) > WIDE * min(values):
        log_ticks(axis.yaxis, values)
    axis.set_title(f"{measure.label}, {'less' if measure.is_error else 'more'} is better", loc="left")
    axis.grid(axis="y", linewidth=0.4, color="0.9")
    axis.set_xlabel("compute of finding latents, log scale")
    _share_ticks(axis.xaxis, [standing.compute for standing in found.standings])


def _share_ticks(axis: "Axis", values: Sequence[float]) -> None:
    """Powers of two as 1/16, from below the least value to above the greatest."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.axes.set_xscale("log", base=2)
    axis.axes.set_xlim(min(values) / 1.25, max(values) * 1.25)
    step = 1 if max(values) < 2**6 * min(values) else 2
    axis.set_major_locator(FixedLocator([2.0**power for power in range(-12, 7, step)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: share_of(value)))

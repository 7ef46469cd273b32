"""One look for all figures: colours that colour-blind readers can tell apart, and markers, dashes and hatches that survive a grey print."""

import functools
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from switch_sae.files import write_atomically
from switch_sae.models import SAES, SparseAutoencoder
from switch_sae.models.inference import Inference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, FuncFormatter

P = ParamSpec("P")
R = TypeVar("R")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's, without the yellow that white paper swallows."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
VARIANT_MARKERS = ("D", "P", "X", "v")
SHADES = (0.0, 0.45, -0.35, -0.7)
"""Towards white (above 0) or black."""
HOLLOW: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "white"}
"""Another author's points."""
_MEMBERS = ("flop_matched", "width_matched", "frozen_router", "parameter_matched", "pca", "untrained")
"""In the order of `COLOURS`, after the main SAE."""
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
}
EXPERT_COLOURS = {2: "#56B4E9", 4: "#0072B2", 8: "#009E73", 16: "#E69F00", 32: "#D55E00", 64: "#CC79A7", 128: "#882255"}
EXPERT_MARKERS = {2: "s", 4: "^", 8: "D", 16: "v", 32: "P", 64: "X", 128: "p"}


@dataclass(frozen=True)
class Look:
    """How one kind of SAE is drawn, the same in every figure: experts are colours, dense architectures are greys."""

    colour: str
    marker: str
    dash: Any
    label: str

    def style(self) -> dict[str, Any]:
        """Keywords of `Axes.plot` and `Axes.errorbar`."""
        colours = dict.fromkeys(("color", "markerfacecolor", "markeredgecolor"), self.colour)
        return {"marker": self.marker, "linestyle": self.dash, **colours}


def look(architecture: str, experts: int = 1, experts_per_token: int = 1) -> Look:
    """The look of an architecture, by its key in `SAES`, with so many experts. Numbers between the powers of two share the nearest one's."""
    family = SAES.get(architecture, SparseAutoencoder)
    label = family.label or architecture
    if experts == 1 and not family.is_routed:
        return Look(family.colour, family.marker or "H", "-" if family.is_reference else DASHES[1], label)
    slot = min(EXPERT_COLOURS, key=lambda size: abs(size.bit_length() - max(2, experts).bit_length()))
    label += f" {experts}" + (f", top {experts_per_token}" if experts_per_token > 1 else "")
    marker = (family.is_routed and family.marker) or EXPERT_MARKERS[slot]
    return Look(EXPERT_COLOURS[slot], marker, "-" if experts_per_token == 1 else DASHES[2], label)


def family_style(architecture: str, variant: int = 0) -> dict[str, Any]:
    """Keywords of `Axes.plot` for an architecture, whatever its number of experts, where inferences are compared: its class's colour and marker, or
    ones of its own by its place in `SAES`. Its variants (from 1) differ by their markers and by how light they are.
    """
    from matplotlib.colors import to_hex, to_rgb

    family = SAES.get(architecture, SparseAutoencoder)
    plain = [key for key, cls in SAES.items() if cls.colour == SparseAutoencoder.colour]
    place = plain.index(architecture) if architecture in plain else 0
    colour = COLOURS[place % len(COLOURS)] if family.colour == SparseAutoencoder.colour else family.colour
    first = family.marker or MARKERS[place % len(MARKERS)]
    markers = [first, *(other for other in (*VARIANT_MARKERS, *MARKERS) if other != first)]
    marker = markers[variant % len(markers)]
    shade = SHADES[variant % len(SHADES)]
    red, green, blue = (part + abs(shade) * (float(shade > 0) - part) for part in to_rgb(colour))
    return {"color": to_hex((red, green, blue)), "marker": marker}


def inference_style(colour: str, inference: str) -> dict[str, Any]:
    """Keywords of `Axes.plot` that tell inferences apart: full for the SAE's own (""), hollow for refit, half full for pursuit, with their dashes."""
    if not inference:
        return {"linestyle": DASHES[0], "markeredgecolor": colour, "markerfacecolor": colour}
    fills: dict[str, Any] = {
        Inference.encoder.name: {"fillstyle": "left", "linestyle": DASHES[3]},
        Inference.refit.name: {"markerfacecolor": "white", "linestyle": DASHES[1]},
        Inference.pursuit.name: {"fillstyle": "bottom", "linestyle": DASHES[2]},
    }
    return {"markeredgecolor": colour, "markerfacecolor": colour, "markerfacecoloralt": "white", **fills[inference]}


@dataclass(frozen=True)
class Drawing:
    """A figure, and the numbers behind it."""

    figure: "Figure"
    table: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    """What a reader must know and the figure does not show, such as SAEs left out."""


def styled(draw: "Callable[P, R]") -> "Callable[P, R]":
    """Draws with `STYLE` and leaves matplotlib's global state alone."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def canvas(width: float, height: float) -> "Figure":
    """An empty figure, in inches, that makes room for its labels and legends."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curve(
    axis: "Axes", kind: tuple[str, int, int], x: Sequence[float], y: Sequence[float], sd: Sequence[float | None] | None, **changes: Any
) -> None:
    """One kind of SAE: points joined by lines, with bars of ± `sd` (None for a single seed); or, with `sd` None, hollow: another author's."""
    style = look(*kind).style()
    if sd is None:
        axis.plot(x, y, zorder=2, **(style | HOLLOW | {"linewidth": 0.8, "markersize": 3.6, "alpha": 0.8} | changes))
    else:
        axis.errorbar(x, y, [bar or 0.0 for bar in sd], capsize=2, elinewidth=0.9, zorder=3, **(style | changes))


def handle(kind: tuple[str, int, int], **changes: Any) -> "Line2D":
    """A kind's line in a legend."""
    return mark(look(*kind).label, **(look(*kind).style() | changes))


def mark(label: str, **style: Any) -> "Line2D":
    """A line or a marker in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def matrix(axis: "Axes", values: Any, low: float, high: float, labels: "tuple[Sequence[str], Sequence[str]] | None", **more: Any) -> "AxesImage":
    """A heat map of [rows, columns] without frame and tick marks; `labels` are those of columns and of rows, None for none that fit."""
    image = axis.imshow(values, vmin=low, vmax=high, **{"cmap": "cividis", **more})
    axis.spines[:].set_visible(False)
    for labelled, names in zip((axis.xaxis, axis.yaxis), labels or (), strict=False):
        labelled.set_ticks(range(len(names)), names)
        labelled.set_tick_params(length=0)
    return image


def render(figure: "Figure", kind: str = "png") -> bytes:
    """The figure as PNG (200 dpi) or PDF; the same figure gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=200, metadata={"CreationDate": None} if kind == "pdf" else None)
    return buffer.getvalue()


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes PATH.png and PATH.pdf, each whole or not at all."""
    for kind in ("png", "pdf"):
        write_atomically(path.with_name(f"{path.name}.{kind}"), render(figure, kind))


def panels(columns: int, rows: int, width: float, height: float, sharey: bool = False) -> "tuple[Figure, list[Axes]]":
    """A figure of equal panels, row by row, with room beside them for a legend."""
    figure = canvas(width * columns + 1.2, height * rows)
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)


def log_if_wide(axis: "Axes", values: Sequence[float], factor: float = 10.0) -> None:
    """A wide factor on a linear axis would press the small values into one point."""
    if min(values) > 0 and max(values) >= factor * min(values):
        log_ticks(axis.xaxis, values)


def log_ticks(axis: "Axis", values: Sequence[float]) -> None:
    """A logarithmic x or y axis with plain numbers at as many ticks as its span needs. Linear where a value is not positive."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if not values or min(values) <= 0:
        return
    span = max(values) / min(values)
    _set_log(axis)
    axis.set_major_locator(
        MaxNLocator(5, steps=(1, 2, 5, 10)) if span < 3 else LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if span < 8 else (1, 2, 5) if span < 300 else (1,))
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}") if max(values) < 1e4 else engineering())
    axis.set_minor_formatter(NullFormatter())


def exponent_ticks(axis: "Axis", values: Sequence[float]) -> None:
    """A logarithmic axis with ticks such as 3 x 10^11, for FLOPs."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    _set_log(axis)
    span = max(values) / min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 10 else (1, 3) if span < 100 else (1,)))
    axis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
    axis.set_minor_formatter(NullFormatter())


def _set_log(axis: "Axis", base: int = 10) -> None:
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log", base=base)


def power_of_two_ticks(axis: "Axis", values: Sequence[float]) -> None:
    """A logarithmic axis with at most 7 powers of two as ticks, for k, widths and numbers of experts.

    It spans a factor of 2 or more, so that an L0 of 15.98 does not look far from 16.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    _set_log(axis, base=2)
    low, high = math.floor(math.log2(min(values)) + 0.01), math.ceil(math.log2(max(values)) - 0.01)
    step = max(1, -(-(high - low + 1) // 7))
    if max(values) < 2 * min(values):
        middle = math.sqrt(min(values) * max(values))
        (axis.axes.set_xlim if axis is axis.axes.xaxis else axis.axes.set_ylim)(middle / 1.5, middle * 1.5)
    axis.set_major_locator(FixedLocator([2.0**power for power in range(low, high + 1, step)]))
    axis.set_minor_locator(NullLocator())
    in_ki = max(values) >= 2**14 and low >= 10
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:.0f}Ki" if in_ki else f"{value:.0f}"))


def legends(figure: "Figure", text: str, handles: Sequence[Any] = (), columns: int = 6, **more: Any) -> None:
    """A legend for all panels above them, and below them, small, what the marks mean (`note`)."""
    note(figure, text)
    if handles:
        layout = {"ncols": min(columns, len(handles)), "handlelength": 2.2, "columnspacing": 1.4} | more
        figure.legend(handles=handles, loc="outside upper center", **layout)


def note(figure: "Figure", text: str) -> None:
    """A small text below all panels, in lines of the figure's width."""
    characters = int(figure.get_figwidth() * 72 / 4.1)  # points per character, at most
    figure.supxlabel("\n".join(textwrap.wrap(text, characters)), fontsize=7, color="0.25")


def member(name: str) -> dict[str, Any]:
    """Colour and marker of an SAE or control of a run, by its name and never by its place: the same in every figure of every run."""
    family = SAES.get(name)
    if family is not None and not family.is_routed:
        return {"color": family.colour, "marker": family.marker or "H"}
    kind = "pca" if name.startswith("pca_") else name
    place = 0 if family is not None else _MEMBERS.index(kind) + 1 if kind in _MEMBERS else 1 + sum(name.encode()) % (len(COLOURS) - 1)
    return {"color": COLOURS[place], "marker": MARKERS[place]}


def engineering() -> "EngFormatter":
    """Ticks such as 20M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def percent() -> "FuncFormatter":
    """Shares as percentages."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda share, _: f"{100 * share:.3g}%")

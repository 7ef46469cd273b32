"""The figure of description lengths."""

from typing import TYPE_CHECKING, Any

from switch_sae.analysis.base import Table
from switch_sae.analysis.codes.comparison import SHORTEST, WITH_CLASSES
from switch_sae.analysis.codes.lengths import EXACT
from switch_sae.analysis.findings import chosen, dots
from switch_sae.results.kind import Kind
from switch_sae.results.rows import grouped
from switch_sae.style import canvas, legends, log_ticks, look, mark, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {"route": "#222222", "support": "#56B4E9", "values": "#E69F00", "residual": "#C9C9C9"}
SAVINGS = {EXACT: "exact k, both", WITH_CLASSES: "dense with as many classes", SHORTEST: "shortest code of each"}


@styled
def draw_lengths(table: Table, at: float) -> "Figure":
    """Rate-distortion curves; at one distortion the parts of each SAE's shortest code; and what routed SAEs save against dense ones."""
    totals = grouped(chosen(table, part="total"), _series)
    names = {series: _label(records[0]) for series, records in totals.items()}
    if len(set(names.values())) < len(names):
        names = {series: f"{label}\n{series}"[:46] for series, label in names.items()}
    savings = _savings(table, at)
    figure = canvas(11.5, max(3.4, 1.4 + 0.2 * max(len(savings), 1.6 * len(names))))
    curves, bars, saved = figure.subplots(1, 3, width_ratios=(1.1, 1, 0.9))
    _draw_curves(curves, totals, {_series(record): record["against"] for record in chosen(table, part="parts")})
    _draw_parts(bars, table, at, names)
    _draw_savings(saved, savings, at, names)
    handles = [mark(names[series].split("\n")[0], **look(*Kind.of(records[0])).style()) for series, records in totals.items()]
    handles += [mark("no SAE: Gaussian code", color="0.5", linestyle=":")]
    unique = {handle.get_label(): handle for handle in handles}
    meaning = (
        "Left: solid lines with the exact-k code of supports, thin dashed ones with each SAE's shortest code; means of seeds, bars: 95 % intervals "
        "over documents. Middle: the shortest code. Right: bits that routed SAEs save against the widest dense one; lines are 95 % t intervals over "
        "seeds, or intervals over documents where there is one seed. Bits of the models themselves are in no total."
    )
    legends(figure, meaning, list(unique.values()), columns=5)
    return figure


def _series(record: dict[str, Any]) -> str:
    return str(record["sae"]).replace(f"-s{record['seed']}", "")


def _label(record: dict[str, Any]) -> str:
    return f"{look(*Kind.of(record)).label}, M={record['latents']}"


def _mean(records: Table, name: str = "value") -> float:
    return sum(record[name] for record in records) / len(records)


def _draw_curves(axis: "Axes", totals: dict[str, Table], shortest: dict[str, str]) -> None:
    for series, records in totals.items():
        for code, thin in ((EXACT, False), (shortest[series], True)):
            by_at = grouped([record for record in records if record["measure"] == code], lambda record: record["at"])
            x, y = list(by_at), [_mean(of) for of in by_at.values()]
            style = look(*Kind.of(records[0])).style()
            if thin:
                axis.plot(x, y, **(style | {"linestyle": (0, (4, 2)), "linewidth": 0.8, "marker": ""}))
                continue
            bars = None
            if all(record["low"] is not None for record in records):
                low, high = ([_mean(of, end) for of in by_at.values()] for end in ("low", "high"))
                bars = [[value - end for value, end in zip(y, low, strict=True)], [end - value for value, end in zip(y, high, strict=True)]]
            axis.errorbar(x, y, bars, capsize=2, elinewidth=0.9, **style)
    nulls = grouped([record for records in totals.values() for record in records], lambda record: record["at"])
    axis.plot(list(nulls), [_mean(of, "null") for of in nulls.values()], color="0.5", linestyle=":")
    log_ticks(axis.xaxis, list(nulls))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("distortion (share of variance)")
    axis.set_ylabel("bits per token")


def _draw_parts(axis: "Axes", table: Table, at: float, names: dict[str, str]) -> None:
    labels = []
    for place, (series, records) in enumerate(grouped(chosen(table, part="parts", at=at), _series).items()):
        left = 0.0
        for part, colour in PARTS.items():
            bits = _mean(chosen(records, measure=part))
            axis.barh(place, bits, left=left, color=colour, height=0.65, label=part if not place else None)
            left += bits
        axis.annotate(f"{left:.0f}", (left, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)
        labels.append(names[series])
    axis.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.set_xlabel(f"bits per token at distortion {at:g}")
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, handlelength=1.0, columnspacing=1.0)


def _savings(table: Table, at: float) -> Table:
    """Over seeds where there are several, else over documents; against the widest dense SAE."""
    pairs = chosen(table, part="saved", at=at, measure=tuple(SAVINGS))
    wide = {record["sae"]: record["latents"] for record in chosen(table, part="total", at=at)}
    shown = []
    for records in grouped(pairs, lambda record: (_series(record), record["measure"])).values():
        most = max(wide[record["against"]] for record in records)
        records = [record for record in records if wide[record["against"]] == most]
        seeds = [
            record
            for record in chosen(table, part="saved over seeds", at=at, measure=records[0]["measure"])
            if _series(record) == _series(records[0]) and records[0]["against"].startswith(record["against"]) and record["n"] > 1
        ]
        shown.append((seeds or records)[0])
    return shown


def _draw_savings(axis: "Axes", savings: Table, at: float, names: dict[str, str]) -> None:
    axis.axvline(0, color="0.5", linewidth=0.8)
    axis.set_xlabel(f"bits per token saved at distortion {at:g}")
    if not savings:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "needs a dense SAE and\none with experts", ha="center", transform=axis.transAxes, fontsize=8)
        return
    labels = []
    for records in grouped(savings, _series).values():
        label = names[_series(records[0])].splitlines()[0].split(",")[0]
        labels += [f"{'' if n else label + ': '}{SAVINGS[record['measure']]}" for n, record in enumerate(records)]
    dots(axis, savings, labels)
    axis.tick_params(axis="y", labelsize=7.5)

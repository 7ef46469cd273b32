"""The figure of the router analysis."""

from typing import TYPE_CHECKING, Any

from switch_sae.analysis.base import Table
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.observed import series_name
from switch_sae.results.kind import Kind
from switch_sae.results.rows import grouped
from switch_sae.style import legends, look, mark, panels, power_of_two_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key = tuple[str, str, str]
"""Label, measure, and what `against` starts with."""
CONTROL: tuple[Key, ...] = (
    ("share of variance", "share of x", "null random"),
    ("share of error", "share of error", "null random"),
    ("token (accuracy)", "accuracy token", "control, null random"),
    ("position (R²)", "R2 position", "control, null random"),
    ("dense latents (R²)", "R2 dense latents", "control, null random"),
    ("swap: FVU of content", "swap, FVU of the content", "no swap"),
)
COUPLING: tuple[Key, ...] = (
    ("tokens' mean", "AUC cosine tokens' mean", ""),
    ("decoder mean", "AUC cosine decoder centred mean", ""),
    ("encoder mean", "AUC cosine encoder centred mean", ""),
    ("dense decoder mean", "AUC cosine dense decoder centred mean", ""),
    ("dense encoder mean", "AUC cosine dense encoder centred mean", ""),
    ("logit, k largest", "AUC correlation top k", ""),
)
ROUTES: tuple[Key, ...] = (
    ("flips: 1 % noise", "flips, noise 1%", ""),
    ("flips: 3 % noise", "flips, noise 3%", ""),
    ("flips: reconstruction", "flips, reconstruction", ""),
    ("flips: next token", "flips, next token", ""),
    ("seeds: agreement", "agreement", ""),
    ("seeds: NMI", "NMI", ""),
    ("seeds: ARI", "ARI", ""),
)
_FILLS: tuple[dict[str, Any], ...] = (
    {},
    {"markerfacecolor": "white"},
    {"markeredgecolor": "black"},
    {"markeredgecolor": "black", "markerfacecolor": "white"},
)
_NOTE = (
    "Marks: SAEs with experts; of several seeds their mean, with bars from the lowest to the highest seed, of one seed with its 95 % interval over "
    "documents. Grey bars and bands: the range of a null's draws. Nulls of sums as named above (Gaussian rows have the activations' covariance); of "
    "what the router sees: random subspaces of its rank, for swaps no swap; of the AUC: experts dealt at random; of routes: shuffled in documents, "
    "or noise of the error's norm."
)
_LINES: dict[str, dict[str, Any]] = {
    "sums of another seed's router rows": {"color": "0.2", "linestyle": (0, (1, 1.5))},
    "ceiling: a dense latent of another seed": {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 0.9},
    "null: rotated rows": {"color": "0.6", "linewidth": 1},
    "null: Gaussian rows": {"color": "0.6", "linewidth": 1, "linestyle": ":"},
    "null: random rows as frequent": {"color": "0.6", "linewidth": 1, "linestyle": "--"},
    "first components of that rank": {"color": "0.45", "marker": "x", "markersize": 4, "linestyle": "none"},
}
"""What the legend says of lines that belong to no SAE alone."""


def draw_router(table: Table) -> "Figure":
    """Six panels: sums of encoder and of decoder rows, predicted routes; the control part, coupling, routes."""
    figure, axes = panels(3, 2, width=3.3, height=3.4)
    groups = grouped(table, series_of)
    looks = _looks(groups)
    for axis, measure, title in ((axes[0], "R2 encoder", "encoder"), (axes[1], "R2 decoder", "decoder")):
        _sums(axis, groups, looks, measure)
        axis.set_title(f"router rows as sums of dense {title} rows")
    _prediction(axes[2], groups, looks)
    for axis, part, keys, title in (
        (axes[3], "control", CONTROL, "in what the router sees"),
        (axes[4], "coupling", COUPLING, "AUC: own expert against others"),
        (axes[5], None, ROUTES, "what routes follow (shares)"),
    ):
        _marks(axis, {name: [r for r in records if part in (None, r["part"])] for name, records in groups.items()}, looks, keys)
        axis.set_title(title)
    handles = [mark(name, **style | {"linestyle": "none", "markersize": 5.5}) for name, style in looks.items()]
    legends(figure, _NOTE, handles + [mark(name, **style) for name, style in _LINES.items()], columns=3)
    return figure


def series_of(record: dict[str, Any]) -> str:
    """A record's SAE without its date and seed."""
    return series_name(record["sae"])


def pooled(records: Table) -> dict[str, Any] | None:
    """One record of several seeds': means, with the lowest and highest value as interval; of one seed its own. None where none has a value."""
    known = [record for record in records if record["value"] is not None]
    if len({record["sae"] for record in known}) < 2:
        return known[0] if known else None
    values = [record["value"] for record in known]
    nulls = {name: [record[name] for record in known if record[name] is not None] for name in ("null", "null_low", "null_high", "ceiling")}
    means = {name: sum(found) / len(found) if found else None for name, found in nulls.items()}
    reach = {"null_low": min(nulls["null_low"], default=None), "null_high": max(nulls["null_high"], default=None)}
    return known[0] | {"value": sum(values) / len(values), "low": min(values), "high": max(values)} | means | reach


def _looks(groups: dict[str, Table]) -> dict[str, dict[str, Any]]:
    """Markers and colours of series; those of one kind differ by how their markers are filled."""
    looks: dict[str, dict[str, Any]] = {}
    used: dict[Kind, int] = {}
    for name, records in groups.items():
        kind = Kind.of(records[0])
        looks[name] = look(*kind).style() | _FILLS[used.get(kind, 0) % len(_FILLS)]
        used[kind] = used.get(kind, 0) + 1
    return looks


def _at(records: Table, measure: str) -> Table:
    return [record for record in chosen(records, measure=measure) if record["at"] != ""]


def _curve(records: Table) -> list[dict[str, Any]]:
    by_place = grouped([record for record in records if record["at"] != ""], lambda record: float(record["at"]))
    return [one for at in sorted(by_place) if (one := pooled(by_place[at]))]


def _sums(axis: "Axes", groups: dict[str, Table], looks: dict[str, dict[str, Any]], measure: str) -> None:
    for name, records in groups.items():
        for null, dash in (("rotated", "-"), ("gaussian", ":"), ("frequency", "--")):
            line = _curve([r for r in chosen(records, measure=measure) if r["against"].endswith(null)])
            if not line:
                continue
            places = [one["at"] for one in line]
            axis.plot(places, [one["null"] for one in line], color="0.6", linewidth=1, zorder=1, linestyle=dash)
            axis.fill_between(places, [one["null_low"] for one in line], [one["null_high"] for one in line], color="0.85", linewidth=0, zorder=0)
            if null == "rotated":
                axis.plot(places, [one["value"] for one in line], zorder=3, **looks[name] | {"markersize": 3.5, "linewidth": 1})
                if line[0]["ceiling"] is not None:
                    axis.plot(places, [one["ceiling"] for one in line], color="black", linestyle=(0, (4, 2)), linewidth=0.9, zorder=2)
        again = _curve(chosen(records, measure="R2 another seed"))
        if again and axis.lines:
            axis.plot([one["at"] for one in again], [one["value"] for one in again], color=looks[name]["color"], linestyle=(0, (1, 1.5)), zorder=2)
    _empty(axis, not axis.lines)
    if axis.lines:
        power_of_two_ticks(axis.xaxis, [1, max(2.0, *(float(r["at"]) for records in groups.values() for r in _at(records, measure)))])
    axis.set_xlabel("rows in the sum")
    axis.set_ylabel("R²")
    axis.set_ylim(0, 1.02)


def _prediction(axis: "Axes", groups: dict[str, Table], looks: dict[str, dict[str, Any]]) -> None:
    flat: dict[str, list[float]] = {}
    for name, records in groups.items():
        accuracy = chosen(records, part="prediction", measure="accuracy")
        for source, change in (("dense latents", {}), ("components", {"linestyle": ":", "alpha": 0.6})):
            line = _curve(chosen(accuracy, against=source))
            if line:
                known = all(one["low"] is not None for one in line)
                reach = [[one["value"] - one["low"] for one in line], [one["high"] - one["value"] for one in line]] if known else None
                style = looks[name] | {"markersize": 3.5, "linewidth": 1} | change
                axis.errorbar([one["at"] for one in line], [one["value"] for one in line], reach, elinewidth=0.8, zorder=3, **style)
        for source in ("majority", "bigram", "nearest mean", "other seed"):
            if (one := pooled(chosen(accuracy, against=source))) is not None:
                flat.setdefault(source, []).append(one["value"])
    lines = sorted((sum(values) / len(values), source) for source, values in flat.items())
    for place, (value, source) in enumerate(lines):
        axis.axhline(value, color="0.55", linewidth=0.8, zorder=1)
        crowded = place > 0 and value - lines[place - 1][0] < 0.06  # its name goes above the line, that of the one below it under its own
        at, side = (0.02, "left") if value > 0.4 else (0.98, "right")  # where the curves are not
        below = place + 1 < len(lines) and lines[place + 1][0] - value < 0.06 and not crowded
        label: dict[str, Any] = {"va": "top" if below else "bottom", "ha": side, "fontsize": 7, "color": "0.25"}
        axis.text(at, value, source, transform=axis.get_yaxis_transform(), **label)
    places = [1.0, *(float(record["at"]) for records in groups.values() for record in chosen(records, measure="accuracy") if record["at"] != "")]
    _empty(axis, len(places) == 1)
    power_of_two_ticks(axis.xaxis, [1, max(2.0, *places)])
    axis.set_xlabel("dense latents (—), components (···)")
    axis.set_ylim(0, 1.02)
    axis.set_title("routes predicted on other documents")


def _marks(axis: "Axes", groups: dict[str, Table], looks: dict[str, dict[str, Any]], keys: tuple[Key, ...]) -> None:
    """A band per measure, in it a line per series."""
    for place, (_, measure, against) in enumerate(keys):
        if not any(record["value"] is not None for records in groups.values() for record in chosen(records, measure=measure)):
            axis.text(0.02, place, "no value: see the notes in the table", fontsize=7, color="0.4", va="center")
        for slot, (name, records) in enumerate(groups.items()):
            found = [record for record in chosen(records, measure=measure) if record["against"].startswith(against)]
            if (one := pooled(found)) is None:
                continue
            y = place + 0.7 * ((slot + 0.5) / len(groups) - 0.5)
            if one["null"] is not None:
                low, high = (one[end] if one[end] is not None else one["null"] for end in ("null_low", "null_high"))
                axis.plot([low, high], [y, y], color="0.75", linewidth=3, solid_capstyle="butt", zorder=1)
                axis.plot(one["null"], y, "|", color="0.45", markersize=6, zorder=2)
            demanding = pooled(chosen(records, measure=measure, against=against.replace("random", "components"))) if "random" in against else None
            if demanding is not None:
                axis.plot(demanding["null"], y, "x", color="0.45", markersize=4, zorder=2)
            if one["low"] is not None:
                axis.plot([one["low"], one["high"]], [y, y], color=looks[name]["color"], linewidth=1, zorder=3)
            axis.plot(one["value"], y, clip_on=False, zorder=4, **looks[name] | {"linestyle": "none", "markersize": 4})
    axis.set_yticks(range(len(keys)), [label for label, _, _ in keys])
    axis.set_ylim(len(keys) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    for edge in range(len(keys) - 1):
        axis.axhline(edge + 0.5, color="0.9", linewidth=0.5, zorder=0)
    axis.grid(axis="x", linewidth=0.4, color="0.88")


def _empty(axis: "Axes", is_empty: bool) -> None:
    if is_empty:
        axis.text(0.5, 0.5, "needs a dense SAE", transform=axis.transAxes, ha="center", va="center", fontsize=8, color="0.4")

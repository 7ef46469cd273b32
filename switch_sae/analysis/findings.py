"""One form for what the lab's analyses find: a value with its interval, beside its null and its ceiling."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.analysis.base import Table
from switch_sae.results.kind import Kind
from switch_sae.results.rows import ResultRow
from switch_sae.style import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = tuple[float, float]


def finding(
    row: ResultRow,
    part: str,
    measure: str,
    value: float | None,
    *,
    against: str = "",
    at: str | float = "",
    interval: Interval | None = None,
    null: float | None = None,
    null_interval: Interval | None = None,
    ceiling: float | None = None,
    n: int | None = None,
    note: str = "",
) -> dict[str, Any]:
    """A record of a table of an SAE's findings.

    `part` names the section of the analysis, `measure` the number, `against` another SAE or a control, `at` the place on a curve (a number of
    rows, an expert), `n` what the value is a mean over, `note` why a number is missing.
    """
    return {
        **{"sae": row.name, **row.kind._asdict(), "latents": row.num_latents, "k": row.k, "seed": row.seed},
        **{"part": part, "measure": measure, "against": against, "at": at, "value": value},
        **{name: None if interval is None else interval[place] for place, name in enumerate(("low", "high"))},
        "null": null,
        **{name: None if null_interval is None else null_interval[place] for place, name in enumerate(("null_low", "null_high"))},
        **{"ceiling": ceiling, "n": n, "note": note},
    }


def chosen(table: Table, **values: Any) -> Table:
    """Records that have these values: `chosen(table, part="margins", measure="flip_rate")`. A tuple takes any of its values."""
    return [
        record for record in table if all(record[key] in value if isinstance(value, tuple) else record[key] == value for key, value in values.items())
    ]


def compact(records: Table) -> Table:
    """Findings as a terminal shows them: an interval in one cell, and no column that is empty throughout."""

    def span(record: dict[str, Any], low: str, high: str) -> str:
        return "" if record[low] is None else f"[{record[low]:.3g}, {record[high]:.3g}]"

    shown = []
    for record in records:
        line = {name: record[name] for name in ("sae", "part", "measure", "against", "at", "value")}
        line |= {"interval": span(record, "low", "high"), "null": record["null"], "null interval": span(record, "null_low", "null_high")}
        shown.append(line | {name: record[name] for name in ("ceiling", "n", "note")})
    used = [name for name in (shown[0] if shown else ()) if any(line[name] not in (None, "") for line in shown)]
    return [{name: line[name] for name in used} for line in shown]


def dot(axis: "Axes", record: dict[str, Any], place: float, hollow: bool = False) -> None:
    """A value with its interval, its null (grey, with its interval) and its ceiling (a bracket) on a horizontal line at `place`."""
    if record["null"] is not None:
        low, high = (record[name] if record[name] is not None else record["null"] for name in ("null_low", "null_high"))
        axis.plot([low, high], [place, place], color="0.75", linewidth=4, solid_capstyle="butt", zorder=1)
        axis.plot(record["null"], place, "|", color="0.45", markersize=8, zorder=2)
    if record["ceiling"] is not None:
        axis.plot(record["ceiling"], place, marker="4", color="0.2", markersize=9, zorder=2)
    if record["value"] is None:
        return
    style = look(*Kind.of(record)).style() | {"linestyle": "none"} | ({"markerfacecolor": "white"} if hollow else {})
    if record["low"] is not None:
        axis.plot([record["low"], record["high"]], [place, place], color=style["color"], linewidth=1.2, zorder=3)
    axis.plot(record["value"], place, clip_on=False, zorder=4, **style)


def dots(axis: "Axes", records: Sequence[dict[str, Any]], labels: Sequence[str]) -> None:
    """One line per record (`dot`), from top to bottom."""
    for place, record in enumerate(records):
        dot(axis, record, place)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(axis="x", linewidth=0.4, color="0.88")

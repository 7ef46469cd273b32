"""The figure of `Matching`, and the means over seeds that it shows."""

from typing import TYPE_CHECKING, Any

from switch_sae.analysis.base import Table
from switch_sae.analysis.counterparts.pairing import SAME_START
from switch_sae.analysis.findings import chosen, dot
from switch_sae.analysis.observed import series_name
from switch_sae.results.kind import Kind
from switch_sae.results.rows import grouped
from switch_sae.style import DASHES, canvas, legends, look, mark, percent, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def means(table: Table) -> Table:
    """Records of the pairs of runs of the same two kinds as one: means of values, nulls and ceilings; intervals that hold those of all pairs, or all
    values where they have none; how many pairs in `note`. Names are those of kinds. Pairs with a `SAME_START` count where there are no others."""

    def key(record: dict[str, Any]) -> tuple[Any, ...]:
        return (series_name(record["sae"]), series_name(record["against"]), record["part"], record["measure"], record["at"])

    found = []
    for (sae, against, *_), records in grouped(table, key).items():
        known = [record for record in records if record["value"] is not None]
        known = [record for record in known if SAME_START not in record["note"]] or known
        merged = records[0] | {"sae": sae, "against": against, "seed": None}
        if known:
            merged |= {name: _mean([record[name] for record in known]) for name in ("value", "null", "ceiling")}
            merged |= {"n": round(_mean([record["n"] or 0 for record in known]) or 0), "note": "" if len(known) == 1 else f"mean of {len(known)}"}
            for low, high, middle in (("low", "high", "value"), ("null_low", "null_high", "null")):
                ends = [[record[end] if record[end] is not None else record[middle] for record in known] for end in (low, high)]
                spans = None not in ends[0] and (len(known) > 1 or known[0][low] is not None)
                merged |= {low: min(ends[0]) if spans else None, high: max(ends[1]) if spans else None}
        found.append(merged)
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@styled
def drawn(table: Table, near: float, alike: float) -> "Figure":
    """Above: every two kinds, each latent with a partner of its own and with its best. Below: the same by firing frequency for the widest dense kind,
    and subspaces of latents that do not recur."""
    rows = means(table)
    pairs = list(dict.fromkeys((record["sae"], record["against"]) for record in chosen(rows, part="one_to_one")))
    kinds = {record["sae"]: Kind.of(record) for record in rows}
    pairs.sort(key=lambda pair: (pair[0] == pair[1], kinds[pair[0]].order, kinds[pair[1]].order))
    figure = canvas(11.2, 4.4 + 0.34 * len(pairs))
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.1 + 0.34 * len(pairs), 2.6))
    upper, lower = parts
    measures = (
        ("cosine", "decoder", "mean cosine\nof pairs by decoder"),
        ("close", "decoder", f"share with cosine ≥ {near:g},\npairs by decoder"),
        ("correlation", "activations", "mean correlation on B,\npairs by activations on A"),
        ("alike", "activations", f"share with correlation ≥ {alike:g} on B,\npairs by activations on A"),
    )
    axes = list(upper.subplots(1, len(measures), sharey=True))
    for axis, (measure, by, label) in zip(axes, measures, strict=True):
        for part, shift, hollow in (("one_to_one", -0.16, False), ("many_to_one", 0.16, True)):
            for record in chosen(rows, part=part, measure=measure, at=by):
                dot(axis, record, pairs.index((record["sae"], record["against"])) + shift, hollow)
        axis.set_xlabel(label, fontsize=8)
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        axis.grid(axis="x", linewidth=0.4, color="0.88")
        if measure in ("close", "alike"):
            axis.xaxis.set_major_formatter(percent())
    axes[0].set_yticks(range(len(pairs)), [one if one == other else f"{one}\nin {other}" for one, other in pairs], fontsize=7)
    axes[0].set_ylim(len(pairs) - 0.5, -0.5)
    axes = list(lower.subplots(1, 3))
    asked = max((name for name, kind in kinds.items() if not kind.is_routed), key=lambda name: _latents(rows, name))
    shown = [pair for pair in pairs if pair[0] == asked]
    looks = _looks({pair[1]: kinds[pair[1]] for pair in shown}, asked)
    for axis, measure, label in (
        (axes[0], "close by decoder", f"share with cosine ≥ {near:g}"),
        (axes[1], "correlation by activations", "mean correlation on B"),
    ):
        for pair in shown:
            _curve(axis, chosen(rows, part="by_frequency", measure=measure, sae=asked, against=pair[1]), looks[pair[1]])
        axis.set_xlabel("share of rows on which the latent fires")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    for name in dict.fromkeys(record["sae"] for record in chosen(rows, part="subspace", measure="overlap")):
        _subspaces(axes[2], [record for record in chosen(rows, part="subspace", sae=name) if record["value"] is not None], kinds[name])
    axes[2].set_xlabel("dimensions r of the subspaces of latents")
    axes[2].set_ylabel("mean cos² of principal angles")
    handles = [
        mark("one to one", marker="o", color="0.2", linestyle="none"),
        mark("many to one", marker="o", color="0.2", markerfacecolor="white", linestyle="none"),
        mark("null", marker="|", color="0.45", linestyle="none", markersize=8),
        mark("ceiling: in other seeds of their own kind", marker="4", color="0.2", linestyle="none", markersize=9),
    ]
    handles += [mark(f"below: in {pair[1]}", **looks[pair[1]]) for pair in shown]
    names = {"none": "recur in no seed", "any": "as many of any"}
    handles += [mark(f"right: {names[key]}", color="0.2", linestyle=dash) for key, dash in (("none", "-"), ("any", ":"))]
    text = (
        "Names are kinds of SAEs, means over all pairs of different seeds; a kind alone is matched between its own seeds. Bars hold the 95 % "
        "intervals over documents B of all pairs, or the values of all pairs where a number has no such interval. Nulls: rotated dictionary "
        f"(decoder, subspaces), permuted documents (activations). Below: latents of {asked}, one to one; dashed grey: the null."
    )
    legends(figure, text, handles, columns=4)
    return figure


def _latents(rows: Table, name: str) -> int:
    return max(int(record["latents"]) for record in rows if record["sae"] == name)


def _looks(kinds: dict[str, Kind], asked: str) -> dict[str, dict[str, Any]]:
    """Of curves: seeds of the asked kind itself, the ceiling, are black and dashed; a colour that comes again has other dashes."""
    found: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        style = look(*kind).style()
        again = sum(other["color"] == style["color"] for other in found.values())
        found[name] = style | ({"linestyle": DASHES[1 + again % (len(DASHES) - 1)]} if again else {})
    return found | ({asked: {"color": "black", "marker": "4", "linestyle": "--"}} if asked in kinds else {})


def _curve(axis: "Axes", records: Table, style: dict[str, Any]) -> None:
    places = [place for place, record in enumerate(records) if record["value"] is not None]
    known = [records[place] for place in places]
    for place, record in zip(places, known, strict=True):
        if record["low"] is not None:
            axis.plot([place, place], [record["low"], record["high"]], color=style["color"], linewidth=0.9)
    axis.plot(places, [record["value"] for record in known], **style)
    nulls = [record["null"] for record in known]
    if None not in nulls:
        axis.plot(places, nulls, color="0.65", linestyle="--", linewidth=0.9)
    axis.set_xticks(range(len(records)), [str(record["at"]).replace(" to ", "-") for record in records])
    axis.grid(axis="y", linewidth=0.4, color="0.88")


def _subspaces(axis: "Axes", records: Table, kind: Kind) -> None:
    for measure, dash in (("overlap", "-"), ("overlap of any", ":")):
        known = chosen(records, measure=measure)
        ranks = [record["at"] for record in known]
        style = look(*kind).style() | {"linestyle": dash} | ({"marker": ""} if dash == ":" else {})
        axis.plot(ranks, [record["value"] for record in known], **style)
        for rank, record in zip(ranks, known, strict=True):
            if record["low"] is not None and dash == "-":
                axis.plot([rank, rank], [record["low"], record["high"]], color=style["color"], linewidth=0.9)
        axis.plot(ranks, [record["null"] for record in known], color="0.65", linestyle="--", linewidth=0.9)
        if known:
            axis.set_xscale("log", base=2)
            axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.set_ylim(0, 1)
    axis.grid(axis="y", linewidth=0.4, color="0.88")

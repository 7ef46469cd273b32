"""Sparsity against reconstruction: the frontier of Mudide et al. (arXiv 2410.08201, figures 3 and 4), at equal width and at equal FLOPs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.report.published import CITATION, TOKENS, WIDTH, PaperPoint, paper_points
from switch_sae.report.selection import Drawing, Material, NotEnough, flop_matched, has_paper_setting, kind_of, kind_order, seeds, width_matched
from switch_sae.report.style import STYLE, legends, log_ticks, look, power_of_two_ticks
from switch_sae.report.summary import Spread, Summary
from switch_sae.report.tables import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE = "topk"


def frontier(material: Material) -> Drawing:
    """FVU, delta CE where it was measured, and FVU relative to dense TopK, by L0: one row of panels at equal width, one at equal FLOPs.

    In the paper's setting the authors' points stand beside ours, hollow: in delta CE, and as ratios of their squared errors, which are not
    normalised. Raises NotEnough when the SAEs match neither in width nor in FLOPs.
    """
    panels: dict[str, tuple[list[Summary], list[PaperPoint]]] = {}
    notes, missing = material.left_out(), []
    for match, title in ((width_matched, "width-matched: {:,} latents in all"), (flop_matched, "FLOP-matched: {:,} latents per expert")):
        try:
            width, groups = match(material.standard())
            panels[title.format(width)] = groups, _theirs(match.__name__, width, groups)
        except NotEnough as error:
            missing.append(str(error))
    if not panels:
        raise NotEnough(" ".join(missing))
    drawing = _draw(panels, [*notes, *missing])
    drawing.notes.extend(_costs(drawing.table))
    return drawing


def relative(group: Summary, references: Sequence[Summary], metric: str = "fvu") -> Spread | None:
    """The metric divided by that of dense TopK with the same k, seed by seed where seeds match, else by the mean.

    A group without k is divided by TopK's value at its own L0, on straight lines between log L0 and log value; None outside their range.
    """
    values = [(row, row.value(metric)) for row in group.rows]
    if group.first.k is not None:
        reference = next((other for other in references if other.first.k == group.first.k), None)
        if reference is None or reference.mean(metric) is None:
            return None
        by_seed = {row.seed: row.value(metric) for row in reference.rows}
        paired = [value / other for row, value in values if value is not None and (other := by_seed.get(row.seed))]
        ratios = paired or [value / reference.spreads[metric].mean for _, value in values if value is not None]
    else:
        line = [(l0, value) for other in references if (l0 := other.mean("l0")) and (value := other.mean(metric))]
        ratios = [value / at for row, value in values if value and (at := interpolate(line, row.value("l0")))]
    return Spread.of(ratios) if ratios else None


def interpolate(line: Sequence[tuple[float, float]], x: float | None) -> float | None:
    """On straight lines in log-log through (x, y) points; None outside of them."""
    line = sorted(line)
    if x is None or not line or not line[0][0] <= x <= line[-1][0]:
        return None
    for (x0, y0), (x1, y1) in zip(line, [*line[1:], line[-1]], strict=True):
        if x0 <= x <= x1:
            share = 0.0 if x0 == x1 else math.log(x / x0) / math.log(x1 / x0)
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return None


def _draw(panels: dict[str, tuple[list[Summary], list[PaperPoint]]], notes: list[str]) -> Drawing:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    table = [record for title, (groups, points) in panels.items() for record in _records(title, groups, points)]
    columns = {"fvu": "FVU", "delta_ce": "delta CE (nats)", "relative": "FVU / FVU of TopK"}
    shown = {name: label for name, label in columns.items() if any(record.get(name) is not None for record in table)}
    has_paper = any(record["source"] == "paper" for record in table)
    with matplotlib.rc_context(STYLE | {"lines.markersize": 3.8, "lines.linewidth": 1.2}):
        figure = Figure(figsize=(2.45 * len(shown), 2.3 * len(panels) + 0.75), layout="constrained")
        grid = figure.subplots(len(panels), len(shown), squeeze=False)
        for title, axes in zip(panels, grid, strict=True):
            records = [record for record in table if record["panel"] == title]
            for axis, (name, label) in zip(axes, shown.items(), strict=True):
                _panel(axis, records, name)
                axis.set_ylabel(label)
                axis.set_xlabel("L0")
            axes[0].set_title(title, loc="left")
        mine, theirs_too = (
            {(r["architecture"], r["experts"], r["experts_per_token"]) for r in table if r["source"] == who} for who in ("ours", "paper")
        )
        handles = [
            Line2D([], [], label=look(*kind).label, **(look(*kind).style() if kind in mine else look(*kind).style(hollow=True) | {"linestyle": ":"}))
            for kind in sorted(mine | theirs_too, key=kind_order)
        ]
        if has_paper:
            handles.append(Line2D([], [], color="0.5", marker="o", markerfacecolor="white", linestyle=":", label=f"hollow: {CITATION}"))
        marks = f"Mean over {seeds([g for groups, _ in panels.values() for g in groups])}; bars: ± 1 standard deviation."
        at = " Ratio to TopK at equal k" + (
            ", where there is no k at equal L0 (interpolated)." if any(g.first.k is None for gs, _ in panels.values() for g in gs) else "."
        )
        trained = sorted({g.mean("tokens") or 0 for groups, _ in panels.values() for g in groups})
        theirs = (
            f" Hollow: {short(TOKENS)} training tokens (ours {' to '.join(short(n) for n in dict.fromkeys((trained[0], trained[-1])))}), one seed, "
            "one evaluation batch each; their ratios are of MSE, which is not normalised."
            if has_paper
            else ""
        )
        relative_to = {title: [record for record in table if record["panel"] == title and record.get("relative")] for title in panels}
        above = sum(record["relative"] > _top(records) for records in relative_to.values() for record in records)
        beyond = f" {above} points lie above the ratio's axes." if above else ""
        legends(figure, marks + at + theirs + beyond, handles, columns=6)
    return Drawing(figure, table, notes)


def _panel(axis: "Axes", records: Sequence[dict[str, Any]], name: str) -> None:
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["l0"]):
        if record.get(name) is not None:
            lines.setdefault((record["source"], record["architecture"], record["experts"], record["experts_per_token"]), []).append(record)
    values = []
    for (source, *kind), points in lines.items():
        x, y = [point["l0"] for point in points], [point[name] for point in points]
        values += y
        style = look(*kind).style(hollow=source == "paper")
        if source == "paper":
            style |= {"linestyle": ":" if points[0]["k"] else "none", "linewidth": 0.8, "markersize": 3.6, "alpha": 0.8}
            axis.plot(x, y, zorder=2, **style)
        else:
            axis.errorbar(x, y, [point[f"{name}_sd"] or 0.0 for point in points], capsize=2, elinewidth=0.9, zorder=3, **style)
    if name == "relative":
        axis.axhline(1, color="0.6", linewidth=0.8, zorder=1)
        axis.grid(axis="y", linewidth=0.4, color="0.88")
        axis.set_ylim(top=min(axis.get_ylim()[1], _top(records)))
    else:
        log_ticks(axis.yaxis, values)
    if records:
        power_of_two_ticks(axis.xaxis, [record["l0"] for record in records])


def _top(records: Sequence[dict[str, Any]]) -> float:
    """Of the ratio's axis: one badly chosen sparsity coefficient must not press all the rest into a line."""
    return max([2.2, *(1.1 * record["relative"] for record in records if record["k"] and record.get("relative"))])


def _costs(table: Sequence[dict[str, Any]]) -> list[str]:
    """How much more than dense TopK's the FLOPs of "FLOP-matched" Switch SAEs are: the router's come on top."""
    mine = [r for r in table if r["panel"].startswith("FLOP-matched") and r["source"] == "ours" and r["k"]]
    dense = {r["k"]: r["flops_per_token"] for r in mine if r["architecture"] == REFERENCE}
    words: dict[str, float] = {}
    for record in mine:
        if record["architecture"] == "switch" and dense.get(record["k"]):
            label = look("switch", record["experts"], record["experts_per_token"]).label
            words[label] = max(words.get(label, -1.0), record["flops_per_token"] / dense[record["k"]] - 1)
    told = ", ".join(f"{label} {share:+.1%}" for label, share in words.items())
    return [f"FLOPs per token of training against TopK at equal k, router included, at most: {told}"] if told else []


def _theirs(match: str, width: int, groups: Sequence[Summary]) -> list[PaperPoint]:
    if width != WIDTH or not any(has_paper_setting(group.first) for group in groups):
        return []
    dense = [point for point in paper_points("width_matched") if point.num_experts == 1]
    return [*dense, *(point for point in paper_points(match) if point.num_experts > 1)]


def _records(title: str, groups: Sequence[Summary], points: Sequence[PaperPoint]) -> list[dict[str, Any]]:
    references = [group for group in groups if group.first.architecture == REFERENCE]
    records = []
    for group in groups:
        l0 = group.mean("l0")
        if not l0:
            continue
        architecture, experts, per_token = kind_of(group)
        record = {"panel": title, "source": "ours", "architecture": architecture, "latents": group.first.num_latents, "experts": experts}
        record |= {"experts_per_token": per_token, "k": group.first.k, "l0": l0, "seeds": len(group.rows)}
        record |= {"flops_per_token": group.mean("flops_total")}
        for name, spread in (
            ("fvu", group.spreads.get("fvu")), ("delta_ce", group.spreads.get("delta_ce")), ("relative", relative(group, references)),
        ):  # fmt: skip
            record |= {name: None if spread is None else spread.mean, f"{name}_sd": None if spread is None else spread.sd}
        records.append(record)
    line = [(point.l0, point.mse) for point in points if point.architecture == REFERENCE]
    for point in points:
        base = interpolate(line, point.l0)
        records.append(
            {
                "panel": title, "source": "paper", "architecture": point.architecture, "latents": point.num_latents, "experts": point.num_experts,
                "experts_per_token": 1, "k": point.k, "l0": point.l0, "seeds": 1, "delta_ce": point.delta_ce, "mse": point.mse,
                "relative": None if base is None else point.mse / base,
            }
        )  # fmt: skip
    return records

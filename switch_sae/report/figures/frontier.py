"""Sparsity against reconstruction: the frontier of Mudide et al. (arXiv 2410.08201, figures 3 and 4), at equal width and at equal FLOPs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.report.tables import short
from switch_sae.results.kind import Kind
from switch_sae.results.published import CITATION, TOKENS, WIDTH, PaperPoint, paper_points
from switch_sae.results.rows import grouped
from switch_sae.results.selection import Material, has_paper_setting, matched_panels, mean_over_seeds, outliers, references
from switch_sae.results.settings import HEADLINE
from switch_sae.results.summary import Spread, Summary
from switch_sae.style import HOLLOW, Drawing, canvas, curve, handle, legends, log_ticks, look, mark, power_of_two_ticks, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"width_matched": "width-matched: {:,} latents in all", "flop_matched": "FLOP-matched: {:,} latents per expert"}
COLUMNS = {HEADLINE: "FVU", "delta_ce": "delta CE (nats)", "relative": "FVU / FVU of TopK"}
SMALL = {"markersize": 3.8, "linewidth": 1.2}


@styled
def draw(material: Material) -> Drawing:
    """FVU, delta CE where it was measured, and FVU relative to dense TopK, by L0: one row of panels at equal width, one at equal FLOPs.

    In the paper's setting the authors' points stand beside ours, hollow: in delta CE, and as ratios of their squared errors, which are not
    normalised. Raises NotEnough when the SAEs match neither in width nor in FLOPs.
    """
    panels, missing = matched_panels(material.standard())
    table: list[dict[str, Any]] = []
    titles = {}
    for match, (width, groups) in panels.items():
        titles[match] = TITLES[match].format(width)
        table += _records(titles[match], groups, _theirs(match, width, groups))
    groups = [group for _, chosen in panels.values() for group in chosen]
    costs = _costs([r for r in table if r["panel"] == titles.get("flop_matched")])
    return Drawing(_figure(list(titles.values()), table, groups), table, [*missing, *costs])


def relative(group: Summary, references: Sequence[Summary], metric: str = HEADLINE) -> Spread | None:
    """The metric divided by that of dense TopK with the same k, seed by seed where seeds match, else by the mean.

    A group without k is divided by TopK's value at its own L0, on straight lines between log L0 and log value; None outside their range.
    """
    values = [(row, value) for row in group.rows if (value := row.value(metric)) is not None]
    if group.first.k is not None:
        reference = next((other for other in references if other.first.k == group.first.k), None)
        mean = None if reference is None else reference.mean(metric)
        if reference is None or mean is None:
            return None
        by_seed = {row.seed: row.value(metric) for row in reference.rows}
        ratios = [value / other for row, value in values if (other := by_seed.get(row.seed))] or [value / mean for _, value in values]
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


def _figure(titles: Sequence[str], table: Sequence[dict[str, Any]], groups: Sequence[Summary]) -> "Figure":
    shown = {name: label for name, label in COLUMNS.items() if any(record.get(name) is not None for record in table)}
    figure = canvas(2.45 * len(shown), 2.3 * len(titles) + 0.75)
    above = 0
    for title, axes in zip(titles, figure.subplots(len(titles), len(shown), squeeze=False), strict=True):
        records = [record for record in table if record["panel"] == title]
        for axis, (name, label) in zip(axes, shown.items(), strict=True):
            _panel(axis, records, name)
            axis.set_ylabel(label + ", log scale" * (axis.get_yscale() == "log"))
            axis.set_xlabel("L0, log scale")
        axes[0].set_title(title, loc="left")
        above += sum((record.get("relative") or 0) > _top(records) for record in records)
    mine, theirs_too = ({Kind.of(record) for record in table if record["source"] == who} for who in ("ours", "paper"))
    handles = [handle(kind, **SMALL, **({} if kind in mine else HOLLOW)) for kind in sorted(mine | theirs_too, key=lambda kind: kind.order)]
    words = [
        mean_over_seeds(groups),
        "Ratio to TopK at equal k" + (", where there is no k at equal L0 (interpolated)." if any(g.first.k is None for g in groups) else "."),
    ]
    words += filter(None, [outliers(groups)])
    if theirs_too:
        handles.append(mark(f"hollow: {CITATION}", color="0.5", marker="o", **HOLLOW))
        trained = sorted({group.mean("tokens") or 0 for group in groups})
        ours = " to ".join(short(n) for n in dict.fromkeys((trained[0], trained[-1])))
        words.append(
            f"Hollow: {short(TOKENS)} training tokens (ours {ours}), one seed, one evaluation batch each; "
            "their ratios are of MSE, which is not normalised."
        )
    legends(figure, " ".join([*words, *([f"{above} points lie above the ratio's axes."] if above else [])]), handles, columns=6)
    return figure


def _panel(axis: "Axes", records: Sequence[dict[str, Any]], name: str) -> None:
    drawn = sorted((record for record in records if record.get(name) is not None), key=lambda record: record["l0"])
    for (source, kind), points in grouped(drawn, lambda record: (record["source"], Kind.of(record))).items():
        x, y = [point["l0"] for point in points], [point[name] for point in points]
        if source == "paper":
            curve(axis, kind, x, y, None, **({} if points[0]["k"] else {"linestyle": "none"}))
        else:
            curve(axis, kind, x, y, [point[f"{name}_sd"] for point in points], **SMALL)
    if name == "relative":
        axis.axhline(1, color="0.6", linewidth=0.8, zorder=1)
        axis.grid(axis="y", linewidth=0.4, color="0.88")
        axis.set_ylim(top=min(axis.get_ylim()[1], _top(records)))
    else:
        log_ticks(axis.yaxis, [record[name] for record in drawn])
    if drawn:
        power_of_two_ticks(axis.xaxis, [record["l0"] for record in drawn])


def _top(records: Sequence[dict[str, Any]]) -> float:
    """Of the ratio's axis: one badly chosen sparsity coefficient must not press all the rest into a line."""
    return max([2.2, *(1.1 * record["relative"] for record in records if record["k"] and record.get("relative"))])


def _costs(records: Sequence[dict[str, Any]]) -> list[str]:
    """How much more than dense TopK's the FLOPs of "FLOP-matched" SAEs with experts are: the router's come on top."""
    mine = [(Kind.of(record), record) for record in records if record["source"] == "ours" and record["k"]]
    dense = {record["k"]: record["flops_per_token"] for kind, record in mine if kind.is_reference}
    words: dict[str, float] = {}
    for kind, record in mine:
        if kind.is_routed and dense.get(record["k"]):
            label = look(*kind).label
            words[label] = max(words.get(label, -1.0), record["flops_per_token"] / dense[record["k"]] - 1)
    told = ", ".join(f"{label} {share:+.1%}" for label, share in words.items())
    return [f"FLOPs per token of training against TopK at equal k, router included, at most: {told}"] if told else []


def _theirs(match: str, width: int, groups: Sequence[Summary]) -> list[PaperPoint]:
    if width != WIDTH or not any(has_paper_setting(group.first) for group in groups):
        return []
    dense = [point for point in paper_points("width_matched") if point.num_experts == 1]
    return [*dense, *(point for point in paper_points(match) if point.num_experts > 1)]


def _records(title: str, groups: Sequence[Summary], points: Sequence[PaperPoint]) -> list[dict[str, Any]]:
    records = []
    for group in groups:
        l0 = group.mean("l0")
        if not l0:
            continue
        architecture, experts, per_token = group.first.kind
        record = {"panel": title, "source": "ours", "architecture": architecture, "latents": group.first.num_latents, "experts": experts}
        record |= {"experts_per_token": per_token, "k": group.first.k, "l0": l0, "seeds": len(group.rows)}
        record |= {"flops_per_token": group.mean("flops_total")}
        spreads = {name: group.spreads.get(name) for name in (HEADLINE, "delta_ce")} | {"relative": relative(group, references(groups))}
        for name, spread in spreads.items():
            record |= {name: spread and spread.mean, f"{name}_sd": spread and spread.sd}
        records.append(record)
    line = [(point.l0, point.mse) for point in points if Kind(point.architecture).is_reference]
    for point in points:
        base = interpolate(line, point.l0)
        sizes = {"latents": point.num_latents, "experts": point.num_experts, "experts_per_token": 1, "k": point.k, "l0": point.l0, "seeds": 1}
        record = {"panel": title, "source": "paper", "architecture": point.architecture, **sizes, "delta_ce": point.delta_ce, "mse": point.mse}
        records.append(record | {"relative": None if base is None else point.mse / base})
    return records

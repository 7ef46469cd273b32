"""Ablations of the Switch SAE: the load-balance coefficient and what multiplies the routed expert's latents."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.results.kind import Kind
from switch_sae.results.published import CITATION, WIDTH, PaperPoint, paper_points
from switch_sae.results.rows import ResultRow, grouped, hashable
from switch_sae.results.selection import Material, NotEnough, has_paper_setting, mean_over_seeds, outliers
from switch_sae.results.settings import HEADLINE
from switch_sae.results.summary import Summary
from switch_sae.style import HOLLOW, Drawing, canvas, curve, handle, legends, log_ticks, look, mark, percent, styled

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BALANCE, GATE, TRAINED = "sae.router.load_balance", "sae.router.gate", "sae.router.train"
GATES = {"probability": "", "hard": "////"}
"""The gates that are compared, with their hatches; the first is what others are relative to."""
LEAST_VALUES = 3
PANELS = {HEADLINE: "FVU", "load_cv": "load CV", "load_max": "largest load / fair share", "dead_latents": "share of dead latents"}


@styled
def draw(material: Material) -> Drawing:
    """FVU, balance and dead latents by load-balance coefficient alpha, and FVU by gate; each line or pair of bars differs in that setting alone.

    In the paper's setting the authors' sweeps stand beside ours, relative to their best. Raises NotEnough without 3 values of alpha and without
    both gates.
    """
    sweeps = {key: line for key, line in _families(material.groups, BALANCE).items() if len(line) >= LEAST_VALUES}
    gates = {key: pair for key, pair in _families(material.groups, GATE).items() if {group.first.config[GATE] for group in pair} >= GATES.keys()}
    if not sweeps and not gates:
        raise NotEnough(f"no Switch SAEs differ only in {BALANCE} ({LEAST_VALUES} values or more) or only in {GATE}. Sweep one of them.")
    in_paper = any(has_paper_setting(group.first) and group.first.num_latents == WIDTH for group in material.groups)
    table = [record for line in sweeps.values() for record in _balance_records(line, in_paper)]
    for group in (group for pair in gates.values() for group in pair):
        table.append(_named("gate", group) | {"gate": group.first.config[GATE], HEADLINE: group.mean(HEADLINE), f"{HEADLINE}_sd": group.sd(HEADLINE)})
    if in_paper:
        table += _their_records(bool(sweeps), bool(gates))
    missing = [] if sweeps else [f"no {LEAST_VALUES} values of {BALANCE}: its panels are left out"]
    missing += [] if gates else [f"no SAEs differ only in {GATE}: its panel is left out"]
    groups = [group for family in (*sweeps.values(), *gates.values()) for group in family]
    return Drawing(_figure(table, groups), table, missing)


def _families(groups: Sequence[Summary], setting: str) -> dict[str, list[Summary]]:
    """Switch SAEs of the same sizes and settings but this one, ascending in it.

    Frozen routers are controls of another kind, but for a hard gate without load balance: nothing could train its router.
    """

    def is_member(row: ResultRow) -> bool:
        untrainable = setting == GATE and row.config.get(GATE) == "hard" and row.config.get(BALANCE) == 0
        return setting in row.config and row.num_experts > 1 and (untrainable or row.config.get(TRAINED, True))

    def others(group: Summary) -> str:
        row = group.first
        same = {key: value for key, value in row.settings.items() if key not in (setting, TRAINED)}
        return str(hashable([row.architecture, row.num_latents, row.num_experts, row.k, same]))

    families = grouped((group for group in groups if is_member(group.first)), others)
    return {key: sorted(family, key=lambda group: group.first.config[setting]) for key, family in families.items()}


def _named(experiment: str, group: Summary) -> dict[str, Any]:
    row = group.first
    return {"experiment": experiment, "source": "ours", **row.kind._asdict(), "latents": row.num_latents, "k": row.k, "seeds": len(group.rows)}


def _balance_records(line: Sequence[Summary], in_paper: bool) -> list[dict[str, Any]]:
    best = min((value for group in line if (value := group.mean(HEADLINE)) is not None), default=None)
    records = []
    for group in line:
        alpha = group.first.config[BALANCE]
        if in_paper and group.first.config.get("normalize_activations"):
            alpha /= float(group.first.load().activation_scale) ** 2  # on activations as they come, as in the paper
        record = _named("load_balance", group) | {"alpha": alpha}
        for metric in PANELS:
            record |= {metric: group.mean(metric), f"{metric}_sd": group.sd(metric)}
        if best and group.mean(HEADLINE) is not None:
            record |= {"above_best": group.spreads[HEADLINE].mean / best - 1, "above_best_sd": group.sd(HEADLINE) / best}
        records.append(record)
    return records


def _their_records(with_balance: bool, with_gate: bool) -> list[dict[str, Any]]:
    balance, gate = paper_points("load_balance") if with_balance else [], paper_points("gate") if with_gate else []
    best = {experts: min(p.mse for p in balance if p.num_experts == experts) for experts in {p.num_experts for p in balance}}
    records = [
        {"experiment": "load_balance", "alpha": p.load_balance, "mse": p.mse, "above_best": p.mse / best[p.num_experts] - 1} | _sizes(p)
        for p in balance
    ]
    return records + [{"experiment": "gate", "gate": p.gate, "mse": p.mse} | _sizes(p) for p in gate]


def _sizes(point: PaperPoint) -> dict[str, Any]:
    kind = Kind(point.architecture, point.num_experts)
    return {"source": "paper", **kind._asdict(), "latents": point.num_latents, "k": point.k, "seeds": 1}


def _figure(table: Sequence[dict[str, Any]], groups: Sequence[Summary]) -> "Figure":
    from matplotlib.patches import Patch

    balance, gate = ([record for record in table if record["experiment"] == name] for name in ("load_balance", "gate"))
    has_paper = any(record["source"] == "paper" for record in table)
    names = ["above_best"] * bool(has_paper and balance) + [metric for metric in PANELS if any(record.get(metric) is not None for record in balance)]
    panels = [*names, *(["gate"] if gate else []), *(["their gate"] if has_paper and gate else [])]
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    figure = canvas(7.2 if columns > 1 else 4.2, 2.4 * rows + 0.8)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, name in zip(axes, panels, strict=False):
        if name in names:
            _balance_panel(axis, balance, name)
        else:
            source, value = ("ours", HEADLINE) if name == "gate" else ("paper", "mse")
            _gate_panel(axis, [record for record in gate if record["source"] == source], value)
    handles: list[Artist] = [handle(kind, markersize=3.8) for kind in sorted({Kind.of(record) for record in balance})]
    if has_paper:
        handles.append(mark(f"hollow: {CITATION}", color="0.5", marker="o", **HOLLOW))
    if gate:
        handles += [
            Patch(facecolor="white" if hatch else "0.75", edgecolor="0.2", hatch=hatch, label=f"gate: {name}") for name, hatch in GATES.items()
        ]
    words = [mean_over_seeds(groups), *filter(None, [outliers(groups)])]
    if gate:
        words.append("Numbers over bars: FVU of the hard gate relative to the probability.")
    if any(record["alpha"] == 0 for record in balance):
        words.append("alpha = 0 stands apart, at the left end of the axis.")
    if has_paper:
        words.append("alpha in the units of activations as they come. Theirs: one seed, one batch; gates without load balance.")
    free = axes[len(panels) :]
    for axis in free:
        axis.set_axis_off()
    if free:
        free[0].legend(handles=handles, loc="center")
    legends(figure, " ".join(words), [] if free else handles, columns=5)
    return figure


def _balance_panel(axis: "Axes", records: Sequence[dict[str, Any]], name: str) -> None:
    positive = [record["alpha"] for record in records if record["alpha"] > 0]
    zero = min(positive, default=1.0) / 10
    drawn = [record for record in records if record.get(name) is not None]
    for (source, _, kind), points in grouped(drawn, lambda record: (record["source"], record["k"], Kind.of(record))).items():
        for apart in (False, True):  # alpha = 0 has no place on a log axis, so no line leads there
            some = [point for point in points if (point["alpha"] == 0) is apart]
            x, y = [point["alpha"] or zero for point in some], [point[name] for point in some]
            bars = None if source == "paper" else [point[f"{name}_sd"] for point in some]
            more = ({} if source == "paper" else {"markersize": 3.8}) | ({"linestyle": "none"} if apart else {})
            if some:
                curve(axis, kind, x, y, bars, **more)
    axis.set_xscale("log")
    if len(positive) < len(records) and positive:
        powers = range(math.ceil(math.log10(min(positive)) - 0.01), math.floor(math.log10(max(positive)) + 0.01) + 1)
        decades = [10.0**power for power in powers][:: -(-len(powers) // 5)]
        axis.set_xticks([zero, *decades], ["0", *(f"{tick:g}" for tick in decades)])
        axis.minorticks_off()
    axis.set_xlabel("load-balance alpha, log scale")
    axis.set_ylabel(PANELS.get(name, "error above the best alpha"))
    if name in ("above_best", "dead_latents"):
        axis.yaxis.set_major_formatter(percent())
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]) if name == "above_best" else 0)
    elif name == HEADLINE:
        log_ticks(axis.yaxis, [record[name] for record in drawn])
        axis.set_ylabel("FVU" + ", log scale" * (axis.get_yscale() == "log"))
    else:
        axis.set_ylim(bottom=0 if name == "load_cv" else None)


def _gate_panel(axis: "Axes", records: Sequence[dict[str, Any]], value: str) -> None:
    def sizes(record: dict[str, Any]) -> tuple[int, int, int]:
        return record["latents"], record["experts"], record["k"]

    pairs = [{record["gate"]: record for record in pair} for pair in grouped(sorted(records, key=sizes), sizes).values()]
    pairs = [pair for pair in pairs if pair.keys() >= GATES.keys()]
    is_theirs = value == "mse"
    for place, pair in enumerate(pairs):
        tallest = 0.0
        for shift, (name, hatch) in zip((-0.2, 0.2), GATES.items(), strict=True):
            height, sd, colour = pair[name][value], pair[name].get(f"{value}_sd") or 0.0, look(*Kind.of(pair[name])).colour
            axis.bar(
                place + shift, height, 0.36, color="white" if is_theirs or hatch else colour, edgecolor="0.5" if is_theirs else colour, hatch=hatch,
                yerr=sd if sd else None, capsize=2, error_kw={"linewidth": 0.9}, linestyle=":" if is_theirs else "-",
            )  # fmt: skip
            tallest = max(tallest, height + sd)
        change = pair["hard"][value] / pair["probability"][value] - 1
        axis.annotate(f"{change:+.1%}", (place, tallest), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    firsts = [pair["hard"] for pair in pairs]
    ks = {record["k"] for record in firsts}
    axis.set_xticks(range(len(pairs)), [f"E = {r['experts']}" if len(ks) == 1 else f"E={r['experts']}\nk={r['k']}" for r in firsts], fontsize=7.5)
    axis.set_ylabel("their MSE" if is_theirs else "FVU" + (f", k = {min(ks)}" if len(ks) == 1 else ""))
    axis.margins(y=0.15)
    axis.set_xlim(-0.75 if len(pairs) > 1 else -0.8, len(pairs) - 0.25 if len(pairs) > 1 else 0.8)

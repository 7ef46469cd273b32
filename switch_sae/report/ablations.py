"""Ablations of the Switch SAE: the load-balance coefficient and what multiplies the routed expert's latents."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from switch_sae.report.published import CITATION, WIDTH, paper_points
from switch_sae.report.results import hashable
from switch_sae.report.selection import Drawing, Material, NotEnough, has_paper_setting, kind_of, seeds
from switch_sae.report.style import STYLE, legends, log_ticks, look
from switch_sae.report.summary import Summary
from switch_sae.runs import load_sae

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BALANCE, GATE = "sae.load_balance", "sae.gate"
LEAST_VALUES = 3
PANELS = {"fvu": "FVU", "load_cv": "load CV", "load_max": "largest load / fair share", "dead_latents": "share of dead latents"}


def ablations(material: Material) -> Drawing:
    """FVU, balance and dead latents by load-balance coefficient alpha, and FVU by gate; each line or pair of bars differs in that setting alone.

    In the paper's setting the authors' sweeps stand beside ours, relative to their best. Raises NotEnough without 3 values of alpha and without
    both gates.
    """
    sweeps = {key: line for key, line in _families(material.groups, BALANCE).items() if len(line) >= LEAST_VALUES}
    gates = {key: pair for key, pair in _families(material.groups, GATE).items() if len(pair) == 2}
    if not sweeps and not gates:
        raise NotEnough(f"no Switch SAEs differ only in {BALANCE} ({LEAST_VALUES} values or more) or only in {GATE}. Sweep one of them.")
    in_paper = any(has_paper_setting(group.first) and group.first.num_latents == WIDTH for group in material.groups)
    table = [record for line in sweeps.values() for record in _balance_records(line, in_paper)]
    table += [record for pair in gates.values() for record in _gate_records(pair)]
    if in_paper:
        table += _their_records(bool(sweeps), bool(gates))
    missing = [] if sweeps else [f"no {LEAST_VALUES} values of {BALANCE}: its panels are left out"]
    missing += [] if gates else [f"no SAEs differ only in {GATE}: its panel is left out"]
    columns = dict.fromkeys(key for record in table for key in record)
    groups = [group for family in (*sweeps.values(), *gates.values()) for group in family]
    return Drawing(_draw(table, groups), [{key: record.get(key) for key in columns} for record in table], missing)


def _families(groups: Sequence[Summary], setting: str) -> dict[str, list[Summary]]:
    """Switch SAEs of the same sizes and settings but this one, ascending in it.

    Frozen routers are controls of another kind, but for a hard gate without load balance: nothing could train its router.
    """
    families: dict[str, list[Summary]] = {}
    for group in groups:
        row = group.first
        untrainable = setting == GATE and row.config.get(GATE) == "hard" and row.config.get(BALANCE) == 0
        if setting in row.config and row.num_experts > 1 and (untrainable or row.config.get("sae.train_router", True)):
            same = {key: value for key, value in row.settings.items() if key not in (setting, "sae.train_router")}
            families.setdefault(hashable([row.num_latents, row.num_experts, row.k, same]), []).append(group)
    return {key: sorted(family, key=lambda group: group.first.config[setting]) for key, family in families.items()}


def _named(experiment: str, group: Summary) -> dict[str, Any]:
    architecture, experts, per_token = kind_of(group)
    sizes = {"architecture": architecture, "experts": experts, "experts_per_token": per_token, "latents": group.first.num_latents, "k": group.first.k}
    return {"experiment": experiment, "source": "ours", **sizes, "seeds": len(group.rows)}


def _balance_records(line: Sequence[Summary], in_paper: bool) -> list[dict[str, Any]]:
    best = min((value for group in line if (value := group.mean("fvu")) is not None), default=None)
    records = []
    for group in line:
        alpha = group.first.config[BALANCE]
        if in_paper and group.first.config.get("normalize_activations") and group.first.folder is not None:
            alpha /= float(load_sae(group.first.folder).get_buffer("activation_scale")) ** 2  # on activations as they come, as in the paper
        record = _named("load_balance", group) | {"alpha": alpha}
        for metric in PANELS:
            record |= {metric: group.mean(metric), f"{metric}_sd": group.sd(metric)}
        if best and group.mean("fvu") is not None:
            record |= {"above_best": group.spreads["fvu"].mean / best - 1, "above_best_sd": group.sd("fvu") / best}
        records.append(record)
    return records


def _gate_records(pair: Sequence[Summary]) -> list[dict[str, Any]]:
    return [_named("gate", group) | {"gate": group.first.config[GATE], "fvu": group.mean("fvu"), "fvu_sd": group.sd("fvu")} for group in pair]


def _their_records(with_balance: bool, with_gate: bool) -> list[dict[str, Any]]:
    balance, gate = paper_points("load_balance") if with_balance else [], paper_points("gate") if with_gate else []
    best = {experts: min(p.mse for p in balance if p.num_experts == experts) for experts in {p.num_experts for p in balance}}
    shared = {"source": "paper", "architecture": "switch", "experts_per_token": 1, "seeds": 1}
    return [
        *(
            {"experiment": "load_balance", **shared, "experts": p.num_experts, "latents": p.num_latents, "k": p.k, "alpha": p.load_balance}
            | {"mse": p.mse, "above_best": p.mse / best[p.num_experts] - 1}
            for p in balance
        ),
        *({"experiment": "gate", **shared, "experts": p.num_experts, "latents": p.num_latents, "k": p.k, "gate": p.gate, "mse": p.mse} for p in gate),
    ]


def _draw(table: Sequence[dict[str, Any]], groups: Sequence[Summary]) -> Any:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    balance, gate = ([record for record in table if record["experiment"] == name] for name in ("load_balance", "gate"))
    names = [metric for metric in PANELS if any(record.get(metric) is not None for record in balance)]
    has_paper = any(record["source"] == "paper" for record in table)
    names = (["above_best"] if has_paper and balance else []) + names
    panels = [*names, *(["gate"] if gate else []), *(["their gate"] if has_paper and gate else [])]
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE | {"lines.markersize": 3.8}):
        figure = Figure(figsize=(7.2 if columns > 1 else 4.2, 2.4 * rows + 0.8), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, name in zip(axes, panels, strict=False):
            if name in ("gate", "their gate"):
                _gate_panel(
                    axis, [record for record in gate if (record["source"] == "paper") == (name != "gate")], "mse" if name != "gate" else "fvu"
                )
            else:
                _balance_panel(axis, balance, name)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        kinds = sorted({(r["architecture"], r["experts"], r["experts_per_token"]) for r in balance})
        handles: list[Any] = [Line2D([], [], label=look(*kind).label, **look(*kind).style()) for kind in kinds]
        if has_paper:
            handles.append(Line2D([], [], color="0.5", marker="o", markerfacecolor="white", linestyle=":", label=f"hollow: {CITATION}"))
        if gate:
            handles += [
                Patch(facecolor="0.75", edgecolor="0.2", label="gate: probability"),
                Patch(facecolor="white", edgecolor="0.2", hatch="////", label="gate: hard"),
            ]
        text = f"Mean over {seeds(groups)}; bars: ± 1 standard deviation. Numbers over bars: FVU of the hard gate relative to the probability."
        alpha = " alpha = 0 is drawn at the left end of the axis." if any(record["alpha"] == 0 for record in balance) else ""
        theirs = " alpha in the units of activations as they come. Theirs: one seed, one batch; gates without load balance." if has_paper else ""
        legends(figure, (text if gate else text.split(" Numbers")[0]) + alpha + theirs, handles, columns=5)
    return figure


def _balance_panel(axis: "Axes", records: Sequence[dict[str, Any]], name: str) -> None:
    positive = [record["alpha"] for record in records if record["alpha"] > 0]
    zero = min(positive, default=1.0) / 10
    values = []
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        if record.get(name) is not None:
            lines.setdefault((record["source"], record["k"], record["architecture"], record["experts"], record["experts_per_token"]), []).append(
                record
            )
    for (source, _, *kind), points in lines.items():
        x, y = [point["alpha"] or zero for point in points], [point[name] for point in points]
        values += y
        style = look(*kind).style(hollow=source == "paper")
        if source == "paper":
            axis.plot(x, y, **(style | {"linestyle": ":", "linewidth": 0.8, "markersize": 3.6, "alpha": 0.8}))
        else:
            axis.errorbar(x, y, [point[f"{name}_sd"] or 0.0 for point in points], capsize=2, elinewidth=0.9, **style)
    axis.set_xscale("log")
    if len(positive) < len(records) and positive:
        powers = range(math.ceil(math.log10(min(positive)) - 0.01), math.floor(math.log10(max(positive)) + 0.01) + 1)
        decades = [10.0**power for power in powers][:: -(-len(powers) // 5)]
        axis.set_xticks([zero, *decades], ["0", *(f"{tick:g}" for tick in decades)])
        axis.minorticks_off()
    axis.set_xlabel("load-balance alpha")
    axis.set_ylabel({"above_best": "error above the best alpha"}.get(name, "") or PANELS[name])
    if name in ("above_best", "dead_latents"):
        from matplotlib.ticker import PercentFormatter

        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]) if name == "above_best" else 0)
    elif name == "fvu":
        log_ticks(axis.yaxis, values)
    else:
        axis.set_ylim(bottom=0 if name == "load_cv" else None)


def _gate_panel(axis: "Axes", records: Sequence[dict[str, Any]], value: str) -> None:
    pairs: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (r["latents"], r["experts"], r["k"])):
        pairs.setdefault((record["latents"], record["experts"], record["k"]), {})[record["gate"]] = record
    pairs = {key: pair for key, pair in pairs.items() if {"probability", "hard"} <= pair.keys()}
    is_theirs = value == "mse"
    for place, (key, pair) in enumerate(pairs.items()):
        style = look("switch", key[1])
        for shift, name in ((-0.2, "probability"), (0.2, "hard")):
            height, sd = pair[name][value], pair[name].get(f"{value}_sd") or 0.0
            face = "white" if is_theirs or name == "hard" else style.colour
            axis.bar(
                place + shift, height, 0.36, color=face, edgecolor="0.5" if is_theirs else style.colour, hatch="////" if name == "hard" else "",
                yerr=sd if sd else None, capsize=2, error_kw={"linewidth": 0.9}, linestyle=":" if is_theirs else "-",
            )  # fmt: skip
        tallest = max(pair[name][value] + (pair[name].get(f"{value}_sd") or 0.0) for name in pair)
        change = pair["hard"][value] / pair["probability"][value] - 1
        axis.annotate(f"{change:+.1%}", (place, tallest), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    same_k = len({key[2] for key in pairs}) == 1
    axis.set_xticks(range(len(pairs)), [f"E = {e}" if same_k else f"E={e}\nk={k}" for _, e, k in pairs], fontsize=7.5)
    axis.set_ylabel("their MSE" if is_theirs else "FVU" + (f", k = {next(iter(pairs))[2]}" if same_k and pairs else ""))
    axis.margins(y=0.15)
    axis.set_xlim(-0.75 if len(pairs) > 1 else -1.2, len(pairs) - 0.25 if len(pairs) > 1 else 1.2)

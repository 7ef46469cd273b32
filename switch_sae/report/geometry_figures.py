"""Where decoders store a direction twice: duplicates by experts and k, and similarity between experts."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from switch_sae.analysis.geometry import decoder_geometry
from switch_sae.report.results import ResultRow, csv_bytes
from switch_sae.report.selection import Drawing, Material, NotEnough, common_k, kind_of, width_matched
from switch_sae.report.style import STYLE, legends, look, percent, power_of_two_ticks
from switch_sae.report.summary import Spread
from switch_sae.runs import MODEL_FILE, load_sae, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DUPLICATE = 0.9
"""The paper's threshold on the cosine."""
MEASURES = {
    "duplicates": f"share of live latents with a neighbour\nof cosine > {DUPLICATE}",
    "nearest_cosine": "mean cosine of live latents\nto the nearest neighbour",
}
CACHE = "geometry.csv"


def duplication(material: Material) -> Drawing:
    """Share of live latents whose nearest other decoder row has cosine > 0.9, and the mean of that cosine, by experts and k, at equal width.

    Heat maps, or lines over experts where there is one k. Raises NotEnough as `width_matched` does, and where the weights are not there.
    """
    width, groups = width_matched([group for group in material.standard() if group.first.k is not None])
    groups = [group for group in groups if group.first.architecture in ("topk", "switch") and kind_of(group)[2] == 1]
    table = []
    for group in sorted(groups, key=lambda group: (group.first.num_experts, group.first.k)):
        measured = [_nearest(row, material.cache) for row in group.rows if _has_weights(row)]
        if not measured:
            continue
        record: dict[str, Any] = {"latents": width, "experts": group.first.num_experts, "k": group.first.k, "seeds": len(measured)}
        for measure in MEASURES:
            known = [one[measure] for one in measured if math.isfinite(one[measure])]
            spread = Spread.of(known) if known else Spread(math.nan, None, 0)
            record |= {measure: spread.mean, f"{measure}_sd": spread.sd}
        table.append(record)
    if len({record["experts"] for record in table}) < 2:
        raise NotEnough(f"fewer than two numbers of experts at {width:,} latents have their {MODEL_FILE}.")
    return Drawing(_duplication_figure(width, table), table, material.left_out())


def expert_similarity(material: Material) -> Drawing:
    """[a, b]: mean over expert a's live decoder rows of the highest cosine to expert b's, beside a dense SAE cut into as many arbitrary blocks.

    Of one pair with equal width, k and seed: the number of experts nearest to the paper's 16. Raises NotEnough where there is no such pair.
    """
    switch, dense = _pair(material)
    experts = switch.num_experts
    matrices = {}
    for name, row in ((look("switch", experts).label, switch), (f"dense TopK in {experts} arbitrary blocks", dense)):
        assert row.folder is not None
        sae = load_sae(row.folder)
        matrices[name] = decoder_geometry(sae.decoder_weight(), experts, torch.tensor(row.firing_counts())).similarity_EE()
    table = [
        {"sae": name, "latents": switch.num_latents, "k": switch.k, "seed": switch.seed, "rows_of": a, "nearest_in": b, "cosine": float(matrix[a, b])}
        for name, matrix in matrices.items()
        for a in range(experts)
        for b in range(experts)
    ]
    return Drawing(_similarity_figure(switch, matrices), table)


def _pair(material: Material) -> tuple[ResultRow, ResultRow]:
    standard = [group for group in material.standard() if group.first.k is not None]
    dense = {
        (row.num_latents, row.k, row.seed): row for group in standard if group.first.architecture == "topk" for row in group.rows if _has_weights(row)
    }
    switches = [
        row
        for group in standard
        if group.first.architecture == "switch" and kind_of(group)[2] == 1
        for row in group.rows
        if row.num_experts > 1 and _has_weights(row) and (row.num_latents, row.k, row.seed) in dense
    ]
    if not switches:
        raise NotEnough("no Switch SAE has a dense TopK SAE of the same num_latents, k and seed beside it.")
    k = common_k([group for group in standard if any(row in switches for row in group.rows)])
    best = min(switches, key=lambda row: (row.k != k, abs(math.log2(row.num_experts / 16)), -row.num_latents, row.seed))
    return best, dense[best.num_latents, best.k, best.seed]


def _has_weights(row: ResultRow) -> bool:
    return row.folder is not None and (row.folder / MODEL_FILE).is_file()


def _nearest(row: ResultRow, cache: Path | None) -> dict[str, float]:
    """Both measures of one SAE, from `geometry.csv` in the folder `cache` where its weights have not changed since: M^2 D work otherwise."""
    assert row.folder is not None
    key = {"model": str((row.folder / MODEL_FILE).resolve()), "modified": str((row.folder / MODEL_FILE).stat().st_mtime_ns)}
    known: list[dict[str, Any]] = []
    if cache is not None and (cache / CACHE).is_file():
        with (cache / CACHE).open(newline="") as file:
            known = list(csv.DictReader(file))
    found = next((one for one in known if {name: one[name] for name in key} == key), None)
    if found is None:
        geometry = decoder_geometry(load_sae(row.folder).decoder_weight(), row.num_experts, torch.tensor(row.firing_counts()))
        shares = geometry.duplicate_shares(DUPLICATE) if bool(geometry.alive_M.any()) else {"any": math.nan}
        found = {**key, "duplicates": shares["any"], "nearest_cosine": float(geometry.nearest_M.double().nanmean())}
        if cache is not None:
            write_atomically(cache / CACHE, csv_bytes([one for one in known if one["model"] != key["model"]] + [found]))
    return {measure: float(found[measure]) for measure in MEASURES}


def _duplication_figure(width: int, table: Sequence[dict[str, Any]]) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    experts, ks = sorted({record["experts"] for record in table}), sorted({record["k"] for record in table})
    counts = sorted({record["seeds"] for record in table})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    with matplotlib.rc_context(STYLE):
        size = (6.4, 2.9) if len(ks) == 1 else (min(10.0, 2 * (1.6 + 0.5 * len(ks))), 1.55 + 0.42 * len(experts))
        figure = Figure(figsize=(max(6.4, size[0]), max(2.9, size[1])), layout="constrained")
        for axis, (measure, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
            if len(ks) == 1:
                _duplication_lines(axis, table, measure)
                axis.set_ylabel(label, fontsize=8.5)
                if measure == "duplicates":
                    axis.yaxis.set_major_formatter(percent())
            else:
                _heat_map(axis, table, measure, experts, ks)
                axis.set_title(label, fontsize=8.5)
        what = "bars: ± 1 standard deviation" if len(ks) == 1 else "a small number below: how many, where not all"
        k = f", k = {ks[0]}" if len(ks) == 1 else ""
        text = f"{width:,} latents in all{k}; 1 expert is dense TopK. Mean over {many} seed{'s' * (counts[-1] != 1)} ({what})."
        legends(figure, text if len(ks) == 1 or len(counts) > 1 else text.split(" (")[0] + ".")
    return figure


def _heat_map(axis: "Axes", table: Sequence[dict[str, Any]], measure: str, experts: Sequence[int], ks: Sequence[int]) -> None:
    import numpy as np

    cells = np.full((len(experts), len(ks)), np.nan)
    for record in table:
        cells[experts.index(record["experts"]), ks.index(record["k"])] = record[measure]
    most = max(record["seeds"] for record in table)
    top = float(np.nanmax(cells)) or 1.0
    low = 0.0 if measure == "duplicates" else float(np.nanmin(cells))
    axis.imshow(cells, cmap="cividis", vmin=low, vmax=max(top, low + 1e-9), aspect="auto")
    for record in table:
        value, place = record[measure], (ks.index(record["k"]), experts.index(record["experts"]))
        if not math.isfinite(value):
            continue
        text = f"{100 * value:.1f}%" if measure == "duplicates" else f"{value:.2f}"
        text += f"\nn = {record['seeds']}" if record["seeds"] != most else ""
        axis.text(*place, text, ha="center", va="center", fontsize=7, color="black" if (value - low) > 0.55 * (top - low) else "white")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xticks(range(len(ks)), [str(k) for k in ks])
    axis.set_yticks(range(len(experts)), [str(e) for e in experts])
    axis.set_xlabel("k")
    axis.set_ylabel("experts")


def _duplication_lines(axis: "Axes", table: Sequence[dict[str, Any]], measure: str) -> None:
    axis.plot([record["experts"] for record in table], [record[measure] for record in table], color="0.6", linewidth=1, zorder=1)
    for record in table:
        style = look("topk" if record["experts"] == 1 else "switch", record["experts"]).style()
        axis.errorbar(record["experts"], record[measure], record[f"{measure}_sd"] or 0.0, capsize=2, elinewidth=0.9, clip_on=False, zorder=3, **style)
    power_of_two_ticks(axis.xaxis, [record["experts"] for record in table])
    axis.set_xlabel("experts")
    axis.grid(axis="y", linewidth=0.4, color="0.88")
    axis.set_ylim(bottom=0 if measure == "duplicates" else None)


def _similarity_figure(switch: ResultRow, matrices: dict[str, Any]) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    experts = switch.num_experts
    values = torch.stack(list(matrices.values()))
    values = values[values.isfinite()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 3.5), layout="constrained")
        axes = list(figure.subplots(1, 2, sharey=True))
        for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
            image = axis.imshow(matrix.numpy(), cmap="cividis", vmin=float(values.min()), vmax=float(values.max()))
            off = matrix[~torch.eye(experts, dtype=torch.bool)]
            axis.set_title(f"{name}\noff the diagonal {float(off.nanmean()):.3f}, on it {float(matrix.diagonal().nanmean()):.3f}", fontsize=8.5)
            axis.set_xlabel("nearest row in expert")
            axis.spines[:].set_visible(False)
            if experts <= 16:
                axis.set_xticks(range(experts), [str(e) if experts <= 8 or e % 2 == 0 else "" for e in range(experts)])
                axis.set_yticks(range(experts), [str(e) if experts <= 8 or e % 2 == 0 else "" for e in range(experts)])
                axis.tick_params(length=0)
        axes[0].set_ylabel("rows of expert")
        figure.colorbar(image, ax=axes, label="mean highest cosine", shrink=0.85)
        legends(
            figure,
            f"{switch.num_latents:,} latents in all, k = {switch.k}, seed {switch.seed}; live latents. On the diagonal: to the nearest other row of the same expert.",
        )
    return figure

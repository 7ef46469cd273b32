"""Figures draw the numbers of the runs, put the authors' beside them only where they compare, and say what is missing."""

import csv
import math
import sys
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from test_results import FakeSweep, default_run, frozen, switch, topk

from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.models import ROUTERS, SwitchSAE, TopKSAE
from switch_sae.models.routers import Gate
from switch_sae.report import FIGURES, draw_figures
from switch_sae.report.figures.frontier import interpolate, relative
from switch_sae.report.figures.training_curves import smooth
from switch_sae.results import collect
from switch_sae.results.published import paper_points
from switch_sae.results.selection import Material, NotEnough, flop_matched, width_matched
from switch_sae.runs import load_sae
from switch_sae.style import canvas, exponent_ticks, log_ticks, look, member, power_of_two_ticks, render


@pytest.fixture
def sweep(tmp_path):
    return FakeSweep(tmp_path / "sweep")


def material(sweep):
    return Material.of(collect([sweep.path]))


def drawn(name, sweep):
    return FIGURES[name](material(sweep))


def line_of(axis, colour):
    """The (x, y) of the only line with this colour and a marker."""
    (line,) = [line for line in axis.lines if line.get_color() == colour and line.get_marker() not in ("None", "", "_") and len(line.get_xdata())]
    return list(line.get_xdata()), list(line.get_ydata())


def frontier_sweep(sweep):
    for k, dense, routed, wide in ((2, 0.5, 0.6, 0.4), (4, 0.3, 0.45, 0.24)):
        for seed in (0, 1):
            sweep.add(topk(32, k), seed, fvu=dense + 0.02 * seed, delta_ce=dense)
            sweep.add(switch(4, 32, k), seed, fvu=routed + 0.02 * seed, delta_ce=routed)
            sweep.add(switch(2, 64, k), seed, fvu=wide, delta_ce=wide)


def test_the_frontier_draws_means_and_ratios_at_equal_k(sweep):
    frontier_sweep(sweep)
    sweep.add(switch(4, 32, 4, load_balance=1.0), 0, fvu=0.9)
    drawing = drawn("frontier", sweep)
    axes = drawing.figure.axes
    assert [axis.get_ylabel() for axis in axes] == ["FVU, log scale", "delta CE (nats), log scale", "FVU / FVU of TopK"] * 2
    assert [axes[0].get_title("left"), axes[3].get_title("left")] == ["width-matched: 32 latents in all", "FLOP-matched: 32 latents per expert"]
    assert line_of(axes[0], look("switch", 4).colour) == ([2, 4], pytest.approx([0.61, 0.46]))
    assert line_of(axes[0], look("topk").colour) == ([2, 4], pytest.approx([0.51, 0.31]))
    by_seed = [(0.6 / 0.5 + 0.62 / 0.52) / 2, (0.45 / 0.3 + 0.47 / 0.32) / 2]
    assert line_of(axes[2], look("switch", 4).colour)[1] == pytest.approx(by_seed)
    assert line_of(axes[3], look("switch", 2).colour) == ([2, 4], pytest.approx([0.4, 0.24]))
    more = SwitchSAE(switch(2, 64, 2), 8).flops().total / TopKSAE(topk(32, 2), 8).flops().total - 1
    assert material(sweep).left_out() == [
        "left out of all figures but ablations, sae.router.load_balance=1.0 (usual: 0.1): switch of 4 x 8 latents, k=4"
    ]
    assert drawing.notes == [f"FLOPs per token of training against TopK at equal k, router included, at most: Switch 2 {more:+.1%}"]
    assert all(record["source"] == "ours" for record in drawing.table) and len(drawing.table) == 8
    assert "Mean over 2 seeds; bars: ± 1 standard deviation" in drawing.figure._supxlabel.get_text()


def test_without_k_the_ratio_is_taken_at_equal_l0(sweep):
    frontier_sweep(sweep)
    run = sweep.add(topk(32, 3), 0, fvu=0.8, l0=math.sqrt(8))
    saved = run.read_json("results.json")
    saved["members"]["topk"] |= {"architecture": "relu", "k": None}
    run.write_json("results.json", saved)
    groups = {(group.first.architecture, group.first.k): group for group in material(sweep).groups}
    dense = [groups["topk", 2], groups["topk", 4]]
    assert relative(groups["relu", None], dense).mean == pytest.approx(0.8 / math.sqrt(0.51 * 0.31))
    assert relative(groups["topk", 4], dense).mean == 1 and relative(groups["relu", None], dense[:1]) is None
    assert interpolate([(1, 1), (4, 16)], 2) == pytest.approx(4) and interpolate([(1, 1), (4, 16)], 5) is None


def test_flop_matching_also_takes_experts_that_leave_room_for_the_router(sweep):
    sweep.add(topk(32 + 3 * 4), fvu=0.5)
    sweep.add(switch(4, 4 * 32), fvu=0.4)
    groups = material(sweep).groups
    assert flop_matched(groups)[0] == 44 and len(flop_matched(groups)[1]) == 2
    with pytest.raises(NotEnough, match="same number of latents"):
        width_matched(groups)


def test_curves_are_smoothed_means_by_tokens_and_flops(sweep):
    for sae in (topk(), switch(4)):
        for seed in (0, 1):
            sweep.add(sae, seed, fvu=0.5, steps=[(step, 1 / step + 0.1 * seed) for step in (1, 2, 3, 4)])
    drawing = drawn("curves", sweep)
    left, right = drawing.figure.axes
    expected = [1 / step + 0.05 for step in (1, 2, 3, 4)]  # 5 % of four steps is none
    flops = collect([sweep.path])[0].flops_total
    assert line_of(left, look("switch", 4).colour) == ([100, 200, 300, 400], pytest.approx(expected))
    assert line_of(right, look("switch", 4).colour)[0] == [tokens * flops for tokens in (100, 200, 300, 400)]
    assert any("TopK's final FVU is reached by Switch 4 after 100% of the tokens" in note for note in drawing.notes)
    assert smooth([1.0, 2.0, 6.0, 4.0, 5.0], 3) == pytest.approx([1, 3, 4, 5, 5]) and smooth([1.0, 2.0], 1) == [1, 2]


def test_scaling_fits_the_exponent_of_the_means(sweep):
    for latents in (16, 32, 64):
        for seed in (0, 1):
            sweep.add(topk(latents), seed, fvu=2 * latents**-0.5 * (1.1 if seed else 1 / 1.1))
    sweep.add(switch(4, 64), fvu=0.3)
    drawing = drawn("scaling", sweep)
    fit = next(record for record in drawing.table if record.get("fit") == "FVU by latents")
    mean_factor = (1.1 + 1 / 1.1) / 2  # of arithmetic means over seeds
    assert (fit["exponent"], fit["coefficient"]) == pytest.approx((0.5, 2 * mean_factor)) and fit["widths"] == 3
    assert "TopK: 0.500 [0.500, 0.500]" in drawing.figure.axes[0].get_title("left")
    assert len([record for record in drawing.table if record.get("fit") is None]) == 6


def test_ablations_draw_each_setting_alone(sweep):
    for value, fvu in ((0.0, 0.6), (0.1, 0.4), (10.0, 0.5)):
        for seed in (0, 1):
            sweep.add(switch(4, load_balance=value), seed, fvu=fvu, load_cv=1 - fvu, load_max=2.0)
    sweep.add(switch(4, gate=Gate.hard), fvu=0.48)
    drawing = drawn("ablations", sweep)
    labels = ["FVU, log scale", "load CV", "largest load / fair share", "share of dead latents", "FVU, k = 4"]
    axes = {axis.get_ylabel(): axis for axis in drawing.figure.axes if axis.axison}
    assert list(axes) == labels
    apart, joined = [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes["FVU, log scale"].lines
        if line.get_marker() not in ("None", "", "_") and len(line.get_xdata())
    ][::-1]
    assert (apart, joined) == (([pytest.approx(0.01)], [0.6]), (pytest.approx([0.1, 10]), [0.4, 0.5]))  # no line to alpha = 0
    assert axes["FVU, log scale"].get_xticklabels()[0].get_text() == "0"
    assert [bar.get_height() for bar in axes["FVU, k = 4"].patches] == [0.4, 0.48]
    assert [text.get_text() for text in axes["FVU, k = 4"].texts] == ["+20.0%"]


def geometry_sweep(sweep):
    for sae in (topk(k=2), topk(k=4), switch(4, k=2), switch(4, k=4)):
        for seed in (0, 1):
            sweep.add(sae, seed, fvu=0.5, weights=True)


def test_duplication_is_measured_once_and_averaged(sweep, monkeypatch):
    geometry_sweep(sweep)
    drawing = drawn("duplication", sweep)
    expected = {}
    for row in collect([sweep.path]):
        nearest = decoder_geometry(load_sae(row.path).decoder_weight(), row.num_experts).nearest_M
        expected.setdefault((row.num_experts, row.k), []).append(float(nearest.double().mean()))
    for record in drawing.table:
        cosines = expected[record["experts"], record["k"]]
        assert (record["seeds"], record["nearest_cosine"]) == (2, pytest.approx(sum(cosines) / 2))
    cells = drawing.figure.axes[1]
    assert cells.images[0].get_array().shape == (2, 2)
    assert cells.texts[0].get_text() == f"{drawing.table[0]['nearest_cosine']:.2f}"
    monkeypatch.setattr("switch_sae.analysis.duplication.decoder_geometry", None)  # the second time comes from the run folders
    assert drawn("duplication", sweep).table == drawing.table


def test_one_k_gives_lines_over_experts(sweep):
    for sae in (topk(), switch(2), switch(4)):
        sweep.add(sae, fvu=0.5, weights=True)
    drawing = drawn("duplication", sweep)
    assert [record["experts"] for record in drawing.table] == [1, 2, 4] and not list(drawing.figure.axes[0].images)


def test_expert_similarity_stands_beside_a_dense_sae_cut_into_blocks(sweep):
    geometry_sweep(sweep)
    drawing = drawn("expert_similarity", sweep)
    rows = {row.architecture: row for row in collect([sweep.path]) if (row.k, row.seed) == (4, 0)}
    for axis, name in zip(drawing.figure.axes, ("switch", "topk"), strict=False):
        matrix = decoder_geometry(load_sae(rows[name].path).decoder_weight(), 4).similarity_EE()
        assert torch.equal(torch.tensor(axis.images[0].get_array().tolist(), dtype=torch.float64), matrix)
    assert len(drawing.table) == 2 * 16


def test_projection_names_the_share_of_neighbours_of_the_same_expert(sweep):
    pytest.importorskip("sklearn")
    sweep.add(switch(4, 64), fvu=0.5, weights=True)
    drawing = drawn("projection", sweep)
    share = decoder_geometry(load_sae(collect([sweep.path])[0].path).decoder_weight(), 4).same_expert_share()
    assert f"decoder rows: {share:.1%} have" in drawing.figure.axes[1].get_title() and "1/E = 25.0%" in drawing.figure.axes[1].get_title()
    assert len(drawing.table) == 2 * 64 and {record["expert"] for record in drawing.table} == {0, 1, 2, 3}


def test_projection_without_scikit_learn_says_what_to_type(sweep, monkeypatch):
    sweep.add(switch(4, 64), fvu=0.5, weights=True)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        drawn("projection", sweep)


def test_the_authors_points_are_their_logs():
    at = {(p.series, p.architecture, p.num_experts, p.k): p for p in paper_points() if p.series in ("width_matched", "flop_matched") and p.k}
    assert at["width_matched", "topk", 1, 64].mse == pytest.approx(888.5, abs=0.05) and at["width_matched", "topk", 1, 64].delta_ce == 0.0763
    assert at["width_matched", "switch", 128, 192].mse == pytest.approx(1016.0, abs=0.05)
    assert at["flop_matched", "switch", 8, 32].mse == pytest.approx(904.1, abs=0.05) and at["flop_matched", "switch", 8, 32].num_latents == 196_608
    alpha = {point.load_balance: point.mse for point in paper_points("load_balance") if point.num_experts == 16}
    assert (alpha[0], alpha[3]) == pytest.approx((1136.9, 1039.0), abs=0.05) and len(alpha) == 12
    assert {point.l0 == point.k for point in paper_points() if point.k} == {True} and len(paper_points("gate")) == 8


@pytest.mark.parametrize(("source", "beside"), [({"model": "gpt2", "hook": "blocks.8.hook_resid_post"}, True), ({"model": "bundled"}, False)])
def test_the_authors_points_are_drawn_in_their_setting_only(tmp_path, source, beside):
    sweep = FakeSweep(tmp_path / "sweep", **source)
    for sae in (topk(24_576, 32), switch(16, 24_576, 32), switch(16, 24_576, 32, load_balance=1.0), switch(16, 24_576, 32, load_balance=3.0)):
        sweep.add(sae, fvu=0.5, delta_ce=0.2, normalize=False)
    records = [record for record in drawn("frontier", sweep).table if record["source"] == "paper"]
    assert bool(records) == beside
    alphas = [record for record in drawn("ablations", sweep).table if record["source"] == "paper"]
    assert len(alphas) == (24 if beside else 0)
    if beside:
        ratio = {(record["experts"], record["k"]): record["relative"] for record in records if record["k"]}
        assert ratio[16, 64] == pytest.approx(1027.2 / 888.5, rel=1e-3) and ratio[1, 64] == pytest.approx(1)
        best = {(record["experts"], record["alpha"]): record["above_best"] for record in alphas}
        assert best[16, 3] == 0 and best[16, 0] == pytest.approx(1136.9 / 1039.0 - 1, rel=1e-3)


def test_alpha_is_given_in_the_papers_units_beside_the_papers_sweep(tmp_path):
    sweep = FakeSweep(tmp_path / "sweep", model="gpt2", hook="blocks.8.hook_resid_post")
    for value in (0.25, 0.5, 1.0):
        sweep.add(switch(16, 24_576, 32, load_balance=value), fvu=0.5, weights=True, scale=0.5)
    ours = [record for record in drawn("ablations", sweep).table if record["source"] == "ours"]
    assert [record["alpha"] for record in ours] == [1.0, 2.0, 4.0]  # alpha = 3 of the paper is 3 * activation_scale^2 here


def test_one_call_draws_what_it_can_and_says_what_is_missing(sweep, tmp_path):
    frontier_sweep(sweep)
    sweep.add(topk(), 5)
    said = []
    names, missing = draw_figures([sweep.path], tmp_path / "out", say=said.append)
    assert names == ["frontier"] and set(missing) == set(FIGURES) - {"frontier"}
    text = "\n".join(said)
    assert "left out: 1 SAEs that are not finished" in text
    for line in (
        "curves: not drawn. no training step was logged (log_every=0).",
        "scaling: not drawn. no kind of SAE was trained at 3 or more widths",
        "ablations: not drawn. no Switch SAEs differ only in sae.router.load_balance",
        "duplication: not drawn. fewer than two numbers of experts at 32 latents have their model.safetensors.",
        "expert_similarity: not drawn. no Switch SAE has a dense TopK SAE",
        "projection: not drawn. there is no finished Switch SAE with its model.safetensors.",
        "frontier_compute: not drawn. neither stability (jaccard_3pct) nor meaning (judge_hard) of these SAEs was measured",
    ):
        assert line in text
    content = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert sorted(content) == ["frontier.csv", "frontier.pdf", "frontier.png"]
    assert content["frontier.png"].startswith(b"\x89PNG") and content["frontier.pdf"].startswith(b"%PDF")
    with (tmp_path / "out" / "frontier.csv").open(newline="") as file:
        numbers = [float(record["fvu_inliers"]) for record in csv.DictReader(file) if record["experts"] == "4"]
    assert numbers == pytest.approx([0.61, 0.46])
    draw_figures([sweep.path], tmp_path / "out", only=["frontier"], say=said.append)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == content
    with pytest.raises(ValueError, match=r"there is no figure frontyer\. Choose from frontier, curves"):
        draw_figures([sweep.path], tmp_path / "out", only=["frontyer"])


def test_sets_that_cannot_be_compared_are_not_mixed(sweep, tmp_path):
    frontier_sweep(sweep)
    sweep.add(switch(8, 32, 2), 0, fvu=0.1, evaluated="other rows")
    said = []
    chosen = Material.of(collect([sweep.path]), say=said.append)
    assert {group.first.num_experts for group in chosen.groups} == {1, 2, 4}
    assert said == ["left out: 1 SAEs scored on other activations (source) than the largest set of 12: 12-s0"]
    with pytest.raises(NotEnough, match="none of the 0 SAEs is finished"):
        Material.of([])


def test_a_single_l0_is_not_stretched_over_the_axis(sweep):
    for sae, l0 in ((topk(), 4.0), (switch(4), 3.99)):
        sweep.add(sae, fvu=0.5, l0=l0)
    low, high = drawn("frontier", sweep).figure.axes[0].get_xlim()
    assert high / low > 2


def test_kinds_of_sae_look_different_from_each_other():
    kinds = [("topk", 1), ("batch_topk", 1), ("relu", 1), ("gated", 1), ("jumprelu", 1), ("matryoshka", 1), *(("switch", 2**i) for i in range(1, 8))]
    looks = [look(*kind) for kind in kinds]
    assert len({one.marker for one in looks}) == len({one.colour for one in looks}) == len({one.label for one in looks}) == len(kinds)
    assert look("switch", 8, 2).label == "Switch 8, top 2" and look("switch", 8, 2).colour == look("switch", 8).colour


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "cosine_kmeans"])
def test_figures_of_a_default_run_show_the_trained_router_in_any_order_of_rows(sweep, router):
    main = replace(switch(4, 32), router=ROUTERS[router].Config())
    run = sweep.add(main, fvu=0.4, weights=True, steps=[(1, 0.6), (2, 0.5)])
    sweep.beside(run, "width_matched", topk(32), 0.5)
    if hasattr(main.router, "train"):
        sweep.beside(run, "frozen_router", frozen(main), 0.9)
    rows = collect([sweep.path])
    for order in permutations(rows):
        chosen = Material.of(order)
        table = FIGURES["frontier"](chosen).table
        assert {record["architecture"]: record["fvu_inliers"] for record in table} == {"switch": 0.4, "topk": 0.5}
        frozen_one = ["left out of all figures but ablations, sae.router.train=False (usual: True): frozen_router of 4 x 8 latents, k=4"]
        assert chosen.left_out() == (frozen_one if hasattr(main.router, "train") else [])


def test_routers_frozen_by_wish_are_an_ablation_and_no_baseline(sweep):
    default_run(sweep)
    for seed in (1, 2):
        sweep.add(frozen(switch(4)), seed, fvu=0.7)
    chosen = material(sweep)
    assert {group.name for group in chosen.standard()} == {"switch", "flop_matched"}  # of two frozen and one trained main SAE: what most are
    sweep.add(switch(4), 3, fvu=0.4)
    assert [group.mean("fvu_inliers") for group in material(sweep).standard() if group.name == "switch"] == [0.4]


def test_rows_of_huge_norm_are_told_in_every_figures_footnote(sweep):
    for sae in (topk(), switch(4)):
        run = sweep.add(sae, fvu=0.5, fvu_inliers=0.6, delta_ce=0.1)
        saved = run.read_json("results.json")
        (entry,) = saved["members"].values()
        entry["outlier_rows"] = 2
        run.write_json("results.json", saved)
    drawing = drawn("frontier", sweep)
    assert [record["fvu_inliers"] for record in drawing.table] == [0.6, 0.6]
    assert "FVU without 2 of 500 rows (0.4 %) whose norm exceeds 10 medians." in " ".join(drawing.figure._supxlabel.get_text().split())


@pytest.mark.parametrize("low", [1e-6, 0.113, 0.99, 3.0])
@pytest.mark.parametrize("span", [1.0, 1.001, 1.3, 2.9, 4.0, 9.0, 40.0, 299.0, 1e4, 1e9])
def test_axes_always_have_labelled_ticks(low, span):
    for ticks in (log_ticks, exponent_ticks, power_of_two_ticks):
        figure = canvas(3, 2)
        axis = figure.subplots()
        axis.plot([low, low * span], [1, 2], "o")
        ticks(axis.xaxis, [low, low * span])
        render(figure)
        left, right = axis.get_xlim()
        shown = [label for place, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True) if left <= place <= right and label.get_text()]
        assert shown, ticks.__name__


def test_an_sae_of_a_run_has_one_look_whatever_stands_beside_it():
    names = ("switch", "topk", "relu", "flop_matched", "width_matched", "frozen_router", "parameter_matched", "pca_16", "untrained")
    assert len({(member(name)["color"], member(name)["marker"]) for name in names}) == len(names)
    assert member("pca_16") == member("pca_4") and member("mine") == member("mine")

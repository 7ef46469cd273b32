"""The frontier of inference: who stands against whom, at what price, in a figure, in Markdown and in tables; nothing is counted twice elsewhere."""

import csv
import math
import re
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from test_results import FakeSweep, switch, topk

from switch_sae.models import BatchTopKSAE
from switch_sae.models.kron import KronSAE
from switch_sae.report import FIGURES, draw_figures, headline_markdown, summary_table
from switch_sae.results import collect
from switch_sae.results.contenders import Contender, encode_shares, frontier, share_of
from switch_sae.results.leverage import DenseCurve
from switch_sae.results.selection import Material, NotEnough
from switch_sae.style import family_style, look

PRICES = {"jaccard_3pct": 0.95, "judge_hard": 0.8, "error_cv": 0.5}


def under(run, inference, times, **metrics):
    """The run's SAE once more: its encoder costs so many times as much, and these scores are others."""
    saved = run.read_json("results.json")
    (key, entry) = next(iter(saved["members"].items()))
    scores = {name: {"value": value, "low": None, "high": None} for name, value in metrics.items()}
    flops = entry["flops"] | {"encode": round(entry["flops"]["encode"] * times), "total": 0}
    about = {"role": "inference", "of": key, "inference": inference, "flops": flops}
    saved["members"][f"{key}+{inference}"] = entry | about | {"metrics": entry["metrics"] | scores}
    run.write_json("results.json", saved)


@pytest.fixture
def sweep(tmp_path):
    """TopK, BatchTopK and Switch with 2 and 4 experts, two seeds; TopK and Switch under refit too."""
    sweep = FakeSweep(tmp_path / "sweep")
    for seed in (0, 1):
        worse = 0.01 * seed
        run = sweep.add(topk(), seed, fvu=0.1 + worse, delta_ce=0.2, kl=0.3, **PRICES)
        under(run, "refit", 1.5, fvu_inliers=0.08 + worse, jaccard_3pct=0.94)
        sweep.add(BatchTopKSAE.Config(num_latents=32, k=4), seed, fvu=0.09 + worse, delta_ce=0.2, l0=4.5, **PRICES)
        for experts in (2, 4):
            run = sweep.add(switch(experts), seed, fvu=0.1 + 0.01 * experts, delta_ce=0.2, **PRICES)
            under(run, "refit", 1.5, fvu_inliers=0.09)
    return sweep


def rows_of(sweep):
    return collect([sweep.path], inferences=True)


def found_in(sweep):
    return frontier(Material.of(rows_of(sweep)))


def test_every_contender_stands_beside_dense_topk_seed_by_seed(sweep):
    found = found_in(sweep)
    names = [(each.contender.label, each.shape) for each in found.standings]
    assert names == [
        ("TopK", "32"), ("TopK + refit", "32"), ("BatchTopK", "32"), ("Switch", "2 x 16"), ("Switch", "4 x 8"),
        ("Switch + refit", "2 x 16"), ("Switch + refit", "4 x 8"),
    ]  # fmt: skip
    dense, refit, batch, two = found.standings[:4]
    assert (dense.compute, dense.training, refit.compute, refit.training) == (1, 1, 1.5, 1)
    rows = {row.sae: row for row in rows_of(sweep)}
    assert two.compute == two.group.first.flops_encode / rows["topk"].flops_encode < 1
    assert two.training == two.group.first.flops_total / rows["topk"].flops_total
    assert refit.compared("fvu_inliers") == pytest.approx({0: 0.8, 1: 0.09 / 0.11})
    assert refit.compared("jaccard_3pct") == pytest.approx({0: -0.01, 1: -0.01})
    assert batch.compared("kl") == {} and batch.record()["kl"] is None
    record = refit.record()
    assert (record["recipe"], record["seeds"], record["fvu_inliers"]) == ("TopK + refit", 2, pytest.approx(0.085))
    assert record["fvu_inliers_ratio_by_seed"] == "0.8000 0.8182" and record["jaccard_3pct_difference"] == pytest.approx(-0.01)
    assert found.notes == ["measured L0 differs by more than 2% from dense TopK's 4.00: BatchTopK 32 4.50"]


def test_the_figure_has_a_panel_for_each_measure_and_a_line_for_each_contender(sweep, tmp_path):
    drawing = FIGURES["frontier_compute"](Material.of(rows_of(sweep)))
    titles = [axis.get_title("left") for axis in drawing.figure.axes if axis.axison]
    assert titles == [
        "FVU, less is better", "delta CE (nats), less is better", "KL (nats), less is better", "Jaccard, 3 % noise, more is better",
        "judge, hard negatives, more is better",
    ]  # fmt: skip
    axis = drawing.figure.axes[0]
    lines = [line for line in axis.lines if len(line.get_xdata()) and line.get_marker() not in ("_", "|", "None")]
    assert len(lines) == 5
    colours = {to_hex(line.get_color()) for line in lines}
    assert colours == {look("topk").colour.lower(), look("batch_topk").colour.lower(), family_style("switch")["color"].lower()}
    routed = next(line for line in lines if to_hex(line.get_color()) == family_style("switch")["color"].lower())
    assert list(routed.get_ydata()) == pytest.approx([0.12, 0.14]) and routed.get_xdata()[0] > routed.get_xdata()[1]
    faces = {str(line.get_markerfacecolor()) for line in lines}
    assert "white" in faces
    legend = [text.get_text() for text in drawing.figure.axes[5].get_legend().get_texts()]
    assert legend == ["TopK", "TopK + refit", "BatchTopK", "Switch", "Switch + refit"]
    said: list[str] = []
    drawn, _ = draw_figures([sweep.path], tmp_path / "out", ["frontier_compute"], said.append)
    with (tmp_path / "out" / "frontier_compute.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert drawn == ["frontier_compute"] and len(records) == 7 and any("measured L0 differs" in line for line in said)


def test_what_is_missing_is_said(tmp_path):
    sweep = FakeSweep(tmp_path / "a")
    sweep.add(switch(4), fvu=0.2, **PRICES)
    with pytest.raises(NotEnough, match="no dense TopK SAE"):
        found_in(sweep)
    sweep.add(topk(64), fvu=0.1, **PRICES)
    with pytest.raises(
        NotEnough, match="nothing stands beside dense TopK of 64 latents with k = 4: no other SAE has that k within 10% of that width"
    ):
        found_in(sweep)
    other = FakeSweep(tmp_path / "b")
    for sae in (topk(), switch(4)):
        other.add(sae, fvu=0.2, delta_ce=0.1)
    with pytest.raises(NotEnough, match=r"neither stability \(jaccard_3pct\) nor meaning \(judge_hard\)"):
        found_in(other)


def test_of_several_ways_to_train_a_contender_the_usual_one_is_shown(sweep):
    sweep.add(switch(4, load_balance=1.0), 0, fvu=0.01, **PRICES)
    sweep.add(switch(4, latents=36), 0, fvu=0.01, **PRICES)  # another width
    found = found_in(sweep)
    assert [each.group.mean("fvu") for each in found.standings if each.contender == Contender("switch")] == pytest.approx([0.12, 0.14])
    told = "Switch of 4 experts was trained in 2 ways; shown: router.load_balance=0.1; left out: router.load_balance=1.0"
    assert told in found.notes


def test_contenders_are_told_apart_by_what_makes_them_cheap_or_dear(sweep):
    row = next(row for row in rows_of(sweep) if row.architecture == "switch" and row.of is None)

    def label(**settings):
        return Contender.of(replace(row, config=row.config | {f"sae.{key}": value for key, value in settings.items()})).label

    assert label() == label(shared=0, stop=False, inference=None) == "Switch"
    assert label(shared=8) == "Switch, shared" and label(stop=True, shared=8) == "Switch, stop rule, shared"
    assert label(inference="refit") == "Switch, trained with refit"
    assert Contender.of(replace(row, of="switch", role="inference", inference="pursuit")).label == "Switch + pursuit"
    assert label(**{"router.kind": "competition"}) == label(**{"router.kind": "competition", "router.rivals": 0.5}) == "Switch, router=competition"
    assert label(**{"router.kind": "sigmoid", "router.train": False}) == "Switch, router=sigmoid, router.train=False"
    assert label(experts_per_token=2, **{"router.gate": "hard"}) == "Switch, experts_per_token=2, router.gate=hard"
    assert label(load_balance=3.0, auxk=0.0, train_decoder=False) == "Switch, train_decoder=False"
    pca = replace(row, architecture="pca", config=row.config | {"sae.router.kind": "competition"})
    assert Contender.of(pca).label == "pca"
    styles = {tuple(family_style("switch", variant).items()) for variant in range(4)}
    assert len(styles) == 4 and family_style("switch", 40)["marker"]


def test_without_experts_each_cost_is_a_point(sweep):
    for halves, fvu in ((2, 0.12), (4, 0.15)):
        sweep.add(KronSAE.Config(num_latents=32, k=4, m=halves, n=halves), fvu=fvu, **PRICES)
    kron = [each for each in found_in(sweep).standings if each.contender.architecture == "kron"]
    assert [each.group.mean("fvu") for each in kron] == pytest.approx([0.12, 0.15]) and kron[0].compute > kron[1].compute


def test_shares_of_compute():
    assert [share_of(value) for value in (1.0, 1.04, 1.283, 0.5, 1 / 16.31)] == ["1", "1.04", "1.28", "1/2", "1/16.3"]


def test_shares_are_of_the_dense_sae_of_that_width(tmp_path):
    sweep = FakeSweep(tmp_path)
    for latents in (32, 64):
        sweep.add(topk(latents), fvu=0.1)
    share = encode_shares(collect([sweep.path]))
    flops = {row.num_latents: row.flops_encode for row in collect([sweep.path])}
    assert share(32, flops[32]) == share(64, flops[64]) == share(66, flops[64]) == "1"
    assert share(32, flops[32] / 8) == "1/8" and share(48, flops[32]) is None and share(32, None) is None


def test_markdown_has_the_measures_with_their_prices_and_every_seed(sweep):
    measures, legend, against, *notes = headline_markdown(rows_of(sweep)).split("\n\n")
    cells = [re.split(r" \| ", line.strip("| ")) for line in measures.splitlines()]
    assert cells[0][:6] == ["recipe", "latents", "compute", "training", "L0", "FVU"] and {len(line) for line in cells} == {11}
    lines = {(line[0], line[1]): line for line in cells[2:]}
    assert lines["TopK + refit", "32"][2:6] == ["1.5", "1", "4.00", "0.0850 ± 0.0071"]
    assert lines["BatchTopK", "32"][7] == "-" and lines["TopK", "32"][-1] == "25.0%"
    assert "n = 2" in legend and "dense TopK of 32 latents, k = 4" in legend
    (line,) = [line for line in against.splitlines() if line.startswith("| TopK + refit, 32")]
    assert line == "| TopK + refit, 32 | 0.800, 0.818 | 1.000, 1.000 | 1.000, 1.000 | -0.010, -0.010 | +0.000, +0.000 |"
    assert notes == ["Measured L0 differs by more than 2% from dense TopK's 4.00: BatchTopK 32 4.50."]


def test_leverage_is_the_dense_width_of_equal_error_per_dot_product(sweep, tmp_path):
    assert found_in(sweep).standings[0].leverage is None  # of one width
    for latents, fvu in ((8, 0.4), (16, 0.2), (16, 0.2)):
        sweep.add(topk(latents), len(sweep.members), fvu=fvu, **PRICES)
    found = found_in(sweep)
    assert found.standings[0].curve.points == ((8, 0.4), (16, pytest.approx(0.2)), (32, pytest.approx(0.105)))
    dense, refit, _, two = found.standings[:4]
    assert dense.leverage == pytest.approx(1) and not dense.dense_width.is_extrapolated
    slope = math.log(2) / math.log(0.2 / 0.105)
    assert two.dense_width == (pytest.approx(16 * (0.2 / 0.12) ** slope), False)
    assert two.leverage == pytest.approx(two.dense_width.width / (two.compute * 32))
    assert refit.dense_width == (pytest.approx(16 * (0.2 / 0.085) ** slope), True) and refit.dots == pytest.approx(1.5 * 32)
    assert refit.record()["dense_width"] > 32 and refit.record()["dense_width_extrapolated"] is True
    measures, legend, *_ = headline_markdown(rows_of(sweep)).split("\n\n")
    cells = {tuple(line[:2]): line for line in (re.split(r" \| ", text.strip("| ")) for text in measures.splitlines())}
    assert cells["recipe", "latents"][4] == "leverage" and cells["TopK", "32"][4] == "1.00" and cells["TopK + refit", "32"][4].endswith(" *")
    assert "through 8, 16, 32" in legend
    figure = FIGURES["frontier_compute"](Material.of(rows_of(sweep))).figure
    (dotted,) = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert list(dotted.get_xdata()) == [0.25, 0.5, 1] and list(dotted.get_ydata()) == pytest.approx([0.4, 0.2, 0.105])
    assert not [line for line in figure.axes[1].lines if line.get_linestyle() == ":"]


def test_a_dense_curve_gives_no_width_where_wider_was_not_better():
    curve = DenseCurve(((8, 0.4), (16, 0.2), (32, 0.25)))
    assert curve.at(0.3).is_extrapolated is False and curve.at(0.1) is None
    assert curve.at(0.8) == (pytest.approx(4), True) and curve.at(0.2) == (pytest.approx(16), False)


def test_tables_show_prices_and_leave_out_what_has_no_room(sweep):
    text = summary_table(rows_of(sweep))
    header = text.splitlines()[0].split()
    for name in ("inference", "enc", "KL", "J3%", "judge"):
        assert name in header
    assert max(map(len, text.splitlines())) <= 150 and "No room for peak mem" in text and "--out FILE.csv' has all." in text
    line = next(line for line in text.splitlines() if line.startswith("topk + refit"))
    assert "refit" in line and " 1.5 " in line and "0.0850 ± 0.0071" in line and "0.940" in line
    for word in ("enc: FLOPs", "J3%: overlap", "judge: balanced accuracy", "KL: nats"):
        assert word in " ".join(text.split())


def test_other_figures_show_each_sae_once(sweep):
    own, everything = Material.of(collect([sweep.path])), Material.of(rows_of(sweep))
    assert [group.rows for group in own.groups] == [group.rows for group in everything.groups] and own.further == []
    assert own.usual == everything.usual and len(everything.further) == 3
    assert FIGURES["frontier"](own).table == FIGURES["frontier"](everything).table

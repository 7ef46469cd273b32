"""Reports say what results.json says, draw figures that can be opened, and give the same when asked twice."""

import json
import re

import pytest

from experiments.evaluate import evaluate_again
from switch_sae.activations import SyntheticSource
from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.analysis.text_examples import TokenLift
from switch_sae.config import Baseline, EvaluationConfig, RunConfig
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.orchestrator import run_training
from switch_sae.report import margins, render, report, summary_table, table
from switch_sae.report.figures.single_runs import curves_figure, geometry_figure, load_figure, scores_figure
from switch_sae.report.tables import expert_tokens_table
from switch_sae.results import collect, finished_runs, load_members, scored
from switch_sae.runs import RunDir
from switch_sae.wandb_logger import WandbConfig, WandbMode


def tiny_run(folder, sae=None, seed=0, **changes):
    """A finished run on synthetic activations: a second or less."""
    sae = sae or SwitchSAE.Config(num_latents=32, k=4, num_experts=4)
    settings = {
        "source": SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0, seed=seed),
        "evaluation": EvaluationConfig(rows=500, bootstrap=20),
        "wandb": WandbConfig(mode=WandbMode.disabled),
        "baselines": [Baseline.flop_matched, Baseline.frozen_router] if isinstance(sae, SwitchSAE.Config) else [],
        "calibration_rows": 256, "tokens": 2560, "batch_size": 128, "log_every": 5, "seed": seed, "device": "cpu", "runs": str(folder),
    }  # fmt: skip
    return run_training(RunConfig(sae=sae, **settings | changes), say=lambda _: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs"))


def cells(text):
    """The table's cells by SAE and column."""
    lines = [re.split(r"\s{2,}", line) for line in text.split("\n\n")[0].splitlines() if not line.startswith("---")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[1:]}


def test_table_numbers_equal_results_json(run):
    saved = run.read_json("results.json")
    shown = cells(table([run]))
    assert list(shown) == [*saved["members"], *saved["controls"]] == ["switch", "flop_matched", "frozen_router", "pca_4", "untrained"]
    for name, entry in (saved["members"] | saved["controls"]).items():
        row, metrics = shown[name], entry["metrics"]
        assert row["FVU"] == "{value:.4f} [{low:.4f}, {high:.4f}]".format(**metrics["fvu_inliers"])
        assert (float(row["L0"]), float(row["cosine"])) == (round(metrics["l0"]["value"], 1), round(metrics["cosine"]["value"], 3))
        assert row["k"] == str(entry["k"])
        assert row["load CV"] == (f"{metrics['load_cv']['value']:.2f}" if "load_cv" in metrics else "-")
        assert float(row["FLOPs"].replace("k", "e3")) == pytest.approx(entry["flops"]["total"], rel=0.005)
        assert "delta CE" not in row and "KL" not in row
        if name != "pca_4":
            assert (row["latents"], row["experts"]) == (str(entry["num_latents"]), str(entry["num_experts"]))
            assert float(row["dead"].rstrip("%")) / 100 == pytest.approx(metrics["dead_latents"]["value"], abs=5e-4)
    assert shown["pca_4"]["latents"] == shown["untrained"]["tok/s"] == "-" != shown["switch"]["tok/s"]
    assert all(len(line) <= 150 for line in table([run]).splitlines())


def test_a_missing_interval_and_an_undefined_value_are_shown_as_such(run, tmp_path):
    saved = run.read_json("results.json")
    saved["members"]["switch"]["metrics"]["fvu_inliers"] |= {"low": None, "high": None}
    del saved["ratios"]  # a run of an earlier version
    saved["members"]["flop_matched"]["metrics"]["cosine"]["value"] = None
    saved["members"]["switch"]["metrics"]["delta_ce"] = {"value": 0.25, "low": 0.125, "high": 0.5}
    copy = RunDir(tmp_path)
    copy.write_json("results.json", saved)
    copy.write_json("config.json", run.read_json("config.json"))
    shown = cells(table([copy]))
    assert shown["switch"]["FVU"] == f"{saved['members']['switch']['metrics']['fvu']['value']:.4f}"
    assert shown["flop_matched"]["cosine"] == "-"
    assert shown["switch"]["delta CE"] == "0.250 [0.125, 0.500]"
    assert "* intervals overlap or are missing" in margins(copy)
    assert len(scores_figure(scored([copy])).axes) == 2


def test_margins_are_relative_and_starred_only_where_intervals_overlap(run, tmp_path):
    saved = run.read_json("results.json")
    del saved["ratios"]
    for group, name, low, value, high in (
        ("members", "switch", 0.38, 0.40, 0.42),
        ("members", "flop_matched", 0.41, 0.50, 0.60),
        ("members", "frozen_router", 0.70, 0.80, 0.90),
        ("controls", "pca_4", 0.30, 0.32, 0.37),
        ("controls", "untrained", 0.98, 1.00, 1.01),
    ):
        saved[group][name]["metrics"]["fvu_inliers"] = {"value": value, "low": low, "high": high}
    copy = RunDir(tmp_path)
    copy.write_json("results.json", saved)
    copy.write_json("config.json", run.read_json("config.json"))
    assert "-20.0 % flop_matched*, -50.0 % frozen_router, +25.0 % pca_4, -60.0 % untrained" in margins(copy)


def test_several_runs_are_told_apart_and_other_activations_are_pointed_out(run, tmp_path):
    again = tiny_run(tmp_path, seed=1)
    text = table([run, again])
    shown = cells(text)
    assert shown["1 switch"]["FVU"] != shown["2 switch"]["FVU"] and len(shown) == 10
    assert f"2: {again.path} (seed 1" in text and "NOT COMPARABLE" not in text
    other = tiny_run(tmp_path, evaluation=EvaluationConfig(rows=400, bootstrap=0), baselines=[])
    assert "NOT COMPARABLE with run 1, other activations: evaluation rows)" in table([run, other])
    assert {found.path for found in finished_runs(tmp_path)} == {again.path, other.path}
    assert finished_runs(tmp_path)[0].path.name == max(again.path.name, other.path.name)


def test_report_draws_figures_that_open_and_twice_gives_the_same(run):
    image = pytest.importorskip("matplotlib.image")
    first, second = [], []
    report(run, first.append)
    drawn = {file.name: file.read_bytes() for file in run.figures.iterdir()}
    names = ("geometry", "load", "scores", "training")
    assert sorted(drawn) == sorted(f"{name}.{kind}" for name in names for kind in ("pdf", "png"))
    for name, content in drawn.items():
        assert content.startswith(b"%PDF" if name.endswith("pdf") else b"\x89PNG")
        if name.endswith("png"):
            pixels = image.imread(run.figures / name)
            assert min(pixels.shape[:2]) > 300 and 0.001 < (pixels[..., :3].min(axis=2) < 0.5).mean() < 0.6, f"{name} is blank or filled"
    report(run, second.append)
    assert first == second
    assert {file.name: file.read_bytes() for file in run.figures.iterdir()} == drawn
    text = "\n".join(first)
    assert table([run]) in text and margins(run) in text and f'load_sae("{run.path}")' in text and "wandb sync" not in text


def test_figures_show_the_numbers_of_the_results(run):
    rows = scored([run])
    figure = scores_figure(rows)
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{row.results['fvu_inliers'].value:.3f}" for row in rows]
    bars = load_figure(rows).axes[0].patches
    assert [bar.get_height() for bar in bars] == rows[0].results.vectors["expert_load"]
    switch = [row["fvu"] for row in run.metrics() if row["sae"] == "switch"]
    assert list(curves_figure([run]).axes[0].lines[0].get_ydata()) == switch
    weight = load_members(run)["switch"].decoder_weight()
    geometry = decoder_geometry(weight, 4)
    (heat_map,) = geometry_figure({"switch": geometry}).axes[0].images
    assert heat_map.get_array().tolist() == geometry.similarity_EE().tolist()


def test_a_dense_sae_is_reported_without_experts(tmp_path):
    dense = tiny_run(tmp_path, sae=TopKSAE.Config(num_latents=32, k=4), log_every=0)
    said = []
    report(dense, said.append)
    assert {file.name for file in dense.figures.glob("*.png")} == {"geometry.png", "scores.png"}
    assert "load CV" not in cells(table([dense]))["topk"]
    with pytest.raises(ValueError, match="no SAE here has experts"):
        load_figure(scored([dense]))
    with pytest.raises(ValueError, match="log_every=0"):
        curves_figure([dense])


def test_latents_that_never_fire_have_no_place_in_the_geometry_figure(run):
    sae = load_members(run)["switch"]
    nothing_fires = decoder_geometry(sae.decoder_weight(), 4, scored([run])[0].results.firing_counts * 0)
    assert render(geometry_figure({"switch": nothing_fires})).startswith(b"\x89PNG")


def test_members_come_back_as_they_were_saved(run):
    members = load_members(run)
    assert list(members) == ["switch", "flop_matched", "frozen_router"]
    assert [type(sae) for sae in members.values()] == [SwitchSAE, TopKSAE, SwitchSAE]
    assert not members["frozen_router"].config.router.train and members["switch"].config.router.train


def test_evaluating_again_agrees_and_leaves_the_first_results_alone(run, tmp_path):
    fresh = tiny_run(tmp_path)
    before = (fresh.path / "results.json").read_bytes()
    assert evaluate_again(fresh) == "results-500.json"
    first, again = json.loads(before), fresh.read_json("results-500.json")
    assert again == {key: first[key] for key in ("evaluation", "members", "controls", "ratios", "outliers")}
    assert evaluate_again(fresh, rows=300) == "results-300.json"
    assert (fresh.path / "results.json").read_bytes() == before
    assert "on 300 held-out rows" in table([fresh], "results-300.json")


def test_expert_tokens_fit_the_width_and_show_line_breaks():
    lifts = [[TokenLift("\n", 0, 30, 0.5, 2.0), TokenLift("x" * 60, 1, 30, 0.4, 1.6), TokenLift("y" * 60, 2, 30, 0.3, 1.2)], []]
    first, second = expert_tokens_table(lifts, [0.75, 0.25], width=100).splitlines()
    assert r"'\n' 50%" in first and "x" * 60 in first and "y" not in first and len(first) <= 100
    assert second.split() == ["expert", "1", "25.0%"]


def test_missing_runs_are_named(tmp_path):
    with pytest.raises(ValueError, match="no runs"):
        table([])
    with pytest.raises(FileNotFoundError, match="Is training finished"):
        table([RunDir(tmp_path)])
    assert finished_runs(tmp_path) == []


def changed(run, folder, change):
    """A copy of a finished run whose results.json `change` has edited."""
    saved = run.read_json("results.json")
    change(saved)
    copy = RunDir(folder)
    copy.write_json("results.json", saved)
    copy.write_json("config.json", run.read_json("config.json"))
    return copy


def entries(saved):
    return {**saved["members"], **saved["controls"]}


def test_margins_show_the_interval_of_paired_ratios_and_star_those_that_hold_zero(run, tmp_path):
    def change(saved):
        saved["ratios"] = {
            "flop_matched": {"fvu_inliers": {"value": 0.759, "low": 0.740, "high": 0.778}, "delta_ce": {"value": 0.98, "low": 0.9, "high": 1.1}},
            "frozen_router": {"fvu_inliers": {"value": 0.99999, "low": 0.97, "high": 1.02}},
            "pca_4": {"fvu_inliers": {"value": None, "low": None, "high": None}},
        }
        for entry in entries(saved).values():
            entry["metrics"]["delta_ce"] = {"value": 0.5, "low": None, "high": None}
        del saved["controls"]["untrained"]

    first, second = margins(changed(run, tmp_path, change)).replace("\n  ", " ").splitlines()
    assert first == (
        "FVU of switch relative to: -24.1 % [-26.0, -22.2] flop_matched, +0.0 % [-3.0, +2.0] frozen_router* (* the interval holds 0 or is missing)"
    )
    assert second.startswith("delta CE of switch relative to: -2.0 % [-10.0, +10.0] flop_matched*, +0.0 % frozen_router*")


def test_a_control_without_error_has_no_margin_and_does_not_spoil_the_axis(run, tmp_path):
    def change(saved):
        saved["controls"]["pca_4"]["metrics"]["fvu_inliers"] = {"value": 3e-14, "low": 0.0, "high": 4e-14}
        saved["members"]["flop_matched"]["metrics"]["fvu_inliers"] = {"value": 0.05, "low": None, "high": None}

    copy = changed(run, tmp_path, change)
    text = " ".join(margins(copy).split())
    assert "pca_4 is 0: no margin" in text and "% pca_4" not in text
    (axis,) = scores_figure(scored([copy])).axes
    others = [row.value("fvu_inliers") for row in scored([copy]) if row.sae != "pca_4"]
    assert axis.get_xlim()[0] > min(others) / 5 and [text.get_text() for text in axis.texts][3] == "0.000"
    without = changed(run, tmp_path / "without", lambda saved: saved["controls"].pop("pca_4"))
    assert "pca" not in table([without]) + margins(without) and render(scores_figure(scored([without])))


def test_the_main_sae_is_known_by_its_role_wherever_it_stands_in_the_file(run, tmp_path):
    copy = changed(run, tmp_path, lambda saved: saved.update(members=dict(reversed(saved["members"].items()))))
    assert scored([copy])[0].sae == next(iter(cells(table([copy])))) == next(iter(load_members(run))) == "switch"
    assert margins(copy).startswith("FVU of switch relative to:") and sorted(margins(copy)) == sorted(margins(run))


def test_rows_of_huge_norm_are_counted_and_the_other_fvu_stands_beside(run, tmp_path):
    def change(saved):
        for place, entry in enumerate(entries(saved).values()):
            entry["outlier_rows"] = 3
            entry["metrics"]["fvu"]["value"] = 0.01
            for metric, value in (("delta_ce", 0.75), ("delta_ce_inliers", 0.25), ("kl", 0.5), ("kl_inliers", 0.125 if place else -1e-5)):
                entry["metrics"][metric] = {"value": value, "low": None, "high": None}
        saved["outliers"] = {"factor": 10.0, "limit": 1750.3, "rows": 532_480, "left_out": 214}

    copy = changed(run, tmp_path, change)
    text, shown = " ".join(table([copy]).split()), cells(table([copy]))
    assert {row["FVU all"] for row in shown.values()} == {"0.0100"} and "0.0100" not in {row["FVU"].split()[0] for row in shown.values()}
    assert "without 3 of 500 rows (0.6 %) whose norm exceeds 10 medians; on 500 held-out rows" in text and "FVU all: with them." in text
    assert "delta CE where outlier rows are left as they are: switch 0.250 (KL 0.000), flop_matched 0.250 (KL 0.125)" in text
    assert "training left out 214 of 532,480 rows (0.04 %)." in text and "FVU all" not in table([run]) + margins(copy)
    assert "training left out 214" in table([copy, run]).split("1: ")[1].splitlines()[0]
    assert "rows (0.6 %) whose norm exceeds 10 medians" in scores_figure(scored([copy]))._supxlabel.get_text().replace("\n", " ")
    lines = summary_table(collect([copy.path])).splitlines()
    assert "FVU all" in lines[0] and "delta CE in." in lines[0] and any("without 3 of 500 rows" in line for line in lines)


def test_the_legend_says_what_predictions_rest_on_and_why_a_column_is_missing(run, tmp_path):
    def change(saved):
        for entry in entries(saved).values():
            entry |= {"documents": 34, "predictions": 16_126, "prediction_documents": 26, "recovery": {}}
        saved["evaluation"]["left_out"] = {"delta_ce": "its logits are not finite.", "kl": "its logits are not finite."}

    text = table([changed(run, tmp_path, change)])
    assert "on 500 held-out rows from 34 documents, 16,126 predictions from 26 documents." in text
    assert "Not measured: delta_ce, kl, its logits are not finite." in text
    for column in ("delta CE", "KL:", "MCC", "recall:"):
        assert column not in text
    assert "500 held-out rows, independent of each other" in table([run])


def test_recovery_of_a_known_dictionary_has_its_columns(run, tmp_path):
    def change(saved):
        for name, entry in saved["members"].items():
            entry["recovery"] = {"mcc": 0.5, "recall": 0.25, "nmi": 0.125 if "switch" in name else None}

    copy = changed(run, tmp_path, change)
    shown = cells(table([copy]))
    assert [shown["switch"][name] for name in ("MCC", "recall", "NMI")] == ["0.500", "0.250", "0.125"]
    assert shown["flop_matched"]["NMI"] == shown["pca_4"]["MCC"] == "-" and "NMI: of routed expert and true topic" in " ".join(table([copy]).split())
    assert "MCC" in summary_table(collect([copy.path])) and 0 < float(cells(table([run]))["switch"]["MCC"]) < 1


def test_figures_of_a_run_are_readable(run):
    load = load_figure(scored([run]))
    assert load.axes[0].get_title() == f"switch, load CV {scored([run])[0].value('load_cv'):.2f}"
    assert "log scale" in curves_figure([run]).axes[0].get_ylabel() or curves_figure([run]).axes[0].get_yscale() == "linear"
    weight = load_members(run)["switch"].decoder_weight()
    dense, routed = decoder_geometry(weight, 1), decoder_geometry(weight, 4)
    (only,) = geometry_figure({"topk": dense}).axes  # no empty half
    assert only.get_legend().get_texts()[0].get_text().startswith("anywhere")
    both = geometry_figure({"switch": routed, "topk, cut": routed}, ["topk, cut"])
    words = [axis.get_legend().get_texts()[0].get_text() for axis in both.axes if axis.get_legend()]
    assert [word.split(" (")[0] for word in words] == ["in its own expert", "in its own block"]
    similarity = routed.similarity_EE()
    assert both.axes[0].images[0].get_clim() == (float(similarity.min()), float(similarity.max()))


def test_a_main_sae_and_its_controls_look_the_same_in_runs_with_other_members(run, tmp_path):
    fewer = changed(run, tmp_path, lambda saved: saved["members"].pop("flop_matched"))

    def colours(one):
        rows = scored([one])
        return dict(zip([row.sae for row in rows], [line.get_color() for line in scores_figure(rows).axes[0].lines], strict=True))

    assert colours(fewer).items() <= colours(run).items() and len(set(colours(run).values())) == 5

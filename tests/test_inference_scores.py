"""Every trained SAE can be scored under further inferences: the same weights, with entries and rows of their own, in runs, in sweeps and later; one
half of the documents calibrates thresholds, the other is reported."""

import csv
import json
import sys

import pytest
import torch
from test_report import tiny_run

from experiments import evaluate as evaluate_command
from experiments.evaluate import evaluate_again
from switch_kernels import Execution
from switch_sae import load_sae
from switch_sae.activations import SyntheticSource
from switch_sae.analysis.recovery import normalized_mutual_information
from switch_sae.config import EvaluationConfig, config_from_plain
from switch_sae.evaluation import evaluate
from switch_sae.models import BatchTopKSAE, PursuitSAE, SwitchSAE, TopKSAE
from switch_sae.models.baselines import Baseline
from switch_sae.models.inference import with_inference
from switch_sae.orchestrator import resume_training
from switch_sae.report import summary_table, table
from switch_sae.report.figures.single_runs import load_figure, scores_figure
from switch_sae.results import collect, load_members, scored, summary
from switch_sae.scoring import Scorer, trained
from switch_sae.sweep import SweepConfig, SweepOptions, run_sweep
from switch_sae.wandb_logger import WandbConfig, WandbMode

ROWS = 400


def asked(**changes):
    return EvaluationConfig(rows=ROWS, bootstrap=10, **{"inferences": ["refit", "pursuit"], **changes})


def source_of(run):
    return SyntheticSource(config_from_plain(run.read_json("config.json")).source, batch_size=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs"), evaluation=asked(), baselines=[Baseline.flop_matched])


def test_each_inference_is_an_entry_with_the_same_weights_and_training(run, tmp_path):
    saved = run.read_json("results.json")
    names = ["switch", "flop_matched"]
    assert list(saved["members"]) == [*names, *(f"{name}+{how}" for how in ("refit", "pursuit") for name in names)]
    source = source_of(run)
    rows = source.evaluation_set(ROWS)
    for name, folder in (("switch", run), ("flop_matched", run.member("flop_matched"))):
        own = saved["members"][name]
        assert "of" not in own and own["inference"] == "encoder"
        for how in ("refit", "pursuit"):
            entry = saved["members"][f"{name}+{how}"]
            assert (entry["role"], entry["of"], entry["inference"]) == ("inference", name, how)
            expected = evaluate(with_inference(load_sae(folder.path), how), rows, bootstrap=0)
            assert entry["metrics"]["fvu"]["value"] == expected["fvu"].value < own["metrics"]["fvu"]["value"]
            assert entry["flops"] == expected.flops and entry["flops"]["encode"] > own["flops"]["encode"]
            assert all(entry[cost] == own[cost] for cost in ("tokens", "train_seconds", "parameters", "train_tokens_per_second"))
            assert set(saved["ratios"][f"{name}+{how}"]) == {"fvu_inliers"}
    assert set(saved["ratios"]) == {*saved["members"], *saved["controls"]} - {"switch"} and set(saved["controls"]) == {"pca_4", "untrained"}
    without = tiny_run(tmp_path, evaluation=asked(inferences=[]), baselines=[Baseline.flop_matched]).read_json("results.json")
    assert set(without["members"]) == set(names)
    assert all(without["members"][name]["metrics"] == saved["members"][name]["metrics"] for name in names)


def test_rows_of_further_inferences_come_when_asked_for_and_load_their_sae(run):
    assert {row.sae: row.role for row in collect([run.path])} == {"switch": "main", "flop_matched": "baseline"}
    rows = {row.sae: row for row in collect([run.path], inferences=True)}
    assert len(rows) == 6 and rows["switch+refit"].name == f"{run.path.name}/switch+refit"
    x_TD = torch.randn(5, 16)
    for sae, row in rows.items():
        own = rows[row.of or sae]
        assert row.model_file == own.model_file and row.has_weights
        assert row.flops_train == own.flops_train == own.flops_total and row.flops_encode == row.results.flops["router"] + row.results.flops["encode"]
        assert row.config == own.config and (row.inference if row.of else "encoder") == row.load().inference.name
    latents, refitted = (rows[name].load().encode(x_TD).to_dense() for name in ("switch", "switch+refit"))
    assert not torch.equal(latents, refitted) and bool(((latents > 0) | (refitted == 0)).all())
    assert set(load_members(run)) == {"switch", "flop_matched"}
    assert [row.sae for row in scored([run])][-2:] == ["pca_4", "untrained"]
    text = summary_table(list(rows.values()))
    assert [line.split("  ")[0] for line in text.splitlines()[2:8]] == [
        "switch", "switch + refit", "switch + pursuit", "flop_matched", "flop_matched + refit", "flop_matched + pursuit",
    ]  # fmt: skip
    shown = {line.split()[0]: line.split() for line in table([run]).splitlines() if line}
    assert shown["switch+refit"][4] == "refit" and shown["pca_4"][4] == "-" and shown["SAE"][4] == "inference"
    assert len(scores_figure(scored([run])).axes[0].get_yticks()) == 8 and len(load_figure(scored([run])).axes) == 1


def test_a_run_that_is_scored_later_or_again_has_the_same_entries(run, tmp_path, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(RuntimeError):
        broken.setattr(Scorer, "group", lambda *arguments: (_ for _ in ()).throw(RuntimeError("no")))
        tiny_run(tmp_path, evaluation=asked(), baselines=[Baseline.flop_matched])
    (folder,) = tmp_path.iterdir()
    later = resume_training(folder, lambda line: None).read_json("results.json")
    whole = run.read_json("results.json")
    for part in ("controls", "ratios", "evaluation"):
        assert later[part] == whole[part]
    assert list(later["members"]) == list(whole["members"])
    for name, entry in whole["members"].items():
        assert list(later["members"][name]) == list(entry) and later["members"][name]["metrics"] == entry["metrics"]


def test_scoring_again_asks_for_its_own_inferences(run):
    assert evaluate_again(run, rows=ROWS - 100, inferences=["pursuit"]) == "results-300.json"
    rows = collect([run.path], inferences=True, file="results-300.json")
    assert {row.sae for row in rows} == {"switch", "flop_matched", "switch+pursuit", "flop_matched+pursuit"}
    assert all(row.results.rows == 300 for row in rows)
    with pytest.raises(FileNotFoundError, match=r"no run that has results-7\.json. Make it: make evaluate RUN="):
        collect([run.path], file="results-7.json")


def test_an_inference_that_an_sae_lacks_is_left_out_and_told_once():
    pursuit = PursuitSAE(PursuitSAE.Config(num_latents=32, k=4), 16)
    said: list[str] = []
    scorer = Scorer(asked(), SyntheticSource(SyntheticSource.Config(d_in=16), 64), said.append)
    for name in ("a", "b"):
        assert scorer.under_inferences(trained(name, pursuit, "main")) == []  # pursuit is its own
    assert len(said) == 1 and said[0].startswith("no scores of pursuit under refit: ")
    switch = SwitchSAE(SwitchSAE.Config(num_latents=32, k=4, num_experts=4, experts_per_token=2), 16)
    assert [each.name for each in scorer.under_inferences(trained("c", switch, "main"))] == ["c+refit", "c+pursuit"]
    assert [each.name for each in scorer.under_inferences(trained("d", with_inference(switch, "refit"), "main"))] == ["d+pursuit"]


def test_one_half_sets_thresholds_and_the_other_is_reported(tmp_path):
    sae = BatchTopKSAE.Config(num_latents=32, k=4)
    plain = tiny_run(tmp_path / "plain", sae, evaluation=asked(inferences=[]))
    run = tiny_run(tmp_path / "calibrated", sae, evaluation=asked(calibrate=True))
    saved = run.read_json("results.json")
    source = source_of(run)
    half_A, half_B = source.evaluation_set(ROWS).halves()
    stored = load_sae(run.path)
    assert all(torch.equal(tensor, load_sae(plain.path).state_dict()[name]) for name, tensor in stored.state_dict().items())
    assert saved["evaluation"]["half of the documents"] == "B" and "half of the documents" not in plain.read_json("results.json")["evaluation"]
    for how in ("encoder", "refit", "pursuit"):
        entry = saved["members"]["batch_topk" if how == "encoder" else f"batch_topk+{how}"]
        threshold = entry["threshold"]
        assert threshold["trained"] == stored.threshold.item() != threshold["calibrated"]
        again = with_inference(load_sae(run.path), how)
        again.threshold.fill_(threshold["calibrated"])
        assert evaluate(again, half_A, bootstrap=0)["l0"].value == pytest.approx(threshold["l0"], rel=1e-6) == pytest.approx(4, rel=0.02)
        assert entry["metrics"]["fvu"]["value"] == evaluate(again, half_B, bootstrap=0)["fvu"].value and entry["rows"] == len(half_B.x_TD)
    assert {row.evaluated_on["half of the documents"] for row in collect([run.path], inferences=True)} == {"B"}
    assert "NOT COMPARABLE, other activations: evaluation rows, half of the documents" in " ".join(summary_table(collect([tmp_path])).split())
    assert saved["controls"].keys() == {"pca_4", "untrained"} and all(entry["rows"] == ROWS // 2 for entry in saved["controls"].values())
    assert evaluate_again(plain, calibrate=True) == f"results-{ROWS}-calibrated.json"
    again = plain.read_json(f"results-{ROWS}-calibrated.json")["members"]["batch_topk"]
    assert again["metrics"] == saved["members"]["batch_topk"]["metrics"]
    assert "threshold" not in plain.read_json("results.json")["members"]["batch_topk"]


def test_the_truth_behind_a_half_is_that_of_its_rows(tmp_path):
    run = tiny_run(tmp_path, evaluation=asked(inferences=[], calibrate=True), baselines=[])
    source = source_of(run)
    _, half = source.evaluation_set(ROWS).halves()
    sae = load_sae(run.path)
    with torch.no_grad():
        expert_T = sae(half.x_TD).routing.expert_TS[:, 0]
    expected = normalized_mutual_information(expert_T, source.evaluation_truth(ROWS).topic_T[half.document_T])
    assert run.read_json("results.json")["members"]["switch"]["recovery"]["nmi"] == pytest.approx(expected)


def sweep_config(path, **changes):
    return SweepConfig(
        source=SyntheticSource.Config(d_in=16), sae=SwitchSAE.Config(num_latents=32, k=4, num_experts=4), evaluation=asked(**changes),
        wandb=WandbConfig(mode=WandbMode.disabled), tokens=640, batch_size=64, calibration_rows=128, runs=str(path), log_every=0,
        sweep=SweepOptions(experts=[1, 4], seeds=2, grids={"batch": {"sae": {"architecture": "batch_topk"}}}),
    )  # fmt: skip


def test_a_sweep_has_a_line_for_each_inference_over_seeds_and_can_be_scored_again(tmp_path, monkeypatch, capsys):
    folder = run_sweep(sweep_config(tmp_path), lambda line: None)
    rows = collect([folder.path], inferences=True)
    names = [f"{name}{how}" for name in ("batch_topk", "switch", "topk") for how in ("", " + refit", " + pursuit")]
    assert [(group.name, len(group.rows)) for group in summary(rows)] == [(name, 2) for name in names]
    assert [line.split("  ")[0] for line in folder.table().splitlines()[2:11]] == names
    with (folder.path / "results.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert sorted(record["inference"] for record in records) == sorted(["encoder", "refit", "pursuit"] * 6)
    assert all(int(record["flops_encode"]) > 0 and int(record["flops_train"]) > 0 for record in records)
    with (folder.path / "summary.csv").open(newline="") as file:
        assert {(record["sae"], record["inference"]) for record in csv.DictReader(file)} >= {("topk", "encoder"), ("topk + refit", "refit")}
    assert len(collect([folder.path])) == 6
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder.path), "--rows", "300", "--inferences", "refit", "--calibrate"])
    evaluate_command.main()
    again = collect([folder.path], inferences=True, file="results-300-calibrated.json")
    assert {(row.inference, row.evaluated_on["half of the documents"]) for row in again} == {("encoder", "B"), ("refit", "B")} and len(again) == 12
    said = capsys.readouterr().out
    assert said.count("switch + refit") == 1  # one table over seeds, at the end
    assert said.count("device: ") == 1  # one stream for all six
    asked_of = ["evaluate", str(folder.path / "members" / "topk-m32-k4-s0"), "--rows", "200", "--inferences", "--no-probes"]
    monkeypatch.setattr(sys, "argv", asked_of)
    evaluate_command.main()
    (plain,) = collect([folder.path / "members" / "topk-m32-k4-s0"], file="results-200.json")
    assert "jaccard_3pct" not in plain.metrics and all("jaccard_3pct" in row.metrics for row in rows)


def test_a_member_that_fails_under_every_inference_is_out_and_the_others_are_scored(tmp_path, monkeypatch):
    forward = TopKSAE.forward

    def broken(self, x_TD):
        if type(self) is TopKSAE and not torch.is_grad_enabled():
            raise ArithmeticError("no least squares")
        return forward(self, x_TD)

    monkeypatch.setattr(TopKSAE, "forward", broken)
    folder = run_sweep(sweep_config(tmp_path), lambda line: None)
    assert {row.status for row in collect([folder.path]) if row.architecture == "topk"} == {"failed"}
    assert {row.status for row in collect([folder.path]) if row.architecture != "topk"} == {"finished"}
    failed = json.loads((folder.path / "members" / "topk-m32-k4-s0" / "failed.json").read_text())
    assert "no least squares" in failed["error"]


def test_settings_of_inferences_are_checked():
    with pytest.raises(ValueError, match=r"evaluation\.inferences=\['refit', 'refit'\] names one twice"):
        EvaluationConfig(inferences=["refit", "refit"])
    with pytest.raises(ValueError, match=r"evaluation\.inferences='lstsq' is not one of encoder, refit, pursuit"):
        EvaluationConfig(inferences=["lstsq"])


def test_ratios_of_some_are_those_of_all(run):
    execution = Execution(reason="who trained it")
    scorer = Scorer(asked(), source_of(run), search=execution)
    sae = load_sae(run.path)
    group = scorer.group([trained("a", sae, "main"), *scorer.under_inferences(trained("a", sae, "main"))])
    assert sae.search is execution  # who searched in training does in scoring, where an SAE was loaded too
    every = group._scores.ratios("a")
    assert set(every) == {"a+refit", "a+pursuit"} and group._scores.ratios("a", ["a+refit"]) == {"a+refit": every["a+refit"]}

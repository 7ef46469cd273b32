"""The results table says what the run folders say: one row per trained SAE, and means and spreads over seeds that a hand can check."""

import csv
import json
import math
from dataclasses import asdict, replace
from itertools import permutations

import pytest
import torch

from switch_sae.activations import SyntheticSource
from switch_sae.config import RunConfig, config_to_plain
from switch_sae.models import ROUTERS, SAES, SwitchSAE, TopKSAE
from switch_sae.models.routers import Gate
from switch_sae.report import summary_table, table
from switch_sae.results import collect, summary, write_results, write_summary
from switch_sae.results.settings import HEADLINE, config_columns, unusual, usual_settings
from switch_sae.runs import RunDir, RunError

D = 8


class FakeSweep:
    """A sweep folder whose scores are given, so that what tables and figures show can be computed by hand."""

    def __init__(self, path, **source):
        self.path, self.members, self.source = path, {}, source
        RunDir(path).write_json("sweep.json", {"name": "fake", "members": {}})

    def add(self, sae, seed=0, fvu=None, steps=(), weights=False, evaluated="rows", normalize=True, scale=1.0, **metrics):
        """A finished member with these metrics, or with `fvu=None` one that only has its logged steps."""
        config = RunConfig(
            source=SyntheticSource.Config(d_in=D), sae=sae, seed=seed, tokens=1000, batch_size=100, normalize_activations=normalize, baselines=[]
        )
        plain = config_to_plain(config)
        plain["source"] |= self.source
        name = f"{len(self.members)}-s{seed}"
        self.members[name] = plain
        RunDir(self.path).write_json("sweep.json", {"name": "fake", "members": self.members})
        run = RunDir(self.path / "members" / name)
        if fvu is None and not steps:
            return run
        run.write_json("config.json", plain)
        architecture = SAES.key_of(sae)
        for step, value in steps:
            run.log({"step": step, "tokens": 100 * step, "sae": architecture, "fvu": value})
        if fvu is None:
            return run
        model = SAES[architecture](sae, D, torch.Generator().manual_seed(seed))
        model.activation_scale.fill_(scale)
        if weights:
            run.save_sae(model, {})
        values = {"fvu": fvu, "fvu_inliers": fvu, "l0": float(getattr(sae, "k", 3)), "normalized_mse": fvu / 2, "dead_latents": 0.25, **metrics}
        entry = {
            "metrics": {name: {"value": value, "low": None, "high": None} for name, value in values.items()},
            "vectors": {}, "rows": 500, "documents": 5, "outlier_rows": 0, "predictions": 0, "firing_counts": [1] * sae.num_latents,
            "flops": asdict(model.flops()) | {"forward": model.flops().forward, "total": model.flops().total},
            "architecture": architecture, "num_latents": sae.num_latents, "num_experts": model.num_experts, "k": getattr(sae, "k", None),
            "parameters": 7, "tokens": 1000, "train_tokens_per_second": 50.0 + seed,
            "train_seconds": 2.0, "wall_seconds": 9.0, "group_size": 4, "state_bytes": 3_000_000, "peak_bytes": 5_000_000,
        }  # fmt: skip
        run.write_json("results.json", {"members": {architecture: entry}, "controls": {}, "evaluation": {"source": {"source": evaluated}}})
        return run

    def beside(self, run, name, sae, fvu):
        """The same run with a trained baseline."""
        saved = run.read_json("results.json")
        (main, *_) = saved["members"].values()
        sizes = {"architecture": SAES.key_of(sae), "num_latents": sae.num_latents, "num_experts": getattr(sae, "num_experts", 1), "k": sae.k}
        score = {"value": fvu, "low": None, "high": None}
        entry = main | sizes | {"role": "baseline", "metrics": main["metrics"] | {"fvu": score, "fvu_inliers": score}}
        saved["members"][name] = entry | {"firing_counts": [1] * sae.num_latents}
        run.write_json("results.json", saved)
        run.member(name).save_sae(SAES.build(sae, D, torch.Generator().manual_seed(0)), {})
        return run


def topk(latents=32, k=4, **more):
    return TopKSAE.Config(num_latents=latents, k=k, **more)


def switch(experts, latents=32, k=4, load_balance=0.1, gate=Gate.probability, **more):
    router = ROUTERS["softmax"].Config(load_balance=load_balance, gate=gate)
    return SwitchSAE.Config(num_latents=latents, num_experts=experts, k=k, router=router, **more)


def frozen(sae):
    return replace(sae, router=replace(sae.router, train=False))


@pytest.fixture
def sweep(tmp_path):
    return FakeSweep(tmp_path / "sweep")


def test_a_row_holds_what_its_run_folder_says(sweep):
    run = sweep.add(switch(4), seed=2, fvu=0.5, delta_ce=0.125)
    (row,) = collect([sweep.path])
    assert (row.path, row.name, row.sae, row.status, row.seed) == (run.path, "0-s2", "switch", "finished", 2)
    assert (row.architecture, row.num_latents, row.num_experts, row.k) == ("switch", 32, 4, 4)
    assert (row.value("fvu"), row.value("delta_ce"), row.value("kl")) == (0.5, 0.125, None)
    assert (row.tokens, row.tokens_per_second, row.train_seconds, row.wall_seconds, row.group_size) == (1000, 52.0, 2.0, 9.0, 4)
    assert (row.state_mb, row.peak_mb, row.parameters) == (3.0, 5.0, 7)
    assert row.flops_total == SwitchSAE(switch(4), D).flops().total
    assert row.config["sae.num_experts"] == 4 and row.config["source.d_in"] == D and row.config["trainer.lr"] is None


def test_every_kind_of_path_gives_the_same_rows_once(sweep):
    runs = [sweep.add(topk(), seed=seed, fvu=0.5) for seed in (0, 1)]
    rows = collect([sweep.path])
    assert [row.path for row in rows] == [run.path for run in runs]
    for paths in ([sweep.path.parent], [run.path for run in runs], [sweep.path, runs[0].path, str(sweep.path)]):
        assert [(row.path, row.seed, row.value("fvu")) for row in collect(paths)] == [(row.path, row.seed, 0.5) for row in rows]
    with pytest.raises(ValueError, match="no folders"):
        collect([])
    with pytest.raises(FileNotFoundError, match=r"neither it nor a folder in it has config\.json"):
        collect([sweep.path / "nowhere"])


def test_baselines_of_an_ordinary_run_are_rows_with_their_own_settings(tmp_path):
    run = FakeSweep(tmp_path).add(switch(4), fvu=0.4, weights=True)
    saved = run.read_json("results.json")
    saved["members"]["flop_matched"] = saved["members"]["switch"] | {"architecture": "topk", "num_latents": 20, "num_experts": 1}
    run.write_json("results.json", saved)
    run.member("flop_matched").save_sae(TopKSAE(topk(20, auxk=0.0), D), {})
    main, baseline = sorted(collect([run.path]), key=lambda row: row.name)
    assert (main.name, baseline.name, baseline.sae) == (run.path.name, f"{run.path.name}/flop_matched", "flop_matched")
    assert baseline.config["sae.num_latents"] == 20 and baseline.config["sae.auxk"] == 0.0 and "sae.num_experts" not in baseline.config
    assert baseline.config["sae.architecture"] == "topk" and main.config["sae.num_experts"] == 4
    assert (main.model_file.parent, baseline.model_file.parent) == (run.path, run.path / "baselines" / "flop_matched")


def test_unfinished_members_are_told_apart(sweep):
    sweep.add(topk(), seed=0)
    sweep.add(topk(), seed=1, steps=[(1, 0.9), (3, 0.8)])
    failed = sweep.add(topk(), seed=2, steps=[(5, 0.9)])
    failed.write_json("failed.json", {"error": "FloatingPointError: loss is NaN", "step": 7})
    sweep.add(topk(), seed=3, fvu=0.5)
    rows = {row.seed: row for row in collect([sweep.path])}
    assert {seed: (row.status, row.step) for seed, row in rows.items()} == {
        0: ("waiting", None), 1: ("running", 3), 2: ("failed", 7), 3: ("finished", None),
    }  # fmt: skip
    assert rows[2].error == "FloatingPointError: loss is NaN" and rows[0].num_latents == 32
    (group,) = summary(rows.values())
    assert [row.seed for row in group.rows] == [3] and len(group.unfinished) == 3
    text = " ".join(summary_table(list(rows.values())).split())
    assert "seed 0 waiting" in text and "seed 1 not finished, at step 3" in text and "seed 2 failed at step 7" in text


def test_mean_and_spread_over_seeds_by_hand(sweep):
    for seed, fvu in enumerate((0.1, 0.2, 0.6)):
        sweep.add(topk(), seed=seed, fvu=fvu, delta_ce=math.nan if seed == 0 else fvu)
    sweep.add(switch(4), seed=0, fvu=0.7)
    single, three = sorted(summary(collect([sweep.path])), key=lambda group: len(group.rows))
    spread = three.spreads["fvu"]
    assert (spread.mean, spread.n) == (pytest.approx(0.3), 3)
    assert spread.sd == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert (three.spreads["delta_ce"].mean, three.spreads["delta_ce"].n) == (pytest.approx(0.4), 2)
    assert three.spreads["tokens_per_second"].mean == pytest.approx(51) and three.mean("peak_mb") == 5
    assert (single.spreads["fvu"].sd, single.sd("fvu"), single.mean("kl")) == (None, 0.0, None)
    assert format(spread, ".2f") == "0.30 ± 0.26" and format(single.spreads["fvu"], ".2f") == "0.70"


def test_only_the_seed_joins_runs_and_a_repeated_seed_counts_once(sweep):
    sweep.add(switch(4), seed=0, fvu=0.4)
    sweep.add(switch(4), seed=0, fvu=0.5)
    sweep.add(switch(4), seed=1, fvu=0.6)
    sweep.add(switch(4, load_balance=1.0), seed=0, fvu=0.8)
    rows = collect([sweep.path])
    groups = summary(rows)
    assert [(len(group.rows), group.repeated, group.mean("fvu")) for group in groups] == [(2, 1, pytest.approx(0.55)), (1, 0, 0.8)]
    assert config_columns(rows) == ["sae.router.load_balance"]
    usual = usual_settings(rows)
    assert unusual(rows[-1], usual) == {"sae.router.load_balance": 1.0} and unusual(rows[0], usual) == {}
    lines = summary_table(rows).splitlines()
    assert lines[2].endswith("1 run with the same seed left out") and lines[3].endswith("load_balance=1")
    assert "Where nothing is said: router.load_balance=0.1." in lines[-1]


def test_runs_scored_on_other_activations_are_never_averaged(sweep):
    sweep.add(topk(), seed=0, fvu=0.4)
    sweep.add(topk(), seed=1, fvu=0.9, evaluated="other rows")
    rows = collect([sweep.path])
    assert [group.mean("fvu") for group in summary(rows)] == [0.4, 0.9]
    assert summary_table(rows).count("NOT COMPARABLE, other activations: source") == 1


def test_the_table_fits_150_columns_and_shows_an_absent_k_as_a_dash(sweep):
    for seed in range(6):
        sweep.add(switch(4), seed=seed)
    for value in (1e-3, 2e-3):
        sweep.add(switch(4, encoder_bias=False, load_balance=value, auxk=value, auxk_latents=3), fvu=0.25, delta_ce=0.5, load_cv=0.1)
    run = sweep.add(topk(), fvu=0.5)
    saved = run.read_json("results.json")
    saved["members"]["topk"]["k"] = None
    run.write_json("results.json", saved)
    text = summary_table(collect([sweep.path]))
    assert max(map(len, text.splitlines())) <= 150 and "6 seeds waiting" in text
    dense = next(line for line in text.splitlines() if line.startswith("topk")).split()
    assert dense[:7] == ["topk", "32", "1", "-", "1", "1", "0.5000"]
    assert " - " in next(line for line in table([run]).splitlines() if line.startswith("topk"))
    assert "n = 0 to 1" in text and "standard deviation (n - 1) over seeds" in text


def test_files_hold_every_row_metric_and_setting(sweep, tmp_path):
    sweep.add(topk(), seed=0, fvu=0.5, delta_ce=0.25)
    sweep.add(switch(4), seed=1, fvu=math.nan)
    sweep.add(switch(4), seed=2)
    rows = collect([sweep.path])
    write_results(rows, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        dense, finished, waiting = sorted(csv.DictReader(file), key=lambda record: record["seed"])
    assert (dense["fvu"], dense["delta_ce"], dense["config.sae.k"], dense["config.trainer.lr"]) == ("0.5", "0.25", "4", "")
    assert (finished["fvu"], finished["flops_total"]) == ("", str(SwitchSAE(switch(4), D).flops().total))
    assert (waiting["status"], waiting["fvu"], json.loads(waiting["config.baselines"])) == ("waiting", "", [])
    write_summary(rows, tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="") as file:
        records = {record["architecture"]: record for record in csv.DictReader(file)}
    assert (records["topk"]["fvu"], records["topk"]["fvu_sd"], records["topk"]["seeds"]) == ("0.5", "", "1")
    assert (records["switch"]["seeds"], records["switch"]["unfinished"]) == ("1", "1")


def test_parquet_keeps_types(sweep, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    sweep.add(topk(), seed=0, fvu=0.5)
    sweep.add(switch(4), seed=1)
    write_results(collect([sweep.path]), tmp_path / "r.parquet")
    frame = pandas.read_parquet(tmp_path / "r.parquet")
    dense = frame[frame.architecture == "topk"].iloc[0]
    assert (dense["fvu"], dense["config.sae.k"], dense["seed"]) == (0.5, 4, 0) and frame["num_latents"].dtype.kind == "i"
    assert frame["fvu"].isna().sum() == 1


def test_a_folder_that_cannot_be_written_is_named(sweep, tmp_path):
    sweep.add(topk(), fvu=0.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/r\.csv"):
        write_results(collect([sweep.path]), tmp_path / "file" / "r.csv")


def test_seeds_sizes_and_bookkeeping_are_no_settings(sweep):
    sweep.add(topk(), fvu=0.5)
    settings = collect([sweep.path])[0].settings
    assert {"trainer.lr", "sae.auxk", "tokens", "source.d_in"} <= set(settings)
    assert not {"seed", "source.seed", "runs", "name", "sae.k", "device", "wandb.mode"} & set(settings)


def default_run(sweep, seed=0, main=None, fvu=0.4):
    """What `make train` gives: the main SAE, and beside it a dense one and its own with a frozen router, which scores worse."""
    main = main or switch(4)
    run = sweep.add(main, seed, fvu=fvu, weights=True)
    return sweep.beside(sweep.beside(run, "flop_matched", topk(20), 0.5), "frozen_router", frozen(main), 0.6)


def test_a_frozen_router_beside_the_main_sae_is_never_what_is_usual_in_any_order(sweep):
    default_run(sweep)
    rows = collect([sweep.path])
    assert [row.sae for row in rows] == ["switch", "frozen_router", "flop_matched"] or [row.sae for row in rows[:2]] == ["switch", "frozen_router"]
    texts = set()
    for order in permutations(rows):
        assert usual_settings(order)["sae.router.train"] is True
        assert [group.name for group in summary(order)] == [group.name for group in summary(rows)]
        texts.add(summary_table(order))
    (text,) = texts
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["frozen_router"].endswith("router.train=False") and "router.train" not in lines["switch"] and "0.6000" in lines["frozen_router"]
    assert "Trained beside a main SAE: frozen_router (switch), flop_matched (topk)." in text


@pytest.mark.parametrize("second", ["hard gate", "another router", "frozen by wish", "more tokens"])
def test_mains_that_tie_are_decided_by_the_defaults_and_not_by_their_order(sweep, second):
    default_run(sweep)
    other = {
        "hard gate": switch(4, gate=Gate.hard), "frozen by wish": frozen(switch(4)),
        "another router": replace(switch(4), router=ROUTERS["cosine_kmeans"].Config()), "more tokens": switch(4),
    }[second]  # fmt: skip
    run = sweep.add(other, 1, fvu=0.3)
    if second == "more tokens":
        saved = run.read_json("config.json") | {"tokens": 2_500_000}
        run.write_json("config.json", saved)
        RunDir(sweep.path).write_json("sweep.json", {"name": "fake", "members": sweep.members | {run.path.name: saved}})
    rows = collect([sweep.path])
    found = [usual_settings(order) for order in permutations(rows)]
    assert all(usual == found[0] for usual in found)
    assert (found[0]["sae.router.train"], found[0]["sae.router.gate"], found[0]["sae.router.kind"]) == (True, "probability", "softmax")
    assert found[0]["tokens"] == (2_500_000 if second == "more tokens" else 1000)
    assert {row.role for row in rows if row.config.get("sae.router.train") is False} >= {"baseline"}
    names = {group.name for group in summary(rows) if group.first.config.get("sae.router.train") is False}
    assert names == ({"switch"} if second == "frozen by wish" else {"frozen_router"})  # a main SAE is called by what it is


def test_of_one_seed_the_main_sae_stays_and_then_the_newest_run(sweep, tmp_path):
    sweep.beside(sweep.add(switch(4), fvu=0.4), "width_matched", topk(), 0.7)
    sweep.add(topk(), fvu=0.5)
    rows = collect([sweep.path])
    for order in permutations(rows):
        group = next(group for group in summary(order) if group.first.architecture == "topk")
        assert (group.name, group.mean(HEADLINE), group.repeated) == ("topk", 0.5, 1)


def test_where_a_cache_lies_makes_no_other_experiment_but_whether_there_is_one_does(tmp_path):
    sweeps = [FakeSweep(tmp_path / str(place), cache=cache) for place, cache in enumerate(("/a", "/b", None))]
    for seed, sweep in enumerate(sweeps):
        sweep.add(topk(), seed, fvu=0.5)
    rows = collect([tmp_path])
    assert sorted(len(group.rows) for group in summary(rows)) == [1, 2]
    assert config_columns(rows) == ["source.cache"] and "source.cache=False" in summary_table(rows)
    assert [row.config["source.cache"] for row in rows] == ["/a", "/b", None]


def test_no_word_is_cut_and_long_notes_go_below_their_row(sweep):
    for value in (1e-3, 2e-3):
        run = sweep.add(switch(4, encoder_bias=False, load_balance=value), fvu=0.25, delta_ce=0.5, load_cv=0.1)
        saved = run.read_json("config.json")
        saved["evaluation"]["downstream_contexts"] = int(1e6 * value)
        sweep.members[run.path.name] = saved
    RunDir(sweep.path).write_json("sweep.json", {"name": "fake", "members": sweep.members})
    text = summary_table(collect([sweep.path]))
    for word in ("evaluation.downstream_contexts=1000", "router.load_balance=0.001"):
        assert word in text.replace("Where", "") and max(map(len, text.splitlines())) <= 150

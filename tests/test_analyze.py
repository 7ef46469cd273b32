"""Analyses: what they compute stays in the run folder until weights or settings change, and needs that are not met are named."""

import csv
import json
import os
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_report import tiny_run

from experiments import analyze as command
from switch_sae.activations import SyntheticSource
from switch_sae.analysis import ANALYSES, Analysis, analyze, build_analysis
from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.analysis.recurrence import _rotation
from switch_sae.models import TopKSAE
from switch_sae.results import collect


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyze")
    return [tiny_run(folder), tiny_run(folder, sae=TopKSAE.Config(num_latents=32, k=4))]


@pytest.fixture
def rows(runs, tmp_path):
    for run in runs:
        shutil.copytree(run.path, tmp_path / run.path.name)
    return collect([tmp_path])


class Agreement(Analysis):
    """Mean cosine of two SAEs' reconstructions on held-out rows: an analysis of several SAEs that needs activations."""

    @dataclass
    class Config:
        pass

    needs, each_alone = "rows", False
    computed = 0

    def compute(self, saes, source):
        type(self).computed += 1
        x_TD = source.evaluation_set(50).x_TD
        with torch.no_grad():
            first, second = (row.load()(x_TD).recon_TD for row in saes[:2])
        return [{"saes": len(saes), "cosine": float(torch.cosine_similarity(first, second).mean()), "nothing": float("nan")}]

    def draw(self, table):
        raise NotImplementedError


def test_duplication_says_what_the_geometry_does_and_is_computed_once(rows, monkeypatch):
    table = analyze("duplication", rows, {"threshold": 0.5})
    assert len(table) == 4 and all(list(record) == list(table[0]) for record in table)
    for row, record in zip(rows, table, strict=True):
        geometry = decoder_geometry(row.load().decoder_weight(), row.num_experts, row.firing_counts)
        shares = geometry.duplicate_shares(0.5)
        assert (record["sae"], record["duplicates"], record["across"]) == (row.name, shares["any"], shares["across"])
    other = analyze("duplication", rows, {"threshold": 0.9})
    monkeypatch.setattr("switch_sae.analysis.duplication.decoder_geometry", None)
    assert analyze("duplication", rows, {"threshold": 0.5}) == table and analyze("duplication", rows) == other
    file = rows[0].model_file
    os.utime(file, ns=(1, 1))
    with pytest.raises(TypeError):
        analyze("duplication", rows)


def test_what_other_code_computed_is_computed_again(rows, monkeypatch):
    table = analyze("duplication", rows[:1])
    monkeypatch.setattr("switch_sae.analysis.base._code", lambda analysis: "mended")
    monkeypatch.setattr("switch_sae.analysis.duplication.decoder_geometry", None)
    with pytest.raises(TypeError):
        analyze("duplication", rows[:1])
    monkeypatch.undo()
    assert analyze("duplication", rows[:1]) == table


def test_an_analysis_of_several_saes_gets_its_rows_and_keeps_what_it_found(rows, monkeypatch):
    monkeypatch.setitem(ANALYSES, "agreement", Agreement)
    (record,) = analyze("agreement", rows)
    assert record["saes"] == 4 and -1 <= record["cosine"] <= 1 and record["nothing"] is None
    assert analyze("agreement", rows) == [record] and Agreement.computed == 1
    assert len(analyze("agreement", rows[:2])) == 1 and Agreement.computed == 2
    assert analyze("agreement", rows, open_source=None) == [record]  # kept: no source is needed
    kept = json.loads((rows[0].model_file.parent / "analysis" / "agreement.json").read_text())
    assert [len(one["models"]) for one in kept] == [4, 2]


def test_mistakes_are_named(rows, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown analysis 'dup'; this version knows duplication, recurrence"):
        analyze("dup", rows)
    with pytest.raises(ValueError, match=r"unknown settings \['thresh'\].*it has \['threshold'\]"):
        analyze("duplication", rows, {"thresh": 0.5})
    with pytest.raises(ValueError, match=r"threshold=2\.0 must lie between 0 and 1"):
        analyze("duplication", rows, {"threshold": 2.0})
    with pytest.raises(ValueError, match="no SAEs to analyse"):
        analyze("duplication", [])
    monkeypatch.setitem(ANALYSES, "agreement", Agreement)
    with pytest.raises(ValueError, match="needs rows, but no source"):
        analyze("agreement", rows, open_source=None)
    monkeypatch.setattr(Agreement, "needs", "text")
    with pytest.raises(ValueError, match=r"needs text, but the activations of .* come from no language model"):
        analyze("agreement", rows)
    rows[0].model_file.unlink()
    with pytest.raises(ValueError, match="have no weights"):
        analyze("duplication", rows)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two seeds of one SAE on the same activations."""
    folder = tmp_path_factory.mktemp("seeds")
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    return [tiny_run(folder, TopKSAE.Config(num_latents=32, k=4), seed, source=source).path for seed in (0, 1)]


def test_recurrence_equals_brute_force_and_its_null_is_a_rotation(seeds):
    rows = collect(seeds)
    analysis = build_analysis("recurrence", {"close": 0.8, "near": 0.5})
    table = analysis.compute(rows, None)
    assert [(record["seed"], record["other_seed"]) for record in table] == [(0, 1), (1, 0)]
    live = [F.normalize(row.load().decoder_weight().detach()[row.firing_counts > 0].double(), dim=1) for row in rows]
    for record, mine, other in zip(table, live, live[::-1], strict=True):
        nearest = [max(float(a @ b) for b in other) for a in mine]
        assert (record["live"], record["other_live"]) == (len(mine), len(other))
        assert record["close"] == sum(cosine >= 0.8 for cosine in nearest) / len(mine)
        assert record["near"] == sum(cosine >= 0.5 for cosine in nearest) / len(mine)
        assert record["cosine"] == pytest.approx(sum(nearest) / len(mine), rel=1e-5)
        assert 0 < record["null_cosine"] < 1 and record["null_cosine"] != record["cosine"]
    assert table == analysis.compute(rows[::-1], None)
    rotation = _rotation(16)
    assert torch.allclose(rotation @ rotation.T, torch.eye(16), atol=1e-5)
    assert len(analysis.draw(table).axes) == 3
    with pytest.raises(ValueError, match="no two of these SAEs differ only in their seed"):
        analysis.compute(rows[:1], None)
    with pytest.raises(ValueError, match=r"near=0.0 must lie between 0 and 1"):
        build_analysis("recurrence", {"near": 0})


def test_a_folder_that_cannot_be_written_costs_only_time(rows):
    (rows[0].model_file.parent / "analysis").write_text("in the way")
    assert analyze("duplication", rows[:1]) == analyze("duplication", rows[:1])


def test_the_command_prints_the_table_and_writes_it_with_a_figure(rows, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["analyze", "duplication", str(tmp_path), "--set", "threshold=0.3", "--out", str(tmp_path / "out")])
    command.main()
    said = capsys.readouterr().out
    assert all(row.name in said for row in rows) and f"written: {tmp_path}/out/duplication.csv, .png, .pdf" in said
    with (tmp_path / "out" / "duplication.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [float(record["duplicates"]) for record in written] == [r["duplicates"] for r in analyze("duplication", rows, {"threshold": 0.3})]
    assert (tmp_path / "out" / "duplication.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["analyze", "nothing", str(tmp_path)])
    with pytest.raises(SystemExit):
        command.main()
    assert "unknown analysis 'nothing'" in capsys.readouterr().err

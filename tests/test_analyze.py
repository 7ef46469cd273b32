"""Analyses: what they compute stays in the run folder until weights or settings change, and needs that are not met are named."""

import csv
import json
import os
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
from test_report import tiny_run

from experiments import analyze as command
from switch_sae.activations import build_source
from switch_sae.analysis import ANALYSES, Analysis, analyze
from switch_sae.analysis.geometry import decoder_geometry
from switch_sae.config import config_from_plain
from switch_sae.models import TopKSAE
from switch_sae.results import collect
from switch_sae.runs import RunDir


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


def source_of(row):
    config = config_from_plain(RunDir(row.path).read_json("config.json"))
    return build_source(config.source, config.batch_size)


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


def test_an_analysis_of_several_saes_gets_its_rows_and_keeps_what_it_found(rows, monkeypatch):
    monkeypatch.setitem(ANALYSES, "agreement", Agreement)
    (record,) = analyze("agreement", rows, None, source_of)
    assert record["saes"] == 4 and -1 <= record["cosine"] <= 1 and record["nothing"] is None
    assert analyze("agreement", rows, None, source_of) == [record] and Agreement.computed == 1
    assert len(analyze("agreement", rows[:2], None, source_of)) == 1 and Agreement.computed == 2
    assert analyze("agreement", rows) == [record]  # kept: no source is needed
    kept = json.loads((rows[0].model_file.parent / "analysis" / "agreement.json").read_text())
    assert [len(one["models"]) for one in kept] == [4, 2]


def test_mistakes_are_named(rows, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown analysis 'dup'; this version knows duplication\."):
        analyze("dup", rows)
    with pytest.raises(ValueError, match=r"unknown settings \['thresh'\].*it has \['threshold'\]"):
        analyze("duplication", rows, {"thresh": 0.5})
    with pytest.raises(ValueError, match=r"threshold=2\.0 must lie between 0 and 1"):
        analyze("duplication", rows, {"threshold": 2.0})
    with pytest.raises(ValueError, match="no SAEs to analyse"):
        analyze("duplication", [])
    monkeypatch.setitem(ANALYSES, "agreement", Agreement)
    with pytest.raises(ValueError, match="needs rows, but no source"):
        analyze("agreement", rows)
    monkeypatch.setattr(Agreement, "needs", "text")
    with pytest.raises(ValueError, match=r"needs text, but the activations of .* come from no language model"):
        analyze("agreement", rows, None, source_of)
    rows[0].model_file.unlink()
    with pytest.raises(ValueError, match="have no weights"):
        analyze("duplication", rows)


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

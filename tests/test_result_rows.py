"""Rows of real runs: what is trained, what trains beside and what is a control; a file is parsed once for as long as it stays the same."""

import pytest
from test_report import tiny_run

from switch_sae.report import margins, table
from switch_sae.results import collect, scored
from switch_sae.results.kind import Kind
from switch_sae.runs import RunDir


@pytest.fixture
def run(tmp_path):
    return tiny_run(tmp_path)


def test_every_row_has_a_role_and_controls_come_only_if_asked_for(run):
    trained = {"switch": "main", "flop_matched": "baseline", "frozen_router": "baseline"}
    assert {row.sae: row.role for row in collect([run.path])} == trained
    everything = {row.sae: row for row in collect([run.path], controls=True)}
    assert {sae: row.role for sae, row in everything.items()} == trained | {"pca_4": "control", "untrained": "control"}
    assert [row.sae for row in scored([run])] == ["switch", "flop_matched", "frozen_router", "pca_4", "untrained"]
    assert everything["flop_matched"].kind == Kind("topk") and everything["frozen_router"].kind == Kind("switch", 4)
    assert [row.has_weights for row in everything.values()].count(True) == 3 and not everything["untrained"].has_weights
    assert type(everything["flop_matched"].load()).__name__ == "TopKSAE" and everything["pca_4"].firing_counts.shape == (8,)


def test_files_without_roles_are_read_by_their_order(run):
    saved = run.read_json("results.json")
    for entry in (*saved["members"].values(), *saved["controls"].values()):
        entry.pop("role", None)
    run.write_json("results.json", saved)
    assert [row.role for row in scored([run])] == ["main", "baseline", "baseline", "control", "control"]


def test_a_file_is_parsed_once_until_it_changes(run, monkeypatch):
    read, names = RunDir.read_json, []
    monkeypatch.setattr(RunDir, "read_json", lambda self, name: names.append(name) or read(self, name))
    first = table([run]) + margins(run)
    collect([run.path])
    assert names.count("results.json") == 1
    saved = read(run, "results.json")
    saved["members"]["switch"]["metrics"]["fvu_inliers"] = {"value": 0.125, "low": None, "high": None}
    run.write_json("results.json", saved)
    assert "0.1250" in table([run]) and "0.1250" not in first and names.count("results.json") == 2

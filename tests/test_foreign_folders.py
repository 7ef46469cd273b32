"""Folders of other libraries among one's runs: passed over and named, never a traceback; damaged ones of ours are told."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from experiments import analyze, evaluate, figures, results, resume, run_notebook
from switch_sae.orchestrator import resume_training
from switch_sae.results.rows import collect, finished_runs
from switch_sae.runs import RunDir

FINISHED = Path(__file__).resolve().parent / "data" / "version1" / "finished"
FOREIGN = {
    "sparsify": {"config.json": {"trainer": {"k": 8}}},
    "huggingface": {"config.json": {"model_type": "gpt2", "seed": 1, "sae": None}, "results.json": {"acc": 0.5}},
    "a_list": {"config.json": [1, 2], "results.json": [3]},
    "a_sweep": {"sweep.json": {"method": "bayes", "members": 4}},
    "its_sweep": {"sweep.json": {"members": {"a": {"lr": 1}}}},
    "cut": {"config.json": '{"sae": {"arch'},
    "binary": {"config.json": b"\xff\xfe\x00"},
}


def write(folder: Path, files: dict) -> None:
    folder.mkdir(parents=True)
    for name, value in files.items():
        (folder / name).write_bytes(value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode())


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder `runs` with one run of ours among those of others, one of which holds another of ours."""
    monkeypatch.chdir(tmp_path)
    for name, files in FOREIGN.items():
        write(tmp_path / "runs" / name, files)
    shutil.copytree(FINISHED, tmp_path / "runs" / "ours")
    shutil.copytree(FINISHED, tmp_path / "runs" / "sparsify" / "inside")
    return Path("runs")


def test_rows_are_those_of_our_runs_and_the_others_are_named_once(runs):
    said: list[str] = []
    rows = collect([runs], say=said.append)
    assert {row.path.name for row in rows} == {"ours", "inside"}
    (line,) = said
    assert line.startswith("left out, as their config.json or sweep.json is not of this library") and all(f"runs/{name}" in line for name in FOREIGN)
    assert collect([runs / "ours"], say=lambda line: pytest.fail(line))
    assert [run.path.name for run in finished_runs(runs)] == ["ours"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_that_is_given_is_refused_by_every_command(name, runs, monkeypatch, capsys):
    alone = Path("alone")
    write(alone, FOREIGN[name])
    for module, words in ((results, [str(alone)]), (figures, [str(alone), "--out", "f"]), (analyze, ["duplication", str(alone)]),
                          (evaluate, [str(alone)]), (resume, [str(alone)]), (run_notebook, [str(alone)])):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["command", *words])
        with pytest.raises(SystemExit) as end:
            module.main()
        told = capsys.readouterr().err
        assert end.value.code == 1 and told.count("error: ") == 1 and "alone" in told, told


@pytest.mark.parametrize("damage", ['{"sae": {"arch', "[]", '{"trainer": {"k": 8}}'])
def test_a_damaged_config_beside_our_results_is_told(damage, runs):
    (runs / "ours" / "config.json").write_text(damage)
    with pytest.raises(ValueError, match=r"runs/ours/config.json .*Restore it"):
        collect([runs], say=lambda line: None)


@pytest.mark.parametrize(
    "plain", [{"sae": 5}, {"trainer": 5}, {"baselines": 5}, {"source": None}, {"wandb": "offline"}, {"evaluation": {"rows": "x"}}]
)
def test_a_config_with_values_of_the_wrong_kind_is_refused_with_a_message(plain, tmp_path):
    shutil.copytree(FINISHED, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    run.write_json("config.json", run.read_json("config.json") | plain)
    with pytest.raises((ValueError, FileNotFoundError)):
        resume_training(run.path)

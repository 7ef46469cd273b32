"""The comparison notebook runs on any finished runs: cell by cell in this process, and through a real kernel."""

import os
import sys

import pytest
from test_report import tiny_run

from experiments import run_notebook
from switch_sae.runs import RunDir

jupytext = pytest.importorskip("jupytext")
pytest.importorskip("IPython")
pytest.importorskip("scipy")


SAYS = {
    "compare": (
        *("2 switch", "FVU of switch relative to", "NMI of experts and topics 0.", "of the directions of flop_matched are in switch", "cut into 4"),
        *("has the least error of 3 trained SAEs", "of its latents are dead"),
    ),
    "router": (
        "SAEs with experts",
        "dense encoder rows explain",
        "principal components",
        "tell their own expert's decoder from others' with AUC",
        "less error than its routes (regret",
    ),
    "similarity": ("6 SAEs of the same activations", "Without routes the codes' agreement is", "are alike with Spearman 0."),
    "features": ("kinds: ", "many_to_one", "recurs", "activation", "covered", "have a partner in their direction", "Their fates: matched"),
    "description_length": ("exact k, dense with classes", "Gaussian code without an SAE takes", "saved over seeds"),
}
"""What each notebook must print."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook") / "runs"
    return [tiny_run(folder), tiny_run(folder, seed=1)]


@pytest.mark.parametrize("name", run_notebook.NOTEBOOKS)
def test_its_cells_run_in_order_on_the_newest_runs(name, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs[0].path.parents[1])
    monkeypatch.delenv("SWITCH_SAE_RUNS", raising=False)
    for pairs in ("RESAMPLED_PAIRS", "PAIRS_OF_PAIRS", "ORDERED_PAIRS"):  # so many are for trained runs
        monkeypatch.setattr(f"switch_sae.analysis.likeness.comparing.{pairs}", 2000)
    monkeypatch.setattr("switch_sae.analysis.likeness.calibration.MOST_DOCUMENTS", 40)
    before = {file for file in runs[0].path.rglob("*")}
    names = {"__name__": "__main__"}
    for cell in jupytext.read(run_notebook.NOTEBOOKS[name]).cells:
        if cell.cell_type == "code":
            source = cell.source.replace('"rows": 20_000', '"rows": 2_000')  # of the lab's notebooks: so many are for trained runs
            exec(compile(source, f"{name}.py", "exec"), names)
    assert {run.path.name for run in names["RUNS"]} == {run.path.name for run in runs}
    said = capsys.readouterr().out
    for line in SAYS[name]:
        assert line in said, line
    assert "NOT COMPARABLE" not in said
    written = {file for file in runs[0].path.rglob("*")} - before
    assert all("analysis" in file.relative_to(runs[0].path).parts for file in written), "beside kept tables the notebook wrote into the run"


def test_a_real_kernel_executes_it_and_the_outputs_are_kept(runs, monkeypatch, capsys):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["run_notebook", str(runs[0].path)])
    run_notebook.main()
    out = runs[0].path / "compare.ipynb"
    assert f"notebook: {out}" in capsys.readouterr().out
    notebook = nbformat.read(out, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "switch" in "".join(output.text for output in outputs if output.output_type == "stream")


def test_it_says_when_there_is_nothing_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_notebook"])
    with pytest.raises(SystemExit):
        run_notebook.main()
    assert "no finished run" in capsys.readouterr().err


def test_it_says_which_package_is_missing(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    with pytest.raises(ModuleNotFoundError, match=r"jupytext is not installed.*\[notebook\]"):
        run_notebook.execute(run_notebook.NOTEBOOKS["compare"], runs, runs[0].path / "never.ipynb")


def test_a_failing_cell_is_told_and_the_outputs_before_it_are_kept(runs, tmp_path):
    pytest.importorskip("nbclient")
    failing = tmp_path / "failing.py"
    failing.write_text("# %%\nprint('before')\n\n# %%\nraise ValueError('on purpose')\n")
    out = tmp_path / "out.ipynb"
    with pytest.raises(SystemExit, match="on purpose"):
        run_notebook.execute(failing, [RunDir(runs[0].path)], out)
    assert "before" in out.read_text() and os.listdir(tmp_path).count("out.ipynb") == 1

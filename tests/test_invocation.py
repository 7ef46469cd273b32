"""What is typed where: by make and python -m in a clone, as switch-sae from a wheel; no message knows one of them by heart."""

import ast
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import switch_sae
from experiments import __main__ as script
from switch_sae import invocation as spoken
from switch_sae.invocation import COMMANDS, as_typed, how_to_resume, invocation

ROOT = Path(__file__).resolve().parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
WAYS = {"make": "make", "module": "python -m experiments.", "script": "switch-sae"}


@pytest.fixture
def way(monkeypatch):
    """Sets the way that a person is taken to have used."""
    return lambda name: monkeypatch.setattr(spoken, "_way", lambda: WAYS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_with_a_main_and_says_whether_it_is_a_target_of_make(name):
    assert callable(importlib.import_module(f"experiments.{COMMANDS[name].module}").main)
    assert COMMANDS[name].is_target == (name in TARGETS)


def test_every_command_of_the_clone_is_in_the_table():
    modules = {path.stem for path in (ROOT / "experiments").glob("*.py") if re.search(r"^def main\(", path.read_text(), re.MULTILINE)}
    assert modules - {"__main__"} == {command.module for command in COMMANDS.values() if "." not in command.module}


@pytest.mark.parametrize(
    ("arguments", "folders", "make", "module", "told"),
    [
        (("train",), {}, "make train", "python -m experiments.train", "switch-sae train"),
        (
            ("train",), {"resume": "runs/a b"}, "make train RESUME='runs/a b'", "python -m experiments.resume 'runs/a b'",
            "switch-sae resume 'runs/a b'",
        ),
        (("sweep",), {"resume": "x"}, "make sweep RESUME=x", "python -m experiments.sweep --resume x", "switch-sae sweep --resume x"),
        (("evaluate",), {"run": Path("$x")}, "make evaluate RUN='$$x'", "python -m experiments.evaluate '$x'", "switch-sae evaluate '$x'"),
        (("figures",), {"runs": ["a b", "c"]}, None, "python -m experiments.figures 'a b' c", "switch-sae figures 'a b' c"),
        (("notebook",), {"runs": ["a"]}, "make notebook RUNS=a", "python -m experiments.run_notebook a", "switch-sae notebook a"),
        (("results", "--out", "F"), {}, "make results ARGS='--out F'", "python -m experiments.results --out F", "switch-sae results --out F"),
        (("sweep", "sweep.experts=[4]"), {"make": "EXPERTS=4"}, "make sweep EXPERTS=4", "python -m experiments.sweep 'sweep.experts=[4]'", None),
        (("train", "sae=switch", "start_from=a b"), {}, None, "python -m experiments.train sae=switch 'start_from=a b'", None),
        (("upcycle",), {"run": "x"}, "python -m experiments.upcycle x", "python -m experiments.upcycle x", "switch-sae upcycle x"),
        (("real-model",), {}, "make real-model", "python -m experiments.real.model", "switch-sae real-model"),
    ],
)  # fmt: skip
def test_the_three_ways_say_the_same(arguments, folders, make, module, told, way):
    way("make")
    by_make = invocation(*arguments, **folders)
    way("module")
    by_module = invocation(*arguments, **folders)
    way("script")
    by_script = invocation(*arguments, **folders)
    assert by_make == (make or by_make) and by_module == module and by_script == (told or by_script)
    words = shlex.split(by_module)[2:]
    assert shlex.split(by_script) == ["switch-sae", next(n for n in COMMANDS if f"experiments.{COMMANDS[n].module}" == words[0]), *words[1:]]
    if by_make.startswith("make"):
        line = f"make --no-print-directory -n {by_make.removeprefix('make ')} VENV={shlex.quote(sys.prefix)}"
        done = subprocess.run(("bash", "-c", line), cwd=ROOT, capture_output=True, text=True)
        (command,) = [line for line in done.stdout.splitlines() if " -m experiments." in line]
        run = shlex.split(command)
        with_defaults = {"figures": [*words, "--out", "figures"], "results": [words[0], "runs", *words[1:]]}  # of make
        assert run[run.index("-m") + 1 :] == with_defaults.get(arguments[0], words)


def test_the_way_is_the_one_that_was_used(monkeypatch):
    def used(argv0: str, module: str | None, by_make: bool) -> str:
        monkeypatch.setattr(sys, "argv", [argv0])
        main = ModuleType("__main__")
        main.__spec__ = SimpleNamespace(name=module) if module else None
        monkeypatch.setitem(sys.modules, "__main__", main)
        monkeypatch.delenv("MAKELEVEL", raising=False)
        if by_make:
            monkeypatch.setenv("MAKELEVEL", "1")
        return spoken._way()

    assert used("/x/bin/switch-sae", None, False) == used("switch-sae train", None, True) == WAYS["script"]
    assert used("/clone/experiments/train.py", "experiments.train", False) == WAYS["module"]
    assert used("/clone/experiments/train.py", "experiments.train", True) == WAYS["make"]
    assert used("/elsewhere/own.py", None, False) == used("", None, False) == WAYS["make"]
    assert used("/x/switch-sae-notes.py", None, False) == WAYS["make"]
    monkeypatch.setattr(spoken, "_project", dict)
    assert used("/elsewhere/own.py", None, True) == used("", None, False) == WAYS["script"]


def test_a_failed_write_says_how_to_go_on(way):
    way("make")
    assert how_to_resume() == "go on with RESUME=<run folder>"
    way("script")
    assert how_to_resume() == "go on with switch-sae resume RUN, or switch-sae sweep --resume SWEEP"


@pytest.mark.parametrize("name", COMMANDS)
def test_helps_name_the_commands_that_their_readers_have(name, way):
    text = importlib.import_module(f"experiments.{COMMANDS[name].module}").__doc__
    way("module")
    assert as_typed(text) == text and f"python -m experiments.{COMMANDS[name].module}" in text
    way("script")
    assert "python -m" not in as_typed(text) and f"switch-sae {name} " in as_typed(text) + " "


def test_benchmarks_need_a_clone_and_keep_their_names(way):
    way("script")
    assert as_typed("python -m experiments.benchmarks.cpu; python -m experiments.training") == (
        "python -m experiments.benchmarks.cpu; python -m experiments.training"
    )


def test_what_a_wheel_holds_of_the_commands_imports_nothing_by_its_name_in_the_clone():
    files = [*(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments/real").glob("*.py"), *(ROOT / "experiments/notebooks").glob("*.py")]
    clone_only = re.compile(r"^\s*(?:from|import) (?:experiments|tests)\b", re.MULTILINE)
    assert [path.name for path in files if clone_only.search(path.read_text())] == [] and clone_only.search("from experiments.errors import x")


def messages(path: Path) -> list[tuple[int, str]]:
    """(line, text) of every string of a module that is no docstring."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [(n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]


def test_no_message_knows_a_command_by_heart():
    """It would be wrong for those who type another: `invocation` says it. Lines about the benchmarks and the hub's own tools are for clones."""
    targets, names = "|".join(sorted(TARGETS)), "|".join(COMMANDS)
    known = re.compile(rf"\bmake ({targets})\b|experiments\.(?!benchmarks)[a-z]|\bRESUME=|ARGS=|switch-sae ({names})\b")
    files = [*(ROOT / "switch_sae").rglob("*.py"), *(ROOT / "experiments").glob("*.py"), *(ROOT / "experiments/real").glob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        if path.name != "invocation.py"
        for line, text in messages(path)
        if known.search(text)
    ]
    assert found == []
    assert known.search("Go on with make train RESUME=x") and known.search("python -m experiments.upcycle") and not known.search("would make it slow")


def test_the_version_is_the_clones_own_whatever_is_installed(monkeypatch):
    assert switch_sae.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"switch-sae": "7.8.9"}[name])
    assert spoken.version() == switch_sae.__version__
    monkeypatch.setattr(spoken, "_project", dict)  # as in site-packages
    assert spoken.version() == "7.8.9"

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert spoken.version() == "unknown"


@pytest.mark.parametrize("text", [None, "[project", '[project]\nname = "another"\nversion = "3"', "[tool.x]"])
def test_somebody_elses_pyproject_beside_the_package_makes_no_clone(text, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(spoken, "_ROOT", tmp_path)
    monkeypatch.setattr(spoken, "_project", spoken._project.__wrapped__)
    assert not spoken.is_clone()


def test_the_script_lists_its_commands_and_refuses_others(monkeypatch, capsys):
    def typed(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["/x/bin/switch-sae", *words])
        script.main()
        return capsys.readouterr().out, " ".join(sys.argv)

    overview = typed("--help")[0]
    assert overview == typed()[0] == typed("-h")[0] and max(map(len, overview.splitlines())) <= 120
    assert re.findall(r"^  ([\w-]+) +\S", overview, re.MULTILINE) == list(COMMANDS)
    assert typed("--version")[0] == f"switch-sae {switch_sae.__version__}\n"
    with pytest.raises(SystemExit) as ended:
        typed("trian", "x")
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 1 and told.startswith("error: there is no command trian. Close to it: train. Commands are train, resume,")
    assert "\n" not in told
    with pytest.raises(SystemExit) as ended:
        typed("figures", "--help")
    told = capsys.readouterr().out
    assert ended.value.code == 0 and told.startswith("usage: switch-sae figures [-h]") and "switch-sae figures runs/sweep --out figures" in told

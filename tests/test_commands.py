"""Every command and setting that the project's texts name: make targets, python -m lines and settings are found, expanded and composed or parsed."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.compose import CONF, register_schemas, run_config, sweep_config
from switch_sae.invocation import COMMANDS as SCRIPTED

register_schemas()
ROOT = Path(__file__).resolve().parents[1]
HYDRA = {"experiments.train": ("train", run_config), "experiments.sweep": ("sweep", sweep_config)}
VARIABLE = r"[A-Z]+=(?:'[^']*'|\"[^\"]*\"|[^\s`'\"{};)]*)"
MAKE = re.compile(rf"make ([a-z]+(?:-[a-z]+)*)((?: {VARIABLE})*)")
SCRIPT = re.compile(r"(?<![\w/.-])switch-sae ([a-z][a-z-]*)( .*)?")
PYTHON = re.compile(r"python3? -m ((?:experiments)[\w.]*)(.*)")
SETTING = re.compile(r"`([a-z_]+(?:[./][a-z_]+)*=[^`\s]+)`")


def texts() -> Iterator[tuple[str, str, bool]]:
    """(where, text, whether every line of it may be a command): Markdown, YAML comments, the Makefile, docstrings and messages of the code."""
    for path in (ROOT / "README.md", ROOT / "switch_sae/bundled/README.md", *sorted((ROOT / "docs").glob("*.md"))):
        yield path.name, path.read_text(), True
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        yield str(path.relative_to(ROOT)), "\n".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")), True
    yield "Makefile", "\n".join(line.partition("## ")[2] for line in (ROOT / "Makefile").read_text().splitlines()), True
    for path in sorted([*(ROOT / "switch_sae").rglob("*.py"), *(ROOT / "experiments").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        source, name = path.read_text(), str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{name}:{node.lineno}", node.value, True
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "runs/some" for part in node.values)
                yield f"{name}:{node.lineno}", "".join(map(str, parts)), False
        yield name, "\n".join(line.lstrip("# ") for line in source.splitlines() if line.lstrip().startswith("#")), True


def found_commands() -> list[tuple[str, str]]:
    """(where, command) of all texts, each command once; those of the script are given as the python -m lines that they are."""
    found: dict[str, str] = {}
    for where, text, _ in texts():
        for match in MAKE.finditer(text):
            before = text[max(0, match.start() - 1) : match.start()]
            if match[2] or before in ("`", "'") or match.start() == 0 or text[match.start() - 1] == "\n":
                command = match[0].rstrip(",:")
                found.setdefault(command if command.endswith("=...") else command.rstrip(".,:"), where)
        for line in re.split(r"[\n`]", text):
            if match := SCRIPT.search(line):
                assert match[1] in SCRIPTED, f"{where}: {match[0]}: switch-sae has no command {match[1]}"
                rest = (match[2] or "").split(" #")[0].split("  ")[0].rstrip(" .,)")
                found.setdefault(f"python -m experiments.{SCRIPTED[match[1]].module}{rest}", where)
            if match := PYTHON.search(line):
                found.setdefault(match[0].split("  ")[0].split(" #")[0].rstrip(" .)"), where)
    return [(where, command) for command, where in found.items()]


@cache
def targets() -> dict[str, str]:
    """Make's targets with their recipes."""
    text = (ROOT / "Makefile").read_text()
    return {match[1]: match[0] for match in re.finditer(r"^([a-z-]+):.*(?:\n\t.*)*", text, re.MULTILINE)}


def expanded(command: str) -> list[str]:
    """The python commands that a make command would run."""
    words = [word for word in shlex.split(command) if word != "..."]
    done = subprocess.run(("make", "-n", *words[1:], f"VENV={sys.prefix}"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [f"python -m {line.partition(' -m ')[2]}" for line in done.stdout.replace("\\\n", " ").splitlines() if " -m experiments" in line]


class Parsed(BaseException):
    """A command's arguments are right; it is not run."""


def check_python(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in shlex.split(command)[2:] if word != "..." and not word.startswith("[")]
    module, arguments = words[0], words[1:]
    if module in HYDRA and "--resume" not in arguments:
        check_composes(module, arguments)
        return
    if not arguments:  # a mention: it may need arguments that go without saying there
        assert importlib.util.find_spec(module) is not None
        return
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    parse = importlib.import_module("argparse").ArgumentParser.parse_known_args

    def parse_and_stop(self, *args, **kwargs):
        rest = parse(self, *args, **kwargs)[1]
        if rest and self.get_default("partial") is None:
            self.error(f"unrecognized arguments: {rest}")
        raise Parsed

    monkeypatch.setattr("argparse.ArgumentParser.parse_known_args", parse_and_stop)
    name = module if (ROOT / f"{module.replace('.', '/')}.py").is_file() else f"{module}.__main__"
    source = Path(importlib.util.find_spec(name).origin).read_text()
    with pytest.raises(Parsed):
        exec(
            compile(source, name, "exec"),
            {"__name__": "__main__", "__package__": name.rpartition(".")[0], "__file__": str(ROOT / (name.replace(".", "/") + ".py"))},
        )


def check_composes(module: str, arguments: list[str]) -> None:
    primary, typed = HYDRA[module]
    if "--config-dir" in arguments:  # with a file of the reader's own
        arguments = [word for word in arguments if word not in ("--config-dir", "FOLDER") and not word.startswith("experiment=")]
    if "--cfg" in arguments:
        arguments = [word for word in arguments if word not in ("--cfg", "job")]
    overrides = [word for word in arguments if not word.startswith(("--", "hydra")) and not re.fullmatch(r"(\w+=)?(KEY=VALUE|key=value)", word)]
    if "--multirun" in arguments:  # the first of each list
        overrides = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in overrides]
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        composed = compose(primary, overrides=overrides)
    if not any(re.search(r"=[A-Z_]{3,}$|=FOLDER", word) for word in overrides):
        typed(composed)


COMMANDS = found_commands()


def test_commands_are_found_in_every_kind_of_text():
    places = {where.split(":")[0] for where, _ in COMMANDS}
    assert {"README.md", "sweeps.md", "Makefile", "experiments/train.py", "conf/experiment/sweep/small/gate.yaml", "conf/train.yaml"} <= places
    assert len(COMMANDS) > 60
    commands = {command for _, command in COMMANDS}
    assert {"make train EXPERTS=8", "make test", "make sweep EXPERTS=1,2,4,8 K=16,32 SEEDS=3"} <= commands


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[command[:80] for _, command in COMMANDS])
def test_every_command_that_is_named_exists_and_takes_its_arguments(where, command, monkeypatch):
    if command.startswith("python"):
        check_python(command, monkeypatch)
        return
    _, target, *variables = shlex.split(command)
    assert target in targets(), f"{where}: make has no target {target}"
    text = (ROOT / "Makefile").read_text()
    for variable in variables:
        if "=" in variable:
            name = variable.split("=")[0]
            assert re.search(rf"\$[({{]{name}[)}},]|^{name} \?=|\bor \$\({name}\)", text, re.MULTILINE), f"{where}: no target reads {name}"
    for python in expanded(command):
        check_python(python, monkeypatch)


@pytest.mark.parametrize(
    "command", ["make train ARGS='sae=topk'", "make train ARGS='preset=paper sae=gated'", "make sweep EXPERTS=2 SEEDS=2 MATCH=active"]
)
def test_what_once_failed_composes(command, monkeypatch):
    (python,) = expanded(command)
    check_python(python, monkeypatch)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("make train MODEL='my models/llama é'", ['source.model="my models/llama é"']),
        ("make train MODEL=gpt2 TEXT='docs README.md'", ["model=gpt2", "source.text.dataset=null", 'source.text.paths=["docs","README.md"]']),
        ("make compare MODEL=./x.gguf TEXT=docs", ['source.model="./x.gguf"', 'source.text.paths=["docs"]']),
        ("make sweep TEXT='{spaced}'", ['source.text.paths=["{spaced}"]']),
        ("make results RUNS='{spaced}'", ["{spaced}"]),
        ("make figures RUNS='runs/a runs/b' OUT='my figures'", ["runs/a", "runs/b", "my figures"]),
        ("make notebook RUNS='{spaced}'", ["{spaced}"]),
        ("make evaluate RUN='runs/my run'", ["runs/my run"]),
        ("make train RESUME='runs/my run'", ["runs/my run"]),
    ],
)
def test_paths_with_spaces_stay_whole_through_make(command, words, tmp_path, monkeypatch):
    (tmp_path / "my run").mkdir()
    spaced = str(tmp_path / "my run")
    (python,) = expanded(command.format(spaced=spaced))
    assert {word.format(spaced=spaced) for word in words} <= set(shlex.split(python))
    check_python(python, monkeypatch)


@pytest.mark.parametrize("command", ["make sweep SEED=0,1,2", "make train EXPERTS=8 ARGS='sae=topk'", "make train ARGS='tokns=3'"])
def test_what_makes_no_sense_is_refused(command, monkeypatch):
    (python,) = expanded(command)
    with pytest.raises((HydraException, OmegaConfBaseException)):
        check_python(python, monkeypatch)


def settings() -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for where, text, _ in texts():
        if where.endswith(".md"):
            for match in SETTING.finditer(text):
                found.setdefault(match[1], where)
    return [(where, setting) for setting, where in found.items()]


@pytest.mark.parametrize(("where", "setting"), settings(), ids=[setting for _, setting in settings()])
def test_every_setting_that_is_named_is_one(where, setting):
    if setting.startswith("hydra/"):
        return
    extra = ["source.cache=FOLDER"] if setting.startswith("source.cache_dtype") else ["sae=jumprelu"] if setting.startswith("sparsity") else []
    extra += ["sae=switch_pursuit"] if setting.startswith("sae.stop") else ["sae=switch_refit"] if setting.startswith("sae.shared") else []
    problems = []
    for primary in ("train", "sweep"):
        try:
            with initialize_config_dir(version_base="1.3", config_dir=CONF):
                compose(primary, overrides=[*extra, setting])
            return
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(str(error))
    pytest.fail(f"{where}: {setting} is no setting of a run or a sweep: {problems}")


def blocks(path: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_the_grids_of_the_docs_plan_members():
    from omegaconf import OmegaConf
    from test_sweep import Measured

    from switch_sae.sweep import plan_members

    (block,) = blocks("docs/sweeps.md", "yaml")
    with initialize_config_dir(version_base="1.3", config_dir=CONF):
        composed = compose("sweep")
    OmegaConf.set_struct(composed, False)
    composed.merge_with(OmegaConf.create(block))
    members = plan_members(sweep_config(composed), Measured())
    assert len(members) == 3 * (
        4 + 3 + 3 + 2 + 3
    )  # the probability gate is one of the first four and any("router=cosine_kmeans" in name for name in members)


def test_the_readmes_python_runs():
    import torch

    finished = repr(str(ROOT / "tests/data/version1/finished"))
    code = [re.sub(r'load_sae\("[^"]*"', f"load_sae({finished}", block) for block in blocks("README.md", "python")]
    first, prompt, steering, second, training = code
    names = {"x": torch.randn(7, 12)}
    exec(first, names)
    assert torch.equal(names["recon"], names["sae"](names["x"]).recon_TD) and names["latents"].to_dense().shape == (7, 48)
    alone: dict = {}
    exec("\n".join(line for line in prompt.splitlines() if "import" in line), alone)
    assert callable(alone["inspect"]) and callable(alone["language_model"]) and "inspect(sae, " in prompt  # run in tests/test_own_code.py
    alone = {"x": names["x"]}
    exec(steering, alone)
    assert not torch.equal(alone["ablated"], names["recon"])
    recon = alone["folded"].encode(names["x"]).to_dense() @ alone["folded"].decoder_weight() + alone["folded"].b_out_D
    assert torch.allclose(recon, names["recon"], atol=1e-4) and alone["steer"](names["x"], None).shape == (7, 12)
    names = {}
    exec("\n".join(line for line in second.splitlines() if "import" in line), names)
    names |= {"RunConfig": None}
    exec(training.replace("run = run_training(", "config = ("), names)
    assert names["config"].sae.num_experts == 8 and callable(names["run_training"])
    assert "Downstream(source.language_model, rows)" in second and callable(names["Downstream"])

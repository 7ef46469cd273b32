"""The table of commands, and how they are typed where this code runs: by make or `python -m` in a clone, as `switch-sae` from a wheel."""

import importlib.metadata
import os
import re
import shlex
import sys
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = "switch-sae"
_MAKE, _MODULE = "make", "python -m experiments."
_ROOT = Path(__file__).resolve().parents[1]


class Command(NamedTuple):
    """A command of the table `COMMANDS`."""

    module: str
    """In experiments/, which a wheel holds as switch_sae.commands."""
    line: str
    """What it does, for `switch-sae --help`."""
    is_target: bool = True
    """Whether make has a target of that name."""


COMMANDS = {
    "train": Command("train", "train an SAE with its baselines, score it, draw its figures: switch-sae train sae.num_experts=8"),
    "resume": Command("resume", "go on with an interrupted run: switch-sae resume RUN", is_target=False),
    "sweep": Command("sweep", "many SAEs from one pass over the language model: switch-sae sweep 'sweep.experts=[1,8]' sweep.seeds=3"),
    "evaluate": Command("evaluate", "score a finished run again, on other rows or under other inferences: switch-sae evaluate RUN"),
    "results": Command("results", "the table of any run folders and sweeps, over seeds: switch-sae results runs"),
    "figures": Command("figures", "the paper's figures from any run folders and sweeps: switch-sae figures runs --out figures"),
    "analyze": Command("analyze", "an analysis of trained SAEs, its table and figure: switch-sae analyze duplication RUN"),
    "notebook": Command("run_notebook", "execute a notebook on finished runs: switch-sae notebook RUN --notebook compare"),
    "convert": Command("convert", "read and write other libraries' files: switch-sae convert RUN FOLDER --to sae_lens", is_target=False),
    "push": Command("push", "put an SAE on the Hugging Face hub, with a card: switch-sae push RUN user/repo", is_target=False),
    "upcycle": Command("upcycle", "split a dense SAE into experts: switch-sae upcycle RUN --experts 16 --out FOLDER", is_target=False),
    "surgery": Command("surgery", "merge copies of latents in several experts into shared ones: switch-sae surgery RUN --out FOLDER"),
    "real-model": Command("real.model", "a real language model without a hub, for model=real"),
    "real-text": Command("real.text", "English prose without a hub, for model=real"),
}


@cache
def _project() -> dict[str, Any]:
    """What pyproject.toml beside this package says of the project; empty where there is none of ours, as in site-packages."""
    try:
        found = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    except (OSError, ValueError, KeyError):
        return {}
    return found if found.get("name") == SCRIPT else {}


def is_clone() -> bool:
    """Whether this code runs from a clone, or another source tree, and not from an installed wheel."""
    return bool(_project())


def version() -> str:
    """Of this code: a clone's own, whatever was installed from it before; else the installed wheel's."""
    if is_clone():
        return str(_project()["version"])
    try:
        return importlib.metadata.version(SCRIPT)
    except importlib.metadata.PackageNotFoundError:  # the package's folder alone was copied somewhere
        return "unknown"


def _way() -> str:
    """The way that the person has used; from Python the clone's make, or the script."""
    if Path(sys.argv[0]).name.split(" ")[0] == SCRIPT or not is_clone():
        return SCRIPT
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    is_module = spec is not None and spec.name.partition(".")[0] == "experiments"
    if (is_module and "MAKELEVEL" not in os.environ) or not (_ROOT / "Makefile").is_file():
        return _MODULE
    return _MAKE


def invocation(name: str, *words: str, make: str | None = None, **folders: Any) -> str:
    """The command line of an entry of `COMMANDS`, ready to be pasted into a shell.

    `words` come after the command, and `make` is what make takes instead of them where it has variables of its own for them. `folders` are one of
    `resume` (an interrupted run, or sweep), `run`, and `runs`, a list.
    """
    way, (module, _, is_target) = _way(), COMMANDS[name]
    paths = {key: list(map(str, value)) if key == "runs" else [str(value)] for key, value in folders.items()}
    if way == _MAKE and is_target:
        variables = [make_variable(key.upper(), *paths[key]) for key in paths]
        return " ".join([_MAKE, name, *variables, *([make] if make else [make_variable("ARGS", *words)] if words else [])])
    if "resume" in paths and name != "sweep":
        name, module = "resume", COMMANDS["resume"].module
    options = ["--resume"] if "resume" in paths and name == "sweep" else []
    start = f"{SCRIPT} {name}" if way == SCRIPT else _MODULE + module
    return " ".join([start, *map(shlex.quote, [*options, *chain(*paths.values()), *words])])


def how_to_resume() -> str:
    """What to go on with after a failure, where it is not known of what."""
    if _way() == _MAKE:
        return "go on with RESUME=<run folder>"
    return f"go on with {invocation('train', resume='RUN')}, or {invocation('sweep', resume='SWEEP')}"


def as_typed(text: str) -> str:
    """`text`, which names commands by their modules, as in a clone, with what users of the script type instead."""
    if _way() != SCRIPT:
        return text
    for name, command in COMMANDS.items():
        text = re.sub(rf"{re.escape(_MODULE + command.module)}(?![\w.])", f"{SCRIPT} {name}", text)
    return text


def make_variable(name: str, *paths: str | Path) -> str:
    """`NAME=PATH` as it is typed after make, quoted where a shell or make would read it otherwise; of several paths, or of a name in the plural, each
    is a word of its own."""
    words = list(map(str, paths))
    text = " ".join(map(shlex.quote, words)) if name.endswith("S") else words[0]
    text = text.replace("$", "$$")
    if "'" in text and not set(text) & set('"\\`$!'):
        return f'{name}="{text}"'
    return f"{name}={shlex.quote(text)}"

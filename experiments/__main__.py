"""The console script switch-sae, which a wheel installs; in a clone `python -m experiments` is the same."""

import difflib
import importlib
import sys
from pathlib import Path

from switch_sae.invocation import COMMANDS, SCRIPT, version

from .errors import clear_errors


def overview() -> str:
    """All commands, with a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.line}" for name, command in COMMANDS.items()]
    options = f"{SCRIPT} COMMAND --help says what a command takes, {SCRIPT} --version which version this is."
    return "\n".join([f"usage: {SCRIPT} COMMAND ...", "", *lines, "", options, "Runs are written into runs/ in the current folder."])


def module_of(name: str) -> str:
    """The module of a command. Raises ValueError for what is none."""
    if name in COMMANDS:
        return COMMANDS[name].module
    alike = difflib.get_close_matches(name, COMMANDS, 2, 0.6)
    told = f" Close to it: {', '.join(alike)}." if alike else ""
    raise ValueError(f"there is no command {name}.{told} Commands are {', '.join(COMMANDS)}; {SCRIPT} --help has a line about each.")


def main() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(SCRIPT, version())
    else:
        with clear_errors():
            module = importlib.import_module(f".{module_of(name)}", __package__)
        start = SCRIPT if Path(sys.argv[0]).name == SCRIPT else "python -m experiments"
        sys.argv[:] = [f"{start} {name}", *words]
        module.main()


if __name__ == "__main__":
    main()

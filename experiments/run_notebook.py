"""Executes a notebook of experiments/notebooks on finished runs and writes it, with its outputs, as NAME.ipynb into the first run's folder.

python -m experiments.run_notebook                                   # compare, on the two newest runs in runs/
python -m experiments.run_notebook runs/a runs/b --notebook compare --out comparison.ipynb
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from switch_sae.files import user_path
from switch_sae.invocation import as_typed, invocation
from switch_sae.results import finished_runs
from switch_sae.runs import RunDir, write_atomically

from .arguments import parser_of
from .errors import clear_errors

NOTEBOOKS = {path.stem: path for path in sorted((Path(__file__).resolve().parent / "notebooks").glob("*.py"))}
NEWEST = 2


def execute(notebook_file: Path, runs: Sequence[RunDir], out: Path) -> None:
    """Runs a notebook in a Jupyter kernel of this Python and writes it to `out`.

    Raises ModuleNotFoundError without the notebook extra, and SystemExit, after writing the outputs so far, when a cell fails.
    """
    try:
        import ipykernel  # noqa: F401
        import jupytext
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed. Notebooks need their extra: pip install 'switch-sae[notebook]'") from error
    for run in runs:
        run.read_json("results.json")
    notebook = jupytext.reads(as_typed(notebook_file.read_text()), fmt="py")
    environment = {**os.environ, "SWITCH_SAE_RUNS": os.pathsep.join(str(run.path.resolve()) for run in runs)}
    # Below errors, the kernel only warns that it talks over TCP. It listens on this machine alone, and messages are signed.
    quiet = ["--log-level=ERROR"]
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": os.getcwd()}}, extra_arguments=quiet)
    failure = None
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        failure = error
    write_atomically(out, nbformat.writes(notebook).encode())
    if failure is not None:
        sys.exit(f"\nerror: a cell failed; the outputs up to it are in {out}.\n{failure}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("runs", nargs="*", help=f"folders of finished runs; default: the {NEWEST} newest in runs/")
    parser.add_argument("--notebook", choices=NOTEBOOKS, default="compare", help="default: compare")
    parser.add_argument("--out", type=user_path, help="where the notebook goes; default: NAME.ipynb in the first run's folder")
    arguments = parser.parse_args()
    with clear_errors():
        runs = [RunDir.open(path) for path in arguments.runs] or finished_runs("runs")[:NEWEST]
        if not runs:
            some = invocation("notebook", runs=["..."])
            raise FileNotFoundError(f"there is no finished run in runs/. Train one ({invocation('train')}), or give the folders of some: {some}")
        out = arguments.out or runs[0].path / f"{arguments.notebook}.ipynb"
        print(f"executing {arguments.notebook} on {', '.join(str(run.path) for run in runs)}")
        execute(NOTEBOOKS[arguments.notebook], runs, out)
        print(f"notebook: {out}")


if __name__ == "__main__":
    main()

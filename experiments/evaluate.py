"""Scores a finished run again, on other rows or contexts of the same held-out text, and writes results-<rows>.json beside results.json.

python -m experiments.evaluate runs/2026-01-31_12-00-00_switch-e8 --rows 500000
"""

import argparse
from dataclasses import replace

from experiments.errors import clear_errors
from switch_sae.config import config_from_plain
from switch_sae.orchestrator import score_again
from switch_sae.report import margins, table
from switch_sae.runs import RunDir


def evaluate_again(run: RunDir, rows: int | None = None, contexts: int | None = None) -> str:
    """Scores all SAEs and controls of the run and returns the name of the file, in its folder, that holds the results."""
    config = config_from_plain(run.read_json("config.json"))
    asked = {"rows": rows, "downstream_contexts": contexts}
    evaluation = replace(config.evaluation, **{name: value for name, value in asked.items() if value is not None})
    file = f"results-{evaluation.rows}.json" if (run.path / "results.json").is_file() else "results.json"
    score_again(run, replace(config, evaluation=evaluation), file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("--rows", type=int, help="held-out activations to score on; default: as in training")
    parser.add_argument("--contexts", type=int, help="contexts for delta CE and KL, 0 for none; default: as in training")
    arguments = parser.parse_args()
    with clear_errors():
        run = RunDir.open(arguments.run)
        file = evaluate_again(run, arguments.rows, arguments.contexts)
        print("\n" + table([run], file), margins(run, file), f"\nwritten: {run.path / file}", sep="\n")


if __name__ == "__main__":
    main()

"""Scores a finished run again, on other rows or contexts of the same held-out text, or under further inferences, and writes results-<rows>.json
beside results.json; of a sweep, every finished member.

python -m experiments.evaluate runs/2026-01-31_12-00-00_switch-e8 --rows 500000
python -m experiments.evaluate runs/2026-01-31_12-00-00_sweep --inferences refit pursuit --calibrate   # results-<rows>-calibrated.json
"""

import argparse
from dataclasses import replace
from typing import Any

from switch_sae.cohort import Streams
from switch_sae.config import config_from_plain
from switch_sae.files import tell, user_path
from switch_sae.invocation import invocation
from switch_sae.models.inference import Inference
from switch_sae.orchestrator import score_again
from switch_sae.report import margins, summary_table, table
from switch_sae.results import RESULTS, collect, finished_runs
from switch_sae.runs import RunDir

from .arguments import parser_of
from .errors import clear_errors


def evaluate_again(run: RunDir, streams: Streams | None = None, **asked: Any) -> str:
    """Scores all SAEs and controls of the run and returns the name of the file, in its folder, that holds the results.

    `streams` may be those of other runs; `asked` are settings of its evaluation; None is as in training.
    """
    config = config_from_plain(run.read_json("config.json"))
    evaluation = replace(config.evaluation, **{name: value for name, value in asked.items() if value is not None})
    file = f"results-{evaluation.rows}{'-calibrated' * evaluation.calibrate}.json" if (run.path / RESULTS).is_file() else RESULTS
    score_again(run, replace(config, evaluation=evaluation), file, streams=streams)
    return file


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", type=user_path, help="the folder of a finished run, or of a sweep")
    parser.add_argument("--rows", type=int, help="held-out activations to score on; default: as in training")
    parser.add_argument("--contexts", type=int, help="contexts for delta CE and KL, 0 for none; default: as in training")
    names = [inference.name for inference in Inference]
    parser.add_argument("--inferences", nargs="*", choices=names, help="further ways of inference for the same weights; default: as in training")
    calibrate = "set thresholds on one half of the held-out documents and report the other; default: as in training"
    parser.add_argument("--calibrate", action=argparse.BooleanOptionalAction, help=calibrate)
    probes = "measure stability and meaning too; default: as in training"
    parser.add_argument("--probes", action=argparse.BooleanOptionalAction, help=probes)
    arguments = parser.parse_args()
    asked = {name: getattr(arguments, name) for name in ("rows", "inferences", "calibrate", "probes")} | {"downstream_contexts": arguments.contexts}
    with clear_errors():
        is_sweep = (arguments.run / "sweep.json").is_file()
        runs = finished_runs(arguments.run / "members") if is_sweep else [RunDir.open(arguments.run)]
        if not runs:
            raise FileNotFoundError(
                f"{arguments.run} is a sweep without a finished run of this library. Give one that {invocation('sweep')} printed."
            )
        with Streams(tell) as streams:
            for run in sorted(runs, key=lambda run: str(run.read_json("config.json")["source"])):  # those on one source follow each other
                file = evaluate_again(run, streams, **asked)
                print("\n" + table([run], file), margins(run, file), f"\nwritten: {run.path / file}", sep="\n")
        if len(runs) > 1:
            print("\n" + summary_table(collect(runs[0].path.parents[1:2], inferences=True, file=file)))


if __name__ == "__main__":
    main()

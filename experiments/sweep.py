"""Trains many SAEs from one pass over the activations: expert counts, k, seeds, dense baselines, any grid of settings; then prints their table.

python -m experiments.sweep sweep.experts=[1,2,4,8] sweep.k=[16,32] sweep.seeds=3
python -m experiments.sweep experiment=sweep/small/evidence                   # the experiment files of conf/experiment
python -m experiments.sweep --resume runs/2026-01-31_12-00-00_sweep  # finished members are skipped, the others go on
python -m experiments.sweep --multirun hydra/launcher=joblib sweep.worker=0,1,2,3 sweep.folder=runs/big sweep.at_once=4 ...   # workers on one sweep
"""

import sys

from omegaconf import DictConfig

from switch_sae.invocation import invocation
from switch_sae.sweep import SweepFolder, resume_sweep, run_sweep

from .arguments import parser_of
from .command import command
from .compose import register_schemas, sweep_config
from .errors import clear_errors

register_schemas()


def report(folder: SweepFolder) -> None:
    """Prints what came out; raises ValueError where members failed, so that a batch job sees it."""
    print(f"\n{folder.table()}\n\nresults   {folder.path}/results.csv, summary.csv\nfigures   {invocation('figures', runs=[folder.path])}")
    if failed := [name for name in folder.members if (folder.path / "members" / name / "failed.json").is_file()]:
        raise ValueError(
            f"{len(failed)} members failed: {', '.join(failed)}. Why is in their failed.json; try them again with "
            f"{invocation('sweep', resume=folder.path)}"
        )


@command("sweep")
def new(composed: DictConfig) -> None:
    report(run_sweep(sweep_config(composed)))


def main() -> None:
    if "--resume" in sys.argv:
        parser = parser_of(__doc__)
        parser.add_argument("--resume", required=True, help="the folder of a sweep")
        parser.add_argument("--at-once", type=int, help="how many SAEs train together, at most")
        options = parser.parse_args()
        with clear_errors():
            report(resume_sweep(options.resume, options.at_once))
    else:
        new()


if __name__ == "__main__":
    main()

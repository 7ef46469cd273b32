"""Goes on with an interrupted run, exactly where it stopped.

python -m experiments.resume runs/2026-01-31_12-00-00_switch-e8
"""

from switch_sae.orchestrator import resume_training
from switch_sae.report import report

from .arguments import parser_of
from .errors import clear_errors


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", help="the run folder that training printed")
    with clear_errors():
        report(resume_training(parser.parse_args().run))


if __name__ == "__main__":
    main()

"""The paper's figures from any set of runs: each as PNG and PDF with its numbers as CSV; what the runs lack is said in a line.

python -m experiments.figures runs/sweep --out figures
python -m experiments.figures runs/ other/sweep --out figures --only frontier scaling
"""

from pathlib import Path

from switch_sae.files import user_path
from switch_sae.report import FIGURES, draw_figures
from switch_sae.results import RESULTS

from .arguments import add_paths, parser_of
from .errors import clear_errors


def main() -> None:
    parser = parser_of(__doc__)
    add_paths(parser)
    parser.add_argument("--out", default=Path("figures"), type=user_path, metavar="FOLDER", help="where the figures go; default: figures")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help=f"some of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--file", default=RESULTS, metavar="NAME", help=f"another evaluation in the folders; default: {RESULTS}")
    arguments = parser.parse_args()
    with clear_errors():
        drawn, missing = draw_figures(arguments.paths, arguments.out, arguments.only, file=arguments.file)
        print(f"\n{len(drawn)} figures drawn, {len(missing)} not")


if __name__ == "__main__":
    main()

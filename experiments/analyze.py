"""An analysis of trained SAEs: prints its table and writes it as CSV with a figure; what it computed stays in the run folders.

python -m experiments.analyze duplication runs/2026-01-31_12-00-00_switch-e8 runs/sweep
python -m experiments.analyze duplication runs --set threshold=0.8 --out analysis
"""

from omegaconf import OmegaConf

from switch_sae.analysis import ANALYSES, analyze, build_analysis
from switch_sae.files import user_path
from switch_sae.report.tables import records_table
from switch_sae.results.export import write_csv
from switch_sae.results.rows import collect
from switch_sae.style import save_figure

from .arguments import add_paths, parser_of
from .errors import clear_errors


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("name", help=f"one of {', '.join(ANALYSES)}")
    add_paths(parser)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the analysis")
    parser.add_argument("--out", type=user_path, metavar="FOLDER", help="where NAME.csv, .png and .pdf go; default: analysis/ in the first path")
    arguments = parser.parse_args()
    with clear_errors():
        settings = {str(key): value for key, value in OmegaConf.from_dotlist(arguments.set).items()}
        analysis = build_analysis(arguments.name, settings)
        finished = [row for row in collect(arguments.paths) if row.has_weights]
        table = analyze(arguments.name, finished, settings)
        print(records_table(analysis.shown(table)))
        out = (arguments.out or arguments.paths[0] / "analysis") / arguments.name
        write_csv(table, out.with_suffix(".csv"))
        save_figure(analysis.draw(table), out)
        print(f"\nwritten: {out}.csv, .png, .pdf")


if __name__ == "__main__":
    main()

"""Every trained SAE of run folders and sweeps as one table: a summary over seeds here, one row per SAE in a file.

python -m experiments.results runs/                                            # summary for the terminal
python -m experiments.results runs/sweep --out results.csv --summary summary.csv  # all numbers and settings; .parquet works too
python -m experiments.results runs/frontier --markdown                           # the frontier of inference, and each SAE against dense TopK by seed
"""

from switch_sae.files import user_path, write_atomically
from switch_sae.report import headline_markdown, summary_table
from switch_sae.results import RESULTS, collect, write_results, write_summary
from switch_sae.results.settings import config_columns

from .arguments import add_paths, parser_of
from .errors import clear_errors


def main() -> None:
    parser = parser_of(__doc__)
    add_paths(parser)
    parser.add_argument("--out", type=user_path, metavar="FILE", help="one row per SAE: FILE.csv, or FILE.parquet")
    parser.add_argument("--summary", type=user_path, metavar="FILE", help="mean and spread over seeds: FILE.csv, or the table above as text")
    parser.add_argument("--markdown", action="store_true", help="the frontier of inference as Markdown: measures, prices, and seed by seed")
    parser.add_argument("--file", default=RESULTS, metavar="NAME", help=f"another evaluation in the folders; default: {RESULTS}")
    arguments = parser.parse_args()
    with clear_errors():
        rows = collect(arguments.paths, inferences=True, file=arguments.file)
        text = headline_markdown(rows) if arguments.markdown else summary_table(rows)
        print(text)
        print(f"\n{len(rows)} SAEs; they differ in {', '.join(config_columns(rows)) or 'nothing but seeds'}")
        if arguments.out:
            write_results(rows, arguments.out)
            print(f"written: {arguments.out}")
        if arguments.summary:
            if arguments.summary.suffix == ".csv":
                write_summary(rows, arguments.summary)
            else:
                write_atomically(arguments.summary, (text + "\n").encode())
            print(f"written: {arguments.summary}")


if __name__ == "__main__":
    main()

"""Run folders in, tables and figures out."""

from collections.abc import Callable

from switch_sae.analysis.geometry import decoder_geometry
from switch_sae.report.figures import curves_figure, geometry_figure, load_figure, scores_figure
from switch_sae.report.paper_figures import FIGURES, draw_figures
from switch_sae.report.published import PaperPoint, paper_points
from switch_sae.report.results import ResultRow, collect, config_columns, write_results
from switch_sae.report.scored import Scored, finished_runs, load_members, scored
from switch_sae.report.style import render
from switch_sae.report.summary import Spread, Summary, summary, summary_table, write_summary
from switch_sae.report.tables import expert_tokens_table, margins, table
from switch_sae.runs import RunDir, load_sae, write_atomically

__all__ = [
    "FIGURES",
    "PaperPoint",
    "ResultRow",
    "Scored",
    "Spread",
    "Summary",
    "collect",
    "config_columns",
    "curves_figure",
    "draw_figures",
    "expert_tokens_table",
    "finished_runs",
    "geometry_figure",
    "load_figure",
    "load_members",
    "margins",
    "paper_points",
    "render",
    "report",
    "scored",
    "scores_figure",
    "summary",
    "summary_table",
    "table",
    "write_results",
    "write_summary",
]


def report(run: RunDir, say: Callable[[str], None] = print) -> None:
    """Says a finished run's table, margins and what to do next, and draws its figures into `run.figures` as PNG and PDF.

    Doing it again gives the same. Raises FileNotFoundError for a run without results.json.
    """
    say("\n" + table([run]))
    say(margins(run))
    drawn = _draw(run)
    say(f"\nfigures   {', '.join(drawn)} (PNG, PDF) in {run.figures}")
    say(f"run       {run.path}")
    say(f'load it   from switch_sae import load_sae; sae = load_sae("{run.path}")')
    say(f'notebook  make notebook RUNS="{run.path}"')
    for offline in sorted((run.path / "wandb").glob("offline-run-*")):
        say(f"upload    wandb sync {offline}")


def _draw(run: RunDir) -> list[str]:
    rows = scored([run])
    main = rows[0]
    sae = load_sae(run.path)
    figures = {
        "scores": scores_figure(rows),
        "geometry": geometry_figure({main.name: decoder_geometry(sae.decoder_weight(), sae.num_experts, main.results.firing_counts)}),
    }
    if run.metrics():
        figures["training"] = curves_figure([run])
    if any("expert_load" in row.results.vectors for row in rows if not row.is_control):
        figures["load"] = load_figure(rows)
    for name, figure in figures.items():
        for kind in ("png", "pdf"):
            write_atomically(run.figures / f"{name}.{kind}", render(figure, kind))
    return sorted(figures)

"""Results in, tables and figures out."""

import shlex

from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.files import Say, tell
from switch_sae.invocation import invocation
from switch_sae.report.figures import FIGURES, draw_figures
from switch_sae.report.figures.single_runs import curves_figure, geometry_figure, has_load, load_figure, scores_figure
from switch_sae.report.headline import headline_markdown
from switch_sae.report.tables import margins, summary_table, table
from switch_sae.results.rows import scored
from switch_sae.runs import RunDir
from switch_sae.style import render, save_figure

__all__ = ["FIGURES", "draw_figures", "headline_markdown", "margins", "render", "report", "summary_table", "table"]


def report(run: RunDir, say: Say = tell) -> None:
    """Says a finished run's table, margins and what to do next, and draws its figures into `run.figures` as PNG and PDF.

    Doing it again gives the same. Raises FileNotFoundError for a run without results.json.
    """
    say("\n" + table([run]))
    say(margins(run))
    drawn = _draw(run)
    say(f"\nfigures   {', '.join(drawn)} (PNG, PDF) in {run.figures}")
    say(f"run       {run.path}")
    say(f'load it   from switch_sae import load_sae; sae = load_sae("{run.path}")')
    say(f"notebook  {invocation('notebook', runs=[run.path])}")
    for offline in sorted((run.path / "wandb").glob("offline-run-*")):
        say(f"upload    wandb sync {shlex.quote(str(offline))}")


def _draw(run: RunDir) -> list[str]:
    rows = scored([run])
    main = rows[0]
    geometry = decoder_geometry(main.load().decoder_weight(), main.num_experts, main.firing_counts, main.num_shared)
    figures = {"scores": scores_figure(rows), "geometry": geometry_figure({main.sae: geometry})}
    if run.metrics():
        figures["training"] = curves_figure([run])
    if any(map(has_load, rows)):
        figures["load"] = load_figure(rows)
    for name, figure in figures.items():
        save_figure(figure, run.figures / name)
    return sorted(figures)

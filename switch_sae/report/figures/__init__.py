"""All figures of the paper from any set of runs, by one call."""

from collections.abc import Callable, Sequence
from pathlib import Path

from switch_sae.files import Say, tell
from switch_sae.report.figures import ablations, duplication, expert_similarity, frontier, frontier_compute, projection, scaling, training_curves
from switch_sae.results.export import write_csv
from switch_sae.results.rows import RESULTS, collect
from switch_sae.results.selection import Material, NotEnough
from switch_sae.style import Drawing, save_figure

FIGURES: dict[str, Callable[[Material], Drawing]] = {
    "frontier": frontier.draw,
    "curves": training_curves.draw,
    "scaling": scaling.draw,
    "ablations": ablations.draw,
    "duplication": duplication.draw,
    "expert_similarity": expert_similarity.draw,
    "projection": projection.draw,
    "frontier_compute": frontier_compute.draw,
}


def draw_figures(
    paths: Sequence[str | Path], out: str | Path, only: Sequence[str] = (), say: Say = tell, file: str = RESULTS
) -> tuple[list[str], dict[str, str]]:
    """Draws each of `FIGURES` (or those named in `only`) that the runs suffice for into `out`: NAME.png, NAME.pdf, and NAME.csv with its numbers.

    `file` is another evaluation in the runs' folders. Returns the names drawn, and for the others what is missing. Raises ValueError for an unknown
    name and as `collect` does.
    """
    unknown = sorted(set(only) - set(FIGURES))
    if unknown:
        raise ValueError(f"there is no figure {', '.join(unknown)}. Choose from {', '.join(FIGURES)}.")
    out = Path(out)
    material = Material.of(collect(paths, inferences=True, file=file), say=say)
    for line in material.left_out():
        say(line)
    drawn, missing = [], {}
    for name in only or FIGURES:
        try:
            drawing = FIGURES[name](material)
        except (NotEnough, ImportError) as error:
            missing[name] = str(error)
            say(f"{name}: not drawn. {error}")
            continue
        save_figure(drawing.figure, out / name)
        write_csv(drawing.table, out / f"{name}.csv")
        drawn.append(name)
        say(f"{name}: {out / name}.png, .pdf, .csv")
        for note in drawing.notes:
            say(f"  {note}")
    return drawn, missing

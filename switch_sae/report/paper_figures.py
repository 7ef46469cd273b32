"""All figures of the paper from any set of runs, by one call."""

from collections.abc import Callable, Sequence
from pathlib import Path

from switch_sae.report.ablations import ablations
from switch_sae.report.frontier import frontier
from switch_sae.report.geometry_figures import duplication, expert_similarity
from switch_sae.report.projection import projection
from switch_sae.report.results import collect, csv_bytes
from switch_sae.report.scaling_figure import scaling
from switch_sae.report.selection import Drawing, Material, NotEnough
from switch_sae.report.style import render
from switch_sae.report.training_curves import training_curves
from switch_sae.runs import write_atomically

FIGURES: dict[str, Callable[[Material], Drawing]] = {
    "frontier": frontier,
    "curves": training_curves,
    "scaling": scaling,
    "ablations": ablations,
    "duplication": duplication,
    "expert_similarity": expert_similarity,
    "projection": projection,
}


def draw_figures(
    paths: Sequence[str | Path], out: str | Path, only: Sequence[str] = (), say: Callable[[str], None] = print
) -> tuple[list[str], dict[str, str]]:
    """Draws each of `FIGURES` (or those named in `only`) that the runs suffice for into `out`: NAME.png, NAME.pdf, and NAME.csv with its numbers.

    Returns the names drawn, and for the others what is missing. Raises ValueError for an unknown name and as `collect` does.
    """
    unknown = sorted(set(only) - set(FIGURES))
    if unknown:
        raise ValueError(f"there is no figure {', '.join(unknown)}. Choose from {', '.join(FIGURES)}.")
    out = Path(out)
    material = Material.of(collect(paths), cache=out, say=say)
    drawn, missing = [], {}
    for name in only or FIGURES:
        try:
            drawing = FIGURES[name](material)
        except (NotEnough, ImportError) as error:
            missing[name] = str(error)
            say(f"{name}: not drawn. {error}")
            continue
        for kind in ("png", "pdf"):
            write_atomically(out / f"{name}.{kind}", render(drawing.figure, kind))
        write_atomically(out / f"{name}.csv", csv_bytes(drawing.table))
        drawn.append(name)
        say(f"{name}: {out / name}.png, .pdf, .csv")
        for note in drawing.notes:
            say(f"  {note}")
    return drawn, missing

"""The frontier of inference as Markdown: what a README shows, and what a claim is checked against, seed by seed."""

from collections.abc import Sequence

from switch_sae.report.tables import UNKNOWN
from switch_sae.results.contenders import MEASURES, Frontier, Standing, frontier, share_of
from switch_sae.results.rows import ResultRow
from switch_sae.results.selection import Material


def headline_markdown(rows: Sequence[ResultRow]) -> str:
    """Two tables: each contender's measures and prices, mean ± standard deviation over seeds; and each against dense TopK, seed by seed.

    Then what limps. Raises NotEnough as `frontier` does; SAEs that were scored on other activations are left out, with a line that says so.
    """
    said: list[str] = []
    found = frontier(Material.of(rows, say=said.append))
    notes = [*said, *found.notes]
    return "\n".join([*_measures(found), "", *_against(found), *(f"\n{text[0].upper()}{text[1:]}." for text in notes)])


def _measures(found: Frontier) -> list[str]:
    first = found.reference.first
    curve = found.standings[0].curve
    levers = [] if curve is None else ["leverage"]
    header = ["recipe", "latents", "compute", "training", *levers, "L0", *(MEASURES[name].label for name in found.known), "dead"]
    lines = [_line(header), _line(["---"] * len(header))]
    for standing in found.standings:
        group = standing.group
        scores = [UNKNOWN if (spread := group.spreads.get(name)) is None else format(spread, MEASURES[name].spec) for name in found.known]
        l0, dead = group.mean("l0"), group.mean("dead_latents")
        prices = [standing.contender.label, standing.shape, share_of(standing.compute), share_of(standing.training)]
        prices += [_leverage(standing)] * len(levers)
        lines.append(_line([*prices, UNKNOWN if l0 is None else f"{l0:.2f}", *scores, UNKNOWN if dead is None else f"{dead:.1%}"]))
    seeds = sorted({len(standing.group.rows) for standing in found.standings})
    n = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    about = (
        f"compute, training: FLOPs per token to find latents, and to train, relative to dense TopK of {first.num_latents:,} latents, k = {first.k}"
    )
    if curve is not None:
        widths = ", ".join(f"{width:,}" for width, _ in curve.points)
        about += (
            f"; leverage: latents of the dense TopK SAE with the same FVU (through {widths}; *: beyond them, by the two nearest) per dot product "
            "with an activation that compute is worth"
        )
    return [*lines, "", f"Mean ± standard deviation over seeds, n = {n}; {about}."]


def _leverage(standing: Standing) -> str:
    if standing.leverage is None or standing.dense_width is None:
        return UNKNOWN
    return f"{standing.leverage:.2f}" + " *" * standing.dense_width.is_extrapolated


def _against(found: Frontier) -> list[str]:
    header = ["against dense TopK, by seed", *(f"{MEASURES[name].label}: {'ratio' if MEASURES[name].is_error else '+/-'}" for name in found.known)]
    others = [standing for standing in found.standings if standing.group is not found.reference]
    rows = [[f"{each.contender.label}, {each.shape}", *(_by_seed(each, name) for name in found.known)] for each in others]
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _by_seed(standing: Standing, name: str) -> str:
    spec = ".3f" if MEASURES[name].is_error else "+.3f"
    return ", ".join(format(value, spec) for _, value in sorted(standing.compared(name).items())) or UNKNOWN


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

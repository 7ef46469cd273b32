"""Tables for a terminal: at most about 140 columns, unknown values as `-`."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from switch_sae.analysis.text_examples import TokenLift
from switch_sae.report.scored import Scored, evaluated_on, scored
from switch_sae.runs import RunDir

UNKNOWN = "-"


def table(runs: Sequence[RunDir], file: str = "results.json") -> str:
    """All SAEs and controls of the runs with their scores, then which run is which, then a legend.

    `file` is another evaluation in the same folders. Raises ValueError for no runs, FileNotFoundError for an unfinished one.
    """
    rows = scored(runs, file)
    lines = [list(_COLUMNS)] + [[cell(row) for cell in _COLUMNS.values()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    texts = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    rule = "-" * len(texts[0])
    parts = [texts[0]]
    for _, group in groupby(zip(rows, texts[1:], strict=True), key=lambda pair: (pair[0].run_number, pair[0].is_control)):
        parts += [rule, *(text for _, text in group)]
    return "\n".join([*parts, "", *_runs_key(runs, rows, file), *_legend(rows)])


def margins(run: RunDir, file: str = "results.json") -> str:
    """One line: how far the main SAE's FVU lies below (-) or above (+) that of every other row, in percent of the other's.

    A star marks a difference that the 95 % intervals do not support: they overlap.
    """
    main, *others = scored([run], file)
    own = main.estimate("fvu")
    if own is None:
        return f"The FVU of {main.name} is not finite: no margins."
    words, star = [], False
    for other in others:
        theirs = other.estimate("fvu")
        if theirs is None or theirs.value == 0:
            continue
        unsure = None in (own.low, own.high, theirs.low, theirs.high) or (own.low <= theirs.high and theirs.low <= own.high)  # type: ignore[operator]
        star |= unsure
        words.append(f"{(own.value / theirs.value - 1):+.1%} {other.name}" + "*" * unsure)
    return f"FVU of {main.name} relative to: {', '.join(words)}" + (" (* intervals overlap or are missing)" if star else "")


def expert_tokens_table(lifts: Sequence[Sequence[TokenLift]], expert_load: Sequence[float], width: int = 140) -> str:
    """One line per expert: its share of rows, then its tokens by lift, each with P(expert | token)."""
    lines = []
    for expert, (load, tokens) in enumerate(zip(expert_load, lifts, strict=True)):
        line = f"expert {expert:>3} {load:6.1%} "
        for token in tokens:
            word = f"  {token.token!r} {token.share:.0%}"
            if len(line) + len(word) > width:
                break
            line += word
        lines.append(line)
    return "\n".join(lines)


def other_activations(first: dict[str, Any], where: dict[str, Any]) -> str:
    """In what two `evaluated_on` differ, in a few words; empty where scores can be compared."""
    differs = sorted(key for key in first.keys() | where.keys() if first.get(key) != where.get(key))
    if "source" in differs:
        differs = ["source"]
    return ", ".join(differs[:4]) + (f" and {len(differs) - 4} more" if len(differs) > 4 else "")


def short(number: float | None) -> str:
    """Three digits with k, M or G."""
    if number is None:
        return UNKNOWN
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def _cell(metric: str, spec: str) -> Callable[[Scored], str]:
    def cell(row: Scored) -> str:
        estimate = row.estimate(metric)
        return UNKNOWN if estimate is None else format(estimate, spec)

    return cell


def _value(metric: str, spec: str) -> Callable[[Scored], str]:
    def cell(row: Scored) -> str:
        estimate = row.estimate(metric)
        return UNKNOWN if estimate is None else format(estimate.value, spec)

    return cell


def _sparse_only(cell: Callable[[Scored], str]) -> Callable[[Scored], str]:
    # PCA is scored as an SAE with two latents per component, one per sign: an artefact, not a width that could be compared.
    return lambda row: UNKNOWN if row.architecture == "pca" else cell(row)


_COLUMNS: dict[str, Callable[[Scored], str]] = {
    "SAE": lambda row: row.label,
    "latents": _sparse_only(lambda row: str(row.num_latents)),
    "experts": _sparse_only(lambda row: str(row.num_experts)),
    "k": lambda row: UNKNOWN if row.k is None else str(row.k),
    "FVU": _cell("fvu", ".4f"),
    "delta CE": _cell("delta_ce", ".3f"),
    "KL": _value("kl", ".3f"),
    "L0": _value("l0", ".1f"),
    "dead": _sparse_only(_value("dead_latents", ".1%")),
    "load CV": _value("load_cv", ".2f"),
    "cosine": _value("cosine", ".3f"),
    "FLOPs": lambda row: short(row.results.flops["total"]),
    "tok/s": lambda row: short(row.train_tokens_per_second),
}


def _runs_key(runs: Sequence[RunDir], rows: Sequence[Scored], file: str) -> list[str]:
    if len(runs) == 1:
        return []
    first: dict[str, Any] = {}
    lines = []
    for number, run in enumerate(runs, start=1):
        saved = run.read_json(file)
        row = next(row for row in rows if row.run_number == number)
        config = run.read_json("config.json")
        where = evaluated_on(saved, {"rows": row.results.rows, "predictions": row.results.predictions})
        first = first or where
        differs = other_activations(first, where)
        note = f"; NOT COMPARABLE with run 1, other activations: {differs}" if differs else ""
        main_tokens = next(iter(saved["members"].values())).get("tokens")
        tokens = f", {short(main_tokens)} tokens" if main_tokens else ""
        lines.append(f"{number}: {run.path} (seed {config['seed']}{tokens}; {_size(row)}{note})")
    return lines


def _size(row: Scored) -> str:
    results = row.results
    predictions = f", {results.predictions:,} predictions" if results.predictions else ""
    return f"{results.rows:,} held-out rows from {results.documents:,} documents{predictions}"


def _legend(rows: Sequence[Scored]) -> list[str]:
    sizes = {_size(row) for row in rows}
    return [
        f"FVU: squared error / variance, 0 is perfect, 1 the mean. On {sizes.pop() if len(sizes) == 1 else 'held-out rows'}.",
        "k: latents active per token, - where an architecture does not fix it (see L0). [ ]: 95 % interval from resampling documents.",
        "delta CE, KL: nats per prediction with reconstructions spliced in. dead: never fired on these rows. load CV: std / mean of experts' shares.",
        "FLOPs: per token of training, with router and decoder. tok/s: of training steps alone.",
    ]

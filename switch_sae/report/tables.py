"""Tables for a terminal: at most about 150 columns, unknown values as `-`."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from switch_sae.analysis.text_examples import TokenLift
from switch_sae.models import SAES
from switch_sae.results.rows import ResultRow, grouped, hashable, other_activations, scored, unusual, usual_settings
from switch_sae.results.summary import Summary, summary
from switch_sae.runs import RunDir

T = TypeVar("T")
UNKNOWN = "-"
WIDTH = 150


def table(runs: Sequence[RunDir], file: str = "results.json") -> str:
    """All SAEs and controls of the runs with their scores, then which run is which, then a legend.

    `file` is another evaluation in the same folders. Raises ValueError for no runs, FileNotFoundError for an unfinished one.
    """
    rows = scored(runs, file)
    header, *texts = aligned([list(_COLUMNS), *([cell(row) for cell in _COLUMNS.values()] for row in rows)])
    parts = [header]
    for _, group in groupby(zip(rows, texts, strict=True), key=lambda pair: (pair[0].label.removesuffix(pair[0].sae), pair[0].role == "control")):
        parts += ["-" * len(header), *(text for _, text in group)]
    return "\n".join([*parts, "", *_runs_key(rows), *_legend(rows)])


def margins(run: RunDir, file: str = "results.json") -> str:
    """One line: how far the main SAE's FVU lies below (-) or above (+) that of every other row, in percent of the other's.

    A star marks a difference that the 95 % intervals do not support: they overlap.
    """
    main, *others = scored([run], file)
    own = main.estimate("fvu")
    if own is None:
        return f"The FVU of {main.sae} is not finite: no margins."
    words, star = [], False
    for other in others:
        theirs = other.estimate("fvu")
        if theirs is None or theirs.value == 0:
            continue
        unsure = None in (own.low, own.high, theirs.low, theirs.high) or (own.low <= theirs.high and theirs.low <= own.high)  # type: ignore[operator]
        star |= unsure
        words.append(f"{(own.value / theirs.value - 1):+.1%} {other.sae}" + "*" * unsure)
    return f"FVU of {main.sae} relative to: {', '.join(words)}" + (" (* intervals overlap or are missing)" if star else "")


def summary_table(rows: Sequence[ResultRow]) -> str:
    """One line per group of seeds, what differs between groups, then a legend; at most 150 columns."""
    usual = usual_settings(rows)
    groups = sorted(summary(rows), key=lambda group: (_sizes(group), len(unusual(group.first, usual))))
    finished = [group for group in groups if group.rows]
    first = finished[0].first.evaluated_on if finished else {}
    others = {id(group): other_activations(first, group.first.evaluated_on) for group in finished}
    lines = [[cell(group) for cell in _SUMMARY_COLUMNS.values()] for group in groups]
    kept = [place for place, name in enumerate(_SUMMARY_COLUMNS) if name in ("SAE", "n") or any(line[place] != UNKNOWN for line in lines)]
    header, *texts = aligned([[line[place] for place in kept] for line in [list(_SUMMARY_COLUMNS), *lines]])
    room = max(24, WIDTH - len(header) - 2)
    shown = [header + "  differs in", "-" * (len(header) + 2 + min(room, 40))]
    for group, text in zip(groups, texts, strict=True):
        note = ", ".join([*_words(unusual(group.first, usual)), *_status(group)])
        if others.get(id(group)):
            note = ", ".join(filter(None, [f"NOT COMPARABLE, other activations: {others[id(group)]}", note]))
        wrapped = textwrap.wrap(note, room, break_on_hyphens=False) or [""]
        shown.append((text + "  " + wrapped[0]).rstrip())
        shown += [" " * (len(text) + 2) + line for line in wrapped[1:]]
    differing = {key: value for key, value in usual.items() if any(key in unusual(row, usual) for row in rows)}
    usually = f"Where nothing is said: {', '.join(_words(differing))}." if differing else ""
    return "\n".join([*shown, "", *_summary_legend(groups), *textwrap.wrap(usually, WIDTH)])


def records_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records with equal keys, one line each; numbers with 4 digits."""
    names = list(records[0]) if records else []
    return "\n".join(aligned([names, *([UNKNOWN if record[name] is None else _word(record[name], ".4g") for name in names] for record in records)]))


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


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text: two spaces between columns, the first column to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]


def short(number: float | None, unit: float = 1.0) -> str:
    """Three digits with k, M or G."""
    if number is None:
        return UNKNOWN
    number *= unit
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def _shown(of: Callable[[T], Any], spec: str = "") -> Callable[[T], str]:
    """A cell: what `of` finds, or that it is unknown."""
    return lambda row: UNKNOWN if (found := of(row)) is None else format(found, spec)


def _sparse_only(cell: Callable[[ResultRow], str]) -> Callable[[ResultRow], str]:
    # PCA is scored as an SAE with two latents per component, one per sign: an artefact, not a width that could be compared.
    return lambda row: cell(row) if row.architecture in SAES else UNKNOWN


_COLUMNS: dict[str, Callable[[ResultRow], str]] = {
    "SAE": lambda row: row.label,
    "latents": _sparse_only(lambda row: str(row.num_latents)),
    "experts": _sparse_only(lambda row: str(row.num_experts)),
    "k": _shown(lambda row: row.k),
    "FVU": _shown(lambda row: row.estimate("fvu"), ".4f"),
    "delta CE": _shown(lambda row: row.estimate("delta_ce"), ".3f"),
    "KL": _shown(lambda row: row.value("kl"), ".3f"),
    "L0": _shown(lambda row: row.value("l0"), ".1f"),
    "dead": _sparse_only(_shown(lambda row: row.value("dead_latents"), ".1%")),
    "load CV": _shown(lambda row: row.value("load_cv"), ".2f"),
    "cosine": _shown(lambda row: row.value("cosine"), ".3f"),
    "FLOPs": lambda row: short(row.flops_total),
    "tok/s": lambda row: short(row.tokens_per_second),
}
_SUMMARY_COLUMNS: dict[str, Callable[[Summary], str]] = {
    "SAE": lambda group: group.first.architecture,
    "latents": lambda group: str(group.first.num_latents),
    "experts": lambda group: str(group.first.num_experts),
    "k": _shown(lambda group: group.first.k),
    "n": lambda group: str(len(group.rows)),
    "FVU": _shown(lambda group: group.spreads.get("fvu"), ".4f"),
    "delta CE": _shown(lambda group: group.spreads.get("delta_ce"), ".3f"),
    "L0": _shown(lambda group: group.mean("l0"), ".1f"),
    "dead": _shown(lambda group: group.mean("dead_latents"), ".1%"),
    "load CV": _shown(lambda group: group.mean("load_cv"), ".2f"),
    "FLOPs": lambda group: short(group.mean("flops_total")),
    "tok/s": lambda group: short(group.mean("tokens_per_second")),
    "state B": lambda group: short(group.mean("state_mb"), 1e6),
    "peak B": lambda group: short(group.mean("peak_mb"), 1e6),
}


def _runs_key(rows: Sequence[ResultRow]) -> list[str]:
    runs = grouped(rows, lambda row: row.label.removesuffix(row.sae))
    if len(runs) == 1:
        return []
    lines = []
    for number, (row, *_) in runs.items():
        differs = other_activations(rows[0].evaluated_on, row.evaluated_on)
        note = f"; NOT COMPARABLE with run 1, other activations: {differs}" if differs else ""
        tokens = f", {short(row.tokens)} tokens" if row.tokens else ""
        lines.append(f"{number.strip()}: {row.path} (seed {row.seed}{tokens}; {_size(row)}{note})")
    return lines


def _size(row: ResultRow) -> str:
    assert row.results is not None
    predictions = f", {row.results.predictions:,} predictions" if row.results.predictions else ""
    return f"{row.results.rows:,} held-out rows from {row.results.documents:,} documents{predictions}"


def _legend(rows: Sequence[ResultRow]) -> list[str]:
    sizes = {_size(row) for row in rows}
    return [
        f"FVU: squared error / variance, 0 is perfect, 1 the mean. On {sizes.pop() if len(sizes) == 1 else 'held-out rows'}.",
        "k: latents active per token, - where an architecture does not fix it (see L0). [ ]: 95 % interval from resampling documents.",
        "delta CE, KL: nats per prediction with reconstructions spliced in. dead: never fired on these rows. load CV: std / mean of experts' shares.",
        "FLOPs: per token of training, with router and decoder. tok/s: of training steps alone.",
    ]


def _summary_legend(groups: Sequence[Summary]) -> list[str]:
    counts = sorted({len(group.rows) for group in groups})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [
        f"mean ± standard deviation (n - 1) over seeds, n = {n}; a single seed has none. FVU: squared error / variance. "
        "delta CE: nats per prediction.",
        "dead: never fired on the evaluation rows. load CV: std / mean of experts' shares. FLOPs: per token of training, with router and "
        "decoder. tok/s:",
        "of training steps alone. state B: own weights and moments. peak B: peak of the process, shared by all SAEs that trained in it.",
    ]


def _sizes(group: Summary) -> tuple[Any, ...]:
    first = group.first
    return first.architecture, first.num_latents, first.num_experts, first.k or 0


def _words(settings: dict[str, Any]) -> list[str]:
    return [f"{key.removeprefix('sae.')}={_word(hashable(value))}" for key, value in settings.items()]


def _word(value: Any, spec: str = "g") -> str:
    return f"{value:{spec}}" if isinstance(value, float) else str(value)


def _status(group: Summary) -> list[str]:
    words = []
    for status, rows in grouped(group.unfinished, lambda row: row.status).items():
        steps = sorted({row.step for row in rows if row.step is not None})
        at = f" at step {'-'.join(str(step) for step in dict.fromkeys((steps[0], steps[-1])))}" if steps else ""
        words.append((f"seed {rows[0].seed}" if len(rows) == 1 else f"{len(rows)} seeds") + f" {status}{at}")
    return words + ([f"{group.repeated} run{'s' * (group.repeated > 1)} with the same seed left out"] if group.repeated else [])

"""Tables for a terminal: at most about 150 columns, unknown values as `-`."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from switch_sae.analysis.text_examples import TokenLift
from switch_sae.invocation import invocation
from switch_sae.models import SAES
from switch_sae.models.inference import Inference
from switch_sae.results.contenders import encode_shares
from switch_sae.results.rows import ResultRow, grouped, hashable, other_activations, read_results, scored
from switch_sae.results.settings import EXACT, HEADLINE, share, unusual, usual_settings, without_outliers
from switch_sae.results.summary import Summary, summary
from switch_sae.runs import RunDir

T = TypeVar("T")
UNKNOWN = "-"
WIDTH = 150


def table(runs: Sequence[RunDir], file: str = "results.json") -> str:
    """All SAEs and controls of the runs with their scores, then which run is which, then a legend of the columns that have values.

    `file` is another evaluation in the same folders. Raises ValueError for no runs, FileNotFoundError for an unfinished one.
    """
    rows = scored(runs, file)
    share = encode_shares(rows)
    priced = _COLUMNS | {"enc": _sparse_only(_shown(lambda row: share(row.num_latents, row.flops_encode)))}
    columns, dropped, (header, *texts) = _filled(priced, rows, ("SAE", "k", "FVU"), _hidden(rows))
    parts = [header]
    for _, group in groupby(zip(rows, texts, strict=True), key=lambda pair: (pair[0].label.removesuffix(pair[0].sae), pair[0].role == "control")):
        parts += ["-" * len(header), *(text for _, text in group)]
    return "\n".join([*parts, "", *_runs_key(rows), *_legend(rows, columns), *dropped])


def margins(run: RunDir, file: str = "results.json") -> str:
    """How far the main SAE's FVU, and delta CE where it was paired, lie below (-) or above (+) those of every other row, in percent of the other's.

    With its 95 % interval where ratios were resampled on shared documents: a star marks those that hold 0. In older results a star marks a
    difference that the two SAEs' own intervals do not support: they overlap.
    """
    main, *others = scored([run], file)
    if not others:
        return f"Nothing was scored beside {main.sae}: no margins."
    ratios = read_results(run, file).get("ratios") or {}
    lines = [_margins(main, others, HEADLINE, "FVU", ratios)]
    if any("delta_ce" in ratio for ratio in ratios.values()):
        lines.append(_margins(main, others, "delta_ce", "delta CE", ratios))
    return "\n".join(lines)


def _margins(main: ResultRow, others: Sequence[ResultRow], metric: str, label: str, ratios: Mapping[str, Any]) -> str:
    own, words, stars, exact = main.estimate(metric), [], set(), []
    if own is None:
        return f"The {label} of {main.sae} is not known or not finite: no margins."
    for other in others:
        theirs, paired = other.estimate(metric), ratios.get(other.sae, {}).get(metric)
        if theirs is None or (paired is not None and paired["value"] is None):
            continue
        if abs(theirs.value) < EXACT:
            exact.append(other.sae)
        elif paired is None:
            unsure = None in (own.low, own.high, theirs.low, theirs.high) or (own.low <= theirs.high and theirs.low <= own.high)  # type: ignore[operator]
            stars |= {"intervals overlap or are missing"} if unsure else set()
            words.append(f"{100 * (own.value / theirs.value - 1):+z.1f} % {other.sae}" + "*" * unsure)
        else:
            value, low, high = (None if paired[at] is None else 100 * (paired[at] - 1) for at in ("value", "low", "high"))
            unsure = low is None or high is None or low <= 0 <= high
            stars |= {"the interval holds 0 or is missing"} if unsure else set()
            words.append(f"{value:+z.1f} %{'' if low is None else f' [{low:+z.1f}, {high:+z.1f}]'} {other.sae}" + "*" * unsure)
    notes = [f"* {star}" for star in sorted(stars)] + [f"{label} of {name} is 0: no margin" for name in exact]
    text = f"{label} of {main.sae} relative to: {', '.join(words) or 'nothing'}" + (f" ({'; '.join(notes)})" if notes else "")
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def summary_table(rows: Sequence[ResultRow]) -> str:
    """One line per group of seeds, what differs between groups, then a legend; at most 150 columns."""
    usual = usual_settings(rows)
    groups = sorted(summary(rows), key=lambda group: (_sizes(group), len(unusual(group.first, usual))))
    finished = [group for group in groups if group.rows]
    first = finished[0].first.evaluated_on if finished else {}
    notes = []
    for group in groups:
        others = other_activations(first, group.first.evaluated_on) if group.rows else ""
        notes.append([*([f"NOT COMPARABLE, other activations: {others}"] if others else []), *_words(unusual(group.first, usual)), *_status(group)])
    share = encode_shares(rows)
    encode: Callable[[Summary], str] = _shown(lambda group: share(group.first.num_latents, group.mean("flops_encode")))
    priced = _SUMMARY_COLUMNS | {"enc": encode}
    columns, dropped, (header, *texts) = _filled(priced, groups, ("SAE", "k", "n"), _hidden([group.first for group in groups]))
    room = WIDTH - len(header) - 2
    beside = max([10, *(len(word) for words in notes for word in " ".join(words).split())]) <= room  # else below: no word is cut
    shown = [header + "  differs in" * beside, "-" * (len(header) + (2 + min(room, 40)) * beside)]
    for words, text in zip(notes, texts, strict=True):
        indent, wide = (len(text) + 2, room) if beside else (4, WIDTH - 4)
        wrapped = textwrap.wrap(", ".join(words), wide, break_on_hyphens=False, break_long_words=False)
        shown.append((text + "  " + wrapped.pop(0)).rstrip() if beside and wrapped else text)
        shown += [" " * indent + line for line in wrapped]
    differing = {key: value for key, value in usual.items() if any(key in unusual(row, usual) for row in rows)}
    usually = [f"Where nothing is said: {', '.join(_words(differing))}."] if differing else []
    return "\n".join([*shown, "", *_wrapped([*_summary_legend(groups, columns), *dropped, *usually])])


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


def _filled(
    columns: Mapping[str, Callable[[T], str]], rows: Sequence[T], always: Sequence[str], hidden: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """(names, a sentence about those for which there is no room, aligned lines) of the columns in which something is known."""
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items() if name not in hidden}
    kept = [name for name, found in cells.items() if name in always or any(cell != UNKNOWN for cell in found)]
    dropped: list[str] = []
    while True:
        lines = aligned([kept, *([cells[name][place] for name in kept] for place in range(len(rows)))])
        if len(lines[0]) <= WIDTH or not (spared := [name for name in _DROPPED_FIRST if name in kept]):
            return kept, [f"No room for {', '.join(dropped)}: {invocation('results', '--out', 'FILE.csv')} has all."] if dropped else [], lines
        kept.remove(spared[0])
        dropped.append(spared[0])


def _hidden(rows: Sequence[ResultRow]) -> list[str]:
    """Columns that would say nothing new: with outlier rows where there are none, the inference where all have the usual one."""
    own = {row.inference for row in rows} <= {Inference.encoder.name}
    return [*(_WITH_OUTLIERS if not any(row.outlier_rows for row in rows) else ()), *(["inference"] if own else [])]


def _shown(of: Callable[[T], Any], spec: str = "") -> Callable[[T], str]:
    """A cell: what `of` finds, or that it is unknown."""
    return lambda row: UNKNOWN if (found := of(row)) is None else format(found, spec)


def _sparse_only(cell: Callable[[ResultRow], str]) -> Callable[[ResultRow], str]:
    # PCA is scored as an SAE with two latents per component, one per sign: an artefact, not a width that could be compared.
    return lambda row: cell(row) if row.architecture in SAES else UNKNOWN


def _bytes(megabytes: float | None) -> str:
    return UNKNOWN if megabytes is None else short(megabytes, 1e6) + "B"


_PRICES = {"J3%": ("jaccard_3pct", ".3f"), "judge": ("judge_hard", ".3f"), "err CV": ("error_cv", ".2f")}
_RECOVERY = {"MCC": "mcc", "recall": "recall", "NMI": "nmi"}
_WITH_OUTLIERS = ("FVU all", "delta CE in.")
_DROPPED_FIRST = ("peak mem", "own mem", "tok/s", "load CV", "FLOPs", "cosine", "inference", "err CV", "FVU all", "delta CE in.")
"""What a table that is too wide goes without, in this order."""
_COLUMNS: dict[str, Callable[[ResultRow], str]] = {
    "SAE": lambda row: row.label,
    "latents": _sparse_only(lambda row: str(row.num_latents)),
    "experts": _sparse_only(lambda row: str(row.num_experts)),
    "k": _shown(lambda row: row.k),
    "inference": _sparse_only(lambda row: row.inference),
    "enc": lambda row: UNKNOWN,
    "FVU": _shown(lambda row: row.estimate(HEADLINE), "z.4f"),
    "FVU all": _shown(lambda row: row.value("fvu"), "z.4f"),
    "delta CE": _shown(lambda row: row.estimate("delta_ce"), "z.3f"),
    "KL": _shown(lambda row: row.value("kl"), "z.3f"),
    **{name: _shown(lambda row, metric=metric: row.value(metric), spec) for name, (metric, spec) in _PRICES.items()},  # type: ignore[misc]
    "L0": _shown(lambda row: row.value("l0"), ".1f"),
    "dead": _sparse_only(_shown(lambda row: row.value("dead_latents"), ".1%")),
    "load CV": _shown(lambda row: row.value("load_cv"), ".2f"),
    "cosine": _shown(lambda row: row.value("cosine"), "z.3f"),
    **{name: _shown(lambda row, metric=metric: row.value(metric), "z.3f") for name, metric in _RECOVERY.items()},  # type: ignore[misc]
    "FLOPs": lambda row: short(row.flops_train),
    "tok/s": lambda row: short(row.tokens_per_second),
}
_SUMMARY_COLUMNS: dict[str, Callable[[Summary], str]] = {
    "SAE": lambda group: group.name,
    "latents": lambda group: str(group.first.num_latents),
    "experts": lambda group: str(group.first.num_experts),
    "k": _shown(lambda group: group.first.k),
    "n": lambda group: str(len(group.rows)),
    "inference": lambda group: group.first.inference,
    "enc": lambda group: UNKNOWN,
    "FVU": _shown(lambda group: group.rows[0].estimate(HEADLINE) if len(group.rows) == 1 else group.spreads.get(HEADLINE), "z.4f"),
    "FVU all": _shown(lambda group: group.spreads.get("fvu"), "z.4f"),
    "delta CE": _shown(lambda group: group.spreads.get("delta_ce"), "z.3f"),
    "delta CE in.": _shown(lambda group: group.spreads.get("delta_ce_inliers"), "z.3f"),
    "KL": _shown(lambda group: group.mean("kl"), "z.3f"),
    **{name: _shown(lambda group, metric=metric: group.mean(metric), spec) for name, (metric, spec) in _PRICES.items()},  # type: ignore[misc]
    "L0": _shown(lambda group: group.mean("l0"), ".1f"),
    "dead": _shown(lambda group: group.mean("dead_latents"), ".1%"),
    "load CV": _shown(lambda group: group.mean("load_cv"), ".2f"),
    **{name: _shown(lambda group, metric=metric: group.spreads.get(metric), "z.3f") for name, metric in _RECOVERY.items()},  # type: ignore[misc]
    "FLOPs": lambda group: short(group.mean("flops_train")),
    "tok/s": lambda group: short(group.mean("tokens_per_second")),
    "own mem": lambda group: _bytes(group.mean("state_mb")),
    "peak mem": lambda group: _bytes(group.mean("peak_mb")),
}
_MEANING = {
    "delta CE": "nats per prediction with reconstructions spliced in",
    "delta CE in.": "with outlier rows left as they are",
    "KL": "nats per prediction, between predictions with and without reconstructions",
    "inference": "how latents are found",
    "enc": "FLOPs to find them, router included, as a share of those of the dense TopK encoder",
    "J3%": "overlap (Jaccard) of a token's latents with those of its activation and 3 % noise",
    "judge": "balanced accuracy of guessing from tokens whether a latent fires, among alike tokens",
    "err CV": "std / mean of the tokens' errors",
    "dead": "never fired on these rows",
    "load CV": "std / mean of experts' shares",
    "MCC": "mean |cosine| of latents and true directions, matched one to one",
    "recall": "true directions that some latent has at cosine > 0.9",
    "NMI": "of routed expert and true topic",
    "FLOPs": "per token of training, with router and decoder",
    "tok/s": "of training steps alone",
    "own mem": "own weights and moments",
    "peak mem": "peak of the process, shared by all SAEs that trained in it",
}
"""Of columns, for legends."""


def _runs_key(rows: Sequence[ResultRow]) -> list[str]:
    runs = grouped(rows, lambda row: row.label.removesuffix(row.sae))
    if len(runs) == 1:
        return []
    lines = []
    for number, (row, *_) in runs.items():
        differs = other_activations(rows[0].evaluated_on, row.evaluated_on)
        note = f"; NOT COMPARABLE with run 1, other activations: {differs}" if differs else ""
        tokens = f", {short(row.tokens)} tokens" if row.tokens else ""
        left_out = f"; {_left_out(row)}" if _left_out(row) else ""
        lines.append(f"{number.strip()}: {row.path} (seed {row.seed}{tokens}; {_size(row)}{left_out}{note})")
    return lines


def _size(row: ResultRow) -> str:
    results = row.results
    assert results is not None
    documents = f" from {results.documents:,} documents" if results.documents < results.rows else ", independent of each other"
    predicted = f" from {row.prediction_documents:,} documents" if row.prediction_documents is not None else ""
    return f"{results.rows:,} held-out rows{documents}" + (f", {results.predictions:,} predictions{predicted}" if results.predictions else "")


def _left_out(row: ResultRow) -> str:
    """What its training left out."""
    known = row.training_outliers
    if not known or not known["left_out"]:
        return ""
    return f"training left out {known['left_out']:,} of {known['rows']:,} rows ({share(known['left_out'] / known['rows'])})"


def _legend(rows: Sequence[ResultRow], columns: Sequence[str]) -> list[str]:
    sizes, outliers = {_size(row) for row in rows}, without_outliers(rows)
    inliers = [
        f"{row.label} {ce.value:z.3f} (KL {kl:z.3f})"
        for row in rows
        if (ce := row.estimate("delta_ce_inliers")) and (kl := row.value("kl_inliers")) is not None
    ]
    missing = grouped(((reason, metric) for row in rows for metric, reason in row.not_measured.items()), lambda pair: pair[0])
    lines = [
        f"FVU: squared error / variance, 0 is perfect, 1 the mean{', ' * bool(outliers)}{outliers}; on "
        f"{sizes.pop() if len(sizes) == 1 else 'held-out rows'}." + " FVU all: with them." * ("FVU all" in columns),
        *([f"delta CE where outlier rows are left as they are: {', '.join(inliers)}."] if outliers and inliers else []),
        *(f"{left_out}." for left_out in {_left_out(row) for row in rows} if left_out and len({row.path for row in rows}) == 1),
        *(f"Not measured: {', '.join(dict.fromkeys(metric for _, metric in pairs))}, {reason}" for reason, pairs in missing.items()),
        "k: latents active per token" + ", - where an architecture does not fix it (see L0)" * any(row.k is None for row in rows) + "."
        " [ ]: 95 % interval from resampling documents." * any(e.low is not None for row in rows if (e := row.estimate(HEADLINE))),
    ]
    return _wrapped([*lines, _meanings(columns)])


def _summary_legend(groups: Sequence[Summary], columns: Sequence[str]) -> list[str]:
    counts, rows = sorted({len(group.rows) for group in groups}), [row for group in groups for row in group.rows]
    n, outliers = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0]), without_outliers(rows)
    beside = {row.sae: row.architecture for row in rows if row.role == "baseline"}
    return [
        f"mean ± standard deviation (n - 1) over seeds, n = {n}; a single seed has none, but [ ]: 95 % interval of its FVU over documents. "
        f"FVU: squared error / variance{', ' * bool(outliers)}{outliers}." + " FVU all: with them." * ("FVU all" in columns),
        _meanings(columns),
        *([f"Trained beside a main SAE: {', '.join(f'{name} ({kind})' for name, kind in beside.items())}."] if beside else []),
    ]


def _meanings(columns: Sequence[str]) -> str:
    return " ".join(f"{name}: {_MEANING[name]}." for name in columns if name in _MEANING)


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, break_on_hyphens=False, break_long_words=False)]


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
        word = "not finished," if status == "running" else status  # nobody knows from here whether its process still lives
        words.append((f"seed {rows[0].seed}" if len(rows) == 1 else f"{len(rows)} seeds") + f" {word}{at}")
    return words + ([f"{group.repeated} run{'s' * (group.repeated > 1)} with the same seed left out"] if group.repeated else [])

"""Which settings make experiments different, which values are usual, and by which number SAEs are compared."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from switch_sae.activations import SOURCES
from switch_sae.config import RunConfig
from switch_sae.models import ROUTERS, SAES
from switch_sae.plain import to_plain
from switch_sae.results.rows import SIZES, ResultRow, flat_settings, hashable, in_order
from switch_sae.rows import OUTLIER_FACTOR

HEADLINE = "fvu_inliers"
"""What tables, figures, margins and fits compare: without rows of huge norm, which would make up most of the variance. Without such rows it is
`fvu` to the last bit."""
EXACT = 1e-9
"""An FVU below this is 0 up to rounding: nothing can be compared with it."""


def config_columns(rows: Sequence[ResultRow]) -> list[str]:
    """The settings in which rows that have them differ, sizes included, seeds and bookkeeping not."""
    values: dict[str, set[Any]] = {}
    for row in in_order(rows):
        for key, value in {**{key: row.config[key] for key in SIZES if key in row.config}, **row.settings}.items():
            values.setdefault(key, set()).add(hashable(value))
    return [key for key, found in values.items() if len(found) > 1]


def usual_settings(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The most frequent value of every setting among the SAEs that runs are about; baselines, which are made from those, count only for a setting
    that no main SAE has. Of equally frequent values the default of the setting's dataclass, never the first that comes.
    """
    usual: dict[str, Any] = {}
    for chosen in (rows, [row for row in rows if row.role == "main"]):  # the main SAEs last: what they say counts
        counts: dict[str, Counter[Any]] = {}
        defaults: set[tuple[str, Any]] = set()
        for row in in_order(chosen):
            defaults |= _defaults(row.architecture, row.config.get("sae.router.kind", ""), row.config.get("source.kind", "")).items()
            for key, value in row.settings.items():
                counts.setdefault(key, Counter())[hashable(value)] += 1
        for key, found in counts.items():
            usual[key] = max(found, key=lambda value, key=key, found=found: (found[value], (key, value) in defaults, str(value)))  # type: ignore[misc]
    return usual


def unusual(row: ResultRow, usual: dict[str, Any]) -> dict[str, Any]:
    """The settings of a row that are not the usual ones."""
    return {key: value for key, value in row.settings.items() if hashable(value) != usual.get(key)}


@cache
def _defaults(architecture: str, router: str, source: str) -> dict[str, Any]:
    """Every setting's default, flat, with the fields of these entries of the tables."""
    plain = _plain_defaults(RunConfig)
    if architecture in SAES:
        plain["sae"] = _plain_defaults(SAES[architecture].Config)
        if router in ROUTERS and "router" in plain["sae"]:
            plain["sae"]["router"] |= _plain_defaults(ROUTERS[router].Config)
    if source in SOURCES:
        plain["source"] |= _plain_defaults(SOURCES[source].Config)
    return {key: hashable(value) for key, value in flat_settings(plain).items()}


def _plain_defaults(config: type[Any]) -> dict[str, Any]:
    plain = {}
    for f in fields(config):
        if f.default is not MISSING or f.default_factory is not MISSING:
            value = f.default_factory() if f.default_factory is not MISSING else f.default
            plain[f.name] = f.metadata["choice"].to_plain(value) if "choice" in f.metadata else to_plain(value)
    return plain


def without_outliers(rows: Iterable[ResultRow]) -> str:
    """`without 214 of 99,931 rows (0.21 %) whose norm exceeds 10 medians`; empty where there are no such rows."""
    counts = sorted({(row.outlier_rows, row.results.rows) for row in rows if row.results is not None})
    if not counts or not counts[-1][0]:
        return ""
    left_out, among = counts[-1]
    several = "up to " if len(counts) > 1 else ""
    return f"without {several}{left_out:,} of {among:,} rows ({share(left_out / among)}) whose norm exceeds {OUTLIER_FACTOR:g} medians"


def share(part: float) -> str:
    """A small share as `0.04 %`."""
    return f"{100 * part:.2g} %"

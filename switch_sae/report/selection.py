"""Which SAEs of a set of runs belong into one figure: comparable, of the usual settings, matched in width or in FLOPs."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_sae.report.results import ResultRow, unusual, usual_settings
from switch_sae.report.summary import Summary, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS = ("sae.experts_per_token",)
"""Settings in which SAEs of one figure may differ: they are lines of their own."""
RECIPE = ("sae.", "trainer.", "normalize_activations")
"""Settings that belong to an architecture's recipe: what is usual for one need not be for another."""


class NotEnough(ValueError):
    """The runs do not hold what a figure needs; the message says what is missing."""


@dataclass(frozen=True)
class Drawing:
    """A figure, and the numbers behind it."""

    figure: "Figure"
    table: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    """What a reader must know and the figure does not show, such as SAEs left out."""


@dataclass(frozen=True)
class Material:
    """Finished SAEs that can be compared, over seeds."""

    groups: list[Summary]
    """All of them, ablations included."""
    usual: dict[str, dict[str, Any]]
    """By architecture: the most frequent value of each setting; of `RECIPE` settings among that architecture's SAEs, of all others among all."""
    cache: Path | None = None
    """Where slow intermediate results may be kept; None keeps none."""

    @classmethod
    def of(cls, rows: Sequence[ResultRow], cache: Path | None = None, say: Callable[[str], None] = print) -> "Material":
        """Of rows scored on different activations, the largest set that shares them; says what it leaves out. Raises NotEnough for none finished."""
        finished = [row for row in rows if row.status == "finished"]
        if not finished:
            raise NotEnough(f"none of the {len(rows)} SAEs is finished, so there is nothing to draw.")
        where = Counter(json.dumps(row.evaluated_on, sort_keys=True, default=str) for row in finished)
        kept = where.most_common(1)[0][0]
        chosen = [row for row in finished if json.dumps(row.evaluated_on, sort_keys=True, default=str) == kept]
        if len(chosen) < len(finished):
            say(f"left out: {len(finished) - len(chosen)} SAEs scored on other activations than the largest set of {len(chosen)}; not comparable")
        if len(finished) < len(rows):
            say(f"left out: {len(rows) - len(finished)} SAEs that are not finished")
        everywhere, usual = usual_settings(chosen), {}
        for architecture in {row.architecture for row in chosen}:
            own = usual_settings([row for row in chosen if row.architecture == architecture])
            usual[architecture] = {key: (own if key.startswith(RECIPE) else everywhere)[key] for key in own}
        return cls(summary(chosen), usual, cache)

    def standard(self) -> list[Summary]:
        """Groups whose settings are the usual ones, apart from `VARIANTS`; for architectures without k, whose sparsity some coefficient sets, apart
        from all of the SAE's own.
        """
        return [group for group in self.groups if not self._unusual(group)]

    def left_out(self) -> list[str]:
        """One line about the groups that `standard` leaves out, or none."""
        keys = dict.fromkeys(key for group in self.groups for key in self._unusual(group))
        count = len(self.groups) - len(self.standard())
        return [f"{count} of {len(self.groups)} groups have unusual settings ({', '.join(keys)}) and are left out"] if count else []

    def _unusual(self, group: Summary) -> list[str]:
        keys = unusual(group.first, self.usual[group.first.architecture])
        return [key for key in keys if key not in VARIANTS and not (group.first.k is None and key.startswith("sae."))]


def kind_of(group: Summary) -> tuple[str, int, int]:
    """(architecture, experts, experts per token): what `look` takes, and what makes one line of a figure."""
    return group.first.architecture, group.first.num_experts, group.first.config.get("sae.experts_per_token", 1)


def kind_order(kind: tuple[str, int, int]) -> tuple[Any, ...]:
    """Sorts dense TopK first, other dense architectures, then by number of experts."""
    architecture, experts, per_token = kind
    return (architecture == "switch", architecture != "topk", architecture, experts, per_token)


def by_kind(groups: Sequence[Summary]) -> dict[tuple[str, int, int], list[Summary]]:
    """Lines of a figure: dense TopK first, other dense architectures, then by number of experts."""
    lines: dict[tuple[str, int, int], list[Summary]] = {}
    for group in sorted(groups, key=lambda group: kind_order(kind_of(group))):
        lines.setdefault(kind_of(group), []).append(group)
    return lines


def width_matched(groups: Sequence[Summary]) -> tuple[int, list[Summary]]:
    """(M, groups with M latents in all) for the M with most kinds of SAE, then most groups. Raises NotEnough where no M has two kinds."""
    by_width: dict[int, list[Summary]] = {}
    for group in groups:
        by_width.setdefault(group.first.num_latents, []).append(group)
    width, chosen = max(by_width.items(), key=lambda item: (len(by_kind(item[1])), len(item[1]), item[0]), default=(0, []))
    if len(by_kind(chosen)) < 2:
        raise NotEnough("no two kinds of SAE have the same number of latents. Train a Switch and a dense SAE with equal num_latents.")
    return width, chosen


def flop_matched(groups: Sequence[Summary]) -> tuple[int, list[Summary]]:
    """(W, groups): dense SAEs of W latents and Switch SAEs whose experts are as wide, for the W with most groups. Raises NotEnough where there is none.

    An expert also counts as wide enough with W - 3E latents, which leave room for the router's FLOPs (the runs' `flop_matched` baseline).
    """
    dense = [group for group in groups if group.first.num_experts == 1 and group.first.architecture != "switch"]
    chosen: dict[int, list[Summary]] = {}
    for width in {group.first.num_latents for group in dense if group.first.architecture == "topk"}:
        experts = [group for group in groups if group.first.num_experts > 1 and _is_matched(group.first, width)]
        if experts:
            chosen[width] = [group for group in dense if group.first.num_latents == width] + experts
    if not chosen:
        raise NotEnough(
            "no Switch SAE has experts as wide as a dense TopK SAE. Train sae=topk with num_latents = W and Switch SAEs with W times experts."
        )
    return max(chosen.items(), key=lambda item: (len(by_kind(item[1])), len(item[1]), item[0]))


def common_k(groups: Sequence[Summary]) -> int:
    """The k that most kinds of SAE have, of several the one in the middle. Raises NotEnough where none has a k."""
    kinds = {k: len(by_kind([group for group in groups if group.first.k == k])) for k in {group.first.k for group in groups} if k is not None}
    if not kinds:
        raise NotEnough("none of these SAEs has a fixed number of active latents (k).")
    best = sorted(k for k, count in kinds.items() if count == max(kinds.values()))
    return best[len(best) // 2]


def has_paper_setting(row: ResultRow) -> bool:
    """GPT-2 small, residual stream after block 8: the activations of Mudide et al. (arXiv 2410.08201)."""
    model, hook = row.config.get("source.model"), row.config.get("source.hook")
    return model in ("gpt2", "openai-community/gpt2") and hook in ("blocks.8.hook_resid_post", "blocks.9.hook_resid_pre")


def seeds(groups: Sequence[Summary]) -> str:
    """`3 seeds`, `1 to 3 seeds`."""
    counts = sorted({len(group.rows) for group in groups})
    return f"{counts[0]} seed{'s' * (counts[0] != 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _is_matched(row: ResultRow, width: int) -> bool:
    active = row.config.get("sae.experts_per_token", 1) * row.num_latents // row.num_experts
    return active in (width, width - 3 * row.num_experts)

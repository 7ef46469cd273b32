"""Which SAEs of a set of runs belong into one figure: comparable, of the usual settings, matched in width or in FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from switch_sae.files import Say, tell
from switch_sae.results.kind import Kind
from switch_sae.results.rows import ResultRow, grouped, hashable, in_order, other_activations
from switch_sae.results.settings import unusual, usual_settings, without_outliers
from switch_sae.results.summary import Summary, activations_key, summary

VARIANTS = ("sae.experts_per_token",)
"""Settings in which SAEs of one figure may differ: they are lines of their own."""
RECIPE = ("sae.", "trainer.", "normalize_activations")
"""Settings that belong to an architecture's recipe: what is usual for one need not be for another."""
EQUAL_FLOPS = 0.05
"""Relative difference up to which two SAEs cost the same."""
_NAMED = 4
"""SAEs that a line about what is left out names."""


class NotEnough(ValueError):
    """The runs do not hold what a figure needs; the message says what is missing."""


@dataclass(frozen=True)
class Material:
    """Finished SAEs that can be compared, over seeds."""

    groups: list[Summary]
    """All of them, ablations included, under their own inference."""
    usual: dict[str, dict[str, Any]]
    """By architecture: `usual_settings`, of `RECIPE` settings among that architecture's SAEs, of all others among all."""
    further: list[Summary]
    """The same SAEs once more, under other inferences: only what compares inferences draws them."""

    @classmethod
    def of(cls, rows: Sequence[ResultRow], say: Say = tell) -> "Material":
        """Of rows scored on different activations, the largest set that shares them; says what it leaves out. Raises NotEnough for none finished."""
        finished = [row for row in in_order(rows) if row.status == "finished"]
        if not finished:
            raise NotEnough(f"none of the {len(rows)} SAEs is finished, so there is nothing to draw.")
        chosen = max(grouped(finished, activations_key).values(), key=lambda alike: (len(alike), max(str(row.path) for row in alike)))
        if len(chosen) < len(finished):
            others = [row for row in finished if row.evaluated_on != chosen[0].evaluated_on]
            how = dict.fromkeys(other_activations(chosen[0].evaluated_on, row.evaluated_on) for row in others)
            names = list(dict.fromkeys(row.path.name for row in others))
            told = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            say(f"left out: {len(others)} SAEs scored on other activations ({'; '.join(how)}) than the largest set of {len(chosen)}: {told}")
        if len(finished) < len(rows):
            say(f"left out: {len(rows) - len(finished)} SAEs that are not finished")
        everywhere, usual = usual_settings(chosen), {}
        for architecture, rows_of in grouped(chosen, lambda row: row.architecture).items():
            mine = usual_settings(rows_of)
            usual[architecture] = {key: (mine if key.startswith(RECIPE) else everywhere)[key] for key in mine}
        own, further = (summary([row for row in chosen if (row.of is None) is is_own]) for is_own in (True, False))
        return cls(own, usual, further)

    def standard(self) -> list[Summary]:
        """Groups whose settings are the usual ones, apart from `VARIANTS`; for architectures without k, whose sparsity some coefficient sets, apart
        from all of the SAE's own.
        """
        return [group for group in self.groups if not self.deviations(group)]

    def left_out(self) -> list[str]:
        """What `standard` leaves out: one line per deviation, with the usual value and the SAEs that it concerns."""

        def deviation(group: Summary) -> tuple[tuple[str, Any], ...]:
            return tuple((key, self.usual[group.first.architecture].get(key)) for key in self.deviations(group))

        lines = []
        for usual, groups in grouped((group for group in self.groups if self.deviations(group)), deviation).items():
            values = {key: dict.fromkeys(str(hashable(group.first.settings[key])) for group in groups) for key, _ in usual}
            words = [f"{key}={' or '.join(values[key])} (usual: {value})" for key, value in usual]
            names = list(dict.fromkeys(map(_title, groups)))
            more = f"; {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"left out of all figures but ablations, {', '.join(words)}: {'; '.join(names[:_NAMED])}{more}")
        return lines

    def deviations(self, group: Summary) -> list[str]:
        """The settings of a group that are not the usual ones of its architecture, apart from those in which SAEs of one figure may differ."""
        keys = unusual(group.first, self.usual[group.first.architecture])
        return [key for key in keys if key not in VARIANTS and not (group.first.k is None and key.startswith("sae."))]


def by_kind(groups: Sequence[Summary]) -> dict[Kind, list[Summary]]:
    """Lines of a figure: the reference first, other dense architectures, then by number of experts."""
    return grouped(sorted(groups, key=lambda group: group.first.kind.order), lambda group: group.first.kind)


def references(groups: Sequence[Summary]) -> list[Summary]:
    """Those of the kind that others are measured against, dense TopK."""
    return [group for group in groups if group.first.kind.is_reference]


def width_matched(groups: Sequence[Summary]) -> tuple[int, list[Summary]]:
    """(M, groups with M latents in all) for the M with most kinds of SAE, then most groups. Raises NotEnough where no M has two kinds."""
    widths = grouped(groups, lambda group: group.first.num_latents)
    width, chosen = max(widths.items(), key=_most_kinds, default=(0, []))
    if len(by_kind(chosen)) < 2:
        raise NotEnough("no two kinds of SAE have the same number of latents. Train a Switch and a dense SAE with equal num_latents.")
    return width, chosen


def flop_matched(groups: Sequence[Summary]) -> tuple[int, list[Summary]]:
    """(W, groups): dense SAEs of W latents and those with experts that match them in FLOPs, for the W with most kinds, then most groups.

    Raises NotEnough where no W has both.
    """
    routed = [group for group in groups if group.first.num_experts > 1]
    dense = [group for group in groups if not group.first.kind.is_routed and group.first.num_experts == 1]
    chosen: dict[int, list[Summary]] = {}
    for width, reference in grouped(references(dense), lambda group: group.first.num_latents).items():
        matched = [group for group in routed if any(has_equal_flops(group, other) for other in reference)]
        if matched:
            chosen[width] = [group for group in dense if group.first.num_latents == width] + matched
    if not chosen:
        raise NotEnough(
            "no Switch SAE has experts as wide as a dense TopK SAE. Train sae=topk with num_latents = W and Switch SAEs with W times experts."
        )
    return max(chosen.items(), key=_most_kinds)


def matched_panels(groups: Sequence[Summary]) -> tuple[dict[str, tuple[int, list[Summary]]], list[str]]:
    """(what `width_matched` and `flop_matched` find, by their names; what the other lacks). Raises NotEnough where neither finds any."""
    found: dict[str, tuple[int, list[Summary]]] = {}
    missing = []
    for match in (width_matched, flop_matched):
        try:
            found[match.__name__] = match(groups)
        except NotEnough as error:
            missing.append(str(error))
    if not found:
        raise NotEnough(" ".join(missing))
    return found, missing


def has_equal_flops(group: Summary, dense: Summary) -> bool:
    """Whether two SAEs are FLOP-matched: encoding a token costs the same (the paper's meaning, without the router; `Match.active`), or the FLOPs per
    token of training, router and decoder included, agree within `EQUAL_FLOPS` (`Match.flops`).

    FLOPs are compared at equal k only, since they count the decoder's k rows.
    """
    row, ours, theirs = group.first, group.mean("flops_total"), dense.mean("flops_total")
    if row.results is not None and dense.first.results is not None and row.results.flops["encode"] == dense.first.results.flops["encode"]:
        return True
    return ours is not None and theirs is not None and row.k == dense.first.k and abs(ours - theirs) <= EQUAL_FLOPS * theirs


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


def mean_over_seeds(groups: Sequence[Summary], bars: str = "bars: ± 1 standard deviation") -> str:
    """`Mean over 1 to 3 seeds (1: relu); bars: ± 1 standard deviation.`; without bars where no group has a second seed."""
    counts = sorted({len(group.rows) for group in groups})
    if counts == [1]:
        return "One seed each, no bars."
    several = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    single = [name for name, alike in grouped(groups, lambda group: group.name).items() if all(len(group.rows) == 1 for group in alike)]
    told = ", ".join(single)
    return f"Mean over {several}{f' (1: {told})' if single else ''}; {bars}."


def outliers(groups: Sequence[Summary]) -> str:
    """A sentence for a figure's footnote about the rows that its FVU leaves out; empty where there are none."""
    told = without_outliers([row for group in groups for row in group.rows])
    return f"FVU {told}." if told else ""


def _title(group: Summary) -> str:
    row = group.first
    experts = f"{row.num_experts} x {row.latents_per_expert:,}" if row.num_experts > 1 else f"{row.num_latents:,}"
    return f"{group.name} of {experts} latents" + (f", k={row.k}" if row.k else "")


def _most_kinds(item: tuple[int, list[Summary]]) -> tuple[int, int, int]:
    return len(by_kind(item[1])), len(item[1]), item[0]

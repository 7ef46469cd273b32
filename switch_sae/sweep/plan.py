"""From a sweep's configuration to its members: which SAEs train, each with a whole `RunConfig` of its own."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from switch_sae.checks import Settings, all_at_least
from switch_sae.config import RunConfig
from switch_sae.models import SAES
from switch_sae.models.widths import Match, matched, reference_of
from switch_sae.plain import from_plain, to_plain
from switch_sae.training import TrainerConfig


@dataclass
class SweepOptions(Settings):
    """Which SAEs a sweep trains. The run's own settings (`sae`, `trainer`, `tokens`, ...) are what they all start from."""

    prefix = "sweep."
    experts: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Switch SAEs by number of experts; 1 is the dense TopK SAE, to which it is equal."""
    k: list[int] = field(default_factory=list)
    """For each number of experts; empty takes `sae.k`."""
    match: Match = Match.width
    grids: dict[str, Any] = field(default_factory=dict)
    """More members, as named grids: {name: {sae: {architecture: relu, l1: [1, 3]}, trainer: {lr: 1e-3}, match: flops}}. Lists are axes, of which all
    combinations train; what a grid does not say comes from the run's settings. `match: null` takes num_latents as it is given; a grid that is null is
    left out."""
    seeds: int = 1
    """How many seeds each configuration gets, counted from `seed`."""
    reshuffle: bool = False
    """Seeds visit the activations in orders of their own: one pass over the language model for each (or over the cache, source.cache). Otherwise all
    members see the same batches, and seeds differ in the SAE's start alone."""
    at_once: int | None = None
    """How many SAEs train together, at most; the others follow in further passes. null: all."""
    folder: str | None = None
    """Where the sweep lives; the same command goes on with it, and several processes may work on it at once. null: a new folder in `runs`."""

    worker: int = 0
    """Tells apart the jobs of a multirun that work on one `folder` (sweep.worker=0,1,2,3); which members each takes is settled between them."""

    def __post_init__(self) -> None:
        all_at_least(self, "sweep.", seeds=1, at_once=1)
        for name in ("experts", "k"):
            if wrong := [value for value in getattr(self, name) if value < 1]:
                raise ValueError(f"sweep.{name} holds {wrong}: each must be at least 1.")


@dataclass
class SweepConfig(RunConfig):
    """A run's settings, and the sweep over them."""

    sweep: SweepOptions = field(default_factory=SweepOptions)
    usual: dict[str, Any] = field(default_factory=dict)
    """What settings of an SAE are for this model, such as k, where neither a grid nor `sae` says otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baselines:
            raise ValueError(
                "baselines train beside the SAE of a run; what a sweep compares are its members. Name them in sweep.experts or sweep.grids."
            )

    @property
    def base(self) -> RunConfig:
        """The settings that all members share, without the sweep."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})


class Measures(Protocol):
    """What a plan must know of the stream that members train on; asked only where a width is to be matched."""

    def d_in(self, member: RunConfig) -> int:
        """Size of its activations."""

    def time_matched(self, member: RunConfig, reference: RunConfig) -> int:
        """The member's num_latents at which a step takes as long as one of the dense reference."""


def plan_members(config: SweepConfig, measures: Measures) -> dict[str, RunConfig]:
    """All members by name, each exactly once, in the order of the grids. Raises ValueError for an impossible member, with its grid's name."""
    members: dict[str, RunConfig] = {}
    for grid_name, grid in _grids(config).items():
        try:
            for member, extra in _expand(config, grid, measures):
                for number in range(config.sweep.seeds):
                    seed = config.seed + number
                    source = replace(config.source, seed=seed) if config.sweep.reshuffle else config.source
                    seeded = replace(member, seed=seed, source=source)
                    name = f"{member.sae.slug()}{extra}-s{seed}"
                    if seeded in members.values():
                        continue
                    if name in members:
                        raise ValueError(f"it makes a second member named {name} with other settings. State what differs in the grid.")
                    members[name] = seeded
        except ValueError as error:
            raise ValueError(f"grid {grid_name!r} of the sweep: {error}") from error
    if not members:
        raise ValueError("the sweep has no members: give sweep.experts=[1,8], or grids.")
    return members


def _grids(config: SweepConfig) -> dict[str, Any]:
    options = config.sweep
    k = {"k": options.k} if options.k else {}
    own = SAES.key_of(config.sae)
    architecture = own if SAES[own].is_routed else next(key for key, cls in SAES.items() if cls.is_routed)
    standard = {"experts": {"sae": {"architecture": architecture, "num_experts": options.experts, **k}}} if options.experts else {}
    return standard | {name: grid for name, grid in options.grids.items() if grid is not None}


def _expand(config: SweepConfig, grid: dict[str, Any], measures: Measures) -> Iterator[tuple[RunConfig, str]]:
    """(member without its seed, what its name says beyond the SAE's shape) for every combination of a grid's axes."""
    if not isinstance(grid, dict) or any(not isinstance(grid.get(part) or {}, dict) for part in ("sae", "trainer")):
        raise ValueError(f"{grid!r} is no grid. Write {{sae: {{num_experts: [2, 4]}}, trainer: {{lr: 1e-3}}}}.")
    if unknown := sorted(set(grid) - {"sae", "trainer", "match"}):
        raise ValueError(f"it sets {unknown}; a grid sets `sae`, `trainer` and `match`, everything else is shared by all members.")
    axes = [((part, *path), values) for part in ("sae", "trainer") for path, values in _axes(grid.get(part) or {})]
    match = grid.get("match", config.sweep.match)
    if isinstance(match, str):
        if match not in Match.__members__:
            raise ValueError(f"match={match!r} is not one of {', '.join(Match.__members__)}, null.")
        match = Match[match]
    for values in itertools.product(*(values for _, values in axes)):
        chosen: dict[str, Any] = {"sae": {}, "trainer": {}}
        for (path, _), value in zip(axes, values, strict=True):
            *above, last = path
            functools.reduce(lambda below, name: below.setdefault(name, {}), above, chosen)[last] = value
        sae = _sae(config, chosen["sae"], match)
        trainer = from_plain(TrainerConfig, to_plain(config.trainer) | chosen["trainer"])
        member = replace(config.base, sae=sae, trainer=trainer, baselines=[], name=None)
        if match not in (None, Match.width):
            key = SAES.key_of(sae)
            dense = {name: value for name, value in chosen["sae"].items() if name in SAES[key].shared_with_reference}
            reference = _sae(config, dense | {"architecture": reference_of(key)}, None)
            if sae != reference:
                how = Match.active if match is Match.time else match  # in time, the search begins where both see as many latents
                member.sae = matched(sae, reference, how, measures.d_in(member))
                if match is Match.time:
                    member.sae = replace(sae, num_latents=measures.time_matched(member, replace(member, sae=reference)))
        yield member, "".join(f"-{name}={_short(value)}" for name, value in _told(member.sae, axes, values))


def _axes(settings: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """(path, values) of every setting, `{router: {gate: hard}}` and `{router.gate: hard}` alike."""
    for key, value in settings.items():
        path = (*above, *key.split("."))
        if isinstance(value, dict):
            yield from _axes(value, path)
        else:
            yield path, value if isinstance(value, list) else [value]


def _told(sae: Any, axes: Sequence[tuple[tuple[str, ...], list[Any]]], values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of the settings that a member's name must say: not those of its slug, nor those that its architecture does not have."""
    for ((part, *path), _), value in zip(axes, values, strict=True):
        is_there = part != "sae" or hasattr(sae, path[0])
        if path[-1] not in ("architecture", "num_latents", "num_experts", "k") and is_there:
            yield path[-2] if path[-1] == "kind" else path[-1], value


def _sae(config: SweepConfig, chosen: dict[str, Any], match: Match | None) -> Any:
    """The typed config of one member's SAE: what the grid chose, what it shares with the run's, and what is usual for the model.

    Where its width is to be matched it is only provisional, wide enough for any number of experts.
    """
    if match not in (None, Match.width):
        width, experts = chosen.get("num_latents", config.sae.num_latents), chosen.get("num_experts", getattr(config.sae, "num_experts", 1))
        chosen = chosen | {"num_latents": width * experts}
    has_k = hasattr(SAES.config_of(chosen.get("architecture", SAES.key_of(config.sae))), "k")
    if has_k and not (hasattr(config.sae, "k") or "k" in chosen or "k" in config.usual):
        raise ValueError("k is set by nothing: name it in the grid, in sweep.k, or as `usual: {k: ...}` of the model.")
    return SAES.derive(config.sae, chosen, config.usual).simplest()


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

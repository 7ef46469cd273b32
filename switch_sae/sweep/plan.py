"""From a sweep's configuration to its members: which SAEs train, each with a whole `RunConfig` of its own."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from switch_sae.config import RunConfig
from switch_sae.models import SAES, TopKSAE
from switch_sae.pipeline import short_name
from switch_sae.plain import from_plain, to_plain
from switch_sae.runs import architecture_of, sae_config
from switch_sae.training import TrainerConfig


class Match(Enum):
    """What is held equal among SAEs. W is `sae.num_latents`, the width of the dense SAE that all are compared with."""

    width = "width"
    """Latents in all: M = W."""
    flops = "flops"
    """What one token sees: S * F = W, so M = W * E / S (Mudide et al., arXiv 2410.08201). The router's cost comes on top, and tables count it."""
    parameters = "parameters"
    """Parameters, router and biases included, to within one latent per expert: M = W - (E + 1) / 2, since a latent has 2D + 1 and the router E * D + D."""
    time = "time"
    """Seconds per training step on this machine: widths are measured once, before anything trains, and kept in the sweep's plan."""


@dataclass
class SweepOptions:
    """Which SAEs a sweep trains. The run's own settings (`sae`, `trainer`, `tokens`, ...) are what they all start from."""

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
        for name in ("seeds", "at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"sweep.{name}={value} must be at least 1.")
        for name in ("experts", "k"):
            if wrong := [value for value in getattr(self, name) if value < 1]:
                raise ValueError(f"sweep.{name} holds {wrong}: each must be at least 1.")


@dataclass
class SweepConfig(RunConfig):
    """A run's settings, and the sweep over them."""

    sweep: SweepOptions = field(default_factory=SweepOptions)

    @property
    def base(self) -> RunConfig:
        """The settings that all members share, without the sweep."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in fields(RunConfig)})


TimeMatched = Callable[[RunConfig, RunConfig], int]
"""(member, dense reference) -> the member's num_latents at which both take the same time per step."""


def plan_members(config: SweepConfig, time_matched: TimeMatched) -> dict[str, RunConfig]:
    """All members by name, each exactly once, in the order of the grids. Raises ValueError for an impossible member, with its grid's name."""
    members: dict[str, RunConfig] = {}
    for grid_name, grid in _grids(config).items():
        try:
            for member, extra in _expand(config, grid, time_matched):
                for number in range(config.sweep.seeds):
                    seed = config.seed + number
                    source = replace(config.source, seed=seed) if config.sweep.reshuffle else config.source
                    seeded = replace(member, seed=seed, source=source)
                    name = f"{short_name(member.sae)}{extra}-s{seed}"
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
    standard = {"experts": {"sae": {"architecture": "switch", "num_experts": options.experts, **k}}} if options.experts else {}
    return standard | {name: grid for name, grid in options.grids.items() if grid is not None}


def _expand(config: SweepConfig, grid: dict[str, Any], time_matched: TimeMatched) -> Iterator[tuple[RunConfig, str]]:
    """(member without its seed, what its name says beyond the SAE's shape) for every combination of a grid's axes."""
    if not isinstance(grid, dict) or any(not isinstance(grid.get(part) or {}, dict) for part in ("sae", "trainer")):
        raise ValueError(f"{grid!r} is no grid. Write {{sae: {{num_experts: [2, 4]}}, trainer: {{lr: 1e-3}}}}.")
    if unknown := sorted(set(grid) - {"sae", "trainer", "match"}):
        raise ValueError(f"it sets {unknown}; a grid sets `sae`, `trainer` and `match`, everything else is shared by all members.")
    axes = [
        (part, key, value if isinstance(value, list) else [value]) for part in ("sae", "trainer") for key, value in (grid.get(part) or {}).items()
    ]
    match = grid.get("match", config.sweep.match)
    if isinstance(match, str):
        if match not in Match.__members__:
            raise ValueError(f"match={match!r} is not one of {', '.join(Match.__members__)}, null.")
        match = Match[match]
    for values in itertools.product(*(values for _, _, values in axes)):
        chosen: dict[str, dict[str, Any]] = {"sae": {}, "trainer": {}}
        for (part, key, _), value in zip(axes, values, strict=True):
            chosen[part][key] = value
        sae = _sae(config.sae, chosen["sae"], match)
        trainer = from_plain(TrainerConfig, to_plain(config.trainer) | chosen["trainer"])
        member = replace(config.base, sae=sae, trainer=trainer, baselines=[], name=None)
        if match is Match.time:
            dense = {key: value for key, value in chosen["sae"].items() if key in ("num_latents", "k")}
            reference = replace(member, sae=_sae(config.sae, dense | {"architecture": "topk"}, None))
            if sae != reference.sae:
                member.sae = replace(sae, num_latents=time_matched(member, reference))
        shape = {"architecture", "num_latents", "num_experts", "k"}
        extra = {
            key: value
            for part in ("sae", "trainer")
            for key, value in chosen[part].items()
            if key not in shape and hasattr(getattr(member, part), key)
        }
        yield member, "".join(f"-{key}={_short(value)}" for key, value in extra.items())


def _sae(base: Any, chosen: dict[str, Any], match: Match | None) -> Any:
    """The typed config of one member's SAE: what it shares with `base`, what the grid chose, and the width that matches."""
    chosen = {"architecture": architecture_of(base), **chosen}
    if chosen["architecture"] not in SAES:
        raise ValueError(f"unknown SAE architecture {chosen['architecture']!r}; this version knows {', '.join(SAES)}.")
    if chosen["architecture"] == "switch" and chosen.get("num_experts") == 1:  # equal to it, to the last bit
        alike = {f.name for f in fields(TopKSAE.Config)} | {"architecture"}
        chosen = {key: value for key, value in chosen.items() if key in alike} | {"architecture": "topk"}
    cls = SAES[chosen["architecture"]].Config
    plain = to_plain(base)
    shared = {f.name: plain[f.name] for f in fields(cls) if f.name in plain}
    values = shared | chosen
    if match is not None:
        values["num_latents"] = _matched_width(values, match)
    return sae_config(values)


def _matched_width(values: dict[str, Any], match: Match) -> int:
    width, experts = values["num_latents"], values.get("num_experts", 1)
    if experts == 1 and values["architecture"] != "switch":
        return width
    if match is Match.parameters:
        return experts * round((width - (experts + 1) / 2) / experts)
    if match is Match.width:
        return width
    slots = values.get("experts_per_token", 1)  # matched in time: where the search begins
    if width % slots:
        raise ValueError(f"a dense width of {width} cannot be shared by experts_per_token={slots}. Use a multiple of it for sae.num_latents.")
    return width * experts // slots


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

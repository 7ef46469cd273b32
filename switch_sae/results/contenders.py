"""The SAEs of one width that stand against each other, each with its price: what finding a token's latents costs beside dense TopK's encoder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from switch_sae.invocation import invocation
from switch_sae.models import SAES
from switch_sae.models.inference import Inference
from switch_sae.models.routers import ROUTERS
from switch_sae.plain import to_plain
from switch_sae.results.kind import Kind
from switch_sae.results.leverage import DenseCurve, DenseWidth
from switch_sae.results.rows import TRAINED, ResultRow, flat_settings, grouped, hashable
from switch_sae.results.selection import Material, NotEnough
from switch_sae.results.settings import HEADLINE
from switch_sae.results.summary import Spread, Summary

NEAR = 0.1
"""Relative difference up to which two numbers of latents are one width: experts and shared latents must divide it."""
EQUAL_L0 = 0.02
"""Relative difference up to which two measured L0 are equal."""


@dataclass(frozen=True)
class Measure:
    """One of those that the frontier shows."""

    label: str
    spec: str
    """How tables write it."""
    is_error: bool
    """Whether less is better, and SAEs compare by a ratio; otherwise more is, and they compare by a difference."""

    def compared(self, value: float, reference: float) -> float | None:
        """To dense TopK's; None for a ratio to what is not above 0."""
        if not self.is_error:
            return value - reference
        return value / reference if reference > 0 else None


MEASURES = {
    HEADLINE: Measure("FVU", ".4f", True),
    "delta_ce": Measure("delta CE (nats)", ".3f", True),
    "kl": Measure("KL (nats)", ".3f", True),
    "jaccard_3pct": Measure("Jaccard, 3 % noise", ".3f", False),
    "judge_hard": Measure("judge, hard negatives", ".3f", False),
}
"""Error, what it costs the language model, stability and meaning: no one of them stands for the others."""
PRICES = ("jaccard_3pct", "judge_hard")
"""Without one of them, less error is half of the truth."""


class Contender(NamedTuple):
    """A way to have a token's latents found; with the number of experts, or the cost, it is a point of the frontier."""

    architecture: str
    """Its key in `SAES`."""
    has_shared: bool = False
    """Whether all experts share some latents."""
    has_stop: bool = False
    """Whether a stop rule decides how many latents a token gets, instead of a fixed k."""
    trained: str = ""
    """The inference that it was trained with, where that is not its architecture's usual one."""
    inference: str = ""
    """The inference under which it was scored, where that is not the one that it was trained with."""
    chosen: str = ""
    """What else was chosen and not measured out: `router=competition`, `lists=random`. Other numbers are the same recipe, tuned."""

    @classmethod
    def of(cls, row: ResultRow) -> "Contender":
        """By its settings and role."""
        return cls(
            row.architecture,
            row.num_shared > 0,
            bool(row.config.get("sae.stop")),
            row.config.get("sae.inference") or "",
            row.inference if row.of else "",
            ", ".join(f"{name.removesuffix('.kind')}={value}" for name, value in _chosen(row)),
        )

    @property
    def label(self) -> str:
        """What figures and tables call it: TopK + refit, SwitchPursuit, stop rule."""
        name = (SAES[self.architecture].label if self.architecture in SAES else "") or self.architecture
        words = ["stop rule"] * self.has_stop + ["shared"] * self.has_shared + ([f"trained with {self.trained}"] if self.trained else [])
        words += [self.chosen] * bool(self.chosen)
        return ", ".join([name, *words]) + (f" + {self.inference}" if self.inference else "")

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts the reference first, then dense architectures in the order of `SAES`, each with its variants and then with its inferences."""
        place = list(SAES).index(self.architecture) if self.architecture in SAES else len(SAES)
        inferences = ["", *(inference.name for inference in Inference)]
        variant = (self.trained, self.has_stop, self.has_shared, self.chosen)
        return (*Kind(self.architecture).order[:2], place, *variant, inferences.index(self.inference))


def _chosen(row: ResultRow) -> list[tuple[str, Any]]:
    """The settings that are a choice by name, or a number of routes, and not the architecture's own, or its router's."""
    if row.architecture not in SAES:
        return []
    usual = _usual(row.architecture, row.config.get("sae.router.kind"))
    settings = {key.removeprefix("sae."): value for key, value in row.config.items() if key.startswith("sae.")}
    return [
        (name, settings[name])
        for name, default in usual.items()
        if name not in _TOLD and name in settings and settings[name] != default and (isinstance(default, str | bool) or name in _ROUTES)
    ]


_TOLD = ("inference", "stop")
"""Settings that a `Contender` has fields of its own for."""
_ROUTES = ("experts_per_token", "lists_per_token")


@cache
def _usual(architecture: str, router: str | None) -> dict[str, Any]:
    """The settings by default, flat; those of the router are its own, its kind the architecture's."""
    plain = to_plain(SAES.config_of(architecture)())
    kind = plain.get("router", {}).get(ROUTERS.tag)
    if router in ROUTERS and kind is not None:
        plain["router"] = {ROUTERS.tag: kind, **to_plain(ROUTERS.config_of(router)())}
    return flat_settings(plain)


@dataclass(frozen=True)
class Standing:
    """One contender with so many experts, over seeds, beside the dense reference."""

    contender: Contender
    group: Summary
    reference: Summary
    curve: DenseCurve | None = None
    """Of dense TopK SAEs with its k, where there are several widths."""

    @property
    def compute(self) -> float:
        """FLOPs of router and encoder, or pursuit, per token, as a share of the reference's."""
        return (self.group.mean("flops_encode") or 0.0) / (self.reference.mean("flops_encode") or 1.0)

    @property
    def training(self) -> float:
        """FLOPs of its training per token as a share of the reference's."""
        return (self.group.mean("flops_train") or 0.0) / (self.reference.mean("flops_train") or 1.0)

    @property
    def dots(self) -> float:
        """FLOPs of router and encoder, or pursuit, as dot products with an activation, of which dense TopK takes one for each latent."""
        return self.compute * self.reference.first.num_latents

    @property
    def dense_width(self) -> DenseWidth | None:
        """Of the dense TopK SAE with the same error."""
        error = self.group.mean(HEADLINE)
        return None if self.curve is None or error is None else self.curve.at(error)

    @property
    def leverage(self) -> float | None:
        """Effective dense width per dot product: 1 for dense TopK itself."""
        return None if (effective := self.dense_width) is None else effective.width / self.dots

    @property
    def shape(self) -> str:
        """`24 x 170`, `41 x 98 + 62 shared`, or the number of latents of one dictionary."""
        row = self.group.first
        if row.num_experts == 1:
            return f"{row.num_latents:,}"
        return f"{row.num_experts} x {row.latents_per_expert:,}" + (f" + {row.num_shared} shared" if row.num_shared else "")

    def compared(self, name: str) -> dict[int, float]:
        """Ratio (difference, for what is no error) to the reference, seed by seed, where both know the measure (`MEASURES`)."""
        theirs = {row.seed: value for row in self.reference.rows if (value := row.value(name)) is not None}
        pairs = {row.seed: (value, theirs[row.seed]) for row in self.group.rows if (value := row.value(name)) is not None and row.seed in theirs}
        return {seed: found for seed, pair in pairs.items() if (found := MEASURES[name].compared(*pair)) is not None}

    def record(self) -> dict[str, Any]:
        """All numbers, for a CSV."""
        row, group = self.group.first, self.group
        record: dict[str, Any] = {"recipe": self.contender.label, **self.contender._asdict(), "shape": self.shape, "latents": row.num_latents}
        record |= {"experts": row.num_experts, "k": row.k, "seeds": len(group.rows), "compute": self.compute, "training_compute": self.training}
        record |= {name: group.mean(name) for name in ("flops_encode", "flops_train", "l0", "dead_latents", "error_cv")}
        if self.curve is not None:
            width, extrapolated = self.dense_width or (None, None)
            record |= {"dots": self.dots, "dense_width": width, "dense_width_extrapolated": extrapolated, "leverage": self.leverage}
        for name in MEASURES:
            spread, compared = group.spreads.get(name), self.compared(name)
            record |= {name: spread and spread.mean, f"{name}_sd": spread and spread.sd}
            how = "ratio" if MEASURES[name].is_error else "difference"
            record |= {f"{name}_{how}": Spread.of(list(compared.values())).mean if compared else None}
            record |= {f"{name}_{how}_by_seed": " ".join(f"{value:.4f}" for _, value in sorted(compared.items())) or None}
        return record


@dataclass(frozen=True)
class Frontier:
    """Who stands against whom."""

    reference: Summary
    standings: list[Standing]
    """In the order of contenders, each from the most compute to the least."""
    notes: list[str]
    """What was left out, and where the comparison limps."""

    @property
    def known(self) -> list[str]:
        """The measures that any of them has."""
        return [name for name in MEASURES if any(standing.group.mean(name) is not None for standing in self.standings)]


def frontier(material: Material) -> Frontier:
    """All contenders near the width, and of the k, of the dense reference that most of them have; of one contender with so many experts (or of that
    cost) that was trained in several ways, the way whose settings are the most usual.

    Raises NotEnough without dense TopK, without a second contender beside it, and where neither stability nor meaning was measured.
    """
    groups = [group for group in (*material.groups, *material.further) if group.mean("flops_encode") and group.mean(HEADLINE) is not None]
    dense = [group for group in groups if group.first.kind.is_reference and Contender.of(group.first) == Contender(group.first.architecture)]
    if not dense:
        raise NotEnough("there is no dense TopK SAE among these, the one whose encoder is the unit of compute. Train one: sae=topk.")
    fields = {(group.first.num_latents, group.first.k): _beside(group, groups) for group in dense}
    (width, k), chosen = max(fields.items(), key=lambda item: (len({Contender.of(g.first) for g in item[1]}), len(item[1]), item[0]))
    if len({Contender.of(group.first) for group in chosen}) < 2:
        raise NotEnough(
            f"nothing stands beside dense TopK of {width:,} latents with k = {k}: no other SAE has that k within {NEAR:.0%} of that width."
        )
    if not any(group.mean(name) is not None for group in chosen for name in PRICES):
        raise NotEnough(
            "neither stability (jaccard_3pct) nor meaning (judge_hard) of these SAEs was measured, and less error says little without its price. "
            f"Score them again: {invocation('evaluate', '--probes', run='...')}, or train with evaluation.probes=true."
        )
    best: list[tuple[Contender, Summary]] = []
    notes = []
    for (contender, experts, _), alike in grouped(chosen, lambda group: (Contender.of(group.first), *_size(group))).items():
        first, *others = sorted(alike, key=lambda group: (len(material.deviations(group)), abs(group.first.num_latents - width), _told(group)))
        best.append((contender, first))
        if others:
            differing = _differing([first, *others])
            at = f" of {experts} experts" if experts > 1 else ""
            notes.append(f"{contender.label}{at} was trained in {len(alike)} ways; shown: {differing[0]}; left out: {'; '.join(differing[1:])}")
    reference = next(group for contender, group in best if contender == Contender(group.first.architecture) and group.first.kind.is_reference)
    best.sort(key=lambda pair: (pair[0].order, -(pair[1].mean("flops_encode") or 0.0)))
    by_width = grouped((group for group in dense if group.first.k == k), lambda group: group.first.num_latents).values()
    curve = DenseCurve.of(
        [reference, *(min(alike, key=lambda group: len(material.deviations(group))) for alike in by_width if reference not in alike)]
    )
    standings = [Standing(contender, group, reference, curve) for contender, group in best]
    return Frontier(reference, standings, notes + _uneven(standings))


def share_of(compute: float) -> str:
    """`1/16.3` of dense TopK's, or the factor where it is more."""
    return f"{compute:.3g}" if compute > 0.995 else f"1/{1 / compute:.3g}"


def encode_shares(rows: Iterable[ResultRow]) -> Callable[[int, float | None], str | None]:
    """What says (number of latents, `flops_encode`) as a share of the encoder of the dense TopK SAE nearest to that width among `rows`; None where
    there is none within `NEAR`.
    """
    dense = {
        row.num_latents: row.flops_encode
        for row in rows
        if row.kind.is_reference and row.role in TRAINED and row.flops_encode and row.config.get("sae.inference") is None
    }

    def share(latents: int, flops: float | None) -> str | None:
        width = min(dense, key=lambda width: (abs(width - latents), width), default=None)
        if width is None or not flops or not _is_near(latents, width):
            return None
        return share_of(flops / (dense[width] or 1))

    return share


def _is_near(latents: int, width: int) -> bool:
    return abs(latents - width) <= NEAR * width


def _beside(dense: Summary, groups: Sequence[Summary]) -> list[Summary]:
    return [group for group in groups if group.first.k == dense.first.k and _is_near(group.first.num_latents, dense.first.num_latents)]


def _size(group: Summary) -> tuple[int, float | None]:
    """Its number of experts; without experts what it costs, which other numbers decide there, such as keys or lists."""
    experts = group.first.num_experts
    return experts, None if experts > 1 else group.mean("flops_encode")


def _told(group: Summary) -> str:
    return str(sorted((key, str(value)) for key, value in group.first.settings.items()))


def _differing(groups: Sequence[Summary]) -> list[str]:
    """The settings in which groups differ, of each."""
    settings: list[Mapping[str, Any]] = [{**group.first.settings, "latents": group.first.num_latents} for group in groups]
    keys = [key for key in settings[0] if len({hashable(each.get(key)) for each in settings}) > 1]
    return [", ".join(f"{key.removeprefix('sae.')}={each.get(key)}" for key in keys) or "the same" for each in settings]


def _uneven(standings: Sequence[Standing]) -> list[str]:
    """A line about those whose measured L0 is not the reference's: more latents, less error."""
    at = standings[0].reference.mean("l0")
    if not at:
        return []
    words = [
        f"{standing.contender.label} {standing.shape} {l0:.2f}"
        for standing in standings
        if (l0 := standing.group.mean("l0")) is not None and abs(l0 / at - 1) > EQUAL_L0
    ]
    return [f"measured L0 differs by more than {EQUAL_L0:.0%} from dense TopK's {at:.2f}: {', '.join(words)}"] if words else []

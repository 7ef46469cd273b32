"""Every code of one SAE: fitted on documents A, paid on documents B, in sums over documents.

Shapes: T tokens, D activation size, N documents of a half.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_sae.analysis.codes.latent_classes import fit_classes
from switch_sae.analysis.codes.rate_distortion import Curve, ResidualLaw, water_levels
from switch_sae.analysis.codes.supports import Supports, fit_law, independent_bits, order_of_slots, routes_alone, supports_of, uniform_bits
from switch_sae.analysis.codes.values import Values, fit_values
from switch_sae.analysis.observed import Sample, Seen

UNIFORM, INDEPENDENT, EXACT, BACK = "uniform", "independent", "exact k", ", looks back"


def classes_named(classes: int) -> str:
    return f"{classes} classes"


@dataclass(frozen=True)
class Half:
    """Some documents' rows."""

    row_T: Tensor
    """In reading order."""
    document_T: Tensor
    """From 0 to `num_documents` - 1."""

    @classmethod
    def of(cls, sample: Sample, row_T: Tensor) -> "Half":
        row_T = row_T.sort().values
        return cls(row_T, sample.document_T[row_T].unique(return_inverse=True)[1])

    @property
    def num_documents(self) -> int:
        return int(self.document_T.max()) + 1

    @property
    def tokens_N(self) -> Tensor:
        return self.document_T.bincount().double()

    def sums(self, bits_T: Tensor) -> Tensor:
        """[N] over documents."""
        return torch.zeros(self.num_documents, dtype=torch.float64).index_add_(0, self.document_T, bits_T.double())


@dataclass(frozen=True)
class Task:
    """What all SAEs have to describe, and to which steps."""

    sample: Sample
    fitted: Half
    paid: Half
    steps: Sequence[float]
    """Of values, in units of `unit`."""
    unit: float
    """Root mean square of a coordinate of the centred targets on `fitted`, in their own units."""
    has_text: bool

    @property
    def target_TD(self) -> Tensor:
        return self.sample.rows.target_TD


@dataclass
class Lengths:
    """What one SAE costs. Sums over documents, in bits."""

    seen: Seen
    supports: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By code: [N] of routes and of supports on `paid`."""
    fitted: dict[str, float] = field(default_factory=dict)
    """By code: bits per token on `fitted`."""
    parameters: dict[str, int] = field(default_factory=dict)
    values_N: list[Tensor] = field(default_factory=list)
    """By step, on `paid`."""
    ways: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    """By step, on `paid`: values and residual."""
    fitted_curves: list[Curve] = field(default_factory=list)


def lengths_of(task: Task, seen: Seen, classes: Sequence[int], starts: dict[int, Tensor]) -> Lengths:
    """All codes of an SAE. `classes` are numbers of latent classes in all, of a dense SAE or within experts; `starts` are [T] classes to start from
    too, by their number."""
    lengths = Lengths(seen)
    _supports(task, lengths, supports_of(task.sample, seen), classes, starts)
    _values(task, lengths)
    return lengths


def _supports(task: Task, lengths: Lengths, supports: Supports, classes: Sequence[int], starts: dict[int, Tensor]) -> None:
    fitted, paid = (supports[half.row_T] for half in (task.fitted, task.paid))

    def keep(name: str, on_paid: tuple[Tensor, Tensor], on_fitted: tuple[Tensor, Tensor], parameters: int) -> None:
        route_N, support_N = (task.paid.sums(bits_T) for bits_T in on_paid)
        lengths.supports[name] = route_N, support_N
        lengths.fitted[name] = float(on_fitted[0].mean() + on_fitted[1].mean())
        lengths.parameters[name] = parameters

    keep(UNIFORM, uniform_bits(fitted, paid), uniform_bits(fitted, fitted), 0)
    size = supports.num_groups * supports.num_latents
    keep(INDEPENDENT, independent_bits(fitted, paid), independent_bits(fitted, fitted), size)
    start_TG, routed = routes_alone(fitted), supports.num_groups > 1
    laws = {EXACT: fit_law(fitted, start_TG)}
    if routed and task.has_text:
        laws[EXACT + BACK] = fit_law(fitted, start_TG, looks_back=True)
    experts = max(1, supports.num_groups - 1)
    for number in classes:
        more = [starts[number][task.fitted.row_T]] if number in starts and not routed else []
        activations_TD, document_T = task.target_TD[task.fitted.row_T], task.fitted.document_T
        laws[classes_named(number)], back = fit_classes(fitted, activations_TD, document_T, number // experts, task.has_text, more)
        if back is not None:
            laws[classes_named(number) + BACK] = back
    for name, law in laws.items():
        keep(name, law.bits(paid), law.bits(fitted), law.parameters)


def _values(task: Task, lengths: Lengths) -> None:
    seen = lengths.seen
    row_MD = seen.sae.decoder_weight().detach().float().cpu()
    scale = float(seen.sae.target_scale) * task.unit
    norm_M = row_MD.norm(dim=1)
    direction_MD, order_TK = F.normalize(row_MD, dim=1), order_of_slots(seen)
    latent_TK, value_TK = seen.latents.indices_TK.gather(1, order_TK), seen.latents.values_TK.gather(1, order_TK)
    if bool((value_TK < 0).any()):
        raise ValueError(f"{seen.name} has latents below 0; codes of values are for those that are not negative. Leave it out.")
    gate_TK = torch.ones_like(value_TK)
    if seen.routing is not None:
        before_TK = seen.ungated().values_TK.gather(1, order_TK)
        gate_TK = torch.where(before_TK > 0, value_TK / before_TK, 1.0)
    own_TK = (seen.expert_M[latent_TK] >= 0) & (value_TK > 0)
    gated_TK = own_TK if bool((gate_TK[own_TK] != 1).any()) else torch.zeros_like(own_TK)
    values = Values(value_TK * norm_M[latent_TK] / scale, latent_TK, gate_TK, gated_TK, seen.latents.num_latents)
    residual_TD = (task.target_TD - seen.recon_TD) / task.unit
    for step in task.steps:
        law = fit_values(values[task.fitted.row_T], step)
        read_TK = law.quantizer.read(law.quantizer.levels(values), values.active_TK)
        lost_TD = F.embedding_bag(latent_TK, direction_MD, mode="sum", per_sample_weights=values.value_TK - read_TK)
        left_TD = residual_TD + lost_TD
        residuals = ResidualLaw.fit(left_TD[task.fitted.row_T])
        lengths.ways.append(law.way)
        for half, curves in ((task.fitted, lengths.fitted_curves), (task.paid, lengths.curves)):
            values_N = half.sums(law.bits(values[half.row_T]))
            if half is task.paid:
                lengths.values_N.append(values_N)
            curves.append(_curve(half, left_TD, residuals, values_N))
    lengths.parameters["values"], lengths.parameters["residual"] = law.parameters, residuals.parameters


def gaussian_curve(task: Task) -> Curve:
    """Without an SAE: the activations themselves, as Gaussian with the covariance of `fitted`."""
    centred_TD = task.target_TD / task.unit
    law = ResidualLaw.fit(centred_TD[task.fitted.row_T])
    return _curve(task.paid, centred_TD, law, torch.zeros(task.paid.num_documents, dtype=torch.float64))


def _curve(half: Half, left_TD: Tensor, law: ResidualLaw, values_N: Tensor) -> Curve:
    energy_ND = law.energies(left_TD[half.row_T], half.document_T, half.num_documents)
    bits_NH, error_NH = law.curve(energy_ND, half.tokens_N, water_levels(float(left_TD.shape[1]), left_TD.shape[1]))
    return Curve(bits_NH + values_N[:, None], error_NH)

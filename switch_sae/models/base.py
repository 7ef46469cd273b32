"""The contract that every sparse autoencoder (SAE) keeps, and the values it passes around.

Shapes: T tokens, D activation size (`d_in`), M latents (`d_sae`), E experts, F = M / E latents per expert, S experts per token, K active
latents per token.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from switch_kernels import ALONE, Execution, Group
from switch_sae.checks import Settings
from switch_sae.models.routers.base import Routing
from switch_sae.rows import Rows, Shapes


class Latents(Shapes, ABC):
    """Which of the M latents are active for each of T tokens, and how strongly; 0 where a latent did not fire."""

    num_latents: int
    """M."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """[T, slots]: activations in units of the scaled activations; a slot that holds 0 is unused."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The same latents as [T, M], zeros where nothing fired."""

    @abstractmethod
    def select(self, latent_L: Tensor) -> Tensor:
        """[T, L]: the values of some latents, which differ from each other."""

    @abstractmethod
    def firing_counts(self) -> Tensor:
        """[M] how many tokens each latent fired on; zero-valued slots do not count."""

    @abstractmethod
    def cpu(self) -> Self:
        """The same on the CPU."""


@dataclass(frozen=True, repr=False)
class SparseLatents(Latents):
    """At most K active latents per token. The gate is inside the values, so decoding is linear and knows nothing of experts.

    Slots whose value is 0 are unused: they name some latent but that latent did not fire.
    """

    values_TK: Tensor
    """Activations of the chosen latents, >= 0, in units of the scaled activations."""
    indices_TK: Tensor
    """Global latent indices, int64 in [0, M)."""
    num_latents: int

    @property
    def values(self) -> Tensor:
        return self.values_TK

    def to_dense(self) -> Tensor:
        dense_TM = self.values_TK.new_zeros(self.values_TK.shape[0], self.num_latents)
        return dense_TM.scatter_add(1, self.indices_TK, self.values_TK)

    def select(self, latent_L: Tensor) -> Tensor:
        column_M = torch.full((self.num_latents,), len(latent_L), device=self.values_TK.device)  # the last column takes all others
        column_M[latent_L] = torch.arange(len(latent_L), device=column_M.device)
        selected_TL = self.values_TK.new_zeros(len(self.values_TK), len(latent_L) + 1)
        return selected_TL.scatter_add(1, column_M[self.indices_TK], self.values_TK)[:, :-1]

    def firing_counts(self) -> Tensor:
        counts_M = torch.zeros(self.num_latents, dtype=torch.float32, device=self.values_TK.device)
        return counts_M.scatter_add_(0, self.indices_TK.flatten(), (self.values_TK != 0).float().flatten())

    def cpu(self) -> Self:
        return replace(self, values_TK=self.values_TK.cpu(), indices_TK=self.indices_TK.cpu())


@dataclass(frozen=True, repr=False)
class DenseLatents(Latents):
    """All M latents of every token: what an SAE without a fixed number of active latents gives. Most values are 0."""

    values_TM: Tensor

    @property
    def num_latents(self) -> int:  # type: ignore[override]
        return self.values_TM.shape[1]

    @property
    def values(self) -> Tensor:
        return self.values_TM

    def to_dense(self) -> Tensor:
        return self.values_TM

    def select(self, latent_L: Tensor) -> Tensor:
        return self.values_TM[:, latent_L]

    def firing_counts(self) -> Tensor:
        return (self.values_TM != 0).sum(dim=0).float()

    def cpu(self) -> Self:
        return replace(self, values_TM=self.values_TM.cpu())


@dataclass(frozen=True, repr=False)
class SAEOutput(Shapes):
    """What `SparseAutoencoder.forward` returns."""

    recon_TD: Tensor
    """Reconstruction, in the units of the input."""
    latents: Latents
    routing: Routing | None = None
    """None for architectures without experts."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, a multiply-add counted as two. Elementwise work, selection and the optimiser are not counted.

    Nor is AuxK, whose cost grows with the share of latents that are dead: with 8 experts of 512 latents, k = 16 and D = 128 it adds 22 % to `total`
    at 5 % dead, 171 % at 40 %.
    """

    router: int
    encode: int
    decode: int
    backward: int

    @property
    def forward(self) -> int:
        return self.router + self.encode + self.decode

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Recipe:
    """How an architecture's authors optimise it, where that differs from what the trainer does by default. `TrainerConfig` overrides the rate."""

    lr: float | None = None
    """Peak learning rate; None is the trainer's rule by width."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    unit_decoder: bool = True
    """Whether decoder rows are kept on the unit sphere; False where the loss weighs latents by their rows' norms instead."""


class SAEConfig(Settings):
    """What the `Config`s of all architectures have in common beside their `num_latents`."""

    group = "sae/"

    def simplest(self) -> Any:
        """The config of a simpler architecture that computes the same, where this one has nothing to choose from; else itself."""
        return self

    @property
    def width_step(self) -> int:
        """num_latents must be a multiple of it."""
        return 1

    @property
    def least_latents(self) -> int:
        """The fewest num_latents that fit the other settings."""
        return self.width_step * int(getattr(self, "k", 1))

    def slug(self) -> str:
        """In the name of a folder: switch-e8-m4096-k16. Raises ValueError for an architecture that is not in `SAES`."""
        from switch_sae.models import SAES  # the table holds this module's users

        key = SAES.key_of(self)
        sizes = {"e": "num_experts", "m": "num_latents", "k": "k"}
        return "-".join([key, *(f"{letter}{getattr(self, name)}" for letter, name in sizes.items() if hasattr(self, name))])


_ENTRANCES = ("encode", "decode", "forward", "route", "loss_terms", "initialize", "set_scale", "end_step", "training_step")


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where products keep the dtype of the weights though `torch.autocast` is on: which latents and experts are chosen hangs on the last bits."""
    lowered = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if lowered else nullcontext()


def _outside_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def computed(self: "SparseAutoencoder", *args: Any, **kwargs: Any) -> Any:
        with outside_autocast(self.activation_scale.device):
            return method(self, *args, **kwargs)

    return computed


class SparseAutoencoder(nn.Module, ABC):
    """x_TD -> Latents -> recon_TD. Takes and returns raw activations; `activation_scale` is applied inside.

    Training scales activations once so that their mean squared norm is D (`set_scale`); the factor is a buffer, saved with the weights.
    Activations and targets of any real dtype are read as the same values in the weights' dtype, float32 unless the SAE was cast (`sae.double()`);
    latents and reconstructions come out in that dtype, under `torch.autocast` too. Batches may be empty.
    """

    Config: type[Any]
    """The architecture's settings, a dataclass nested in its class."""
    former_names: ClassVar[dict[str, str]] = {}
    """Today's names of weights that earlier versions saved under others."""
    config: Any
    d_in: int
    num_latents: int
    num_experts: int
    label: str = ""
    """What figures call it: its class's name without "SAE" unless it says otherwise.

    This and the next three are every class's own, never inherited.
    """
    colour: str = "#7A7A7A"
    marker: str = ""
    """Matplotlib's; "" is the common one. Where there are experts, their number chooses the colour, and a marker that is not given."""
    is_reference: bool = False
    """Whether the errors of all others are given relative to its own."""
    is_routed: bool = False
    """Whether a router sends each token to some of its experts."""
    recipe: Recipe = Recipe()
    activation_scale: Tensor
    activations: dict[str, Any]
    """What it was trained on (`ActivationSource.describe`), for an SAE that was loaded; empty before."""
    execution: Execution = Execution()
    """Who computes the forward pass, and in which precision: PyTorch in float32 unless it is set. Not saved:
    it changes rounding, not the function.
    """
    group: Group = ALONE
    """The processes that share a training batch: what is selected or counted over a batch is over all of theirs."""
    b_pre_D: nn.Parameter
    """An autoencoder's bias in both its roles, `b_in_D` and `b_out_D`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("label", "colour", "marker", "is_reference"):
            if name not in vars(cls):
                setattr(cls, name, cls.__name__.removesuffix("SAE") if name == "label" else getattr(SparseAutoencoder, name))
        for name in _ENTRANCES:
            if name in vars(cls):
                setattr(cls, name, _outside_autocast(vars(cls)[name]))

    @abstractmethod
    def encode(self, x_TD: Tensor) -> Latents:
        """The active latents of raw activations, in units of the scaled ones: what latent i adds to the reconstruction of raw activations is its
        value times row i of `decoder_weight()` / `target_scale`. Raises ValueError for another shape than [tokens, d_in], and for what is no tensor.
        """

    @abstractmethod
    def decode(self, latents: Latents) -> Tensor:
        """recon_TD, in the units of the raw activations; `decode(encode(x)) == forward(x).recon_TD`."""

    @abstractmethod
    def forward(self, x_TD: Tensor) -> SAEOutput: ...

    @abstractmethod
    def loss_terms(self, rows: Rows, output: SAEOutput, dead_M: Tensor | None = None) -> dict[str, Tensor]:
        """Scalar loss terms by name, already weighted: the trainer adds them up. `dead_M` marks latents that AuxK should revive."""

    @property
    def d_out(self) -> int:
        """Size of the target; an autoencoder's is that of its input."""
        return self.d_in

    @property
    def target_scale(self) -> Tensor:
        """What targets are scaled by, as `activation_scale` scales inputs; the same for an autoencoder."""
        return self.activation_scale

    @property
    def b_in_D(self) -> Tensor:
        """The centre that is subtracted from scaled activations before they are encoded."""
        return self.b_pre_D

    @property
    def b_out_D(self) -> Tensor:
        """The bias that the decoder adds, in units of scaled targets."""
        return self.b_pre_D

    @property
    def k(self) -> int | None:
        """Active latents per token by construction (at most, or on average); None where training finds their number."""
        return None

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before training step `step` (from 0): where coefficients that rise over the run are set, from these two numbers alone."""

    def end_step(self, rows: Rows, output: SAEOutput) -> None:
        """Called after a training step, without gradients, with what its forward pass gave: where running statistics are kept, in buffers."""

    def share_batches(self, group: Group) -> None:
        """From now on a training batch is what all processes of the group hold."""
        self.group = group

    def set_scale(self, rows: Rows) -> None:
        """Scales activations so that their mean squared norm is D."""
        self.activation_scale.fill_(unit_scale(self._read(rows.x_TD)))

    @abstractmethod
    def initialize(self, rows: Rows) -> None:
        """Sets the data-dependent start (biases) from one large batch of raw activations."""

    @abstractmethod
    def flops(self) -> Flops:
        """Honest cost of one token, router and decoder included."""

    @abstractmethod
    def decoder_weight(self) -> nn.Parameter:
        """W_dec_MD, whose rows stay on the unit sphere if `recipe.unit_decoder`, in units of scaled targets: direction i of raw activations is
        row i / `target_scale`. After `fold_activation_scale` (or `load_sae(path, fold=True)`), `latents.to_dense() @ decoder_weight() + b_out_D` is
        the reconstruction.
        """

    @abstractmethod
    def fold_activation_scale(self) -> None:
        """Absorbs `activation_scale` into the biases and the router, exactly: the function of raw activations stays, the scale becomes 1.

        Latent values and every latent's threshold change units (divided by the old scale); decoder rows keep unit norm.
        """

    def __repr__(self) -> str:
        """Its sizes, then the settings that are not the defaults."""
        names = ("d_in", "num_latents", "num_experts", "k") if self.is_routed else ("d_in", "num_latents", "k")
        shown = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for f in fields(self.config):
            value, default = getattr(self.config, f.name), f.default if f.default_factory is MISSING else f.default_factory()
            if f.name not in shown and value != default:
                shown[f.name] = value.name if isinstance(value, Enum) else value
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def _read(self, x_TD: Tensor) -> Tensor:
        """Activations in the weights' dtype. Raises ValueError for another shape than [tokens, d_in], and for what is no real tensor."""
        real(x_TD, "activations", "[tokens, d_in]")
        if x_TD.ndim != 2 or x_TD.shape[1] != self.d_in:
            raise ValueError(
                f"activations have shape {tuple(x_TD.shape)}; this SAE takes [tokens, d_in={self.d_in}]. Flatten leading dimensions first."
            )
        return x_TD.to(self.activation_scale.dtype)

    def _scaled(self, x_TD: Tensor) -> Tensor:
        """x * activation_scale. Raises ValueError as `_read` does."""
        return self._read(x_TD) * self.activation_scale

    def _target(self, rows: Rows) -> Tensor:
        """The raw target in the weights' dtype. Raises ValueError for another shape than [tokens, d_out], and for what is no real tensor."""
        target_TD = real(rows.target_TD, "targets", "[tokens, d_out]")
        if target_TD.shape != (len(rows), self.d_out):
            raise ValueError(f"targets have shape {tuple(target_TD.shape)}; this SAE's are [tokens={len(rows)}, d_out={self.d_out}].")
        return target_TD.to(self.target_scale.dtype)

    def _dense(self, latents: Latents) -> Tensor:
        """[T, M] in the weights' dtype. Raises ValueError for what are no latents of this SAE."""
        return self._own(latents).to_dense().to(self.decoder_weight().dtype)

    def _own(self, latents: Latents) -> Latents:
        if not isinstance(latents, Latents):
            raise ValueError(
                f"decode takes Latents, not a {type(latents).__name__}. Wrap a tensor [tokens, {self.num_latents}]: DenseLatents(tensor)."
            )
        if latents.num_latents != self.num_latents:
            raise ValueError(f"these are latents of an SAE that has {latents.num_latents}; this one has {self.num_latents}.")
        return latents


def real(values: Tensor, what: str, shape: str) -> Tensor:
    """The tensor itself. Raises ValueError for what is no tensor of real numbers, such as an array of NumPy."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{what} are a {type(values).__name__}; an SAE takes a tensor {shape}. Use torch.as_tensor(...).")
    if values.is_complex():
        raise ValueError(f"{what} are complex ({values.dtype}); an SAE takes real numbers. Use their real part, or view_as_real and flatten.")
    return values


def unit_scale(x_TD: Tensor) -> float:
    """The factor that gives rows a mean squared norm of D. Raises ValueError where there is none: no rows, all zero, or not finite."""
    power = x_TD.double().pow(2).sum(dim=1).mean().item()
    if not 0 < power < math.inf:
        raise ValueError(f"{len(x_TD)} rows of mean squared norm {power} set no scale. Give finite rows, not all zero.")
    return math.sqrt(x_TD.shape[1] / power)

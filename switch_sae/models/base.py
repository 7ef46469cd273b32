"""The contract that every sparse autoencoder (SAE) keeps, and the values it passes around.

Shapes: T tokens, D activation size (`d_in`), M latents (`d_sae`), E experts, F = M / E latents per expert, S experts per token, K active
latents per token.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from switch_kernels import ALONE, PYTORCH, Execution, Group
from switch_sae.checks import Settings
from switch_sae.models.entrances import as_entrances
from switch_sae.models.gram import GramCache
from switch_sae.models.inference import Inference, why_no_inference
from switch_sae.models.latents import Latents
from switch_sae.models.peer_names import PeerNames
from switch_sae.models.routers.base import Routing
from switch_sae.rows import Rows, Shapes


@dataclass(frozen=True, repr=False)
class SAEOutput(Shapes):
    """What `SparseAutoencoder.forward` returns."""

    recon_TD: Tensor
    """Reconstruction, in the units of the input."""
    latents: Latents
    routing: Routing | None = None
    """None for architectures without experts."""
    match: Tensor | None = None
    """mean_t ||proposed values - values||^2, with the encoder's gradient: how far it was from the latents that `Inference` put in their place. None
    where they are its own, and outside training."""

    def shaped(self, leading: Sequence[int]) -> Self:
        """The same with other leading dimensions than T, of equal product; what a subclass adds for training keeps its own."""
        recon_TD = self.recon_TD.reshape(*leading, self.recon_TD.shape[-1])
        routing = None if self.routing is None else self.routing.shaped(leading)
        return replace(self, recon_TD=recon_TD, latents=self.latents.shaped(leading), routing=routing)


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


@dataclass
class SAEConfig(Settings):
    """What the `Config`s of all architectures have in common beside their `num_latents`."""

    group = "sae/"
    inference: Inference | None = field(default=None, kw_only=True)
    """How latents are found: by the encoder, or better than it does (`switch_sae.models.inference`). None is the architecture's own way."""

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


class SparseAutoencoder(PeerNames, nn.Module, ABC):
    """x_TD -> Latents -> recon_TD. Takes and returns raw activations; `activation_scale` is applied inside.

    `encode`, `decode` and calls take any leading dimensions, such as [batch, position, d_in], and keep them in all that they give.

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
    reference: str | None = None
    """Key in `SAES` of the dense architecture that it is compared with; None is the one that `is_reference`."""
    shared_with_reference: tuple[str, ...] = ("num_latents", "k")
    """Settings of a sweep's grid that its dense reference has too."""
    is_routed: bool = False
    """Whether a router sends each token to some of its experts."""
    is_transcoder: bool = False
    """Whether its target is another hook than its input: it trains on a source with targets, and on no other."""
    own_inference: Inference = Inference.encoder
    """What `inference=None` stands for."""
    has_encoder: bool = True
    """Whether it can propose latents without a search (`Inference.encoder`)."""
    num_shared: int = 0
    """Latents that every token may use, whatever its expert: the first ones. The others are split evenly over the experts."""
    threshold: Tensor
    """Where `by_threshold`: what latents must exceed in evaluation, in units of the scaled activations; a buffer."""
    trains_by: tuple[Inference, ...] = (Inference.encoder,)
    """The ways of inference that it can be trained with; it can be scored with all for which `why_no_inference` has no reason."""
    recipe: Recipe = Recipe()
    activation_scale: Tensor
    activations: dict[str, Any]
    """What it was trained on (`ActivationSource.describe`), for an SAE that was loaded; empty before."""
    execution: Execution = PYTORCH
    """Who computes the forward pass, and in which precision: PyTorch in float32 unless it is set. Not saved:
    it changes rounding, not the function.
    """
    search: Execution = PYTORCH
    """Who computes refits and pursuit where `execution` leaves the forward pass to PyTorch; a trainer sets it. Not saved."""
    group: Group = ALONE
    """The processes that share a training batch: what is selected or counted over a batch is over all of theirs."""
    b_pre_D: nn.Parameter
    """An autoencoder's bias in both its roles, `b_in_D` and `b_out_D`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("label", "colour", "marker", "is_reference"):
            if name not in vars(cls):
                setattr(cls, name, cls.__name__.removesuffix("SAE") if name == "label" else getattr(SparseAutoencoder, name))
        for name, method in as_entrances(vars(cls)).items():
            setattr(cls, name, method)

    @abstractmethod
    def encode(self, x_TD: Tensor) -> Latents:
        """The active latents of raw activations, in units of the scaled ones: what latent i adds to the reconstruction of raw activations is its
        value times row i of `decoder_weight()` / `target_scale`. Raises ValueError for another shape than [..., d_in], and for what is no tensor.
        """

    @abstractmethod
    def decode(self, latents: Latents) -> Tensor:
        """recon_TD, in the units of the raw activations; `decode(encode(x)) == forward(x).recon_TD`. Also takes a dense tensor [..., M]."""

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
    def inference(self) -> Inference:
        """How `encode` and `forward` find latents."""
        return self.config.inference or self.own_inference

    @property
    def grams(self) -> GramCache:
        """The Gram matrices of its decoder, for refits and pursuit."""
        cache: GramCache = self.__dict__.setdefault("_grams", GramCache())
        return cache

    @property
    def searches_lists(self) -> bool:
        """Whether pursuit searches a list of latents of each token's own, by the Gram matrix of all M, and not the dictionary of one expert."""
        return int(getattr(self, "experts_per_token", 1)) > 1

    def why_not_trained(self) -> str | None:
        """Why it cannot be trained with the inference that it has; None if it can."""
        if self.inference in self.trains_by:
            return why_no_inference(self, self.inference)
        return f"{type(self).__name__} trains by inference={' or '.join(way.name for way in self.trains_by)}; others are for scoring what was trained"

    def why_no_search(self, inference: Inference) -> str | None:
        """Why refit or pursuit cannot find its latents, for reasons of this architecture's own; None where they can."""
        return None

    @property
    def latents_per_expert(self) -> int:
        """F: those of one expert, without the shared ones."""
        return (self.num_latents - self.num_shared) // self.num_experts

    @property
    def by_threshold(self) -> bool:
        """Whether a threshold decides how many latents are active in evaluation (`switch_sae.models.threshold`)."""
        return False

    @property
    def k(self) -> int | None:
        """Active latents per token by construction (at most, or on average); None where training finds their number."""
        return None

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before training step `step` (from 0): where coefficients that rise over the run are set, from these two numbers alone."""

    def end_step(self, rows: Rows, output: SAEOutput) -> None:
        """Called after a training step, without gradients, with what its forward pass gave: where running statistics are kept, in buffers."""

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside weights and buffers for training to go on bit for bit."""
        return self.grams.state()

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """From `training_state`."""
        self.grams.load(state, self.decoder_weight())

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
        """Rows of activations in the weights' dtype. Raises ValueError for another shape than [T, d_in], and for what is no real tensor."""
        real(x_TD, "activations", "[..., d_in]")
        if x_TD.ndim != 2 or x_TD.shape[1] != self.d_in:
            takes = f"[..., d_in={self.d_in}]" if x_TD.ndim == 2 else f"rows [T, d_in={self.d_in}] here"
            raise ValueError(f"activations have shape {tuple(x_TD.shape)}; this SAE takes {takes}. Give those of the hook that it was made for.")
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
            raise ValueError(f"decode takes Latents or a tensor [..., {self.num_latents}], not a {type(latents).__name__}. Use what encode gives.")
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

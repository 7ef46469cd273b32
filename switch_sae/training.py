"""Training: the only code that changes weights. One `Trainer` per SAE; any number of them share one stream of activations."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from switch_kernels import ALONE, PYTORCH, Execution, Group, Moments
from switch_sae.checks import Settings, all_at_least
from switch_sae.engines import Engine, EngineSettings, Outcome, TorchEngine, TritonEngine
from switch_sae.models import SparseAutoencoder
from switch_sae.models.entrances import outside_autocast
from switch_sae.models.fused import FusedTraining, why_not_fused
from switch_sae.models.inference import Inference, search_plan
from switch_sae.rows import OUTLIER_FACTOR, NormLimit, Rows
from switch_sae.runs import Checkpoint, renamed


class LRWidth(Enum):
    """Which width the automatic learning rate follows."""

    total = "total"
    """All M latents, as in the paper."""
    expert = "expert"
    """The F latents of one expert: what one token sees."""


@dataclass
class TrainerConfig(Settings):
    """How one SAE is optimised. Defaults are those that TopK training has converged on (Gao et al. 2406.04093; sparsify; dictionary_learning)."""

    prefix = "trainer."
    lr: float | None = None
    """Peak learning rate; None is the architecture's published one, and where it has none lr_at_16k / sqrt(width / 2^14)."""
    lr_at_16k: float = 2e-4
    """The automatic rule's rate for 2^14 latents."""
    lr_width: LRWidth = LRWidth.total
    warmup_steps: int | None = None
    """Linear warm-up; None is 1000, or 5 % of a run shorter than 20,000 steps."""
    decay_fraction: float = 0.2
    """The last part of the run, over which the rate falls linearly to 0."""
    clip: float = 1.0
    """Greatest global norm of the whole gradient."""
    moments: Moments = Moments.float32
    """How Adam's moments are stored; bfloat16 needs the Triton backend."""
    dead_after_tokens: int | None = None
    """A latent that has not fired for so many tokens is dead; None is 10 million, or a tenth of a shorter run."""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_at_16k", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"trainer.{name}={value} must be a positive number.")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"trainer.decay_fraction={self.decay_fraction} must lie between 0 (no decay) and 1.")
        all_at_least(self, "trainer.", warmup_steps=0, dead_after_tokens=0)


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, constant, linear decay to 0."""

    peak: float
    warmup_steps: int
    decay_steps: int
    total_steps: int

    @classmethod
    def resolve(cls, config: TrainerConfig, sae: SparseAutoencoder, total_steps: int) -> "Schedule":
        width = sae.num_latents // (sae.num_experts if config.lr_width is LRWidth.expert else 1)
        peak = next(lr for lr in (config.lr, sae.recipe.lr, config.lr_at_16k / math.sqrt(width / 2**14)) if lr is not None)
        warmup = min(1000, total_steps // 20) if config.warmup_steps is None else config.warmup_steps
        return cls(peak, warmup, round(config.decay_fraction * total_steps), total_steps)

    def __call__(self, step: int) -> float:
        rising = min(1.0, (step + 1) / (self.warmup_steps + 1))
        falling = min(1.0, (self.total_steps - step) / self.decay_steps) if self.decay_steps else 1.0
        return self.peak * rising * falling


@dataclass(frozen=True)
class StepResult:
    """What one step saw. Nothing is computed until `numbers` is asked for, so that looking costs a step nothing and changes nothing.

    Valid until the next step of the same trainer, which may write where this reads.
    """

    rows: Rows
    outcome: Outcome
    lr: float

    @property
    def terms(self) -> dict[str, Tensor]:
        """Loss terms, already weighted."""
        return self.outcome.terms

    @property
    def dead_M(self) -> Tensor:
        return self.outcome.dead_M

    def fvu(self) -> float:
        """Centred fraction of variance unexplained, of this batch."""
        return self._fvu().item()

    @torch.no_grad()
    def _fvu(self) -> Tensor:
        target_TD = self.rows.target_TD.float() if self.rows.target_TD.dtype == torch.bfloat16 else self.rows.target_TD
        return self.outcome.squared_error() / (target_TD - target_TD.mean(dim=0)).pow(2).sum()

    def dead_share(self) -> float:
        return self.dead_M.float().mean().item()

    def numbers(self) -> dict[str, float]:
        """Plain numbers for a log: `loss`, each of its terms, batch FVU, L0, dead share, gradient norm, learning rate, experts' load."""
        terms = {f"loss/{name}": term for name, term in self.terms.items()}
        asked = {"fvu": self._fvu(), "dead": self.dead_M.float().mean(), "grad_norm": self.outcome.grad_norm}
        load_E = self.outcome.load_E() if self.outcome.load_E is not None else None
        loads = {} if load_E is None else {"load/max": load_E.max(), "load/min": load_E.min()}
        read = _read({**terms, **asked, "active": self.outcome.active(), **loads})
        row = {name: read[name] for name in terms}
        row = {"loss": sum(row.values()), **row, **{name: read[name] for name in asked}, "lr": self.lr}
        return row | {"l0": read["active"] / len(self.rows), **{name: read[name] for name in loads}}


def _read(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers off the device, which is waited for once for each dtype."""
    found: dict[str, float] = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        names = [name for name, tensor in tensors.items() if tensor.dtype == dtype]
        found |= zip(names, torch.stack([tensors[name].detach().reshape(()) for name in names]).tolist(), strict=True)
    return {name: found[name] for name in tensors}


class Trainer:
    """Trains one SAE: learning rate, engine, dead-latent bookkeeping.

    `execution` says who may compute: with Triton, its kernels do unless `why_not_fused` finds a reason, and autograd otherwise. `group` are
    the processes that share a batch of `batch_size` rows; each steps on its part of it, and all end with the same weights.
    """

    def __init__(
        self, sae: SparseAutoencoder, config: TrainerConfig, total_steps: int, batch_size: int, execution: Execution = PYTORCH, group: Group = ALONE
    ) -> None:
        if why := sae.why_not_trained():
            raise ValueError(f"sae.inference={sae.inference.name} cannot be trained: {why}.")
        sae.share_batches(group)
        self.sae, self.config, self.batch_size = sae, config, batch_size
        self.schedule = Schedule.resolve(config, sae, total_steps)
        limit = config.dead_after_tokens
        self.dead_after_tokens = limit if limit is not None else min(10_000_000, total_steps * batch_size // 10)
        device = sae.decoder_weight().device
        self.tokens_since_fired_M = torch.zeros(sae.num_latents, dtype=torch.int64, device=device)
        settings = EngineSettings(self.schedule, total_steps, config.clip, self.dead_after_tokens, config.moments)
        reason = why_not_fused(sae) if execution.is_triton else None
        self.execution = execution if reason is None else Execution(reason=reason)
        """Who computes steps; `sae.execution`, which its forward pass follows, stays as it is."""
        self.choice = str(self.execution) if execution.is_triton else ""
        """Who computes steps and why, where there was a choice."""
        self.engine: Engine
        if self.execution.is_triton:
            assert isinstance(sae, FusedTraining)
            self.choice += f"; {sae.plan(batch_size)}"
            self.engine = TritonEngine(sae, settings, self.tokens_since_fired_M, execution.dot)
        else:
            if config.moments is not Moments.float32:
                raise ValueError(
                    f"trainer.moments={config.moments.value} needs the Triton backend; this SAE trains with {self.execution}. Use float32."
                )
            self.engine = TorchEngine(sae, settings, self.tokens_since_fired_M)
        if execution.is_triton:
            sae.search = execution
            self.choice += "" if sae.inference is Inference.encoder else f"; {search_plan(sae)}"
        elif sae.inference is Inference.pursuit:
            sae.search = sae.search if sae.search.is_triton else execution  # for its reason
            self.choice = search_plan(sae)
        self.steps_done = 0
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Time spent in steps; on a GPU the device's, for which this waits."""
        self._seconds += self.engine.seconds()
        return self._seconds

    def step(self, rows: Rows) -> StepResult:
        """One optimiser step on one batch of raw activations (this process's share of it): the only function that changes weights or counters.

        Raises FloatingPointError, before anything has changed, when the loss is not finite (Triton: up to 64 steps later, still nothing has changed).
        """
        started = time.perf_counter()
        lr = self.schedule(self.steps_done)
        with outside_autocast(self.tokens_since_fired_M.device):
            outcome = self.engine.step(rows, self.steps_done)
        self.steps_done += 1
        if not self.engine.keeps_time:
            self._seconds += time.perf_counter() - started
        return StepResult(rows, outcome, lr)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) from which `load_state_dict` goes on bit for bit. Raises FloatingPointError for a step that was not finite."""
        tensors = {f"sae/{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= self.engine.state()
        tensors["tokens_since_fired"] = self.tokens_since_fired_M
        tensors |= {f"training/{name}": tensor for name, tensor in self.sae.training_state().items()}
        return tensors, {"steps_done": self.steps_done, "seconds": self.seconds}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        tensors = renamed(tensors, self.sae.former_names)
        self.sae.load_state_dict({name.removeprefix("sae/"): t for name, t in tensors.items() if name.startswith("sae/")})
        self.tokens_since_fired_M.copy_(tensors["tokens_since_fired"])
        self.steps_done, self._seconds = state["steps_done"], state["seconds"]
        self.sae.load_training_state({name.removeprefix("training/"): t for name, t in tensors.items() if name.startswith("training/")})
        self.engine.load({name: t for name, t in tensors.items() if not name.startswith(("sae/", "training/"))}, self.steps_done)


@torch.no_grad()
def prepare(sae: SparseAutoencoder, calibration: Rows, normalize_activations: bool, outlier_factor: float | None = OUTLIER_FACTOR) -> None:
    """The data-dependent start: one scale so that the mean squared norm of activations is D (or 1 if switched off), then the biases.

    Rows beyond `outlier_factor` median norms have no part in it; None leaves none out. The rows may be on another device than the SAE, which stays
    where it is. Raises ValueError for activations that are all zero or not finite.
    """
    calibration = calibration.to(sae.activation_scale.device)
    for rows_TD in (calibration.x_TD, calibration.target_TD):
        if not torch.isfinite(rows_TD).all():
            raise ValueError("the first activations hold NaN or infinite values: check the model, the hook and its dtype.")
        if not rows_TD.any():
            raise ValueError("the first activations are all zero: this hook carries nothing. Choose another.")
    if outlier_factor is not None:
        calibration = NormLimit.of(calibration, outlier_factor).inliers(calibration)
    if normalize_activations:
        sae.set_scale(calibration)
    sae.initialize(calibration)


@dataclass
class Interruption:
    """Set by Ctrl-C or SIGTERM: training saves after the current step and stops. A second signal stops at once."""

    signal: int | None = None
    _previous: dict[int, Any] = field(default_factory=dict)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """Listens inside the block; signals can only be handled in the main thread, and elsewhere nothing changes."""
        try:
            for caught in (signal.SIGINT, signal.SIGTERM):
                self._previous[caught] = signal.signal(caught, self._handle)
        except ValueError:
            self._previous.clear()
        try:
            yield self
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)


def train(
    trainers: dict[str, Trainer],
    source: Any,
    total_steps: int,
    *,
    save: Callable[[Checkpoint], None],
    checkpoint_every: int,
    log: Callable[[int, str, dict[str, float]], None] | None = None,
    log_every: int = 50,
    progress: Callable[[int, dict[str, StepResult]], None] | None = None,
    resume: Checkpoint | None = None,
    interruption: Interruption | None = None,
    failed: Callable[[str, int, Exception], None] | None = None,
) -> bool:
    """Trains every member on the same batches until `total_steps`; True when it got there, False when it was interrupted (and saved).

    With `failed`, a member whose step or whose state raises leaves the group, `failed` is told (name, step, error), and the others go on as if it had
    never been there; without it the error goes up.

    `save` receives a `Checkpoint` of the whole group: all members at one step, and the source's position. Its tensors are the living
    ones, so it must write or copy them before it returns. Logging and progress only
    read. A resumed run equals an uninterrupted one bit for bit.
    """
    step = 0
    if resume is not None:
        step = resume.step
        load_group(trainers, resume)
        source.load_state_dict(resume.state["source"])
    interruption = interruption or Interruption()
    trainers = dict(trainers)

    def each(step: int, action: Callable[[Trainer], Any]) -> dict[str, Any]:
        """What `action` gives for every member; those for which it raises are out."""
        results = {}
        for name, trainer in list(trainers.items()):
            try:
                results[name] = action(trainer)
            except Exception as error:  # whatever one member died of is told, and must not end the others
                if failed is None:
                    raise
                del trainers[name]
                failed(name, step, error)
        return results

    device = next(iter(trainers.values())).sae.decoder_weight().device
    while step < total_steps and trainers:
        rows = next(source).to(device)
        results: dict[str, StepResult] = each(step, lambda trainer, rows=rows: trainer.step(rows))  # type: ignore[misc]
        if not results:
            break
        step += 1
        if log is not None and log_every and (step % log_every == 0 or step == total_steps or step == 1):
            for name, result in results.items():
                log(step, name, result.numbers())
        if progress is not None:
            progress(step, results)
        stop = interruption.signal is not None and step < total_steps
        if stop or step == total_steps or (checkpoint_every and step % checkpoint_every == 0):
            states = each(step, Trainer.state_dict)
            if states:
                save(group_checkpoint(states, source, step))
        if stop:
            return False
    return True


def group_checkpoint(states: dict[str, tuple[dict[str, Tensor], dict[str, Any]]], source: Any, step: int) -> Checkpoint:
    """The states of all members (`Trainer.state_dict`) and of their source, as one transaction."""
    tensors: dict[str, Tensor] = {"torch_rng": torch.get_rng_state()}
    for name, (member_tensors, _) in states.items():
        tensors |= {f"{name}:{key}": tensor.cpu() for key, tensor in member_tensors.items()}
    return Checkpoint(step, tensors, {"members": {name: state for name, (_, state) in states.items()}, "source": source.state_dict()})


def part_of(checkpoint: Checkpoint, keys: Mapping[str, str]) -> Checkpoint:
    """The checkpoint of the members `keys` alone, each under the name that `keys` gives it; it shares the tensors."""
    tensors = {
        f"{key}:{tensor.removeprefix(f'{name}:')}": value
        for name, key in keys.items()
        for tensor, value in checkpoint.tensors.items()
        if tensor.startswith(f"{name}:")
    }
    state = checkpoint.state | {"members": {key: checkpoint.state["members"][name] for name, key in keys.items()}}
    return Checkpoint(checkpoint.step, {"torch_rng": checkpoint.tensors["torch_rng"], **tensors}, state)


def joined(parts: Sequence[tuple[Checkpoint, Mapping[str, str]]]) -> Checkpoint:
    """The inverse of `part_of`: a group's checkpoint from parts that trained on the same stream.

    Raises ValueError where they stand at different places of the stream.
    """
    first = parts[0][0]
    tensors: dict[str, Tensor] = {"torch_rng": first.tensors["torch_rng"]}
    members: dict[str, Any] = {}
    for checkpoint, keys in parts:
        if checkpoint.step != first.step or checkpoint.state["source"] != first.state["source"]:
            raise ValueError(f"the checkpoint of {', '.join(keys)} is at step {checkpoint.step} of its stream, another one at {first.step}.")
        whole = part_of(checkpoint, {key: name for name, key in keys.items()})
        tensors, members = tensors | whole.tensors, members | whole.state["members"]
    return Checkpoint(first.step, tensors, first.state | {"members": members})


def load_group(trainers: dict[str, Trainer], checkpoint: Checkpoint) -> None:
    """Puts every member back to the checkpoint. Raises ValueError when the group's members differ from the saved ones."""
    saved = checkpoint.state["members"]
    if set(saved) != set(trainers):
        raise ValueError(f"the checkpoint holds {sorted(saved)}, this run trains {sorted(trainers)}: resume with the run's own config.json.")
    for name, trainer in trainers.items():
        prefix = f"{name}:"
        tensors = {key.removeprefix(prefix): t for key, t in checkpoint.tensors.items() if key.startswith(prefix)}
        trainer.load_state_dict(tensors, saved[name])
    torch.set_rng_state(checkpoint.tensors["torch_rng"])

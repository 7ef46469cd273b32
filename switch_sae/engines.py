"""How one training step is computed: by autograd on any device (`TorchEngine`), or by fused Triton kernels on a GPU (`TritonEngine`)."""

import math
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from switch_kernels import Moments
from switch_kernels.adam import Adam
from switch_kernels.backend import Dot
from switch_kernels.held import Held, on_meta
from switch_sae.models import SparseAutoencoder
from switch_sae.models.fused import FusedTraining
from switch_sae.models.routers.base import expert_shares
from switch_sae.rows import Rows


@dataclass(frozen=True)
class Outcome:
    """What one step saw, on the device; valid until the next step."""

    terms: dict[str, Tensor]
    grad_norm: Tensor
    dead_M: Tensor
    """bool [M]: the latents that counted as dead."""
    squared_error: Callable[[], Tensor]
    """sum_t ||target - recon||^2 in units of the raw activations; computed when asked for."""
    active: Callable[[], Tensor]
    """How many pairs of a token and an active latent there were; computed when asked for."""
    load_E: Callable[[], Tensor] | None
    """Experts' shares of the batch; None without a router."""


class Engine(Protocol):
    """Computes steps of one SAE and applies them. It changes weights, optimiser state and `tokens_since_fired_M`, and nothing else."""

    def step(self, rows: Rows, step: int) -> Outcome: ...
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: dict[str, Tensor], step: int) -> None: ...
    def seconds(self) -> float: ...
    def step_bytes(self, tokens: int) -> int: ...

    keeps_time: bool
    """Whether `seconds` knows the steps' time; otherwise the caller's clock does."""


@dataclass(frozen=True)
class EngineSettings:
    """What both engines need of a trainer."""

    lr: Callable[[int], float]
    """Learning rate by step."""
    total_steps: int
    clip: float
    dead_after_tokens: int
    moments: Moments = Moments.float32


def trainable(sae: SparseAutoencoder) -> dict[str, Tensor]:
    return {name: p for name, p in sae.named_parameters() if p.requires_grad}


def not_finite(step: int, terms: dict[str, Tensor]) -> FloatingPointError:
    shown = {name: term.item() for name, term in terms.items()}
    return FloatingPointError(
        f"the loss is {sum(shown.values())} at step {step} ({shown}). No weight was changed. "
        "Look for NaN or huge values in the activations, or lower the learning rate: trainer.lr=..."
    )


class TorchEngine:
    """Forward, loss terms, autograd, `Adam`. Looks for dead latents and for a loss that is not finite at every step."""

    keeps_time = False

    def __init__(self, sae: SparseAutoencoder, settings: EngineSettings, tokens_since_fired_M: Tensor) -> None:
        self.sae, self.settings, self.tokens_since_fired_M = sae, settings, tokens_since_fired_M
        unit_rows = next((name for name, p in trainable(sae).items() if p is sae.decoder_weight()), None) if sae.recipe.unit_decoder else None
        self.optimizer = Adam(trainable(sae), unit_rows, betas=sae.recipe.betas, group=sae.group)

    def step(self, rows: Rows, step: int) -> Outcome:
        sae = self.sae
        sae.begin_step(step, self.settings.total_steps)
        dead_M = self.tokens_since_fired_M >= self.settings.dead_after_tokens
        output = sae(rows.x_TD)
        terms = sae.loss_terms(rows, output, dead_M if bool(dead_M.any()) else None)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(sae.group.mean([loss])[0]):
            raise not_finite(step, terms)
        parameters = self.optimizer.parameters
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        grad_norm = self.optimizer.step(dict(zip(parameters, gradients, strict=True)), self.settings.lr(step), self.settings.clip)
        with torch.no_grad():
            sae.end_step(rows, output)
            fired_M = output.latents.firing_counts() > 0
            sae.group.any_(fired_M)
            self.tokens_since_fired_M.add_(len(rows) * sae.group.size).masked_fill_(fired_M, 0)
        recon_TD, routing, values = output.recon_TD.detach(), output.routing, output.latents.values.detach()
        load_E = (lambda: expert_shares(routing.expert_TS, routing.probs_TE.shape[1])) if routing is not None else None
        return Outcome(
            {name: term.detach() for name, term in terms.items()}, grad_norm, dead_M, lambda: (rows.target_TD - recon_TD).pow(2).sum(),
            lambda: (values > 0).sum(), load_E,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        return {f"adam/{key}": tensor for key, tensor in self.optimizer.state().items()}

    def load(self, state: dict[str, Tensor], step: int) -> None:
        self.optimizer.load({key.removeprefix("adam/"): tensor for key, tensor in state.items() if key.startswith("adam/")})

    def seconds(self) -> float:
        return 0.0

    def step_bytes(self, tokens: int) -> int:
        """Gradients of all weights: the least that a step holds, without batch and activations."""
        return sum(p.numel() * p.element_size() for p in self.optimizer.parameters.values())


def _readable(rows_TD: Tensor) -> Tensor:
    """As kernels read activations: float32 or bfloat16."""
    return rows_TD if rows_TD.dtype == torch.bfloat16 else rows_TD.float()


def same_form(a: Rows, b: Rows) -> bool:
    """Whether two batches have the same shapes and dtypes, and both or neither have targets of their own."""
    pairs = ((a.x_TD, b.x_TD), (a.target_TD, b.target_TD))
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs) and (a.x_TD is a.target_TD) == (b.x_TD is b.target_TD)


class TritonEngine:
    """`training_step` and `FusedAdam` of switch_kernels, replayed as a CUDA graph: no step waits for the device.

    The device is read once every `INTERVAL` steps: which latents are dead, and whether any step's gradient was not finite (such a step changes no
    weight; FloatingPointError follows at the next reading). The hyperparameters of the steps between are uploaded then too. Results are bitwise
    reproducible; a resumed run equals an uninterrupted one.
    """

    INTERVAL = 64
    EAGER_STEPS = 2  # before a graph is captured: kernels compile and libraries allocate their workspaces

    # All graphs of an engine are captured on one stream of its own and share one memory pool: temporaries are dead between replays, and only captured
    # outputs, which `graphs` holds, keep their place. A library's workspace belongs to the stream and lies in the pool, so a graph of another engine
    # that goes away takes nothing along. A pool ends with its last graph and cannot be used again.

    def __init__(self, sae: FusedTraining, settings: EngineSettings, tokens_since_fired_M: Tensor, dot: Dot) -> None:
        from switch_kernels.gpu.adam import FusedAdam

        self.sae, self.settings, self.tokens_since_fired_M, self.dot = sae, settings, tokens_since_fired_M, dot
        self.device = tokens_since_fired_M.device
        self.keeps_time = self.device.type == "cuda"
        moments = torch.bfloat16 if settings.moments is Moments.bfloat16 else torch.float32
        self.optimizer = FusedAdam(trainable(sae), dot, moments)
        self.hyper_IH = torch.zeros(self.INTERVAL, 6, device=self.device)
        self.position, self.seed = (torch.zeros(1, dtype=dtype, device=self.device) for dtype in (torch.int64, torch.int32))
        self.worst_norm = torch.zeros((), device=self.device)
        self.dead_M = torch.zeros(sae.num_latents, dtype=torch.bool, device=self.device)
        self.dead: Any = None
        self.next_reading = 0
        self.kind: Hashable = None
        """What `FusedTraining.prepare_step` said of the step."""
        self.graphs: dict[tuple[int, Hashable], tuple[Any, Any]] = {}
        self.eager_steps: dict[tuple[int, Hashable], int] = {}
        self.stream: Any = None
        self.events: list[tuple[Any, Any, bool]] = []
        """Start and end of the steps that nobody has read yet, and whether each was replayed."""
        self.finished: list[tuple[Any, Any, bool]] = []
        """Those that the device has left behind, to be read while it works on."""
        self.clock = self._new_clock()
        self.rows: Rows | None = None

    def step(self, rows: Rows, step: int) -> Outcome:
        with self._on_device():
            return self._step(rows, step)

    def _on_device(self) -> AbstractContextManager[object]:
        """Streams, events and captures go to the current device."""
        return torch.cuda.device(self.device) if self.keeps_time else nullcontext()

    @torch.no_grad()
    def _step(self, rows: Rows, step: int) -> Outcome:
        if step >= self.next_reading:
            self._read(step)
        if self.keeps_time:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        if self.rows is None or not same_form(self.rows, rows):
            self.rows = rows.map(lambda rows_TD: torch.empty_like(rows_TD, memory_format=torch.contiguous_format))
            self.graphs.clear()
            self.eager_steps.clear()
        self.rows.x_TD.copy_(rows.x_TD)
        if rows.target_TD is not rows.x_TD:
            self.rows.target_TD.copy_(rows.target_TD)
        self.kind = self.sae.prepare_step()
        is_captured = self._key() in self.graphs
        computed, grad_norm = self._replay() if self.keeps_time else self._compute()
        torch.autograd.graph.increment_version(list(self.optimizer.parameters.values()))  # kernels and graphs write where PyTorch does not see it
        if self.keeps_time:
            end.record()
            self.events.append((start, end, is_captured))
            self._count(self.finished)
        self.optimizer.steps_taken = step + 1
        self.sae.stepped(len(rows))
        scale = self.sae.target_scale
        pairs_E = computed.pairs_E
        return Outcome(
            computed.terms, grad_norm, self.dead_M, lambda: computed.squared_error / scale.square(), computed.active_pairs,
            (lambda: pairs_E / pairs_E.sum()) if pairs_E is not None else None,
        )  # fmt: skip

    def _compute(self) -> tuple[Any, Tensor]:
        """All device work of one step, on buffers that stay where they are."""
        from switch_kernels.gpu.topk import mark_fired_
        from switch_kernels.gpu.update_small import Schedule

        assert self.rows is not None
        rows = self.rows.map(_readable)
        computed = self.sae.training_step(rows, self.optimizer.operands, self.dead, self.dot, self.seed)
        grad_norm = self.optimizer.step(computed.gradients, Schedule(self.hyper_IH, self.position, self.seed, self.worst_norm))
        mark_fired_(self.tokens_since_fired_M, computed.values_TK, computed.indices_TK, len(self.rows))
        self.sae.follow_step(computed, self.seed)
        return computed, grad_norm

    def _key(self) -> tuple[int, Hashable]:
        """Dead latents (rounded up) and the kind of step, for each of which there is a graph."""
        return 0 if self.dead is None else self.dead.latent_B.shape[0], self.kind

    def _replay(self) -> tuple[Any, Tensor]:
        """Runs `_compute` eagerly at first, then captures it once for every key, and replays."""
        key = self._key()
        if key not in self.graphs:
            done = self.eager_steps.get(key, 0)
            if done < self.EAGER_STEPS:
                self.eager_steps[key] = done + 1
                return self._compute()
            self.graphs[key] = self._capture()
        graph, captured = self.graphs[key]
        graph.replay()
        return captured

    def _capture(self) -> tuple[Any, Any]:
        """`_compute` as a graph, and the tensors that a replay writes."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        pool = next((graph.pool() for graph, _ in self.graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, self.stream, "thread_local"):  # other threads may be fetching activations
            captured = self._compute()
        return graph, captured

    def _read(self, step: int) -> None:
        """The one place that waits for the device, which then waits for the host: what can be done before or after is."""
        hyper_IH = self._hyper(step)
        self.check()
        self.finished += self.events
        self.events.clear()
        self.dead_M.copy_(self.tokens_since_fired_M >= self.settings.dead_after_tokens)
        self._start_interval(step, hyper_IH)

    def _hyper(self, step: int) -> Tensor:
        """Hyperparameters of the steps up to the next multiple of `INTERVAL`, on the CPU."""
        last = step - step % self.INTERVAL + self.INTERVAL
        return torch.tensor([self.optimizer.hyper(n, self.settings.lr(n), self.settings.clip) for n in range(step, last)])

    def _start_interval(self, step: int, hyper_IH: Tensor) -> None:
        """From this step on, these hyperparameters and the latents that are dead now."""
        self.next_reading = step + len(hyper_IH)
        self.hyper_IH[: len(hyper_IH)].copy_(hyper_IH)
        self.position.zero_()
        self.seed.fill_(step)
        # A dead set of another size has tensors of another shape, and graphs of its own; of the same size it is written where the graph reads it.
        fresh = self.sae.dead_latents(self.dead_M)
        if fresh is not None and self.dead is not None and fresh.latent_B.shape == self.dead.latent_B.shape:
            for name in ("latent_B", "is_padding_B", "slot_M"):
                getattr(self.dead, name).copy_(getattr(fresh, name))
        else:
            self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] == 0}
            self.dead = fresh

    def check(self) -> None:
        if not math.isfinite(self.worst_norm.item()):
            raise FloatingPointError(
                f"the gradient was not finite at a step before step {self.optimizer.steps_taken}. No weight was changed at such a step. "
                "Look for NaN or huge values in the activations, or lower the learning rate: trainer.lr=..."
            )

    def state(self) -> dict[str, Tensor]:
        self.check()
        return {"dead": self.dead_M, **{f"adam/{key}": tensor for key, tensor in self.optimizer.state().items()}}

    def load(self, state: dict[str, Tensor], step: int) -> None:
        self.optimizer.load({key.removeprefix("adam/"): tensor for key, tensor in state.items() if key.startswith("adam/")})
        self.worst_norm.zero_()
        if "dead" in state and step % self.INTERVAL:
            self.dead_M.copy_(state["dead"])
            self._start_interval(step, self._hyper(step))
        else:
            self.next_reading = step

    def seconds(self) -> float:
        """Device time of the steps since it was last asked for; waits for them.

        In a step that runs eagerly or captures a graph the device waits for the host, which compiles: such a step counts as much as a replayed one
        does on average, and as what it took only where none was replayed.
        """
        self._read_clock()
        (replayed, replays), (other, others) = self.clock[True], self.clock[False]
        self.clock = self._new_clock()
        return replayed * (replays + others) / replays if replays else other

    @staticmethod
    def _new_clock() -> dict[bool, tuple[float, int]]:
        """Seconds and number of the steps that were replayed, and of those that were not."""
        return {True: (0.0, 0), False: (0.0, 0)}

    def _read_clock(self) -> None:
        """Waits for the steps that were taken."""
        if self.events:
            with self._on_device():
                self.events[-1][1].synchronize()
        self._count(self.finished)
        self._count(self.events)

    def _count(self, events: list[tuple[Any, Any, bool]]) -> None:
        """Adds the times of steps that have ended to the clock, and forgets their events."""
        for start, end, replayed in events:
            seconds, steps = self.clock[replayed]
            self.clock[replayed] = seconds + start.elapsed_time(end) / 1e3, steps + 1
        events.clear()

    @torch.no_grad()
    def step_bytes(self, tokens: int) -> int:
        """What a step on so many tokens holds at most beside weights and moments: the batch, low-precision copies of encoder and decoder,
        pre-activations, latents, rows, gradients.

        The pool that all graphs share keeps it between steps too. The step is taken on meta tensors: nothing is launched, nothing held. Without dead
        latents, of which AuxK's tensors are.
        """
        from switch_kernels.gpu.launch import launches_to

        sae = on_meta(self.sae)
        other = TritonEngine(sae, self.settings, self.tokens_since_fired_M.to("meta"), self.dot)
        weights = {parameter.untyped_storage() for parameter in sae.parameters()}
        copies = sum(copy.nbytes for copy in other.optimizer.operands.values() if copy.untyped_storage() not in weights)
        with Held() as held, launches_to(lambda launch: None):
            other.rows = Rows.of(torch.empty(tokens, sae.d_in, device="meta"))
            other.kind = sae.prepare_step()
            other._compute()
        return copies + held.peak

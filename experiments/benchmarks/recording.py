"""Recordings of kernel launches: every launch of some small steps in Triton's interpreter, with its bytes before and after. See `replay`."""

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.cases import Case
from switch_kernels import Backend, Execution, Moments, Precision, Regime, Shape
from switch_sae.models.routers import CompetitionRouter

FORMAT = 1
SMALL = Shape(T=160, D=72, M=288, E=3, K=8)
CASES: dict[str, tuple[Case, torch.dtype]] = {
    "dense": (Case(SMALL, regime=Regime.dense), torch.bfloat16),
    "dense, wide": (Case(replace(SMALL, T=400, M=1040, E=2), regime=Regime.dense), torch.float32),
    "dense, AuxK": (Case(SMALL, moments=Moments.bfloat16, regime=Regime.dense, dead=20), torch.float32),
    "many experts": (Case(Shape(T=40, D=24, M=1040, E=130, K=4), regime=Regime.dense), torch.float32),
    "dense, two slots": (Case(replace(SMALL, S=2, T=100), regime=Regime.dense), torch.float32),
    "dense, two slots apart": (Case(replace(SMALL, S=2, T=100, joint=False), regime=Regime.dense), torch.float32),
    "dense, float32": (Case(SMALL, Precision.float32, regime=Regime.dense, dead=20), torch.float32),
    "sparse": (Case(replace(SMALL, E=2, T=320), regime=Regime.sparse, dead=20), torch.float32),
    "sparse, two slots": (Case(replace(SMALL, S=2, T=240), regime=Regime.sparse), torch.float32),
    "sparse, recomputed": (Case(replace(SMALL, T=64), moments=Moments.bfloat16, regime=Regime.sparse), torch.float32),
    "sparse, float32": (Case(replace(SMALL, E=2, T=320), Precision.float32, regime=Regime.sparse), torch.float32),
    "sparse, recomputed, float32": (Case(replace(SMALL, T=64), Precision.float32, regime=Regime.sparse, dead=20), torch.float32),
    "one expert": (Case(replace(SMALL, E=1), regime=Regime.sparse), torch.float32),
    "one expert, dense": (Case(replace(SMALL, T=640, D=136, M=128, E=1), regime=Regime.dense, dead=20), torch.float32),
}
"""With the dtype of the activations. M > 0.39 T K makes the sparse regime compute gradients twice, which T = 64 does here. The first latent of each
expert fires for every token (`steps`): its pairs fill whole chunks, which only then have sums of their own."""


PURSUIT: dict[str, Any] = {"architecture": "switch_pursuit", "num_latents": 80, "k": 8, "num_experts": 2}
STOP: dict[str, Any] = {"architecture": "switch_pursuit", "num_latents": 96, "k": 8, "num_experts": 2, "shared": 16, "stop": True}
REFIT: dict[str, Any] = {"architecture": "switch_refit", "num_latents": 96, "k": 8, "num_experts": 2, "shared": 16}
RIVALS: dict[str, Any] = {"architecture": "switch", "num_latents": 80, "k": 4, "num_experts": 2, "router": CompetitionRouter.Config()}
SEARCHES: dict[str, dict[str, Any]] = {
    "pursuit, float32": PURSUIT | {"precision": Precision.float32},
    "pursuit": PURSUIT,
    "pursuit, stop rule, float32": STOP | {"precision": Precision.float32},
    "pursuit, stop rule, AuxK": STOP | {"dead": 5},
    "refit, AuxK, float32": REFIT | {"precision": Precision.float32, "dead": 5},
    "refit": REFIT | {"tokens": 128},
    "competition": RIVALS,
    "threshold, gates": {name: value for name, value in RIVALS.items() if name != "router"} | {"architecture": "switch_batch_topk"},
    "threshold, competition, float32": RIVALS | {"architecture": "switch_batch_topk", "precision": Precision.float32},
}
"""SAEs that search, compete or have one threshold: a training step of each is recorded, and the encoding of those in float32. `dead` latents of each
expert are dead; only so many tokens fill whole chunks, with the pairs of the first latent."""


@dataclass(frozen=True)
class Recorded:
    """One launch. Arguments are plain data: tensors stand as {"storage": number, "dtype", "offset", "shape", "stride"}, descriptors beside them."""

    case: str
    module: str
    kernel: str
    source: str
    """Hash of the kernel's own source."""
    names: list[str]
    """Of the kernel's arguments."""
    grid: list[int]
    args: list[Any]
    kwargs: dict[str, Any]
    before: list[str]
    """By storage: the hash of its bytes."""
    after: list[str]


class StaleError(Exception):
    """The recording is of other kernels than these."""


def source_hash(kernel: Any) -> str:
    """Of the text of a kernel, which its interpreted form has too."""
    return hashlib.sha256(inspect.getsource(kernel.fn).encode()).hexdigest()[:16]


class Recorder:
    """Receives launches, runs them, and keeps their bytes once each."""

    def __init__(self) -> None:
        self.case = ""
        self.launches: list[Recorded] = []
        self.blobs: dict[str, bytes] = {}

    def __call__(self, launch: Any) -> None:
        function = launch.kernel.fn
        if getattr(importlib.import_module(function.__module__), function.__name__, None) is not launch.kernel:
            raise ValueError(f"kernel {function.__name__} cannot be found in {function.__module__} by its name, so no replay could.")
        storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        args = [self._plain(argument, storages) for argument in launch.args]
        before = [self._keep(storage) for _, storage in storages.values()]
        launch.run()
        after = [self._keep(storage) for _, storage in storages.values()]
        kwargs = {name: self._plain(value, storages) for name, value in launch.kwargs.items()}
        self.launches.append(
            Recorded(
                self.case, function.__module__, function.__name__, source_hash(launch.kernel), list(launch.kernel.arg_names), list(launch.grid), args,
                kwargs, before, after,
            )
        )  # fmt: skip

    def _keep(self, storage: torch.UntypedStorage) -> str:
        data = bytes(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())  # type: ignore[call-overload]
        key = hashlib.sha256(data).hexdigest()[:32]
        self.blobs.setdefault(key, data)
        return key

    def _plain(self, argument: Any, storages: dict[int, tuple[int, torch.UntypedStorage]]) -> Any:
        if argument is None or isinstance(argument, (bool, int, float, str)):
            return argument
        if isinstance(argument, Tensor):
            storage = argument.untyped_storage()
            number, _ = storages.setdefault(storage.data_ptr(), (len(storages), storage))
            where = {"offset": argument.storage_offset(), "shape": list(argument.shape), "stride": list(argument.stride())}
            return {"storage": number, "dtype": str(argument.dtype).removeprefix("torch."), **where}
        if type(argument).__name__ == "TensorDescriptor":
            own = {"shape": list(argument.shape), "strides": list(argument.strides), "block_shape": list(argument.block_shape)}
            return {"descriptor": self._plain(argument.base, storages), **own}
        if isinstance(argument, (list, tuple)):
            return [self._plain(part, storages) for part in argument]
        raise TypeError(f"an argument of type {type(argument).__name__} cannot be recorded; replay.Recorder must learn how to write and read it.")

    def write(self, path: Path) -> None:
        """The same bytes for the same launches, whatever the machine and the hour."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            about = {"format": FORMAT, "launches": [vars(launch) for launch in self.launches]}
            for name, data in {
                "launches.json": json.dumps(about).encode(),
                **{f"blobs/{key}": self.blobs[key] for key in sorted(self.blobs)},
            }.items():
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)


class Recording:
    """A recording that was written: its launches, and their bytes."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        about = json.loads(self.archive.read("launches.json"))
        if about["format"] != FORMAT:
            raise StaleError(f"{path} has format {about['format']}, this is {FORMAT}: record again.")
        self.launches = [Recorded(**launch | {"kwargs": _hashable(launch["kwargs"])}) for launch in about["launches"]]

    def storages(self, keys: list[str], device: torch.device | str) -> list[Tensor]:
        """Fresh copies, as bytes, padded to whole numbers of 8 bytes."""
        made = []
        for key in keys:
            data = self.archive.read(f"blobs/{key}")
            made.append(torch.frombuffer(bytearray(data + bytes(-len(data) % 8 or 8)), dtype=torch.uint8).clone().to(device))
        return made


def _hashable(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Compile-time constants as they were: JSON makes lists of tuples, and Triton's compiler looks constants up."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kwargs.items()}


def rebuilt(argument: Any, storages: list[Tensor]) -> Any:
    """An argument as the kernel takes it, on the bytes of `storages`."""
    if isinstance(argument, list):
        return tuple(rebuilt(part, storages) for part in argument)
    if not isinstance(argument, dict):
        return argument
    if "descriptor" in argument:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(rebuilt(argument["descriptor"], storages), argument["shape"], argument["strides"], argument["block_shape"])
    typed = storages[argument["storage"]].view(getattr(torch, argument["dtype"]))
    return typed.as_strided(argument["shape"], argument["stride"], argument["offset"])


def tensors_of(names: list[str], arguments: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(argument's name, tensor as recorded), each view once."""
    seen = []
    for name, argument in zip(names, arguments, strict=False):
        for part in argument if isinstance(argument, list) else [argument]:
            tensor = part.get("descriptor", part) if isinstance(part, dict) else None
            if tensor is not None and tensor not in seen:
                seen.append(tensor)
                yield name, tensor


def kernel_of(launch: Recorded) -> Any:
    """The kernel as it is now. Raises StaleError where it is gone or takes other arguments."""
    try:
        kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    except (ImportError, AttributeError):
        raise StaleError(f"{launch.module}.{launch.kernel} is no more: record again.") from None
    if list(kernel.arg_names) != launch.names:
        changed = sorted(set(launch.names) ^ set(kernel.arg_names)) or "their order"
        raise StaleError(f"{launch.kernel} takes other arguments than when it was recorded ({changed}): record again.")
    return kernel


def interpreter() -> None:
    """Makes the interpreter right for bfloat16, as the project's tests do. Raises RuntimeError where Triton compiles, or where the tests are not."""
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("recording needs Triton's interpreter: TRITON_INTERPRET=1 python -m experiments.benchmarks.replay record FILE")
    path = Path(__file__).resolve().parents[2] / "tests" / "interpreter" / "interpreter_patch.py"
    if not path.is_file():
        raise RuntimeError(f"{path.name} of this project's tests is missing: run this in a checkout of the whole repository.")
    if "interpreter_patch" not in sys.modules:  # pytest has it already
        spec = importlib.util.spec_from_file_location("interpreter_patch", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["interpreter_patch"] = module
        spec.loader.exec_module(module)
        module.install()


@contextmanager
def tiles_of_a_gpu() -> Iterator[None]:
    """Inside, launchers in the interpreter take the tiles and the products that they take on a GPU; it computes every product in full float32."""
    from triton.runtime.interpreter import interpreter_builder

    importlib.import_module("switch_kernels.gpu.step")  # and with it all launchers
    from switch_kernels.gpu.launch import interpreted

    ours = [module for name, module in sys.modules.items() if name.startswith("switch_kernels.gpu.") and name != "switch_kernels.gpu.launch"]
    modules = [module for module in ours if vars(module).get("interpreted") is interpreted]
    for module in modules:
        vars(module)["interpreted"] = lambda: False
    options = interpreter_builder.options
    interpreter_builder.options = replace(options, allowed_dot_input_precisions=(*options.allowed_dot_input_precisions, "bf16x3"))
    try:
        yield
    finally:
        interpreter_builder.options = options
        for module in modules:
            vars(module)["interpreted"] = interpreted


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, uninitialised memory holds NaN and the largest integers: the same bytes every time, and few when compressed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def steps(name: str, case: Case, dtype: torch.dtype) -> tuple[Callable[[], object], Callable[[], object]]:
    """(one training step in mid-run, encoding and decoding of the same batch), from fixed seeds."""
    from experiments.benchmarks.contenders import OurStep, activations, build_sae
    from switch_kernels import resolve

    x_TD = activations(case.shape, 1, torch.device("cpu"))[0].to(dtype)
    sae = build_sae(case.shape, x_TD.float())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # away from the start, where encoder and decoder are equal, biases zero and moments too
        for parameter_name, parameter in sae.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3 if parameter_name == "b_enc_M" else 0.05)
        assert sae.b_enc_M is not None
        sae.b_enc_M[:: case.shape.F] += 20.0
        sae.W_dec_MD.div_(sae.W_dec_MD.norm(dim=1, keepdim=True))
    step = OurStep(sae, case, Backend.triton)
    for mean, square in step.trainer.engine.optimizer.moments.values():
        mean.copy_(torch.randn(mean.shape, generator=generator) * 1e-2)
        square.copy_(torch.randn(square.shape, generator=generator).square() * 1e-4)

    @torch.no_grad()
    def infer() -> None:
        sae.execution = resolve(Backend.triton, case.precision, x_TD.device)
        sae(x_TD.float())

    return lambda: step(x_TD), infer


def searches(
    architecture: str, precision: Precision = Precision.bf16, tokens: int = 24, dead: int = 0, **settings: Any
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(one training step in mid-run of an SAE that searches, its encoding), from fixed seeds; `dead` latents of each expert and of the shared ones
    are dead.
    """
    from switch_sae.models import SAES
    from switch_sae.rows import Rows
    from switch_sae.training import Trainer, TrainerConfig, prepare

    generator = torch.Generator().manual_seed(11)
    x_TD = torch.randn(128, SMALL.D, generator=generator) @ torch.randn(SMALL.D, SMALL.D, generator=generator)
    sae: Any = SAES.build(SAES[architecture].Config(**settings), SMALL.D, generator)
    prepare(sae, Rows.of(x_TD), normalize_activations=True)
    first = slice(0, 1) if sae.num_shared else slice(0, None, sae.latents_per_expert)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        sae.W_dec_MD[first] = sae.W_dec_MD[0]
        sae.W_dec_MD.div_(sae.W_dec_MD.norm(dim=1, keepdim=True))
        if sae.has_encoder:
            sae.W_enc_MD[first] = sae.W_dec_MD[first]
        x_TD = (
            x_TD[:tokens] + 20.0 / sae.activation_scale * sae.W_dec_MD[0]
        )  # the first latent of each expert is found for every token, as in `steps`
    trainer = Trainer(sae, TrainerConfig(dead_after_tokens=2**62), 1000, len(x_TD), Execution(Backend.triton, precision, "a recording"))
    engine: Any = trainer.engine
    for mean, square in engine.optimizer.moments.values():
        mean.copy_(torch.randn(mean.shape, generator=generator) * 1e-2)
        square.copy_(torch.randn(square.shape, generator=generator).square() * 1e-4)
    trainer.tokens_since_fired_M[: min(dead, sae.num_shared)] = 2**62
    trainer.tokens_since_fired_M[sae.num_shared :].view(sae.num_experts, -1)[:, 1 : 1 + dead] = 2**62

    @torch.no_grad()
    def encode() -> None:
        sae.eval().encode(x_TD)

    return lambda: trainer.step(Rows.of(x_TD)), encode


def record(
    path: Path, cases: dict[str, tuple[Case, torch.dtype]], say: Callable[[str], None] = print, wanted: dict[str, dict[str, Any]] | None = None
) -> None:
    """Writes every launch of one training step of each case, of the first case's encoding and decoding and of the first float32 one's; of the SAEs
    that search, `wanted`, one step, and an encoding where it is in float32.
    """
    from switch_kernels.gpu.launch import launches_to

    recorder = Recorder()
    inferred: set[Precision] = set()
    for name, (case, dtype) in cases.items():
        started = time.monotonic()
        with poisoned_memory():
            train, infer = steps(name, case, dtype)
            recorder.case = name
            with launches_to(recorder):
                train()
            if case.precision not in inferred:
                inferred.add(case.precision)
                recorder.case = f"{name}, forward"
                with launches_to(recorder):
                    infer()
        say(f"   {name}: {len(recorder.launches)} launches so far, {time.monotonic() - started:.0f} s")
    for name, settings in (wanted or {}).items():
        started = time.monotonic()
        with poisoned_memory():
            train, encode = searches(**settings)
            recorder.case = name
            with launches_to(recorder):
                train()
            if settings.get("precision") is Precision.float32 and "threshold" not in name:  # which PyTorch encodes
                recorder.case = f"{name}, forward"
                with launches_to(recorder):
                    encode()
        say(f"   {name}: {len(recorder.launches)} launches so far, {time.monotonic() - started:.0f} s")
    if silent := {r.kernel for r in recorder.launches} - {r.kernel for r in recorder.launches if r.before != r.after}:
        raise ValueError(f"no launch of {', '.join(sorted(silent))} wrote anything, so a replay would check nothing: choose other cases.")
    recorder.write(path)
    say(f"   {path}: {len(recorder.launches)} launches of {len({r.kernel for r in recorder.launches})} kernels, {path.stat().st_size / 1e6:.1f} MB")

"""Every architecture, router and way of inference on a GPU: whether it computes what it does on a CPU, how long a step takes, and who waits for whom.

    python -m experiments.benchmarks.gpu --sections architectures

Those that train in kernels of their own are checked against float64 elsewhere (`checks`, `searches`). Here a step is the trainer's as users get it,
with operands in float32, from the same weights on the same rows on both devices, and with the same rivals, where a router's experts compete.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.roofline import times_and_host_us
from experiments.benchmarks.searches import same_rivals
from switch_kernels import Backend, Precision, Shape, resolve
from switch_sae.models import ROUTERS, SAES, Inference, SparseAutoencoder
from switch_sae.models.fused import why_not_fused
from switch_sae.models.fused_search import FusedSearch
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

SIZES, TINY_SIZES = Shape(T=4096, D=512, M=4096, E=16, K=32), Shape(T=64, D=32, M=256, E=4, K=4)
STEPS, WARM, BATCHES = 20, 4, 2
GRADIENT_LIMIT, SEARCH_LIMIT, LOSS_LIMIT = 1e-2, 3e-2, 1e-4
"""Relative: of a gradient's norm, which one latent chosen otherwise at a tie may change a little; of SAEs that search, where such a tie decides what
the search finds next; and of the loss."""


@dataclass(frozen=True)
class Seen:
    """One architecture on the device, against the CPU."""

    loss_error: float
    gradient_error: float
    """The worst parameter's ||g - g_cpu|| / ||g_cpu||, of Adam's first moment after one step."""
    worst: str
    """Its name."""
    step_us: float
    host_us: float
    """What the host took to enqueue a step; with waits it is the whole step."""
    waits: int
    """Times that a step waits for the device."""
    inference_us: float
    """Encoding and decoding the same rows."""
    inference_waits: int
    how: str
    """Who computes steps."""
    gradient_limit: float = GRADIENT_LIMIT

    @property
    def holds(self) -> bool:
        return self.loss_error <= LOSS_LIMIT and self.gradient_error <= self.gradient_limit


def configs(s: Shape) -> dict[str, Any]:
    """Every architecture at these sizes, Switch with every router and two experts per token, every way of inference that can be trained."""
    found: dict[str, Any] = {}
    for name in SAES:
        owner: Any = SAES[name].Config
        sizes = {"num_latents": s.M, "k": s.K, "num_experts": s.E, "max_latents": 2 * s.K, "blocks": 4}
        found[name] = owner(**{f.name: sizes[f.name] for f in fields(owner) if f.name in sizes})
    found |= {f"switch, {router}": replace(found["switch"], router=ROUTERS[router].Config()) for router in ROUTERS}
    found["switch, two experts per token"] = replace(found["switch"], experts_per_token=2)
    for way in (Inference.refit, Inference.pursuit):
        found |= {f"{name}, {way.name}": replace(found[name], inference=way) for name in ("topk", "switch")}
    found["switch_pursuit, stop"] = replace(found["switch_pursuit"], stop=True)
    return found


def why_autograd(config: Any, D: int) -> str | None:
    """Why no kernels train this one, or None where they do."""
    with torch.device("meta"):
        return why_not_fused(SAES[SAES.key_of(config)](config, D))


def is_search(config: Any, D: int) -> bool:
    """Whether kernels train it, by a search."""
    return why_autograd(config, D) is None and issubclass(SAES[SAES.key_of(config)], FusedSearch)


def rows_of(name: str, x_TD: Tensor) -> Rows:
    return Rows.of(x_TD, x_TD.flip(1)) if "transcoder" in name else Rows.of(x_TD)


def look(name: str, config: Any, device: torch.device, s: Shape, x_BTD: Tensor, steps: int = STEPS) -> Seen:
    """Trains the same SAE for a step on both devices, then times more of them on this one."""
    sae = SAES[SAES.key_of(config)](config, s.D, torch.Generator().manual_seed(0))
    prepare(sae, rows_of(name, x_BTD[0][:2048]).to("cpu"), normalize_activations=True)
    other = copy.deepcopy(sae)
    with same_rivals():  # kernels draw other ones than PyTorch: the CPU gets theirs
        loss, moments, trainer = _first_step(name, sae.to(device), device, x_BTD[0])
        expected_loss, expected, _ = _first_step(name, other, torch.device("cpu"), x_BTD[0])
    errors = {key: _distance(moments[key].cpu(), moment) for key, moment in expected.items()}
    worst = max(errors, key=lambda key: errors[key])
    batches = [rows_of(name, x_TD) for x_TD in x_BTD]

    def step(number: int) -> None:
        trainer.step(batches[number % len(batches)])

    def infer(number: int) -> None:
        with torch.no_grad():
            sae.decode(sae.encode(batches[number % len(batches)].x_TD))

    for number in range(WARM):
        step(number)
    step_us, host_us = times_and_host_us(step, steps, device)
    waits = waits_of(lambda: step(0), device)
    sae.eval()
    for number in range(WARM):
        infer(number)
    inference_us, _ = times_and_host_us(infer, steps, device)
    return Seen(
        abs(loss / expected_loss - 1), errors[worst], worst, median(step_us), host_us, waits,
        median(inference_us), waits_of(lambda: infer(0), device), trainer.choice or str(trainer.execution),
        SEARCH_LIMIT if is_search(config, s.D) else GRADIENT_LIMIT,
    )  # fmt: skip


def _first_step(name: str, sae: SparseAutoencoder, device: torch.device, x_TD: Tensor) -> tuple[float, dict[str, Tensor], Trainer]:
    """(loss before the step, Adam's first moments after it, the trainer)."""
    execution = resolve(Backend.auto, Precision.float32, device)
    trainer = Trainer(sae, TrainerConfig(lr=1e-3, warmup_steps=0), 10_000, len(x_TD), execution)
    terms = trainer.step(rows_of(name, x_TD).to(device)).terms
    loss = torch.stack([term.detach().float() for term in terms.values()]).sum().item()
    moments = {key: tensor.clone() for key, tensor in trainer.state_dict()[0].items() if key.endswith("/exp_avg")}
    return loss, moments, trainer


def _distance(found: Tensor, expected: Tensor) -> float:
    size = torch.linalg.vector_norm(expected.double()).item()
    error = torch.linalg.vector_norm(found.double() - expected.double()).item()
    return error / size if size else error


def waits_of(call: Callable[[], object], device: torch.device) -> int:
    """How often a call waits for the device, as PyTorch's own check of synchronisations counts it; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchroniz" in str(warning.message) for warning in caught)

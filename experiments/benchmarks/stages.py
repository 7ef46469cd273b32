"""Where a training step's time goes: every kernel that our step launches, by itself, and all that the GPU runs, as its profiler sees it."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.benchmarks.cases import Case
from experiments.benchmarks.contenders import LEARNING_RATE, OurStep
from experiments.benchmarks.roofline import FLUSH_BYTES, Floor, alone_us, graph_us, synchronize
from switch_kernels import Backend, Shape
from switch_sae.models import TopKSAE

KERNELS_OF = {
    "router, dispatch": (
        *("_route", "_router_logits", "_route_backward", "_router_gradients"),
        *("_count_experts", "_sum_counts", "_place_pairs", "_gather_rows", "_draw_rivals", "_compete"),
    ),
    "encode": ("_encode_kernel",),
    "search": (
        *("_gram", "_local_products", "_pursue", "_refit_pairs"),
        *("_row_candidates", "_count_digits", "_keep_above", "_missed_rows", "_encoder_weights", "_add_losses"),
        *("_collect_scores", "_keep_reaching"),
    ),
    "top-k": ("_select_rows", "_select_jointly", "_scatter_latents"),
    "decode, loss, dz": (
        "_decode_loss_kernel",
        "_decode_rows_kernel",
        "_combine_slots_kernel",
        "_latent_gradients_kernel",
        "_decode_loss",
        "_row_losses",
        "_residual_rows",
    ),
    "weight gradients": ("_weight_gradient_kernel", "_sum_chunks_of_rows", "sum_chunks", "gradient_rows", "_write_keys"),
    "update": ("_update_rows", "_update_small", "update_latents", "_follow_l0", "_follow_theta"),
    "other": (
        "_row_sum_parts",
        "_sum_parts",
        "_finish_sums",
        "_begin_update",
        "_mark_fired",
        "_keep_topk",
        "_square_columns",
        "_divide",
        "_sparse_decode",
    ),
}
"""By stage. The clip's norm is computed with the weight gradients; "other" and "search" have no floor."""
STAGE_OF = {kernel: stage for stage, kernels in KERNELS_OF.items() for kernel in kernels}


@dataclass(frozen=True)
class KernelTime:
    """One launch of a step, timed alone."""

    kernel: str
    argument_mb: float
    """Size of all tensors it was given: what it would move if it read or wrote each once."""
    cold_us: float
    """With nothing in the L2 cache."""
    warm_us: float
    """In a row of itself."""

    @property
    def stage(self) -> str:
        return STAGE_OF.get(self.kernel, "other")


@dataclass(frozen=True)
class StageTime:
    name: str
    launches: int
    floor_us: float | None
    cold_us: float
    warm_us: float


def kernel_times(sae: TopKSAE, case: Case, x_TD: Tensor, repeats: int = 15) -> list[KernelTime]:
    """Every Triton launch of one step, in order. Its arguments are those of the step; kernels that work in place work on them again and again."""
    from switch_kernels.gpu import launch as door

    launches = []

    def keep(launch: door.Launch) -> None:
        launches.append(launch)
        launch.run()

    step = OurStep(sae, case, Backend.triton)
    with door.launches_to(keep):
        step(x_TD)  # the first step is not a graph's replay: trainers capture after they have warmed up
    device = x_TD.device
    synchronize(device)
    flush = torch.zeros(FLUSH_BYTES // 4 if device.type == "cuda" else 1, device=device)
    times = []
    for launch in launches:
        sizes = {argument.data_ptr(): argument.nbytes for argument in launch.args if isinstance(argument, Tensor)}
        cold, warm = alone_us(launch.run, repeats, device, flush), graph_us(launch.run, 10, 5, device)
        times.append(KernelTime(launch.kernel.fn.__name__, sum(sizes.values()) / 1e6, cold, warm))
    return times


def stage_times(kernels: list[KernelTime], floor: Floor, step_us: float | None = None, nodes: int = 0) -> list[StageTime]:
    """The same by stage; the floor's clip counts with the weight gradients if it writes them, else with the update that computes them again.

    With the whole step's time and its number of nodes, last comes what is left of it besides the kernels: launches, and torch's operators.
    """
    floors = {name: us for name, us in floor.stages.items() if name not in ("launches", "clip")}
    floors["weight gradients" if "buffered" in floor.plan else "update"] += floor.stages["clip"]
    stages = []
    for name in dict.fromkeys([*floors, *(kernel.stage for kernel in kernels)]):
        mine = [kernel for kernel in kernels if kernel.stage == name]
        stages.append(StageTime(name, len(mine), floors.get(name), sum(k.cold_us for k in mine), sum(k.warm_us for k in mine)))
    if step_us is not None:
        cold, warm = (max(0.0, step_us - sum(getattr(stage, kind) for stage in stages)) for kind in ("cold_us", "warm_us"))
        stages.append(StageTime("launches", nodes, floor.stages["launches"], cold, warm))
    return stages


def stage_table(stages: list[StageTime], kernels: list[KernelTime], step_us: float) -> str:
    lines = [f"  {'stage or kernel':<28}{'launches':>9}{'floor us':>10}{'cold us':>9}{'warm us':>9}{'floor/cold':>11}{'args MB':>9}"]
    for stage in stages:
        floor = f"{stage.floor_us:.1f}" if stage.floor_us is not None else ""
        ratio = f"{stage.floor_us / stage.cold_us:.2f}" if stage.floor_us is not None and stage.cold_us else ""
        lines.append(f"  {stage.name:<28}{stage.launches:>9}{floor:>10}{stage.cold_us:>9.1f}{stage.warm_us:>9.1f}{ratio:>11}")
        mine = [kernel for kernel in kernels if kernel.stage == stage.name]
        lines += [f"    {k.kernel:<26}{'':>19}{k.cold_us:>9.1f}{k.warm_us:>9.1f}{'':>11}{k.argument_mb:>9.1f}" for k in mine]
    cold, warm = (sum(getattr(kernel, kind) for kernel in kernels) for kind in ("cold_us", "warm_us"))
    cold, warm = (sum(getattr(kernel, kind) for kernel in kernels) for kind in ("cold_us", "warm_us"))
    lines.append(f"  all Triton kernels {cold:.0f} us cold, {warm:.0f} us warm; the whole step {step_us:.0f} us")
    return "\n".join(lines)


def profile(step: Callable[[], object], device: torch.device, steps: int = 5) -> dict[str, float]:
    """Microseconds per step of each kernel that the device ran (on a CPU: of each operator), longest first; empty if the profiler saw none."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    step()
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, attribute) / steps for event in profiler.key_averages()}
    return dict(sorted(((name, us) for name, us in times.items() if us > 0), key=lambda item: -item[1]))


def optimizer_contest(shape: Shape, device: torch.device, triton: bool) -> dict[str, float]:
    """Microseconds of the optimiser on two [M, D] matrices: torch's fused Adam between separate passes, and our fused update (both moments)."""
    weights = [torch.nn.functional.normalize(torch.randn(shape.M, shape.D, device=device), dim=1) for _ in range(2)]
    grads = [torch.randn(shape.M, shape.D, device=device) * 1e-3 for _ in range(2)]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    copies = [torch.empty(shape.M, shape.D, dtype=torch.bfloat16, device=device) for _ in range(2)]
    adam = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def separate() -> None:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        W_MD, grad_MD = parameters[1], grads[1]
        grad_MD.addcmul_(W_MD, (grad_MD * W_MD).sum(dim=1, keepdim=True), value=-1)
        adam.step()
        W_MD.div_(torch.linalg.vector_norm(W_MD, dim=1, keepdim=True))
        for copy, parameter in zip(copies, parameters, strict=True):
            copy.copy_(parameter)

    repeats = 20 if device.type == "cuda" else 3
    contest = {"torch fused Adam, separate passes": statistics.median([alone_us(separate, repeats, device) for _ in range(2)])}
    if triton:
        from switch_kernels.gpu.update import MatrixState, update_rows_

        hyper = torch.tensor([LEARNING_RATE, 0.9, 0.999, 10.0, 1000.0, 1.0], device=device)
        total_square, seed = torch.ones((), device=device), torch.zeros(1, dtype=torch.int32, device=device)
        for dtype in (torch.float32, torch.bfloat16):
            for grad_dtype in (torch.float32, torch.bfloat16):
                states = [
                    MatrixState(w.clone(), torch.zeros_like(w, dtype=dtype), torch.zeros_like(w, dtype=dtype), copy, unit_norm)
                    for w, copy, unit_norm in zip(weights, copies, (False, True), strict=True)
                ]
                given = [grad.to(grad_dtype) for grad in grads]

                def fused(states: list[MatrixState] = states, given: list[Tensor] = given) -> None:
                    for state, grad in zip(states, given, strict=True):
                        update_rows_(state, grad, hyper, total_square, seed)

                name = f"our fused update, {str(dtype)[6:]} moments, {str(grad_dtype)[6:]} gradient"
                contest[name] = alone_us(fused, repeats, device)
    return contest

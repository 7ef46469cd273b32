"""The least time that a training step can take on a GPU: its roofs, measured in the same run, and a model of every stage's work.

Shapes: T tokens, D activation size, M latents, E experts, F = M / E, K active latents per token, S experts per token, R = T * S pairs.
A stage's floor is the larger of its operations over the tensor cores' rate, its bytes over the memory's, and its gathered bytes over the L2 cache's.

    python -m experiments.benchmarks.roofline                      # modelled steps on an H200: 59 nodes before, and as many as are counted now
    python -m experiments.benchmarks.roofline --nodes 59 30
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks.cases import TARGETS_US, Case
from switch_kernels import Backend, Shape, choose_plan
from switch_kernels.plan import group_of

L2_RESIDENT = 40e6
"""Bytes of rows that stay in an H200's L2 cache while they are gathered; larger tables are read at the memory's speed."""
CLOCK_HZ, SCHEDULERS = 1.755e9, 4
NODES = 23
"""Of a dense step of one expert per token, as `experiments.benchmarks.nodes` counts them."""
FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Roofs:
    """What the machine can do at most. The defaults are those that the targets were set by: measured on an H200, but for two guesses, `gather` and
    `launch_us`, which were 9.3e12 and 1.0 there when they were measured.
    """

    gemm: float = 790e12
    """FLOP/s of a bfloat16 8192^3 matrix product."""
    narrow_gemm: float = 790e12
    """The same for 8192 x 768 x 4096, the shape of our products; for comparison only, floors use `gemm`."""
    copy: float = 4.3e12
    """Bytes per second, read and written, of a 1 GiB copy."""
    gather: float = 5.5e12
    """Bytes per second of random 1.5 KB rows read from a 16 MB table."""
    launch_us: float = 2.5
    """One kernel that does next to nothing inside a CUDA graph and waits for the one before: what each node costs beyond its work."""
    replay_us: float = 10.0
    """Replaying a CUDA graph of one empty kernel; for comparison only."""
    multiprocessors: int = 132

    @property
    def issue(self) -> float:
        """Warp instructions per second."""
        return self.multiprocessors * SCHEDULERS * CLOCK_HZ

    def describe(self) -> str:
        return (
            f"roofs: bf16 GEMM {self.gemm / 1e12:.0f} TFLOP/s (8192 x 768 x 4096: {self.narrow_gemm / 1e12:.0f}), copy {self.copy / 1e12:.2f} TB/s, "
            f"row gather from L2 {self.gather / 1e12:.2f} TB/s, {self.launch_us:.2f} us a kernel in a graph, {self.replay_us:.1f} us a graph, "
            f"{self.multiprocessors} multiprocessors"
        )


def topk_instructions(F: int, K: int) -> float:
    """Warp instructions per row of an exact top-k in two levels, counted in its machine code with the turns of its loops on normal bfloat16 numbers,
    for K = 32 and scaled to other K.
    """
    counted = {256: 800, 1024: 1290, 4096: 2010, 16384: 3820, 65536: 8450}
    widest = max(counted)
    instructions = next((n for width, n in counted.items() if width >= F), counted[widest] * F / widest)
    return instructions * (K / 32) ** 0.75


@dataclass(frozen=True)
class Floor:
    """The least time of each stage, in microseconds, under the cheapest plan for a shape."""

    plan: str
    """`sparse` or `dense` (after top-k: gathers, or masked products), then `recomputed` or `buffered` (the gradient, across the clip's barrier)."""
    stages: dict[str, float]

    @property
    def total_us(self) -> float:
        return sum(self.stages.values())


def floor(shape: Shape, roofs: Roofs, moment_bytes: int = 4, x_bytes: int = 2, plan: str | None = None, nodes: int = NODES) -> Floor:
    """The cheapest plan's floor, or that of one plan: "sparse" or "dense", then "recomputed" or "buffered", as in "dense, buffered".

    Of the step's `nodes`, each kernel or copy costs a launch's latency whatever it does.
    """
    names = [f"{regime}, {gradients}" for regime in ("sparse", "dense") for gradients in ("recomputed", "buffered")] if plan is None else [plan]
    return min((_plan(shape, roofs, moment_bytes, x_bytes, nodes, *name.split(", ")) for name in names), key=lambda floor: floor.total_us)


def _plan(shape: Shape, roofs: Roofs, moment_bytes: int, x_bytes: int, nodes: int, regime: str, gradient: str) -> Floor:
    T, D, M, E, K, F, R = shape.T, shape.D, shape.M, shape.E, shape.K, shape.F, shape.R

    def us(flops: float = 0.0, bytes: float = 0.0, gathered: float = 0.0) -> float:
        return max(flops / roofs.gemm, bytes / roofs.copy, gathered / roofs.gather) * 1e6

    product, weights, x, rows = 2.0 * R * F * D, 2.0 * M * D, float(x_bytes * T * D), 2.0 * R * D
    group = group_of(F, K)
    maxima = F / group if group > 1 else 0
    stages: dict[str, float] = {}
    stages["router, dispatch"] = us(2.0 * T * D * E, x + 8 * T * E + 2 * D * E) + us(bytes=x + rows)
    stages["encode"] = us(product, rows + weights + 2 * R * (F + maxima))
    read = (maxima + K * max(group, 16) if group > 1 else F) if regime == "sparse" else 2 * F + maxima
    issued = R * topk_instructions(F, K) / roofs.issue * 1e6
    stages["top-k"] = max(issued, us(bytes=2 * R * read + (6 * T * K if regime == "sparse" else 0)))
    if regime == "sparse":
        decoder, tokens = 2.0 * T * K * D, 4.0 * T * K * D  # gathered: decoder rows by the tokens; then tokens by the latents, for both matrices
        far, far_tokens = 2 * F * D > L2_RESIDENT, 4 * R / E * D > L2_RESIDENT
        touched = 2.0 * min(M, T * K) * D
        stages["decode, loss, dz"] = us(bytes=max(touched + x + rows, decoder if far else 0), gathered=0 if far else decoder)
        stages["latent order"] = us(bytes=64 * T * K) + 8  # three or four passes of a radix sort, and their latency
        stages["weight gradients"] = us(bytes=max(2 * rows, tokens if far_tokens else 0), gathered=0 if far_tokens else tokens)
    else:
        combine = us(bytes=2 * 4.0 * R * D) if shape.S > 1 else 0.0  # per-slot outputs, written and read back
        stages["decode, loss, dz"] = us(product, x + weights + 2 * R * F) + us(product, rows + weights + 2 * R * F) + combine
        stages["latent order"] = 0.0
        stages["weight gradients"] = 2 * us(product, rows + 2 * R * F)
    parameters = 2.0 * M * D
    update = 8 + 4 * moment_bytes + 2  # weight and two moments, read and written, and the bfloat16 copy
    if gradient == "recomputed":
        stages["clip"] = stages["weight gradients"]
        stages["update"] = us(bytes=update * parameters)
    else:
        stages["clip"] = us(bytes=2 * parameters)
        stages["update"] = us(bytes=(update + 2) * parameters)
    stages["launches"] = nodes * roofs.launch_us
    return Floor(f"{regime}, {gradient}", stages)


def count_nodes(case: Case, backend: Backend) -> int:
    """Kernels and operators of our step, counted on meta tensors; `NODES` where PyTorch computes, whose step is not captured."""
    if backend is not Backend.triton:
        return NODES
    from experiments.benchmarks.nodes import nodes  # needs triton

    return len(nodes(case))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times_us(call: Callable[[int], object], repeats: int, device: torch.device) -> list[float]:
    """Microseconds from the end of one call to the end of the next, on the device: what a queue of them takes, host gaps included."""
    return times_and_host_us(call, repeats, device)[0]


def times_and_host_us(call: Callable[[int], object], repeats: int, device: torch.device) -> tuple[list[float], float]:
    """`times_us`, and the median time that the host took for a call: where that is the longer, the device waited. A reading of the device, where the
    host waits instead, is one call of many.
    """
    if device.type != "cuda":
        times = []
        for number in range(repeats):
            started = time.perf_counter()
            call(number)
            times.append((time.perf_counter() - started) * 1e6)
        return times, statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    clock = [time.perf_counter()]
    for number in range(repeats):
        call(number)
        marks[number + 1].record()
        clock.append(time.perf_counter())
    host_us = statistics.median(after - before for before, after in itertools.pairwise(clock)) * 1e6
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) * 1e3 for before, after in itertools.pairwise(marks)], host_us


def alone_us(call: Callable[[], object], repeats: int, device: torch.device, flush: Tensor | None = None) -> float:
    """Median microseconds of a call by itself, a launch's latency of about 2 us included; `flush` is read before each, which empties the cache."""
    if device.type != "cuda":
        return statistics.median(times_us(lambda _: call(), repeats, device))
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    call()
    torch.cuda.synchronize(device)
    for start, end in zip(starts, ends, strict=True):
        if flush is not None:
            flush.sum()  # reading leaves no dirty lines to write back; the device is busy with it while the host prepares the launch
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True))


def graph_us(call: Callable[[], object], copies: int, repeats: int, device: torch.device) -> float:
    """Median microseconds of a call repeated `copies` times inside one CUDA graph: neither flushed nor waiting for the host."""
    if device.type != "cuda":
        return statistics.median(times_us(lambda _: call(), repeats, device))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            call()
    graph.replay()
    return statistics.median(times_us(lambda _: graph.replay(), repeats, device)) / copies


def calibrate(device: torch.device, tiny: bool = False) -> Roofs:
    """Measures every roof; `tiny` sizes only show that the code works. On a CPU the gather is `embedding_bag`'s."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator).bfloat16()

    def gemm(rows: int, inner: int, columns: int, copies: int) -> float:
        a, b, out = normal(rows, inner), normal(columns, inner), torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return 2e6 * rows * inner * columns / graph_us(partial(torch.mm, a, b.T, out=out), copies, 10, device)

    side, narrow, block = (64, (64, 48, 32), 2**16) if tiny else (8192, (8192, 768, 4096), 2**30)
    source = torch.empty(block // 4, device=device).normal_(generator=generator)
    target = torch.empty_like(source)
    one = torch.zeros(1, device=device)
    bags, wide, table_rows = (64, 48, 100) if tiny else (16384, 768, 16 * 2**20 // 1536)
    table, out = normal(table_rows, wide), torch.empty(bags, wide, dtype=torch.bfloat16, device=device)
    index = torch.randint(table_rows, (bags, 32), device=device, generator=generator, dtype=torch.int32)
    return Roofs(
        gemm=gemm(side, side, side, 2),
        narrow_gemm=gemm(*narrow, 20),
        # a graph hands a copy to the copy engine, which an H200's multiprocessors outrun by half: as a kernel it is the faster of the two
        copy=2e6 * block / min(graph_us(call, 2, 10, device) for call in (partial(target.copy_, source), partial(torch.neg, source, out=target))),
        gather=2e6 * bags * 32 * wide / min(graph_us(call, 10, 10, device) for call in _gathers(table, index, out)),
        launch_us=graph_us(partial(one.add_, 1), 200, 10, device),
        replay_us=graph_us(partial(one.add_, 1), 1, 30, device),
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1,
    )


def _gathers(table: Tensor, index: Tensor, out: Tensor) -> list[Callable[[], object]]:
    """The ways to gather rows that are tried; each adds up the same rows. Raises RuntimeError where one adds up others."""
    expected = torch.nn.functional.embedding_bag(index.long(), table.float(), mode="sum")
    if table.device.type != "cuda":
        return [lambda: torch.nn.functional.embedding_bag(index, table, mode="sum")]
    from experiments.benchmarks.gather import CONFIGS, gather_sum

    calls: list[Callable[[], object]] = [partial(gather_sum, table, index, out, columns, warps) for columns, warps in CONFIGS]
    for call in calls:
        out.fill_(float("nan"))
        call()
        if not torch.allclose(out.float(), expected, rtol=2e-2, atol=2e-2):
            raise RuntimeError("the gather that calibrates the L2 roof adds up wrong rows")
    return calls


NODE_US = 2.0
"""What a dependent node of a graph costs beyond its work on an H200: a guess of the review, between the 1.5 and 2.5 us that others report."""
ROUTER_US = (55.0, 6.0)
"""Products with the router before (cuBLAS in float32: 40 to 70 us were estimated at `MAIN`) and within our kernels, which move what they move."""


def modelled(case: Case, nodes: int, node_us: float = NODE_US) -> float:
    """Microseconds of a step on an H200: the floors of its planned stages, and `node_us` for each node. Kernels are taken to reach their roofs."""
    plan = choose_plan(case.shape.T, case.shape.M, case.shape.E, case.shape.K, case.shape.S)
    name = f"{plan.regime.value}, {plan.gradients.value}"
    return floor(case.shape, Roofs(launch_us=node_us), x_bytes=4, plan=name, nodes=nodes).total_us


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.benchmarks.roofline", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "Modelled training steps on an H200, by their number of graph nodes."
    parser.add_argument(
        "--nodes", nargs=2, type=int, metavar=("BEFORE", "AFTER"), help="default: 59, a dense step's at first, and as many as are counted"
    )
    parser.add_argument("--node-us", type=float, default=NODE_US, help="microseconds that a dependent node costs beyond its work")
    options = parser.parse_args(arguments)
    print(f"modelled, not measured: stages at the roofs of an H200 and in the planned regime, {options.node_us:g} us a node; router products apart")
    print(f"{'':<44}{'nodes':>12}{'us before':>11}{'after':>8}{'less':>7}{'and of the router':>19}")
    for case in TARGETS_US:
        if case.dead:
            continue
        before, after = options.nodes or (59, count_nodes(case, Backend.triton))
        us = [modelled(case, nodes, options.node_us) for nodes in (before, after)]
        router = ROUTER_US[0] - ROUTER_US[1] if case.shape.E > 1 else 0.0
        print(f"{case.shape!s:<44}{f'{before} -> {after}':>12}{us[0]:>11.0f}{us[1]:>8.0f}{us[0] - us[1]:>7.0f}{router:>19.0f}")


if __name__ == "__main__":
    main()

"""How long kernels take with other tiles than they have: what `gemm_tiles.choose_tile` and the cuts in `route` and `update` were chosen by.

    python -m experiments.benchmarks.tiles                                  # on a GPU: every candidate of every kernel, the fastest first
    python -m experiments.benchmarks.tiles --kernels encode router          # of some

Each candidate is compiled ahead in all processes, then timed alone with an empty L2 cache and in a row of itself, on the launch of a real step.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from experiments.benchmarks.ahead import Driver, compile_into_cache
from experiments.benchmarks.cases import MAIN, Case
from experiments.benchmarks.compile_kernels import collect
from experiments.benchmarks.contenders import OurStep, activations, build_sae
from experiments.benchmarks.nodes import step_on_meta
from experiments.benchmarks.record import compile_sooner
from experiments.benchmarks.roofline import FLUSH_BYTES, alone_us, graph_us, synchronize
from switch_kernels import Backend
from switch_kernels.gpu import encode, gemm_tiles, gemm_weights, route, update
from switch_kernels.gpu.gemm_tiles import Tile, compiling_for
from switch_kernels.gpu.launch import Launch, launches_to

CASES = {"MAIN": Case(MAIN), "E=8": Case(replace(MAIN, E=8)), "E=1": Case(replace(MAIN, E=1)), "M=2^20": Case(replace(MAIN, M=2**20, E=64))}
TILES = [
    Tile(*sizes)
    for sizes in (
        *((64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 128, 4, 3), (64, 256, 64, 4, 3), (64, 256, 64, 8, 3)),
        *((128, 64, 64, 4, 4), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3)),
        *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4)),
    )
]
PRODUCTS = {
    "encode": ("_encode_kernel", ("MAIN", "E=8", "E=1", "M=2^20")),
    "latent_gradients": ("_latent_gradients_kernel", ("MAIN",)),
    "decode_loss": ("_decode_loss_kernel", ("MAIN",)),
    "weight_gradient": ("_weight_gradient_kernel", ("MAIN",)),
}


@dataclass(frozen=True)
class Candidate:
    """A way to launch some kernels of a case's step."""

    family: str
    case: str
    kernels: tuple[str, ...]
    label: str
    changes: tuple[tuple[Any, str, Any], ...]
    """(module, attribute, value): what to set while the step is launched."""

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in self.changes]
        for owner, name, value in self.changes:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


def candidates() -> list[Candidate]:
    found = []
    for product, (kernel, cases) in PRODUCTS.items():
        for case in cases:
            for tile in TILES:
                chosen = _always(product, tile)
                changes = ((gemm_tiles, "choose_tile", chosen), (gemm_weights, "choose_tile", chosen))
                found.append(Candidate(product, case, (kernel,), str(tuple(tile)), changes))
    for products in ("bf16x3", "tf32x3"):
        for columns, stages in ((64, 3), (64, 4), (128, 3)):
            changes = ((route, "ROUTE", route.ROUTE._replace(columns=columns, num_stages=stages)), (route, "THREE_PRODUCTS", products))
            found.append(Candidate("router", "MAIN", ("_route",), f"{columns} columns, {stages} stages, {products}", changes))
        for tokens in (16, 32, 64):
            for columns, programs in ((32, 512), (64, 512), (64, 1024), (128, 512), (128, 256)):
                for warps, stages in ((4, 2), (4, 3), (8, 2), (2, 2)):
                    cut = route.Cut(tokens, columns, programs, warps, stages)
                    label = f"{tuple(cut)} {products}"
                    changes = ((route, "GRADIENTS", cut), (route, "THREE_PRODUCTS", products))
                    found.append(Candidate("router_gradients", "MAIN", ("_router_gradients", "_sum_parts"), label, changes))
    for sizes in (
        (16, 256, 512, 4, 2),
        (32, 256, 512, 4, 2),
        (64, 256, 512, 4, 2),
        (32, 256, 1024, 4, 2),
        (16, 512, 512, 4, 2),
        (32, 256, 512, 4, 1),
    ):
        sums = update.SumCut(*sizes)
        found.append(Candidate("row_sums", "MAIN", ("_row_sum_parts", "_sum_parts"), str(tuple(sums)), ((update, "ROW_SUMS", sums),)))
    for group in (1, 4, 8, 16):
        kernels = ("_encode_kernel", "_select_rows")
        found.append(Candidate("group", "MAIN", kernels, f"groups of {group}", ((encode, "group_of", lambda F, k, group=group: group),)))
    return found


def _always(product: str, tile: Tile) -> Callable[..., Tile]:
    """`choose_tile` that chooses this tile for this product, as it is."""
    others = gemm_tiles.choose_tile

    def choose(asked: Any, rows: int, F: int, D: int, precision: str, capability: tuple[int, int] = (9, 0)) -> Tile:
        usual = others(asked, rows, F, D, precision, capability)
        return usual if asked != product or precision != "bf16" else tile

    return choose


def compile_all(several: list[Candidate], capability: tuple[int, int], jobs: int) -> None:
    triton.runtime.driver.set_active(Driver(capability))
    with compiling_for(capability):
        seen: dict[Any, Any] = {}
        for candidate in several:
            with candidate.set():
                for job in collect({candidate.case: step_on_meta(CASES[candidate.case])}):
                    if job.launch.kernel.fn.__name__ in candidate.kernels:
                        constants = {name: str(value) for name, value in job.launch.kwargs.items()}
                        seen.setdefault((job.launch.kernel.fn.__name__, str(constants), str(job.types)), job)
        failed = compile_into_cache(list(seen.values()), jobs, print)
    print(f"   {len(seen) - failed} of {len(seen)} kernels compiled", flush=True)


def time_all(several: list[Candidate], device: torch.device) -> None:
    flush = torch.zeros(FLUSH_BYTES // 4, device=device)
    for case in dict.fromkeys(candidate.case for candidate in several):
        x_TD = activations(CASES[case].shape, 1, device)[0]
        step = OurStep(build_sae(CASES[case].shape, x_TD), CASES[case], Backend.triton)
        step(x_TD)
        engine: Any = step.trainer.engine
        engine.EAGER_STEPS = 2**62
        mine = [candidate for candidate in several if candidate.case == case]
        for family in dict.fromkeys(candidate.family for candidate in mine):
            rows, of_family = [], [candidate for candidate in mine if candidate.family == family]
            for candidate in of_family:
                launches: list[Launch] = []

                def keep(launch: Launch, launches: list[Launch] = launches, kernels: tuple[str, ...] = candidate.kernels) -> None:
                    if launch.kernel.fn.__name__ in kernels:
                        launches.append(launch)
                    launch.run()

                try:
                    with candidate.set(), launches_to(keep):
                        step(x_TD)
                    synchronize(device)
                    cold = [alone_us(launch.run, 9, device, flush) for launch in launches]
                    warm = [graph_us(launch.run, 10, 5, device) for launch in launches]
                except Exception as error:  # a tile that does not fit
                    print(f"   {family}, {case}: {candidate.label}: {type(error).__name__}: {str(error)[:120]}", flush=True)
                    continue
                rows.append((sum(cold), cold, warm, candidate.label))
            print(f"== {family}, {case} ({', '.join(of_family[0].kernels)})")
            for total, cold, warm, label in sorted(rows):
                print(f"   {total:8.1f} us cold {[round(c, 1) for c in cold]}, {sum(warm):8.1f} warm  {label}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="experiments.benchmarks.tiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = list(dict.fromkeys(candidate.family for candidate in candidates()))
    parser.add_argument("--kernels", nargs="+", choices=families, default=families, metavar="FAMILY", help=", ".join(families))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--compile-only", action="store_true", help="without a GPU: into Triton's cache, for capability 9.0")
    options = parser.parse_args()
    compile_sooner()
    several = [candidate for candidate in candidates() if candidate.family in options.kernels]
    if options.compile_only:
        compile_all(several, (9, 0), options.jobs)
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; --compile-only needs none")
    command = [sys.executable, "-m", "experiments.benchmarks.tiles", "--compile-only", "--jobs", str(options.jobs), "--kernels", *options.kernels]
    subprocess.run(command, check=False)  # what failed to compile is said there, and again where it is timed
    time_all(several, torch.device("cuda", 0))


if __name__ == "__main__":
    main()

"""Times whole training steps of Switch SAEs against the masked-dense formulation, a dense TopK SAE and eai-sparsify, interleaved in one run.

    python -m experiments.benchmarks.cpu --peers         # about 3 minutes on 2 quiet cores, once eai-sparsify's environment is there
    python -m experiments.benchmarks.cpu --quick         # small sizes, to see that it works; nothing is recorded

A step is all that training does with one batch: forward, loss, backward, gradient projection, clipping, Adam, unit norm and dead-latent
bookkeeping (`Trainer.step`; no latent is dead, so AuxK does not run). Activations are standard normal. Nothing is timed before all formulations are
shown to compute the same function. Shapes: T tokens, D activation size, M latents, E experts, F = M / E, K active latents per token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import contenders
from experiments.benchmarks.checks import NotTrustedError
from experiments.benchmarks.peers import Sparsify, cpu_model, peak_mb
from experiments.benchmarks.record import RESULTS, append, commit
from switch_kernels import Shape, encode_topk_reference
from switch_kernels.adam import Adam
from switch_sae.engines import TorchEngine
from switch_sae.models import Routing, SparseLatents, SwitchSAE, TopKSAE
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig

TABLE = RESULTS / "benchmark_cpu.csv"
SIZES, QUICK = Shape(T=2048, D=512, M=8192, E=1, K=32), Shape(T=256, D=64, M=512, E=1, K=8)
"""E is each contender's own."""
WARMUP, BATCHES, MEMORY_STEPS = 2, 3, 3
TRAINER = TrainerConfig(warmup_steps=0, dead_after_tokens=2**62)
FLOOR = "encoder GEMM"
Step = Callable[[Tensor], float]  # does its work on one batch and returns the loss before it


class MaskedDense(TopKSAE):
    """The Switch SAE as published: every expert computed, all but the routed one masked, top-k over all M latents, gradients by autograd.

    In its best form: decoding by `embedding_bag` takes 0.58 of the time of a dense [T, M] product (forward and backward of the whole SAE, same run),
    and `where`, a broadcast and a repeated mask cost the same. Its time does not depend on E.
    """

    def _encode(self, x_TD: Tensor) -> tuple[SparseLatents, Routing | None, None]:
        routing, dispatch = self._route(x_TD)
        gate_TS = None if routing is None else routing.gate_TS
        values_TK, indices_TK, _ = encode_topk_reference(x_TD, self.b_in_D, gate_TS, self.W_enc_MD, self.b_enc_M, dispatch, self.config.k)
        return SparseLatents(values_TK, indices_TK, self.num_latents), routing, None

    def _decode(self, latents: SparseLatents, by_latent: Any) -> Tensor:
        recon_TD = F.embedding_bag(latents.indices_TK, self.W_dec_MD, mode="sum", per_sample_weights=latents.values_TK)
        return (recon_TD + self.b_out_D) / self.target_scale


class MaskedDenseSwitch(MaskedDense, SwitchSAE): ...


def build_sae(shape: Shape, x_TD: Tensor, masked: bool = False) -> TopKSAE:
    """A Switch SAE, or with one expert the dense TopK SAE, at its start; `masked` computes the same function the published way."""
    owners = (MaskedDense, MaskedDenseSwitch) if masked else (TopKSAE, SwitchSAE)
    return contenders.build_sae(shape, x_TD, owners=owners, normalize=False)


def activations(shape: Shape) -> list[Tensor]:
    return list(torch.randn(BATCHES, shape.T, shape.D, generator=torch.Generator().manual_seed(1)))


def contender(name: str, shape: Shape, x_TD: Tensor) -> Step:
    """By name: `switch`, `topk`, `masked-dense`, `masked-dense, fused Adam`, or `encoder GEMM`: the 2*T*D*F FLOPs that no step can do without."""
    if name == FLOOR:
        W_FD = torch.randn(shape.F, shape.D)
        return lambda x_TD: torch.mm(x_TD, W_FD.T)[0, 0].item()
    trainer = Trainer(build_sae(shape, x_TD, masked="masked" in name), TRAINER, total_steps=1_000_000, batch_size=shape.T)
    if name == "masked-dense":  # torch.optim.Adam as it comes
        engine = trainer.engine
        assert isinstance(engine, TorchEngine)
        engine.optimizer = Adam(engine.optimizer.parameters, engine.optimizer.unit_rows, fused=None)
    return lambda x_TD: sum(term.item() for term in trainer.step(Rows.of(x_TD)).terms.values())


def line_up(experts: list[int]) -> list[tuple[str, int]]:
    """(name, E) of all that is timed here, in their order within a round."""
    switches = [("switch", e) for e in experts]
    masked = [("masked-dense", experts[0]), ("masked-dense, fused Adam", experts[0])]
    return [*switches, ("topk", 1), *masked, *((FLOOR, e) for e in (*experts, 1))]


def check_formulations(experts: list[int]) -> float:
    """Largest relative difference between fast and masked-dense outputs and gradients, in float64. Raises NotTrustedError above 1e-9."""
    worst = 0.0
    for num_experts in (1, *experts):
        generator = torch.Generator().manual_seed(2)
        x_TD = torch.randn(96, 32, generator=generator, dtype=torch.float64)
        tiny = Shape(T=96, D=32, M=16 * num_experts, E=num_experts, K=4)
        fast, slow = (build_sae(tiny, x_TD.float(), masked).double() for masked in (False, True))
        for parameter, other in zip(fast.parameters(), slow.parameters(), strict=True):  # away from the start, where biases are equal or zero
            parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.05)
            other.data.copy_(parameter.data)
        tensors: list[dict[str, Tensor]] = []
        for sae in (fast, slow):
            output = sae(x_TD)
            torch.stack(list(sae.loss_terms(Rows.of(x_TD), output).values())).sum().backward()
            tensors.append({"output": output.recon_TD} | {f"gradient of {name}": parameter.grad for name, parameter in sae.named_parameters()})
        found, expected = tensors
        for what, tensor in expected.items():
            difference = ((found[what] - tensor).abs().max() / tensor.abs().max()).item()
            worst = max(worst, difference)
            if not difference <= 1e-9:
                raise NotTrustedError(f"E={num_experts}: {what} differs from masked-dense by {difference:.1e} relative (float64); the limit is 1e-9.")
    return worst


def check_losses(losses: dict[tuple[str, int], list[float]], experts: list[int], peer_fvu: float | None, x_TD: Tensor) -> None:
    """Before anything is timed, at full size in float32: equal losses at the start and after a step. Raises NotTrustedError above 1e-4."""
    reference, same = losses["masked-dense", experts[0]], ("switch", "masked-dense, fused Adam")
    pairs = [(f"the loss of {name} at step {step}", losses[name, experts[0]][step], reference[step]) for name in same for step in (0, 1)]
    if peer_fvu is not None:
        fvu = losses["topk", 1][0] * len(x_TD) / (x_TD - x_TD.mean(dim=0)).pow(2).sum().item()
        pairs.append((f"{Sparsify.PACKAGE}'s FVU at step 0", peer_fvu, fvu))
    for what, found, expected in pairs:
        if not abs(found - expected) <= 1e-4 * abs(expected):
            raise NotTrustedError(f"{what} is {found:.6g}; it should be {expected:.6g}.")


@dataclass(frozen=True)
class Timing:
    """One line of the table."""

    name: str
    E: int
    median_ms: float
    min_ms: float
    ratio: float
    """Times faster than masked-dense: the median over rounds, in which drift of the machine cancels."""
    matmuls: float
    """Its time in units of one [T, D] x [D, M] product, median over rounds: this carries over to other machines."""

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.E

    @property
    def is_floor(self) -> bool:
        return self.name == FLOOR


Peaks = dict[tuple[str, int], tuple[float, float]]
"""(MB above the imports, MB of the imports alone) by name and E."""


def measure(shape: Shape, experts: list[int], repeats: int, peer: Sparsify | None = None) -> list[Timing]:
    """Rounds of one step each (A B C A B C ...) after two rounds of warm-up, whose losses must agree. Raises NotTrustedError."""
    batches = activations(shape)
    steps = {(name, e): contender(name, replace(shape, E=e), batches[0]) for name, e in line_up(experts)}
    if peer is not None:
        steps[peer.name, 1] = lambda _: peer.step()  # its FVU stands in for its loss
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    losses: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for number in range(WARMUP + repeats):
        if number == WARMUP:
            check_losses(losses, experts, losses[peer.name, 1][0] if peer else None, batches[0])
        for key, step in steps.items():
            started = time.perf_counter()
            losses[key].append(step(batches[number % BATCHES]))
            elapsed = (time.perf_counter() - started) * 1e3
            if number >= WARMUP:
                times[key].append(peer.last_ms if peer and key[0] == peer.name else elapsed)

    def ratio(above: tuple[str, int], below: tuple[str, int]) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    masked, matmul = ("masked-dense", experts[0]), (FLOOR, 1)
    return [Timing(*key, statistics.median(ms), min(ms), ratio(masked, key), ratio(key, matmul)) for key, ms in times.items()]


def memory(timings: list[Timing], threads: int, start_peer: Callable[[], Sparsify] | None) -> Peaks:
    """Of three steps, each contender in a fresh process."""
    peaks = {}
    for t in timings:
        if start_peer and t.name.startswith(Sparsify.PACKAGE):
            with start_peer() as peer:
                for _ in range(MEMORY_STEPS):
                    peer.step()
                peaks[t.key] = (peer.peak_mb() - peer.import_mb, peer.import_mb)
        elif not t.is_floor:
            command = ("--peak-memory-of", t.name, "--experts", str(t.E), "--threads", str(threads))
            done = subprocess.run((sys.executable, "-m", "experiments.benchmarks.cpu", *command), stdout=subprocess.PIPE, check=True, text=True)
            total, imports = json.loads(done.stdout)
            peaks[t.key] = (total - imports, imports)
    return peaks


def print_own_peak(name: str, num_experts: int) -> None:
    """What `memory` asks of a fresh process: [peak MB, of which imports]."""
    imports = peak_mb()
    batches = activations(SIZES)
    step = contender(name, replace(SIZES, E=num_experts), batches[0])
    for number in range(MEMORY_STEPS):
        step(batches[number % BATCHES])
    print(json.dumps([peak_mb(), imports]))


def table(timings: list[Timing], tokens: int, peaks: Peaks) -> str:
    titles = ("median ms", "min ms", "x faster", "x matmul", "tokens/s", "peak MB", "imports MB")
    lines = [f"{'one training step':<26}{'E':>4}" + "".join(f"{title:>11}" for title in titles)]
    for t in timings:
        cells = [f"{t.median_ms:.1f}", f"{t.min_ms:.1f}", "" if t.is_floor else f"{t.ratio:.2f}", f"{t.matmuls:.2f}"]
        cells += ["" if t.is_floor else f"{tokens / t.median_ms * 1e3:.0f}", *(f"{mb:.0f}" for mb in peaks.get(t.key, ()))]
        lines.append(f"{t.name:<26}{t.E:>4}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def record(path: Path, timings: list[Timing], peaks: Peaks, threads: int) -> None:
    """Appends one row per contender to the CSV file at `path`."""
    run = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "cpu": cpu_model(), "threads": threads, "torch": torch.__version__}
    rows = []
    for t in timings:
        times = {"median_ms": f"{t.median_ms:.2f}", "min_ms": f"{t.min_ms:.2f}", "ratio": "" if t.is_floor else f"{t.ratio:.2f}"}
        rows.append({**run, "name": t.name, "E": t.E, **times, "peak_mb": f"{peaks[t.key][0]:.0f}" if t.key in peaks else ""})
    append(path, rows)


def peer_starter(threads: int) -> Callable[[], Sparsify]:
    """Starts eai-sparsify with the weights and activations of our TopK SAE, as often as asked; installs it first."""
    Sparsify.ENVIRONMENT.make()
    batches = activations(SIZES)
    tensors = {name.rsplit("_", 1)[0]: parameter.detach() for name, parameter in build_sae(SIZES, batches[0]).named_parameters()}
    return lambda: Sparsify({**tensors, "x": torch.stack(batches)}, SIZES.K, threads)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64], help="the first is also that of masked-dense")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; every contender does one step in each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help=f"also {Sparsify.PACKAGE}, installed into {Sparsify.FOLDER.name}/ the first time")
    parser.add_argument("--quick", action="store_true", help="small sizes, without peers and memory; nothing is recorded")
    parser.add_argument("--peak-memory-of", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # Threads that spin while they wait make a step several times slower on a shared machine. The policy is read once, at start.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, "-m", "experiments.benchmarks.cpu", *(sys.argv[1:] if arguments is None else arguments)])
    torch.set_num_threads(options.threads)
    if options.peak_memory_of:
        return print_own_peak(options.peak_memory_of, options.experts[0])
    if min(options.experts) < 2 or options.repeats < 1:
        parser.error("--experts takes numbers of at least 2 (the dense SAE is always there), --repeats at least 1")
    shape = QUICK if options.quick else SIZES
    print(f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}, float32; T={shape.T} D={shape.D} M={shape.M} K={shape.K}")
    with ExitStack() as stack:
        try:
            print(f"all formulations agree: largest relative difference {check_formulations(options.experts):.1e} (float64)", flush=True)
            start_peer = peer_starter(options.threads) if options.peers and not options.quick else None
            peer = stack.enter_context(start_peer()) if start_peer else None
            timings = measure(shape, options.experts, options.repeats, peer)
        except (NotTrustedError, ValueError) as error:
            sys.exit(f"no speed is reported: {error}")
        peaks = {} if options.quick else memory(timings, options.threads, start_peer)
    print(table(timings, shape.T, peaks))
    if not peer:
        print(f"{Sparsify.PACKAGE}: not measured (--peers measures it, except with --quick)")
    if not options.quick:
        record(TABLE, timings, peaks, options.threads)
        print(f"recorded in {TABLE}")


if __name__ == "__main__":
    main()

"""Times training steps and encoding where latents are found by refit or pursuit, against our own Switch and dense TopK SAEs, interleaved in one run.

    python -m experiments.benchmarks.inference           # about 3 minutes on 2 quiet cores
    python -m experiments.benchmarks.inference --cheap   # instead, encoders at about a sixteenth of dense TopK's products, without a search
    python -m experiments.benchmarks.inference --quick   # small sizes, to see that it works; nothing is recorded

A step is that of `experiments.benchmarks.cpu`. Activations have topics, which routers can find (`SyntheticSource`). How long a refit or a pursuit
takes depends on the number of latents: nothing is reported unless every SAE's mean L0 is near k, in training and (by its threshold, if it has one)
in encoding, and no expert is idle. Where numba is installed, pursuit is timed with it and without, as two contenders.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.benchmarks.checks import NotTrustedError
from experiments.benchmarks.cpu import TRAINER
from experiments.benchmarks.peers import cpu_model
from experiments.benchmarks.record import RESULTS, append, commit
from switch_kernels import Shape
from switch_kernels.pursuit import NUMBA_SWITCH, why_not_in_rows
from switch_sae.activations import SyntheticSource
from switch_sae.models import ROUTERS, SAES, SparseAutoencoder
from switch_sae.models.inference import Inference
from switch_sae.models.product_keys_exact import KeyGate
from switch_sae.models.shared_pool import Lists
from switch_sae.models.threshold import calibrate, has_threshold
from switch_sae.report.tables import aligned
from switch_sae.rows import Rows
from switch_sae.training import Trainer, prepare

TABLE = RESULTS / "benchmark_inference.csv"
SIZES, QUICK = Shape(T=2048, D=512, M=8192, E=16, K=32), Shape(T=256, D=64, M=512, E=4, K=8)
WARMUP, SETTLING, BATCHES = 2, 150, 8
"""SETTLING: steps until theta of a stop rule gives k latents; those of other SAEs are there at once."""
L0_TOLERANCE = 0.1
SWITCH, TOPK = "Switch", "TopK"
Contender = tuple[str, dict[str, Any]]
"""Its key in `SAES`, and settings."""
CONTENDERS: dict[str, Contender] = {
    SWITCH: ("switch", {}),
    TOPK: ("topk", {}),
    "TopK, trained with refit": ("topk", {"inference": Inference.refit}),
    "SwitchRefit": ("switch_refit", {}),
    "SwitchPursuit": ("switch_pursuit", {}),
    "SwitchPursuit, stop rule": ("switch_pursuit", {"stop": True}),
}
IN_NUMBA = ", numba"
if why_not_in_rows(torch.device("cpu"), torch.float32) is None:
    CONTENDERS |= {name + IN_NUMBA: choice for name, choice in CONTENDERS.items() if choice[0] == "switch_pursuit"}


def cheap(E: int) -> dict[str, Contender]:
    """One-shot encoders that cost dense TopK's as much as E experts do, beside these: with E = 16, M = 8192, D = 512 1/15 to 1/17 of it."""
    competition = ROUTERS["competition"].Config()
    return {
        SWITCH: ("switch", {}),
        TOPK: ("topk", {}),
        "Switch, competition": ("switch", {"router": competition}),
        "Switch BatchTopK, competition": ("switch_batch_topk", {"router": competition}),
        "Switch, two of twice as many": ("switch", {"num_experts": 2 * E, "experts_per_token": 2}),
        "SharedPool, random lists": ("shared_pool", {"num_lists": 2 * E, "multiplicity": 1.75, "lists": Lists.random}),
        "Kron": ("kron", {"m": 2 * E, "n": 2 * E}),
        "ProductKeys": ("product_keys", {"keys": 2 * E}),
        "ProductKeysExact": ("product_keys_exact", {"keys": 4 * E, "candidates": 16 * E, "gate": KeyGate.score}),
        "Sketch": ("sketch", {"rank": E, "candidates": 15 * E}),
    }


@dataclass(frozen=True)
class Timing:
    """One contender."""

    name: str
    E: int
    l0: float
    """In training, of the timed steps."""
    step: list[float]
    """Seconds, by round."""
    encode: list[float]
    """Of all rows."""


def sae_of(contender: Contender, shape: Shape) -> SparseAutoencoder:
    """Untrained."""
    architecture, settings = contender
    experts = {"num_experts": shape.E} if SAES[architecture].is_routed else {}
    config = SAES[architecture].Config(**{"num_latents": shape.M, "k": shape.K, **experts, **settings})
    return SAES.build(config, shape.D, torch.Generator().manual_seed(0))


def trainer_of(contender: Contender, shape: Shape, rows: Rows) -> Trainer:
    """A contender at its start, as `prepare` leaves it."""
    sae = sae_of(contender, shape)
    prepare(sae, rows, normalize_activations=True)
    return Trainer(sae, replace(TRAINER, lr=1e-3), total_steps=1_000_000, batch_size=shape.T)


@contextmanager
def searching(name: str) -> Iterator[None]:
    """Within it a contender's pursuit is numba's or PyTorch's, as its name says."""
    before = os.environ.get(NUMBA_SWITCH)
    os.environ[NUMBA_SWITCH] = "1" if name.endswith(IN_NUMBA) else "0"
    try:
        yield
    finally:
        os.environ.pop(NUMBA_SWITCH) if before is None else os.environ.update({NUMBA_SWITCH: before})


def check_l0(what: str, l0: float, k: int) -> None:
    if not abs(l0 / k - 1) <= L0_TOLERANCE:
        raise NotTrustedError(f"{what} has a mean L0 of {l0:.2f}; it compares with the others within {L0_TOLERANCE:.0%} of k = {k}.")


def measure(
    shape: Shape, repeats: int, encodes: int, rows: int, settling: int = SETTLING, contenders: dict[str, Contender] = CONTENDERS
) -> list[Timing]:
    """Rounds of one step of each (A B C A B C ...), then rounds of encoding `rows` rows in chunks of T by each. Raises NotTrustedError."""
    topics, features = 2 * shape.E, shape.D // 8
    world = {"common": features, "topics": topics, "per_topic": features, "common_active": features / 8, "topic_active": shape.K - features / 8}
    source = SyntheticSource(SyntheticSource.Config(d_in=shape.D, noise=0.05, **world), shape.T)
    batches, held_out = [next(source) for _ in range(BATCHES)], source.evaluation_set(rows).rows
    start = Rows.of(torch.cat([batch.x_TD for batch in batches]))
    trainers = {name: trainer_of(contender, shape, start) for name, contender in contenders.items()}
    for name, trainer in trainers.items():
        with searching(name):
            for number in range(settling if contenders[name][1].get("stop") else WARMUP):
                trainer.step(batches[number % BATCHES])
    steps: dict[str, list[float]] = {name: [] for name in trainers}
    numbers: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    encodings: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(repeats):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            with searching(name):
                result = trainer.step(batches[number % BATCHES])
            steps[name].append(time.perf_counter() - started)
            numbers[name].append(result.numbers())
    l0 = {name: statistics.mean(step["l0"] for step in of) for name, of in numbers.items()}
    chunks = held_out.x_TD.split(shape.T)
    for name, trainer in trainers.items():
        sae = trainer.sae.eval()
        check_l0(f"{name} in training", l0[name], shape.K)
        with searching(name):
            check_l0(f"{name} in encoding", calibrate(sae, held_out) if has_threshold(sae) else shape.K, shape.K)
        if min(step.get("load/min", 1.0) for step in numbers[name]) == 0:
            raise NotTrustedError(f"an expert of {name} is idle: its time says nothing about {shape.E} experts.")
        with torch.no_grad():
            sae.encode(chunks[0])  # Gram matrices of these weights
    for _ in range(encodes):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            with torch.no_grad(), searching(name):
                for x_TD in chunks:
                    trainer.sae.encode(x_TD)
            encodings[name].append(time.perf_counter() - started)
    return [Timing(name, t.sae.num_experts, l0[name], steps[name], encodings[name]) for name, t in trainers.items()]


def compared(timings: list[Timing]) -> list[dict[str, object]]:
    """A row per contender: medians, and the medians over rounds of its ratios to Switch and to dense TopK, in which drift of the machine cancels."""
    rows: list[dict[str, object]] = []
    for t in timings:
        row: dict[str, object] = {"name": t.name, "E": t.E, "l0": f"{t.l0:.2f}"}
        for what, unit, scale in (("step", "ms", 1e3), ("encode", "s", 1.0)):
            row[f"{what}_{unit}"] = f"{scale * statistics.median(getattr(t, what)):.4g}"
            for other in (other for other in timings if other.name in (SWITCH, TOPK)):
                ratios = [own / theirs for own, theirs in zip(getattr(t, what), getattr(other, what), strict=True)]
                row[f"{what}_x_{other.name.lower()}"] = f"{statistics.median(ratios):.2f}"
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    name = "experiments.benchmarks.inference"
    parser = argparse.ArgumentParser(prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds of steps")
    parser.add_argument("--encodes", type=int, default=3, help="rounds of encoding")
    parser.add_argument("--rows", type=int, default=100_000, help="that are encoded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cheap", action="store_true", help="cheap encoders, instead of refits and pursuit")
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is recorded")
    options = parser.parse_args(arguments)
    if "OMP_WAIT_POLICY" not in os.environ:  # as in `cpu`
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, "-m", name, *(sys.argv[1:] if arguments is None else arguments)])
    if min(options.repeats, options.encodes, options.rows) < 1:
        parser.error("--repeats, --encodes and --rows must be at least 1")
    torch.set_num_threads(options.threads)
    shape, rows = (QUICK, min(options.rows, 4096)) if options.quick else (SIZES, options.rows)
    print(f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}, float32; {shape}; {rows:,} rows")
    try:
        records = compared(measure(shape, options.repeats, options.encodes, rows, contenders=cheap(shape.E) if options.cheap else CONTENDERS))
    except NotTrustedError as error:
        sys.exit(f"no speed is reported: {error}")
    print("\n".join(aligned([list(records[0]), *(list(map(str, record.values())) for record in records)])))
    if not options.quick:
        run = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "cpu": cpu_model(), "threads": options.threads, "torch": torch.__version__}
        append(TABLE, [{**run, "rows": rows, **record} for record in records])
        print(f"recorded in {TABLE}")


if __name__ == "__main__":
    main()

"""Which configurations of our training step the GPU benchmark checks and times, in order of importance, and what they should reach."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product

from switch_kernels import Moments, Precision, Regime, Shape

MAIN = Shape(T=8192, D=768, M=32768, E=32, K=32)
TINY = Shape(T=64, D=32, M=256, E=4, K=4)
PARITY_STEPS = 2000
MASKED_TARGET, PEER_TARGET, FLOOR_TARGET = 40.0, 4.0, 0.75
"""At least so many times faster than masked-dense and than the best other contender, and floor / measured at least so much, at `MAIN`."""


@dataclass(frozen=True)
class Case:
    """One configuration of our step; `regime` None leaves the choice to the planner."""

    shape: Shape
    precision: Precision = Precision.bf16
    moments: Moments = Moments.float32
    regime: Regime | None = None
    dead: int = 0
    """Latents of each expert that count as dead at the start and at every reading of the device, for AuxK to revive."""

    def __str__(self) -> str:
        more = ("" if self.moments is Moments.float32 else ", bf16 moments") + (f", {self.dead} dead" if self.dead else "")
        return f"{self.shape} {self.precision.value}{more}" + (f", {self.regime.value}" if self.regime else "")


TARGETS_US: dict[Case, float] = {
    Case(MAIN): 600.0,
    Case(replace(MAIN, E=8)): 900.0,
    Case(replace(MAIN, E=1)): 1600.0,
    Case(replace(MAIN, M=2**20, E=64)): 13000.0,
    Case(MAIN, dead=256): 950.0,
}
"""Longest whole step, in microseconds, where a copy runs at `TARGET_COPY`: others are allowed as much more as their memory is slower. The last has a
quarter of its latents dead; its target is the first's, five products over those latents, float32 gradients of their rows, and some 40 nodes more."""
TARGET_COPY = 4.3e12
"""Bytes per second, an H200's."""


def target_cases(tiny: bool) -> list[Case]:
    return [Case(TINY), Case(replace(TINY, E=1))] if tiny else list(TARGETS_US)


def shape_cases(tiny: bool) -> list[Case]:
    """All that is timed besides the targets: experts per token, skew, precisions, d=4096, then every width, sparsity and batch."""
    if tiny:
        return [Case(replace(TINY, S=2)), Case(replace(TINY, routing="zipf"))]
    cases = [Case(replace(MAIN, E=128)), *(Case(replace(MAIN, S=S)) for S in (2, 4)), *(Case(replace(MAIN, E=E, routing="zipf")) for E in (32, 8))]
    cases += [Case(MAIN, moments=Moments.bfloat16), Case(replace(MAIN, M=2**20, E=64), moments=Moments.bfloat16)]
    cases += [Case(replace(MAIN, D=4096, M=131072)), Case(MAIN, Precision.float32)]
    grid = [replace(MAIN, T=T, K=K, M=M, E=E) for K, T, M, E in product((32, 64), (8192, 2048, 32768), (32768, 24576, 131072), (32, 8, 1, 128))]
    grid += [replace(MAIN, T=T, K=K, M=2**20, E=64) for K, T in product((32, 64), (8192, 2048, 32768))]
    return [case for case in dict.fromkeys([*cases, *map(Case, grid)]) if case not in TARGETS_US]


def crossover_cases(tiny: bool) -> list[tuple[Case, Case]]:
    """(sparse, dense) for experts of growing width."""
    widths = (16, 32) if tiny else (512, 2048, 4096, 1024, 8192, 16384)
    shapes = [replace(TINY, E=2, M=2 * F) if tiny else replace(MAIN, E=8, M=8 * F) for F in widths]
    return [(Case(shape, regime=Regime.sparse), Case(shape, regime=Regime.dense)) for shape in shapes]


def parity_cases(tiny: bool) -> list[Case]:
    """A dense and a sparse regime, and moments in bfloat16."""
    main = TINY if tiny else MAIN
    return [Case(main), Case(replace(main, E=main.E // 4)), *([] if tiny else [Case(main, moments=Moments.bfloat16)])]


def step_cases(tiny: bool, triton: bool) -> list[Case]:
    """All that one step is checked for: odd sizes, one to 32 experts, one or two per token, both regimes, both precisions, dead latents."""
    if tiny:
        shapes = [Shape(T=96, D=20, M=24 * E, E=E, K=6, S=S) for E, S in ((1, 1), (4, 1), (4, 2))]
    else:  # at E = 32 the sparse regime computes its gradients twice, below it buffers them
        shapes = [Shape(T=1000, D=200, M=300 * E, E=E, K=24, S=S) for E, S in ((1, 1), (8, 1), (32, 1), (8, 2), (32, 2))]
    if not triton:
        return [Case(shape, Precision.float32) for shape in shapes] + [Case(shapes[1], Precision.float32, dead=5)]
    precisions = (Precision.bf16,) if tiny else (Precision.bf16, Precision.float32)
    cases = [Case(*case, regime=regime) for case in product(shapes, precisions) for regime in Regime]
    for regime in Regime:
        cases += [Case(shapes[1], Precision.bf16, Moments.bfloat16, regime), Case(shapes[1], Precision.float32, regime=regime, dead=5)]
    return cases


def graph_cases(tiny: bool) -> list[Case]:
    """All whose replayed steps are compared with eager ones: gradients written, computed twice, and dense; both precisions; two slots."""
    if tiny:
        return [Case(Shape(T=32, D=20, M=48, E=2, K=4), regime=regime) for regime in Regime]
    small = Shape(T=1000, D=200, M=2400, E=8, K=24)
    cases = [Case(MAIN), Case(replace(MAIN, E=8)), Case(replace(MAIN, T=2048, E=8, M=65536), moments=Moments.bfloat16), Case(replace(small, S=2))]
    return [*cases, *(Case(small, Precision.float32, regime=regime) for regime in Regime)]


def target_us(case: Case, copy: float) -> float:
    """The target where a copy runs at `copy` bytes per second: a target below its floor would say nothing."""
    return TARGETS_US[case] * TARGET_COPY / copy


def compile_groups(tiny: bool, sections: Collection[str]) -> list[list[Case]]:
    """What these sections run, by importance; cases of a group share most kernels, which depend on all of a case but its number of tokens."""
    parity = [*parity_cases(tiny)]
    for case in parity_cases(tiny):
        if case.moments is Moments.float32:  # AuxK's kernels, whose widths are the powers of two that cover an expert's dead latents
            parity += [replace(case, dead=2**n) for n in range(6, 13) if 2**n <= case.shape.F]
    cases = {
        "correctness": [
            *step_cases(tiny, True),
            *(replace(case, dead=dead) for case in graph_cases(tiny) for dead in (0, 64, 128)[: 1 if tiny else 3]),
        ],
        "targets": target_cases(tiny),
        "parity": parity,
        "contenders": target_cases(tiny),
        "stages": target_cases(tiny),
        "shapes": shape_cases(tiny),
        "crossover": [case for pair in crossover_cases(tiny) for case in pair],
    }
    wanted = dict.fromkeys(case for section, several in cases.items() if section in sections or section == "correctness" for case in several)
    groups: dict[Case, list[Case]] = {}
    for case in wanted:
        groups.setdefault(replace(case, shape=replace(case.shape, T=1, routing="")), []).append(case)
    return list(groups.values())

"""How many nodes a training step of ours has as a CUDA graph, and which, without a GPU: the step runs on meta tensors.

    python -m experiments.benchmarks.nodes

Every Triton launch is one node, and so is every torch operator that would launch a kernel; views and bare allocations are none. A torch operator can
be several kernels (a sort, a product split along its sum), so this counts too few of those, never too many.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.benchmarks.cases import MAIN, Case
from switch_kernels import Execution, Moments, Precision, Regime
from switch_kernels.gpu.auxk import DeadLatents
from switch_kernels.gpu.launch import Launch, launches_to
from switch_sae.engines import EngineSettings, TritonEngine
from switch_sae.models import SAES, SwitchBatchTopKSAE, SwitchPursuitSAE, SwitchRefitSAE, SwitchSAE, TopKSAE
from switch_sae.models.routers import CompetitionRouter
from switch_sae.rows import Rows

SEARCHES = {
    "switch_pursuit": SwitchPursuitSAE.Config(num_latents=MAIN.M, k=MAIN.K, num_experts=MAIN.E),
    "switch_pursuit, stop rule, 1024 shared": SwitchPursuitSAE.Config(num_latents=MAIN.M, k=MAIN.K, num_experts=MAIN.E, shared=1024, stop=True),
    "switch_refit": SwitchRefitSAE.Config(num_latents=MAIN.M, k=MAIN.K, num_experts=MAIN.E),
}
"""SAEs that search, at the benchmark's main sizes."""
SIZES = {"num_latents": MAIN.M, "k": MAIN.K, "num_experts": MAIN.E}
RIVALS = {
    "switch, competition": SwitchSAE.Config(**SIZES, router=CompetitionRouter.Config()),
    "switch_batch_topk": SwitchBatchTopKSAE.Config(**SIZES),
    "switch_batch_topk, competition": SwitchBatchTopKSAE.Config(**SIZES, router=CompetitionRouter.Config()),
}
"""Those whose router learns by competition, or that select under one threshold."""
CASES = [Case(replace(MAIN, E=E, S=S), regime=regime, dead=dead) for E, S in ((32, 1), (32, 2), (1, 1)) for regime in Regime for dead in (0, 256)]


class _Operators(TorchDispatchMode):
    """Notes the operators that would launch a kernel."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or func.overloadpacket.__name__ in ("detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def step_on_meta(case: Case) -> Callable[[], object]:
    """The device work of one step of our engine on TopK and Switch SAEs, on meta tensors.

    `case.dead` is how many latents of each expert AuxK revives; 0 leaves it out, as in a step without dead latents.
    """
    s = case.shape
    config: Any = TopKSAE.Config(num_latents=s.M, k=s.K)
    if s.E > 1:
        config = SwitchSAE.Config(num_latents=s.M, k=s.K, num_experts=s.E, experts_per_token=s.S, joint_topk=s.joint)
    return engine_on_meta(config, s.T, s.D, case.precision, case.dead, case.moments, case.regime)


def engine_on_meta(
    config: Any, tokens: int, D: int, precision: Precision = Precision.bf16, dead: int = 0, moments: Moments = Moments.float32,
    regime: Regime | None = None,
) -> Callable[[], object]:  # fmt: skip
    """Likewise of any SAE that trains in kernels. A step that computes Gram matrices, where there are any."""
    with torch.device("meta"):
        sae = SAES[SAES.key_of(config)](config, D)
        if regime is not None:
            sae.regime = regime
        settings = EngineSettings(lambda _: 1e-3, 1000, 1.0, 10**6, moments)
        engine = TritonEngine(sae, settings, torch.empty(sae.num_latents, dtype=torch.int64), Execution(precision=precision).dot)
        engine.rows = Rows.of(torch.empty(tokens, D))
        engine.kind = sae.prepare_step()
        if dead:
            B = sae.num_experts * dead
            lists = torch.empty(B, dtype=torch.int64), torch.empty(B, dtype=torch.bool), torch.empty(sae.num_latents, dtype=torch.int32)
            engine.dead = DeadLatents(*lists, sae.auxk_latents(), sae.config.auxk * D, sae.num_shared > 0)
    return torch.no_grad()(engine._compute)


def nodes(case: Case) -> list[str]:
    """The names of all nodes of `step_on_meta` in the order of their launch: of Triton kernels, and of torch operators such as "aten.add.Tensor"."""
    return nodes_of(step_on_meta(case))


def nodes_of(compute: Callable[[], object]) -> list[str]:
    """Likewise of any device work on meta tensors."""
    names = list[str]()

    def note(launch: Launch) -> None:
        names.append(launch.kernel.__name__)

    with launches_to(note), _Operators(names):
        compute()
    return names


def is_operator(name: str) -> bool:
    """Whether a node is one of torch's operators, not a kernel of ours."""
    return "." in name


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    steps = {str(case): step_on_meta(case) for case in CASES}
    for name, config in {**SEARCHES, **RIVALS}.items():
        steps |= {f"{name}, {dead} dead" if dead else name: engine_on_meta(config, MAIN.T, MAIN.D, dead=dead) for dead in (0, 256)}
    for name, compute in steps.items():
        names = nodes_of(compute)
        operators = sum(map(is_operator, names))
        print(f"{name}: {len(names)} nodes, {len(names) - operators} launches and {operators} torch operators")
        for kind in (False, True):
            counts = Counter(name for name in names if is_operator(name) is kind)
            print("    " + ", ".join(name + (f" x{count}" if count > 1 else "") for name, count in counts.items()))


if __name__ == "__main__":
    main()

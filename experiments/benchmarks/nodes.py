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
from switch_kernels import Execution, Regime
from switch_kernels.gpu.auxk import DeadLatents
from switch_kernels.gpu.launch import Launch, launches_to
from switch_sae.engines import EngineSettings, TritonEngine
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.rows import Rows

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
    """The device work of one step of our engine, on meta tensors.

    `case.dead` is how many latents of each expert AuxK revives; 0 leaves it out, as in a step without dead latents.
    """
    s = case.shape
    with torch.device("meta"):
        if s.E == 1:
            sae = TopKSAE(TopKSAE.Config(num_latents=s.M, k=s.K), s.D)
        else:
            sae = SwitchSAE(SwitchSAE.Config(num_latents=s.M, k=s.K, num_experts=s.E, experts_per_token=s.S, joint_topk=s.joint), s.D)
        sae.regime = case.regime
        settings = EngineSettings(lambda _: 1e-3, 1000, 1.0, 10**6, case.moments)
        engine = TritonEngine(sae, settings, torch.empty(s.M, dtype=torch.int64), Execution(precision=case.precision).dot)
        engine.rows = Rows.of(torch.empty(s.T, s.D))
        if case.dead:
            B, is_padding_B = s.E * case.dead, torch.empty(s.E * case.dead, dtype=torch.bool)
            slot_M = torch.empty(s.M, dtype=torch.int32)
            engine.dead = DeadLatents(torch.empty(B, dtype=torch.int64), is_padding_B, slot_M, sae.auxk_latents(), sae.config.auxk * s.D)
    return torch.no_grad()(engine._compute)


def nodes(case: Case) -> list[str]:
    """The names of all nodes of `step_on_meta` in the order of their launch: of Triton kernels, and of torch operators such as "aten.add.Tensor"."""
    names = list[str]()

    def note(launch: Launch) -> None:
        names.append(launch.kernel.__name__)

    compute = step_on_meta(case)
    with launches_to(note), _Operators(names):
        compute()
    return names


def is_operator(name: str) -> bool:
    """Whether a node is one of torch's operators, not a kernel of ours."""
    return "." in name


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for case in CASES:
        names = nodes(case)
        operators = sum(map(is_operator, names))
        print(f"{case}: {len(names)} nodes, {len(names) - operators} launches and {operators} torch operators")
        for kind in (False, True):
            counts = Counter(name for name in names if is_operator(name) is kind)
            print("    " + ", ".join(name + (f" x{count}" if count > 1 else "") for name, count in counts.items()))


if __name__ == "__main__":
    main()

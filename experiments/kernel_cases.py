"""What `experiments.compile_kernels` compiles: whole training steps and evaluation at production sizes, on meta tensors.

The sizes are those of the benchmark on a GPU, thinned out: every kernel appears in every form that those sizes ask for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from switch_kernels.backend import Dot
from switch_kernels.dispatch import Dispatch
from switch_kernels.gpu import inference, topk
from switch_kernels.gpu.adam import FusedAdam
from switch_kernels.gpu.step import DeadLatents, Settings, Weights, training_step
from switch_kernels.plan import choose_plan


@dataclass(frozen=True)
class Problem:
    """Sizes and modes of one step: E experts of M latents, S experts and K active latents per token, T activations of D numbers."""

    M: int
    E: int
    K: int = 32
    D: int = 768
    T: int = 8192
    S: int = 1
    joint: bool = True
    dot: Dot = "bf16"
    moments: torch.dtype = torch.float32
    x_dtype: torch.dtype = torch.float32
    dead_per_expert: int = 0
    bias: bool = True

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(type(self), name, None)}
        return " ".join(f"{name}={value}" for name, value in changed.items())


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def train(p: Problem) -> None:
    """One training step and its update."""
    parameters = {"W_enc_MD": meta(p.M, p.D), "W_dec_MD": meta(p.M, p.D), "b_pre_D": meta(p.D)}
    if p.bias:
        parameters["b_enc_M"] = meta(p.M)
    if p.E > 1:
        parameters |= {"W_router_ED": meta(p.E, p.D), "b_router_D": meta(p.D)}
    adam = FusedAdam(parameters, p.dot, p.moments)
    others = [parameters.get(name) for name in ("b_enc_M", "W_router_ED", "b_router_D")]
    weights = Weights(adam.operands["W_enc_MD"], adam.operands["W_dec_MD"], others[0], parameters["b_pre_D"], *others[1:])
    plan = choose_plan(p.T, p.M, p.E, p.K, p.S)
    settings = Settings(p.E, p.S, p.K, p.joint, balance=3.0, train_router=p.E > 1, dot=p.dot, plan=plan)
    dead = None
    if p.dead_per_expert:
        B = p.E * p.dead_per_expert
        dead = DeadLatents(meta(B, dtype=torch.int64), meta(B, dtype=torch.bool), meta(p.M, dtype=torch.int32), p.D // 2, 1 / 32)
    step = training_step(meta(p.T, p.D, dtype=p.x_dtype), meta(), weights, settings, dead)
    topk.mark_fired_(meta(p.M, dtype=torch.int64), step.values_TK, step.indices_TK, p.T)
    adam.step(step.gradients, meta(6), meta(1, dtype=torch.int32))


def evaluate(p: Problem) -> None:
    """Encoding and decoding outside of training."""
    expert_TS = meta(p.T, p.S, dtype=torch.int64)
    values_RK, indices_RK = inference.select_rows(meta(p.T, p.D), meta(p.M, p.D), meta(p.M), Dispatch.from_experts(expert_TS, p.E), p.K, p.dot)
    inference.decode(values_RK, indices_RK, meta(p.M, p.D), p.dot)


TRAIN = (
    Problem(M=32768, E=32, dead_per_expert=256, x_dtype=torch.bfloat16),
    Problem(M=32768, E=8, dead_per_expert=1024),
    Problem(M=32768, E=1),
    Problem(M=24576, E=128, K=64),
    Problem(M=131072, E=32, K=64, T=32768),
    Problem(M=131072, E=128, T=2048, bias=False),
    Problem(M=1048576, E=64, moments=torch.bfloat16),
    Problem(M=131072, E=32, K=64, D=4096),
    Problem(M=131072, E=8, D=4096, moments=torch.bfloat16),
    Problem(M=32768, E=32, S=2),
    Problem(M=32768, E=8, S=4, joint=False),
    Problem(M=32768, E=32, dot="tf32"),
    Problem(M=32768, E=8, dot="tf32"),
    Problem(M=32768, E=32, dot="ieee"),
    Problem(M=32768, E=32, moments=torch.bfloat16),
)
CASES: dict[str, Callable[[], None]] = {f"train {p}": partial(train, p) for p in TRAIN}
CASES["evaluate"] = partial(evaluate, Problem(M=32768, E=32))

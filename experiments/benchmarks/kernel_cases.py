"""What `experiments.benchmarks.compile_kernels` compiles: whole training steps and evaluation at production sizes, on meta tensors.

The sizes are those of the benchmark on a GPU, thinned out: every kernel appears in every form that those sizes ask for.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.cases import MAIN, Case
from experiments.benchmarks.nodes import RIVALS, SEARCHES, SIZES, engine_on_meta
from switch_kernels import Backend, Dispatch, Execution, Moments, Precision, Shape, choose_plan
from switch_kernels.gpu import batch_missed, batch_select, dispatch, gram, inference, pursuit, route, topk
from switch_kernels.gpu.adam import FusedAdam
from switch_kernels.gpu.auxk import DeadLatents
from switch_kernels.gpu.candidate_products import local_products
from switch_kernels.gpu.step import Settings, Weights, training_step
from switch_kernels.gpu.update_small import Schedule
from switch_kernels.pursuit import padded_columns
from switch_sae.models import SAES


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def train(case: Case, x_dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
    """One training step and its update."""
    s, dot = case.shape, Execution(precision=case.precision).dot
    parameters = {"W_enc_MD": meta(s.M, s.D), "W_dec_MD": meta(s.M, s.D), "b_in_D": meta(s.D)}
    if bias:
        parameters["b_enc_M"] = meta(s.M)
    if s.E > 1:
        parameters |= {"W_router_ED": meta(s.E, s.D), "b_router_D": meta(s.D)}
    adam = FusedAdam(parameters, dot, torch.bfloat16 if case.moments is Moments.bfloat16 else torch.float32)
    weights = Weights(**{"b_enc_M": None, "b_out_D": parameters["b_in_D"], **parameters, **adam.operands})
    plan = choose_plan(s.T, s.M, s.E, s.K, s.S, case.regime)
    settings = Settings(s.E, s.S, s.K, s.joint, balance=3.0, train_router=s.E > 1, dot=dot, plan=plan)
    dead = None
    if case.dead:
        B = s.E * case.dead
        dead = DeadLatents(meta(B, dtype=torch.int64), meta(B, dtype=torch.bool), meta(s.M, dtype=torch.int32), s.D // 2, 1 / 32)
    x_TD, scale = meta(s.T, s.D, dtype=x_dtype), meta()
    step = training_step(x_TD, x_TD, scale, scale, weights, settings, dead)
    topk.mark_fired_(meta(s.M, dtype=torch.int64), step.values_TK, step.indices_TK, s.T)
    adam.step(step.gradients, Schedule(meta(64, 6), meta(1, dtype=torch.int64), meta(1, dtype=torch.int32), meta()))


def evaluate(s: Shape) -> None:
    """Encoding and decoding outside of training."""
    pairs = Dispatch.from_experts(meta(s.T, s.S, dtype=torch.int64), s.E)
    values_RK, indices_RK = inference.select_rows(meta(s.T, s.D), meta(s.M, s.D), meta(s.M), pairs, s.K, "bf16")
    inference.decode(values_RK, indices_RK, meta(s.M, s.D), "bf16")


def many_experts(E: int, T: int = 8192, D: int = 768) -> None:
    """The router of more experts than the training steps have."""
    x_TD, W_ED, b_D, counts_E = meta(T, D), meta(E, D), meta(D), meta(E, dtype=torch.int32)
    routed = route.route(x_TD, meta(), W_ED, b_D, 1, "bf16")
    route.router_gradients(route.route_backward(routed, meta(T, 1), counts_E, 1.0), x_TD, meta(), W_ED, b_D, "bf16")


@torch.no_grad()
def infer_search(config: Any) -> None:
    """Encoding and decoding by an SAE that searches, in both precisions."""
    with torch.device("meta"):
        sae = SAES[SAES.key_of(config)](config, MAIN.D).eval()
    for precision in (Precision.bf16, Precision.float32):
        sae.execution = Execution(Backend.triton, precision)
        found = sae(meta(MAIN.T, MAIN.D)).latents
        inference.decode(found.values_TK, found.indices_TK, sae.W_dec_MD, sae.execution.dot)  # which its operator skips on meta tensors


def train_architecture(config: Any) -> None:
    """Steps of an SAE, with and without dead latents, in both precisions."""
    for precision, dead in ((Precision.bf16, 256), (Precision.float32, 0)):
        engine_on_meta(config, MAIN.T, MAIN.D, precision, dead)()


WIDE = replace(MAIN, M=131072)
TRAIN: dict[Case, dict[str, Any]] = {
    Case(MAIN, dead=256): {"x_dtype": torch.bfloat16},
    Case(replace(MAIN, E=8), dead=1024): {},
    Case(replace(MAIN, E=1), dead=64): {},
    Case(replace(MAIN, M=24576, E=128, K=64)): {},
    Case(replace(WIDE, K=64, T=32768)): {},
    Case(replace(WIDE, E=128, T=2048)): {"bias": False},
    Case(replace(MAIN, M=2**20, E=64), moments=Moments.bfloat16): {},
    Case(replace(WIDE, K=64, D=4096)): {},
    Case(replace(WIDE, E=8, D=4096), moments=Moments.bfloat16): {},
    Case(replace(MAIN, S=2)): {},
    Case(replace(MAIN, E=8, S=4, joint=False)): {},
    Case(MAIN, Precision.float32): {},
    Case(MAIN, moments=Moments.bfloat16): {},
}
"""With what differs from a plain step."""
CASES: dict[str, Callable[[], None]] = {f"train {case}": partial(train, case, **changes) for case, changes in TRAIN.items()}
CASES["evaluate"] = partial(evaluate, MAIN)
for name, config in SEARCHES.items():
    CASES |= {f"train {name} M={MAIN.M}": partial(train_architecture, config), f"infer {name} M={MAIN.M}": partial(infer_search, config)}
for name, config in {**RIVALS, "switch, 8 experts, competition": replace(RIVALS["switch, competition"], **{**SIZES, "num_experts": 8})}.items():
    CASES[f"train {name} M={MAIN.M}"] = partial(train_architecture, config)
CASES |= {f"router of {E} experts": partial(many_experts, E) for E in (256, 4096)}


def search(experts: int, own: int, k: int, blocks: int, shared: int = 0, D: int = 768, T: int = 10240, limited: bool = False) -> None:
    """Correlations with the dictionary of each token's expert, then matching pursuit; T are those of 8,192 tokens and of the rivals of a quarter."""
    candidates, expert_N = shared + own, meta(T, dtype=torch.int64)
    gram_GCP = meta(experts, candidates, padded_columns(candidates))
    limit_N = meta(T, dtype=torch.int64) if limited else None
    for dot in ("bf16", "ieee"):
        products_NC = local_products(meta(T, D), meta(shared + experts * own, D), meta(experts + 1, dtype=torch.int64), shared, None, dot)
    pursuit.matching_pursuit(products_NC, gram_GCP, expert_N, k, blocks, 1e-3, meta(), limit_N)


def refit(experts: int, own: int, most: int, shared: int, D: int = 768, T: int = 10240) -> None:
    """What the encoder of `switch_refit` multiplies, then least squares on what it chose."""
    M, int64, pairs = shared + experts * own, torch.int64, T * most // 2
    for dot in ("bf16", "ieee"):
        local_products(meta(T, D), meta(M, D), meta(experts + 1, dtype=int64), shared, meta(M), dot)
    gram_GCP = meta(experts, shared + own, padded_columns(shared + own))
    numbers = (meta(size, dtype=int64) for size in (pairs, T, T, T))
    pursuit.refit_pairs(meta(T, D), meta(M, D), *numbers, gram_GCP, shared, 1e-3, most)


CASES |= {
    "pursuit 24 x 170, k=16": partial(search, 24, 170, 16, 4),
    "pursuit 16 x 512, k=32": partial(search, 16, 512, 32, 4),
    "pursuit 24 x 170, stop rule, 64 slots": partial(search, 24, 170, 64, 8),
    "pursuit 32 x 473, stop rule, 64 slots": partial(search, 32, 473, 64, 8),
    "pursuit 1 x 4096, limits": partial(search, 1, 4096, 32, 4, limited=True),
    "pursuit 1 x 8192, 64 slots": partial(search, 1, 8192, 64, 8),
    "refit 32 x 125 + 64 shared, 32 slots, as in pursuit": partial(refit, 32, 125, 32, 64),
    "refit 32 x 704 + 160 shared, 64 slots, as in pursuit": partial(refit, 32, 704, 64, 160),
    "refit 24 x 170, 16 slots, as in pursuit": partial(refit, 24, 170, 16, 0),
}


def batch_selection(experts: int, own: int, most: int, shared: int, D: int = 768, T: int = 8192, rivals: int = 2048) -> None:
    """What `switch_refit` selects in a training step: for a batch and its rivals under one threshold, then what the encoder missed of a quarter."""
    C, M, int32 = shared + own, shared + experts * own, torch.int32
    tokens, rows = T + rivals, dispatch.num_rows(T + rivals, experts)
    theta, expert_T, count_T = meta(), meta(tokens, dtype=int32), meta(tokens, dtype=int32)
    values_TL, columns_TL = batch_select.row_candidates(meta(rows, C), meta(rows, dtype=int32), tokens, most)
    batch_select.threshold_(theta, values_TL[:T], T * most // 2)
    latents_TL = batch_select.keep_above(values_TL, columns_TL, theta, T, expert_T, shared, own)[1]
    some = dispatch.num_rows(T // 4, experts)
    for dtype, row_T in ((torch.float32, None), (torch.bfloat16, meta(tokens, dtype=int32))):
        out = (latents_TL[:, -1], meta(T), meta(T))
        table, W_MD = meta(rows, D, dtype=dtype), meta(M, D, dtype=dtype)
        batch_missed.missed_rows(meta(some, C), meta(some, dtype=int32), T // 4, expert_T, theta, table, row_T, W_MD, meta(M), shared, out)
    batch_missed.encoder_weights(values_TL, values_TL, count_T, meta(T), meta(T), T, 1.0, T // 4)


CASES |= {
    f"selection {experts} x {own} + {shared} shared, {most} slots": partial(batch_selection, experts, own, most, shared)
    for experts, own, most, shared in ((24, 170, 32, 0), (16, 512, 64, 0), (32, 704, 64, 160), (16, 1024, 64, 0), (2, 8192, 64, 0))
}


def grams(experts: int, own: int, shared: int = 0, D: int = 768) -> None:
    """The Gram matrices of all dictionaries."""
    candidates = shared + own
    for dot in ("bf16", "ieee"):
        gram.gram_matrices_(meta(experts, candidates, padded_columns(candidates)), meta(shared + experts * own, D), shared, dot)


CASES |= {
    "gram 24 x 170": partial(grams, 24, 170),
    "gram 32 x 1024": partial(grams, 32, 1024),
    "gram 32 x 704 + 160 shared": partial(grams, 32, 704, 160),
    "gram 3 x 1024 of odd rows": partial(grams, 3, 1024, D=771),
}

"""Selected latents back into dense rows, which grouped matrix products read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch

BLOCK_P = 256


@triton.jit(do_not_specialize=["pairs", "K", "S", "F", "FP"])
def _scatter_latents(
    values_TK, indices_TK, slot_TK, expert_TS, row_R, z_NF, pairs, K, S, F, FP, JOINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = p < pairs
    token = p // K
    slot = tl.load(slot_TK + p, mask=live, other=0) if JOINT else (p % K) // (K // S)
    pair = token * S + slot
    row = tl.load(row_R + pair, mask=live, other=0)
    expert = tl.load(expert_TS + pair, mask=live, other=0)
    local = tl.load(indices_TK + p, mask=live, other=0) - expert * F
    value = tl.load(values_TK + p, mask=live, other=0.0)
    tl.store(z_NF + row.to(tl.int64) * FP + local, value, mask=live)


def scatter_latents(
    values_TK: Tensor, indices_TK: Tensor, slot_TK: Tensor | None, expert_TS: Tensor, row_R: Tensor, rows: int, latents_per_expert: int, width: int
) -> Tensor:
    """z_NF [rows, width]: value of token t's latent j at row (t, slot of j), column j - expert * F; zeros elsewhere.

    `slot_TK` None: the K latents of a token belong to its S experts in equal, consecutive shares.
    """
    k, slots = values_TK.shape[1], expert_TS.shape[1]
    z_NF = torch.zeros(rows, width, dtype=values_TK.dtype, device=values_TK.device)
    pairs = values_TK.numel()
    launch(
        _scatter_latents, (cdiv(pairs, BLOCK_P),),
        values_TK, indices_TK, slot_TK if slot_TK is not None else indices_TK, expert_TS, row_R, z_NF, pairs,
        k, slots, latents_per_expert, width, JOINT=slot_TK is not None, BLOCK=BLOCK_P, num_warps=4,
    )  # fmt: skip
    return z_NF

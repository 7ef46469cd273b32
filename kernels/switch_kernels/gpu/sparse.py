"""Decoding a few latents per token by gathering their rows of the decoder; loss and gradients in the same gather.

The squared error is local to a token. So the program that gathers K rows of the decoder to reconstruct it has them at hand to form the error, its
gradient g, and the K products <g, W_j> from which the gradients of values and gates follow: one gather instead of two, and no pass over [T, D].
Bound by the rows read from L2: 2*T*K*D bytes in bfloat16.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2


@dataclass(frozen=True)
class TokenLoss:
    """Squared error of each token and its gradients, from one gather."""

    grad_TD: Tensor
    """d loss / d reconstruction, [T, Dp] in the decoder operand's dtype; pad columns zero."""
    weights_TK: Tensor
    """gate * value, float32: what multiplies the decoder rows."""
    grad_pre_TK: Tensor | None
    """d loss / d pre-activation, float32: zero where the value is; None where nobody asked."""
    grad_gate_TS: Tensor | None
    """d loss / d gate, float32; None without gates."""
    loss_T: Tensor
    """Sum over D of the squared error, float32, without `grad_scale`."""


@dataclass(frozen=True)
class GatherTiling:
    """Tiles of `rows` decoder rows by `columns`, gathered by `warps` warps."""

    rows: int
    columns: int
    warps: int

    @classmethod
    def of(cls, k: int, columns: int) -> "GatherTiling":
        """One warp for up to 32 rows, so that nothing waits at a barrier, and 64 elements a lane: the most that fits its registers."""
        rows = next_power_of_2(k)
        width = min(next_power_of_2(columns), max(64, 2048 // rows), 256)
        return cls(rows, width, min(8, max(1, rows * width // 2048)))


@triton.jit
def _sparse_decode(values, indices, W, out, D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, ROWS)
    a = tl.load(values + t * K + k, mask=k < K, other=0.0).to(tl.float32)
    rows = tl.load(indices + t * K + k, mask=k < K, other=0).to(tl.int64) * DP
    live = (a != 0.0)[:, None]
    for c0 in range(0, D, WIDTH):
        c = c0 + tl.arange(0, WIDTH)
        w = tl.load(W + rows[:, None] + c[None, :], mask=live & (c < D)[None, :], other=0.0).to(tl.float32)
        tl.store(out + t * D + c, tl.sum(w * a[:, None], axis=0), mask=c < D)


def sparse_decode(values_TK: Tensor, indices_TK: Tensor, W_MD: Tensor, D: int) -> Tensor:
    """recon[t] = sum_s values[t, s] * W[indices[t, s], :D] in float32; rows of value 0 are not read. W is [M, Dp], indices int32 or int64."""
    T, K = values_TK.shape
    tiling = GatherTiling.of(K, D)
    recon_TD = torch.empty(T, D, dtype=torch.float32, device=W_MD.device)
    launch(
        _sparse_decode,
        (T,),
        values_TK,
        indices_TK,
        W_MD,
        recon_TD,
        D=D,
        DP=W_MD.stride(0),
        K=K,
        ROWS=tiling.rows,
        WIDTH=tiling.columns,
        num_warps=tiling.warps,
    )
    return recon_TD


@triton.jit(do_not_specialize=["T"])
def _decode_loss(
    values,
    indices,
    slots,
    gates,
    W,
    b_pre,
    x,
    scale,
    order,
    grad,
    weights,
    grad_pre,
    grad_gate,
    loss,
    grad_scale,
    T,
    D: tl.constexpr,
    DP: tl.constexpr,
    W_STRIDE: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANE: tl.constexpr,
    WIDE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    if HAS_ORDER:
        t = tl.load(order + t).to(tl.int64)
        if t < 0:
            return
    k = tl.arange(0, ROWS)
    value = tl.load(values + t * K + k, mask=k < K, other=0.0).to(tl.float32)
    row = tl.load(indices + t * K + k, mask=k < K, other=0)
    gate = tl.full((ROWS,), 1.0, tl.float32)
    slot = k // (K // S)
    if HAS_SLOT:
        slot = tl.load(slots + t * K + k, mask=k < K, other=0)
    if HAS_GATE:
        gate = tl.load(gates + t * S + slot, mask=k < K, other=0.0)
    weight = gate * value
    tl.store(weights + t * K + k, weight, mask=k < K)
    live = value > 0.0
    # pairs without a value read the token's first row again: cheaper than masks, which clear every register before its load
    row = tl.where(live, row, tl.load(indices + t * K))
    if WIDE:
        row = row.to(tl.int64)
    rows = W + (row * W_STRIDE)[:, None]
    x += tl.where(t < T, t, t - T) * D
    x_scale = tl.load(scale)
    square = tl.zeros((WIDTH,), tl.float32)
    if grad_pre is not None:
        products = tl.zeros((ROWS, WIDTH // LANE), tl.float32)  # sums over the columns of a lane; over lanes only once, after the loop
    for c0 in range(0, DP, WIDTH):
        c = c0 + tl.arange(0, WIDTH)
        if D % WIDTH == 0:
            w = tl.load(rows + c[None, :]).to(tl.float32)
        else:
            w = tl.load(rows + c[None, :], mask=(c < D)[None, :], other=0.0).to(tl.float32)
        target = tl.load(x + c, mask=c < D, other=0.0).to(tl.float32) * x_scale - tl.load(b_pre + c, mask=c < D, other=0.0)
        error = tl.sum(w * weight[:, None], axis=0) - target
        square += error * error
        g = error * grad_scale
        tl.store(grad + t * DP + c, g.to(grad.dtype.element_ty), mask=c < DP)
        if grad_pre is not None:
            products += tl.sum(tl.reshape(w * g[None, :], (ROWS, WIDTH // LANE, LANE)), axis=2)
    tl.store(loss + t, tl.sum(square, axis=0))
    if grad_pre is not None:
        product = tl.sum(products, axis=1)
        tl.store(grad_pre + t * K + k, tl.where(live, gate * product, 0.0), mask=k < K)
    if HAS_GATE:
        for s in tl.static_range(S):
            tl.store(grad_gate + t * S + s, tl.sum(tl.where(live & (slot == s), value * product, 0.0), axis=0))


def decode_loss(
    values_TK: Tensor,
    indices_TK: Tensor,
    slot_TK: Tensor | None,
    gate_TS: Tensor | None,
    W_dec_MD: Tensor,
    D: int,
    b_pre_D: Tensor,
    x_TD: Tensor,
    scale: Tensor,
    grad_scale: float,
    order_N: Tensor | None = None,
    fixed: bool = False,
) -> TokenLoss:
    """Reconstruction, squared error and all gradients that are local to a token, reading each active decoder row once.

    recon = sum_s gate * value * W_dec[index] + b_pre; err = recon - x * scale; g = grad_scale * err. Of a mean over T tokens of squared errors
    grad_scale is 2 / T. Values are after the ReLU and before the gate; `slot_TK` (int32) says which of S gates each belongs to, and without it
    each slot owns K / S neighbours. Without `gate_TS` gates are 1. With `order_N` (int32 [N], -1: none; one slot) programs run in that order, so
    that tokens of one expert share its rows in L2. Values that are `fixed` get no gradient, and have no gate. Indices must be valid even where the
    value is 0. Values may have more rows than x: those behind are of its first tokens once more.
    """
    T, K = values_TK.shape
    S = gate_TS.shape[1] if gate_TS is not None else 1
    if slot_TK is None and K % S:
        raise ValueError(f"K={K} latents do not divide among S={S} slots: pass slot_TK.")
    if order_N is not None and S != 1:
        raise ValueError(f"order_N numbers tokens: it needs one slot, got S={S}.")
    stride = W_dec_MD.stride(0)
    Dp = cdiv(D, 8) * 8
    tiling = GatherTiling.of(K, Dp)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x_TD.device)

    result = TokenLoss(
        grad_TD=empty(T, Dp, dtype=W_dec_MD.dtype),
        weights_TK=empty(T, K),
        grad_pre_TK=None if fixed else empty(T, K),
        grad_gate_TS=empty(T, S) if gate_TS is not None else None,
        loss_T=empty(T),
    )
    launch(
        _decode_loss,
        (T if order_N is None else order_N.shape[0],),
        values_TK,
        indices_TK,
        slot_TK if slot_TK is not None else indices_TK,
        gate_TS if gate_TS is not None else b_pre_D,
        W_dec_MD,
        b_pre_D,
        x_TD,
        scale,
        order_N if order_N is not None else indices_TK,
        result.grad_TD,
        result.weights_TK,
        result.grad_pre_TK,
        result.grad_gate_TS if result.grad_gate_TS is not None else result.loss_T,
        result.loss_T,
        grad_scale,
        x_TD.shape[0],
        D=D,
        DP=Dp,
        W_STRIDE=stride,
        K=K,
        S=S,
        HAS_ORDER=order_N is not None,
        HAS_SLOT=slot_TK is not None,
        HAS_GATE=gate_TS is not None,
        ROWS=tiling.rows,
        WIDTH=tiling.columns,
        LANE=min(tiling.columns, 16 // W_dec_MD.element_size()),
        WIDE=W_dec_MD.shape[0] * stride >= 2**31,
        num_warps=tiling.warps,
    )
    return result

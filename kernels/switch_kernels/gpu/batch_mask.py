"""Selection under one threshold for a whole batch as masked dense latents, of which a token may have any number, and what their reconstructions cost.

The threshold is the smallest of the `count` largest scores above 0 of all tokens, of all candidates of each. Most of these lie far below it: what
does not is collected first, in any order, then `batch_select.threshold_` looks among that alone. Tokens T and on are the first ones once more, by a
rival expert: they have no part in the batch's threshold or gradient, and take what exceeds a bound of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.batch_select import threshold_
from switch_kernels.gpu.gemm_decode import RowLoss
from switch_kernels.gpu.launch import cdiv, interpreted, launch, next_power_of_2

TILE = 2048
"""Scores that a program of four warps holds in registers, 16 in each lane."""
NEAR: tl.constexpr = tl.constexpr(0.75)
"""Scores from so much of a guess at the threshold on are collected first: of normal ones two to three times as many as are taken."""


def _tile(F: int) -> tuple[int, int]:
    """(rows, columns) of a tile over rows of F columns."""
    columns = min(1024, max(16, next_power_of_2(F)))
    return max(1, TILE // columns), columns


def batch_threshold(pre_NF: Tensor, F: int, order_N: Tensor, gate_T: Tensor | None, tokens: int, count: int, guess: Tensor) -> Tensor:
    """float32 []: the smallest of the `count` largest scores above 0 of tokens 0 to `tokens` - 1, or of all above 0 if fewer are; NaN if none is.

    A score is gate_T[t] (1 without gates) times a pre-activation, one of the first F columns of pre_NF (float32); order_N (int32) is the token of
    each row or -1. At most 2^30 scores. `guess` (float32 []) saves time where it is near, and changes nothing where it is not.
    """
    rows, columns = _tile(F)
    scores_P = torch.empty(tokens * F, dtype=torch.float32, device=pre_NF.device)
    numbers, theta = torch.zeros(2, dtype=torch.int32, device=pre_NF.device), torch.full((), float("nan"), device=pre_NF.device)
    for far in (False, True):
        launch(
            _collect_scores,
            (cdiv(pre_NF.shape[0], rows), cdiv(F, columns)),
            *(pre_NF, order_N, gate_T, guess, scores_P, numbers),
            *(pre_NF.shape[0], F, pre_NF.stride(0), tokens, count),
            FAR=far,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
            num_stages=1,
        )
    threshold_(theta, scores_P, count, numbers)
    return theta


@triton.jit
def _scores(pre_NF, order_N, gate_T, n, c, N, F, FP, T):
    """(pre-activations, scores, pairs): float32 [ROWS, COLUMNS] of rows n and columns c, 0 outside; int32 [ROWS], -1 where there is no token."""
    pair = tl.load(order_N + n, mask=n < N, other=-1)
    inside = (pair >= 0)[:, None] & (c < F)[None, :]
    pre = tl.load(pre_NF + n.to(tl.int64)[:, None] * FP + c[None, :], mask=inside, other=0.0)
    score = pre
    if gate_T is not None:
        score = pre * tl.load(gate_T + pair, mask=(pair >= 0) & (pair < T), other=1.0)[:, None]
    return pre, score, pair


@triton.jit(do_not_specialize=["N", "F", "T", "count"])
def _collect_scores(
    pre_NF, order_N, gate_T, guess, scores, numbers, N, F, FP, T, count, FAR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Appends the near scores of a tile; or, where these are fewer than `count`, the far ones. Their order is that in which programs come."""
    near = tl.load(guess) * NEAR
    near = tl.where(near > 0.0, near, 0.0)  # NaN, too
    begin = 0
    if FAR:
        begin = tl.load(numbers)
        if begin >= count:
            return
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, score_RC, pair = _scores(pre_NF, order_N, gate_T, n, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), N, F, FP, T)
    score = tl.reshape(tl.where((pair < T)[:, None], score_RC, 0.0), (ROWS * COLUMNS,))
    keep = (score > 0.0) & ((score < near) if FAR else (score >= near))
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    number = tl.sum(keep.to(tl.int32), axis=0)
    if number > 0:
        begin += tl.atomic_add(numbers + FAR, number, sem="relaxed")
        tl.store(scores + begin + place, score, mask=keep)


def keep_reaching(
    pre_NF: Tensor, F: int, order_N: Tensor, expert_R: Tensor, gate_T: Tensor | None, theta: Tensor, bound: Tensor, tokens: int, num_latents: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(z_NF [N, Fp] of `dtype`, fired int32 [M + 1]): the pre-activations above 0 whose scores reach `theta`, or of tokens from `tokens` on exceed
    `bound`, 0 elsewhere and in padding; which of the M latents any of the first `tokens` tokens took, above 0, and how many pairs of a token and a
    latent that were.

    As `batch_threshold`; expert_R (int32) is the expert of each token, `bound` a float32 []. A theta that is NaN is reached by nothing.
    """
    rows, columns = _tile(F)
    z_NF = torch.empty(pre_NF.shape, dtype=dtype, device=pre_NF.device)
    fired_M1 = torch.zeros(num_latents + 1, dtype=torch.int32, device=pre_NF.device)
    launch(
        _keep_reaching,
        (cdiv(pre_NF.shape[0], rows), cdiv(z_NF.shape[1], columns)),
        *(pre_NF, order_N, expert_R, gate_T, theta, bound, z_NF, fired_M1),
        *(pre_NF.shape[0], F, pre_NF.stride(0), tokens, num_latents),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        num_stages=1,
    )
    return z_NF, fired_M1


@triton.jit(do_not_specialize=["N", "F", "T", "M"])
def _keep_reaching(
    pre_NF, order_N, expert_R, gate_T, theta, bound, z_NF, fired_M1, N, F, FP, T, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Programs may mark one latent, always with the same 1; their counts are integers, whose sum is the same in any order."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pre, score, pair = _scores(pre_NF, order_N, gate_T, n, c, N, F, FP, T)
    own = (pair < T)[:, None]  # or nobody's, where scores are 0
    keep = (score > 0.0) & ((own & (score >= tl.load(theta))) | (~own & (score > tl.load(bound))))
    tl.store(
        z_NF + n.to(tl.int64)[:, None] * FP + c[None, :],
        tl.where(keep, pre, 0.0).to(z_NF.dtype.element_ty),
        mask=(n < N)[:, None] & (c < FP)[None, :],
    )
    expert = tl.load(expert_R + pair, mask=pair >= 0, other=0)
    taken = keep & own
    ones = tl.full((ROWS, COLUMNS), 1, tl.int32)
    tl.store(fired_M1 + expert[:, None] * F + c[None, :], ones, mask=taken)
    number = tl.sum(tl.sum(taken.to(tl.int32), axis=1), axis=0)
    tl.atomic_add(fired_M1 + M, number, mask=number > 0, sem="relaxed")


def row_losses(
    y_ND: Tensor, order_N: Tensor, pairs: int, gate_T: Tensor | None, x_TD: Tensor, scale: Tensor, b_D: Tensor, grad_scale: float, dtype: torch.dtype
) -> RowLoss:
    """error = gate * y + b - x * scale of every row. Gradients, of `dtype`, and their column sums are those of the first T tokens, and 0 in rows of
    rivals; `square_parts` are the squared errors of all `pairs` tokens, in the order of tokens.

    y_ND is float32 [N, Dp], what `gemm_decode.decode_rows` gave.
    """
    (num_rows, DP), (tokens, D) = y_ND.shape, x_TD.shape
    columns = min(128, max(16, next_power_of_2(D)))
    rows = 8 if interpreted() else 16
    blocks = cdiv(num_rows, rows)
    grad_rows_ND = torch.empty(num_rows, DP, dtype=dtype, device=y_ND.device)
    loss_R = torch.empty(pairs, dtype=torch.float32, device=y_ND.device)
    column_sums = torch.empty(blocks, D, dtype=torch.float32, device=y_ND.device)
    launch(
        _row_losses,
        (blocks,),
        *(y_ND, order_N, gate_T, x_TD, scale, b_D, grad_rows_ND, loss_R, column_sums),
        *(num_rows, tokens, D, DP, grad_scale),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        num_stages=1,
    )
    return RowLoss(grad_rows_ND, loss_R, column_sums)


@triton.jit(do_not_specialize=["N", "T"])
def _row_losses(
    y_ND, order_N, gate_T, x_TD, scale, b_D, grad_rows_ND, loss_R, column_sums, N, T, D, DP, grad_scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.load(order_N + n, mask=n < N, other=-1)
    token = tl.where(pair < T, pair, pair - T)
    own = (pair >= 0) & (pair < T)
    gate = tl.full((ROWS,), 1.0, tl.float32)
    if gate_T is not None:
        gate = tl.load(gate_T + pair, mask=own, other=1.0)
    factor = tl.load(scale)
    square = tl.zeros((ROWS,), tl.float32)
    at = n.to(tl.int64)[:, None] * DP
    for first in range(0, DP, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        real = (pair >= 0)[:, None] & (c < D)[None, :]
        y = tl.load(y_ND + at + c[None, :], mask=real, other=0.0) * gate[:, None]
        x = tl.load(x_TD + token.to(tl.int64)[:, None] * D + c[None, :], mask=real, other=0.0).to(tl.float32) * factor
        error = tl.where(real, y + tl.load(b_D + c, mask=c < D, other=0.0)[None, :] - x, 0.0)
        square += tl.sum(error * error, axis=1)
        g = tl.where(own[:, None], error * grad_scale, 0.0)
        tl.store(column_sums + tl.program_id(0).to(tl.int64) * D + c, tl.sum(g, axis=0), mask=c < D)
        tl.store(grad_rows_ND + at + c[None, :], (g * gate[:, None]).to(grad_rows_ND.dtype.element_ty), mask=(n < N)[:, None] & (c < DP)[None, :])
    tl.store(loss_R + pair, square, mask=pair >= 0)

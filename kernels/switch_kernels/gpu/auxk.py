"""AuxK: what dead latents make of the residual, so that their gradients can revive them (Gao et al., arXiv 2406.04093, A.2)."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.backend import Dot, operand_dtype
from switch_kernels.gpu import gemm, gemm_decode, gemm_weights
from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.finish import sum_range
from switch_kernels.gpu.keep_topk import keep_topk_
from switch_kernels.gpu.launch import cdiv, launch


@dataclass(frozen=True)
class DeadLatents:
    """The latents that AuxK should revive, as tensors of fixed shape: A per expert, padded; latents that all experts share are in each one's list."""

    latent_B: Tensor
    """int64 [E * A] global indices by expert; padding repeats some latent."""
    is_padding_B: Tensor
    """bool [E * A]."""
    slot_M: Tensor
    """int32 [M]: position in latent_B, -1 for latents that live; of shared ones E * A + their place in each list."""
    k: int
    """How many of an expert's dead latents reconstruct one token's residual."""
    coefficient: float
    """auxk * D."""
    has_shared: bool = False
    """Whether any latents are shared, dead or not."""


@dataclass(frozen=True)
class Rows:
    """A batch in expert order, as AuxK reads it."""

    rows_ND: Tensor
    """What codes are computed from, in the operands' dtype; rows of padding are 0."""
    order_N: Tensor
    row_R: Tensor
    """Of the T * S pairs of the tokens that have a residual."""
    start_E1: Tensor
    gate_TS: Tensor | None
    slots: int


@dataclass(frozen=True)
class Auxk:
    term: Tensor
    enc: Extra | None
    """Gradients of the encoder's rows, of codes that have them."""
    dec: Extra
    bias_M: Tensor | None
    """Likewise of the encoder's bias."""


def auxk(rows: Rows, W_in_MD: Tensor, b_in_M: Tensor | None, W_dec_MD: Tensor, dead: DeadLatents, residual_TD: Tensor, scales: Tensor, D_in: int,
         dot: Dot, tied: bool = False) -> Auxk:  # fmt: skip
    """The loss and its gradients: the residual of each token from the dead latents of its own experts.

    coefficient * sum_t ||e_t - e^_t||^2 / sum_t ||e_t - mean(e)||^2 with the residual e, gates and centre held fixed: the dense regime once more,
    over the dead rows alone. `scales` come from `scales_of`. Codes are ReLU(W_in rows + b_in), held fixed where `tied`: their rows are then the
    residual's.
    """
    tokens, D_out = residual_TD.shape
    A = dead.latent_B.shape[0] // (rows.start_E1.shape[0] - 1)
    W_in_BD, W_dec_BD = W_in_MD.index_select(0, dead.latent_B), W_dec_MD.index_select(0, dead.latent_B)
    b_in_M = b_in_M if b_in_M is not None else torch.zeros(W_in_MD.shape[0], device=residual_TD.device)
    b_in_B = b_in_M.index_select(0, dead.latent_B).masked_fill(dead.is_padding_B, float("-inf"))
    shape = (rows.start_E1, A)
    # the number of dead latents changes while a model trains: `any_width`, so that nothing is compiled then
    z_NA, _ = gemm.encode(rows.rows_ND, W_in_BD, b_in_B, *shape, 1, dot, any_width=True)
    keep_topk_(z_NA, A, min(dead.k, A), rows.order_N)
    y_ND = gemm_decode.decode_rows(z_NA, W_dec_BD, *shape, D_out, dot)
    gate_TS = rows.gate_TS if rows.gate_TS is not None else torch.ones(tokens, 1, device=residual_TD.device)
    nowhere_D, unit = torch.zeros(D_out, device=residual_TD.device), torch.ones((), device=residual_TD.device)
    loss = gemm_decode.combine_slots(y_ND, rows.row_R, rows.slots, gate_TS, residual_TD, unit, nowhere_D, 1.0, operand_dtype(dot))
    scaled: Any = {"scale": scales[1], "any_width": True}
    dec_BD = gemm_weights.weight_gradient(z_NA, loss.grad_rows_ND, *shape, D_out, dot, torch.float32, **scaled).grad_MD
    term = scales[0] * loss.square_parts.sum()
    if tied:
        return Auxk(term, None, Extra(dead.slot_M, _with_shared(dec_BD, A, dead)), None)
    dz_NA, _ = gemm.latent_gradients(loss.grad_rows_ND, W_dec_BD, z_NA, *shape, dot, any_width=True)
    enc = gemm_weights.weight_gradient(dz_NA, rows.rows_ND, *shape, D_in, dot, torch.float32, column_sums=True, **scaled)
    assert enc.column_sums_M is not None
    sums_B = _with_shared(enc.column_sums_M, A, dead)
    bias_M = torch.where(dead.slot_M >= 0, sums_B.index_select(0, dead.slot_M.clamp(min=0)), 0.0)
    return Auxk(term, Extra(dead.slot_M, _with_shared(enc.grad_MD, A, dead)), Extra(dead.slot_M, _with_shared(dec_BD, A, dead)), bias_M)


def scales_of(error_parts: Tensor, column_parts: Tensor, tokens: int, grad_scale: float, coefficient: float) -> Tensor:
    """float32 [2]: f and 2 f with f = coefficient / sum_t ||e_t - mean(e)||^2, for T = `tokens` residuals; 0 where that is nothing but rounding.

    It is sum_t ||e_t||^2 - ||sum_t e_t||^2 / T, from what the loss has added up (float32, contiguous): `error_parts` sum to the first term,
    column_parts [P, D] over P to grad_scale * sum_t e_t.
    """
    P, D = column_parts.shape
    width = 64
    parts, scales = error_parts.new_empty(cdiv(D, width)), error_parts.new_empty(2)
    launch(_square_columns, (len(parts),), column_parts, parts, P, D, ROWS=16, WIDTH=width)
    of_mean = 1.0 / (grad_scale * grad_scale * tokens)
    launch(_divide, (1,), error_parts, parts, scales, error_parts.numel(), len(parts), of_mean, coefficient, TILE=1024)
    return scales


@triton.jit(do_not_specialize=["P"])
def _square_columns(column_parts, parts, P, D, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum over WIDTH columns of the square of each one's sum."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, P, ROWS):
        p = first + tl.arange(0, ROWS)
        acc += tl.load(column_parts + p[:, None] * D + c[None, :], mask=(p < P)[:, None] & (c < D)[None, :], other=0.0)
    sums = tl.sum(acc, axis=0)
    tl.store(parts + tl.program_id(0), tl.sum(sums * sums, axis=0))


@triton.jit(do_not_specialize=["n", "Q"])
def _divide(error_parts, parts, scales, n, Q, of_mean, coefficient, TILE: tl.constexpr):
    error = sum_range(error_parts, 0, n, TILE)
    variance = error - of_mean * sum_range(parts, 0, Q, TILE)
    is_real = variance > 1e-5 * error
    factor = tl.where(is_real, coefficient / tl.where(is_real, variance, 1.0), 0.0)
    tl.store(scales, factor)
    tl.store(scales + 1, 2.0 * factor)


def _with_shared(of_lists_B: Tensor, A: int, dead: DeadLatents) -> Tensor:
    """[E * A + A, ...]: with the sums over all lists behind, which are the gradients of shared latents; as it is where there are none."""
    if not dead.has_shared:
        return of_lists_B
    return torch.cat([of_lists_B, of_lists_B.unflatten(0, (-1, A)).sum(dim=0)])

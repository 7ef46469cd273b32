"""AuxK: what dead latents make of the residual, so that their gradients can revive them (Gao et al., arXiv 2406.04093, A.2)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from switch_kernels.backend import Dot, operand_dtype
from switch_kernels.gpu import gemm, gemm_decode, gemm_weights
from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.topk import keep_topk_


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


def auxk(rows: Rows, W_in_MD: Tensor, b_in_M: Tensor | None, W_dec_MD: Tensor, dead: DeadLatents, residual_TD: Tensor, variance: Tensor, D_in: int,
         dot: Dot, tied: bool = False) -> Auxk:  # fmt: skip
    """The loss and its gradients: the residual of each token from the dead latents of its own experts.

    coefficient * sum_t ||e_t - e^_t||^2 / sum_t ||e_t - mean(e)||^2 with the residual e, gates and centre held fixed: the dense regime once more,
    over the dead rows alone. Codes are ReLU(W_in rows + b_in), held fixed where `tied`: their rows are then the residual's.
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
    factor = torch.where(variance > 0, dead.coefficient / variance, 0.0)
    scaled: Any = {"scale": 2 * factor, "any_width": True}
    dec_BD = gemm_weights.weight_gradient(z_NA, loss.grad_rows_ND, *shape, D_out, dot, torch.float32, **scaled).grad_MD
    term = factor * loss.square_parts.sum()
    if tied:
        return Auxk(term, None, Extra(dead.slot_M, _with_shared(dec_BD, A, dead)), None)
    dz_NA, _ = gemm.latent_gradients(loss.grad_rows_ND, W_dec_BD, z_NA, *shape, dot, any_width=True)
    enc = gemm_weights.weight_gradient(dz_NA, rows.rows_ND, *shape, D_in, dot, torch.float32, column_sums=True, **scaled)
    assert enc.column_sums_M is not None
    sums_B = _with_shared(enc.column_sums_M, A, dead)
    bias_M = torch.where(dead.slot_M >= 0, sums_B.index_select(0, dead.slot_M.clamp(min=0)), 0.0)
    return Auxk(term, Extra(dead.slot_M, _with_shared(enc.grad_MD, A, dead)), Extra(dead.slot_M, _with_shared(dec_BD, A, dead)), bias_M)


def _with_shared(of_lists_B: Tensor, A: int, dead: DeadLatents) -> Tensor:
    """[E * A + A, ...]: with the sums over all lists behind, which are the gradients of shared latents; as it is where there are none."""
    if not dead.has_shared:
        return of_lists_B
    return torch.cat([of_lists_B, of_lists_B.unflatten(0, (-1, A)).sum(dim=0)])

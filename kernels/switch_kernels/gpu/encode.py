"""From activations to the selected latents of every (token, slot) pair: dispatch, grouped product, top-k. Training and evaluation share it."""

from dataclasses import dataclass

from torch import Tensor

from switch_kernels.backend import Dot, operand_dtype
from switch_kernels.gpu import gemm
from switch_kernels.gpu.dispatch import Sorted, gather_rows, sort_pairs
from switch_kernels.gpu.topk import select_rows
from switch_kernels.plan import group_of


@dataclass(frozen=True)
class Encoded:
    """A batch in expert order, and what was selected of each pair."""

    in_order: Sorted
    rows_ND: Tensor
    """x * scale - b_pre in the operands' dtype; rows of padding are 0."""
    values_RK: Tensor
    """After ReLU, before the gate, in the operands' dtype."""
    indices_RK: Tensor
    """int32, global."""


def encode_pairs(
    x_TD: Tensor,
    scale: Tensor,
    b_pre_D: Tensor,
    expert_TS: Tensor,
    counts_BE: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor | None,
    num_experts: int,
    k: int,
    dot: Dot,
) -> Encoded:
    """The k largest latents of each pair. expert_TS is int32, counts_BE what `route` or `count_experts` counted, W_enc_MD an operand."""
    in_order = sort_pairs(expert_TS, counts_BE, num_experts)
    rows_ND = gather_rows(x_TD, scale, b_pre_D, in_order.order_N, expert_TS.shape[1], operand_dtype(dot))
    return Encoded(in_order, rows_ND, *select_encoded(rows_ND, in_order, expert_TS, W_enc_MD, b_enc_M, k, dot))


def select_encoded(
    rows_ND: Tensor, in_order: Sorted, expert_TS: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor | None, k: int, dot: Dot
) -> tuple[Tensor, Tensor]:
    """(values_RK, indices_RK) of rows in expert order, as in `Encoded`."""
    F = W_enc_MD.shape[0] // len(in_order.counts_E)
    group = group_of(F, k)
    pre_NF, group_max_NG = gemm.encode(rows_ND, W_enc_MD, b_enc_M, in_order.start_E1, F, group, dot)
    return select_rows(pre_NF, group_max_NG, F, group, expert_TS, in_order.row_R, k)

"""Weight gradients of large experts: each latent gathers the tokens on which it was active, and may be updated in the same program.

The gradient of a row of either matrix is a weighted sum of rows: of the decoder, sum of gate * value times the token's output gradient; of the
encoder, sum of the pre-activation's gradient times the token's centred activation. Sorted by latent, the pairs of a latent are one segment, so
one program owns one row and adds its terms in a fixed order. Bound by the rows gathered from L2: 2*T*K*D bytes a matrix in bfloat16.

A segment is cut at multiples of `CHUNK` pairs: whole chunks inside it are summed by programs of their own before, so that a latent that is
active on every token does not keep one program busy long after all others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.launch import cdiv, launch
from switch_kernels.gpu.segments import gradient_rows, sum_chunks, update_latents
from switch_kernels.gpu.sparse import TokenLoss
from switch_kernels.gpu.update import MatrixState, RowTiling, check_state, state_arguments, state_constants

CHUNK = 128
"""Pairs that one program adds before a latent's segment is split."""
ROW_BYTES = 8
"""Bytes of gathered rows in flight, per column: 4 rows of bfloat16 or 2 of float32, which fit the registers."""


@dataclass(frozen=True)
class LatentPairs:
    """The T*K (token, active latent) pairs in latent order."""

    pair_P: Tensor
    """int32: pair numbers t * K + k, sorted by latent; ties keep token order."""
    latent_P: Tensor
    """The latent of each, ascending; int16 where that holds all latents, else int32."""
    start_M1: Tensor
    """int32 [M + 1]: latent j owns pairs start[j] to start[j + 1] - 1."""


def pairs_by_latent(indices_TK: Tensor, num_latents: int) -> LatentPairs:
    """Sorts the pairs of indices_TK (int32 in [0, num_latents)) by latent. Needs T * K < 2^31."""
    # a radix sort takes half the passes on half the bits
    key_dtype = torch.int16 if num_latents <= 2**15 else torch.int32
    latent_P, pair_P = torch.sort(indices_TK.flatten().to(key_dtype), stable=True)
    start_M1 = torch.empty(num_latents + 1, dtype=torch.int32, device=indices_TK.device)
    start_M1[num_latents:].fill_(indices_TK.numel())
    torch.searchsorted(latent_P, torch.arange(num_latents, dtype=key_dtype, device=indices_TK.device), out_int32=True, out=start_M1[:num_latents])
    return LatentPairs(pair_P.to(torch.int32), latent_P, start_M1)


@dataclass(frozen=True)
class RowSums:
    """What the gradient of one matrix is a sum of: row `j` is the sum over its pairs of weights[pair] * table[row of the pair]."""

    weights_TK: Tensor
    table: Tensor
    """[T or N, Dp]."""
    row_R: Tensor | None
    """Row of the table for each (token, slot); None: the token itself."""
    slot_TK: Tensor | None
    num_slots: int
    extra: Extra | None
    chunk_sums: Tensor
    """float32 [chunks, D]: sums of the chunks that lie inside one latent, the others unwritten."""
    chunk_weights: Tensor
    """float32 [chunks]: sums of their weights."""


@dataclass(frozen=True)
class LatentGradients:
    """Gradients of both matrices, or what `update_from_pairs_` needs to form them again."""

    decoder_MD: Tensor | None
    encoder_MD: Tensor | None
    bias_M: Tensor
    """Gradient of the encoder's bias, float32."""
    square_parts: Tensor
    """float32 [2, M]: squared norms of the gradients' rows, before rounding; they sum to that of both matrices, without the bias."""
    pairs: LatentPairs
    decoder_sums: RowSums
    encoder_sums: RowSums


def latent_gradients(
    pairs: LatentPairs,
    loss: TokenLoss,
    rows_ND: Tensor,
    row_R: Tensor,
    slot_TK: Tensor | None,
    S: int,
    D_in: int,
    D_out: int,
    out: torch.dtype | None,
    extra_dec: Extra | None = None,
    extra_enc: Extra | None = None,
) -> LatentGradients:
    """Gradients of decoder, encoder and encoder bias from the pairs of each latent, in a fixed order; latents without pairs get zeros.

    dW_dec[j] = sum of weights * grad[t]; dW_enc[j] = sum of grad_pre * rows[row_R[t * S + slot]]; db_enc[j] = sum of grad_pre. Without
    `slot_TK` each slot owns K / S neighbours. With `out` None neither matrix gets a gradient in memory: only squared norms and the bias are
    kept, and `update_from_pairs_` gathers again.
    """
    decoder = _row_sums(pairs, loss.weights_TK, loss.grad_TD, None, None, 1, D_out, extra_dec)
    encoder = _row_sums(pairs, loss.grad_pre_TK, rows_ND, row_R, slot_TK if S > 1 else None, S, D_in, extra_enc)
    M = pairs.start_M1.shape[0] - 1
    device = rows_ND.device
    bias_M = torch.empty(M, dtype=torch.float32, device=device)
    square_parts = torch.empty(2, M, dtype=torch.float32, device=device)
    grads: list[Tensor | None] = []
    for sums, squares, D in ((decoder, square_parts[0], D_out), (encoder, square_parts[1], D_in)):
        tiling = RowTiling.of(D)
        grad_MD = torch.empty(M, D, dtype=out, device=device) if out is not None else None
        launch(
            gradient_rows,
            (M,),
            *_sum_arguments(pairs, sums),
            grad_MD if grad_MD is not None else squares,
            squares,
            bias_M,
            **_sum_constants(sums),
            D=D,
            DP=sums.table.stride(0),
            WIDTH=tiling.width,
            CHUNKS=tiling.chunks,
            STORE=grad_MD is not None,
            STORE_TOTAL=sums is encoder,
            num_warps=tiling.warps,
        )
        grads.append(grad_MD)
    return LatentGradients(grads[0], grads[1], bias_M, square_parts, pairs, decoder, encoder)


def update_from_pairs_(
    gradients: LatentGradients, W_dec: MatrixState, W_enc: MatrixState, hyper: Tensor, total_square: Tensor, step_seed: Tensor | None = None
) -> None:
    """The update of `update_rows_` for both matrices, with gradients that are gathered again instead of read."""
    for state, sums in ((W_dec, gradients.decoder_sums), (W_enc, gradients.encoder_sums)):
        check_state(state, step_seed)
        M, D = state.weight_MD.shape
        tiling = RowTiling.of(D)
        launch(
            update_latents,
            (M,),
            *_sum_arguments(gradients.pairs, sums),
            *state_arguments(state, hyper, total_square, step_seed),
            **_sum_constants(sums),
            TABLE_DP=sums.table.stride(0),
            **state_constants(state, tiling),
            num_warps=tiling.warps,
        )


def _row_sums(
    pairs: LatentPairs, weights_TK: Tensor, table: Tensor, row_R: Tensor | None, slot_TK: Tensor | None, num_slots: int, D: int, extra: Extra | None
) -> RowSums:
    """Sums the chunks that lie inside one latent."""
    T, K = weights_TK.shape
    chunks = cdiv(T * K, CHUNK)
    chunk_sums = torch.empty(chunks, D, dtype=torch.float32, device=table.device)
    chunk_weights = torch.empty(chunks, dtype=torch.float32, device=table.device)
    sums = RowSums(weights_TK, table, row_R, slot_TK, num_slots, extra, chunk_sums, chunk_weights)
    tiling = RowTiling.of(D)
    constants = _sum_constants(sums)
    launch(
        sum_chunks,
        (chunks,),
        pairs.pair_P,
        pairs.latent_P,
        *_table_arguments(sums),
        chunk_sums,
        chunk_weights,
        T * K,
        **{name: value for name, value in constants.items() if "EXTRA" not in name},
        D=D,
        DP=table.stride(0),
        WIDTH=tiling.width,
        CHUNKS=tiling.chunks,
        num_warps=tiling.warps,
    )
    return sums


def division(divisor: int) -> tuple[int, int]:
    """(multiplier, shift) with p // divisor == p * multiplier >> shift for 0 <= p < 2^31, in 64 bits.

    Three instructions where a division by a number that the compiler does not know takes twenty, which would be a fifth of all that a pair costs.
    """
    shift = 31 + (divisor - 1).bit_length()
    return cdiv(1 << shift, divisor), shift


def _table_arguments(sums: RowSums) -> tuple[Tensor | int, ...]:
    """Where a tensor is absent another stands in, which the kernel does not touch.

    Pair t * K + k is divided into its token t, or where each slot owns K / S neighbours into its (token, slot) pair t * S + s.
    """
    row_R = sums.row_R if sums.row_R is not None else sums.weights_TK
    K = sums.weights_TK.shape[1]
    divisor = K if sums.slot_TK is not None else K // sums.num_slots
    return sums.weights_TK, sums.table, row_R, sums.slot_TK if sums.slot_TK is not None else row_R, *division(divisor), sums.num_slots


def _sum_arguments(pairs: LatentPairs, sums: RowSums) -> tuple[Tensor | int, ...]:
    extra = sums.extra
    of_extra = (extra.slot_M, extra.rows_AD) if extra is not None else (sums.chunk_weights,) * 2
    return pairs.start_M1, pairs.pair_P, *_table_arguments(sums), sums.chunk_sums, sums.chunk_weights, *of_extra


def _sum_constants(sums: RowSums) -> dict[str, int | bool]:
    return {
        "BY_ROW": sums.row_R is not None,
        "HAS_SLOT": sums.slot_TK is not None,
        "HAS_EXTRA": sums.extra is not None,
        "CHUNK": CHUNK,
        "UNROLL": ROW_BYTES // sums.table.element_size(),
    }

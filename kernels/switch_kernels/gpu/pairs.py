"""Weight gradients of large experts: each latent gathers the tokens on which it was active, and may be updated in the same program.

The gradient of a row of either matrix is a weighted sum of rows: of the decoder, sum of gate * value times the token's output gradient; of the
encoder, sum of the pre-activation's gradient times the token's centred activation. Sorted by latent, the pairs of a latent are one segment, so
one program owns one row and adds its terms in a fixed order. Bound by the rows gathered from L2: 2*T*K*D bytes a matrix in bfloat16.

A segment is cut at multiples of `CHUNK` pairs: whole chunks inside it are summed by programs of their own before, so that a latent that is
active on every token does not keep one program busy long after all others.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.extra import Extra
from switch_kernels.gpu.launch import cdiv, launch
from switch_kernels.gpu.segments import gradient_rows, sum_chunks, update_latents
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
    """The latent of each, ascending: int16, less 2^15, for fewer than 2^16 latents, else int32."""
    start_M1: Tensor
    """int32 [M + 1]: latent j owns pairs start[j] to start[j + 1] - 1."""
    nobody: int
    """What stands in `latent_P` for pairs that belong to no latent."""


def pairs_by_latent(indices_TK: Tensor, num_latents: int, marks_TK: Tensor | None = None) -> LatentPairs:
    """Sorts the pairs of indices_TK (int32 in [0, num_latents)) by latent. Needs T * K < 2^31.

    With `marks_TK` (float32) only pairs whose mark is above 0 belong to a latent: start_M1[M] counts them, and the others come behind.
    """
    # a radix sort takes half the passes on half the bits, which hold 2^16 - 1 latents and nobody
    key_dtype, lowest = (torch.int16, -(2**15)) if num_latents < 2**16 else (torch.int32, 0)
    pairs, device = indices_TK.numel(), indices_TK.device
    keys_P = torch.empty(pairs, dtype=key_dtype, device=device)
    launch(_write_keys, (cdiv(pairs, 1024),), indices_TK, marks_TK, keys_P, pairs, num_latents, lowest, BLOCK=1024)
    latent_P, pair_P = torch.sort(keys_P, stable=True)
    start_M1 = torch.empty(num_latents + 1, dtype=torch.int32, device=device)
    latents_M1 = torch.arange(lowest, lowest + num_latents + 1, dtype=key_dtype, device=device)
    torch.searchsorted(latent_P, latents_M1, out_int32=True, out=start_M1)
    return LatentPairs(pair_P.to(torch.int32), latent_P, start_M1, num_latents + lowest)


@triton.jit(do_not_specialize=["P", "M", "lowest"])
def _write_keys(indices, marks, keys, P, M, lowest, BLOCK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(indices + p, mask=p < P, other=0)
    if marks is not None:
        latent = tl.where(tl.load(marks + p, mask=p < P, other=0.0) > 0.0, latent, M)
    tl.store(keys + p, (latent + lowest).to(keys.dtype.element_ty), mask=p < P)


class Terms(NamedTuple):
    """What the gradient of one matrix adds up: row j is the sum over the pairs of latent j of weights[pair] * table[row of the pair]."""

    weights_TK: Tensor
    """float32."""
    table: Tensor
    """[T or N, Dp]."""
    D: int
    row_R: Tensor | None = None
    """Row of the table for each (token, slot); None: the token itself."""
    slot_TK: Tensor | None = None
    """Without it each slot owns K / S neighbours."""
    num_slots: int = 1
    extra: Extra | None = None


@dataclass(frozen=True)
class RowSums:
    """`Terms`, and sums of those chunks of pairs that lie inside one latent."""

    terms: Terms
    chunk_sums: Tensor
    """float32 [chunks, D]: the others are unwritten."""
    chunk_weights: Tensor
    """float32 [chunks]: sums of their weights."""


@dataclass(frozen=True)
class LatentGradients:
    """Gradients of decoder and encoder, as far as there is one, or what `update_from_pairs_` needs to form them again."""

    decoder_MD: Tensor | None
    encoder_MD: Tensor | None
    bias_M: Tensor | None
    """Gradient of the encoder's bias, float32; None without an encoder."""
    square_parts: Tensor
    """float32 [matrices, M]: squared norms of the gradients' rows, before rounding; they sum to that of the matrices, without the bias."""
    pairs: LatentPairs
    decoder_sums: RowSums
    encoder_sums: RowSums | None


def latent_gradients(pairs: LatentPairs, decoder: Terms, encoder: Terms | None, out: torch.dtype | None) -> LatentGradients:
    """Gradients of decoder, encoder and encoder bias from the pairs of each latent, in a fixed order; latents without pairs get zeros.

    The bias's is the sum of the encoder's weights. With `out` None neither matrix gets a gradient in memory: only squared norms and the bias are
    kept, and `update_from_pairs_` gathers again.
    """
    M, device = pairs.start_M1.shape[0] - 1, decoder.table.device
    matrices = [_row_sums(pairs, terms) for terms in (decoder, encoder) if terms is not None]
    bias_M = None if encoder is None else torch.empty(M, dtype=torch.float32, device=device)
    square_parts = torch.empty(len(matrices), M, dtype=torch.float32, device=device)
    grads: list[Tensor | None] = []
    for sums, squares in zip(matrices, square_parts, strict=True):
        D = sums.terms.D
        tiling = RowTiling.of(D)
        grad_MD = torch.empty(M, D, dtype=out, device=device) if out is not None else None
        store_total = sums.terms is encoder
        launch(
            gradient_rows,
            (M,),
            *_sum_arguments(pairs, sums),
            grad_MD if grad_MD is not None else squares,
            squares,
            bias_M if store_total else squares,
            **_sum_constants(sums),
            D=D,
            DP=sums.terms.table.stride(0),
            WIDTH=tiling.width,
            CHUNKS=tiling.chunks,
            STORE=grad_MD is not None,
            STORE_TOTAL=store_total,
            num_warps=tiling.warps,
        )
        grads.append(grad_MD)
    (decoder_sums, *encoder_sums), (decoder_MD, *encoder_MD) = matrices, grads
    return LatentGradients(
        decoder_MD, encoder_MD[0] if encoder_MD else None, bias_M, square_parts, pairs, decoder_sums, encoder_sums[0] if encoder_sums else None
    )


def update_from_pairs_(
    gradients: LatentGradients, W_dec: MatrixState, W_enc: MatrixState | None, hyper: Tensor, total_square: Tensor, step_seed: Tensor | None = None
) -> None:
    """The update of `update_rows_` for each matrix, with gradients that are gathered again instead of read."""
    for state, sums in ((W_dec, gradients.decoder_sums), (W_enc, gradients.encoder_sums)):
        if state is None or sums is None:
            continue
        check_state(state, step_seed)
        M, D = state.weight_MD.shape
        tiling = RowTiling.of(D)
        launch(
            update_latents,
            (M,),
            *_sum_arguments(gradients.pairs, sums),
            *state_arguments(state, hyper, total_square, step_seed),
            **_sum_constants(sums),
            TABLE_DP=sums.terms.table.stride(0),
            **state_constants(state, tiling),
            num_warps=tiling.warps,
        )


def _row_sums(pairs: LatentPairs, terms: Terms) -> RowSums:
    """Sums the chunks that lie inside one latent."""
    pair_count, D, device = terms.weights_TK.numel(), terms.D, terms.table.device
    chunks = cdiv(pair_count, CHUNK)
    chunk_sums = torch.empty(chunks, D, dtype=torch.float32, device=device)
    chunk_weights = torch.empty(chunks, dtype=torch.float32, device=device)
    sums = RowSums(terms, chunk_sums, chunk_weights)
    tiling = RowTiling.of(D)
    constants = _sum_constants(sums)
    launch(
        sum_chunks,
        (chunks,),
        pairs.pair_P,
        pairs.latent_P,
        *_table_arguments(terms),
        chunk_sums,
        chunk_weights,
        pair_count,
        pairs.nobody,
        **{name: value for name, value in constants.items() if "EXTRA" not in name},
        D=D,
        DP=terms.table.stride(0),
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


def _table_arguments(terms: Terms) -> tuple[Tensor | int, ...]:
    """Where a tensor is absent another stands in, which the kernel does not touch.

    Pair t * K + k is divided into its token t, or where each slot owns K / S neighbours into its (token, slot) pair t * S + s.
    """
    row_R = terms.row_R if terms.row_R is not None else terms.weights_TK
    K = terms.weights_TK.shape[1]
    divisor = K if terms.slot_TK is not None else K // terms.num_slots
    return terms.weights_TK, terms.table, row_R, terms.slot_TK if terms.slot_TK is not None else row_R, *division(divisor), terms.num_slots


def _sum_arguments(pairs: LatentPairs, sums: RowSums) -> tuple[Tensor | int, ...]:
    extra = sums.terms.extra
    of_extra = (extra.slot_M, extra.rows_AD) if extra is not None else (sums.chunk_weights,) * 2
    return pairs.start_M1, pairs.pair_P, *_table_arguments(sums.terms), sums.chunk_sums, sums.chunk_weights, *of_extra


def _sum_constants(sums: RowSums) -> dict[str, int | bool]:
    return {
        "BY_ROW": sums.terms.row_R is not None,
        "HAS_SLOT": sums.terms.slot_TK is not None,
        "HAS_EXTRA": sums.terms.extra is not None,
        "CHUNK": CHUNK,
        "UNROLL": ROW_BYTES // sums.terms.table.element_size(),
    }

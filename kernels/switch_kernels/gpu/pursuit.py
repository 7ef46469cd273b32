"""Matching pursuit with block refits, and non-negative least squares on given supports: one row per program, from Gram matrices.

A row's state stays in registers: its correlations, and the inverse Cholesky factor of its support, which grows by one latent at a time: a latent's row
of R = L^-1 follows from two products with R, so that nothing is solved step by step. Gram matrices stay float32: in bfloat16 the diagonal would be
rounded by more than the ridge, and near duplicates would have no factor. They are not copied to shared memory either: rows come in the order of
experts, so that the Gram matrix of one expert (170 latents: 130 kB) stays in the L1 cache, which on Hopper is the same memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.backend import Dot
from switch_kernels.gpu.gemm import find_rows
from switch_kernels.gpu.launch import cdiv, launch, next_power_of_2

_CHUNK = 4
"""Rows of a Gram matrix that a renewal has in flight."""
_PRECISIONS = {"bf16": "tf32", "tf32": "tf32x3", "ieee": "ieee"}
"""Of float32 operands: plain tf32 would cut their last bits off, and of bfloat16 operands nothing is cut off."""


@triton.jit
def _grow(R_SS, y_S1, chosen_1S, gram_row, index, product, s, ridge, SLOTS: tl.constexpr):
    """R = L^-1 and y = R p after candidate `index` joined in slot s. Slots that are not in use are 0 in both, so whatever is read for them is."""
    row_S1, column_1S = tl.arange(0, SLOTS)[:, None], tl.arange(0, SLOTS)[None, :]
    across_S1 = tl.sum(R_SS * tl.load(gram_row + chosen_1S), axis=1, keep_dims=True)
    own = tl.load(gram_row + index) + ridge
    scale = 1.0 / tl.sqrt(own - tl.sum(across_S1 * across_S1))
    new_1S = tl.where(column_1S == s, scale, -scale * tl.sum(R_SS * across_S1, axis=0, keep_dims=True))
    y = scale * (product - tl.sum(across_S1 * y_S1))
    return tl.where(row_S1 == s, new_1S, R_SS), tl.where(row_S1 == s, y, y_S1)


@triton.jit
def _pursue(
    products,
    gram,
    groups,
    limits,
    threshold,
    values,
    indices,
    C,
    P,
    ridge,
    K: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, WIDTH)
    slot_1S = tl.arange(0, SLOTS)[None, :]
    products += n * C
    values += n * K
    indices += n * K
    gram += tl.load(groups + n).to(tl.int64) * C * P
    theta = tl.load(threshold)
    most = K
    if HAS_LIMIT:
        most = tl.minimum(tl.load(limits + n), K).to(tl.int32)
    c0 = tl.load(products + p, mask=p < C, other=-float("inf"))  # those that joined become -inf, and then stay out of every renewal
    c = c0
    R_SS = tl.zeros((SLOTS, SLOTS), tl.float32)
    y_S1 = tl.zeros((SLOTS, 1), tl.float32)
    chosen_1S = tl.zeros((1, SLOTS), tl.int32)
    count = 0
    # a maximum passes over NaN: a row that holds one takes no latent, as in PyTorch
    more = (tl.sum((c0 != c0).to(tl.int32), axis=0) == 0) & (most > 0)
    while more:
        value, index = tl.max(c, axis=0, return_indices=True)
        joins = value > theta
        if joins:
            row = gram + index.to(tl.int64) * P
            c -= value * tl.load(row + p, mask=p < P, other=0.0)
            c = tl.where(p == index, -float("inf"), c)
            c0 = tl.where(p == index, -float("inf"), c0)
            R_SS, y_S1 = _grow(R_SS, y_S1, chosen_1S, row, index, tl.load(products + index), count, ridge, SLOTS)
            chosen_1S = tl.where(slot_1S == count, index, chosen_1S)
            tl.store(indices + count, index.to(tl.int64))
            count += 1
            if (count % STEP == 0) & (count < most):
                z_1S = tl.maximum(tl.sum(R_SS * y_S1, axis=0, keep_dims=True), 0.0)
                tl.store(values + slot_1S, z_1S, mask=slot_1S < count)
                tl.debug_barrier()  # slots come back to all lanes through memory
                c = c0
                for first in range(0, count, CHUNK):
                    i = first + tl.arange(0, CHUNK)
                    z = tl.load(values + i, mask=i < count, other=0.0)
                    at = tl.load(indices + i, mask=i < count, other=0)
                    rows = tl.load(gram + (at * P)[:, None] + p[None, :], mask=(i < count)[:, None] & (p < P)[None, :], other=0.0)
                    c -= tl.sum(rows * z[:, None], axis=0)
        more = joins & (count < most)
    z_1S = tl.sum(R_SS * y_S1, axis=0, keep_dims=True)
    tl.debug_barrier()
    again = tl.sum((z_1S < 0.0).to(tl.int32)) > 0
    while again:
        active_1S = z_1S > 0.0
        R_SS = tl.zeros((SLOTS, SLOTS), tl.float32)
        y_S1 = tl.zeros((SLOTS, 1), tl.float32)
        for s in range(0, count):
            if tl.sum((active_1S & (slot_1S == s)).to(tl.int32)) > 0:
                index = tl.load(indices + s)
                R_SS, y_S1 = _grow(R_SS, y_S1, chosen_1S, gram + index * P, index, tl.load(products + index), s, ridge, SLOTS)
        z_1S = tl.sum(R_SS * y_S1, axis=0, keep_dims=True)
        again = tl.sum((z_1S < 0.0).to(tl.int32)) > 0
    tl.store(values + slot_1S, z_1S, mask=slot_1S < K)
    tl.store(indices + slot_1S, chosen_1S.to(tl.int64), mask=slot_1S < K)


def matching_pursuit(
    correlations_NC: Tensor, gram_GCP: Tensor, group_N: Tensor, k: int, blocks: int, ridge: float, threshold: Tensor, limit_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(values float32 [N, k], indices int64 [N, k]) of `switch_kernels.pursuit.matching_pursuit`; slots that are not in use hold 0 and candidate 0.

    All floats are float32, `threshold` is a scalar on the device; `switch_kernels.pursuit.why_not_in_kernels` knows the limits.
    """
    rows, candidates = correlations_NC.shape
    slots, width = next_power_of_2(k), next_power_of_2(gram_GCP.shape[2])
    values_NK = correlations_NC.new_empty(rows, k)
    indices_NK = torch.empty(rows, k, dtype=torch.int64, device=correlations_NC.device)
    launch(
        _pursue,
        (rows,),
        correlations_NC.contiguous(),
        gram_GCP,
        group_N,
        group_N if limit_N is None else limit_N,
        threshold,
        values_NK,
        indices_NK,
        candidates,
        gram_GCP.shape[2],
        ridge,
        K=k,
        STEP=k // blocks,
        SLOTS=slots,
        WIDTH=width,
        CHUNK=_CHUNK,
        HAS_LIMIT=limit_N is not None,
        num_warps=_warps(slots, width),
        num_stages=1,
    )
    return values_NK, indices_NK


def _warps(slots: int, width: int) -> int:
    """32 numbers of a lane for the factor, 32 for the correlations."""
    return max(1, slots * slots // 1024, width // 1024)


@triton.jit
def _refit_pairs(
    residuals,
    W_MD,
    latents,
    gram,
    groups,
    starts,
    counts,
    refitted,
    C,
    P,
    F,
    shared,
    ridge,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    start, count = tl.load(starts + n), tl.load(counts + n).to(tl.int32)
    group = tl.load(groups + n)
    latents += start
    gram += group * C * P
    row_S1 = tl.arange(0, SLOTS)[:, None]
    slot_1S = tl.arange(0, SLOTS)[None, :]
    latent_S1 = tl.load(latents + row_S1, mask=row_S1 < count, other=0)
    products = tl.zeros((SLOTS, WIDTH), tl.float32)
    for first in range(0, D, WIDTH):
        d_1W = first + tl.arange(0, WIDTH)[None, :]
        atoms = tl.load(W_MD + latent_S1 * D + d_1W, mask=(row_S1 < count) & (d_1W < D), other=0.0)
        products += atoms * tl.load(residuals + n * D + d_1W, mask=d_1W < D, other=0.0)
    product_S1 = tl.sum(products, axis=1, keep_dims=True)
    latent_1S = tl.load(latents + slot_1S, mask=slot_1S < count, other=0)
    local_1S = tl.where(latent_1S < shared, latent_1S, latent_1S - group * F)
    active_1S = slot_1S < count
    local_1S = tl.where(active_1S, local_1S, 0)
    z_1S = tl.zeros((1, SLOTS), tl.float32)
    again = count > 0
    while again:
        R_SS = tl.zeros((SLOTS, SLOTS), tl.float32)
        y_S1 = tl.zeros((SLOTS, 1), tl.float32)
        for s in range(0, count):
            if tl.sum((active_1S & (slot_1S == s)).to(tl.int32)) > 0:
                index = tl.sum(tl.where(slot_1S == s, local_1S, 0))
                product = tl.sum(tl.where(row_S1 == s, product_S1, 0.0))
                R_SS, y_S1 = _grow(R_SS, y_S1, local_1S, gram + index * P, index, product, s, ridge, SLOTS)
        z_1S = tl.sum(R_SS * y_S1, axis=0, keep_dims=True)
        again = tl.sum((active_1S & (z_1S <= 0.0)).to(tl.int32)) > 0  # NaN stays, and ends it
        active_1S = active_1S & (z_1S > 0.0)
    tl.store(refitted + start + slot_1S, z_1S, mask=slot_1S < count)


def refit_pairs(
    residual_ND: Tensor, W_MD: Tensor, latent_P: Tensor, start_N: Tensor, count_N: Tensor, group_N: Tensor, gram_GCP: Tensor, shared: int,
    ridge: float, most: int,
) -> Tensor:  # fmt: skip
    """[P] float32: values of `switch_kernels.pursuit.least_squares` of each row's `count_N` latents, from `start_N` on in `latent_P`.

    Latents are numbered over all G dictionaries: `shared` ones first, then those of each. No row may have more than `most`.
    """
    latents = (len(W_MD) - shared) // len(gram_GCP)
    slots, D = next_power_of_2(most), residual_ND.shape[1]
    refitted_P = residual_ND.new_empty(len(latent_P))
    warps = _warps(slots, 0)
    launch(
        _refit_pairs,
        (len(residual_ND),),
        residual_ND.contiguous(),
        W_MD.contiguous(),
        latent_P,
        gram_GCP,
        group_N,
        start_N,
        count_N,
        refitted_P,
        *gram_GCP.shape[1:],
        latents,
        shared,
        ridge,
        D=D,
        SLOTS=slots,
        WIDTH=min(next_power_of_2(D), 128, max(16, 1024 * warps // slots)),
        num_warps=warps,
        num_stages=1,
    )
    return refitted_P


@triton.jit
def _local_products(
    x_ND,
    W_MD,
    bias_M,
    start_E1,
    out_NC,
    N,
    C,
    F,
    shared,
    D: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOW: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    expert, row, stop = find_rows(tl.program_id(0), start_E1, N, E, EP, ROWS, 1)
    if row < stop:
        n_R1 = row + tl.arange(0, ROWS)[:, None].to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        latent = tl.where(column < shared, column, column + expert * F).to(tl.int64)
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, D, DEPTH):
            d_1D = first + tl.arange(0, DEPTH)[None, :]
            x = tl.load(x_ND + n_R1 * D + d_1D, mask=(n_R1 < stop) & (d_1D < D), other=0.0)
            w = tl.load(W_MD + latent[:, None] * D + d_1D, mask=(column < C)[:, None] & (d_1D < D), other=0.0)
            if LOW:
                x, w = x.to(tl.bfloat16), w.to(tl.bfloat16)
            products = tl.dot(x, tl.trans(w), products, input_precision=PRECISION)
        if HAS_BIAS:
            products += tl.load(bias_M + latent, mask=column < C, other=0.0)[None, :]
        tl.store(out_NC + n_R1 * C + column[None, :], products, mask=(n_R1 < stop) & (column < C)[None, :])


def local_products(x_ND: Tensor, W_MD: Tensor, start_E1: Tensor, shared: int, bias_M: Tensor | None, dot: Dot) -> Tensor:
    """float32 [N, C]: the products of rows in the order of experts with the rows of W that each may use: `shared` first ones, then its expert's."""
    experts = len(start_E1) - 1
    rows, columns, depth = 64, 64, 32
    latents = (len(W_MD) - shared) // experts
    out_NC = x_ND.new_empty(len(x_ND), shared + latents)
    if not out_NC.numel():
        return out_NC
    launch(
        _local_products,
        (cdiv(len(x_ND) + experts * (rows - 1), rows), cdiv(shared + latents, columns)),
        x_ND.contiguous(),
        W_MD.contiguous(),
        W_MD if bias_M is None else bias_M,
        start_E1,
        out_NC,
        len(x_ND),
        shared + latents,
        latents,
        shared,
        D=x_ND.shape[1],
        E=experts,
        EP=next_power_of_2(experts + 1),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        LOW=dot == "bf16",
        PRECISION=_PRECISIONS[dot],
        HAS_BIAS=bias_M is not None,
    )
    return out_NC

"""Matching pursuit with block refits, and non-negative least squares on given supports: one row per program, from Gram matrices.

A row's state stays in registers. In pursuit: its correlations, and the inverse Cholesky factor R = L^-1 of its support, which grows by one latent at
a time: the new row of R follows from two products with R, so that nothing is solved step by step. In a refit, whose support is known: its system,
which is swept. Gram matrices stay float32: in bfloat16 their diagonal would be rounded by more than the ridge, and near duplicates would have no
factor. They are not copied to shared memory either: rows come in the order of experts, so that the Gram matrix of one expert (170 latents: 130 kB)
stays in the L1 cache, which on Hopper is the same memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switch_kernels.gpu.launch import launch, next_power_of_2


@triton.jit
def _grow(R_SS, RT_SS, y_S, chosen_S, gram_row, index, product, s, ridge, SLOTS: tl.constexpr):
    """R = L^-1, its transpose and y = R p after candidate `index` joined in slot s. Slots that are not in use are 0 in all, so whatever is read for
    them counts for nothing.

    R is held twice because sums over rows stay within a lane, and sums over columns would take five shuffles for each row.
    """
    slot = tl.arange(0, SLOTS)
    across_S = tl.sum(RT_SS * tl.load(gram_row + chosen_S)[:, None], axis=0)
    own = tl.load(gram_row + index) + ridge
    scale = 1.0 / tl.sqrt(own - tl.sum(across_S * across_S, axis=0))
    y = scale * (product - tl.sum(across_S * y_S, axis=0))
    new_S = tl.where(slot == s, scale, -scale * tl.sum(R_SS * across_S[:, None], axis=0))
    R_SS = tl.where((slot == s)[:, None], new_S[None, :], R_SS)
    RT_SS = tl.where((slot == s)[None, :], new_S[:, None], RT_SS)
    return R_SS, RT_SS, tl.where(slot == s, y, y_S)


@triton.jit
def _solution(R_SS, y_S):
    """[SLOTS]: R^T y."""
    return tl.sum(R_SS * y_S[:, None], axis=0)


@triton.jit(do_not_specialize=["stride", "shared", "F"])
def _pursue(
    products,
    gram,
    groups,
    limits,
    threshold,
    order,
    values,
    indices,
    C,
    P,
    stride,
    shared,
    F,
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
    slot = tl.arange(0, SLOTS)
    products += n * stride
    if order is not None:
        n = tl.load(order + n).to(tl.int64)
        if n < 0:
            return
    values += n * K
    indices += n * K
    group = tl.load(groups + n).to(tl.int64)
    gram += group * C * P
    theta = tl.load(threshold)
    most = K
    if HAS_LIMIT:
        most = tl.minimum(tl.load(limits + n), K).to(tl.int32)
    c0 = tl.load(products + p, mask=p < C, other=-float("inf"))  # those that joined become -inf, and then stay out of every renewal
    c = c0
    R_SS = tl.zeros((SLOTS, SLOTS), tl.float32)
    RT_SS = R_SS
    y_S = tl.zeros((SLOTS,), tl.float32)
    chosen_S = tl.zeros((SLOTS,), tl.int32)
    count = 0
    # a maximum passes over NaN: a row that holds one takes no latent, as in PyTorch
    more = (tl.sum((c0 != c0).to(tl.int32), axis=0) == 0) & (most > 0)
    while more:
        # not the maximum with its index, on which lanes disagree beside a NaN: all must leave the loop together
        value = tl.max(c, axis=0)
        index = tl.min(tl.where(c == value, p, WIDTH), axis=0)
        joins = value > theta
        if joins:
            row = gram + index.to(tl.int64) * P
            c -= value * tl.load(row + p, mask=p < P, other=0.0)
            c = tl.where(p == index, -float("inf"), c)
            c0 = tl.where(p == index, -float("inf"), c0)
            R_SS, RT_SS, y_S = _grow(R_SS, RT_SS, y_S, chosen_S, row, index, tl.load(products + index), count, ridge, SLOTS)
            chosen_S = tl.where(slot == count, index, chosen_S)
            tl.store(indices + count, index.to(indices.dtype.element_ty))
            count += 1
            if (count % STEP == 0) & (count < most):
                z_S = tl.maximum(_solution(R_SS, y_S), 0.0)
                tl.store(values + slot, z_S, mask=slot < count)
                tl.debug_barrier()  # slots come back to all lanes through memory
                c = c0
                for first in range(0, count, CHUNK):
                    i = first + tl.arange(0, CHUNK)
                    z = tl.load(values + i, mask=i < count, other=0.0)
                    at = tl.load(indices + i, mask=i < count, other=0)
                    rows = tl.load(gram + (at * P)[:, None] + p[None, :], mask=(i < count)[:, None] & (p < P)[None, :], other=0.0)
                    c -= tl.sum(rows * z[:, None], axis=0)
        more = joins & (count < most)
    z_S = _solution(R_SS, y_S)
    tl.debug_barrier()
    again = tl.sum((z_S < 0.0).to(tl.int32), axis=0) > 0
    while again:
        active_S = z_S > 0.0
        R_SS = tl.zeros((SLOTS, SLOTS), tl.float32)
        RT_SS = R_SS
        y_S = tl.zeros((SLOTS,), tl.float32)
        for s in range(0, count):
            if tl.sum((active_S & (slot == s)).to(tl.int32), axis=0) > 0:
                index = tl.load(indices + s)
                R_SS, RT_SS, y_S = _grow(R_SS, RT_SS, y_S, chosen_S, gram + index * P, index, tl.load(products + index), s, ridge, SLOTS)
        z_S = _solution(R_SS, y_S)
        again = tl.sum((z_S < 0.0).to(tl.int32), axis=0) > 0
    if order is not None:
        chosen_S = tl.where((slot >= count) | (chosen_S < shared), chosen_S, chosen_S + group.to(tl.int32) * F)
        tl.debug_barrier()  # all lanes have read the candidates' numbers that the latents' now replace
    tl.store(values + slot, z_S, mask=slot < K)
    tl.store(indices + slot, chosen_S.to(indices.dtype.element_ty), mask=slot < K)


def matching_pursuit(
    correlations_NC: Tensor, gram_GCP: Tensor, group_N: Tensor, k: int, blocks: int, ridge: float, threshold: Tensor, limit_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(values float32 [N, k], indices int64 [N, k]) of `switch_kernels.pursuit.matching_pursuit`; slots that are not in use hold 0 and candidate 0.

    All floats are float32, `threshold` is a scalar on the device; `switch_kernels.pursuit.why_not_in_kernels` knows the limits.
    """
    values_NK = correlations_NC.new_empty(len(correlations_NC), k)
    indices_NK = torch.empty(values_NK.shape, dtype=torch.int64, device=correlations_NC.device)
    _search(correlations_NC.contiguous(), gram_GCP.contiguous(), group_N.contiguous(), limit_N, threshold, None, values_NK, indices_NK, blocks, ridge)
    return values_NK, indices_NK


def pursue_tokens(
    products_NC: Tensor, gram_ECP: Tensor, expert_T: Tensor, order_N: Tensor, k: int, blocks: int, ridge: float, threshold: Tensor, shared: int
) -> tuple[Tensor, Tensor]:
    """(values float32 [T, k], latents int32 [T, k]) of `matching_pursuit`, in the order of tokens, latents by their numbers in the whole SAE.

    Rows of products_NC (float32, its row stride free) are in the order of experts, order_N (int32) the token of each or -1, expert_T (int32) the
    expert of each token. Slots that are not in use hold 0 and latent 0.
    """
    values_TK = torch.empty(len(expert_T), k, dtype=torch.float32, device=products_NC.device)
    indices_TK = torch.empty(values_TK.shape, dtype=torch.int32, device=products_NC.device)
    _search(products_NC, gram_ECP, expert_T, None, threshold, order_N, values_TK, indices_TK, blocks, ridge, shared)
    return values_TK, indices_TK


def _search(
    products_NC: Tensor, gram_GCP: Tensor, group: Tensor, limit_N: Tensor | None, threshold: Tensor, order_N: Tensor | None, values: Tensor,
    indices: Tensor, blocks: int, ridge: float, shared: int = 0,
) -> None:  # fmt: skip
    candidates, columns = gram_GCP.shape[1:]
    k = values.shape[1]
    slots, width = next_power_of_2(k), next_power_of_2(columns)
    warps = _warps(slots, width)
    launch(
        _pursue,
        (len(products_NC),),
        products_NC,
        gram_GCP,
        group,
        group if limit_N is None else limit_N.contiguous(),
        threshold,
        order_N,
        values,
        indices,
        candidates,
        columns,
        products_NC.stride(0),
        shared,
        candidates - shared,
        ridge,
        K=k,
        STEP=k // blocks,
        SLOTS=slots,
        WIDTH=width,
        CHUNK=max(1, min(4, 1024 * warps // width)),
        HAS_LIMIT=limit_N is not None,
        num_warps=warps,
        num_stages=1,
    )


def _warps(slots: int, width: int) -> int:
    """At most 32 numbers of a lane for each of R, its transpose, the correlations, their start, and rows of a Gram matrix in flight."""
    return max(1, slots * slots // 1024, width // 1024)


@triton.jit
def _sweep(A_SS, z_S, s, SLOTS: tl.constexpr):
    """The symmetric A and the right side z of A x = z after pivot s of a Gauss-Jordan elimination; z is x after all pivots.

    Row s is column s, before and after, so that one sum over rows and one update of rank 1 do all: with d - 1 in the pivot's place that update
    divides the pivot's row, its column and z_s by d, too. What it leaves on the diagonal of earlier pivots is not read again. On supports of trained
    SAEs it is as exact as a Cholesky factor (experiments/LOG.md), and half the work of one that grows.
    """
    slot = tl.arange(0, SLOTS)
    row_S = tl.sum(tl.where((slot == s)[:, None], A_SS, 0.0), axis=0)
    pivot = tl.sum(tl.where(slot == s, row_S, 0.0), axis=0)
    row_S = tl.where(slot == s, pivot - 1.0, row_S)
    scaled_S = row_S / pivot
    z_S -= scaled_S * tl.sum(tl.where(slot == s, z_S, 0.0), axis=0)
    return A_SS - scaled_S[:, None] * row_S[None, :], z_S


@triton.jit(do_not_specialize=["stride", "most", "few"])
def _refit_pairs(
    residuals,
    W_MD,
    latents,
    gram,
    groups,
    starts,
    counts,
    order,
    refitted,
    C,
    P,
    F,
    stride,
    most,
    few,
    shared,
    ridge,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    residuals += n * stride
    if order is not None:
        n = tl.load(order + n).to(tl.int64)
        if n < 0:
            return
        start = n * most
    else:
        start = tl.load(starts + n)
    count = tl.load(counts + n).to(tl.int32)
    if (count <= few) | (count > SLOTS):
        return
    group = tl.load(groups + n).to(tl.int64)
    latents += start
    gram += group * C * P
    slot = tl.arange(0, SLOTS)
    latent_S = tl.load(latents + slot, mask=slot < count, other=0).to(tl.int64)
    products = tl.zeros((SLOTS, WIDTH), tl.float32)
    for first in tl.range(0, D, WIDTH, loop_unroll_factor=4):
        d_1W = first + tl.arange(0, WIDTH)[None, :]
        atoms = tl.load(W_MD + (latent_S * D)[:, None] + d_1W, mask=(slot < count)[:, None] & (d_1W < D), other=0.0)
        products += atoms * tl.load(residuals + d_1W, mask=d_1W < D, other=0.0)
    product_S = tl.sum(products, axis=1)
    active_S = slot < count
    local_S = tl.where(active_S & (latent_S >= shared), latent_S - group * F, latent_S).to(tl.int32)
    z_S = tl.zeros((SLOTS,), tl.float32)
    again = count > 0
    while again:
        A_SS = tl.zeros((SLOTS, SLOTS), tl.float32)
        for s in range(0, count):  # row by row: all addresses at once would not fit the registers beside it
            at = tl.sum(tl.where(slot == s, local_S, 0), axis=0)
            row_S = tl.load(gram + at * P + local_S, mask=active_S, other=0.0) + tl.where(slot == s, ridge, 0.0)
            A_SS = tl.where((slot == s)[:, None], row_S[None, :], A_SS)
        z_S = tl.where(active_S, product_S, 0.0)
        for s in range(0, count):
            if tl.sum((active_S & (slot == s)).to(tl.int32), axis=0) > 0:
                A_SS, z_S = _sweep(A_SS, z_S, s, SLOTS)
        wrong_S = active_S & (z_S <= 0.0)  # NaN stays, and ends it
        again = tl.sum(wrong_S.to(tl.int32), axis=0) > 0
        active_S = active_S & (wrong_S == 0)
    z_S = tl.where(active_S, z_S, 0.0)
    tl.store(refitted + start + slot, z_S, mask=slot < count)


def refit_pairs(
    residual_ND: Tensor, W_MD: Tensor, latent_P: Tensor, start_N: Tensor, count_N: Tensor, group_N: Tensor, gram_GCP: Tensor, shared: int,
    ridge: float, most: int,
) -> Tensor:  # fmt: skip
    """[P] float32: values of `switch_kernels.pursuit.least_squares` of each row's `count_N` latents, from `start_N` on in `latent_P`.

    Latents are numbered over all G dictionaries: `shared` ones first, then those of each. No row may have more than `most`.
    """
    refitted_P = residual_ND.new_empty(len(latent_P))
    _refit(residual_ND.contiguous(), W_MD, latent_P, gram_GCP, group_N.contiguous(), start_N, count_N, None, refitted_P, shared, ridge, most)
    return refitted_P


def refit_tokens(
    residual_ND: Tensor,
    W_MD: Tensor,
    latent_TL: Tensor,
    count_T: Tensor,
    expert_T: Tensor,
    order_N: Tensor,
    gram_ECP: Tensor,
    shared: int,
    ridge: float,
) -> Tensor:
    """[T, L] float32: `refit_pairs` of each token's first `count_T` latents (int32), 0 behind them.

    Rows of residual_ND (float32, its row stride free) are in the order of experts, order_N (int32) the token of each or -1.
    """
    refitted_TL = torch.zeros(latent_TL.shape, dtype=torch.float32, device=residual_ND.device)
    _refit(residual_ND, W_MD, latent_TL, gram_ECP, expert_T, None, count_T, order_N, refitted_TL, shared, ridge, latent_TL.shape[1])
    return refitted_TL


def _refit(
    residual_ND: Tensor, W_MD: Tensor, latents: Tensor, gram_GCP: Tensor, group: Tensor, starts: Tensor | None, counts: Tensor,
    order_N: Tensor | None, refitted: Tensor, shared: int, ridge: float, most: int,
) -> None:  # fmt: skip
    """In two launches: rows of at most half as many latents take a quarter of the registers, and of the time."""
    full, W_MD, gram_GCP = next_power_of_2(most), W_MD.contiguous(), gram_GCP.contiguous()
    for slots in (full // 2, full) if full >= 32 else (full,):
        warps = _warps(slots, 0)
        launch(
            _refit_pairs,
            (len(residual_ND),),
            residual_ND,
            W_MD,
            latents,
            gram_GCP,
            group,
            starts,
            counts,
            order_N,
            refitted,
            *gram_GCP.shape[1:],
            (len(W_MD) - shared) // len(gram_GCP),
            residual_ND.stride(0),
            most,
            slots // 2 if 32 <= slots == full else 0,
            shared,
            ridge,
            D=W_MD.shape[1],
            SLOTS=slots,
            WIDTH=16,  # wider tiles give a row a layout in which a sweep takes more instructions, twice as many with one warp
            num_warps=warps,
            num_stages=1,
        )

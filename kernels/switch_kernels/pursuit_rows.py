"""`switch_kernels.pursuit.matching_pursuit` on a CPU, row by row, compiled by numba (`pip install 'switch_sae[fast]'`).

One row's correlations and factor stay in a core's caches; PyTorch passes over those of all rows for every latent that joins. Every row is computed by
itself and in one order: the same bits on any number of threads. Loops are written so that LLVM makes vector instructions of them without reordering
sums; that is what `_largest` and the fours of `_add` are about.

Shapes as in `switch_kernels.pursuit`, for one row, which has m latents so far.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from switch_kernels.pursuit import padded_columns
from switch_kernels.threads import even_parts, over_parts

_ROWS = 256
"""That a thread takes at a time: rows differ in how many latents they need."""
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})  # products may be fused with sums, and nothing else


@_compiled
def _largest(bits_P):
    """The first column of the largest number, from the bits of floats as integers: there, unlike among floats, a maximum is one vector instruction.
    Right where the largest is above 0.
    """
    best, none = bits_P[0], np.int32(len(bits_P))
    for p in range(len(bits_P)):
        best = max(best, bits_P[p])
    first = none
    for p in range(none):
        here = np.int32(p) if bits_P[p] == best else none
        first = here if here < first else first
    return first


@_compiled
def _add(out, length, factors, rows, at, count):
    """out[:length] += sum_q factors[q] rows[at[q], :length] over q < count, four rows at a time: `out` is read and written once for them."""
    q = 0
    while q + 4 <= count:
        f0, f1, f2, f3 = factors[q], factors[q + 1], factors[q + 2], factors[q + 3]
        row0, row1, row2, row3 = rows[at[q]], rows[at[q + 1]], rows[at[q + 2]], rows[at[q + 3]]
        for p in range(length):
            out[p] = out[p] + f0 * row0[p] + f1 * row1[p] + f2 * row2[p] + f3 * row3[p]
        q += 4
    while q < count:
        f0, row0 = factors[q], rows[at[q]]
        for p in range(length):
            out[p] += f0 * row0[p]
        q += 1


@_compiled
def _grow(c0_P, gram_RP, row_K, index_K, m, ridge, R_KK, RT_KK, z_K, across_K, slot_K):
    """One row more of R = L^-1, for L L^T = A + ridge I on index_K[: m + 1], of its transpose, and z = R^T R c0 on them. Row row_K[m] of `gram_RP`
    is the new latent's of the Gram matrix.

    With a = R g for the products g of the new latent with the others and s = 1 / sqrt(own - a^T a), the new row is [-s a^T R, s]. R holds 0 above its
    diagonal, and always has.
    """
    zero, one = c0_P.dtype.type(0), c0_P.dtype.type(1)
    gram_P, new_K = gram_RP[row_K[m]], R_KK[m]
    for q in range(m):
        new_K[q] = gram_P[index_K[q]]
        across_K[q] = zero
    _add(across_K, m, new_K, RT_KK, slot_K, m)
    left = gram_P[index_K[m]] + ridge
    for q in range(m):
        left -= across_K[q] * across_K[q]
    scale = one / np.sqrt(left)
    for q in range(m):
        across_K[q] *= -scale
        new_K[q] = zero
    _add(new_K, m, across_K, R_KK, slot_K, m)
    new_K[m] = scale
    y, z_K[m] = zero, zero
    for q in range(m + 1):
        RT_KK[q, m] = new_K[q]
        y += new_K[q] * c0_P[index_K[q]]
    for q in range(m + 1):
        z_K[q] += y * new_K[q]


@_compiled
def _pursue(c0_NC, gram_GCP, group_N, candidate_NC, limit_N, step, ridge, threshold, c_P, bits_P, values_NK, indices_NK):
    """Fills `values_NK`, `indices_NK`. `bits_P` is the memory of `c_P` as integers. With lists, of latents that joined the rows of the Gram matrix
    are gathered once, each into its slot: `row_K` says where a latent's row is.
    """
    k, columns, listed = values_NK.shape[1], len(c_P), candidate_NC.shape[1] > 0
    zero, dtype = c0_NC.dtype.type(0), c0_NC.dtype
    listed_KP, row_K = np.zeros((k if listed else 0, columns), dtype), np.zeros(k, np.int64)
    c0_P = np.full(columns, -np.inf, dtype)
    R_KK, RT_KK = np.zeros((k, k), dtype), np.zeros((k, k), dtype)
    z_K, work_K, slot_K, index_K = np.zeros(k, dtype), np.zeros(k, dtype), np.arange(k), np.zeros(k, np.int64)
    for n in range(len(c0_NC)):
        gram_CP, has_nan = gram_GCP[group_N[n]], False
        gram_RP = listed_KP if listed else gram_CP
        for p in range(c0_NC.shape[1]):
            c0_P[p] = c0_NC[n, p]
            has_nan |= c0_NC[n, p] != c0_NC[n, p]
        for p in range(columns):
            c_P[p] = c0_P[p]
        m, most, goes_on = 0, min(k, limit_N[n]), not has_nan  # as in PyTorch, where the maximum is NaN and exceeds nothing
        while goes_on and m < most:
            before = m
            while m < min(before + step, most):
                j = _largest(bits_P)
                if not c_P[j] > threshold:
                    break
                index_K[m], row_K[m], value = j, j, c_P[j]
                if listed:
                    row_K[m], latent_P = m, gram_CP[candidate_NC[n, j]]
                    for p in range(candidate_NC.shape[1]):
                        listed_KP[m, p] = latent_P[candidate_NC[n, p]]
                gram_P = gram_RP[row_K[m]]
                m += 1
                if m < before + step:
                    for p in range(columns):
                        c_P[p] -= value * gram_P[p]
                c_P[j] = -np.inf
            for slot in range(before, m):
                _grow(c0_P, gram_RP, row_K, index_K, slot, ridge, R_KK, RT_KK, z_K, work_K, slot_K)
            goes_on = m == before + step
            if goes_on and m < most:
                for p in range(columns):
                    c_P[p] = c0_P[p]
                for q in range(m):
                    work_K[q] = -max(z_K[q], zero)
                _add(c_P, columns, work_K, gram_RP, row_K, m)
                for q in range(m):
                    c_P[index_K[q]] = -np.inf
        joined, wrong = m, False
        for q in range(joined):
            indices_NK[n, q] = index_K[q]
            wrong |= z_K[q] < zero
        while wrong:  # `least_squares`: those above 0 again, until all are
            left = 0
            for q in range(m):
                if z_K[q] > zero:
                    index_K[left], row_K[left] = index_K[q], row_K[q]
                    left += 1
            m, wrong = left, False
            for slot in range(m):
                _grow(c0_P, gram_RP, row_K, index_K, slot, ridge, R_KK, RT_KK, z_K, work_K, slot_K)
            for q in range(m):
                wrong |= not z_K[q] > zero
        left = 0
        for q in range(joined):  # a latent that was dropped keeps its slot, at 0
            if left < m and indices_NK[n, q] == index_K[left]:
                values_NK[n, q] = z_K[left]
                left += 1


def matching_pursuit(
    c0_NC: Tensor,
    gram_GCP: Tensor,
    group_N: Tensor,
    k: int,
    blocks: int,
    ridge: float,
    threshold: float,
    limit_N: Tensor | None,
    candidate_NC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(values [N, k], indices int64 [N, k]) of `switch_kernels.pursuit.matching_pursuit`; slots that are not in use hold 0 and candidate 0.

    With `candidate_NC`, lists of latents of each row's dictionary, of `matching_pursuit_in_lists`; indices are places in the lists.
    Of equal correlations the first candidate joins (in PyTorch the first in the first column of 32). For tensors that `why_not_in_rows` has nothing
    against, and thresholds of at least 0.
    """
    rows, device = len(c0_NC), c0_NC.device
    values_NK, indices_NK = c0_NC.new_zeros(rows, k), torch.zeros(rows, k, dtype=torch.int64)
    limit_N = torch.full((rows,), k) if limit_N is None else limit_N.long()
    columns = gram_GCP.shape[2] if candidate_NC is None else padded_columns(candidate_NC.shape[1])
    candidate_NC = torch.zeros(rows, 0, dtype=torch.int64) if candidate_NC is None else candidate_NC.long()
    given = [tensor.detach().contiguous().numpy() for tensor in (c0_NC, gram_GCP, group_N.long(), candidate_NC, limit_N)]
    c0, gram, group, candidates, limit = given
    ridge_, threshold_ = c0.dtype.type(ridge), c0.dtype.type(threshold)
    values, indices = values_NK.numpy(), indices_NK.numpy()

    def pursue(part: slice) -> None:
        c_P = np.empty(columns, c0.dtype)
        bits_P = c_P.view(f"i{c_P.itemsize}")
        own = c0[part], gram, group[part], candidates[part], limit[part]
        _pursue(*own, k // blocks, ridge_, threshold_, c_P, bits_P, values[part], indices[part])

    over_parts(pursue, even_parts(rows, _ROWS, device), device)
    return values_NK, indices_NK

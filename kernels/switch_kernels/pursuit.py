"""Inference in the Gram domain: non-negative least squares on a given support, and matching pursuit in blocks with such refits.

Shapes: N rows (T tokens in any order), D activation size, K slots, C candidate latents of a row's dictionary, P >= C columns that they are padded to,
G dictionaries. `active` slots take part; the others name some latent and hold 0. Nothing here has gradients.
"""

import os
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_kernels.backend import PYTORCH, Execution
from switch_kernels.gram_rows import GramRows, ListedGrams, OwnGrams, gram_at
from switch_kernels.threads import even_parts, over_parts

COLUMNS = 32
"""Candidates are padded to a multiple of it: a maximum over whole vectors, then over what it leaves, takes half of the time of `max`."""
GRAM_SHARE = 5 / 8
"""Of C^2 products that `gram_matrices` computes."""
_CHUNK_ELEMENTS = 2**21
"""Of the largest intermediate tensor: what fits into a CPU's caches."""
MOST_LATENTS = 64
"""Of a row in a kernel: its inverse factor, 64 x 64, takes a quarter of the registers that four warps may have."""
MOST_COLUMNS = 8192
"""Of a Gram matrix in a kernel: a row's correlations and their start take a quarter of what eight warps may have."""

NUMBA_SWITCH = "SWITCH_KERNELS_NUMBA"
"""In the environment: at 0 numba searches nothing (`why_not_in_rows`)."""


class Support(NamedTuple):
    """Latents of N rows and their values."""

    values_NK: Tensor
    """>= 0; exactly the slots that hold more than 0 are in use."""
    indices_NK: Tensor
    """int64 in [0, C), distinct within a row where in use."""


class Problem(NamedTuple):
    """The least squares problem min_z ||r - A^T z||^2 on each row's support, without its residual r of D numbers."""

    gram_NKK: Tensor
    """A A^T; only the lower triangle is read."""
    products_NK: Tensor
    """A r."""


def why_not_in_kernels(execution: Execution, dtype: torch.dtype, latents: int, columns: int = 0) -> str | None:
    """Why PyTorch and not the Triton kernels search, or refit, rows of at most so many latents, in words for a plan line; None if the kernels do."""
    if not execution.is_triton:
        return f"the backend is torch ({execution.reason})"
    if dtype != torch.float32:
        return f"the kernels take float32, not {str(dtype).removeprefix('torch.')}"
    if latents > MOST_LATENTS:
        return f"a token may take {latents} latents, and the kernels hold {MOST_LATENTS}"
    if columns > MOST_COLUMNS:
        return f"a token may choose from {columns} latents, and the kernels hold {MOST_COLUMNS}"
    return None


def why_not_in_rows(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why PyTorch and not numba (`switch_kernels.pursuit_rows`) searches, in words for a plan line; None if numba does: by itself wherever it is
    installed, unless `NUMBA_SWITCH` is 0.
    """
    if device.type != "cpu":
        return f"rows are searched one by one on a CPU only, and this is {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"rows are searched one by one in float32 or float64, not {str(dtype).removeprefix('torch.')}"
    if os.environ.get(NUMBA_SWITCH) == "0":
        return f"{NUMBA_SWITCH}=0"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set, and nothing would be compiled"
    return _why_no_numba()


@cache
def _why_no_numba() -> str | None:
    try:
        import switch_kernels.pursuit_rows  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return "numba is not installed: pip install 'switch_sae[fast]'"
    except (ImportError, RuntimeError) as error:  # a NumPy that is too new for it; no folder that it may keep compiled code in
        return f"numba does not work here: {str(error).rstrip('.')}"
    return None


def padded_columns(candidates: int) -> int:
    """P for C candidates."""
    return -(-candidates // COLUMNS) * COLUMNS


@torch.no_grad()
def gram_matrices(rows_GCD: Tensor) -> Tensor:
    """[G, C, P]: A_g A_g^T, its columns padded with 0; by blocks, those above the diagonal copied: 5/8 of the products (`GRAM_SHARE`)."""
    candidates = rows_GCD.shape[1]
    gram_GCP = rows_GCD.new_zeros(len(rows_GCD), candidates, padded_columns(candidates))
    edges = [slice(start, min(start + -(-candidates // 4), candidates)) for start in range(0, candidates, -(-candidates // 4))]
    for place, rows in enumerate(edges):
        for columns in edges[: place + 1]:
            gram_GCP[:, rows, columns] = rows_GCD[:, rows] @ rows_GCD[:, columns].transpose(1, 2)
            if columns != rows:
                gram_GCP[:, columns, rows] = gram_GCP[:, rows, columns].transpose(1, 2)
    return gram_GCP


@torch.no_grad()
def least_squares(problem: Problem, active_NK: Tensor, ridge: float) -> Tensor:
    """z_NK = argmin ||r - A^T z||^2 + ridge ||z||^2 over the active slots; slots whose z is not above 0 are dropped and the rest solved again, until
    none is.

    What is left is the exact (unconstrained) least squares solution on its own support, and positive. It need not be the best non-negative one: a
    dropped slot never comes back (as it could in Lawson & Hanson 1974).
    """
    z_NK = torch.zeros_like(problem.products_NK)
    row_n: Tensor | None = None  # of those that are not solved yet; None while it is all of them
    while active_NK.shape[0]:
        solved_NK = _solve(problem, active_NK, ridge)
        positive_NK = solved_NK > 0
        done_N = (positive_NK | ~active_NK).all(dim=1)
        if row_n is None:
            z_NK, row_n = solved_NK, torch.arange(len(z_NK), device=z_NK.device)
        else:
            z_NK[row_n] = solved_NK
        left = (~done_N).nonzero()[:, 0]
        row_n, active_NK = row_n[left], (positive_NK & active_NK)[left]
        problem = Problem(problem.gram_NKK[left], problem.products_NK[left])
    return z_NK


def _solve(problem: Problem, active_NK: Tensor, ridge: float) -> Tensor:
    """Inactive slots become equations z = 0 of their own."""
    mask_NK = active_NK.to(problem.gram_NKK.dtype)
    system_NKK = problem.gram_NKK * mask_NK[:, :, None] * mask_NK[:, None, :]
    system_NKK.diagonal(dim1=1, dim2=2).add_(1 - mask_NK * (1 - ridge))
    factor_NKK = torch.linalg.cholesky_ex(system_NKK)[0]
    return torch.cholesky_solve((problem.products_NK * mask_NK)[..., None], factor_NKK)[..., 0]


@torch.no_grad()
def problem_of_rows(residual_ND: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Problem:
    """From the K rows of W themselves, some tokens at a time: K D + K^2 D multiply-adds per token, and never [N, K, D] of all of them."""
    size = max(1, _CHUNK_ELEMENTS // max(1, indices_NK.shape[1] * W_MD.shape[1]))
    gram, products = [], []
    for residual_nD, indices_nK in zip(residual_ND.split(size), indices_NK.split(size), strict=True):
        atoms_nKD = F.embedding(indices_nK, W_MD)
        gram.append(atoms_nKD @ atoms_nKD.transpose(1, 2))
        products.append((atoms_nKD @ residual_nD[..., None])[..., 0])
    return Problem(torch.cat(gram), torch.cat(products))


@torch.no_grad()
def problem_of_gram(products_NK: Tensor, gram_GCP: Tensor, group_N: Tensor, local_NK: Tensor) -> Problem:
    """From products and Gram matrices that are there already; `local_NK` are candidates of each row's dictionary."""
    return Problem(gram_at(gram_GCP, group_N, local_NK, local_NK, lower=True), products_NK)


@torch.no_grad()
def matching_pursuit(
    correlations_NC: Tensor,
    gram_GCP: Tensor,
    group_N: Tensor,
    k: int,
    blocks: int,
    ridge: float,
    threshold: Tensor | float = 0.0,
    limit_N: Tensor | None = None,
    execution: Execution = PYTORCH,
) -> Support:
    """At most k latents per row (and at most limit_N), in `blocks` blocks of k / blocks, from c0 = A r of its dictionary `group_N`, whose rows A have
    unit norm, with G = A A^T::

        c = c0;  I = {}
        each block:   k / blocks times: j = argmax c over those not in I; only if c_j > threshold: I += j, c -= c_j G[:, j]     matching pursuit
                      z = least squares on I, its negatives set to 0                                                            refit
                      c = c0 - G[:, I] z                                                                                        renew
        a row is done after a block that it did not fill;  z = `least_squares` on I

    The matching pursuit of Mallat & Zhang (1993) with the refits of orthogonal matching pursuit (Pati et al. 1993; one block per latent), in the Gram
    domain of batch OMP (Rubinstein et al. 2008), for latents that only add. Joining a latent lowers ||r||^2 by c_j^2 at least, so the threshold theta
    is greedy descent of ||r||^2 + theta^2 L0. The Cholesky factor grows with the blocks. `gram_GCP` is padded (`gram_matrices`). With Triton a kernel
    computes it, unless `why_not_in_kernels` finds a reason; on a CPU numba, unless `why_not_in_rows` does.
    """
    _check(k, blocks, gram_GCP.shape[1])
    if why_not_in_kernels(execution, correlations_NC.dtype, k, gram_GCP.shape[2]) is None:
        from switch_kernels.gpu import pursuit as kernels

        theta = threshold.float() if isinstance(threshold, Tensor) else correlations_NC.new_full((), threshold)
        return Support(*kernels.matching_pursuit(correlations_NC, gram_GCP, group_N, k, blocks, ridge, theta, limit_N))
    if why_not_in_rows(correlations_NC.device, correlations_NC.dtype) is None and float(threshold) >= 0:
        from switch_kernels import pursuit_rows

        return Support(*pursuit_rows.matching_pursuit(correlations_NC, gram_GCP, group_N, k, blocks, ridge, float(threshold), limit_N))
    return _in_parts(correlations_NC, OwnGrams(gram_GCP, group_N), k, blocks, ridge, threshold, limit_N)


@torch.no_grad()
def matching_pursuit_in_lists(
    correlations_NC: Tensor,
    candidate_NC: Tensor,
    gram_MQ: Tensor,
    k: int,
    blocks: int,
    ridge: float,
    threshold: Tensor | float = 0.0,
    limit_N: Tensor | None = None,
) -> Support:
    """`matching_pursuit` of rows that each have a list of C latents of their own, `candidate_NC`, out of M whose Gram matrix is there.

    G[i, j] = gram[candidate[i], candidate[j]], and what is found are latents in [0, M). Latents of a list differ, but for those whose correlation is
    -inf: they never join. `gram_MQ` is `gram_matrices(rows_MD[None])[0]`, M^2 numbers: 66 MB in float32 for 4,096 latents, 1 GB for 16,384. There is
    no Triton kernel.
    """
    _check(k, blocks, candidate_NC.shape[1])
    if why_not_in_rows(correlations_NC.device, correlations_NC.dtype) is None and float(threshold) >= 0:
        from switch_kernels import pursuit_rows

        group_N = torch.zeros_like(candidate_NC[:, 0])
        values_NK, place_NK = pursuit_rows.matching_pursuit(
            correlations_NC, gram_MQ[None], group_N, k, blocks, ridge, float(threshold), limit_N, candidate_NC
        )
    else:
        candidate_NP = F.pad(candidate_NC, (0, padded_columns(candidate_NC.shape[1]) - candidate_NC.shape[1]))
        values_NK, place_NK = _in_parts(correlations_NC, ListedGrams(gram_MQ, candidate_NP), k, blocks, ridge, threshold, limit_N)
    return Support(values_NK, candidate_NC.gather(1, place_NK))


def _check(k: int, blocks: int, candidates: int) -> None:
    if k % blocks:
        raise ValueError(f"k={k} latents cannot join in blocks={blocks} equal blocks. Use a number of blocks that divides k.")
    if k > candidates:
        raise ValueError(f"k={k} latents cannot join from a dictionary of {candidates}. Use a smaller k, or wider experts.")


def _in_parts(c0_NC: Tensor, grams: GramRows, k: int, blocks: int, ridge: float, threshold: Tensor | float, limit_N: Tensor | None) -> Support:
    size = max(1, _CHUNK_ELEMENTS // max(grams.columns, k * k // 4))  # few rows ever need the whole of a factor of k latents

    def pursue(rows: slice) -> Support:
        return _pursue(c0_NC[rows], grams.of(rows), k, blocks, ridge, threshold, None if limit_N is None else limit_N[rows])

    found = over_parts(pursue, even_parts(len(c0_NC), size, c0_NC.device), c0_NC.device)
    return Support(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))


def _pursue(c0_NC: Tensor, grams_N: GramRows, k: int, blocks: int, ridge: float, threshold: Tensor | float, limit_N: Tensor | None) -> Support:
    step, grams = k // blocks, grams_N
    values_NK, indices_NK = c0_NC.new_zeros(len(c0_NC), k), torch.zeros(len(c0_NC), k, dtype=torch.int64, device=c0_NC.device)
    row_n = torch.arange(len(c0_NC), device=c0_NC.device)  # of those that are not done, as `grams`
    c0_nP = F.pad(c0_NC, (0, grams.columns - c0_NC.shape[1]), value=-torch.inf)
    buffer_NP = torch.empty_like(c0_nP)
    c_nP, grown = c0_nP.clone(), _Factor.empty(c0_NC, ridge)
    for block in range(blocks):
        joined: list[Tensor] = []
        joins: list[Tensor] = []
        for left in reversed(range(step)):
            value_n, index_n = _largest(c_nP)
            joins_n = value_n > threshold if not joins else (value_n > threshold) & joins[-1]
            if limit_N is not None:
                joins_n = joins_n & (limit_N[row_n] > block * step + len(joins))
            joined.append(index_n)
            joins.append(joins_n)
            if left:
                taken_n1 = torch.where(joins_n, value_n, 0.0)[:, None]
                c_nP.addcmul_(grams.of_latent(index_n, buffer_NP[: len(row_n)]), taken_n1, value=-1)
                c_nP.scatter_(1, index_n[:, None], -torch.inf)
        new_nk, is_new_nk = torch.stack(joined, dim=1), torch.stack(joins, dim=1)
        before = slice(0, block * step)
        index_nk = torch.cat([indices_NK[row_n, before], new_nk], dim=1)
        rhs_nk = torch.where(is_new_nk, c0_nP.gather(1, new_nk), 0.0)
        z_nk = grown.add(grams.between(new_nk, index_nk), rhs_nk, is_new_nk)
        indices_NK[row_n, : index_nk.shape[1]] = index_nk
        values_NK[row_n, : index_nk.shape[1]] = z_nk
        if block == blocks - 1:
            break
        full = is_new_nk[:, -1].nonzero()[:, 0]
        if len(full) == 0:
            break
        if len(full) < len(row_n):
            row_n, c0_nP, index_nk, z_nk = (tensor[full] for tensor in (row_n, c0_nP, index_nk, z_nk))
            grown, grams = grown.of(full), grams.of(full)
        explained_nP = grams.sums(index_nk, z_nk.clamp_min(0))
        c_nP = torch.sub(c0_nP, explained_nP, out=explained_nP).scatter_(1, index_nk, -torch.inf)
    wrong = (values_NK < 0).any(dim=1).nonzero()[:, 0]
    if len(wrong):
        index_nK, active_nK = indices_NK[wrong], values_NK[wrong] > 0
        gram_nKK = grams_N.of(wrong).between(index_nK, index_nK, lower=True)
        values_NK[wrong] = least_squares(Problem(gram_nKK, c0_NC[wrong].gather(1, index_nK)), active_nK, ridge)
    return Support(values_NK, indices_NK)


def _largest(c_nP: Tensor) -> tuple[Tensor, Tensor]:
    """(value, column) of every row's largest."""
    grouped_nRC = c_nP.view(len(c_nP), c_nP.shape[1] // COLUMNS, COLUMNS)
    column_n1 = grouped_nRC.amax(dim=1).argmax(dim=1, keepdim=True)
    value_n, row_n = grouped_nRC.gather(2, column_n1[:, None].expand(-1, grouped_nRC.shape[1], 1))[..., 0].max(dim=1)
    return value_n, row_n * COLUMNS + column_n1[:, 0]


class _Factor:
    """R = L^-1 for L L^T = A + ridge I on the slots so far, and y = R A r; slots that are not in use are rows and columns of the identity.

    The inverse and not L itself: with it all work is products of small matrices in batches. Triangular solves with several right-hand sides take a
    hundred times as long where a BLAS starts threads for each matrix.
    """

    def __init__(self, R_nmm: Tensor, y_nm: Tensor, ridge: float) -> None:
        self.R_nmm, self.y_nm, self.ridge = R_nmm, y_nm, ridge

    @classmethod
    def empty(cls, like_NC: Tensor, ridge: float) -> "_Factor":
        return cls(like_NC.new_empty(len(like_NC), 0, 0), like_NC.new_empty(len(like_NC), 0), ridge)

    def of(self, rows: Tensor) -> "_Factor":
        """Of some rows alone."""
        return _Factor(self.R_nmm[rows], self.y_nm[rows], self.ridge)

    def add(self, gram_nkm: Tensor, products_nk: Tensor, in_use_nk: Tensor) -> Tensor:
        """The solution on all slots, after k more whose Gram rows with the m slots up to and with themselves are `gram_nkm`.

        All earlier slots are in use: a row that did not fill its last block gets no other.
        """
        R_nmm, old, new = self.R_nmm, self.y_nm.shape[1], products_nk.shape[1]
        masked_nkm = gram_nkm * in_use_nk[:, :, None]
        own_nkk = masked_nkm[:, :, old:] * in_use_nk[:, None, :]
        own_nkk.diagonal(dim1=1, dim2=2).add_(1 - in_use_nk.to(own_nkk.dtype) * (1 - self.ridge))
        across_nkm = masked_nkm[:, :, :old] @ R_nmm.transpose(1, 2)
        L_nkk = torch.linalg.cholesky_ex(own_nkk - across_nkm @ across_nkm.transpose(1, 2))[0]
        R_nkk = torch.linalg.solve_triangular(L_nkk, torch.eye(new, dtype=L_nkk.dtype, device=L_nkk.device).expand_as(L_nkk), upper=False)
        rest_nk = products_nk - (across_nkm @ self.y_nm[..., None])[..., 0]
        self.R_nmm = R_nmm.new_empty(len(R_nmm), old + new, old + new)
        self.R_nmm[:, :old, :old], self.R_nmm[:, :old, old:], self.R_nmm[:, old:, old:] = R_nmm, 0.0, R_nkk
        torch.neg(R_nkk @ (across_nkm @ R_nmm), out=self.R_nmm[:, old:, :old])
        self.y_nm = torch.cat([self.y_nm, (R_nkk @ rest_nk[..., None])[..., 0]], dim=1)
        return (self.y_nm[:, None, :] @ self.R_nmm)[:, 0]


_SPREAD = (0.3, 0.65, 0.95, 1.3, 1.9)
"""Latents per token at the 10, 30, 50, 70 and 90 % points over their mean, of a stop rule on activations of language models (experiments/LOG.md)."""


def spread_counts(k: int) -> list[int]:
    """Latents of five typical tokens where a threshold gives k on average."""
    return [min(2 * k, max(1, round(share * k))) for share in _SPREAD]


def solve_macs(k: int) -> float:
    """Multiply-adds of a Cholesky factor of k rows and of solving with it."""
    return k**3 / 6 + k * k


def pursuit_macs(candidates: int, k: int, blocks: int, by_threshold: bool = False) -> float:
    """Multiply-adds of `matching_pursuit` per row, beyond the correlations; with a threshold, k is the mean number of latents.

    Counted are the updates of matching pursuit, an inverse factor that grows (not its zeros), solutions and renewals. Selection and gathers are not,
    nor the solves of rows that end with negative values: 2 in 1,000 (experiments/LOG.md).
    """
    step = k // blocks
    if not by_threshold:
        return _macs(candidates, k, step, renewals=blocks - 1)
    counts = spread_counts(k)
    return sum(_macs(candidates, count, step, renewals=count // step) for count in counts) / len(counts)


def _macs(candidates: int, k: int, step: int, renewals: int) -> float:
    """For a row of exactly k latents: joins, then for each block of n after m others its part of the factor, the solution, the renewal."""
    joins, solves, renewed = 0.0, 0.0, 0
    for block, m in enumerate(range(0, k, step)):
        n = min(step, k - m)
        joins += candidates * (n - 1)
        solves += n * m * m + n * n * m + n**3 / 3 + n * m + (m + n) ** 2 / 2
        renewed += candidates * (m + n) * (block < renewals)
    return joins + solves + renewed

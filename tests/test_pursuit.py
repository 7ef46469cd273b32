"""Pursuit and least squares against brute force: each token by itself in NumPy, from its residual and never from a Gram matrix, written from the
equations in the docstrings."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from switch_kernels import pursuit, resolve
from switch_kernels.pursuit import (
    NUMBA_SWITCH,
    Problem,
    gram_matrices,
    least_squares,
    matching_pursuit,
    problem_of_gram,
    problem_of_rows,
    why_not_in_rows,
)
from switch_kernels.threads import even_parts, over_parts
from switch_sae.models import SwitchPursuitSAE
from switch_sae.training import Trainer, TrainerConfig

D, N = 12, 48
CPU = torch.device("cpu")
NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
both_ways = pytest.mark.parametrize("by", ["PyTorch", pytest.param("numba", marks=NUMBA)], indirect=True)


@pytest.fixture
def by(request, monkeypatch):
    """Who searches."""
    monkeypatch.setenv(NUMBA_SWITCH, "1" if request.param == "numba" else "0")
    assert (why_not_in_rows(CPU, torch.float32) is None) == (request.param == "numba")
    return request.param


def nonnegative_least_squares(r_D, A_CD, support, ridge):
    """([C] z, how often latents were dropped): solved on the support, those not above 0 dropped, solved again until none is."""
    z_C, support, drops = np.zeros(len(A_CD)), list(support), 0
    while support:
        rows_KD = A_CD[support]
        solved = np.linalg.solve(rows_KD @ rows_KD.T + ridge * np.eye(len(support)), rows_KD @ r_D)
        if (solved > 0).all():
            z_C[support] = solved
            break
        support, drops = [latent for latent, value in zip(support, solved, strict=True) if value > 0], drops + 1
    return z_C, drops


def pursued(r_D, A_CD, k, blocks, ridge, threshold=0.0, limit=None):
    """([C] z, drops) of one residual in one dictionary of unit rows."""
    chosen, residual_D = [], r_D
    for _ in range(blocks):
        joined = 0
        while joined < k // blocks and (limit is None or len(chosen) < limit):
            c_C = A_CD @ residual_D
            c_C[chosen] = -np.inf
            best = int(c_C.argmax())
            if not c_C[best] > threshold:
                break
            chosen.append(best)
            residual_D = residual_D - c_C[best] * A_CD[best]
            joined += 1
        if joined < k // blocks:
            break
        rows_KD = A_CD[chosen]
        z_K = np.linalg.solve(rows_KD @ rows_KD.T + ridge * np.eye(len(chosen)), rows_KD @ r_D)
        residual_D = r_D - np.maximum(z_K, 0) @ rows_KD
    return nonnegative_least_squares(r_D, A_CD, chosen, ridge)


def dictionaries(groups=3, candidates=40, size=D, seed=0):
    """Unit rows near a space of few dimensions, so that least squares on what pursuit chooses has negative values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((groups, candidates, 4), (4, size), (groups, candidates, size))
    few_GCD, basis_DD, rest_GCD = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return torch.nn.functional.normalize(few_GCD @ basis_DD + 0.5 * rest_GCD, dim=2)


def problem(groups=3, candidates=40, rows=N, seed=0):
    """(dictionaries, residuals, the dictionary of each, correlations)."""
    A_GCD = dictionaries(groups, candidates, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    r_ND = torch.randn(rows, D, generator=generator, dtype=torch.float64) * 2 + A_GCD[:, :7].mean(dim=(0, 1)) * 3
    group_N = torch.randint(groups, (rows,), generator=generator)
    return A_GCD, r_ND, group_N, (A_GCD[group_N] @ r_ND[..., None])[..., 0]


def dense(support, candidates):
    return support.values_NK.new_zeros(len(support.values_NK), candidates).scatter_add(1, support.indices_NK, support.values_NK)


@pytest.mark.parametrize(
    ("candidates", "k", "blocks", "ridge", "threshold", "limited"),
    [
        (40, 6, 2, 1e-3, 0.0, False),
        (64, 8, 2, 0.01, 0.0, False),
        (40, 6, 6, 1e-3, 0.0, False),  # orthogonal matching pursuit
        (33, 6, 1, 1e-3, 0.0, False),  # matching pursuit
        (40, 8, 4, 1e-3, 0.7, False),
        (40, 8, 4, 1e-3, 0.0, True),
        (9, 8, 2, 1e-3, 0.1, True),
    ],
)
@both_ways
def test_matching_pursuit_equals_brute_force(by, candidates, k, blocks, ridge, threshold, limited):
    A_GCD, r_ND, group_N, c_NC = problem(candidates=candidates)
    limit_N = torch.arange(N) % (k + 3) if limited else None
    support = matching_pursuit(c_NC, gram_matrices(A_GCD), group_N, k, blocks, ridge, torch.tensor(threshold, dtype=torch.float64), limit_N)
    found_NC = dense(support, candidates)
    by_hand = [
        pursued(r_D.numpy(), A_GCD[group].numpy(), k, blocks, ridge, threshold, None if limit_N is None else int(limit_N[n]))
        for n, (r_D, group) in enumerate(zip(r_ND, group_N, strict=True))
    ]
    expected_NC = torch.tensor(np.stack([z_C for z_C, _ in by_hand]))
    assert (found_NC - expected_NC).abs().max() <= 1e-9
    assert torch.equal(found_NC > 0, expected_NC > 0) and torch.equal((support.values_NK > 0).sum(1), (found_NC > 0).sum(1))
    counts_N = (found_NC > 0).sum(dim=1)
    assert sum(drops > 0 for _, drops in by_hand) >= 3, "no negative value was met: the problem is too easy"
    assert len(counts_N.unique()) > 1 and counts_N.max() <= k and (limit_N is None or (counts_N <= limit_N).all())
    if threshold or limited:
        assert (counts_N < k // 2).any() and (counts_N > k // 2).any()


ORTHOGONAL = [
    {1: 2.003554953142743, 4: 1.495846504549068, 7: 0.99536935499312},
    {0: 1.006037034755492, 5: 1.218593132140926, 11: 2.079413832027877},
    {2: 1.714162844592279, 3: 1.101646032827319, 9: 1.38616999411394},
]
"""What scikit-learn 1.9.1 answers: orthogonal_mp(A.T, r.T, n_nonzero_coefs=3).T. Importing it takes longer than all tests here."""


@both_ways
def test_it_is_the_orthogonal_matching_pursuit_of_scikit_learn_where_correlations_and_coefficients_stay_positive(by):
    i, j = np.arange(1, 13)[:, None], np.arange(1, 41)
    A_CD, z_NC = np.cos(0.37 * i * j + i * i), np.zeros((3, 12))
    A_CD /= np.linalg.norm(A_CD, axis=1, keepdims=True)
    for z_C, latents, values in zip(z_NC, ([1, 4, 7], [0, 5, 11], [2, 3, 9]), ([2, 1.5, 1], [1, 1.2, 2.1], [1.7, 1.1, 1.4]), strict=True):
        z_C[latents] = values
    r_ND = z_NC @ A_CD + 0.05 * np.sin(np.arange(3)[:, None] + 1.7 * j)
    gram_GCP = gram_matrices(torch.tensor(A_CD)[None])
    ours = dense(matching_pursuit(torch.tensor(r_ND @ A_CD.T), gram_GCP, torch.zeros(3, dtype=torch.int64), k=3, blocks=3, ridge=1e-13), 12)
    theirs = torch.zeros(3, 12, dtype=torch.float64)
    for n, row in enumerate(ORTHOGONAL):
        theirs[n, list(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
    assert (ours - theirs).abs().max() <= 1e-9


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.5])
def test_least_squares_equals_brute_force_and_is_stationary(ridge):
    (A_CD,), r_ND, *_ = problem(groups=1)
    generator = torch.Generator().manual_seed(5)
    indices_NK = torch.stack([torch.randperm(40, generator=generator)[:7] for _ in range(N)])
    active_NK = torch.rand(N, 7, generator=generator) < 0.7
    active_NK[0] = False
    found_NK = least_squares(problem_of_rows(r_ND, indices_NK, A_CD), active_NK, ridge)
    drops = 0
    for r_D, indices_K, active_K, found_K in zip(r_ND.numpy(), indices_NK.numpy(), active_NK.numpy(), found_NK.numpy(), strict=True):
        z_C, dropped = nonnegative_least_squares(r_D, A_CD.numpy(), indices_K[active_K], ridge)
        drops += dropped > 0
        assert np.abs(z_C[indices_K] - found_K).max() <= 1e-9
        used_K = found_K > 0
        left = A_CD.numpy()[indices_K[used_K]] @ (r_D - z_C @ A_CD.numpy()) - ridge * found_K[used_K]
        assert np.abs(left).max(initial=0) <= 1e-9
    assert drops > N // 4 and (found_NK[0] == 0).all()


def test_a_problem_is_the_same_from_rows_and_from_gram_matrices():
    A_GCD, r_ND, group_N, c_NC = problem()
    generator = torch.Generator().manual_seed(6)
    local_NK = torch.stack([torch.randperm(40, generator=generator)[:5] for _ in range(N)])
    by_rows = problem_of_rows(r_ND, local_NK + 40 * group_N[:, None], A_GCD.flatten(0, 1))
    by_gram = problem_of_gram(c_NC.gather(1, local_NK), gram_matrices(A_GCD), group_N, local_NK)
    rows_NKD = A_GCD[group_N[:, None], local_NK]
    for found in (by_rows, by_gram):
        assert (found.gram_NKK - torch.einsum("nkd,nld->nkl", rows_NKD, rows_NKD)).tril().abs().max() <= 1e-12  # the rest is never read
        assert (found.products_NK - torch.einsum("nkd,nd->nk", rows_NKD, r_ND)).abs().max() <= 1e-12


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@both_ways
def test_chunks_and_threads_change_no_bit(by, two_threads, monkeypatch):
    A_GCD, r_ND, group_N, c_NC = (tensor.float() if tensor.is_floating_point() else tensor for tensor in problem(rows=301))
    gram_GCP, indices_NK = gram_matrices(A_GCD), torch.arange(40).repeat(301, 1)[:, ::8]

    def both():
        rows = problem_of_rows(r_ND, indices_NK, A_GCD[0])
        return *matching_pursuit(c_NC, gram_GCP, group_N, 8, 4, 1e-3, 0.3), *rows

    parallel = both()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    whole = both()
    monkeypatch.setattr(pursuit, "_CHUNK_ELEMENTS", 64 * 7)
    if by == "numba":
        monkeypatch.setattr("switch_kernels.pursuit_rows._ROWS", 7)
    chunked = both()
    assert (whole[0] > 0).sum(dim=1).unique().numel() > 2
    for a, b, c in zip(parallel, whole, chunked, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_threads_do_their_parts_in_order_and_give_back_what_they_were_lent(two_threads):
    seen = []

    def work(part):
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return part.start, part.stop

    cpu = torch.device("cpu")
    assert over_parts(work, even_parts(10, 3, cpu), cpu) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert set(seen) == {(1, False, False)} and torch.get_num_threads() == 2 and torch.is_grad_enabled()
    seen.clear()
    with torch.inference_mode():
        assert over_parts(work, even_parts(10, 100, cpu), cpu) == [(0, 5), (5, 10)]
    assert set(seen) == {(1, False, True)}
    with pytest.raises(ZeroDivisionError):
        over_parts(lambda part: 1 / (part.start - 3), even_parts(10, 3, cpu), cpu)
    assert torch.get_num_threads() == 2 and over_parts(work, even_parts(0, 3, cpu), cpu) == [(0, 0)] and over_parts(work, [], cpu) == []


@both_ways
def test_no_rows_have_no_latents(by):
    gram_GCP, empty = gram_matrices(dictionaries()), torch.zeros(0, dtype=torch.int64)
    support = matching_pursuit(torch.zeros(0, 40, dtype=torch.float64), gram_GCP, empty, 6, 3, 1e-3)
    assert support.values_NK.shape == support.indices_NK.shape == (0, 6)
    assert least_squares(Problem(torch.zeros(0, 3, 3), torch.zeros(0, 3)), torch.zeros(0, 3, dtype=torch.bool), 1e-3).shape == (0, 3)


@both_ways
def test_near_duplicates_in_float32_cost_no_error(by):
    """Pairs that are 1e-6 apart: which of a pair joins is chance in float32, but what is minimised is as small as in float64."""
    (A_CD,), r_ND, group_N, _ = problem(groups=1)
    A_CD[20:] = torch.nn.functional.normalize(A_CD[:20] + 1e-6 * torch.randn(20, D, generator=torch.Generator().manual_seed(1)), dim=1)

    def objective(dtype):
        A, r = A_CD.to(dtype), r_ND.to(dtype)
        z_NC = dense(matching_pursuit(r @ A.T, gram_matrices(A[None]), group_N, 8, 8, 1e-3), 40).double()
        assert (z_NC >= 0).all()
        return (r_ND - z_NC @ A_CD).square().sum(dim=1) + 1e-3 * z_NC.square().sum(dim=1)

    torch.testing.assert_close(objective(torch.float32), objective(torch.float64), rtol=1e-2, atol=1e-3)


@both_ways
def test_a_row_that_is_not_finite_ends_and_leaves_the_others_alone(by):
    A_GCD, _, group_N, c_NC = problem()
    gram_GCP = gram_matrices(A_GCD)
    whole = dense(matching_pursuit(c_NC, gram_GCP, group_N, 6, 2, 1e-3), 40)
    c_NC[3, 5], c_NC[4] = torch.nan, torch.inf
    found = dense(matching_pursuit(c_NC, gram_GCP, group_N, 6, 2, 1e-3), 40)
    others = torch.arange(N) > 4
    assert torch.equal(found[others], whole[others])
    assert (found[3] == 0).all()
    poisoned = least_squares(Problem(torch.eye(3)[None], torch.tensor([[1.0, torch.nan, 2.0]])), torch.ones(1, 3, dtype=torch.bool), 1e-3)
    assert poisoned.isnan().any()


@pytest.mark.parametrize(
    ("k", "blocks", "message"),
    [
        (5, 2, r"k=5 latents cannot join in blocks=2 equal blocks\. Use a number of blocks that divides k"),
        (41, 1, r"k=41 latents cannot join from a dictionary of 40\. Use a smaller k"),
    ],
)
def test_impossible_numbers_are_refused(k, blocks, message):
    _, _, group_N, c_NC = problem()
    with pytest.raises(ValueError, match=message):
        matching_pursuit(c_NC, gram_matrices(dictionaries()), group_N, k, blocks, 1e-3)


def planted(rows=600, candidates=170, size=64, groups=3):
    """(correlations, Gram matrices, groups) of residuals that are sums of 3 to 21 rows of their dictionary and noise, in float32."""
    generator = torch.Generator().manual_seed(3)
    A_GCD = torch.nn.functional.normalize(torch.randn(groups, candidates, size, generator=generator), dim=2)
    group_N, counts_N = torch.randint(groups, (rows,), generator=generator), torch.randint(3, 22, (rows,), generator=generator)
    places_NC = torch.rand(rows, candidates, generator=generator).argsort(dim=1).argsort(dim=1)
    z_NC = (torch.rand(rows, candidates, generator=generator) + 0.7) * (places_NC < counts_N[:, None])
    r_ND = torch.einsum("nc,ncd->nd", z_NC, A_GCD[group_N]) + 0.05 * torch.randn(rows, size, generator=generator)
    return torch.einsum("nd,ncd->nc", r_ND, A_GCD[group_N]), gram_matrices(A_GCD), group_N


@NUMBA
@pytest.mark.parametrize(
    ("k", "blocks", "threshold", "limited"), [(16, 4, 0.0, False), (32, 8, 0.45, False), (12, 12, 0.2, True), (20, 2, 0.0, True)]
)
def test_numba_finds_the_latents_and_values_of_pytorch(k, blocks, threshold, limited, monkeypatch):
    """In float32, where both round, in their own order; no correlation here ties with another within rounding."""
    c_NC, gram_GCP, group_N = planted()
    limit_N = torch.arange(len(c_NC)) % (k + 3) if limited else None
    found = {}
    for on in ("0", "1"):
        monkeypatch.setenv(NUMBA_SWITCH, on)
        support = matching_pursuit(c_NC, gram_GCP, group_N, k, blocks, 1e-3, threshold, limit_N)
        assert support.values_NK.dtype == torch.float32 and support.indices_NK.dtype == torch.int64
        assert (support.values_NK >= 0).all() and (support.indices_NK < c_NC.shape[1]).all()
        found[on] = support
    (values_NK, indices_NK), (others_NK, places_NK) = found["0"], found["1"]
    used_NK = values_NK > 0
    assert torch.equal(used_NK, others_NK > 0) and torch.equal(indices_NK[used_NK], places_NK[used_NK]), "another support, or in other slots"
    assert ((values_NK - others_NK).abs() <= 1e-5 * values_NK.amax(dim=1, keepdim=True)).all()
    assert not torch.equal(values_NK, others_NK), "one of them was never asked"
    assert used_NK.sum(dim=1).unique().numel() >= 4


@NUMBA
def test_of_equal_correlations_the_first_candidate_joins_in_numba(monkeypatch):
    """With every latent there twice, far apart: PyTorch takes the first in the first column of 32."""
    monkeypatch.setenv(NUMBA_SWITCH, "1")
    (A_CD, *_), r_ND, _, _ = problem()
    twice_CD = torch.cat([A_CD, A_CD])
    c_NC, none_N = r_ND @ twice_CD.T, torch.zeros(N, dtype=torch.int64)
    c_NC[:, 40:] = c_NC[:, :40]  # to the last bit
    gram_GCP = gram_matrices(A_CD[None])[0, :, :40].repeat(2, 2)
    gram_GCP = torch.nn.functional.pad(gram_GCP, (0, 96 - 80))[None]
    one = matching_pursuit(c_NC, gram_GCP, none_N, 1, 1, 1e-3)
    assert torch.equal(one.indices_NK[:, 0], c_NC[:, :40].argmax(dim=1)) and (one.values_NK > 0).all()


def test_a_reason_says_why_numba_does_not_search(monkeypatch):
    monkeypatch.delenv(NUMBA_SWITCH, raising=False)
    assert why_not_in_rows(torch.device("cuda"), torch.float32) == "rows are searched one by one on a CPU only, and this is cuda"
    assert why_not_in_rows(CPU, torch.bfloat16) == "rows are searched one by one in float32 or float64, not bfloat16"
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert why_not_in_rows(CPU, torch.float64) == "NUMBA_DISABLE_JIT is set, and nothing would be compiled"
    monkeypatch.setenv(NUMBA_SWITCH, "0")
    assert why_not_in_rows(CPU, torch.float32) == f"{NUMBA_SWITCH}=0"


class OldNumba:
    """A finder of a numba that does not know this NumPy."""

    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.0 or less.")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(False, "numba is not installed: pip install 'switch_sae[fast]'"), (True, "numba does not work here: Numba needs NumPy 2.0 or less")],
)
def test_where_numba_is_missing_or_broken_pytorch_searches_and_the_reason_says_so(broken, reason, monkeypatch):
    _, _, group_N, c_NC = problem()
    gram_GCP = gram_matrices(dictionaries())
    monkeypatch.setenv(NUMBA_SWITCH, "0")
    by_pytorch = matching_pursuit(c_NC, gram_GCP, group_N, 6, 2, 1e-3)
    monkeypatch.delenv(NUMBA_SWITCH)
    monkeypatch.delitem(sys.modules, "switch_kernels.pursuit_rows", raising=False)
    monkeypatch.setattr(pursuit, "_why_no_numba", pursuit._why_no_numba.__wrapped__)
    if broken:
        monkeypatch.delitem(sys.modules, "numba", raising=False)
        monkeypatch.setattr(sys, "meta_path", [OldNumba(), *sys.meta_path])
    else:
        monkeypatch.setitem(sys.modules, "numba", None)
    assert why_not_in_rows(CPU, torch.float32) == reason
    for found, expected in zip(matching_pursuit(c_NC, gram_GCP, group_N, 6, 2, 1e-3), by_pytorch, strict=True):
        assert torch.equal(found, expected)


@both_ways
def test_the_plan_of_a_training_says_who_searches(by):
    sae = SwitchPursuitSAE(SwitchPursuitSAE.Config(num_latents=64, k=4, num_experts=2), 8, torch.Generator().manual_seed(0))
    trainer = Trainer(sae, TrainerConfig(), total_steps=10, batch_size=32, execution=resolve("auto", "auto", "cpu"))
    why = "the backend is torch (the device is a CPU)"
    assert trainer.choice == (f"pursuit row by row in numba ({why})" if by == "numba" else f"pursuit in PyTorch ({why}; {NUMBA_SWITCH}=0)")

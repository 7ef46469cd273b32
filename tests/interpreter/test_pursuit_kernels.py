"""Kernels of refits and pursuit against the PyTorch forms in float64, which tests/test_pursuit.py holds against brute force; SAEs that use them."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from switch_kernels import Backend, Dispatch, Execution, Precision
from switch_kernels.gpu import pursuit as kernels
from switch_kernels.pursuit import NUMBA_SWITCH, Problem, gram_matrices, least_squares, matching_pursuit, why_not_in_kernels
from switch_sae.models import SAES, BatchTopKSAE, PursuitSAE, ReLUSAE, SwitchPursuitSAE, SwitchRefitSAE, SwitchSAE, TopKSAE
from switch_sae.models.gram import local_products
from switch_sae.models.inference import Inference, refit_pairs, search_plan, searched_by
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXACT = Execution(Backend.triton, Precision.float32, "test")
LOW = Execution(Backend.triton, Precision.bf16, "test")
D, N = 12, 12


def dictionaries(groups: int, candidates: int, size: int = D) -> torch.Tensor:
    """Unit rows near a space of few dimensions, so that least squares has negative values."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((groups, candidates, size // 3), (size // 3, size), (groups, candidates, size))
    few_GCD, basis_DD, rest_GCD = (torch.randn(shape, generator=generator) for shape in shapes)
    return torch.nn.functional.normalize((few_GCD @ basis_DD + 0.5 * rest_GCD).double(), dim=2).float()


def residuals(rows: int = N, size: int = D) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(1))


def dense(values_NK: torch.Tensor, indices_NK: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.zeros(len(values_NK), columns, dtype=torch.float64).scatter_add(1, indices_NK, values_NK.double())


@pytest.mark.parametrize(
    ("size", "candidates", "k", "blocks", "threshold", "limited"),
    [
        (12, 40, 6, 2, 0.0, False),
        (12, 33, 5, 1, 0.0, False),  # matching pursuit
        (12, 40, 6, 6, 0.0, False),  # orthogonal matching pursuit
        (12, 70, 8, 4, 0.25, False),
        (12, 9, 8, 2, 0.0, True),
        (60, 70, 33, 3, 0.3, False),  # 64 slots
    ],
)
def test_matching_pursuit(size, candidates, k, blocks, threshold, limited):
    A_GCD, r_ND = dictionaries(3, candidates, size), residuals(size=size)
    group_N, limit_N = torch.arange(N) % 3, torch.arange(N) % (k + 2) if limited else None
    c_NC, gram_GCP = (A_GCD[group_N] @ r_ND[..., None])[..., 0], gram_matrices(A_GCD)
    found = matching_pursuit(c_NC, gram_GCP, group_N, k, blocks, 1e-3, threshold, limit_N, EXACT)
    exact = matching_pursuit(c_NC.double(), gram_GCP.double(), group_N, k, blocks, 1e-3, threshold, limit_N)
    found_NC, exact_NC = dense(*found, candidates), dense(*exact, candidates)
    assert (found_NC - exact_NC).abs().max() <= 1e-4 and torch.equal(found_NC > 0, exact_NC > 0)
    assert found.indices_NK.dtype == torch.int64 and found.indices_NK.min() >= 0 and found.indices_NK.max() < candidates
    assert (found.values_NK >= 0).all() and torch.equal((found.values_NK > 0).sum(dim=1), (exact_NC > 0).sum(dim=1))
    counts_N = (exact_NC > 0).sum(dim=1)
    assert len(counts_N.unique()) > 1, "no row stopped or dropped a latent: the problem is too easy"


@pytest.mark.filterwarnings("ignore:invalid value encountered in")  # where infinities meet
def test_a_row_that_is_not_finite_ends_and_leaves_the_others_alone_and_no_rows_are_fine():
    A_GCD, group_N = dictionaries(2, 40), torch.arange(N) % 2
    c_NC, gram_GCP = (A_GCD[group_N] @ residuals()[..., None])[..., 0], gram_matrices(A_GCD)
    whole = matching_pursuit(c_NC, gram_GCP, group_N, 4, 2, 1e-3, execution=EXACT)
    c_NC[3, 5], c_NC[4] = torch.nan, -torch.inf
    found = matching_pursuit(c_NC, gram_GCP, group_N, 4, 2, 1e-3, execution=EXACT)
    assert torch.equal(found.values_NK[5:], whole.values_NK[5:]) and (found.values_NK[3:5] == 0).all()
    c_NC[3, 5], c_NC[4] = torch.inf, torch.inf * torch.where(torch.arange(c_NC.shape[1]) % 2 > 0, 1.0, -1.0)
    found = matching_pursuit(c_NC, gram_GCP, group_N, 4, 2, 1e-3, execution=EXACT)
    assert torch.equal(found.values_NK[5:], whole.values_NK[5:])
    assert ((found.indices_NK >= 0) & (found.indices_NK < c_NC.shape[1])).all()
    none = matching_pursuit(c_NC[:0], gram_GCP, group_N[:0], 4, 2, 1e-3, execution=EXACT)
    assert none.values_NK.shape == none.indices_NK.shape == (0, 4)


@pytest.mark.parametrize(("size", "most", "shared"), [(12, 9, 0), (140, 17, 6)])
def test_least_squares_on_given_supports(size, most, shared):
    """Of rows with 0 to `most` latents each."""
    experts, own = 3, 24
    W_MD = dictionaries(1, shared + experts * own, size)[0]
    generator = torch.Generator().manual_seed(2)
    expert_N, count_N = torch.arange(N) % experts, torch.arange(N) % (most + 1)
    local_NK = torch.stack([torch.randperm(shared + own, generator=generator)[:most] for _ in range(N)])
    latent_NK = torch.where(local_NK < shared, local_NK, local_NK + own * expert_N[:, None])
    active_NK = torch.arange(most) < count_N[:, None]
    A_ECD = torch.stack([torch.cat([W_MD[:shared], W_MD[shared + e * own : shared + (e + 1) * own]]) for e in range(experts)])
    r_ND = residuals(size=size)
    r_ND[5] = torch.nan
    start_N = count_N.cumsum(0) - count_N
    found_P = kernels.refit_pairs(r_ND, W_MD, latent_NK[active_NK], start_N, count_N, expert_N, gram_matrices(A_ECD), shared, 1e-3, most)
    rows_NKD = W_MD[latent_NK].double()
    problem = Problem(rows_NKD @ rows_NKD.transpose(1, 2), (rows_NKD @ r_ND.double()[..., None])[..., 0])
    exact_NK = least_squares(problem, active_NK, 1e-3)
    found_NK = torch.zeros(N, most, dtype=torch.float64).masked_scatter(active_NK, found_P.double())
    assert found_NK[5][active_NK[5]].isnan().all()
    others = torch.arange(N) != 5
    assert (found_NK - exact_NK)[others].abs().max() <= 1e-4 and torch.equal(found_NK[others] > 0, exact_NK[others] > 0)
    assert (active_NK & (exact_NK == 0)).sum() > N // 2, "hardly any latent was dropped: the problem is too easy"


@pytest.mark.parametrize(("execution", "tolerance"), [(EXACT, 1e-5), (LOW, 0.1)], ids=["float32", "bf16"])
@pytest.mark.parametrize(("experts", "shared", "bias"), [(5, 6, True), (1, 0, False)])
def test_products_of_each_row_with_its_own_dictionary(execution, tolerance, experts, shared, bias):
    """Of 70 rows, more than a tile, and with experts that have none."""
    W_MD = torch.randn(shared + experts * 14, D, generator=torch.Generator().manual_seed(3))
    b_M = torch.randn(len(W_MD), generator=torch.Generator().manual_seed(4)) if bias else None
    expert_T1 = torch.where(torch.arange(70) < 67, 0, 3)[:, None] % experts
    dispatch = Dispatch.from_experts(expert_T1, experts)
    x_ND = residuals(70)
    found_NC = local_products(x_ND, W_MD, dispatch, shared, b_M, execution)
    exact_NC = local_products(x_ND, W_MD, dispatch, shared, b_M)
    assert (found_NC - exact_NC).abs().max() <= tolerance and found_NC.dtype == torch.float32
    assert (found_NC != exact_NC).any() or execution is EXACT
    assert local_products(x_ND[:0], W_MD, Dispatch.from_experts(expert_T1[:0], experts), shared, b_M, execution).shape == (0, shared + 14)


M, K, E, S, T = 48, 4, 4, 8, 20
CONFIGS = {
    "switch_pursuit": SwitchPursuitSAE.Config(num_latents=M, k=K, blocks=2, num_experts=E, shared=S),
    "switch_pursuit, stop": SwitchPursuitSAE.Config(num_latents=M, k=K, num_experts=E, stop=True),
    "switch_refit": SwitchRefitSAE.Config(num_latents=M, k=K, num_experts=E, shared=S),
    "switch, refit": SwitchSAE.Config(num_latents=M, k=K, num_experts=E, inference="refit"),
    "switch, pursuit": SwitchSAE.Config(num_latents=M, k=K, num_experts=E, inference="pursuit"),
}


def built(config):
    sae = SAES.build(config, D, torch.Generator().manual_seed(1))
    prepare(sae, Rows.of(batch(7, 256)), normalize_activations=True)
    return sae


def batch(seed: int, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * 2 + torch.linspace(-1, 1, D)


class Waits(TorchDispatchMode):
    """Names of operators that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique", "_unique2"):
            self.seen.append(name)
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.seen.append("index by a mask")
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_training_steps_equal_those_of_pytorch(name):
    config, why = CONFIGS[name], "the Triton kernels train encoders"
    if hasattr(config, "coherence"):  # a loss that their own kernels do not know: autograd trains them, and kernels search
        config, why = replace(config, coherence=0.01), "the Triton kernels know no loss of coherence"
    by_torch, by_triton = built(config), built(config)
    plain, fast = (
        Trainer(sae, TrainerConfig(lr=1e-3), total_steps=2, batch_size=T, execution=execution)
        for sae, execution in ((by_torch, Execution()), (by_triton, EXACT))
    )
    assert plain.choice == (search_plan(by_torch) if by_torch.inference is Inference.pursuit else "") and not searched_by(by_torch).is_triton
    assert why in fast.choice
    assert fast.choice.endswith(f"; {by_torch.inference.name} in Triton kernels")
    for step in range(2):
        expected, found = (trainer.step(Rows.of(batch(step))) for trainer in (plain, fast))
        torch.testing.assert_close(found.terms["mse"], expected.terms["mse"], rtol=1e-4, atol=1e-4)
        assert found.outcome.active() == expected.outcome.active()
    for key, weight in by_torch.state_dict().items():
        torch.testing.assert_close(by_triton.state_dict()[key], weight, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["switch_pursuit", "switch_pursuit, stop"])
def test_the_host_waits_for_nothing_in_a_search(name):
    sae = built(CONFIGS[name])
    sae.search = EXACT
    x_TD, gram_ECP = sae._scaled(batch(0)), sae.grams.current(sae.W_dec_MD, E, sae.num_shared)
    dispatch = Dispatch(sae.route(batch(0))[1].expert_TS, E)
    with Waits() as fast:
        sae._find(x_TD, dispatch, gram_ECP)
    assert fast.seen == [] and not dispatch.known, "kernels sort for themselves"
    sae.search = Execution()
    with Waits() as plain:
        sae._find(x_TD, dispatch, gram_ECP)
    assert plain.seen, "the PyTorch form waits; if it does not, this test sees nothing"


def test_the_host_waits_for_nothing_in_a_refit():
    sae, count_N = built(CONFIGS["switch_refit"]), torch.full((T,), K)
    latent_P, gram_ECP = torch.arange(K).repeat(T), sae.grams.current(sae.W_dec_MD, E, S)
    sae.search = EXACT
    with Waits() as fast:
        refit_pairs(sae, batch(0), count_N, latent_P, torch.zeros(T, dtype=torch.int64), gram_ECP, K)
    assert fast.seen == []


def test_the_plan_says_who_searches_and_why(monkeypatch):
    monkeypatch.setenv(NUMBA_SWITCH, "0")
    long = {"num_latents": 1024, "num_experts": 2}
    plans = {
        search_plan(built(config)) if sae is None else search_plan(sae(built(config)))
        for config, sae in [
            (CONFIGS["switch_pursuit"], None),
            (CONFIGS["switch_pursuit"], with_search),
            (SwitchPursuitSAE.Config(k=40, stop=True, **long), with_search),
            (SwitchRefitSAE.Config(k=40, **long), with_search),
            (TopKSAE.Config(num_latents=M, k=K, inference="refit"), with_search),
            (SwitchSAE.Config(num_latents=M, k=K, num_experts=E, experts_per_token=2, inference="refit"), with_search),
            (ReLUSAE.Config(num_latents=M, inference="pursuit"), with_search),
            (BatchTopKSAE.Config(num_latents=M, k=33, inference="pursuit"), with_search),
            (PursuitSAE.Config(num_latents=8193, k=K), with_search),
            (CONFIGS["switch, refit"], lambda sae: with_search(sae.double())),
        ]
    }
    assert plans == {
        "pursuit in PyTorch (the backend is torch (default); SWITCH_KERNELS_NUMBA=0)",
        "pursuit in Triton kernels",
        "pursuit in PyTorch (a token may take 80 latents, and the kernels hold 64; SWITCH_KERNELS_NUMBA=0)",
        "refit in PyTorch (a token may take 80 latents, and the kernels hold 64)",
        "refit in PyTorch (the kernels refit from the Gram matrix of a token's one expert)",
        "pursuit in PyTorch (nothing bounds how many latents a token takes; SWITCH_KERNELS_NUMBA=0)",
        "pursuit in PyTorch (a token may take 66 latents, and the kernels hold 64; SWITCH_KERNELS_NUMBA=0)",
        "pursuit in PyTorch (a token may choose from 8224 latents, and the kernels hold 8192; SWITCH_KERNELS_NUMBA=0)",
        "refit in PyTorch (the kernels take float32, not float64)",
    }
    assert why_not_in_kernels(EXACT, torch.float32, 64, 8192) is None
    encodes = built(SwitchSAE.Config(num_latents=M, k=K, num_experts=E))
    choice = Trainer(encodes, TrainerConfig(lr=1e-3), total_steps=2, batch_size=T, execution=EXACT).choice
    assert encodes.search is EXACT and " in Triton kernels" not in choice and " in PyTorch" not in choice


def with_search(sae):
    sae.search = EXACT
    return sae


@pytest.mark.parametrize("way", [Inference.refit, Inference.pursuit])
def test_what_the_kernels_cannot_hold_pytorch_computes(way, monkeypatch):
    """With one latent less than the SAE may take as their limit: no kernel is launched, and not a bit differs from PyTorch's."""
    config = replace(CONFIGS["switch, refit"], inference=way)
    plain, limited = built(config), with_search(built(config))
    assert search_plan(limited).endswith("in Triton kernels")
    found = limited(batch(0)).latents.to_dense()
    torch.testing.assert_close(found, plain(batch(0)).latents.to_dense(), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("switch_kernels.pursuit.MOST_LATENTS", K - 1)
    monkeypatch.setattr(kernels, "_warps", lambda *_: pytest.fail("a kernel was launched"))
    assert "the kernels hold 3" in search_plan(limited)
    limited(batch(0))

"""Gathered decoding, its loss and its gradients against float64 autograd."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu.launch import round_up
from switch_kernels.gpu.sparse import TokenLoss, decode_loss, sparse_decode

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF_ULP = torch.finfo(torch.bfloat16).eps / 2


@dataclass
class Problem:
    """K latents of M for each of T tokens, S slots; every third value is 0 and no latent is active twice in a token."""

    values_TK: Tensor
    indices_TK: Tensor
    slot_TK: Tensor | None
    gate_TS: Tensor | None
    W_MD: Tensor
    D: int
    b_pre_D: Tensor
    x_TD: Tensor
    scale: Tensor

    def slots(self) -> Tensor:
        T, K = self.values_TK.shape
        assert self.gate_TS is not None
        return self.slot_TK.long() if self.slot_TK is not None else (torch.arange(K) // (K // self.gate_TS.shape[1])).expand(T, K)

    def run(self, order_N: Tensor | None = None, grad_scale: float = 0.3) -> TokenLoss:
        return decode_loss(
            self.values_TK, self.indices_TK, self.slot_TK, self.gate_TS, self.W_MD, self.D, self.b_pre_D, self.x_TD, self.scale, grad_scale, order_N
        )


def make_problem(
    T: int, D: int, M: int, K: int, S: int = 1, slot: str = "neighbours", dtype: torch.dtype = torch.float32, gates: bool = True
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    values_TK = torch.rand(T, K, generator=generator) + 0.1
    values_TK[:, 2::3] = 0
    W_MD = torch.randn(M, round_up(D, 8), generator=generator)
    W_MD[:, D:] = float("nan")
    return Problem(
        values_TK=values_TK.to(dtype),
        indices_TK=torch.rand(T, M, generator=generator).topk(K).indices.int(),
        slot_TK=torch.randint(0, S, (T, K), generator=generator, dtype=torch.int32) if slot == "given" else None,
        gate_TS=torch.rand(T, S, generator=generator) + 0.1 if gates else None,
        W_MD=(W_MD / D**0.5).to(dtype),
        D=D,
        b_pre_D=torch.randn(D, generator=generator),
        x_TD=torch.randn(T, D, generator=generator),
        scale=torch.tensor(1.7),
    )


def check(problem: Problem, loss: TokenLoss, grad_scale: float = 0.3) -> None:
    """Against autograd of grad_scale / 2 * sum of squared errors."""
    p, D = problem, problem.D
    values_TK = p.values_TK.double().requires_grad_()
    gate_TS = (p.gate_TS if p.gate_TS is not None else torch.ones(p.x_TD.shape[0], 1)).double().requires_grad_()
    slots_TK = p.slots() if p.gate_TS is not None else torch.zeros_like(p.indices_TK, dtype=torch.int64)
    weights_TK = values_TK * gate_TS.gather(1, slots_TK)
    recon_TD = (weights_TK[:, :, None] * p.W_MD[p.indices_TK.long(), :D].double()).sum(1) + p.b_pre_D
    error_TD = recon_TD - p.x_TD.double() * p.scale
    (grad_scale / 2 * error_TD.square().sum()).backward()
    assert values_TK.grad is not None and gate_TS.grad is not None
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(loss.loss_T.double(), error_TD.square().sum(1).detach(), **close)
    torch.testing.assert_close(loss.weights_TK.double(), weights_TK.detach(), **close)
    torch.testing.assert_close(loss.grad_pre_TK.double(), torch.where(p.values_TK > 0, values_TK.grad, 0.0), **close)
    assert loss.grad_TD.dtype == p.W_MD.dtype
    low = p.W_MD.dtype == torch.bfloat16
    torch.testing.assert_close(loss.grad_TD[:, :D].double(), grad_scale * error_TD.detach(), atol=1e-5, rtol=1.01 * HALF_ULP if low else 1e-5)
    assert (loss.grad_TD[:, D:] == 0).all()
    if p.gate_TS is None:
        assert loss.grad_gate_TS is None
    else:
        assert loss.grad_gate_TS is not None
        torch.testing.assert_close(loss.grad_gate_TS.double(), gate_TS.grad, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "D", "M", "K", "S", "slot"),
    [
        (1, 7, 3, 1, 1, "neighbours"),
        (5, 33, 40, 5, 1, "neighbours"),
        (3, 128, 200, 32, 1, "neighbours"),
        (4, 200, 300, 100, 1, "neighbours"),
        (6, 40, 64, 12, 3, "neighbours"),
        (6, 33, 64, 11, 2, "given"),
    ],
)
def test_decode_loss_equals_autograd(T: int, D: int, M: int, K: int, S: int, slot: str, dtype: torch.dtype) -> None:
    problem = make_problem(T, D, M, K, S, slot, dtype)
    check(problem, problem.run())


def test_without_gates() -> None:
    problem = make_problem(4, 24, 32, 6, gates=False)
    check(problem, problem.run())


def test_inputs_in_bfloat16() -> None:
    problem = make_problem(4, 24, 32, 6, dtype=torch.bfloat16)
    problem.x_TD = problem.x_TD.bfloat16()
    check(problem, problem.run())


def test_the_order_of_programs_does_not_change_results() -> None:
    problem = make_problem(9, 40, 64, 6)
    order_N = torch.full((70,), -1, dtype=torch.int32)
    order_N[torch.randperm(70, generator=torch.Generator().manual_seed(1))[:9]] = torch.randperm(9).int()
    plain, ordered = problem.run(), problem.run(order_N)
    check(problem, ordered)
    for name in ("grad_TD", "weights_TK", "grad_pre_TK", "grad_gate_TS", "loss_T"):
        assert torch.equal(getattr(plain, name), getattr(ordered, name))


def test_rows_without_a_value_are_not_read() -> None:
    problem = make_problem(5, 24, 200, 6)
    silent = torch.tensor([2, 5])  # values there are 0
    only_silent = ~torch.isin(torch.arange(200), problem.indices_TK[:, [0, 1, 3, 4]].flatten())
    expected = problem.run()
    recon_TD = sparse_decode(problem.values_TK, problem.indices_TK, problem.W_MD, 24)
    assert only_silent[problem.indices_TK[:, silent].long()].any()
    problem.W_MD[only_silent] = float("nan")
    for name in ("grad_TD", "grad_pre_TK", "grad_gate_TS", "loss_T"):
        assert torch.equal(getattr(expected, name), getattr(problem.run(), name))
    assert torch.equal(recon_TD, sparse_decode(problem.values_TK, problem.indices_TK, problem.W_MD, 24))


def test_a_token_without_any_value_reconstructs_the_bias() -> None:
    problem = make_problem(3, 24, 32, 4)
    problem.values_TK[1] = 0
    loss = problem.run()
    check(problem, loss)
    assert (loss.grad_pre_TK[1] == 0).all()


def test_low_precision_errs_at_most_twice_as_much_as_pytorch() -> None:
    problem = make_problem(8, 96, 300, 32, dtype=torch.bfloat16)
    W_TKD = problem.W_MD[problem.indices_TK.long()]
    assert problem.gate_TS is not None

    def gradients(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weights_TK = problem.values_TK.to(dtype) * problem.gate_TS.to(dtype)
        recon_TD = torch.bmm(weights_TK[:, None], W_TKD.to(dtype))[:, 0] + problem.b_pre_D.to(dtype)
        grad_TD = 0.3 * (recon_TD - problem.x_TD.to(dtype) * problem.scale.to(dtype))
        return grad_TD, torch.bmm(W_TKD.to(dtype), grad_TD[:, :, None])[:, :, 0] * problem.gate_TS.to(dtype) * (problem.values_TK > 0)

    truth, theirs, mine = gradients(torch.float64), gradients(torch.bfloat16), problem.run()
    for exact, other, found in zip(truth, theirs, (mine.grad_TD, mine.grad_pre_TK), strict=True):
        assert (found.double() - exact).norm() <= 2 * (other.double() - exact).norm()


def test_twice_the_same_bits() -> None:
    problem = make_problem(5, 33, 40, 5, dtype=torch.bfloat16)
    first, second = problem.run(), problem.run()
    for name in ("grad_TD", "weights_TK", "grad_pre_TK", "grad_gate_TS", "loss_T"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    ("T", "D", "K", "values", "weights", "indices"),
    [
        (1, 7, 1, torch.float32, torch.float32, torch.int64),
        (5, 33, 5, torch.bfloat16, torch.bfloat16, torch.int32),
        (3, 130, 32, torch.float32, torch.bfloat16, torch.int64),
        (3, 300, 100, torch.float32, torch.float32, torch.int32),
    ],
)
def test_sparse_decode(T: int, D: int, K: int, values: torch.dtype, weights: torch.dtype, indices: torch.dtype) -> None:
    problem = make_problem(T, D, 3 * K, K, dtype=weights)
    values_TK = (problem.values_TK - 0.4 * (problem.values_TK > 0)).to(values)  # negative ones too
    found_TD = sparse_decode(values_TK, problem.indices_TK.to(indices), problem.W_MD, D)
    expected_TD = (values_TK.double()[:, :, None] * problem.W_MD[problem.indices_TK.long(), :D].double()).sum(1)
    torch.testing.assert_close(found_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    problem = make_problem(3, 24, 32, 5, S=2, slot="given")
    with pytest.raises(ValueError, match="one slot"):
        problem.run(torch.zeros(64, dtype=torch.int32))
    problem.slot_TK = None
    with pytest.raises(ValueError, match="slot_TK"):
        problem.run()

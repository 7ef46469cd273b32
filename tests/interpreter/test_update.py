"""The optimiser's kernels against torch.optim.Adam, and the rounding of bfloat16 moments."""

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu.launch import round_up
from switch_kernels.gpu.update import MatrixState, row_sum_parts, update_rows_
from switch_kernels.gpu.update_small import Schedule, SmallState, begin_update_, update_small_

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LR, BETAS = 1e-2, (0.9, 0.999)


def hyper(step: int, clip: float = float("inf"), lr: float = LR) -> Tensor:
    return torch.tensor([lr, *BETAS, 1 / (1 - BETAS[0] ** step), 1 / (1 - BETAS[1] ** step), clip])


def make_state(M: int, D: int, unit_norm: bool, moments: torch.dtype = torch.float32, operand: torch.dtype | None = torch.bfloat16) -> MatrixState:
    weight_MD = torch.nn.functional.normalize(torch.randn(M, D, generator=torch.Generator().manual_seed(0)), dim=1)
    copy = torch.zeros(M, round_up(D, 8), dtype=operand) if operand is not None else None
    return MatrixState(weight_MD, torch.zeros(M, D, dtype=moments), torch.zeros(M, D, dtype=moments), copy, unit_norm)


def gradients(M: int, D: int, steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drift_MD = torch.randn(M, D, generator=generator)
    return [(drift_MD + torch.randn(M, D, generator=generator)).to(dtype) for _ in range(steps)]


def torch_steps(weight_MD: Tensor, grads: list[Tensor], unit_norm: bool, clip: float) -> Tensor:
    """Clip, projection, Adam, unit norm, in float64."""
    parameter = torch.nn.Parameter(weight_MD.double())
    optimizer = torch.optim.Adam([parameter], lr=LR, betas=BETAS)
    for grad_MD in grads:
        parameter.grad = grad_MD.double()
        torch.nn.utils.clip_grad_norm_([parameter], clip)
        if unit_norm:
            parameter.grad -= (parameter.grad * parameter.data).sum(1, keepdim=True) * parameter.data
        optimizer.step()
        if unit_norm:
            parameter.data /= parameter.data.norm(dim=1, keepdim=True)
    return parameter.data


@pytest.mark.parametrize(
    ("M", "D", "unit_norm", "clip", "grad_dtype"),
    [
        (5, 7, True, 0.5, torch.float32),
        (4, 33, False, 0.5, torch.bfloat16),
        (9, 200, True, 1e9, torch.bfloat16),
        (3, 768, True, 0.5, torch.float32),
        (1, 1, False, 0.5, torch.float32),
        (2, 1100, True, 0.5, torch.float32),
    ],
)
def test_update_rows_is_clipped_projected_adam(M: int, D: int, unit_norm: bool, clip: float, grad_dtype: torch.dtype) -> None:
    state, grads = make_state(M, D, unit_norm), gradients(M, D, 4, grad_dtype)
    expected_MD = torch_steps(state.weight_MD, grads, unit_norm, clip)
    for step, grad_MD in enumerate(grads, 1):
        update_rows_(state, grad_MD, hyper(step, clip), grad_MD.float().square().sum())
    torch.testing.assert_close(state.weight_MD.double(), expected_MD, atol=1e-6, rtol=1e-5)
    assert state.operand_MD is not None
    assert torch.equal(state.operand_MD[:, :D], state.weight_MD.bfloat16())
    assert (state.operand_MD[:, D:] == 0).all()


def test_a_float32_operand_or_none() -> None:
    grad_MD = gradients(4, 33, 1)[0]
    padded, alone = make_state(4, 33, True, operand=torch.float32), make_state(4, 33, True, operand=None)
    for state in (padded, alone):
        update_rows_(state, grad_MD, hyper(1), torch.tensor(1.0))
    assert padded.operand_MD is not None
    assert torch.equal(padded.operand_MD[:, :33], padded.weight_MD) and (padded.operand_MD[:, 33:] == 0).all()
    assert torch.equal(padded.weight_MD, alone.weight_MD)


def test_small_parameters_are_updated_by_adam_all_at_once() -> None:
    """Sizes on both sides of a program's block, all clipped by one norm."""
    shapes = [(3, 411), (1,), (1024,), (1025,)]
    generator = torch.Generator().manual_seed(2)
    weights, *grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    flat = [torch.cat([grad.flatten() for grad in step]) for step in grads]
    expected = torch_steps(torch.cat([weight.flatten() for weight in weights])[None], [step[None] for step in flat], unit_norm=False, clip=2.0)
    moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in weights]
    for step in range(3):
        states = [SmallState(*tensors) for tensors in zip(weights, *zip(*moments, strict=True), grads[step], strict=True)]
        update_small_(states, hyper(step + 1, 2.0), flat[step].square().sum())
    torch.testing.assert_close(torch.cat([weight.flatten() for weight in weights])[None].double(), expected, atol=1e-6, rtol=1e-5)


def test_small_parameters_say_what_is_wrong_with_their_state() -> None:
    w = torch.zeros(4)
    with pytest.raises(ValueError, match=r"grad has shape \(5,\): it must be contiguous and have the weight's, \(4,\)"):
        update_small_([SmallState(w, w.clone(), w.clone(), torch.zeros(5))], hyper(1), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"exp_avg is torch\.bfloat16: small parameters keep float32 state"):
        update_small_([SmallState(w, w.bfloat16(), w.clone(), w.clone())], hyper(1), torch.tensor(1.0))


def test_every_update_moves_the_schedule_on_and_a_norm_of_nan_stays() -> None:
    rows = torch.arange(18.0).view(3, 6)
    schedule = Schedule(rows, torch.zeros(1, dtype=torch.int64), torch.tensor([7], dtype=torch.int32), torch.zeros(()))
    worst = []
    for step, square in enumerate((9.0, 4.0, 16.0, float("nan"), 1.0)):
        hyper_H, norm = begin_update_(schedule, torch.tensor(square))
        assert torch.equal(hyper_H, rows[min(step, 2)])  # past the last row: the last
        torch.testing.assert_close(norm, torch.tensor(square).sqrt(), equal_nan=True)
        assert schedule.position.item() == step + 1 and schedule.seed.item() == 8 + step
        worst.append(schedule.worst_norm.item())
    assert worst == pytest.approx([3, 3, 4, float("nan"), float("nan")], nan_ok=True)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_changes_nothing(norm: float) -> None:
    state, grad_MD = make_state(3, 20, True), torch.full((3, 20), float("nan"))
    before = [tensor.clone() for tensor in (state.weight_MD, state.exp_avg, state.exp_avg_sq)]
    update_rows_(state, grad_MD, hyper(1, 1.0), torch.tensor(norm))
    update_small_([SmallState(state.weight_MD, state.exp_avg, state.exp_avg_sq, grad_MD)], hyper(1, 1.0), torch.tensor(norm))
    for tensor, old in zip((state.weight_MD, state.exp_avg, state.exp_avg_sq), before, strict=True):
        assert torch.equal(tensor, old)


def test_latents_without_gradient_and_rows_of_zeros_stay_finite() -> None:
    state = make_state(4, 16, True)
    state.weight_MD[1] = 0
    before_MD = state.weight_MD.clone()
    update_rows_(state, torch.zeros(4, 16), hyper(1, 1.0), torch.tensor(0.0))
    torch.testing.assert_close(state.weight_MD, before_MD)


def test_twice_the_same_bits() -> None:
    results = []
    for _ in range(2):
        state = make_state(6, 40, True, torch.bfloat16)
        for step, grad_MD in enumerate(gradients(6, 40, 2), 1):
            update_rows_(state, grad_MD, hyper(step, 1.0), grad_MD.square().sum(), torch.tensor([step], dtype=torch.int32))
        results.append((state.weight_MD, state.exp_avg, state.exp_avg_sq, state.operand_MD))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def second_moment(start: float, gradient: float, steps: int, D: int, seed: int = 0) -> tuple[Tensor, float]:
    """A bfloat16 exp_avg_sq after `steps` updates at a constant gradient, and what it would be in exact arithmetic."""
    state = make_state(1, D, False, torch.bfloat16, operand=None)
    state.exp_avg_sq.fill_(start)
    grad_MD, total = torch.full((1, D), gradient), torch.tensor(1.0)
    for step in range(steps):
        update_rows_(state, grad_MD, hyper(1000), total, torch.tensor([seed + step], dtype=torch.int32))
    decay = BETAS[1] ** steps
    return state.exp_avg_sq.float(), start * decay + gradient**2 * (1 - decay)


def test_tiny_updates_of_a_bfloat16_second_moment_are_not_lost() -> None:
    found_MD, exact = second_moment(start=1.0, gradient=2**0.5, steps=150, D=64)
    # rounding to nearest stays at 1: the first change is 0.001, half a unit in the last place 0.0039
    assert exact == pytest.approx(1.139, abs=0.001)
    assert found_MD.mean().item() == pytest.approx(exact, abs=0.02)  # 5 sigma: 150 roundings by up to 0.0078, 64 walks


def test_stochastic_rounding_is_unbiased_and_takes_both_neighbours() -> None:
    found_MD, exact = second_moment(start=1.0, gradient=2.0, steps=1, D=6000)
    below, above = 1.0, 1.0 + 2**-7
    assert set(found_MD.unique().tolist()) == {below, above}
    share = (exact - below) / (above - below)
    sigma = (share * (1 - share) / 6000) ** 0.5
    assert (found_MD == above).double().mean().item() == pytest.approx(share, abs=4 * sigma)


def test_rounding_differs_between_steps_rows_and_columns() -> None:
    def ups(seed: int) -> Tensor:
        state = make_state(16, 300, False, torch.bfloat16, operand=None)
        state.exp_avg_sq.fill_(1.0)
        update_rows_(state, torch.full((16, 300), 2.0), hyper(1), torch.tensor(1.0), torch.tensor([seed], dtype=torch.int32))
        return (state.exp_avg_sq > 1).double()

    one, two = ups(1), ups(2)
    spread = one.var() * 300**0.5 / 16  # of a product of centred, independent draws, generously
    for left, right in ((one, two), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, 128:], one[:, :-128])):
        assert ((left - left.mean()) * (right - right.mean())).mean().abs() < spread


def test_bfloat16_moments_without_a_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="step_seed"):
        update_rows_(make_state(2, 8, False, torch.bfloat16), torch.zeros(2, 8), hyper(1), torch.tensor(1.0))


@pytest.mark.parametrize(("M", "D", "dtype"), [(1, 7, torch.float32), (300, 33, torch.bfloat16), (257, 260, torch.float32)])
@pytest.mark.parametrize("weighted", [True, False])
def test_sums_of_rows(M: int, D: int, dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weights_M = torch.randn(M, generator=generator)
    W_MD = torch.randn(M, round_up(D, 8), generator=generator).to(dtype)
    W_MD[:, D:] = float("nan")
    if weighted:
        weights_M[1::3], W_MD[1::3] = 0, float("nan")
    else:
        weights_M.fill_(1)
    expected_D = -2 * (weights_M.double() @ W_MD[:, :D].double().nan_to_num())
    parts_PD = row_sum_parts(W_MD, D, weights_M if weighted else None, -2.0)
    torch.testing.assert_close(parts_PD.double().sum(0), expected_D, atol=1e-5, rtol=1e-5)
    assert torch.equal(parts_PD, row_sum_parts(W_MD, D, weights_M if weighted else None, -2.0))

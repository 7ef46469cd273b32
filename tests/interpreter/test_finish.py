"""Partial sums that become small gradients, loss terms and a norm."""

import pytest
import torch

from switch_kernels.gpu.finish import CHUNK, Balance, Columns, finish

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gradients_terms_and_the_norm_are_sums_of_their_parts() -> None:
    """Strips of one row and of many, widths on both sides of a strip's, lists on both sides of a chunk's length."""
    columns = {
        "many rows": Columns((70,), normal(19, 70)),
        "one row": Columns((5, 401), normal(5, 401, seed=1)),
        "two sources": Columns((33,), normal(40, 33, seed=2), normal(3, 33, seed=3)),
        "one row each": Columns((1030,), normal(1030, seed=4), normal(1030, seed=5)),
    }
    squares = (normal(CHUNK + 1, seed=6).abs(), normal(7, 3, 2, seed=7).abs())
    errors, prob_sums_BE, counts_E = normal(CHUNK, seed=8).abs(), normal(900, 5, seed=9).abs(), torch.tensor([3, 0, 1, 9, 2], dtype=torch.int32)
    done = finish(columns, squares, errors, 20, Balance(prob_sums_BE, counts_E, 0.25))
    close = {"atol": 1e-5, "rtol": 1e-5}
    square = sum(part.double().sum() for part in squares)
    for name, column in columns.items():
        expected = sum(part.double().view(-1, column.width).sum(0) for part in (column.parts_PW, column.more_PW) if part is not None)
        torch.testing.assert_close(done.gradients[name].double(), expected.view(column.shape), **close)
        square += expected.square().sum()
    torch.testing.assert_close(done.square.double(), square, **close)
    torch.testing.assert_close(done.squared_error.double(), errors.double().sum(), **close)
    torch.testing.assert_close(done.mse.double(), errors.double().sum() / 20, **close)
    torch.testing.assert_close(done.load_balance.double(), 0.25 * (counts_E.double() * prob_sums_BE.double().sum(0)).sum(), **close)
    again = finish(columns, squares, errors, 20, Balance(prob_sums_BE, counts_E, 0.25))
    assert all(torch.equal(gradient, again.gradients[name]) for name, gradient in done.gradients.items())
    assert torch.equal(done.square, again.square)


def test_without_a_router_there_is_no_balance_and_a_nan_reaches_the_norm() -> None:
    done = finish({"b": Columns((3,), torch.tensor([1.0, float("nan"), 2.0]))}, (torch.ones(2),), torch.ones(4), 2)
    assert done.square.isnan() and done.load_balance == 0 and done.mse == 2

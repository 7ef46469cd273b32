"""Each repair of Triton's interpreter does its work: without these, the tests of the kernels would prove nothing."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_products_of_bfloat16_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in "ab")
    out = torch.empty(32, 32)
    _product[(1,)](a, b, out, 32)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), atol=1e-5, rtol=1e-5)


@triton.jit
def _double_sum(x, out, N: tl.constexpr, CAST: tl.constexpr, SUM: tl.constexpr):
    value = tl.load(x + tl.arange(0, N))
    if CAST:
        value = value.to(tl.float32)
    tl.store(out, tl.sum(value) if SUM else tl.max(value * 2))


@pytest.mark.parametrize("as_sum", [True, False])
def test_arithmetic_on_bfloat16_is_refused(as_sum: bool) -> None:
    x, out = torch.linspace(-3, 2, 8).bfloat16(), torch.empty(1)
    _double_sum[(1,)](x, out, 8, True, as_sum)
    assert out.item() == (x.float().sum() if as_sum else 4)
    with pytest.raises(InterpreterError, match="Cast to float32"):
        _double_sum[(1,)](x, out, 8, False, as_sum)


@triton.jit
def _masked(x, out, n, N: tl.constexpr, OTHER: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i, mask=i < n, other=OTHER) if OTHER is not None else tl.load(x + i, mask=i < n)
    tl.store(out + i, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_a_masked_load_without_other_is_poisoned(dtype: torch.dtype) -> None:
    x, out = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    _masked[(1,)](x, out, 5, 8, None)
    poisoned = out.isnan() if dtype.is_floating_point else out == torch.iinfo(dtype).max
    assert poisoned.tolist() == [False] * 5 + [True] * 3
    _masked[(1,)](x, out, 5, 8, 0)
    assert out.tolist() == [1] * 5 + [0] * 3


@triton.jit
def _sum_between(bounds, x, out, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.load(bounds), tl.load(bounds + 1), BLOCK):
        total += tl.load(x + start + tl.arange(0, BLOCK))
    tl.store(out, tl.sum(total))


def test_loops_over_bounds_read_from_memory() -> None:
    x, out = torch.arange(32.0), torch.empty(1)
    for low, high in ((0, 32), (8, 24), (8, 8)):
        _sum_between[(1,)](torch.tensor([low, high], dtype=torch.int32), x, out, 4)
        assert out.item() == x[low:high].sum()


@triton.jit
def _sorted(x, out, best, N: tl.constexpr, K: tl.constexpr):
    i, j = tl.arange(0, N), tl.arange(0, K)
    row = tl.arange(0, 2)[:, None]
    keys = tl.load(x + row * N + i[None, :])
    tl.store(out + row * N + i[None, :], tl.sort(keys, descending=True))
    tl.store(best + row * K + j[None, :], tl.topk(keys, K))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_sort_like_torch(dtype: torch.dtype) -> None:
    x = torch.randint(-50, 50, (2, 64), generator=torch.Generator().manual_seed(0), dtype=dtype)
    out, best = torch.empty_like(x), torch.empty(2, 8, dtype=dtype)
    _sorted[(1,)](x, out, best, 64, 8)
    assert torch.equal(out, x.sort(descending=True).values)
    assert torch.equal(best, out[:, :8])


@triton.jit
def _to_bf16(x, out, N: tl.constexpr):
    tl.store(out, tl.full([], 1.5, tl.bfloat16))
    tl.store(out + 1 + tl.arange(0, N), tl.load(x + tl.arange(0, N)).to(tl.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_conversions_to_bfloat16_round_like_torch(dtype: torch.dtype) -> None:
    x = (torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1000).to(dtype)
    if dtype == torch.float32:
        x[:8] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])
    out = torch.empty(65, dtype=torch.bfloat16)
    _to_bf16[(1,)](x, out, 64)
    torch.testing.assert_close(out, torch.cat([torch.tensor([1.5]), x.float()]).bfloat16(), atol=0, rtol=0, equal_nan=True)


@triton.jit
def _copy(x, out, write_stride, read_shift, lane_stride: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    program = tl.program_id(0)
    value = tl.load(x + program * N + i + read_shift)
    tl.store(out + program * write_stride + i * lane_stride, value)


def test_accesses_inside_the_arguments_pass() -> None:
    x, out = torch.arange(16.0), torch.zeros(16)
    _copy[(2,)](x, out, 8, 0, 1, 8)
    assert torch.equal(out, x)


def test_storing_one_value_twice_is_no_race() -> None:
    x, out = torch.ones(16), torch.zeros(16)
    _copy[(2,)](x, out, 0, 0, 1, 8)
    _copy[(2,)](x, out, 8, 0, 0, 8)
    assert out.tolist() == [1] * 9 + [0] * 7


@pytest.mark.parametrize(
    ("in_place", "write_stride", "read_shift", "lane_stride", "message"),
    [
        (False, 8, 1, 1, "1 elements outside of the tensors"),
        (False, 8, -1, 1, "1 elements outside of the tensors"),
        (False, 16, 0, 1, "8 elements outside of the tensors"),
        (False, 7, 0, 1, "changes what another program of this launch wrote"),
        (True, 8, -1, 1, "reads what another program of this launch wrote"),
        (True, 8, 1, 1, "changes what another program of this launch read"),
        (False, 8, 0, 0, "different values to one address"),
    ],
)
def test_stray_accesses_and_races_are_seen(in_place: bool, write_stride: int, read_shift: int, lane_stride: int, message: str) -> None:
    x = torch.arange(24.0)[4:20] if in_place else torch.arange(16.0)
    with pytest.raises(InterpreterError, match=message):
        _copy[(2,)](x, x if in_place else torch.zeros(16), write_stride, read_shift, lane_stride, 8)

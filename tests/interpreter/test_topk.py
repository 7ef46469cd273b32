"""Selections against torch.sort, which is stable: every tie must go to the lowest index."""

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu import keep_topk
from switch_kernels.gpu.keep_topk import keep_topk_
from switch_kernels.gpu.launch import cdiv, next_power_of_2, round_up
from switch_kernels.gpu.topk import mark_fired_, select_jointly, select_rows
from switch_kernels.plan import GROUPS, can_select, group_of, searched_columns
from switch_sae.models import SwitchSAE, fused

DTYPES = [torch.float32, torch.bfloat16]


def _values(rows: int, F: int, dtype: torch.dtype, kind: str) -> Tensor:
    """[rows, Fp]: normal; `ties` of few levels, zeros included; `negative`; pad columns are NaN."""
    generator = torch.Generator().manual_seed(rows * 1000 + F)
    z = torch.randn(rows, F, generator=generator)
    if kind == "ties":
        z = (z * 2).round().abs() * z.sign()
        z = torch.where(z == 0, 0.0, z)
    if kind == "negative":
        z = -z.abs() - 0.1
        z[:, ::7] *= -1
    padded = torch.full((rows, round_up(F, 8)), float("nan"))
    padded[:, :F] = z
    return padded.to(dtype)


def _group_max(pre_NF: Tensor, F: int, group: int) -> Tensor:
    groups = cdiv(F, group)
    padded = pre_NF.new_full((len(pre_NF), groups * group), float("-inf"))
    padded[:, :F] = pre_NF[:, :F]
    return padded.view(len(pre_NF), groups, group).amax(2)


def _expected(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = z.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def _check_rows(R: int, F: int, k: int, group: int, dtype: torch.dtype, kind: str) -> None:
    N = R + 3
    pre_NF = _values(N, F, dtype, kind)
    generator = torch.Generator().manual_seed(R)
    row_R = torch.randperm(N, generator=generator)[:R].int()
    expert_TS = torch.randint(0, 5, (R, 1), generator=generator, dtype=torch.int32)
    arguments = (pre_NF, _group_max(pre_NF, F, group), F, group, expert_TS, row_R, k)
    values_RK, indices_RK = select_rows(*arguments)
    values, indices = _expected(pre_NF[row_R.long(), :F], k)
    assert values_RK.dtype == dtype and indices_RK.dtype == torch.int32
    assert torch.equal(values_RK, values.clamp(min=0))
    assert torch.equal(indices_RK.long(), indices + expert_TS.long() * F)
    assert all(torch.equal(a, b) for a, b in zip((values_RK, indices_RK), select_rows(*arguments), strict=True))


@pytest.mark.parametrize("kind", ["normal", "ties", "negative"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("F", "k"), [(1, 1), (5, 5), (33, 1), (33, 33), (50, 3), (64, 8), (129, 12), (300, 32), (300, 256), (1000, 7), (1024, 32)])
def test_select_rows_is_exact(F: int, k: int, dtype: torch.dtype, kind: str, poisoned_memory: None) -> None:
    _check_rows(6, F, k, group_of(F, k), dtype, kind)


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("group", [1, 2, 4, 16, 32])
def test_any_group_gives_the_same_answer(group: int, kind: str, poisoned_memory: None) -> None:
    for dtype in DTYPES:
        _check_rows(4, 333, 5, group, dtype, kind)


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("F", "k"), [(70_001, 20), (30_000, 1500)])
def test_long_rows_and_large_k(F: int, k: int, dtype: torch.dtype, kind: str) -> None:
    _check_rows(1, F, k, group_of(F, k), dtype, kind)
    _check_rows(1, 5001, 300, 1, dtype, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.filterwarnings("ignore:overflow encountered")  # a difference that is infinite has the right sign
def test_numbers_of_every_size_are_told_apart(group: int, dtype: torch.dtype) -> None:
    """Neighbours among the bits, the smallest numbers, both zeros, which are equal, and rows with fewer than k values above 0."""
    largest = torch.finfo(dtype).max
    tiny = 2.0**-133 if dtype == torch.float32 else 2.0**-126  # of smaller ones of bfloat16 the interpreter makes others
    rows = [
        torch.cat([torch.full((200,), -1.0), torch.tensor([tiny, 2 * tiny, 3 * tiny, largest, -largest, 1e-30, 1e30, -tiny])]),
        torch.cat([torch.full((100,), -0.0), torch.full((108,), 0.0)])[torch.arange(208) * 7 % 208],
        torch.linspace(1.0, 1.01, 208),
        -torch.linspace(1.0, 1.01, 208),
        torch.cat([torch.full((9,), float("inf")), torch.full((199,), float("-inf"))]),
        torch.full((208,), largest),
        torch.cat([torch.tensor([1.0, -0.0, 0.0, -0.0]), torch.full((204,), -1.0)]),
    ]
    pre_NF = torch.stack(rows).to(dtype)
    zero = torch.zeros(len(rows), 1, dtype=torch.int32)
    for k in (3, 8, 11):
        values_RK, indices_RK = select_rows(pre_NF, _group_max(pre_NF, 208, group), 208, group, zero, torch.arange(len(rows)).int(), k)
        values, indices = _expected(pre_NF, k)
        assert torch.equal(indices_RK.long(), indices), k
        assert torch.equal(values_RK, values.clamp(min=0)), k


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_stay_visible(dtype: torch.dtype) -> None:
    pre_NF = torch.full((1, 64), -1.0)
    pre_NF[0, 9], pre_NF[0, 20], pre_NF[0, 30], pre_NF[0, 40] = float("nan"), float("inf"), float("-inf"), 2.0
    pre_NF = pre_NF.to(dtype)
    values_RK, indices_RK = select_rows(pre_NF, pre_NF, 64, 1, torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 4)
    assert indices_RK.tolist() == [[9, 20, 40, 0]]
    torch.testing.assert_close(values_RK.float(), torch.tensor([[float("nan"), float("inf"), 2.0, 0.0]]), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nan", [[63], [32], [0], list(range(1, 64, 2)), list(range(7))])
def test_a_nan_that_a_maximum_hides_moves_nothing_out_of_its_row(nan: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind the last row stays as it was."""
    pre_NF = torch.ones(1, 64, dtype=dtype)
    pre_NF[0, nan] = float("nan")
    guarded: list[Tensor] = []
    empty = torch.empty

    def with_guard(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        guarded.append(torch.full((64,), -7, dtype=dtype))
        return guarded[-1][: shape[0] * shape[1]].view(shape)

    for group in (1, 8):
        maxima_NG = pre_NF if group == 1 else _group_max(pre_NF.nan_to_num(float("-inf")), 64, group)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", with_guard)
            values_RK, indices_RK = select_rows(
                pre_NF, maxima_NG, 64, group, torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 2
            )
        assert torch.empty is empty and all((buffer[2:] == -7).all() for buffer in guarded)
        assert values_RK.isnan().any() or group > 1
        assert len(set(indices_RK[0].tolist())) == 2 and indices_RK.max() < 64


def test_group_of_leaves_enough_groups() -> None:
    for F in (1, 7, 33, 256, 1000, 1024, 4096, 16384, 131072, 1 << 20):
        for k in (1, 3, 32, 33, 64, 256):
            group = group_of(F, k)
            assert group in (1, *GROUPS)
            assert group == 1 or cdiv(F, group) >= k
            assert sum(searched_columns(F, k, group)) <= next_power_of_2(F)
            assert can_select(F, k)
    assert [group_of(F, 32) for F in (128, 256, 512, 1024, 4096, 16384, 131072)] == [1, 1, 1, 8, 8, 32, 32]
    assert not can_select((1 << 20) + 1, 32) and not can_select(1 << 20, 1025)


def test_select_rows_says_what_is_wrong() -> None:
    pre_NF, zero = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="k=9 must lie between 1 and the number of latents per expert, 8"):
        select_rows(pre_NF, pre_NF, 8, 1, zero, zero[0], 9)
    with pytest.raises(ValueError, match="group=4 leaves 2 groups of 8 latents; k=3 needs at least as many"):
        select_rows(pre_NF, pre_NF[:, :2], 8, 4, zero, zero[0], 3)
    with pytest.raises(ValueError, match="k=1 of 40000 latents searches 65536 columns at once, and 32768 fit the registers"):
        select_rows(torch.zeros(1, 40000), pre_NF, 40000, 1, zero, zero[0], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "slots", "per_slot", "k"), [(1, 1, 1, 1), (7, 2, 5, 5), (7, 2, 8, 16), (5, 3, 20, 12), (3, 4, 32, 32)])
def test_select_jointly_ranks_by_gate_times_value(T: int, slots: int, per_slot: int, k: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    generator = torch.Generator().manual_seed(k)
    values_RK = torch.randint(0, 4, (T * slots, per_slot), generator=generator).to(dtype)  # zeros and ties
    indices_RK = torch.randint(0, 9999, (T * slots, per_slot), generator=generator, dtype=torch.int32)
    gate_TS = torch.tensor([0.5, 0.25, 0.125, 0.125])[:slots].repeat(T, 1)
    values_TK, indices_TK, slot_TK = select_jointly(values_RK, indices_RK, gate_TS, k)
    candidates = values_RK.view(T, slots * per_slot)
    _, best = _expected(candidates.float() * gate_TS.repeat_interleave(per_slot, 1), k)
    assert torch.equal(values_TK, candidates.gather(1, best))
    assert torch.equal(indices_TK, indices_RK.view(T, -1).gather(1, best))
    assert torch.equal(slot_TK.long(), best // per_slot)
    again = select_jointly(values_RK, indices_RK, gate_TS, k)
    assert all(torch.equal(a, b) for a, b in zip((values_TK, indices_TK, slot_TK), again, strict=True))


def test_select_jointly_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="k=7 must lie between 1 and the candidates of a token, 2 slots x 3"):
        select_jointly(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.ones(1, 2), 7)


def _check_keep(F: int, k: int, dtype: torch.dtype, kind: str, rows: int = 5) -> None:
    z_NF = _values(rows, F, dtype, kind)
    values, indices = _expected(z_NF[:, :F], k)
    expected_NF = torch.zeros_like(z_NF).scatter(1, indices, values.clamp(min=0))
    keep_topk_(z_NF, F, k)
    assert torch.equal(z_NF, expected_NF)


@pytest.mark.parametrize("width", [32, 1024])
@pytest.mark.parametrize("kind", ["normal", "ties", "negative"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("F", "k"), [(1, 1), (5, 5), (33, 7), (129, 48), (300, 120)])
def test_keep_topk_is_exact(F: int, k: int, dtype: torch.dtype, kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep_topk, "KEEP_WIDTH", width)
    _check_keep(F, k, dtype, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_keep_topk_takes_wide_rows(kind: str, dtype: torch.dtype) -> None:
    _check_keep(20_001, 384, dtype, kind, rows=2)


def test_keep_topk_zeroes_padding_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep_topk, "KEEP_WIDTH", 16)
    z_NF = _values(6, 20, torch.float32, "normal")
    expected_NF = z_NF.clone()
    keep_topk_(expected_NF, 20, 4)
    order_N = torch.tensor([3, -1, 0, 1, 2, -1], dtype=torch.int32)
    expected_NF[order_N < 0] = 0
    z_NF[order_N < 0] = float("nan")
    keep_topk_(z_NF, 20, 4, order_N)
    assert torch.equal(z_NF, expected_NF)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_topk_keeps_nan_and_infinity(dtype: torch.dtype) -> None:
    z_NF = torch.tensor([[1.0, float("nan"), 3.0, -0.0, float("-inf"), float("inf"), 2.0, 0.0]]).to(dtype)
    keep_topk_(z_NF, 8, 3)
    torch.testing.assert_close(z_NF.float(), torch.tensor([[0, float("nan"), 3.0, 0, 0, float("inf"), 0, 0]]), equal_nan=True)


def test_of_very_many_dead_latents_the_lowest_of_each_expert_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MOST_DEAD", 64)
    sae = SwitchSAE(SwitchSAE.Config(num_latents=400, k=4, num_experts=2), 16)
    dead_M = torch.ones(400, dtype=torch.bool)
    dead_M[[3, 200]] = False
    dead_M[300:] = False
    dead = sae.dead_latents(dead_M)
    assert dead is not None
    first, second = dead.latent_B.view(2, 64)
    assert first.tolist() == [n for n in range(65) if n != 3] and second.tolist() == list(range(201, 265))
    assert not dead.is_padding_B.any() and int((dead.slot_M >= 0).sum()) == 128
    assert torch.equal(dead.latent_B[dead.slot_M[dead.slot_M >= 0].long()], dead.latent_B)


def test_keep_topk_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="k=9 must lie between 1 and the number of latents per expert, 8"):
        keep_topk_(torch.zeros(1, 8), 8, 9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mark_fired_resets_latents_with_a_positive_value(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    T, k, M = 300, 5, 97
    values_TK = torch.rand(T, k, generator=generator).sub(0.7).clamp(min=0).to(dtype)
    indices_TK = torch.randint(0, M, (T, k), generator=generator, dtype=torch.int32)
    indices_TK[:, 0], values_TK[:, 0] = M - 1, 0
    indices_TK[:, 1:] %= M - 3
    tokens_since_M = torch.randint(0, 1 << 40, (M,), generator=generator)
    expected_M = tokens_since_M + T
    expected_M[indices_TK[values_TK > 0].long()] = 0
    mark_fired_(tokens_since_M, values_TK, indices_TK, T)
    assert torch.equal(tokens_since_M, expected_M)
    assert expected_M[-3:].gt(0).all() and expected_M.eq(0).any()

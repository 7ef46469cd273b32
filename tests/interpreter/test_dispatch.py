"""Expert order against torch.sort, and the gather of rows against indexing."""

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu.dispatch import Sorted, count_experts, gather_rows, num_rows, sort_pairs
from switch_kernels.gpu.launch import ALIGN, cdiv, round_up
from switch_kernels.gpu.route import block_tokens, route


def _experts(T: int, slots: int, E: int, routing: str) -> Tensor:
    generator = torch.Generator().manual_seed(T + E)
    if routing == "one":
        return torch.full((T, slots), E - 1, dtype=torch.int32)
    scores_TE = torch.rand(T, E, generator=generator)
    if routing == "skip":
        scores_TE[:, 0] = -1
    return scores_TE.topk(slots, dim=1).indices.int()


def _check(result: Sorted, expert_TS: Tensor, E: int) -> None:
    expert_R = expert_TS.flatten().long()
    N = num_rows(len(expert_R), E)
    counts_E = torch.bincount(expert_R, minlength=E)
    start_E1 = torch.cat([torch.zeros(1, dtype=torch.int64), ((counts_E + ALIGN - 1) // ALIGN * ALIGN).cumsum(0)])
    order_N = torch.full((N,), -1)
    by_expert = expert_R.argsort(stable=True).split(counts_E.tolist())
    for e in range(E):
        order_N[start_E1[e] : start_E1[e] + counts_E[e]] = by_expert[e]
    assert result.counts_E.tolist() == counts_E.tolist()
    assert result.start_E1.tolist() == start_E1.tolist()
    assert result.order_N.tolist() == order_N.tolist()
    assert order_N[result.row_R.long()].tolist() == list(range(len(expert_R)))
    assert {x.dtype for x in vars(result).values()} == {torch.int32}


@pytest.mark.parametrize("routing", ["random", "one", "skip"])
@pytest.mark.parametrize(
    ("T", "slots", "E"), [(1, 1, 1), (130, 1, 1), (1, 1, 8), (64, 1, 8), (200, 1, 7), (300, 2, 5), (150, 3, 33), (70, 2, 300), (33, 1, 1024)]
)
def test_sort_pairs_is_a_stable_sort(T: int, slots: int, E: int, routing: str, poisoned_memory: None) -> None:
    if routing == "skip" and slots >= E:
        pytest.skip("no expert can be left out")
    expert_TS = _experts(T, slots, E, routing)
    counts_BE = count_experts(expert_TS, E)
    for b, block_TS in enumerate(expert_TS.split(block_tokens(E))):
        assert counts_BE[b].tolist() == torch.bincount(block_TS.flatten(), minlength=E).tolist()
    _check(sort_pairs(expert_TS, counts_BE, E), expert_TS, E)


def test_counts_are_summed_over_more_blocks_than_one_chunk() -> None:
    E = 16  # chunks of 256 blocks
    expert_TS = _experts(block_tokens(E) * 300, 1, E, "random")
    counts_BE = torch.stack([torch.bincount(part.flatten(), minlength=E) for part in expert_TS.split(block_tokens(E))]).int()
    _check(sort_pairs(expert_TS, counts_BE, E), expert_TS, E)


@pytest.mark.parametrize("slots", [1, 2])
def test_the_counts_of_route_serve(slots: int, poisoned_memory: None) -> None:
    x_TD = torch.randn(150, 6, generator=torch.Generator().manual_seed(0))
    routed = route(x_TD, torch.tensor(1.0), torch.eye(6), torch.zeros(6), slots, "ieee")
    assert torch.equal(routed.counts_BE, count_experts(routed.expert_TS, 6))
    _check(sort_pairs(routed.expert_TS, routed.counts_BE, 6), routed.expert_TS, 6)


def test_num_rows_always_suffices() -> None:
    for E in (1, 2, 3, 64, 65):
        for pairs in (1, 63, 64, 65, 1000):
            worst = [pairs // E + (e < pairs % E) for e in range(E)]
            assert sum(round_up(count, ALIGN) for count in worst) <= num_rows(pairs, E)
            ones = [1] * min(E - 1, pairs - 1)
            assert sum(round_up(count, ALIGN) for count in [*ones, pairs - len(ones)]) <= num_rows(pairs, E)
    assert num_rows(100, 1) == 128


def test_counts_of_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counts_BE has shape \(1, 4\); 65 tokens and 4 experts need \(2, 4\)"):
        sort_pairs(torch.zeros(65, 1, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32), 4)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "slots", "E", "D"), [(1, 1, 1, 1), (70, 1, 3, 7), (40, 2, 4, 33), (20, 1, 2, 300)])
def test_gather_rows_centres_and_pads(T: int, slots: int, E: int, D: int, dtype: torch.dtype, x_dtype: torch.dtype, poisoned_memory: None) -> None:
    generator = torch.Generator().manual_seed(D)
    x_TD = torch.randn(T, D, generator=generator).to(x_dtype)
    scale, b_pre_D = torch.tensor(0.3), torch.randn(D, generator=generator)
    expert_TS = _experts(T, slots, E, "random")
    order_N = sort_pairs(expert_TS, count_experts(expert_TS, E), E).order_N
    rows_ND = gather_rows(x_TD, scale, b_pre_D, order_N, slots, dtype)
    expected_ND = torch.zeros(len(order_N), cdiv(D, 8) * 8)
    for n, pair in enumerate(order_N.tolist()):
        if pair >= 0:
            expected_ND[n, :D] = x_TD[pair // slots].float() * scale - b_pre_D
    assert rows_ND.dtype == dtype
    # a fused multiply-add may round once less
    torch.testing.assert_close(rows_ND, expected_ND.to(dtype), atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2)
    assert rows_ND[order_N < 0].eq(0).all() and rows_ND[:, D:].eq(0).all()
    assert torch.equal(rows_ND, gather_rows(x_TD, scale, b_pre_D, order_N, slots, dtype))

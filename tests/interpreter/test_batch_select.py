"""Selection by one threshold for a whole batch, against brute force and against `largest` and `above`; a tie in a row goes to the lowest column."""

import math

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu.batch_missed import encoder_weights, missed_rows
from switch_kernels.gpu.batch_select import keep_above, row_candidates, threshold_
from switch_kernels.gpu.dispatch import Sorted, count_experts, sort_pairs
from switch_kernels.gpu.launch import launches_to
from switch_sae.models.pairs import above, largest

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def sorted_by(expert_T: Tensor, experts: int) -> Sorted:
    return sort_pairs(expert_T[:, None], count_experts(expert_T[:, None], experts), experts)


def experts_of(tokens: int, experts: int) -> Tensor:
    """All but the second expert have tokens."""
    expert_T = torch.randint(0, experts, (tokens,), generator=torch.Generator().manual_seed(tokens)).int()
    return torch.where(expert_T == 1, 0, expert_T)


def pre_activations(tokens: int, columns: int, kind: str) -> Tensor:
    """`ties`: of few levels; `few`: hardly any above 0."""
    pre_TC = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
    if kind == "ties":
        return (2 * pre_TC).round()
    if kind == "few":
        return torch.where(pre_TC > 1.5, pre_TC, -pre_TC.abs())
    if kind == "zero":
        return torch.zeros_like(pre_TC)
    if kind == "wide":  # of many magnitudes, subnormal numbers and infinity too
        return pre_TC.sign() * torch.exp(60 * pre_TC.abs() - 100)
    return pre_TC


def in_rows(of_TC: Tensor, order_N: Tensor, pad: int = 0) -> Tensor:
    """Rows of tokens in the order of experts; padding rows, and `pad` columns behind, hold NaN and large numbers."""
    rows_NC = torch.full((len(order_N), of_TC.shape[1] + pad), torch.nan)
    rows_NC[::2] = 1e9
    rows_NC[order_N >= 0, : of_TC.shape[1]] = of_TC[order_N[order_N >= 0].long()]
    return rows_NC[:, : of_TC.shape[1]]


def candidates_of(pre_TC: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """What `row_candidates` should give, by a stable sort."""
    values_TL, columns_TL = torch.zeros(len(pre_TC), most), torch.zeros(len(pre_TC), most, dtype=torch.int32)
    for t, row in enumerate(pre_TC):
        order = torch.where(row > 0, row, 0.0).sort(descending=True, stable=True).indices[:most]
        columns = order[row[order] > 0].sort().values
        values_TL[t, : len(columns)], columns_TL[t, : len(columns)] = row[columns], columns.int()
    return values_TL, columns_TL


@pytest.mark.parametrize("kind", ["normal", "ties", "few", "zero", "wide"])
@pytest.mark.parametrize(("columns", "most", "pad"), [(40, 5, 3), (33, 1, 0), (17, 17, 7), (9, 12, 0), (1100, 64, 4), (600, 255, 0), (600, 256, 0)])
def test_row_candidates(columns, most, pad, kind):
    tokens, experts = 13, 3
    order_N = sorted_by(experts_of(tokens, experts), experts).order_N
    pre_TC = pre_activations(tokens, columns, kind)
    found = row_candidates(in_rows(pre_TC, order_N, pad), order_N, tokens, most)
    expected = candidates_of(pre_TC, most)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    if kind in ("normal", "wide"):
        assert ((pre_TC > 0).sum(dim=1) > most).any() == (most < columns), "no row has more than `most` above 0: the problem is too easy"


def test_a_row_with_nan_selects_from_the_others():
    pre_TC = pre_activations(6, 40, "normal")
    pre_TC[1, ::3], pre_TC[2] = torch.nan, torch.nan
    pre_TC[3, 5], pre_TC[3, 6], pre_TC[4] = torch.inf, -torch.inf, torch.inf
    found = row_candidates(pre_TC, torch.arange(6, dtype=torch.int32), 6, 7)
    expected = candidates_of(pre_TC.nan_to_num(nan=-1.0, posinf=torch.inf, neginf=-torch.inf), 7)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_row_candidates_says_what_does_not_fit():
    with pytest.raises(ValueError, match="8193 columns of stride 1; at most 8192"):
        row_candidates(torch.zeros(1, 8193), torch.zeros(1, dtype=torch.int32), 1, 4)
    with pytest.raises(ValueError, match="8 columns of stride 2"):
        row_candidates(torch.zeros(1, 16)[:, ::2], torch.zeros(1, dtype=torch.int32), 1, 4)


def smallest_of_largest(values: Tensor, count: int) -> float | None:
    positive = sorted((v for v in values.flatten().tolist() if v > 0), reverse=True)[:count]
    return positive[-1] if positive else None


@pytest.mark.parametrize("kind", ["normal", "ties", "few", "zero", "wide"])
@pytest.mark.parametrize("tokens", [3, 700])
@pytest.mark.parametrize("share", [0.0, 0.2, 2.0])
def test_threshold(kind, tokens, share):
    """Of one number, of some, and of more than there are."""
    values_TL = pre_activations(tokens, 8, kind)
    theta, count = torch.tensor(-3.0), max(1, int(share * values_TL.numel()))
    threshold_(theta, values_TL, count)
    expected = smallest_of_largest(values_TL, count)
    assert theta.item() == (-3.0 if expected is None else expected)


def test_threshold_looks_past_nan_and_at_infinity():
    values_TL = pre_activations(9, 8, "normal")
    values_TL[0], values_TL[1, 1], values_TL[2, 2] = torch.nan, torch.inf, -torch.inf
    for count in (1, 2, 20):
        theta = torch.tensor(0.5)
        threshold_(theta, values_TL, count)
        assert theta.item() == smallest_of_largest(values_TL, count)
    theta = torch.tensor(0.5)
    threshold_(theta, torch.full((4, 8), torch.nan), 3)
    assert theta.item() == 0.5


def test_threshold_of_neighbouring_numbers():
    """Keys that differ in their last digit only, and at the edges of digits."""
    start = torch.tensor([1.0, 1.9999999, 0.00390625]).view(torch.int32)[:, None]
    values_TL = (start + torch.tensor([-129, -128, -1, 0, 1, 127, 128, 255, 256, 32767, 32768])).view(torch.float32)
    for count in range(1, values_TL.numel() + 1):
        theta = torch.tensor(0.0)
        threshold_(theta, values_TL, count)
        assert theta.item() == smallest_of_largest(values_TL, count)


def to_global(columns: Tensor, expert_T: Tensor, shared: int, F: int) -> Tensor:
    return torch.where(columns < shared, columns, columns + F * expert_T[:, None])


@pytest.mark.parametrize("shared", [0, 6])
def test_keep_above(shared):
    tokens, slots, F = 77, 5, 20
    generator = torch.Generator().manual_seed(2)
    values_TL = torch.randint(-1, 4, (tokens, slots), generator=generator).float()
    values_TL[3, 1], values_TL[60, 2] = torch.nan, torch.inf
    columns_TL = torch.randint(0, shared + F, (tokens, slots), generator=generator).int()
    expert_T = experts_of(tokens, 4)
    for bound in (2.0, 0.0, -1.0, math.nan):
        kept_TL, latents_TL, count_T = keep_above(values_TL, columns_TL, torch.tensor(bound), 50, expert_T, shared, F)
        latents = to_global(columns_TL, expert_T, shared, F)
        for t in range(tokens):
            keeps = (values_TL[t] > 0) & ((values_TL[t] >= bound) if t < 50 else (values_TL[t] > bound))
            count = int(keeps.sum())
            assert count_T[t] == count
            assert torch.equal(kept_TL[t, :count], values_TL[t][keeps]) and torch.equal(latents_TL[t, :count], latents[t][keeps])
            assert (kept_TL[t, count:] == 0).all() and (latents_TL[t, count:] == 0).all()
    assert count_T.dtype == latents_TL.dtype == torch.int32


@pytest.mark.parametrize("shared", [0, 6])
@pytest.mark.parametrize(("k", "most"), [(3, 6), (4, 5), (20, 26)])
def test_a_batch_and_its_rivals_take_what_pytorch_selects(k, most, shared):
    """`largest` for the T tokens, then `above` for the rivals', as `SwitchRefitSAE` does."""
    T, rivals, experts, F = 41, 11, 4, 20
    C = shared + F
    expert_T = experts_of(T + rivals, experts)
    pre_TC = pre_activations(T + rivals, C, "normal")
    order_N = sorted_by(expert_T, experts).order_N
    values_TL, columns_TL = row_candidates(in_rows(pre_TC, order_N), order_N, T + rivals, most)
    theta = torch.tensor(0.0)
    threshold_(theta, values_TL[:T], T * k)
    kept_TL, latents_TL, count_T = keep_above(values_TL, columns_TL, theta, T, expert_T, shared, F)
    own_P = largest(pre_TC[:T], T * k, most=most)
    assert theta == pre_TC.flatten()[own_P].min()
    theirs_P = above(pre_TC[T:], theta, most) + T * C
    expected_P = torch.cat([own_P, theirs_P])
    row_P, column_P = expected_P // C, expected_P % C
    used_TL = torch.arange(most) < count_T[:, None]
    assert torch.equal(count_T.long(), torch.bincount(row_P, minlength=T + rivals))
    assert torch.equal(kept_TL[used_TL], pre_TC.flatten()[expected_P])
    latent_P = to_global(column_P[:, None].int(), expert_T[row_P], shared, F)[:, 0]
    assert torch.equal(latents_TL[used_TL], latent_P.int())
    assert len(own_P) == T * k or k == 20


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize(("shared", "F", "by_row"), [(0, 20, True), (6, 20, False), (0, 1100, False)])
def test_missed_rows(dtype, tolerance, shared, F, by_row):
    """Some rows with a tie, with nothing above theta, with NaN."""
    tokens, T, experts, D = 13, 30, 4, 12
    M, C, generator = shared + experts * F, shared + F, torch.Generator().manual_seed(5)
    expert_T, theta = experts_of(T, experts), torch.tensor(1.5)
    left_TC = pre_activations(tokens, C, "normal")
    left_TC[1], left_TC[2, 3], left_TC[4] = 1.5, torch.nan, -torch.inf
    left_TC[5, 7], left_TC[5, 11], left_TC[6, C - 1], left_TC[7, 0] = 9.0, 9.0, 9.0, 9.0
    if F > 1024:
        left_TC[8, 5], left_TC[8, 1030] = 9.0, 9.0
    W_MD, b_M = torch.randn(M, D, generator=generator).to(dtype), torch.randn(M, generator=generator)
    whole, some = sorted_by(expert_T, experts), sorted_by(expert_T[:tokens], experts)
    x_TD = torch.randn(T, D, generator=generator).to(dtype)
    order_N = some.order_N if by_row else whole.order_N
    centred_ND = torch.full((len(order_N), 16), torch.nan, dtype=dtype)
    centred_ND[order_N >= 0, :D] = x_TD[order_N[order_N >= 0].long()]
    latents_TL = torch.full((T, 3), 77, dtype=torch.int32)
    numbers = torch.full((2, T), torch.nan)
    out = (latents_TL[:, 2], numbers[0], numbers[1])
    row_T = None if by_row else whole.row_R
    missed_rows(in_rows(left_TC, some.order_N, 2), some.order_N, tokens, expert_T, theta, centred_ND, row_T, W_MD, b_M, shared, out)
    assert (latents_TL[:, :2] == 77).all()
    found = 0
    for t in range(T):
        latent, value, wanted = (of[t].item() for of in out)
        best = max(left_TC[t].tolist()) if t < tokens and not left_TC[t].isnan().any() else 0.0
        if best <= 1.5:
            assert (latent, value, wanted) == (0, 0, 0)
            continue
        found += 1
        column = left_TC[t].tolist().index(best)
        j = column if column < shared else column + F * int(expert_T[t])
        assert latent == j and wanted == best
        assert abs(value - float(W_MD[j].double() @ x_TD[t].double() + b_M[j].double())) <= tolerance * 10
    assert 4 <= found <= tokens - 3


@pytest.mark.parametrize("slots", [5, 64])
@pytest.mark.parametrize("searched", [0, 17, 450])
def test_encoder_weights(slots, searched):
    T, rivals, missed, generator = 450, 3, 0.7, torch.Generator().manual_seed(6)
    values_TL, refitted_TL = (torch.randn(T + rivals, slots, generator=generator) for _ in range(2))
    count_T = (torch.arange(T + rivals) % (slots + 1)).int()
    unused_TL = torch.arange(slots) >= count_T[:, None]
    values_TL[unused_TL], refitted_TL[unused_TL] = torch.nan, torch.nan
    pairs_2Q = torch.randn(searched, 4, generator=generator).T[1:3]
    pairs_2Q[1, ::3] = 0.0
    values = values_TL[:T].double().masked_fill(unused_TL[:T], 0).requires_grad_()
    value_q, wanted_q = pairs_2Q[0].double().requires_grad_(), pairs_2Q[1].double()
    match = (values - refitted_TL[:T].double().masked_fill(unused_TL[:T], 0)).square().sum() / T
    left_out = missed * (value_q - wanted_q)[wanted_q > 0].square().sum() / max(1, searched)
    (match + left_out).backward()
    weights_TL, losses = encoder_weights(values_TL, refitted_TL, count_T, pairs_2Q[0], pairs_2Q[1], T, missed, searched)
    assert weights_TL.shape == (T, slots + 1)
    torch.testing.assert_close(weights_TL[:, :slots].double(), values.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights_TL[:searched, slots].double(), value_q.grad, rtol=1e-5, atol=1e-7)
    assert (weights_TL[searched:, slots] == 0).all()
    torch.testing.assert_close(losses.double(), torch.stack([match, left_out]).detach(), rtol=1e-5, atol=1e-7)
    assert (losses[1] > 0) == (searched > 0)


def test_launches():
    """A CUDA graph has so many nodes, and one more that sets the state of `threshold_` to 0."""
    seen, numbers = [], torch.zeros(6, 8)
    zeros = torch.zeros(6, dtype=torch.int32)
    with launches_to(lambda launch: seen.append(launch.kernel.fn.__name__)):
        values_TL, columns_TL = row_candidates(numbers, zeros, 6, 4)
        threshold_(numbers[0, 0], values_TL, 12)
        keep_above(values_TL, columns_TL, numbers[0, 0], 6, zeros, 0, 8)
        missed_rows(numbers, zeros, 6, zeros, numbers[0, 0], numbers, None, numbers, numbers[:, 0], 0, (zeros, numbers[:, 1], numbers[:, 2]))
        encoder_weights(values_TL, values_TL, zeros, numbers[:, 1], numbers[:, 2], 6, 1.0, 6)
    digits = ["_count_digits"] * 3
    assert seen == ["_row_candidates", *digits, "_keep_above", "_missed_rows", "_encoder_weights", "_add_losses"]


def test_no_tokens():
    none, numbers = torch.zeros(0, dtype=torch.int32), torch.zeros(0, 8)
    values_TL, columns_TL = row_candidates(numbers, none, 0, 4)
    theta = torch.tensor(0.5)
    threshold_(theta, values_TL, 1)
    kept_TL, latents_TL, count_T = keep_above(values_TL, columns_TL, theta, 0, none, 0, 8)
    assert theta == 0.5 and kept_TL.shape == latents_TL.shape == (0, 4) and count_T.shape == (0,)


def test_more_values_than_can_be_counted_are_refused():
    with pytest.raises(ValueError, match=r"1073741825 values hold too many to count: at most 2\^30"):
        threshold_(torch.zeros(()), torch.empty((1 << 30) + 1, device="meta"), 5)

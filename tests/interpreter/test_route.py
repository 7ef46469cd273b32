"""Routing against PyTorch's softmax, topk and autograd."""

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu.launch import cdiv
from switch_kernels.gpu.route import Routed, block_tokens, route, route_backward


def _inputs(T: int, E: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, E, generator=generator) * 3, torch.tensor(0.7), torch.randn(E, generator=generator)


def _check(routed: Routed, raw_TE: Tensor, scale: Tensor, shift_E: Tensor, slots: int) -> None:
    T, E = raw_TE.shape
    logits_TE = raw_TE.double() * scale - shift_E
    p_TE = logits_TE.softmax(1)
    torch.testing.assert_close(routed.lse_T.double(), logits_TE.logsumexp(1), atol=1e-5, rtol=1e-5)
    experts_TS = routed.expert_TS.long()
    gate_TS, best_TS = p_TE.topk(slots, dim=1)
    torch.testing.assert_close(routed.gate_TS.double(), gate_TS, atol=1e-6, rtol=1e-5)
    assert torch.equal(experts_TS, best_TS)
    block = block_tokens(E)
    assert routed.counts_BE.shape == routed.prob_sums_BE.shape == (cdiv(T, block), E)
    for b in range(cdiv(T, block)):
        rows = slice(b * block, (b + 1) * block)
        assert torch.equal(routed.counts_BE[b].long(), torch.bincount(experts_TS[rows].flatten(), minlength=E))
        torch.testing.assert_close(routed.prob_sums_BE[b].double(), p_TE[rows].sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("T", "E", "slots"),
    [(1, 1, 1), (130, 1, 1), (1, 8, 1), (64, 8, 1), (65, 8, 2), (200, 7, 7), (150, 33, 3), (70, 257, 2), (40, 1000, 1), (33, 1024, 4)],
)
def test_route_is_softmax_and_topk(T: int, E: int, slots: int, poisoned_memory: None) -> None:
    raw_TE, scale, shift_E = _inputs(T, E)
    routed = route(raw_TE, scale, shift_E, slots)
    _check(routed, raw_TE, scale, shift_E, slots)
    again = route(raw_TE, scale, shift_E, slots)
    assert all(torch.equal(a, b) for a, b in zip(vars(routed).values(), vars(again).values(), strict=True))


@pytest.mark.parametrize("E", [5, 8])
def test_equal_probabilities_go_to_the_lowest_experts(E: int) -> None:
    routed = route(torch.zeros(3, E), torch.tensor(1.0), torch.zeros(E), 3)
    assert routed.expert_TS.tolist() == [[0, 1, 2]] * 3
    raw_TE = torch.tensor([0.0, 1, 0, 1, 1] + [-1.0] * (E - 5)).repeat(2, 1)
    assert route(raw_TE, torch.tensor(1.0), torch.zeros(E), 4).expert_TS.tolist() == [[1, 3, 4, 0]] * 2


def test_one_expert_may_take_all_and_others_none(poisoned_memory: None) -> None:
    raw_TE = torch.zeros(100, 8)
    raw_TE[:, 5] = 200.0  # every other probability underflows
    routed = route(raw_TE, torch.tensor(1.0), torch.zeros(8), 1)
    assert routed.counts_BE.tolist() == [[0, 0, 0, 0, 0, 64, 0, 0], [0, 0, 0, 0, 0, 36, 0, 0]]
    assert routed.gate_TS.eq(1).all()


@pytest.mark.parametrize("E", [5, 8])
def test_a_nan_reaches_the_gate_but_never_the_expert_number(E: int) -> None:
    raw_TE = torch.randn(4, E, generator=torch.Generator().manual_seed(0))
    clean = route(raw_TE, torch.tensor(1.0), torch.zeros(E), 2)
    raw_TE[2, 3] = float("nan")
    routed = route(raw_TE, torch.tensor(1.0), torch.zeros(E), 2)
    assert routed.expert_TS.ge(0).all() and routed.expert_TS.lt(E).all()
    assert routed.gate_TS.isnan().any(1).tolist() == [False, False, True, False]
    assert routed.counts_BE.sum() == 8
    for t in (0, 1, 3):
        assert torch.equal(routed.expert_TS[t], clean.expert_TS[t])


def test_route_says_what_is_wrong_with_slots() -> None:
    for slots in (0, 5):
        with pytest.raises(ValueError, match=f"slots={slots} must lie between 1 and the number of experts, 4"):
            route(torch.zeros(2, 4), torch.tensor(1.0), torch.zeros(4), slots)


def test_route_says_what_is_wrong_with_the_number_of_experts() -> None:
    with pytest.raises(ValueError, match="E=4097 experts: one row of logits must fit the registers of a program, 4096 at most"):
        route(torch.zeros(2, 4097), torch.tensor(1.0), torch.zeros(4097), 1)


@pytest.mark.parametrize(("T", "E", "slots"), [(1, 1, 1), (1, 3, 1), (130, 8, 1), (70, 33, 2), (9, 1000, 4)])
def test_the_gradient_is_autograds(T: int, E: int, slots: int, poisoned_memory: None) -> None:
    raw_TE, scale, shift_E = _inputs(T, E, seed=1)
    routed = route(raw_TE, scale, shift_E, slots)
    generator = torch.Generator().manual_seed(2)
    grad_gate_TS, grad_prob_E = torch.randn(T, slots, generator=generator), torch.randn(E, generator=generator)

    logits_TE = (raw_TE.double() * scale - shift_E).requires_grad_()
    p_TE = logits_TE.softmax(1)
    (p_TE.gather(1, routed.expert_TS.long()) * grad_gate_TS).sum().add((p_TE * grad_prob_E).sum()).backward()

    arguments = (raw_TE, scale, shift_E, routed.lse_T, routed.expert_TS, grad_gate_TS, grad_prob_E)
    grad_logits_TE = route_backward(*arguments)
    assert logits_TE.grad is not None
    torch.testing.assert_close(grad_logits_TE.double(), logits_TE.grad, atol=1e-5, rtol=1e-4)
    assert torch.equal(grad_logits_TE, route_backward(*arguments))

"""Routing against PyTorch's softmax, topk and autograd."""

import pytest
import torch
from torch import Tensor

from switch_kernels.gpu.launch import cdiv
from switch_kernels.gpu.route import GateParts, Routed, block_tokens, route, route_backward, router_gradients


def _inputs(T: int, E: int, D: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_TD, scale, W_ED, b_D, of which the logits are (x * scale - b) @ W^T, of standard deviation about 3."""
    generator = torch.Generator().manual_seed(seed)
    x_TD, W_ED, b_D = (torch.randn(shape, generator=generator) for shape in ((T, D), (E, D), (D,)))
    return x_TD * 3, torch.tensor(0.7), W_ED / D**0.5, b_D


def _of_logits(logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations whose logits are these, to the last bit."""
    E = logits_TE.shape[1]
    return logits_TE, torch.tensor(1.0), torch.eye(E), torch.zeros(E)


def _check(routed: Routed, x_TD: Tensor, scale: Tensor, W_ED: Tensor, b_D: Tensor, slots: int) -> None:
    T, E = x_TD.shape[0], W_ED.shape[0]
    logits_TE = (x_TD.double() * scale - b_D) @ W_ED.T.double()
    p_TE = logits_TE.softmax(1)
    torch.testing.assert_close(routed.logits_TE.double(), logits_TE, atol=1e-5, rtol=1e-5)
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
    inputs = _inputs(T, E)
    routed = route(*inputs, slots, "ieee")
    _check(routed, *inputs, slots)
    again = route(*inputs, slots, "ieee")
    assert all(torch.equal(a, b) for a, b in zip(vars(routed).values(), vars(again).values(), strict=True))


@pytest.mark.parametrize("D", [1, 16, 100, 129])
def test_activations_of_any_width_and_in_bfloat16(D: int, poisoned_memory: None) -> None:
    x_TD, *others = _inputs(70, 5, D)
    _check(route(x_TD.bfloat16(), *others, 2, "bf16"), x_TD.bfloat16(), *others, 2)


@pytest.mark.parametrize("E", [5, 8])
def test_equal_probabilities_go_to_the_lowest_experts(E: int) -> None:
    routed = route(*_of_logits(torch.zeros(3, E)), 3, "ieee")
    assert routed.expert_TS.tolist() == [[0, 1, 2]] * 3
    logits_TE = torch.tensor([0.0, 1, 0, 1, 1] + [-1.0] * (E - 5)).repeat(2, 1)
    assert route(*_of_logits(logits_TE), 4, "ieee").expert_TS.tolist() == [[1, 3, 4, 0]] * 2


def test_one_expert_may_take_all_and_others_none(poisoned_memory: None) -> None:
    logits_TE = torch.zeros(100, 8)
    logits_TE[:, 5] = 200.0  # every other probability underflows
    routed = route(*_of_logits(logits_TE), 1, "ieee")
    assert routed.counts_BE.tolist() == [[0, 0, 0, 0, 0, 64, 0, 0], [0, 0, 0, 0, 0, 36, 0, 0]]
    assert routed.gate_TS.eq(1).all()


@pytest.mark.parametrize("E", [5, 8])
def test_a_nan_reaches_the_gate_but_never_the_expert_number(E: int) -> None:
    logits_TE = torch.randn(4, E, generator=torch.Generator().manual_seed(0))
    clean = route(*_of_logits(logits_TE), 2, "ieee")
    logits_TE[2, 3] = float("nan")
    routed = route(*_of_logits(logits_TE), 2, "ieee")
    assert routed.expert_TS.ge(0).all() and routed.expert_TS.lt(E).all()
    assert routed.gate_TS.isnan().any(1).tolist() == [False, False, True, False]
    assert routed.counts_BE.sum() == 8
    for t in (0, 1, 3):
        assert torch.equal(routed.expert_TS[t], clean.expert_TS[t])


def test_route_says_what_is_wrong_with_slots() -> None:
    for slots in (0, 5):
        with pytest.raises(ValueError, match=f"slots={slots} must lie between 1 and the number of experts, 4"):
            route(*_of_logits(torch.zeros(2, 4)), slots, "ieee")


def test_route_says_what_is_wrong_with_the_number_of_experts() -> None:
    with pytest.raises(ValueError, match="E=4097 experts: one row of logits must fit the registers of a program, 4096 at most"):
        route(torch.zeros(2, 8), torch.tensor(1.0), torch.zeros(4097, 8), torch.zeros(8), 1, "ieee")


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(("T", "E", "slots"), [(1, 1, 1), (1, 3, 1), (130, 8, 1), (70, 33, 2), (9, 1000, 4)])
def test_the_gradients_are_autograds(T: int, E: int, slots: int, in_parts: bool, poisoned_memory: None) -> None:
    inputs = _inputs(T, E, seed=1)
    x_TD, scale, W_ED, b_D = inputs
    routed = route(*inputs, slots, "ieee")
    generator = torch.Generator().manual_seed(2)
    grad_gate_TS, counts_E = torch.randn(T, slots, generator=generator), routed.counts_BE.sum(0).int()

    W_leaf, b_leaf = W_ED.double().requires_grad_(), b_D.double().requires_grad_()
    logits_TE = (x_TD.double() * scale - b_leaf) @ W_leaf.T
    logits_TE.retain_grad()
    p_TE = logits_TE.softmax(1)
    (p_TE.gather(1, routed.expert_TS.long()) * grad_gate_TS).sum().add(0.3 * (p_TE * counts_E).sum()).backward()
    assert logits_TE.grad is not None and W_leaf.grad is not None and b_leaf.grad is not None

    grad_gate: Tensor | GateParts = grad_gate_TS
    if in_parts:  # as the dense products leave them: times the gate, in other rows, in several columns
        row_R = torch.randperm(T * slots, generator=generator)
        parts_NP = torch.randn(T * slots, 11, generator=generator)
        parts_NP[row_R] += ((grad_gate_TS * routed.gate_TS).flatten() - parts_NP[row_R].sum(1))[:, None] / 11
        grad_gate = GateParts(parts_NP, row_R.int())
    grad_TE = route_backward(routed, grad_gate, counts_E, 0.3)
    close = {"atol": 2e-5, "rtol": 1e-4} if in_parts else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(grad_TE.double(), logits_TE.grad, **close)
    assert torch.equal(grad_TE, route_backward(routed, grad_gate, counts_E, 0.3))
    W_parts, b_parts = router_gradients(grad_TE, *inputs, "ieee")
    torch.testing.assert_close(W_parts.double().sum(0), W_leaf.grad, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(b_parts.double().sum(0), b_leaf.grad, atol=2e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip((W_parts, b_parts), router_gradients(grad_TE, *inputs, "ieee"), strict=True))


def test_gates_that_have_underflowed_get_no_gradient() -> None:
    logits_TE = torch.tensor([[0.0, -200.0, -300.0]])
    routed = route(*_of_logits(logits_TE), 2, "ieee")
    parts = GateParts(torch.tensor([[0.5, 0.25], [0.0, 0.0]]), torch.tensor([0, 1], dtype=torch.int32))
    assert routed.gate_TS.tolist() == [[1, 0]]
    assert torch.equal(route_backward(routed, parts, torch.zeros(3, dtype=torch.int32), 1.0), torch.zeros(1, 3))

"""The competition of a router in kernels: which rivals are drawn, and what costs say, against PyTorch."""

from dataclasses import replace

import pytest
import torch

from switch_kernels.gpu.launch import cdiv
from switch_kernels.gpu.rivals import compete, draw_rivals
from switch_kernels.gpu.route import Routed, block_tokens, route, route_backward


def routed_of(logits_TE: torch.Tensor) -> Routed:
    E = logits_TE.shape[1]
    return route(logits_TE, torch.tensor(1.0), torch.eye(E), torch.zeros(E), 1, "ieee")


def seed(number: int) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.int32)


def logits(T: int, E: int, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(T)) * scale


@pytest.mark.parametrize(("T", "E", "count"), [(1, 2, 1), (70, 5, 70), (130, 33, 65), (40, 300, 20)])
def test_a_rival_is_another_expert_and_hangs_on_the_seed_alone(T, E, count, poisoned_memory):
    routed = routed_of(logits(T, E))
    rival_n = draw_rivals(routed, count, seed(3))
    assert rival_n.shape == (count,) and rival_n.min() >= 0 and rival_n.max() < E
    assert (rival_n != routed.expert_TS[:count, 0]).all()
    assert torch.equal(rival_n, draw_rivals(routed, count, seed(3)))
    assert torch.equal(rival_n[: count // 2], draw_rivals(routed, count // 2, seed(3)))
    if E > 2 and count > 9:
        assert not torch.equal(rival_n, draw_rivals(routed, count, seed(4)))


def test_rivals_come_as_often_as_their_probability_says():
    one_E = torch.tensor([0.0, 2.0, 0.7, -1.0, 0.3])
    routed = routed_of(one_E.expand(4000, -1).contiguous())
    share_E = torch.bincount(draw_rivals(routed, 4000, seed(11)).long(), minlength=5) / 4000
    p_E = one_E.softmax(0)
    expected_E = (p_E / (1 - p_E[1])).index_fill(0, torch.tensor([1]), 0.0)  # expert 1 is the chosen one
    assert (share_E - expected_E).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_logits_that_are_not_finite_draw_experts_that_exist():
    bad_TE = logits(6, 4)
    bad_TE[0], bad_TE[1, 2], bad_TE[2] = torch.nan, torch.inf, -torch.inf
    rival_n = draw_rivals(replace(routed_of(logits(6, 4)), logits_TE=bad_TE), 6, seed(0))
    assert rival_n.min() >= 0 and rival_n.max() < 4


def test_one_expert_has_no_rival():
    with pytest.raises(ValueError, match=r"1 experts, 1 of them per token, leave no one rival\. Use one per token, of two or more"):
        draw_rivals(routed_of(logits(5, 1)), 2, seed(0))


@pytest.mark.parametrize("theta", [None, 0.7])
@pytest.mark.parametrize(("T", "E", "count", "K"), [(50, 4, 50, 3), (130, 33, 40, 70), (9, 300, 5, 64)])
def test_costs_give_the_loss_and_the_gradient_of_the_logits(T, E, count, K, theta, poisoned_memory):
    generator = torch.Generator().manual_seed(1)
    logits_TE = logits(T, E)
    routed = routed_of(logits_TE)
    rival_n = draw_rivals(routed, count, seed(2))
    loss_T = torch.rand(T + count, generator=generator) * 5
    values_TK = (torch.rand(T + count, K, generator=generator) - 0.4).clamp_min(0)
    priced = (None, None) if theta is None else (values_TK, torch.tensor(theta))
    found = compete(routed, rival_n, loss_T, *priced)

    exact_TE = logits_TE.double().requires_grad_()
    p_TE = exact_TE.softmax(1)
    own_n, other_n = (p_TE[:count].gather(1, expert.long())[:, 0] for expert in (routed.expert_TS[:count], rival_n[:, None]))
    share_n = own_n / (own_n + other_n)
    cost_T = loss_T.double() + (theta or 0.0) ** 2 * (values_TK > 0).sum(1)
    competition = (share_n * cost_T[:count] + (1 - share_n) * cost_T[T:]).mean()
    counts_E = torch.bincount(routed.expert_TS[:, 0].long(), minlength=E)
    loss = competition + 0.3 * (counts_E * p_TE.sum(0)).sum()
    (expected_TE,) = torch.autograd.grad(loss, exact_TE)

    assert found.parts.sum().item() == pytest.approx(competition.item(), rel=1e-5)
    grad_TE = route_backward(routed, None, counts_E.int(), 0.3, found.rival_n, found.grad_n)
    assert (grad_TE - expected_TE).norm() <= 1e-5 * expected_TE.norm()
    assert routed.counts_BE.shape[0] == cdiv(T, block_tokens(E))

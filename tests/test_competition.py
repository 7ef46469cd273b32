"""The router that learns by competition: whom it draws as rivals, what they cost, and who gains."""

import numpy as np
import pytest
import torch
from test_inference import CASES, RIDGE, D, K, M, S, T, activations, build, own
from test_pursuit import pursued

from switch_kernels import Dispatch
from switch_sae.models import ROUTERS
from switch_sae.models.routers.competition import CompetitionRouter
from switch_sae.rows import Rows


def competition(slots=1, **changes):
    config = CompetitionRouter.Config(**{"rivals": 1.0, **changes})
    router = ROUTERS.build(config, D, 6, slots, torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        router.W_ED.mul_(2)
    return router


@pytest.mark.parametrize(("slots", "bound"), [(1, 18.5), (2, 16.3)], ids=["one expert", "two experts"])  # 0.1 % at 4 and 3 degrees of freedom
def test_rivals_are_other_experts_drawn_in_proportion_to_their_probability(slots, bound):
    router, rows = competition(slots), 4000
    routing = router.route(activations(1, 1).expand(rows, D))
    p_E, chosen = routing.probs_TE[0].detach(), routing.expert_TS[0]
    expected_E = p_E.clone()
    expected_E[chosen] = 0
    expected_E /= expected_E.sum()
    assert expected_E.max() > 4 * expected_E[expected_E > 0].min()
    counts_E = torch.zeros(6, dtype=torch.float64)
    for step in range(5):
        router.begin_step(step, 5)
        counts_E += torch.bincount(router.rivals(routing).expert_n1[:, 0], minlength=6)
    assert (counts_E[chosen] == 0).all()
    others = expected_E > 0
    chi_square = ((counts_E - 5 * rows * expected_E).square() / (5 * rows * expected_E))[others].sum()
    assert chi_square < bound
    share_n, weakest = router.rivals(routing).share_n, chosen[-1]
    rivals = router.rivals(routing).expert_n1[:, 0]
    torch.testing.assert_close(share_n, p_E[weakest] / (p_E[weakest] + p_E[rivals]))


def test_rivals_of_a_step_are_the_same_whoever_asks_and_others_at_the_next_step():
    router, again = competition(), competition()
    routing = router.route(activations(2))
    router.begin_step(7, 9)
    drawn = router.rivals(routing).expert_n1
    again.begin_step(7, 9)
    torch.rand(3)
    assert torch.equal(again.rivals(routing).expert_n1, drawn) and not (drawn == routing.expert_TS).any()
    again.begin_step(8, 9)
    assert not torch.equal(again.rivals(routing).expert_n1, drawn)
    assert len(competition(rivals=0.25).rivals(routing).expert_n1) == T // 4 and competition(rivals=0.0).rivals(routing) is None
    assert competition(train=False).rivals(routing) is None


def test_of_the_two_experts_the_cheaper_gains():
    router = competition(load_balance=0.0)
    routing = router.route(activations(2))
    rivals = router.rivals(routing)
    for costs, sign in (((1.0, 3.0), 1), ((3.0, 1.0), -1)):
        loss = rivals.loss(*(torch.full((T,), cost, dtype=torch.float64) for cost in costs))
        (gradient_TE,) = torch.autograd.grad(loss, [routing.probs_TE], retain_graph=True)
        assert (gradient_TE.gather(1, routing.expert_TS) * sign < 0).all() and (gradient_TE.gather(1, rivals.expert_n1) * sign > 0).all()


def test_the_price_of_a_latent_is_the_square_of_the_threshold_of_this_step():
    sae, x_TD = build(CASES["switch_pursuit, stop, shared"]).train(), activations()
    sae.theta.fill_(0.9)
    output = sae(x_TD)
    rivals = sae.router.rivals(output.routing)
    count, scaled_TD = len(rivals.expert_n1), x_TD * sae.activation_scale
    z_TM = np.zeros((count, M))
    for t in range(count):
        latents = own(int(rivals.expert_n1[t, 0]), S)
        z_TM[t, latents] = pursued((scaled_TD[t] - sae.b_pre_D).detach().numpy(), sae.W_dec_MD.detach().numpy()[latents], 2 * K, 4, RIDGE, 0.9)[0]

    def cost_n(z_nM):
        return (scaled_TD[:count] - z_nM @ sae.W_dec_MD - sae.b_pre_D).square().sum(dim=1) + 0.81 * (z_nM > 0).double().sum(dim=1)

    own_n, theirs_n = cost_n(output.latents.to_dense()[:count]), cost_n(torch.tensor(z_TM))
    expected = (rivals.share_n * own_n + (1 - rivals.share_n) * theirs_n).mean()
    assert count == T // 4 and sae.loss_terms(Rows.of(x_TD), output)["competition"].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("name", ["switch_refit, shared", "switch_pursuit, stop, shared", "switch_pursuit"])
def test_rivals_find_in_the_search_of_the_batch_what_they_would_find_alone(name):
    sae, x_TD = build(CASES[name]).train(), activations()
    output = sae(x_TD)
    count = len(output.rivals.expert_n1)
    alone = sae._find(x_TD[:count] * sae.activation_scale, Dispatch.from_experts(output.rivals.expert_n1, sae.num_experts), sae.grams.state()["gram"])
    assert count == T // 4 and torch.equal(output.rivals.expert_n1, sae.router.rivals(output.routing).expert_n1)
    assert (output.theirs.to_dense() > 0).sum() > count
    torch.testing.assert_close(output.theirs.to_dense(), alone.to_dense(), rtol=1e-9, atol=1e-12)
    sae.eval()
    with torch.no_grad():
        assert "competition" not in sae.loss_terms(Rows.of(x_TD), sae(x_TD))

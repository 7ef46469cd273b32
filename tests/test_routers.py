"""What is particular to each router, against its formula written out by hand. What all share is the contract of `test_models.py`."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from configs import ROUTED, switch

from switch_kernels import Dispatch, encode_topk_reference, sparse_decode_reference
from switch_sae.models import SAES
from switch_sae.models.routers import ROUTERS, Gate, SoftmaxRouter
from switch_sae.models.routers.bias_balanced import BiasBalancedRouter
from switch_sae.models.routers.competition import CompetitionRouter
from switch_sae.models.routers.cosine_kmeans import CosineKMeansRouter
from switch_sae.models.routers.renormalised import RenormalisedRouter, Scores
from switch_sae.models.routers.sigmoid import SigmoidRouter
from switch_sae.models.routers.two_level import TwoLevelRouter
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, E = 12, 96, 4
TRAINED_BY_RECONSTRUCTION = ("softmax", "softmax straight_through", "sigmoid", "bias_balanced", "two_level")
TRAINED_BY_RECONSTRUCTION_OF_SEVERAL = ("renormalised", "renormalised relu")


def activations(seed: int = 0, rows: int = T) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + torch.linspace(-2, 2, D)


def build(config, dtype: torch.dtype = torch.float64):
    sae = SAES.build(config, D, torch.Generator().manual_seed(1)).to(dtype)
    prepare(sae, Rows.of(activations(7, 512).to(dtype)), normalize_activations=True)
    return sae


def router_of(config, experts_per_token: int = 1, num_experts: int = E):
    return ROUTERS.build(config, D, num_experts, experts_per_token, torch.Generator().manual_seed(1)).double()


@pytest.fixture(params=[1, 2])
def slots(request):
    return request.param


def by_formula(router, x_TD, slots):
    """(experts, gates, shares of all experts, load-balance coefficient) of scaled activations, with gradients."""
    config = router.config
    if isinstance(config, CosineKMeansRouter.Config):
        cosine_TE = torch.stack([F.cosine_similarity(x_TD - router.centre_D, mean_D[None], dim=1) for mean_D in router.mean_ED], dim=1)
        expert_TS = cosine_TE.sort(dim=1, descending=True).indices[:, :slots]
        return expert_TS, torch.ones_like(expert_TS, dtype=x_TD.dtype), F.one_hot(expert_TS, E).sum(1) / slots, 0.0
    if isinstance(config, TwoLevelRouter.Config):
        return two_levels_by_formula(router, x_TD, slots)
    logits_TE = (x_TD - router.b_D) @ router.W_ED.T
    if isinstance(config, RenormalisedRouter.Config):
        return renormalised_by_formula(router, logits_TE, slots)
    if isinstance(config, SoftmaxRouter.Config):
        probs_TE = logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
        expert_TS = probs_TE.sort(dim=1, descending=True).indices[:, :slots]
        gate_TS = probs_TE.gather(1, expert_TS)
        if config.gate is not Gate.probability:
            gate_TS = 1 + (0 if config.gate is Gate.hard else 1) * (gate_TS - gate_TS.detach())
        return expert_TS, gate_TS, probs_TE, config.load_balance
    if isinstance(config, CompetitionRouter.Config):
        expert_TS = logits_TE.sort(dim=1, descending=True).indices[:, :slots]
        return expert_TS, torch.ones(len(x_TD), slots).to(x_TD), torch.softmax(logits_TE, dim=1), config.load_balance
    score_TE = 1 / (1 + (-logits_TE).exp())
    biased_TE = score_TE + (router.balance_E if isinstance(config, BiasBalancedRouter.Config) else 0)
    expert_TS = biased_TE.sort(dim=1, descending=True).indices[:, :slots]
    return expert_TS, score_TE.gather(1, expert_TS), score_TE / score_TE.sum(1, keepdim=True), getattr(config, "load_balance", 0.0)


def renormalised_by_formula(router, logits_TE, slots):
    """Scale SAE's double softmax, or that over ReLU's of `moe.py`: what is not chosen is at -inf."""
    logits_TE = logits_TE + router.c_E
    score_TE = logits_TE.relu() if router.config.scores is Scores.relu else torch.softmax(logits_TE, dim=1)
    share_TE = torch.softmax(score_TE if router.config.scores is Scores.relu else logits_TE, dim=1)
    expert_TS = logits_TE.sort(dim=1, descending=True).indices[:, :slots]
    kept_TE = torch.full_like(score_TE, -torch.inf).scatter(1, expert_TS, score_TE.gather(1, expert_TS))
    return expert_TS, torch.softmax(kept_TE, dim=1).gather(1, expert_TS), share_TE, router.config.load_balance


def two_levels_by_formula(router, x_TD, slots):
    """Every expert computed: p_g q_i, with q of the chosen groups and 1 / L elsewhere."""
    groups, size = router.groups, E // router.groups
    p_TG = torch.softmax((x_TD - router.b_D) @ router.W_group_GD.T, dim=1)
    q_TGL = torch.softmax(((x_TD - router.b_D) @ router.W_expert_ED.T).view(-1, groups, size), dim=2)
    chosen_TG = F.one_hot(p_TG.topk(slots, dim=1).indices, groups).sum(1).bool()
    share_TGL = p_TG[..., None] * torch.where(chosen_TG[..., None], q_TGL, 1 / size)
    best_TG = torch.where(chosen_TG[..., None], share_TGL, 0.0).max(dim=2)
    gate_TS, group_TS = best_TG.values.sort(dim=1, descending=True)
    expert_TS = group_TS * size + best_TG.indices.gather(1, group_TS)
    return expert_TS[:, :slots], gate_TS[:, :slots], share_TGL.flatten(1), router.config.load_balance


def competition_by_formula(sae, scaled, output, recon, share_TE):
    """mean(g L + (1 - g) L') over the first quarter, g = p / (p + p') of the weakest, costs by computing every expert and masking."""
    count = len(scaled) // 4
    chosen, rival = output.routing.expert_TS[:count], sae.router.rivals(output.routing).expert_nS
    assert rival.shape == chosen.shape and torch.equal(rival[:, :-1], chosen[:, :-1]) and (rival[:, -1:] != chosen).all()
    dispatch = Dispatch.from_experts(rival, E)
    theirs = encode_topk_reference(scaled[:count], sae.b_pre_D, torch.ones(rival.shape), sae.W_enc_MD, sae.b_enc_M, dispatch, 4, True)
    rivals_recon = sparse_decode_reference(theirs.values_TK, theirs.indices_TK, sae.W_dec_MD) + sae.b_pre_D
    costs = [(scaled[:count] - made[:count]).pow(2).sum(1).detach() for made in (recon, rivals_recon)]
    p, other = share_TE[:count].gather(1, chosen)[:, -1], share_TE[:count].gather(1, rival)[:, -1]
    return (p * costs[0] + other * costs[1]).div(p + other).mean()


@pytest.mark.parametrize("name", list(ROUTED))
def test_outputs_losses_and_gradients_are_the_formula_with_every_expert_computed_and_masked(name, slots):
    sae, x = build(switch(name, slots)), activations()
    if name == "bias_balanced":
        sae.router.balance_E.copy_(torch.tensor([0.2, -0.1, 0.05, 0.0]))
    output = sae(x)
    terms = sae.loss_terms(Rows.of(x), output)
    scaled = x * sae.activation_scale
    expert_TS, gate_TS, share_TE, load_balance = by_formula(sae.router, scaled, slots)
    assert torch.equal(output.routing.expert_TS, expert_TS) and len(expert_TS[:, 0].unique()) > 1
    torch.testing.assert_close(output.routing.probs_TE, share_TE.double())
    dispatch = sae.route(x)[1]
    selection = encode_topk_reference(scaled, sae.b_pre_D, gate_TS, sae.W_enc_MD, sae.b_enc_M, dispatch, 4, True)
    recon = sparse_decode_reference(selection.values_TK, selection.indices_TK, sae.W_dec_MD) + sae.b_pre_D
    counted_TS = expert_TS[:, :1] if name.startswith("renormalised") else expert_TS
    load_E = torch.bincount(counted_TS.flatten(), minlength=E) / counted_TS.numel()
    expected = {"mse": (scaled - recon).pow(2).sum(1).mean()}
    if load_balance:
        expected["load_balance"] = load_balance * D * E * (load_E * share_TE.mean(0)).sum()
    if name == "competition":
        expected["competition"] = competition_by_formula(sae, scaled, output, recon, share_TE)
    torch.testing.assert_close(terms, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(output.recon_TD, recon / sae.activation_scale, rtol=1e-10, atol=1e-10)
    parameters = list(sae.parameters())
    found = torch.autograd.grad(sum(terms.values()), parameters, retain_graph=True)
    for (key, _), ours, theirs in zip(sae.named_parameters(), found, torch.autograd.grad(sum(expected.values()), parameters), strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), key


@pytest.mark.parametrize("name", list(ROUTED))
def test_the_reconstruction_trains_exactly_the_routers_whose_gate_says_so(name, slots):
    sae, x = build(switch(name, slots)), activations()
    parameters = list(sae.router.parameters())
    assert len(parameters) == (0 if name == "cosine_kmeans" else 3 if name == "two_level" or name.startswith("renormalised") else 2)
    learns = name in TRAINED_BY_RECONSTRUCTION or (slots > 1 and name in TRAINED_BY_RECONSTRUCTION_OF_SEVERAL)
    output = sae(x)
    mse = sae.loss_terms(Rows.of(x), output)["mse"]
    gradients = torch.autograd.grad(mse, parameters, allow_unused=True) if parameters else ()
    assert all((g is not None and g.abs().sum() > 0) == learns for g in gradients)
    assert output.routing.gate_TS.requires_grad == learns


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "bias_balanced"])
def test_a_router_that_is_not_trained_gets_nothing_and_costs_no_backward(name):
    sae = build(replace(switch(name), router=replace(ROUTED[name], train=False)))
    trainer = Trainer(sae.float(), TrainerConfig(lr=1e-2), total_steps=3, batch_size=T)
    before = {key: tensor.clone() for key, tensor in sae.router.state_dict().items()}
    for step in range(3):
        trainer.step(Rows.of(activations(step).float()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in sae.router.state_dict().items())
    assert not any("router" in key for key in trainer.engine.optimizer.parameters)
    assert sae.router.flops() == (2 * D * E, 0)


@pytest.mark.parametrize("name", list(ROUTED))
def test_the_routers_cost_is_counted_by_hand(name, slots):
    rows = 2 + slots * 2 if name == "two_level" else E
    learned = 0 if name == "cosine_kmeans" else 4 * D * rows
    assert router_of(ROUTED[name], slots).flops() == (2 * D * rows, learned)
    sae, dense = build(switch(name, slots)), build(replace(switch(name, slots), num_experts=1, experts_per_token=1))
    assert sae.flops().router == 2 * D * rows and sae.flops().encode == 2 * D * 12 * slots
    rivals = 2 * D * (12 * slots + 4) // 4 if name == "competition" else 0  # a quarter of the tokens are encoded and decoded once more
    assert sae.flops().backward - learned - rivals == dense.flops().backward - dense.router.flops()[1]


@pytest.mark.parametrize("name", list(ROUTED))
def test_a_tie_for_one_expert_goes_to_the_lowest_and_a_token_takes_distinct_experts(name, slots):
    router = router_of(ROUTED[name], slots)
    expert_TS = router.route(activations()).expert_TS
    assert expert_TS.shape == (T, slots) and expert_TS.dtype == torch.int64
    assert slots == 1 or (expert_TS[:, 0] != expert_TS[:, 1]).all()
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.zero_()
    assert slots > 1 or (router.route(activations()).expert_TS == 0).all()


@pytest.mark.parametrize("name", list(ROUTED))
def test_routes_of_folded_weights_are_those_of_scaled_activations(name, slots):
    router, x = router_of(ROUTED[name], slots), activations()
    router.initialize(x, x.mean(0))
    before = router.route(x * 0.37)
    router.fold_scale(torch.tensor(0.37))
    after = router.route(x)
    assert torch.equal(before.expert_TS, after.expert_TS)
    torch.testing.assert_close(before.gate_TS, after.gate_TS)
    torch.testing.assert_close(before.probs_TE, after.probs_TE)


def test_straight_through_has_the_value_of_hard_and_the_gradient_of_probability(slots):
    x, weights = activations(), torch.randn(T, slots, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = {}
    for name in ("softmax", "softmax hard", "softmax straight_through"):
        router = router_of(ROUTED[name], slots)
        gate_TS = router.route(x).gate_TS
        found[name] = gate_TS.detach(), torch.autograd.grad((gate_TS * weights).sum(), router.W_ED)[0] if gate_TS.requires_grad else None
    assert torch.equal(found["softmax straight_through"][0], found["softmax hard"][0]) and (found["softmax hard"][0] == 1).all()
    assert torch.equal(found["softmax straight_through"][1], found["softmax"][1]) and found["softmax hard"][1] is None


def loads(rate: float, steps: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts' shares of a fresh batch, the selection bias), after training on activations that most like the first expert."""
    sae = build(replace(switch("bias_balanced"), router=BiasBalancedRouter.Config(rate=rate)), torch.float32)
    toward_D = 6 * F.normalize(sae.router.W_ED[0].detach(), dim=0) / sae.activation_scale

    def skewed(seed: int) -> torch.Tensor:
        x_TD = activations(seed, 400).float()
        x_TD[:300] += toward_D
        return x_TD

    trainer = Trainer(sae, TrainerConfig(lr=1e-4), total_steps=steps, batch_size=400)
    for step in range(steps):
        trainer.step(Rows.of(skewed(step)))
    with torch.no_grad():
        expert_T = sae(skewed(1000)).routing.expert_TS[:, 0]
    return torch.bincount(expert_T, minlength=E) / 400, sae.router.balance_E


def test_the_selection_bias_moves_by_rate_times_the_sign_of_the_missing_load(slots):
    router, x = router_of(BiasBalancedRouter.Config(rate=0.01), slots), activations()
    for _ in range(3):
        before, routing = router.balance_E.clone(), router.route(x)
        load_E = torch.bincount(routing.expert_TS.flatten(), minlength=E) / routing.expert_TS.numel()
        router.end_step(x, routing)
        torch.testing.assert_close(router.balance_E - before, 0.01 * torch.sign(1 / E - load_E).double())
    balanced = replace(router.route(x), expert_TS=(torch.arange(T * slots) % E).view(T, slots))
    before = router.balance_E.clone()
    router.end_step(x, balanced)
    assert torch.equal(router.balance_E, before), "an even load moves nothing"


def test_the_selection_bias_evens_the_load_and_touches_neither_gates_nor_shares():
    (left, still), (even, moved) = loads(0.0), loads(0.01)
    assert (still == 0).all() and (moved != 0).any()
    assert even.max() < 0.4 < left.max() and even.min() > 0.1
    router, x = router_of(BiasBalancedRouter.Config()), activations()
    before = router.route(x)
    router.balance_E.copy_(torch.tensor([5.0, 0, 0, 0]))
    after = router.route(x)
    assert (after.expert_TS == 0).all() and torch.equal(before.probs_TE, after.probs_TE)
    torch.testing.assert_close(after.gate_TS[:, 0], torch.sigmoid(router.logits(x))[:, 0])


def planted(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows around E planted directions from a centre, which direction each has, the directions)."""
    generator = torch.Generator().manual_seed(seed)
    directions_ED = F.normalize(torch.randn(E, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64), dim=1)
    mine_T = torch.randint(E, (rows,), generator=generator)
    strength_T1 = 2 + torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    noise_TD = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    return strength_T1 * directions_ED[mine_T] + 0.1 * noise_TD + 3, mine_T, directions_ED


def test_k_means_finds_planted_directions_from_the_start_and_online():
    x, mine_T, directions_ED = planted(500, 0)
    router = router_of(CosineKMeansRouter.Config(decay=0.8))
    router.initialize(x, torch.full((D,), 3.0, dtype=torch.float64))
    cosine_EE = F.normalize(router.mean_ED, dim=1) @ directions_ED.T
    assert (cosine_EE.max(dim=1).values > 0.99).all() and cosine_EE.argmax(dim=1).sort().values.tolist() == list(range(E))
    assert torch.equal(cosine_EE.argmax(dim=1)[router.route(x).expert_TS[:, 0]], mine_T)
    router.mean_ED.copy_(F.normalize(directions_ED + 0.3 * torch.randn(E, D, generator=torch.Generator().manual_seed(6)), dim=1) / E)
    for step in range(40):
        batch = planted(200, 10 + step)[0]
        router.end_step(batch, router.route(batch))
    assert (F.cosine_similarity(router.mean_ED, directions_ED) > 0.99).all()


def test_an_idle_expert_keeps_its_centroid_and_the_others_move_by_the_formula(slots):
    router, x = router_of(CosineKMeansRouter.Config(decay=0.9), slots), activations()
    before = router.mean_ED.clone()
    routing = router.route(x)
    expert_TS = routing.expert_TS.clone()
    expert_TS[:, 0] = torch.arange(T) % (E - 1)  # the last expert is nobody's first
    router.end_step(x, replace(routing, expert_TS=expert_TS))
    unit_TD = F.normalize(x - router.centre_D, dim=1)
    for e in range(E - 1):
        torch.testing.assert_close(router.mean_ED[e], 0.9 * before[e] + 0.1 * unit_TD[expert_TS[:, 0] == e].sum(0) / T)
    assert torch.equal(router.mean_ED[-1], before[-1])


def test_running_statistics_survive_stop_and_resume_and_move_in_training_alone():
    for name, buffer in (("bias_balanced", "sae/router.balance_E"), ("cosine_kmeans", "sae/router.mean_ED")):
        trainer = Trainer(build(switch(name), torch.float32), TrainerConfig(lr=1e-2), total_steps=8, batch_size=T)
        start = trainer.state_dict()[0][buffer].clone()
        trainer.step(Rows.of(activations().float()))
        moved = trainer.state_dict()[0][buffer].clone()
        assert not torch.equal(start, moved)
        trainer.sae(activations(1).float())
        assert torch.equal(moved, trainer.state_dict()[0][buffer])


def test_shares_are_not_renormalised_gates():
    router, x = router_of(SigmoidRouter.Config()), activations()
    routing = router.route(x)
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(T, dtype=torch.float64))
    assert not torch.allclose(routing.gate_TS, routing.probs_TE.gather(1, routing.expert_TS))


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SoftmaxRouter.Config, {"load_balance": -1.0}, "load_balance=-1.0 must be at least 0. Use 0 to switch it off"),
        (SigmoidRouter.Config, {"load_balance": float("nan")}, "load_balance=nan must be at least 0"),
        (SoftmaxRouter.Config, {"gate": Gate.hard, "load_balance": 0.0}, "gate=hard with load_balance=0 leaves nothing that could train the router"),
        (BiasBalancedRouter.Config, {"rate": -1e-3}, "rate=-0.001 must be at least 0. Use 0 to switch balancing off"),
        (CosineKMeansRouter.Config, {"decay": 1.5}, "decay=1.5 must lie between 0 .* and 1 .* Use 0.99"),
        (CosineKMeansRouter.Config, {"decay": -0.1}, "decay=-0.1 must be at least 0"),
    ],
)
def test_impossible_configs_say_value_rule_and_fix(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)

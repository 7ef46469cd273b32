"""Overlapping lists into one dictionary: brute force in float64, its corners Switch and TopK, and how lists change."""

from dataclasses import replace

import pytest
import torch
from configs import ARCHITECTURES, ROUTED
from test_pursuit import pursued
from torch.nn.functional import normalize

from switch_sae.models import SAES, SharedPoolSAE, SwitchSAE, TopKSAE, with_inference
from switch_sae.models.lists import assigned, best_lists, credits, membership, random_lists
from switch_sae.models.losses import reconstruction_loss
from switch_sae.models.routers.base import load_balance_loss
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M = 12, 96, 48
POOL = ARCHITECTURES["shared_pool"]


def activations(seed=0, rows=T):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * 3 + torch.linspace(-2, 2, D)


def build(config, dtype=torch.float64):
    sae = SAES.build(config, D, torch.Generator().manual_seed(1)).to(dtype)
    prepare(sae, Rows.of(activations(7, 512).to(dtype)), normalize_activations=True)
    return sae


def masked_dense(sae, x, expert_TS, gate_TS):
    """(z_TM with gradients, pre_TM) of scaled activations: all latents are encoded, those on no list of the token masked."""
    member_EM = membership(sae.list_EF, M)
    gate_TM = torch.zeros(len(x), M, dtype=x.dtype)
    for slot in reversed(range(expert_TS.shape[1])):  # the best list last, so that its gate stands
        gate_TM = torch.where(member_EM[expert_TS[:, slot]], gate_TS[:, slot : slot + 1], gate_TM)
    pre_TM = (x - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M
    gated_TM = pre_TM.relu() * gate_TM
    chosen = gated_TM.topk(sae.config.k, dim=1).indices
    return gated_TM * torch.zeros_like(gated_TM).scatter(1, chosen, 1.0), pre_TM


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("router", ["softmax", "softmax straight_through", "competition"])
def test_outputs_and_gradients_equal_the_masked_dense_formulation(router, slots):
    config = replace(POOL, router=ROUTED[router], lists_per_token=slots, distill=0.3)
    sae, x = build(config), activations().double()
    with torch.no_grad():
        sae.b_enc_M.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    rows = Rows.of(x)
    output = sae(x)
    terms = sae.loss_terms(rows, output)
    ours = torch.autograd.grad(sum(terms.values()), list(sae.parameters()))

    scaled = x * sae.activation_scale
    probs = torch.softmax((scaled - sae.router.b_D) @ sae.router.W_ED.T, dim=1)
    top, expert = probs.topk(slots, dim=1)
    gate = {"softmax": top, "softmax straight_through": 1 + top - top.detach(), "competition": torch.ones_like(top)}[router]
    z, pre = masked_dense(sae, scaled, expert, gate)
    recon = z @ sae.W_dec_MD + sae.b_pre_D
    loss = reconstruction_loss(scaled - recon) + config.router.load_balance * D * load_balance_loss(expert, probs)
    # What the sample would use of everything, and which lists hold most of it.
    n = T // 8
    energy, held = torch.zeros(n, M, dtype=x.dtype), membership(sae.list_EF, M)
    best = pre[:n].detach().relu().topk(4, dim=1)
    energy.scatter_(1, best.indices, best.values.square())
    for t in range(n):
        left, gains = energy[t].clone(), torch.zeros(4, dtype=x.dtype)
        for _ in range(slots):
            sums = (held * left).sum(1)
            gains[sums.argmax()] += sums.max()
            left[held[sums.argmax()]] = 0
        loss = loss - 0.3 * D / n * ((gains / gains.sum()) * probs[t].log()).sum()
    if (rivals := sae.router.rivals(sae.choose(x))) is not None:
        first = scaled[: len(rivals.expert_nS)]
        theirs = masked_dense(sae, first, rivals.expert_nS, torch.ones_like(first[:, :slots]))[0] @ sae.W_dec_MD + sae.b_pre_D
        costs = [(first - each).square().sum(1).detach() for each in (recon[: len(first)], theirs)]
        loss = loss + rivals.loss(*costs)
    expected = torch.autograd.grad(loss, list(sae.parameters()))

    torch.testing.assert_close(output.latents.to_dense(), z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(output.recon_TD * sae.activation_scale, recon, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(sum(terms.values()), loss, rtol=1e-11, atol=1e-11)
    for (name, _), our, their in zip(sae.named_parameters(), ours, expected, strict=True):
        assert (our - their).abs().max() <= 1e-9 * their.abs().max().clamp_min(1e-12), name


@pytest.mark.parametrize("slots", [1, 2])
def test_auxk_equals_the_dense_formula_with_each_dead_latent_once(slots):
    sae, x = build(replace(POOL, lists_per_token=slots, auxk_latents=6, router=ROUTED["softmax"])), activations().double()
    dead_M = torch.arange(M) % 3 == 0
    output, scaled = sae(x), x * sae.activation_scale
    residual = (scaled - output.recon_TD * sae.activation_scale).detach()
    pre = (scaled - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M
    member, before = membership(sae.list_EF, M), torch.zeros(T, M, dtype=torch.bool)
    recon = torch.zeros_like(scaled)
    for slot in range(slots):
        expert, gate = output.lists.expert_TS[:, slot], output.lists.gate_TS[:, slot]
        allowed = dead_M & member[expert] & ~before
        before |= member[expert]
        top = pre.relu().masked_fill(~allowed, 0).topk(6 // slots, dim=1)
        recon += gate[:, None] * (torch.zeros_like(pre).scatter(1, top.indices, top.values) @ sae.W_dec_MD)
    expected = (residual - recon).pow(2).sum() / (residual - residual.mean(0)).pow(2).sum() / 32 * D
    term = sae.loss_terms(Rows.of(x), output, dead_M)["auxk"]
    torch.testing.assert_close(term, expected)
    gradient = torch.autograd.grad(term, sae.W_enc_MD)[0].abs().sum(1)
    assert (gradient[~dead_M] == 0).all() and gradient[dead_M].any()


@pytest.mark.parametrize("router", ["softmax", "competition"])
@pytest.mark.parametrize("slots", [1, 2])
def test_every_latent_on_one_list_is_a_switch_sae_to_the_last_bit_through_training(router, slots):
    shared = {"num_latents": M, "k": 4, "router": ROUTED[router]}
    pool = build(SharedPoolSAE.Config(**shared, num_lists=4, multiplicity=1, lists="random", lists_per_token=slots), torch.float32)
    switch = build(SwitchSAE.Config(**shared, num_experts=4, experts_per_token=slots), torch.float32)
    pool.list_EF.copy_(torch.arange(M).view(4, 12))
    trainers = [Trainer(sae, TrainerConfig(lr=1e-2, dead_after_tokens=200), total_steps=8, batch_size=T) for sae in (pool, switch)]
    for step in range(8):
        for trainer in trainers:
            trainer.step(Rows.of(activations(step)))
    for name, parameter in switch.named_parameters():
        assert torch.equal(parameter, dict(pool.named_parameters())[name]), name
    assert torch.equal(pool(activations()).recon_TD, switch(activations()).recon_TD)


@pytest.mark.parametrize(("lists", "slots"), [(1, 1), (4, 1), (4, 4)])
def test_every_latent_on_all_lists_is_a_topk_sae(lists, slots):
    pool = build(SharedPoolSAE.Config(num_latents=M, k=4, num_lists=lists, multiplicity=lists, lists_per_token=slots), torch.float32)
    topk, x = build(TopKSAE.Config(num_latents=M, k=4), torch.float32), activations()
    assert torch.equal(pool.list_EF, torch.arange(M).expand(lists, M))
    ours, theirs = pool(x), topk(x)
    assert torch.equal(ours.latents.to_dense(), theirs.latents.to_dense())
    if slots == 1:
        assert torch.equal(ours.recon_TD, theirs.recon_TD)
    torch.testing.assert_close(ours.recon_TD, theirs.recon_TD, rtol=1e-6, atol=1e-5)  # several lists' latents come, and are summed, in another order
    torch.testing.assert_close(
        *(torch.autograd.grad(reconstruction_loss(out.recon_TD), sae.W_enc_MD)[0] for sae, out in ((pool, ours), (topk, theirs)))
    )


def test_lists_start_with_a_place_for_every_latent():
    for shuffle in (False, True):
        list_EF = random_lists(50, 6, 15, torch.Generator().manual_seed(0), shuffle)
        member_EM = membership(list_EF, 50)
        assert member_EM.any(dim=0).all() and (member_EM.sum(1) == 15).all() and (list_EF.diff(dim=1) > 0).all()
    assert torch.equal(random_lists(48, 4, 12), torch.arange(48).view(4, 12))


def by_loops(score_EM, size):
    """The rule of `assigned`, latent by latent."""
    lists, left = [[] for _ in score_EM], set(range(score_EM.shape[1]))
    while left:
        wishes = [[] for _ in lists]
        for latent in sorted(left):
            room = [e for e in range(len(lists)) if len(lists[e]) < size]
            best = max(room, key=lambda e: (score_EM[e, latent].item(), -e))
            wishes[best].append(latent)
        for e, wanted in enumerate(wishes):
            wanted.sort(key=lambda latent: (-score_EM[e, latent].item(), latent))
            taken = wanted[: size - len(lists[e])]
            lists[e] += taken
            left -= set(taken)
    for e, held in enumerate(lists):
        others = sorted(set(range(score_EM.shape[1])) - set(held), key=lambda latent: (-score_EM[e, latent].item(), latent))
        held += others[: size - len(held)]
    return torch.tensor([sorted(held) for held in lists])


@pytest.mark.parametrize(("experts", "size"), [(5, 8), (5, 17), (3, 14), (1, 40), (40, 1)])
@pytest.mark.parametrize("skewed", [False, True])
def test_assignment_gives_every_latent_its_best_free_list_and_fills_lists_by_energy(experts, size, skewed):
    score = torch.rand(experts, 40, generator=torch.Generator().manual_seed(size))
    score = score.where(score > 0.3, 0.0)
    if skewed:
        score[0] += 1  # all want the first list
    found = assigned(score, size)
    assert torch.equal(found, by_loops(score.double(), size))
    assert membership(found, 40).any(dim=0).all()


def test_a_second_list_is_credited_only_with_what_the_first_lacks():
    member = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    found = credits(member, torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2, 3]]))[0]
    assert found.tolist() == [[True, True, False, True], [False, False, True, True]]
    lists, gains = best_lists(member, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]), 3)
    assert lists.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(gains, torch.tensor([[0.7, 0.2, 0.1]]))


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("lists", ["gain", "energy"])
def test_what_is_measured_equals_loops(lists, slots):
    config = replace(POOL, lists=lists, lists_per_token=slots, list_tokens=10**6, memory_tokens=T)
    sae, x = build(config), activations().double()
    sae.energy_EM.fill_(3.0)
    member, scaled, n = membership(sae.list_EF, M), x * sae.activation_scale, T // 8
    expected = torch.full((4, M), 1.5, dtype=torch.float64)  # half is forgotten

    def credit(t, latent, worth):
        chosen = output.lists.expert_TS[t].tolist()
        holding = [e for e in chosen if member[e, latent]]
        for e in holding[:1] or chosen:
            expected[e, latent] += worth

    output = sae(x)
    z, residual = output.latents.to_dense().detach(), scaled - output.recon_TD.detach() * sae.activation_scale
    pre = ((scaled - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M).detach()
    for t in range(T):
        for latent in z[t].nonzero()[:, 0].tolist() if lists == "gain" else ():
            credit(t, latent, z[t, latent] ** 2 / 8)
        if t < n:
            worth_M = (residual[t] @ sae.W_dec_MD.detach().T if lists == "gain" else pre[t]).relu()
            for latent in worth_M.topk(4).indices.tolist():
                credit(t, latent, worth_M[latent] ** 2)
    with torch.no_grad():
        sae.end_step(Rows.of(x), output)
    torch.testing.assert_close(sae.energy_EM, expected, rtol=1e-9, atol=1e-9)


def test_lists_of_planted_topics_become_the_topics_and_what_they_share():
    """24 directions: 4 that every token may have, and 5 of each of 4 topics."""
    config = SharedPoolSAE.Config(num_latents=24, k=3, num_lists=4, multiplicity=1.5, router=ROUTED["softmax straight_through"], sample=1.0, settle=0)
    sae = SharedPoolSAE(replace(config, list_tokens=400, memory_tokens=400), 24, torch.Generator().manual_seed(0))
    topic_M = (torch.arange(24) - 4) // 5
    with torch.no_grad():
        sae.W_enc_MD.copy_(torch.eye(24))
        sae.W_dec_MD.copy_(torch.eye(24))
        sae.router.W_ED.copy_(10 * (topic_M == torch.arange(4)[:, None]).float() * (torch.arange(24) >= 4))
    generator = torch.Generator().manual_seed(1)
    wanted = [[*range(4), *range(4 + 5 * e, 9 + 5 * e)] for e in range(4)]
    assert sae.list_EF.tolist() != wanted
    for step in range(8):
        sae.begin_step(step, 8)
        topic_T = torch.randint(4, (400,), generator=generator)
        x = torch.zeros(400, 24)
        x[torch.arange(400), torch.randint(4, (400,), generator=generator)] = 2.0
        for _ in range(2):
            x[torch.arange(400), 4 + 5 * topic_T + torch.randint(5, (400,), generator=generator)] = 1.5
        with torch.no_grad():
            sae.end_step(Rows.of(x), sae(x))
    assert sae.list_EF.tolist() == wanted


def test_lists_change_when_it_is_time_and_settle_in_the_end():
    sae = build(replace(POOL, settle=0.5, list_tokens=2 * T), torch.float32)
    trainer, seen = Trainer(sae, TrainerConfig(lr=1e-2), total_steps=12, batch_size=T), [sae.list_EF.clone()]
    for step in range(12):
        trainer.step(Rows.of(activations(step)))
        seen.append(sae.list_EF.clone())
    changed = [step for step in range(12) if not torch.equal(seen[step], seen[step + 1])]
    assert set(changed) <= {1, 3, 5} and changed
    held = build(replace(POOL, lists="random"), torch.float32)
    before = held.list_EF.clone()
    trainer = Trainer(held, TrainerConfig(lr=1e-2), total_steps=4, batch_size=T)
    for step in range(4):
        trainer.step(Rows.of(activations(step)))
    assert torch.equal(before, held.list_EF) and not held.energy_EM.any()


@pytest.mark.parametrize("slots", [1, 3])
def test_what_no_list_offers_is_told_apart_from_what_never_wins(slots):
    sae, x = build(replace(POOL, lists_per_token=slots, lists="random"), torch.float32), activations()
    counts = sae.offered_counts(x)
    member, expert = membership(sae.list_EF, M), sae.choose(x).expert_TS
    assert counts.tolist() == [sum(bool(member[expert[t], latent].any()) for t in range(T)) for latent in range(M)]
    with torch.no_grad():
        sae.router.W_ED.zero_()  # all tokens to the same lists
        used = sae.choose(x).expert_TS.unique()
        silent = int(sae.list_EF[used[0], 0])
        sae.b_enc_M[silent] = -1e3
    output = sae(x)
    with torch.no_grad():
        sae.end_step(Rows.of(x), output)
    offered = member[used].any(dim=0)
    assert len(used) == slots
    assert torch.equal(sae.tokens_since_offered_M == 0, offered) and (sae.tokens_since_offered_M[~offered] == T).all()
    dead = output.latents.firing_counts() == 0
    assert dead[silent] and offered[silent] and dead[~offered].all()


def test_pursuit_searches_the_list_of_each_token():
    sae, x = build(POOL).eval(), activations().double()
    found, expert = with_inference(sae, "pursuit").encode(x).to_dense(), sae.choose(x).expert_TS[:, 0]
    assert len(expert.unique()) > 1
    for e in expert.unique().tolist():
        alone = TopKSAE(TopKSAE.Config(num_latents=24, k=4, inference="pursuit"), D).double().eval()
        with torch.no_grad():
            alone.W_dec_MD.copy_(sae.W_dec_MD[sae.list_EF[e]])
            alone.b_pre_D.copy_(sae.b_pre_D)
            alone.activation_scale.copy_(sae.activation_scale)
        torch.testing.assert_close(found[expert == e][:, sae.list_EF[e]], alone.encode(x[expert == e]).to_dense(), rtol=1e-6, atol=1e-8)
    with torch.no_grad():  # neither new weights nor new lists may find old Gram matrices
        sae.W_dec_MD.copy_(normalize(sae.W_dec_MD.roll(1, 0) + 0.1, dim=1))
        sae.list_EF.copy_(random_lists(M, 4, 24, torch.Generator().manual_seed(9)))
        again = with_inference(sae, "pursuit").encode(x).to_dense()
        fresh = SharedPoolSAE(replace(POOL, inference="pursuit"), D).double().eval()
        fresh.load_state_dict(sae.state_dict())
        assert torch.equal(again, fresh.encode(x).to_dense()) and not torch.allclose(again, found)


def test_pursuit_searches_the_union_of_several_lists_of_each_token():
    sae, x = build(replace(POOL, lists_per_token=2)).eval(), activations().double()
    found, held = with_inference(sae, "pursuit").encode(x).to_dense(), membership(sae.list_EF, M)
    residual = (x * sae.activation_scale - sae.b_pre_D).detach().numpy()
    for t, lists in enumerate(sae.choose(x).expert_TS):
        latents = held[lists].any(dim=0).nonzero()[:, 0]
        assert 24 < len(latents) < 48
        z = torch.tensor(pursued(residual[t], sae.W_dec_MD.detach().numpy()[latents], 4, 4, 1e-3)[0])
        assert (found[t, latents] - z).abs().max() <= 1e-6 and (found[t] > 0).sum() == (z > 0).sum()


def test_lists_are_shown():
    assert repr(build(POOL)).endswith("lists_of=24, lists_of_a_latent=1 to 4)")


def test_flops_are_counted_by_hand():
    config = SharedPoolSAE.Config(num_latents=640, k=2, num_lists=8, multiplicity=2, lists_per_token=2, router=ROUTED["softmax"], sample=1 / 64)
    flops = SharedPoolSAE(config, 10).flops()
    assert (flops.router, flops.encode, flops.decode) == (2 * 10 * 8, 2 * 10 * 2 * 160, 2 * 10 * 2)
    assert flops.backward == 3 * 2 * 10 * 2 + 2 * 2 * 10 * 8 + 2 * 10 * 640 // 64
    assert SharedPoolSAE(replace(config, lists="random"), 10).flops().backward == flops.backward - 2 * 10 * 10
    assert SharedPoolSAE(replace(config, distill=0.1), 10).flops().backward == flops.backward + 2 * 10 * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiplicity": 0.5}, r"multiplicity=0.5 must lie between 1 \(every latent on one list\) and num_lists=64"),
        ({"multiplicity": 65}, "multiplicity=65.0 must lie between 1"),
        ({"num_latents": 32, "k": 1}, "num_latents=32 must be at least 64. Every list needs a latent of its own"),
        ({"lists_per_token": 65}, "lists_per_token=65 is more than num_lists=64. Use at most 64"),
        ({"k": 200}, "k=200 is more than the 192 latents of a list"),
        ({"sample": 2.0}, "sample=2.0 and settle=0.2 are shares: at most 1"),
        ({"sample": 0.0}, "sample=0 leaves nothing by which lists could change.*Use lists=random with distill=0"),
        ({"distill": 0.1, "router": ROUTED["cosine_kmeans"]}, "distill=0.1 teaches a router that is not trained"),
        ({"lists": "all"}, "lists='all' is not one of gain, energy, random"),
    ],
)
def test_impossible_configs_say_value_rule_and_fix(change, message):
    with pytest.raises(ValueError, match=message):
        SharedPoolSAE.Config(**change)

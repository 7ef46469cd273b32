"""SAEs whose latents are pairs of keys (KronSAE, product keys, product keys with exact rows), against all M latents written out in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from configs import ARCHITECTURES, CONTRACTS
from counted import executed_flops
from test_pursuit import pursued as by_pursuit
from torch.utils._python_dispatch import TorchDispatchMode

from switch_sae.models import SAES, Inference, KronSAE, ProductKeysExactSAE, ProductKeysSAE, TopKSAE, why_no_inference, with_inference
from switch_sae.models.attribution import attribute
from switch_sae.models.factored import FactoredSAE, staircase
from switch_sae.models.inference import RIDGE
from switch_sae.models.topk import EncoderInit
from switch_sae.models.widths import Match, matched
from switch_sae.rows import Rows
from switch_sae.training import Trainer, TrainerConfig, prepare

D, T, M, K = 12, 80, 48, 4
DEAD_M = torch.arange(M) % 3 == 0
CASES = {
    "kron": KronSAE.Config(num_latents=M, k=K, m=4, n=4),
    "kron, one head": KronSAE.Config(num_latents=M, k=K, m=8, n=6),
    "kron, few pairs": KronSAE.Config(num_latents=M, k=K, m=1, n=3),
    "kron, no biases": KronSAE.Config(num_latents=M, k=K, m=4, n=4, encoder_bias=False),
    "product_keys": ProductKeysSAE.Config(num_latents=M, k=K, keys=4),
    "product_keys, one head": ProductKeysSAE.Config(num_latents=49, k=K),
    "product_keys, k beyond a head": ProductKeysSAE.Config(num_latents=M, k=6, keys=2),
    "product_keys, no biases": ProductKeysSAE.Config(num_latents=M, k=K, keys=4, encoder_bias=False),
    "exact": ProductKeysExactSAE.Config(num_latents=M, k=K, keys=4, candidates=16),
    "exact, one head": ProductKeysExactSAE.Config(num_latents=49, k=K, candidates=9),
    "exact, all": ProductKeysExactSAE.Config(num_latents=M, k=K, keys=4, candidates=M),
    "exact, no biases": ProductKeysExactSAE.Config(num_latents=M, k=K, keys=4, candidates=16, encoder_bias=False),
    "exact, gated": ProductKeysExactSAE.Config(num_latents=M, k=K, keys=4, candidates=16, gate="score"),
}


def activations(seed: int = 0, rows: int = T, d: int = D) -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + torch.linspace(-2, 2, d)


def build(config, d: int = D):
    """With every parameter away from where it starts."""
    sae = SAES.build(config, d, torch.Generator().manual_seed(1)).double()
    prepare(sae, Rows.of(activations(7, 512, d)), True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in ("W_dec_MD", "b_pre_D"):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return sae


@pytest.fixture(params=list(CASES))
def config(request):
    return CASES[request.param]


def root(product: torch.Tensor) -> torch.Tensor:
    """With gradient 0 at 0."""
    return torch.where(product > 0, product, 1).sqrt() * (product > 0)


def written_out(sae, x_TD: torch.Tensor, detached: bool = False) -> torch.Tensor:
    """[T, M], before any choice: what every latent is before ReLU, from the equations; of candidates only, -1 elsewhere. `detached` holds b_pre."""
    config, (G, L, R) = sae.config, sae.config.heads_left_right
    x_TD = x_TD * sae.activation_scale - (sae.b_pre_D.detach() if detached else sae.b_pre_D)
    b_key_P = torch.zeros(G * (L + R), dtype=torch.float64) if sae.b_key_P is None else sae.b_key_P
    latents = []
    for g in range(G):
        rows = slice(g * (L + R), (g + 1) * (L + R))
        keys_TP = x_TD @ sae.W_key_PD[rows].T + b_key_P[rows]
        for i in range(L):
            for j in range(R):
                latents.append((keys_TP[:, :L], keys_TP[:, L:], i, j))
    columns = []
    for number, (u_TL, v_TR, i, j) in enumerate(latents):
        u, v = u_TL[:, i], v_TR[:, j]
        if isinstance(sae, KronSAE):
            columns.append(root(u.relu() * v.relu()))
            continue
        bias = 0 if sae.b_enc_M is None else sae.b_enc_M[number]
        if isinstance(sae, ProductKeysExactSAE):
            own = x_TD @ sae.W_enc_MD[number]
            columns.append(own + u + v + bias if config.gate.name == "none" else root((own + bias).relu() * (u + v).relu()))
        else:
            columns.append(u + v + bias)
    return torch.stack(columns, dim=1)


def candidates(sae, x_TD: torch.Tensor) -> torch.Tensor:
    """bool [T, M]: the latents that may be chosen, by loops over tokens."""
    (G, L, R), k = sae.config.heads_left_right, sae.config.k
    allowed = np.ones((len(x_TD), sae.num_latents), dtype=bool)
    if isinstance(sae, KronSAE):
        return torch.tensor(allowed)
    centred = (x_TD * sae.activation_scale - sae.b_pre_D).detach().numpy()
    bias_P = 0 if sae.b_key_P is None else sae.b_key_P.detach().numpy()
    keys = centred @ sae.W_key_PD.detach().numpy().T + bias_P
    for t, row in enumerate(keys.reshape(len(x_TD), G, L + R)):
        if isinstance(sae, ProductKeysExactSAE):
            scores = np.array([row[g, i] + row[g, L + j] for g in range(G) for i in range(L) for j in range(R)])
            allowed[t] = np.isin(np.arange(len(scores)), np.argsort(-scores)[: sae.config.retrieved])
        else:
            left = [set(np.argsort(-row[g, :L])[:k]) for g in range(G)]
            right = [set(np.argsort(-row[g, L:])[:k]) for g in range(G)]
            allowed[t] = [i in left[g] and j in right[g] for g in range(G) for i in range(L) for j in range(R)]
    return torch.tensor(allowed)


def by_hand(sae, x_TD: torch.Tensor) -> torch.Tensor:
    """[T, M]: the latents, with gradients."""
    pre_TM = written_out(sae, x_TD)
    top = pre_TM.detach().masked_fill(~candidates(sae, x_TD), -torch.inf).topk(sae.config.k, dim=1).indices
    return torch.zeros_like(pre_TM).scatter(1, top, pre_TM.gather(1, top)).relu()


def dead_of(sae) -> torch.Tensor:
    return torch.arange(sae.num_latents) % 3 == 0


def test_latents_reconstruction_losses_and_all_gradients_equal_brute_force(config):
    sae, x_TD = build(replace(config, auxk_latents=5)), activations()
    dead_M = dead_of(sae)
    output = sae(x_TD)
    terms = sae.loss_terms(Rows.of(x_TD), output, dead_M)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(sum(terms.values()), parameters)

    z_TM, scaled_TD = by_hand(sae, x_TD), x_TD * sae.activation_scale
    recon_TD = z_TM @ sae.W_dec_MD + sae.b_pre_D
    mse = (scaled_TD - recon_TD).square().sum(dim=1).mean()
    residual_TD = (scaled_TD - recon_TD).detach()
    pre_TM = written_out(sae, x_TD, detached=True)
    top = pre_TM.detach().masked_fill(~dead_M, -torch.inf).topk(5, dim=1).indices
    dead_TD = torch.zeros_like(pre_TM).scatter(1, top, pre_TM.gather(1, top)).relu() @ sae.W_dec_MD
    auxk = (residual_TD - dead_TD).square().sum() / (residual_TD - residual_TD.mean(dim=0)).square().sum() * D / 32
    expected = torch.autograd.grad(mse + auxk, parameters)

    assert (output.latents.to_dense() - z_TM).abs().max() <= 1e-9 and (z_TM > 0).sum() > T
    torch.testing.assert_close(output.recon_TD, recon_TD / sae.activation_scale, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms["mse"], mse, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms["auxk"], auxk, rtol=1e-9, atol=1e-9)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max(), name
        assert theirs.abs().max() > 0, name


def test_the_gradient_of_activations_is_that_of_brute_force(config):
    sae = build(config)
    x_TD = activations().requires_grad_()
    (found,) = torch.autograd.grad(sae(x_TD).recon_TD.square().sum(), x_TD)
    recon_TD = (by_hand(sae, x_TD) @ sae.W_dec_MD + sae.b_pre_D) / sae.activation_scale
    (expected,) = torch.autograd.grad(recon_TD.square().sum(), x_TD)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_refits_take_the_encoders_support_and_train_it_to_match(config):
    sae, x_TD = build(replace(config, inference="refit")), activations()
    output = sae(x_TD)
    proposed_TM, z_TM = by_hand(sae, x_TD), output.latents.to_dense()
    scaled_TD, W_MD = x_TD * sae.activation_scale, sae.W_dec_MD.detach()
    assert ((z_TM > 0) <= (proposed_TM > 0)).all() and (z_TM > 0).sum() > T
    slope_TM = (scaled_TD - sae.b_pre_D.detach() - z_TM @ W_MD) @ W_MD.T - RIDGE * z_TM
    assert slope_TM[z_TM > 0].abs().max() < 1e-9  # least squares on what is left of the support
    terms = sae.loss_terms(Rows.of(x_TD), output)
    parameters = list(sae.parameters())
    loss = (scaled_TD - z_TM @ sae.W_dec_MD - sae.b_pre_D).square().sum(dim=1).mean() + (proposed_TM - z_TM).square().sum(dim=1).mean()
    assert terms.keys() == {"mse", "match"}
    found, expected = torch.autograd.grad(sum(terms.values()), parameters), torch.autograd.grad(loss, parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_pursuit_is_for_scoring_alone(config):
    sae, x_TD = build(config).eval(), activations()
    for way in Inference:
        assert why_no_inference(sae, way) is None
    with pytest.raises(ValueError, match=rf"inference=pursuit cannot be trained: {type(sae).__name__} trains by inference=encoder or refit"):
        Trainer(build(replace(config, inference="pursuit")), TrainerConfig(), 1, T)
    pursued = with_inference(sae, "pursuit")
    if pursued.searches_lists:
        return
    dense = TopKSAE(TopKSAE.Config(num_latents=sae.num_latents, k=config.k, inference="pursuit"), D).double().eval()
    dense.load_state_dict({name: tensor for name, tensor in sae.state_dict().items() if name in dense.state_dict()}, strict=False)
    assert torch.equal(pursued.encode(x_TD).to_dense(), dense.encode(x_TD).to_dense())
    assert pursued.flops().encode == dense.flops().encode


def test_pursuit_searches_what_product_keys_retrieve():
    sae, x_TD = build(ARCHITECTURES["product_keys_exact"]).eval(), activations()
    found = with_inference(sae, "pursuit").encode(x_TD).to_dense()
    centred = (x_TD * sae.activation_scale - sae.b_pre_D).detach()
    u_TGL, v_TGR = sae._keys(x_TD * sae.activation_scale)
    scores = (u_TGL[..., :, None] + v_TGR[..., None, :]).flatten(1)
    for t, latents in enumerate(scores.topk(sae.config.retrieved, dim=1).indices):
        z = torch.tensor(by_pursuit(centred[t].numpy(), sae.W_dec_MD.detach().numpy()[latents], 4, 4, 1e-3)[0])
        assert (found[t, latents] - z).abs().max() <= 1e-9 and (found[t] > 0).sum() == (z > 0).sum() > 0


def test_no_latent_is_chosen_twice(config):
    indices_TK = build(config).encode(activations()).indices_TK
    assert all(len(row.unique()) == config.k for row in indices_TK)


@pytest.mark.parametrize("name", ["kron", "product_keys", "exact"])
def test_equal_scores_choose_any_of_them_with_the_same_values_every_time(name):
    """Of equal latents it does not matter which, only how many; and all tokens of a value choose alike."""
    sae = build(CASES[name])
    with torch.no_grad():
        sae.W_key_PD[1::2] = sae.W_key_PD[::2]
        sae.b_key_P[1::2] = sae.b_key_P[::2]
        if not isinstance(sae, KronSAE):
            sae.b_enc_M.fill_(0.1)
        if isinstance(sae, ProductKeysExactSAE):
            sae.W_enc_MD.fill_(0.02)
    x_TD = activations().repeat(2, 1)
    latents = sae.encode(x_TD)
    expected_TM = written_out(sae, x_TD).detach().relu().sort(dim=1, descending=True).values[:, : sae.k]
    torch.testing.assert_close(latents.values_TK.sort(dim=1, descending=True).values, expected_TM, rtol=1e-9, atol=1e-9)
    assert torch.equal(latents.indices_TK[:T], latents.indices_TK[T:])


@pytest.mark.parametrize(("left", "right", "count"), [(1, 7, 5), (6, 4, 9), (16, 16, 16), (5, 5, 25), (3, 3, 40)])
def test_the_staircase_holds_the_best_pairs_of_every_score_that_grows_with_both(left, right, count):
    r, s = staircase(left, right, count, torch.device("cpu"))
    generator = torch.Generator().manual_seed(count)
    u, v = (torch.rand(size, generator=generator).sort(descending=True).values for size in (left, right))
    count = min(count, left * right)
    for score in (torch.add, torch.mul, torch.minimum):
        everything = score(u[:, None], v).flatten().topk(count).values
        torch.testing.assert_close(score(u[r], v[s]).topk(count).values, everything)
    assert len(set(zip(r.tolist(), s.tolist(), strict=True))) == len(r) <= max(count, count * (1 + math.log(count)))


def test_the_bias_of_each_latent_acts_before_it_is_chosen():
    """The published code adds it only to pairs that do not exist, and masks those."""
    sae, x_TD = build(ProductKeysSAE.Config(num_latents=49, k=K)), activations()
    with torch.no_grad():
        sae.b_enc_M.zero_()
        before = sae.encode(x_TD)
        latent = int(before.firing_counts().argmax())
        sae.b_enc_M[latent] = -100.0
        without = sae.encode(x_TD)
        sae.b_enc_M[latent] = 2.0
        more = sae.encode(x_TD)
    one = torch.tensor([latent])
    fired = before.select(one)[:, 0] > 0
    assert fired.any() and (without.select(one) == 0).all()
    torch.testing.assert_close(more.select(one)[fired], before.select(one)[fired] + 2.0)
    assert more.firing_counts()[latent] > before.firing_counts()[latent]


def test_the_decoder_starts_as_the_unit_sums_of_keys():
    for name in ("kron", "product_keys", "exact"):
        for init in EncoderInit:
            sae = SAES.build(replace(CASES[name], encoder_init=init), D, torch.Generator().manual_seed(0))
            keys_GPD = sae.W_key_PD.detach().view(3, 8, D)
            for g, i, j in ((0, 0, 0), (1, 2, 3), (2, 3, 1)):
                wanted = keys_GPD[g, i] + keys_GPD[g, 4 + j]
                torch.testing.assert_close(sae.W_dec_MD[(g * 4 + i) * 4 + j], wanted / wanted.norm())
            norms = sae.W_key_PD.norm(dim=1)
            assert (norms.std() > 0.01) == (init is EncoderInit.linear) or name == "exact"


def test_without_rows_of_its_own_the_exact_one_is_that_of_product_keys_where_all_pairs_are_candidates():
    exact, plain = build(CASES["exact, all"]), build(replace(CASES["product_keys"], k=K))
    with torch.no_grad():
        exact.W_enc_MD.zero_()
    plain.load_state_dict({name: tensor for name, tensor in exact.state_dict().items() if name != "W_enc_MD"})
    torch.testing.assert_close(exact.encode(activations()).to_dense(), plain.encode(activations()).to_dense(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["kron", "product_keys", "exact", "exact, gated"])
def test_trained_with_all_it_needs_it_beats_its_start(name):
    sae = SAES.build(CASES[name], D, torch.Generator().manual_seed(0))
    x_TD = torch.randn(1500, 6, generator=torch.Generator().manual_seed(1)).relu() @ torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    prepare(sae, Rows.of(x_TD), True)
    trainer = Trainer(sae, TrainerConfig(lr=1e-2), total_steps=120, batch_size=150)
    fvu = [trainer.step(Rows.of(x_TD[step % 10 * 150 : (step % 10 + 1) * 150])).fvu() for step in range(120)]
    assert sum(fvu[-10:]) < 0.5 * sum(fvu[:10])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made while it is on."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    "config",
    [
        KronSAE.Config(num_latents=4096, k=4, m=32, n=32),
        ProductKeysSAE.Config(num_latents=4096, k=4),
        ProductKeysExactSAE.Config(num_latents=4096, k=4, candidates=32),
    ],
)
def test_no_tensor_holds_all_latents_of_all_tokens_or_all_rows_of_candidates(config):
    sae, x_TD = SAES.build(config, 16), torch.randn(1024, 16)
    with Largest() as largest:
        sum(sae.loss_terms(Rows.of(x_TD), sae(x_TD)).values()).backward()
    assert 0 < largest.numel <= 1024 * 272 < 1024 * 32 * 16 < 1024 * 4096


COUNTED = {
    "topk": TopKSAE.Config(num_latents=256, k=8),
    "kron": KronSAE.Config(num_latents=256, k=8, m=8, n=8),
    "product_keys": ProductKeysSAE.Config(num_latents=256, k=8),
    "product_keys, heads": ProductKeysSAE.Config(num_latents=256, k=8, keys=8),
    "exact": ProductKeysExactSAE.Config(num_latents=256, k=8, candidates=40),
    "exact, gated": ProductKeysExactSAE.Config(num_latents=256, k=8, candidates=40, gate="score"),
}


@pytest.mark.parametrize("name", list(COUNTED))
def test_flops_are_as_executed(name):
    sae, x_TD = SAES.build(COUNTED[name], 128, torch.Generator().manual_seed(0)), torch.randn(2048, 128)
    claimed, rows = sae.flops(), Rows.of(x_TD)

    def step():
        torch.autograd.grad(sum(sae.loss_terms(rows, sae(x_TD)).values()), list(sae.parameters()))

    assert executed_flops(step) / len(x_TD) == pytest.approx(claimed.total, rel=0.02)
    sae.eval()
    with torch.no_grad():
        assert executed_flops(lambda: sae.encode(x_TD)) / len(x_TD) == pytest.approx(claimed.router + claimed.encode, rel=0.02)
        assert executed_flops(lambda: sae(x_TD)) / len(x_TD) == pytest.approx(claimed.forward, rel=0.02)


def test_flops_are_counted_by_hand():
    d, m, k = 10, 64, 4
    row = 2 * d
    kron = KronSAE(KronSAE.Config(num_latents=m, k=k, m=4, n=8), d).flops()
    assert (kron.encode, kron.decode, kron.backward) == (row * 24, row * k, row * 24 + 2 * row * k)
    keys = ProductKeysSAE(ProductKeysSAE.Config(num_latents=m, k=k), d).flops()
    assert (keys.encode, keys.backward) == (row * 16, row * 16 + 2 * row * k)
    exact = ProductKeysExactSAE(ProductKeysExactSAE.Config(num_latents=m, k=k, candidates=20), d).flops()
    assert (exact.encode, exact.backward) == (row * 36, row * 16 + 3 * row * k)
    refit = KronSAE(KronSAE.Config(num_latents=m, k=k, m=4, n=8, inference="refit"), d).flops()
    dense = {way: TopKSAE(TopKSAE.Config(num_latents=m, k=k, inference=way), d).flops() for way in ("encoder", "refit")}
    assert refit.encode - kron.encode == dense["refit"].encode - dense["encoder"].encode
    assert kron.backward - refit.backward == dense["encoder"].backward - dense["refit"].backward


@pytest.mark.parametrize(("m", "n", "share"), [(1, 8, 1.125), (2, 2, 1), (4, 4, 0.5), (8, 64, 0.140625), (32, 32, 1 / 16)])
def test_krons_encoder_costs_the_share_that_it_says(m, n, share):
    dense = TopKSAE.Config(num_latents=4096, k=16)
    assert SAES.build(KronSAE.Config(num_latents=4096, k=16, m=m, n=n), 8).flops().encode == share * SAES.build(dense, 8).flops().encode


@pytest.mark.parametrize(
    ("owner", "settings", "message"),
    [
        (KronSAE, {"num_latents": 50, "m": 4, "n": 4}, r"num_latents=50 is no multiple of m \* n = 4 \* 4: latents are pairs. Use 48 or 64\."),
        (KronSAE, {"num_latents": 5, "m": 4, "n": 4, "k": 1}, r"num_latents=5 is no multiple .* Use 16\."),
        (KronSAE, {"m": 0}, "m=0 must be at least 1"),
        (ProductKeysSAE, {"num_latents": 4000}, r"num_latents=4000 is no square.* Use 3969 or 4096, or several heads: keys=16"),
        (ProductKeysSAE, {"num_latents": 50, "keys": 4, "k": 1}, r"num_latents=50 is no multiple of keys\^2 = 16.* Use 48 or 64\."),
        (ProductKeysSAE, {"num_latents": 10, "keys": 4, "k": 1}, r"num_latents=10 is no multiple of keys\^2 = 16.* Use 16\."),
        (ProductKeysSAE, {"num_latents": 16, "k": 17}, "k=17 is more than num_latents=16"),
        (ProductKeysExactSAE, {"candidates": 8, "k": 16}, "candidates=8 are fewer than the k=16 that are chosen of them. Use candidates >= 16"),
        (ProductKeysExactSAE, {"num_latents": 64, "k": 4, "candidates": 65}, "num_latents=64 are fewer than candidates=65. Use num_latents >= 65"),
    ],
)
def test_impossible_configs_say_value_rule_and_fix(owner, settings, message):
    with pytest.raises(ValueError, match=message):
        owner.Config(**settings)


def test_widths_of_equal_cost_are_found_with_several_heads_and_one_head_says_why_not():
    reference = TopKSAE.Config(num_latents=256, k=4)
    found = matched(ProductKeysSAE.Config(num_latents=64, k=4, keys=8), reference, Match.active, D)
    assert found.num_latents == 64 * 256 // 16 and found.keys == 8
    with pytest.raises(ValueError, match=r"is no square.* or several heads: keys=16"):
        matched(ProductKeysSAE.Config(num_latents=64, k=4), reference, Match.active, D)


def test_what_reads_encoder_rows_is_told_that_there_are_none():
    for name in ("kron", "product_keys", "exact"):
        with pytest.raises(ValueError, match=r"has no one encoder row for each latent"):
            attribute(build(CASES[name]), Rows.of(activations()), torch.ones(D, dtype=torch.float64))


def test_all_of_them_are_under_contract():
    kinds = {type(config) for config in CONTRACTS.values()}
    assert all(cls.Config in kinds for cls in SAES.values() if issubclass(cls, FactoredSAE))

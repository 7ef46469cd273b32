"""Router geometry: sparse sums, subspaces, predicted routes and statistics against brute force and planted truth, and the analysis on tiny runs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_report import tiny_run

from switch_sae.activations import SyntheticSource
from switch_sae.activations.language_model_source import LanguageModelSource
from switch_sae.activations.text import TextConfig
from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.observed import observe
from switch_sae.analysis.recovery import cosines
from switch_sae.analysis.router import partner
from switch_sae.analysis.router_geometry import rows as router_rows
from switch_sae.analysis.router_geometry.parts import Routed, half_explained, sparsity
from switch_sae.analysis.router_geometry.prediction import bigram_keys, by_table, fitted_logits, nearest_centroid, order_of_entry
from switch_sae.analysis.router_geometry.sparse_regression import rotation, similar_in_frequency, sparse_sums, sums_of
from switch_sae.analysis.router_geometry.statistics import (
    adjusted_rand,
    co_routing,
    following,
    information,
    over_documents,
    shuffled,
    transition_counts,
)
from switch_sae.analysis.router_geometry.subspaces import complement, energy_share, moments, random_span, read, span, squared_errors
from switch_sae.models import SparseLatents, SwitchSAE, TopKSAE
from switch_sae.models.routers import ROUTERS
from switch_sae.results import collect
from switch_sae.results.source import source_of

TINY = {"rows": 400, "most": 6, "features": 8, "draws": 2, "permutations": 10, "tokens": 4, "latents": 5, "swaps": 200}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nonnegative", [False, True])
def test_sums_of_three_planted_rows_are_found(nonnegative):
    dictionary = normal(300, 64)
    rows = torch.tensor([[3, 70, 200], [5, 6, 7], [299, 0, 150]])
    weight = torch.tensor([1.0, 0.8, 1.2])[:, None]
    target = (F.normalize(dictionary, dim=1)[rows] * weight).sum(1)
    found = sparse_sums(target, dictionary, 3, nonnegative)
    assert found.index_RS.sort(1).values.tolist() == rows.sort(1).values.tolist()
    assert found.r2_RS[:, 2].min() > 1 - 1e-6 > found.r2_RS[:, 1].max()
    ordered = found.weight_RS.gather(1, found.index_RS.argsort(1))
    wanted = weight[:, 0].expand(3, 3).gather(1, rows.argsort(1)) / target.norm(dim=1, keepdim=True)
    assert torch.allclose(ordered.float(), wanted, atol=1e-4)


def test_matching_pursuit_is_that_of_the_book():
    dictionary, target = normal(40, 12).double(), normal(5, 12, seed=1).double()
    unit = F.normalize(dictionary, dim=1)
    found = sparse_sums(target, dictionary, 8)
    for r, wanted in enumerate(F.normalize(target, dim=1)):
        support, rest = [], wanted
        for s in range(8):
            support.append(int((unit @ rest).abs().argmax()))
            weight = torch.linalg.lstsq(unit[support].T, wanted[:, None]).solution[:, 0]
            rest = wanted - weight @ unit[support]
            assert found.index_RS[r, s] == support[s] and float(found.r2_RS[r, s]) == pytest.approx(1 - float(rest @ rest), abs=1e-6)
    given = sums_of(target, dictionary, found.index_RS)
    assert torch.allclose(given, found.r2_RS, atol=1e-6)
    assert sums_of(target, dictionary, torch.tensor([[4, 4]] * 5))[:, 0].equal(sums_of(target, dictionary, torch.tensor([[4, 4]] * 5))[:, 1])


def test_nonnegative_sums_reach_the_nonnegative_optimum():
    optimize = pytest.importorskip("scipy.optimize")
    dictionary, target = normal(30, 20).double(), normal(6, 20, seed=1).double()
    found = sparse_sums(target, dictionary, 30, nonnegative=True)
    for r in range(6):
        weight, rest = optimize.nnls(F.normalize(dictionary, dim=1).T.numpy(), F.normalize(target, dim=1)[r].numpy())
        used = found.index_RS[r] >= 0
        assert float(found.r2_RS[r, -1]) == pytest.approx(1 - rest**2, abs=1e-6)
        assert sorted(found.index_RS[r][used].tolist()) == (torch.as_tensor(weight) > 1e-9).nonzero()[:, 0].tolist()
        assert bool((found.weight_RS[r] >= 0).all()) and bool((found.weight_RS[r][~used] == 0).all())
    for size in range(1, 6):  # never more rows than asked for, and a curve that only rises
        few = sparse_sums(target, dictionary, size, nonnegative=True)
        assert int((few.index_RS >= 0).sum(1).max()) <= size and bool((few.r2_RS.diff(dim=1) >= 0).all())


def test_nulls_keep_what_they_should():
    turn = rotation(9, torch.Generator().manual_seed(0))
    assert torch.allclose(turn @ turn.T, torch.eye(9, dtype=torch.float64), atol=1e-12)
    dictionary, target = normal(30, 9), normal(4, 9, seed=1)
    other_way = sparse_sums(target, (dictionary.double() @ turn.T).float(), 5).r2_RS
    assert torch.allclose(sparse_sums((target.double() @ turn).float(), dictionary, 5).r2_RS, other_way, atol=1e-5)
    counts = torch.arange(200).float()
    rows = torch.randint(200, (6, 10), generator=torch.Generator().manual_seed(2))
    drawn = similar_in_frequency(rows, counts, torch.Generator().manual_seed(0), among=21)
    assert not bool((drawn == rows).any()) and int((drawn - rows).abs().max()) <= 20
    assert all(len(set(line)) == 10 for line in drawn.tolist())
    with pytest.raises(ValueError, match="exactly 0 and have no direction"):
        sparse_sums(target, torch.zeros(3, 9), 2)
    with pytest.raises(ValueError, match=r"most=31 rows of a dictionary of 30"):
        sparse_sums(target, dictionary, 31)
    assert half_explained(torch.tensor([0.1, 0.3, 0.7])) == pytest.approx(2.5) and half_explained(torch.tensor([0.1])) is None
    assert half_explained(torch.tensor([0.8])) == pytest.approx(0.625)


def test_parts_of_space_and_what_is_read_from_them():
    rows = router_rows.centred(normal(5, 12))
    basis = span(rows)
    rest = complement(basis)
    assert basis.shape == (12, 4) and rest.shape == (12, 8)
    whole = torch.cat([basis, rest], 1)
    assert torch.allclose(whole @ whole.T, torch.eye(12, dtype=torch.float64), atol=1e-10)
    assert float((rows.double() @ rest).abs().max()) < 1e-6
    inside, total = energy_share(rows, basis)
    assert torch.allclose(inside, total)
    assert random_span(12, 3, torch.Generator().manual_seed(0)).shape == (12, 3)
    x, weight = normal(500, 12, seed=1), normal(12, 2, seed=2)
    wanted = (x @ basis.float() @ basis.float().T @ weight) + 3.0
    known = moments(x[:300], wanted[:300])
    for part, explained in ((basis, 1.0), (rest, 0.0)):
        above, below = squared_errors(read(x[300:], known.reader(part)), wanted[300:], known.variance_C)
        assert float(1 - above.sum() / below.sum()) == pytest.approx(explained, abs=0.06)
    full = known.reader(torch.eye(12, dtype=torch.float64))
    ridge = 1e-3 * torch.cov(x[:300].double().T, correction=0).diagonal().mean() * 300
    away, centred = x[:300].double() - x[:300].double().mean(0), wanted[:300].double() - wanted[:300].double().mean(0)
    brute = torch.linalg.lstsq(torch.cat([away, ridge.sqrt() * torch.eye(12)]), torch.cat([centred, torch.zeros(12, 2)])).solution
    assert torch.allclose(full[0], brute, atol=1e-8)


def codes(rows, latents, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(latents, generator=generator)[:k] for _ in range(rows)])
    return SparseLatents(torch.rand(rows, k, generator=generator) + 0.5, index, latents)


def test_the_group_lasso_enters_the_latents_that_decide():
    latents = codes(3000, 40, 6)
    dense = latents.to_dense()
    score = torch.stack([dense[:, 3], 1.1 * dense[:, 17], 0.9 * dense[:, 29], torch.full((3000,), 0.3)], 1)
    route = score.argmax(1)
    order = order_of_entry(latents, route, 4, 10, grid=20)
    assert sorted(order[:3].tolist()) == [3, 17, 29] and len(set(order.tolist())) == len(order)
    right = (fitted_logits(dense[:2000, order[:3]], route[:2000], dense[2000:, order[:3]], 4).argmax(1) == route[2000:]).float().mean()
    worse = (fitted_logits(dense[:2000, :3], route[:2000], dense[2000:, :3], 4).argmax(1) == route[2000:]).float().mean()
    assert right > 0.95 > 0.8 > worse
    rare = replace(latents, indices_TK=torch.where(latents.indices_TK == 3, 39, latents.indices_TK))
    assert 3 not in order_of_entry(rare, route, 4, 40, grid=5).tolist()  # it never fires now


def test_tables_and_centroids_are_those_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    token, route, other = (torch.randint(size, (200,), generator=generator) for size in (9, 4, 12))
    guess = by_table(token, route, other, torch.full((200,), 7))
    for key, found in zip(other.tolist(), guess.tolist(), strict=True):
        routes = route[token == key]
        assert found == (int(routes.bincount(minlength=4).argmax()) if len(routes) else 7)
    keys = bigram_keys(torch.tensor([-1, 2, 2, 3]), torch.tensor([1, 1, 1, 0]))
    assert keys[0] == -1 and keys[1] == keys[2] != keys[3]
    x, y = normal(200, 5), normal(50, 5, seed=1)
    means = torch.stack([x[route == e].mean(0) for e in range(4)])
    assert torch.equal(nearest_centroid(x, route, y, 6), torch.cdist(y, means).argmin(1))


def test_statistics_of_routes_are_those_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    route, context = torch.randint(3, (300,), generator=generator), torch.arange(300) // 7
    pairs = following(context)
    counts = transition_counts(route, pairs, 3)
    wanted = torch.zeros(3, 3, dtype=torch.int64)
    for t in range(299):
        if context[t] == context[t + 1]:
            wanted[route[t], route[t + 1]] += 1
    assert torch.equal(counts, wanted)
    joint = counts / counts.sum()
    by_hand = sum(float(p) * float(torch.log2(p / joint.sum(1)[a] / joint.sum(0)[b])) for a, line in enumerate(joint) for b, p in enumerate(line))
    assert information(counts) == pytest.approx(by_hand, abs=1e-6)
    assert information(torch.eye(4) * 9) == pytest.approx(2.0, abs=1e-6) and information(torch.ones(4, 4)) == pytest.approx(0, abs=1e-6)
    mixed = shuffled(route, context, generator)
    assert not torch.equal(mixed, route)
    assert all(sorted(mixed[context == c].tolist()) == sorted(route[context == c].tolist()) for c in range(43))
    value, interval = over_documents(context, {"mean": (route.double(), None)})["mean"]
    assert value == pytest.approx(float(route.double().mean())) and interval[0] < value < interval[1]
    both = co_routing(route, mixed, (3, 3))
    agree = [(bool(route[i] == route[j]), bool(mixed[i] == mixed[j])) for i in range(60) for j in range(i)]
    small = co_routing(route[:60], mixed[:60], (3, 3))
    a, b, ab, n = sum(x for x, _ in agree), sum(y for _, y in agree), sum(x & y for x, y in agree), len(agree)
    assert adjusted_rand(small) == pytest.approx((ab - a * b / n) / ((a + b) / 2 - a * b / n))
    assert adjusted_rand(co_routing(route, route.flip(0).flip(0), (3, 3))) == 1 and abs(adjusted_rand(both)) < 0.1


def test_own_against_others_is_that_of_brute_force():
    score = normal(6, 6)
    own, others, auc = router_rows.own_and_others(score)
    pairs = [(e, f) for e in range(6) for f in range(6) if e != f]
    assert own == pytest.approx(float(score.diagonal().mean())) and others == pytest.approx(sum(float(score[e, f]) for e, f in pairs) / 30)
    assert auc == pytest.approx(sum(float(score[e, e] > score[e, f]) for e, f in pairs) / 30)
    assert router_rows.own_and_others(torch.ones(3, 3))[2] == 0.5
    rows = normal(4, 10)
    weight = rows[:, None] + 0.1 * normal(4, 7, 10, seed=1)
    for score in router_rows.cosines_with_experts(router_rows.centred(rows), weight).values():
        assert router_rows.own_and_others(score)[2] == 1.0
    latents, expert, known = codes(50, 12, 3), torch.arange(50) % 4, normal(12, 10, seed=3)
    fires = latents.to_dense() != 0
    load = expert.bincount()
    owner = [max(range(4), key=lambda e: float(fires[expert == e, m].sum() / load[e])) for m in range(12)]
    mean = router_rows.mean_rows(known, latents, expert, 4)
    for e in range(4):
        mine = [F.normalize(known[m], dim=0) for m in range(12) if owner[m] == e]
        assert torch.allclose(mean[e].float(), torch.stack(mine).mean(0) if mine else torch.zeros(10), atol=1e-6)
    cosine = cosines(rows, rows)
    assert router_rows.mean_similarity(rows) == pytest.approx(float(cosine[~torch.eye(4, dtype=torch.bool)].mean()))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two dense seeds, two Switch seeds, and other routers, on the same synthetic activations."""
    folder = tmp_path_factory.mktemp("router")
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    switch = SwitchSAE.Config(num_latents=32, k=4, num_experts=4)
    saes = [("topk", TopKSAE.Config(num_latents=32, k=4), seed) for seed in (0, 1)] + [("switch", switch, seed) for seed in (0, 1)]
    for kind in ("bias_balanced", "cosine_kmeans"):
        saes.append((kind, replace(switch, router=ROUTERS.config_of(kind)(), experts_per_token=2), 0))
    runs = [tiny_run(folder, sae, seed, source=source, baselines=[], name=f"{name}-s{seed}") for name, sae, seed in saes]
    return [row for run in runs for row in collect([run.path])]


def test_the_analysis_of_tiny_runs_says_all_it_can(rows):
    pytest.importorskip("scipy")
    table = build_analysis("router", TINY).compute(rows, source_of(rows[0]))
    assert all(list(record) == list(table[0]) for record in table)
    assert {record["sae"] for record in table} == {row.name for row in rows if row.num_experts > 1}
    parts = {record["part"] for record in table}
    assert parts == {"sparsity", "prediction", "control", "coupling", "margins", "stability"}
    switch = rows[2].name
    taken = chosen(table, measure="swap, route of the partner", sae=switch)
    assert [record["value"] for record in taken] == [1.0] * 3 and taken[0]["null"] == 0.0
    shares = chosen(table, measure="share of x", sae=switch)
    assert all(0 < record["value"] < 1 for record in shares)
    for record in chosen(table, part="sparsity", sae=switch):
        assert record["ceiling"] is not None or record["measure"].endswith(("components", "another seed")) or "not reached" in record["note"]
    (agreement,) = chosen(table, measure="agreement", sae=switch)
    assert agreement["against"] == rows[3].name and 0 < agreement["value"] <= 1
    balances = {record["sae"]: record["against"] for record in chosen(table, measure="similarity of rows")}
    assert [balances[row.name] for row in rows[2:]] == ["balance: loss", "balance: loss", "balance: bias", "balance: centroids"]
    kmeans = chosen(table, sae=rows[5].name)
    assert all(record["note"] == "directions are the unit centroids" for record in chosen(kmeans, measure="AUC cosine decoder mean"))
    assert "no margin" in chosen(kmeans, measure="p1 - p2")[0]["note"]
    unknown = chosen(table, measure="accuracy", against=("token", "bigram"), sae=switch)
    assert [(record["value"], record["note"]) for record in unknown] == [(None, "these activations have no tokens")] * 2
    assert table == build_analysis("router", TINY).compute(rows, source_of(rows[0]))
    assert len(build_analysis("router").draw(table).axes) == 6
    assert len(build_analysis("router").shown(table)) < len(table)


def test_what_is_missing_is_said(rows):
    table = analyze("router", rows[2:3], TINY)
    assert chosen(table, part="sparsity")[0]["note"] == "no dense SAE: add a dense run"
    assert chosen(table, part="stability")[0]["note"] == "no second seed of this SAE"
    assert chosen(table, measure="accuracy", against="dense latents")[0]["note"] == "no dense SAE"
    assert all(record["value"] is not None or record["note"] for record in table)
    assert len(build_analysis("router").draw(table).axes) == 6
    with pytest.raises(ValueError, match=r"router needs an SAE with experts"):
        analyze("router", rows[:2], TINY)
    with pytest.raises(ValueError, match="draws=1 must be at least 2"):
        build_analysis("router", {"draws": 1})


def test_a_planted_router_is_a_sum_of_three_dense_rows(rows):
    sample, (dense, seen) = observe([rows[0], rows[2]], source_of(rows[0]), 200)
    one = Routed.of(seen)
    unit = F.normalize(dense.sae.W_enc_MD.detach()[dense.row.firing_counts > 0], dim=1)
    planted = unit[[0, 1, 2, 3]] + unit[[4, 5, 6, 7]] + unit[[8, 9, 10, 11]]
    table = sparsity(replace(one, rows_ED=planted), dense, None, sample, most=16, draws=2)
    at_16 = chosen(table, measure="R2 encoder", at=16)
    assert all(record["value"] > 0.999 for record in at_16) and chosen(table, at=3, measure="R2 encoder")[0]["value"] > 0.8
    assert chosen(table, measure="R2 encoder >= 0", at=1)[0]["note"] == "no ceiling: no second seed of the dense SAE"


def test_what_experts_add_up_to_is_what_they_encode(rows):
    sample, (seen,) = observe([rows[2]], source_of(rows[0]), 100)
    one, sae = Routed.of(seen), seen.sae
    x = sample.rows.x_TD * sae.activation_scale - sae.b_in_D.detach()
    bias = None if sae.b_enc_M is None else sae.b_enc_M.detach().view(4, -1)
    top = router_rows.expert_sums(x, one.expert_rows("encoder"), bias, 4)["top k"]
    own = top.gather(1, one.expert_T()[:, None])[:, 0]
    assert torch.allclose(own, seen.ungated().values_TK.sum(1), atol=1e-4)
    assert torch.equal(one.routes(sample.rows.x_TD), one.expert_T())


def test_a_router_without_directions_is_refused(rows):
    router = rows[2].load().router
    assert torch.equal(router_rows.raw_rows(router)[0], router.W_ED.detach())
    router.directions = lambda: None
    with pytest.raises(ValueError, match="routes by no directions"):
        router_rows.raw_rows(router)


def test_partners_are_near_in_width_and_of_another_seed(rows):
    assert partner(rows[2], rows[:2]) is rows[1] and partner(rows[3], rows[:2]) is rows[0] and partner(rows[2], rows[:1]) is rows[0]
    assert partner(rows[2], []) is None
    wider = replace(rows[0], num_latents=64, seed=5)
    assert partner(rows[2], [wider, rows[0]]) is rows[0]


def test_text_gives_tokens_positions_and_transitions(tmp_path):
    source = LanguageModelSource.Config(
        model="bundled", hook="blocks.1.hook_resid_post", context_length=16, buffer_rows=1024, text=TextConfig(max_documents=4)
    )
    sae = SwitchSAE.Config(num_latents=32, k=4, num_experts=4)
    run = tiny_run(tmp_path, sae, source=source, baselines=[])
    table = build_analysis("router", TINY).compute(collect([run.path]), source_of(collect([run.path])[0]))
    for measure in ("accuracy token", "R2 position", "flips, next token"):
        assert all(record["value"] is not None for record in chosen(table, measure=measure)), measure
    assert len(chosen(table, measure="information, next token")) == 2
    found = {record["against"]: record["value"] for record in chosen(table, measure="accuracy")}
    assert found["token"] is not None and found["bigram"] is not None and found["dense latents"] is None

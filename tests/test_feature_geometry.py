"""Geometry of features: every number against brute force or planted truth, and tables of any runs that a reader gives."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from test_report import tiny_run

from switch_sae.activations import SyntheticSource
from switch_sae.analysis import build_analysis
from switch_sae.analysis.features.copies import close_pairs, cluster_sizes, clusters, expected_highest, first_rank, relabelled, spectral_size
from switch_sae.analysis.features.maps import affinities, layout, preservation, principal, pull
from switch_sae.analysis.features.sparseness import population, sums_of
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.geometry import Features, dense_partner, nearest_rate, nearest_rows
from switch_sae.analysis.observed import observe
from switch_sae.models import SparseLatents, SwitchRefitSAE, SwitchSAE, TopKSAE
from switch_sae.results import collect
from switch_sae.results.source import source_of

SOURCE = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
SETTINGS = {"rows": 400, "shown": 30, "neighbours": 3, "replicates": 50}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A dense SAE, a Switch SAE, one with shared latents, one with two experts per token; and the same with planted copies."""
    folder = tmp_path_factory.mktemp("geometry")
    configs = [
        TopKSAE.Config(num_latents=32, k=4),
        SwitchSAE.Config(num_latents=32, k=4, num_experts=4),
        SwitchSAE.Config(num_latents=32, k=4, num_experts=4, experts_per_token=2),
        SwitchRefitSAE.Config(num_latents=36, k=4, num_experts=4, shared=4),
    ]
    names = [None, None, "two-experts", None]  # whose folder would differ from that before in its time alone
    runs = [tiny_run(folder, config, source=SOURCE, baselines=[], name=name) for config, name in zip(configs, names, strict=True)]
    return collect([run.path for run in runs])


def test_pairs_and_clusters_are_those_of_brute_force():
    unit = F.normalize(random(30, 4), dim=1)
    pairs = close_pairs(unit, 0.7)
    wanted = {(i, j): float(unit[i] @ unit[j]) for i, j in combinations(range(30), 2) if unit[i] @ unit[j] > 0.7}
    found = dict(zip(zip(pairs.first_P.tolist(), pairs.second_P.tolist(), strict=True), pairs.cosine_P.tolist(), strict=True))
    assert len(wanted) > 20 and found == pytest.approx(wanted)
    above = pairs.above(0.9)
    assert set(zip(above.first_P.tolist(), above.second_P.tolist(), strict=True)) == {pair for pair, cosine in wanted.items() if cosine > 0.9}
    assert pairs.touched(30).nonzero()[:, 0].tolist() == sorted({i for pair in wanted for i in pair})
    component = list(range(30))
    for i, j in (pair for pair, cosine in wanted.items() if cosine > 0.8):
        first, second = sorted((component[i], component[j]))
        component = [first if label == second else label for label in component]
    label = clusters(pairs.above(0.8), 30)
    assert label.tolist() == component
    assert sorted(cluster_sizes(label).tolist()) == sorted(component.count(one) for one in set(component))
    chain = close_pairs(F.normalize(torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(20) / 10]), dim=1), 0.99)
    assert set(clusters(chain, 20).tolist()) == {0}  # a chain is one component, however long
    assert len(close_pairs(unit[:0], 0.5).first_P) == 0


def test_too_many_pairs_are_refused(monkeypatch):
    monkeypatch.setattr("switch_sae.analysis.features.copies.MOST_PAIRS", 10)
    with pytest.raises(ValueError, match="Raise the threshold"):
        close_pairs(torch.ones(6, 1), 0.5)


def test_the_expected_highest_cosine_is_what_many_relabellings_give():
    unit, group = F.normalize(random(40, 5), dim=1), torch.tensor([0] * 10 + [1] * 25 + [2] * 5)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    draws = []
    for drawn in relabelled(group, 4000):
        same = drawn[:, None] == drawn
        draws.append([float(cosine.masked_fill(~same, -torch.inf).amax(1).mean()), float(cosine.masked_fill(same, -torch.inf).amax(1).mean())])
    mean, spread = torch.tensor(draws).mean(0), torch.tensor(draws).std(0) / math.sqrt(4000)
    for value, wanted, error in zip(expected_highest(unit, group), mean.tolist(), spread.tolist(), strict=True):
        assert abs(value - wanted) < 5 * error + 1e-6
    assert math.isnan(expected_highest(unit, torch.arange(40))[0]) and math.isnan(expected_highest(unit, torch.zeros(40, dtype=torch.int64))[1])


def test_the_rank_of_the_first_member_is_hypergeometric():
    for others, members in ((12, 3), (7, 7), (9, 1)):
        wanted = [math.comb(others - j, members - 1) / math.comb(others, members) for j in range(1, others - members + 2)]
        assert first_rank(others, members).tolist() == pytest.approx(wanted)
    assert len(first_rank(5, 0)) == 0


def test_the_spectral_size_counts_orthogonal_directions():
    assert spectral_size(torch.eye(8)) == pytest.approx(8)
    assert spectral_size(torch.eye(8).repeat(5, 1)) == pytest.approx(8)
    assert spectral_size(torch.ones(6, 1)) == pytest.approx(1)
    unit = F.normalize(random(20, 6), dim=1)
    p = torch.linalg.eigvalsh((unit @ unit.T).double() / 20).clamp(min=1e-30)
    assert spectral_size(unit) == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-5)


def test_nearest_rows_are_those_of_brute_force_for_experts_of_any_size():
    unit, expert = F.normalize(random(25, 4), dim=1), torch.tensor([0] * 4 + [2] * 15 + [3] * 6)
    nearest, within, across = nearest_rows(unit, expert, 4)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    same = expert[:, None] == expert
    assert torch.equal(nearest, cosine.argmax(1))
    assert torch.allclose(within, cosine.masked_fill(~same, -torch.inf).amax(1))
    assert torch.allclose(across, cosine.masked_fill(same, -torch.inf).amax(1))


def test_rates_are_matched_to_the_nearest_and_equal_ones_are_shared():
    other = torch.tensor([0.5, 0.1, 0.1, 0.3])
    found = nearest_rate(torch.tensor([0.12, 0.09, 0.45, 0.9, 0.21]), other)
    assert other[found].tolist() == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.3]) and set(found[:2].tolist()) == {1, 2}


def test_affinities_have_the_perplexity_that_was_asked_for():
    unit = F.normalize(random(50, 6), dim=1)
    p = affinities(unit, 8.0)
    assert torch.equal(p, p.T) and float(p.sum()) == pytest.approx(1, abs=1e-5) and float(p.diagonal().sum()) == 0
    distance = (unit[:, None] - unit).square().sum(2).double()
    wanted = torch.zeros(50, 50, dtype=torch.float64)
    for i in range(50):
        low, high = 0.0, 1e4
        for _ in range(100):
            beta = (low + high) / 2
            row = (-beta * distance[i]).exp()
            row[i] = 0
            row /= row.sum()
            low, high = (beta, high) if float(torch.special.entr(row).sum().exp()) > 8 else (low, beta)
        wanted[i] = row
    assert torch.allclose(p.double(), (wanted + wanted.T) / 100, atol=1e-6)


def test_the_map_follows_the_gradient_of_the_divergence():
    p, xy = affinities(F.normalize(random(20, 6), dim=1), 5.0).double(), random(20, 2, seed=1).double().requires_grad_()
    near = (1 + torch.cdist(xy, xy).square()).reciprocal() * (1 - torch.eye(20, dtype=torch.float64))
    q = near / near.sum()
    off = ~torch.eye(20, dtype=torch.bool)
    (p[off] * (p[off].clamp(min=1e-300).log() - q[off].log())).sum().backward()
    assert torch.allclose(pull(p, xy.detach(), (torch.empty_like(p), torch.empty_like(p))), xy.grad, atol=1e-9)


def test_a_map_keeps_planted_groups_apart_and_is_the_same_again():
    centre = F.normalize(random(5, 16), dim=1)
    group = torch.arange(100) % 5
    unit = F.normalize(centre[group] + 0.1 * random(100, 16, seed=2), dim=1)
    xy = layout(unit, 10)
    assert torch.equal(xy, layout(unit, 10))
    nearest = torch.cdist(xy, xy).fill_diagonal_(torch.inf).argmin(1)
    assert bool((group[nearest] == group).all())
    assert preservation(unit, xy, 10) > 0.35 > 3 * 10 / 99
    assert preservation(unit, unit, 10) == 1
    near = [set((unit @ unit[i]).masked_fill(torch.arange(100) == i, -9).topk(10).indices.tolist()) for i in range(100)]
    low = [set((xy - xy[i]).square().sum(1).masked_fill(torch.arange(100) == i, 1e9).topk(10, largest=False).indices.tolist()) for i in range(100)]
    assert preservation(unit, xy, 10) == pytest.approx(sum(len(a & b) for a, b in zip(near, low, strict=True)) / 1000, abs=0.002)
    centred, components = unit - unit.mean(0), principal(unit)
    assert torch.allclose(components.square().sum(0), torch.linalg.svdvals(centred)[:2].square(), rtol=1e-4)
    with pytest.raises(ValueError, match="make no map"):
        layout(unit[:3])


def test_population_sparseness_by_its_formulas():
    values = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 2.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    latents = SparseLatents(values, torch.tensor([[0, 4, 7]]).repeat(4, 1), 9)
    found = population(latents)
    dense = latents.to_dense().double()
    for t in range(3):
        r = dense[t]
        a = float((r.mean() ** 2) / r.square().mean())
        hoyer = (3 - float(r.sum() / r.square().sum().sqrt())) / 2
        assert float(found["treves_rolls"][t]) == pytest.approx(a) and float(found["hoyer"][t]) == pytest.approx(hoyer)
        assert float(found["participation"][t]) == pytest.approx(float(r.square().sum() ** 2 / r.pow(4).sum()))
        assert hoyer == pytest.approx((3 - math.sqrt(9 * a)) / 2)  # the docstring's identity
    assert float(found["participation"][1]) == pytest.approx(3) and float(found["hoyer"][2]) == pytest.approx(1)
    assert all(bool(value[3].isnan()) for value in found.values())


@pytest.fixture(scope="module")
def codes():
    """Codes of 60 rows in 6 documents, four latents in two experts and a shared one."""
    generator = torch.Generator().manual_seed(3)
    document, expert = torch.arange(60) // 10, torch.randint(2, (60, 1), generator=generator)
    indices = torch.stack([torch.zeros(60, dtype=torch.int64), 1 + 2 * expert[:, 0] + torch.randint(2, (60,), generator=generator)], 1)
    values = torch.rand(60, 2, generator=generator) * (torch.rand(60, 2, generator=generator) > 0.3)
    return SparseLatents(values, indices, 5), document, torch.tensor([-1, 0, 0, 1, 1]), expert


def brute(latents, expert_of_latent, expert, rows):
    """Lifetime measures of some rows, latent by latent."""
    dense, found = latents.to_dense().double()[rows], {"lifetime": [], "lifetime_in_expert": [], "evenness": []}
    for m in range(5):
        r = dense[:, m]
        own = r if expert_of_latent[m] < 0 else r[(expert[rows, 0] == expert_of_latent[m])]
        for name, part in (("lifetime", r), ("lifetime_in_expert", own)):
            found[name].append(float((1 - part.mean() ** 2 / part.square().mean()) / (1 - 1 / len(part))))
        found["evenness"].append(float(r[r > 0].mean() ** 2 / r[r > 0].square().mean()))
    return {name: sum(values) / 5 for name, values in found.items()}


def test_lifetime_sparseness_by_its_formulas_and_resamples_are_repeated_rows(codes):
    latents, document, of_latent, expert = codes
    sums = sums_of(latents, document, of_latent, expert)
    found = sums.measures(torch.ones(6, dtype=torch.float64))
    for name, value in brute(latents, of_latent, expert, torch.arange(60)).items():
        assert float(found[name]) == pytest.approx(value)
    for name, value_T in population(latents).items():
        assert float(found[name]) == pytest.approx(float(value_T.nanmean()))
    weights = torch.tensor([2, 0, 1, 3, 0, 1], dtype=torch.float64)
    again = torch.cat([torch.arange(60)[document == n].repeat(int(weights[n])) for n in range(6)])
    found = sums.measures(weights)
    for name, value in brute(latents, of_latent, expert, again).items():
        assert float(found[name]) == pytest.approx(value)
    one = sums_of(latents, document, torch.zeros(5, dtype=torch.int64), None).measures(torch.ones(6, dtype=torch.float64))
    assert float(one["lifetime"]) == pytest.approx(float(one["lifetime_in_expert"]))  # without experts all rows are its rows


def test_slopes_are_derivatives(codes):
    latents, document, of_latent, expert = codes
    sums = sums_of(latents, document, of_latent, expert)
    value, slope = sums.slopes()
    for n in range(6):
        weights = torch.ones(6, dtype=torch.float64)
        weights[n] += 1e-6
        for name, moved in sums.measures(weights).items():
            assert float(slope[name][n]) == pytest.approx((float(moved) - value[name]) / 1e-6, abs=1e-5)


def test_one_gate_per_row_changes_no_population_measure(rows):
    table = build_analysis("geometry", SETTINGS).compute(rows, source_of(rows[0]))
    (one,) = [row for row in rows if row.architecture == "switch" and row.kind.experts_per_token == 1]
    part = {
        when: {record["measure"]: record["value"] for record in chosen(table, part="sparseness", sae=one.name, against=f"{when} the gate")}
        for when in ("before", "after")
    }
    for name in ("treves_rolls", "hoyer", "participation"):
        assert part["before"][name] == pytest.approx(part["after"][name], rel=1e-5)
    assert part["before"]["evenness"] != pytest.approx(part["after"]["evenness"], rel=1e-4)


def test_the_table_says_what_brute_force_does(rows):
    analysis = build_analysis("geometry", SETTINGS | {"threshold": 0.6})
    table = analysis.compute(rows, source_of(rows[0]))
    assert all(list(record) == list(table[0]) for record in table) and table == analysis.compute(rows, source_of(rows[0]))
    _, seen = observe(rows, source_of(rows[0]), 400)
    for one in seen:
        mine = chosen(table, sae=one.name)
        count = (one.latents.to_dense() > 0).sum(0)
        live = count.nonzero()[:, 0]
        unit = F.normalize(one.sae.decoder_weight().detach()[live], dim=1)
        expert = one.expert_M[live]
        cosine = (unit @ unit.T).fill_diagonal_(-1)
        assert single(mine, "size", "live")["value"] == len(live)
        for at in (0.6, 0.7, 0.8, 0.9):
            assert single(mine, "copies", "any", at=at)["value"] == pytest.approx(float((cosine.amax(1) > at).double().mean()))
            components = single(mine, "size", "components", at=at)["value"]
            assert components == len(live) if float(cosine.max()) <= at else 1 <= components < len(live)
        deciles = chosen(mine, part="by_rate", measure="any")
        assert sum(record["n"] for record in deciles) == len(live)
        assert sum(record["n"] * record["value"] for record in deciles) / len(live) == pytest.approx(deciles[0]["null"])
        assert [record["at"] for record in deciles] == sorted(record["at"] for record in deciles)
        assert sum(record["at"] * record["n"] for record in deciles) == pytest.approx(float(count.sum()) / 400)
        assert sum(record["value"] for record in chosen(mine, measure="in_clusters")) == pytest.approx(1)
        if one.routing is None:
            assert not chosen(mine, measure="across") and {r["against"] for r in chosen(mine, part="neighbours")} == {"cut into 4 blocks"}
            continue
        routed = expert >= 0
        same = (expert[:, None] == expert) & routed[:, None] & routed
        other = (expert[:, None] != expert) & routed[:, None] & routed
        for name, allowed in (("within", same), ("across", other)):
            assert single(mine, "copies", name)["value"] == pytest.approx(float(((cosine > 0.6) & allowed).any(1).double().mean()))
        nearest = cosine.masked_fill(~(same | other), -1)[routed].argmax(1)
        share = float((expert[nearest] == expert[routed]).double().mean())
        record = single(mine, "neighbours", "own_share", at="decoder")
        assert record["value"] == pytest.approx(share) and record["null_low"] <= record["null"] <= record["null_high"]
        if one.row.num_shared:
            value = float(((cosine > 0.6) & routed[:, None] & ~routed).any(1).double().mean())
            assert single(mine, "copies", "with_shared")["value"] == pytest.approx(value)
    assert len({record["sae"] for record in chosen(table, part="map", measure="point")}) == 2
    points = chosen(table, part="map", measure="point", at="decoder", against="routed")
    (first,) = [one for one in seen if one.name == points[0]["sae"]]
    assert len(points) == 30 and [record["expert"] for record in points] == first.expert_M[[record["n"] for record in points]].tolist()
    assert len(analysis.draw(table).get_axes()) == 16
    assert not chosen(analysis.shown(table), measure="point")


def single(table, part, measure, **more):
    (record,) = chosen(table, part=part, measure=measure, **more)
    return record


def test_planted_copies_are_found_and_chance_is_not(rows):
    """Of 8 experts of 40 latents, the first 10 of each are one concept with a copy in each expert; the other latents are random."""
    concept, rest = F.normalize(random(10, 64), dim=1), F.normalize(random(8, 30, 64, seed=1), dim=2)
    copies = F.normalize(concept + 0.02 * random(8, 10, 64, seed=2), dim=2)
    unit = torch.cat([copies, rest], 1).reshape(320, 64)
    expert = torch.arange(320) // 40
    pairs = close_pairs(unit, 0.9)
    planted = torch.arange(320) % 40 < 10
    assert torch.equal(pairs.touched(320), planted) and bool((expert[pairs.first_P] != expert[pairs.second_P]).all())
    assert cluster_sizes(clusters(pairs, 320)).bincount().tolist() == [0, 240, *[0] * 6, 10]
    nearest, within, across = nearest_rows(unit, expert, 8)
    null_within, null_across = expected_highest(unit, expert)
    assert not bool((expert[nearest] == expert)[planted].any()) and float(within.mean()) < null_within and float(across.mean()) > null_across - 0.01
    shuffled = torch.tensor([float((drawn == drawn[nearest]).double().mean()) for drawn in relabelled(expert, 400)])
    assert abs(float(shuffled.mean()) - 39 / 319) < 4 * float(shuffled.std()) / 20


def test_what_is_missing_is_said(rows):
    source = source_of(rows[0])
    dense, switch = (next(row for row in rows if row.architecture == name) for name in ("topk", "switch"))
    analysis = build_analysis("geometry", SETTINGS)
    alone = analysis.compute([dense], source)
    assert "no routed SAE was given" in single(alone, "neighbours", "own_share")["note"]
    assert single(alone, "map", "preservation", against="routed")["note"] == "no routed SAE was given"
    assert all(record["value"] is not None for record in chosen(alone, part="sparseness"))
    analysis.draw(alone)
    alone = analysis.compute([switch], source)
    assert single(alone, "by_rate", "dense_of_same_rate")["note"] == "no dense SAE of about 32 latents was given"
    assert single(alone, "map", "preservation", against="dense")["note"] == "no dense SAE was given"
    analysis.draw(alone)
    without = build_analysis("geometry", SETTINGS | {"shown": 0})
    assert not chosen(without.compute([switch], source), part="map") and len(without.draw(alone).get_axes()) == 14
    few = build_analysis("geometry", SETTINGS | {"rows": 2}).compute([dense], source)
    assert "live" in {record["measure"] for record in few}
    with pytest.raises(ValueError, match=r"threshold=0.3 must lie between 0.5 and 1"):
        build_analysis("geometry", {"threshold": 0.3})
    with pytest.raises(ValueError, match="rows=1"):
        build_analysis("geometry", {"rows": 1})


def test_a_dense_partner_has_about_the_width_and_best_the_seed(rows):
    features = [Features.of(one) for one in observe(rows, source_of(rows[0]), 100)[1]]
    dense = next(each for each in features if each.experts == 1)
    switch = next(each for each in features if each.row.architecture == "switch")
    refit = next(each for each in features if each.row.architecture == "switch_refit")
    assert dense_partner(switch, features) is dense and dense_partner(dense, features) is None
    assert dense_partner(refit, features) is None  # 36 latents against 32

"""Similarity measures against rsatoolbox and pytorch-cka, brute force, planted truth, and the traps that make numbers mean something else."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from switch_sae.analysis.likeness.calibration import MOST_DOCUMENTS, MOST_ROWS, balanced, calibrated, orders, pair_slots
from switch_sae.analysis.likeness.cka import centred_inner, cka, hsic
from switch_sae.analysis.likeness.comparing import Plan, compare
from switch_sae.analysis.likeness.dual_bootstrap import dual_variance, seed_mean, spread
from switch_sae.analysis.likeness.merging import duplicate_clusters, likeness
from switch_sae.analysis.likeness.mutual_knn import is_near, nearest_rows, overlap
from switch_sae.analysis.likeness.representation import Codes, Vectors
from switch_sae.analysis.likeness.rsa import (
    Pairs,
    Ranked,
    correlation_distances,
    cosine_distances,
    noise_ceiling,
    normalised,
    partialled,
    rho_a,
    rho_a_matrix,
    sampled_pairs,
    tau_a,
)
from switch_sae.analysis.likeness.strata import stratum

GOLDEN = Path(__file__).parent / "golden" / "similarity.json"


@pytest.fixture(scope="module")
def golden():
    """The example, as inputs and what rsatoolbox 0.3.2 and pytorch-cka 1.1.3 give for it (experiments/benchmarks/similarity_oracles.py)."""
    known = json.loads(GOLDEN.read_text())
    inputs = known["inputs"]
    views = {
        **{"model": Vectors(torch.tensor(inputs["model"], dtype=torch.float64)), "seed": Vectors(torch.tensor(inputs["seeds"][0]).double())},
        **{name: codes_of(torch.tensor(code).double()) for name, code in zip(("code", "other code"), inputs["codes"], strict=True)},
    }
    return inputs, views, known["oracles"]


def codes_of(dense_TM):
    """Sparse codes with as many slots as there are latents, in a shuffled order, some unused."""
    order = torch.randperm(dense_TM.shape[1], generator=torch.Generator().manual_seed(1))
    return Codes(dense_TM[:, order], order.expand(len(dense_TM), -1).contiguous(), dense_TM.shape[1])


def random_codes(rows, latents, slots, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(rows, latents, generator=generator).topk(slots).indices
    return Codes(torch.rand(rows, slots, generator=generator, dtype=torch.float64) + 0.1, indices, latents)


def dense(codes):
    return torch.zeros(len(codes), codes.units, dtype=torch.float64).scatter_add_(1, codes.indices_TK, codes.values_TK.double())


def all_pairs(rows):
    return sampled_pairs(rows, rows * rows)


def test_rdms_and_their_comparisons_equal_rsatoolbox(golden):
    inputs, views, oracle = golden
    pairs = all_pairs(len(inputs["documents"]))
    entries = {name: cosine_distances(view, pairs) for name, view in views.items()}
    assert len(entries["code"].round(decimals=9).unique()) < len(pairs) / 2, "the example has no ties"
    for name, view in views.items():
        assert torch.allclose(entries[name], torch.tensor(oracle["cosine"][name]).double(), atol=1e-6)
        wanted = torch.tensor(oracle["correlation"][name]).double()
        assert torch.allclose(correlation_distances(view, pairs), wanted, atol=1e-6)
    for measure, of in (("rho-a", rho_a), ("tau-a", tau_a)):
        for couple, wanted in oracle[measure].items():
            assert of(*(entries[name].round(decimals=12) for name in couple.split(", "))) == pytest.approx(wanted, abs=1e-6), (measure, couple)


def test_debiased_cka_equals_pytorch_cka_without_an_n_by_n_matrix(golden, monkeypatch):
    monkeypatch.setattr("switch_sae.analysis.likeness.cka.CROSS_ELEMENTS", 40)  # several blocks of latents
    _, views, oracle = golden
    assert max(oracle["cka"].values()) > 0.3
    for couple, wanted in oracle["cka"].items():
        a, b = (views[name] for name in couple.split(", "))
        assert max(0.0, cka(a, b)) == pytest.approx(wanted, abs=1e-6) and cka(a, b) == pytest.approx(cka(b, a), abs=1e-12), couple
        pairs = all_pairs(len(a))
        assert float((centred_inner(a, pairs) * centred_inner(b, pairs)).sum() * 2) == pytest.approx(hsic(a, b) * len(a) * (len(a) - 3), rel=1e-9)


def test_noise_ceiling_equals_rsatoolbox(golden):
    inputs, _, oracle = golden
    pairs = all_pairs(len(inputs["documents"]))
    entries_SP = torch.stack([cosine_distances(Vectors(torch.tensor(one).double()), pairs) for one in inputs["seeds"]])
    for measure, of in (("rho-a", rho_a), ("tau-a", tau_a)):
        assert noise_ceiling(entries_SP, of) == pytest.approx(tuple(oracle["noise ceiling"][measure]), abs=1e-6)
    with pytest.raises(ValueError, match="one seed has no noise ceiling"):
        noise_ceiling(entries_SP[:1])


def test_the_dual_bootstrap_variance_equals_rsatoolbox(golden):
    """The same draws of seeds and documents; ranks are found again in every resample, as there."""
    inputs, views, oracle = golden
    document_T = torch.tensor(inputs["documents"])
    pairs, documents = all_pairs(len(document_T)), int(document_T.max()) + 1
    ranked = [Ranked(cosine_distances(Vectors(torch.tensor(one).double()), pairs)) for one in inputs["seeds"]]
    ranked.insert(0, Ranked(cosine_distances(views["model"], pairs)))
    both, seeds, alone = [], [], []
    value_S = rho_a_matrix(ranked)[0, 1:]
    for draw in oracle["dual bootstrap"]["draws"]:
        if len(set(draw["documents"])) < 3:
            continue  # rsatoolbox leaves these out
        weight_N = torch.tensor(draw["documents"]).bincount(minlength=documents).double()
        resampled_S = rho_a_matrix(ranked, pairs.weights(weight_N, document_T))[0, 1:]
        weight_S = torch.tensor(draw["seeds"]).bincount(minlength=len(value_S)).double()[None]
        one = torch.ones(1, dtype=torch.float64)
        both.append(seed_mean(resampled_S[None], one, weight_S, False))
        seeds.append(seed_mean(value_S[None], one, weight_S, False))
        alone.append(resampled_S.mean())
    variances = [float(torch.stack([torch.as_tensor(x).squeeze() for x in part]).var()) for part in (both, seeds, alone)]
    assert variances == pytest.approx(oracle["dual bootstrap"]["three variances"], abs=1e-6, rel=1e-6)
    found = dual_variance(*variances, len(value_S), documents)
    assert found == pytest.approx(oracle["dual bootstrap"]["variance"], abs=1e-6, rel=1e-6) and found != variances[0]


def test_the_packages_still_give_the_golden_numbers(golden):
    pytest.importorskip("rsatoolbox")
    pytest.importorskip("cka")
    from experiments.benchmarks.similarity_oracles import example, oracles

    inputs, _, oracle = golden
    assert example() == inputs
    assert flat(oracles(inputs)) == pytest.approx(flat(oracle), abs=1e-9)


def flat(tree):
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in flat(tree[key])]
    return [leaf for one in tree for leaf in flat(one)] if isinstance(tree, list) else [tree]


def test_pairs_are_sampled_evenly_and_stand_for_all():
    pairs = sampled_pairs(301, 5_000)
    together = {tuple(sorted(pair)) for pair in torch.stack([pairs.left_P, pairs.right_P], 1).tolist()}
    assert len(together) == len(pairs) == 301 * 16 and all(a != b for a, b in together)
    assert set(torch.cat([pairs.left_P, pairs.right_P]).bincount().tolist()) == {32} and bool((pairs.left_P.diff() >= 0).all())
    assert len(sampled_pairs(7, 21)) == 21 and len(sampled_pairs(2, 1)) == 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(301, 6, generator=generator)
    a, b = Vectors(x), Vectors(x + torch.randn(301, 6, generator=generator))
    whole, part = (rho_a(cosine_distances(a, these), cosine_distances(b, these)) for these in (all_pairs(301), pairs))
    assert whole == pytest.approx(part, abs=0.02)
    with pytest.raises(ValueError, match="1 rows have no pairs"):
        sampled_pairs(1, 5)


def test_ranks_of_weighted_entries_are_those_of_repeated_ones():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(6, (40,), generator=generator) for _ in range(2))
    weight = torch.randint(4, (40,), generator=generator)
    repeated = [entries.repeat_interleave(weight) for entries in (first, second)]
    assert rho_a(first, second, weight.double()) == pytest.approx(rho_a(*repeated), abs=1e-12)
    concordant = sum(int((first[i] - first[j]).sign() * (second[i] - second[j]).sign()) for i, j in combinations(range(40), 2))
    assert tau_a(first, second) == pytest.approx(concordant / (40 * 39 / 2), abs=1e-12)


def test_partialling_out_equals_regression_of_ranks():
    generator = torch.Generator().manual_seed(0)
    model, other = (torch.randint(2, (500,), generator=generator).double() for _ in range(2))
    x, y = model + torch.randn(500, generator=generator), model - other + torch.randn(500, generator=generator)
    ranked = [Ranked(entries) for entries in (x, y, model, other)]
    correlation = normalised(rho_a_matrix(ranked))
    rank = torch.stack([one.centred() for one in ranked])

    def rest(target, models):
        return target - models.T @ torch.linalg.lstsq(models.T, target[:, None]).solution[:, 0] if len(models) else target

    for from_x, from_y in (([2], []), ([2, 3], []), ([2], [3])):
        wanted = torch.corrcoef(torch.stack([rest(rank[0], rank[from_x]), rest(rank[1], rank[from_y])]))[0, 1]
        assert float(partialled(correlation, 0, 1, from_x, from_y)) == pytest.approx(float(wanted), abs=1e-9)
    assert bool(partialled(correlation, 2, 1, [2]).isnan()), "nothing is left of a model without itself"
    assert partialled(correlation.expand(3, -1, -1), 0, 1, [2]).shape == (3,)


def test_inner_products_of_sparse_and_mixed_codes_are_those_of_dense_ones(monkeypatch):
    monkeypatch.setattr("switch_sae.analysis.likeness.representation.BLOCK_ELEMENTS", 128)
    codes, pairs = random_codes(30, 24, 4, 0), sampled_pairs(30, 100)
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(24, 5, generator=generator)
    mix = likeness(decoder, 2.0)
    cosine = torch.nn.functional.cosine_similarity(decoder[:, None], decoder[None], dim=2)
    assert torch.allclose(mix, cosine.clamp(min=0).square(), atol=1e-5)
    z = dense(codes)
    mixed = Codes(codes.values_TK.float(), codes.indices_TK, 24, mix)
    for view, gram in ((codes, z @ z.T), (mixed, z @ mix.double() @ z.T), (Vectors(z), z @ z.T)):
        shuffled = torch.randperm(len(pairs), generator=generator)
        for these in (pairs, Pairs(pairs.left_P[shuffled], pairs.right_P[shuffled])):
            assert torch.allclose(view.inner(these.left_P, these.right_P), gram[these.left_P, these.right_P], rtol=1e-5)
        assert torch.allclose(view.total_T, gram.sum(1), rtol=1e-5) and torch.allclose(view.squared_T, gram.diagonal(), rtol=1e-5)
        assert torch.allclose(view.inner_with_all(slice(3, 9)).double(), gram[:, 3:9], rtol=1e-4, atol=1e-6)
        chosen = torch.tensor([5, 2])
        assert torch.allclose(view.part(chosen).inner(torch.tensor([0]), torch.tensor([1])), gram[5, 2][None], rtol=1e-5)
    with pytest.raises(ValueError, match="no cheap cross products"):
        hsic(mixed, codes)
    with pytest.raises(ValueError, match="3 rows leave no degree of freedom"):
        hsic(codes.part(torch.arange(3)), codes.part(torch.arange(3)))


def test_trap_biased_cka_of_independent_sparse_codes_is_near_one_and_the_debiased_is_not():
    first, second = random_codes(400, 4096, 64, 0), random_codes(400, 4096, 64, 1)
    k, other = (dense(codes) @ dense(codes).T for codes in (first, second))
    centre = torch.eye(400, dtype=torch.float64) - 1 / 400
    k, other = centre @ k @ centre, centre @ other @ centre
    assert float((k * other).sum() / (k.norm() * other.norm())) > 0.85
    assert abs(cka(first, second)) < 0.02 and cka(first, first) == pytest.approx(1)


def copied_features(experts, by_topic=False, rows=1500, features=1024, common=10, own=10):
    """A dense code, and the Switch code whose every expert has its own copy of all features: the same values, decoder rows and reconstructions."""
    generator = torch.Generator().manual_seed(experts)
    shared = torch.rand(rows, 4 * common, generator=generator).topk(common).indices
    rare = torch.rand(rows, features - 4 * common, generator=generator).topk(own).indices + 4 * common
    active = torch.cat([shared, rare], 1)
    values = torch.rand(rows, common + own, generator=generator) + 0.5
    expert = torch.randint(experts, (rows,), generator=generator)
    decoder = torch.nn.functional.normalize(torch.randn(features, 64, generator=generator), dim=1)
    return Codes(values, active, features), Codes(values, active + features * expert[:, None], features * experts), expert, decoder


@pytest.mark.parametrize("experts, most", [(2, 0.38), (4, 0.2), (16, 0.06)])
def test_trap_copied_features_score_low_though_reconstructions_are_equal_and_merging_repairs_it(experts, most):
    code, copied, expert_T, decoder = copied_features(experts)
    pairs = sampled_pairs(len(code), 100_000)
    mine, theirs = cosine_distances(code, pairs), cosine_distances(copied, pairs)
    spearman = float(normalised(rho_a_matrix([Ranked(mine), Ranked(theirs)]))[0, 1])
    assert 0.005 < rho_a(mine, theirs) < spearman < most and 0.1 < cka(code, copied) < 0.75
    within = expert_T[pairs.left_P] == expert_T[pairs.right_P]
    assert float(normalised(rho_a_matrix([Ranked(mine[within]), Ranked(theirs[within])]))[0, 1]) == pytest.approx(1, abs=1e-6)
    assert len(theirs[~within].unique()) == 1, "codes of two experts share nothing: all distances tie"

    cluster_M = duplicate_clusters(decoder.repeat(experts, 1), torch.ones(len(decoder) * experts, dtype=torch.bool), 0.9)
    assert int(cluster_M.max()) + 1 == len(decoder)
    merged = Codes(copied.values_TK, cluster_M[copied.indices_TK], len(decoder))
    assert rho_a(mine, cosine_distances(merged, pairs)) == pytest.approx(rho_a(mine, mine), abs=1e-9)
    assert cka(code, merged) == pytest.approx(1)
    document_T = torch.arange(len(code))
    found = stratum(mine, theirs, pairs, expert_T, document_T, same_expert=True, replicates=3)
    assert float(found.value) == pytest.approx(1, abs=1e-6) and float(found.null_S.max()) < 2 * most + 0.1
    assert stratum(mine, theirs, pairs, expert_T, document_T, same_expert=False, replicates=3) is None


def test_soft_merging_repairs_copied_features_too_and_correlation_distances_break_ties_by_size():
    code, copied, expert_T, decoder = copied_features(2, rows=300, features=128, common=4, own=2)
    pairs = sampled_pairs(300, 40_000)
    soft = Codes(copied.values_TK, copied.indices_TK, copied.units, likeness(decoder.repeat(2, 1), 8.0))
    mine = cosine_distances(Codes(code.values_TK, code.indices_TK, code.units, likeness(decoder, 8.0)), pairs)
    assert rho_a(mine, cosine_distances(soft, pairs)) == pytest.approx(1, abs=1e-3)
    apart = pairs.where(expert_T[pairs.left_P] != expert_T[pairs.right_P])
    assert len(cosine_distances(copied, apart).unique()) == 1
    size = copied.sum_T / copied.squared_T.sqrt()
    assert rho_a(correlation_distances(copied, apart), size[apart.left_P] * size[apart.right_P]) > 0.999


def test_clusters_follow_chains_and_leave_dead_latents_alone():
    angle = torch.tensor([0.0, 0.3, 0.6, 2.0, 2.1, 0.31])
    decoder = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([1.0, 2, 3, 1, 1, 1])[:, None]
    alive = torch.tensor([True, True, True, True, True, False])
    cluster = duplicate_clusters(decoder, alive, 0.95).tolist()
    assert cluster[0] == cluster[1] == cluster[2] and cluster[3] == cluster[4] and len(set(cluster)) == 3
    assert len(set(duplicate_clusters(decoder, ~alive, 0.95).tolist())) == 6
    assert likeness(torch.zeros(12_289, 1), 1.0) is None


def test_mutual_neighbours_equal_brute_force_and_leave_the_document_out(monkeypatch):
    monkeypatch.setattr("switch_sae.analysis.likeness.mutual_knn.BLOCK_ELEMENTS", 200)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=generator), torch.randn(40, 5, generator=generator)
    y += x
    document_T = torch.arange(40) // 5
    nearest = [nearest_rows(Vectors(one), 3, document_T) for one in (x, y)]
    shares = []
    for t in range(40):
        lists = []
        for one in (x, y):
            cosine = torch.cosine_similarity(one, one[t], dim=1)
            lists.append(set(sorted((u for u in range(40) if document_T[u] != document_T[t]), key=lambda u: -float(cosine[u]))[:3]))
        shares.append(len(lists[0] & lists[1]) / 3)
    assert overlap(is_near(nearest[0]), nearest[1]).tolist() == pytest.approx(shares) and 0.1 < sum(shares) / 40 < 0.9
    nothing = Codes(torch.ones(40, 1), torch.arange(40)[:, None], 40)
    tied = [nearest_rows(nothing, 3, document_T, seed) for seed in (0, 1)]
    assert float(overlap(is_near(tied[0]), tied[1]).mean()) < 0.5, "ties must not make two codes agree"
    with pytest.raises(ValueError, match="neighbours=36"):
        nearest_rows(Vectors(x), 36, document_T)


def test_balanced_rows_are_whole_beginnings_of_documents_and_permutations_move_documents():
    sizes = [9, 2, 7, 7, 1, 12, 8, 6]
    document_T = torch.arange(8).repeat_interleave(torch.tensor(sizes))
    found = balanced(document_T)
    assert found.row_NL.shape == (6, 6)  # 36 rows; 7 each of 5 documents would be 35
    for row_L in found.row_NL.tolist():
        document = int(document_T[row_L[0]])
        assert row_L == list(range(sum(sizes[:document]), sum(sizes[:document]) + 6))
    assert balanced(torch.arange(5)) is None and balanced(torch.arange(9_000)).row_NL.shape == (MOST_DOCUMENTS, 1)
    assert balanced(torch.arange(10).repeat_interleave(900)).row_NL.numel() == MOST_ROWS
    slots = pair_slots(found, 200)
    pairs = slots.pairs()
    document, place = pairs.left_P // 6, pairs.left_P % 6
    assert len(pairs) == 30 * 6 and bool((document != pairs.right_P // 6).all()) and bool((pairs.left_P % 6 != pairs.right_P % 6).all())
    entry = pairs.left_P * 1000 + pairs.right_P
    for order_N in orders(6, 3):
        wanted = (order_N[document] * 6 + place) * 1000 + order_N[pairs.right_P // 6] * 6 + pairs.right_P % 6
        assert torch.equal(entry[slots.moved(order_N)], wanted)
    assert torch.equal(torch.stack(list(orders(6, 3))), torch.stack(list(orders(6, 3))))


def test_calibration_is_the_order_statistic_of_the_paper():
    null = torch.arange(200).double() / 1000
    found = calibrated(0.6, null)
    assert found.score == pytest.approx((0.6 - 0.190) / (1 - 0.190)) and found.p == pytest.approx(1 / 201)
    assert calibrated(0.1, null).score == 0 and calibrated(0.1, null).p == pytest.approx(101 / 201)
    assert (
        calibrated(0.6, null, most=0.6).score == 1 and found.null == pytest.approx(0.0995) and found.interval == pytest.approx((0.004975, 0.194025))
    )


def clustered(documents_T, size, generator):
    """Vectors of rows that are alike within a document."""
    documents = int(documents_T.max()) + 1
    return Vectors(1.5 * torch.randn(documents, size, generator=generator)[documents_T] + torch.randn(len(documents_T), size, generator=generator))


def plan_of(document_T, permutations=200, bootstrap=2, pairs=20_000, neighbours=5):
    return Plan(document_T, sampled_pairs(len(document_T), pairs), balanced(document_T), neighbours, bootstrap, permutations, lambda _: None)


def test_false_positives_are_five_per_cent(monkeypatch):
    """200 draws of two independent representations whose rows are alike within documents of very different length."""
    for name in ("RESAMPLED_PAIRS", "PAIRS_OF_PAIRS", "ORDERED_PAIRS"):
        monkeypatch.setattr(f"switch_sae.analysis.likeness.comparing.{name}", 1000)
    sizes = torch.tensor([1, 3, 4, 6, 6, 8, 9, 12, 20, 40])
    document_T = torch.arange(len(sizes)).repeat_interleave(sizes)
    generator = torch.Generator().manual_seed(0)
    positive = {"rho_a": 0, "tau_a": 0, "cka": 0, "mutual_knn": 0}
    plan = plan_of(document_T, pairs=1000)
    for _ in range(200):
        found = compare([clustered(document_T, 6, generator) for _ in range(2)], [], plan)
        for measure in positive:
            result = calibrated(float(found.observed[measure][0, 1]), found.null[measure][:, 0, 1])
            positive[measure] += result.p <= 0.05
            assert (result.score > 0) <= (result.p <= 0.05)
    assert all(6 <= count <= 14 for count in positive.values()), positive


def test_every_measure_of_a_comparison_follows_its_definition():
    """Resamples and permutations against the functions applied to rows that were really repeated and moved."""
    generator = torch.Generator().manual_seed(0)
    document_T = torch.arange(7).repeat_interleave(torch.tensor([4, 5, 4, 6, 4, 4, 7]))
    first = clustered(document_T, 5, generator)
    second = Vectors(first.x_TD + torch.randn(first.x_TD.shape, generator=generator))
    expert = torch.randint(3, (len(document_T), 1), generator=generator)
    route = Codes(torch.ones(expert.shape), expert, 3)
    found = compare([first, second], [route], plan_of(document_T, permutations=5, bootstrap=5, neighbours=2))
    across = all_pairs(len(document_T))
    across = across.where(document_T[across.left_P] != document_T[across.right_P])
    mine, theirs, routed = (cosine_distances(view, across) for view in (first, second, route))
    assert set(routed.unique().tolist()) == {0, 1}
    assert float(found.value["rho_a"][0, 1]) == pytest.approx(rho_a(mine, theirs)) and float(found.value["tau_a"][0, 1]) == pytest.approx(
        tau_a(mine, theirs)
    )
    assert float(found.value["rho_a"][0, 2]) == pytest.approx(rho_a(mine, routed))
    assert float(found.value["cka"][0, 1]) == pytest.approx(cka(first, second)) and found.value["cka"].shape == (2, 2)
    assert float(found.middle["cka"][0, 1]) == pytest.approx(cka(first, second), abs=1e-5)
    assert float(found.middle["tau_a"][0, 1]) == pytest.approx(tau_a(mine, theirs), abs=0.02)

    drawn = torch.randint(7, (5, 7), generator=torch.Generator().manual_seed(0))
    for place, documents in enumerate(drawn.tolist()):
        copy_T = torch.cat([(document_T == n).nonzero()[:, 0] for n in documents])
        pairs = all_pairs(len(copy_T))
        pairs = pairs.where(document_T[copy_T[pairs.left_P]] != document_T[copy_T[pairs.right_P]])
        wanted = rho_a(*(cosine_distances(view.part(copy_T), pairs) for view in (first, second)))
        assert float(found.resampled["rho_a"][place, 0, 1]) == pytest.approx(wanted, abs=1e-9)

    rows_NL = balanced(document_T).row_NL
    slots = pair_slots(balanced(document_T), 50_000).pairs()
    for place, order_N in enumerate(orders(len(rows_NL), 5)):
        parts = first.part(rows_NL.flatten()), second.part(rows_NL[order_N].flatten())
        entries = [cosine_distances(part, slots) for part in parts]
        assert float(found.null["rho_a"][place, 0, 1]) == pytest.approx(rho_a(*entries), abs=1e-5)
        assert float(found.null["tau_a"][place, 0, 1]) == pytest.approx(tau_a(*entries), abs=0.02)
        inner = [centred_inner(part, slots) for part in parts]
        assert float(found.null["cka"][place, 0, 1]) == pytest.approx(float(inner[0] @ inner[1] / (inner[0].norm() * inner[1].norm())), abs=1e-5)
        lists = [nearest_rows(part, 2, torch.arange(len(rows_NL)).repeat_interleave(rows_NL.shape[1])) for part in parts]
        assert float(found.null["mutual_knn"][place, 0, 1]) == pytest.approx(float(overlap(is_near(lists[0]), lists[1]).mean()), abs=1e-9)
    assert float(found.most["rho_a"][2, 2]) < 0.999 < float(found.most["rho_a"][0, 1])


def test_intervals_take_seeds_and_documents_or_say_what_is_missing():
    generator = torch.Generator().manual_seed(0)
    similarity = 0.5 + 0.02 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    resampled = similarity + 0.03 * torch.randn(400, 1, 1, generator=generator, dtype=torch.float64)
    value = float(similarity.mean())
    low, high = spread(value, similarity, resampled, False, 20).interval
    alone = spread(value, similarity[:1, :1], resampled[:, :1, :1], False, 20)
    assert (low + high) / 2 == pytest.approx(value) and high - low > 0.11 and "one seed each" in alone.note
    assert alone.interval[1] - alone.interval[0] == pytest.approx(2 * 2.14 * 0.03, rel=0.15)
    own = torch.tensor([[1, 0.4, 0.5], [0.4, 1, 0.6], [0.5, 0.6, 1]], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    assert float(seed_mean(own, ones, ones, True)) == pytest.approx(0.5)
    assert bool(seed_mean(own, torch.tensor([3.0, 0, 0]).double(), torch.tensor([3.0, 0, 0]).double(), True).isnan())
    assert spread(0.5, own, own + 0.01 * torch.randn(300, 1, 1, generator=generator), True, 20).note == ""
    assert "two seeds" in spread(0.4, own[:2, :2], own[:2, :2] + 0.01 * torch.randn(300, 1, 1, generator=generator), True, 20).note
    assert spread(0.5, own, own.expand(300, 3, 3) * torch.nan, True, 20).interval is None
    assert dual_variance(1.0, 0.1, 0.1, 3, 10) == pytest.approx(max(0.15, 0.1 * 10 / 9)) and dual_variance(0.1, 0.5, 0.1, 3, 10) == 0.1

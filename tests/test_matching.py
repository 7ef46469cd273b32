"""Which latents two SAEs share: sparse correlations by brute force, planted matches scored on other documents, nulls, ceilings, subspaces."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from planted import D, again, directions, sample_of, seen
from test_report import tiny_run

from switch_sae.activations import SyntheticSource
from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.counterparts.coactivation import (
    GROUPS,
    PairSums,
    correlation,
    firing,
    groups,
    kept,
    over_documents,
    products,
    sums,
    values_of,
)
from switch_sae.analysis.counterparts.matching_figure import means
from switch_sae.analysis.counterparts.pairing import ACTIVATIONS, DECODER, Scores, matches, other_documents, rotated, sides, stranger
from switch_sae.analysis.counterparts.unstable import overlap, overlaps, principal
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.observed import observe, sparse
from switch_sae.analysis.recovery import mean_best_match
from switch_sae.models import DenseLatents, SwitchSAE, TopKSAE
from switch_sae.results import collect
from switch_sae.results.source import source_of

pytest.importorskip("scipy")


def codes(rows, latents, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, latents, generator=generator) < rate) * torch.rand(rows, latents, generator=generator)


def pearson(a_T, b_T):
    a_T, b_T = a_T.double() - a_T.double().mean(), b_T.double() - b_T.double().mean()
    return float((a_T @ b_T) / (a_T.norm() * b_T.norm()))


@pytest.mark.parametrize("block", [2**22, 20])
def test_sparse_correlations_are_those_of_whole_arrays(block, monkeypatch):
    monkeypatch.setattr("switch_sae.analysis.counterparts.coactivation.PAIRS", block)
    first, second = codes(60, 9, 0.3, 0), codes(60, 7, 0.4, 1)
    first[:, 4], second[:, 2] = 0, 0
    one, two = sparse(DenseLatents(first)), sparse(DenseLatents(second))
    assert torch.allclose(products(one, two), first.T @ second, atol=1e-5)
    assert torch.allclose(products(firing(one), two), (first > 0).float().T @ second, atol=1e-5)
    assert torch.allclose(sums(one)[1], first.double().square().sum(0))
    found = correlation(one, two)
    for a in range(9):
        for b in range(7):
            assert float(found[a, b]) == pytest.approx(0.0 if a == 4 or b == 2 else pearson(first[:, a], second[:, b]), abs=1e-5)
    rows, chosen_latents = torch.tensor([3, 50, 8]), torch.tensor([1, 6, 8])
    assert torch.equal(kept(one, rows, chosen_latents).to_dense(), first[rows][:, chosen_latents])
    wanted = torch.randint(0, 7, (60, 3), generator=torch.Generator().manual_seed(2))
    assert torch.equal(values_of(two, wanted), second.gather(1, wanted))


def test_correlations_on_resampled_documents_are_those_of_repeated_rows():
    first, second = codes(80, 6, 0.3, 0), codes(80, 5, 0.4, 1)
    first[:, 4], second[:, 2] = 0, 0
    document_T, partner_A = torch.arange(80) // 10, torch.tensor([0, 1, 2, 1, 0, 4])
    pairs = PairSums.of(sparse(DenseLatents(first)), sparse(DenseLatents(second)), partner_A, document_T)
    weights_RN = torch.randint(0, 3, (4, 8), generator=torch.Generator().manual_seed(3)).double()
    found_RA = pairs.correlations(weights_RN)
    for weight_N, found_A in zip(weights_RN.long(), found_RA, strict=True):
        rows = torch.arange(80).repeat_interleave(weight_N[document_T])
        for a, b in enumerate(partner_A.tolist()):
            if a == 4:
                assert found_A[a].isnan()
            else:
                assert float(found_A[a]) == pytest.approx(0.0 if b == 2 else pearson(first[rows, a], second[rows, b]), abs=1e-6)


def test_many_documents_are_resampled_in_groups_and_intervals_lie_about_the_value():
    number_T, rows_N = groups(torch.arange(5000) // 5)
    assert len(rows_N) == GROUPS and int(rows_N.sum()) == 5000 and all(len(number_T[5 * d : 5 * d + 5].unique()) == 1 for d in range(1000))
    # A biased resample (half of the value) is moved to the value; its width stays.
    low, high = over_documents(lambda weights_RN: {"x": 0.5 * weights_RN[:, 0]}, {"x": 3.0}, torch.full((50,), 10), 400)["x"]
    assert low < 3 < high and (low + high) / 2 == pytest.approx(3, abs=0.6) and low > 2.3


def test_strangers_keep_latents_but_neither_documents_nor_directions():
    document_T = torch.tensor([0] * 5 + [1] * 3 + [2] * 7 + [3] * 4 + [4] * 6)
    other_T = other_documents(document_T)
    assert sorted(other_T.tolist()) == list(range(25)) and not bool((document_T[other_T] == document_T).any())
    assert torch.equal(other_T, other_documents(document_T)) and not torch.equal(other_T, other_documents(document_T, seed=1))
    unit = directions(20, 0)
    turned = rotated(unit)
    assert torch.allclose(turned @ turned.T, unit @ unit.T, atol=1e-5) and float((turned * unit).sum(1).abs().max()) < 0.5


SHARED, OWN = 60, 40


@pytest.fixture(scope="module")
def planted():
    """Two dense seeds and two Switch seeds with `SHARED` latents in common; of their `OWN` others all seeds of a kind have half in common."""
    rows = 3000
    values, unit = codes(rows, SHARED, 0.04, 0), directions(SHARED, 0)
    found, orders = [], {}
    for kind, name in enumerate(("dense", "switch")):
        own = codes(rows, OWN // 2, 0.04, 10 + kind), directions(OWN // 2, 10 + kind)
        for seed in (0, 1):
            alone = codes(rows, OWN // 2, 0.04, 20 + 2 * kind + seed), directions(OWN // 2, 20 + 2 * kind + seed)
            whole = torch.cat([values, own[0], alone[0]], 1), torch.cat([unit, own[1], alone[1]])
            order, mixed, decoder = again(*whole, 30 + 2 * kind + seed)
            orders[f"{name}-s{seed}"] = order
            expert_M = torch.arange(SHARED + OWN) // 25 if kind else None
            found.append(seen(f"{name}-s{seed}", mixed, decoder, expert_M, seed))
    return sample_of(rows), found, orders


@pytest.fixture(scope="module")
def table(planted):
    sample, found, _ = planted
    analysis = build_analysis("matching", {"bootstrap": 50})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switch_sae.analysis.matching.observe", lambda rows, source, number: (sample, found))
        return analysis, analysis.compute([one.row for one in found], None)


@pytest.mark.parametrize("by", [DECODER, ACTIVATIONS])
@pytest.mark.parametrize("kind", ["one_to_one", "many_to_one"])
def test_planted_pairs_are_found(planted, by, kind):
    sample, found, orders = planted
    first, second = sides(sample, [found[0], found[2]], 5)
    (match, back) = (m for m in matches(first, second, Scores.of(first, second)) if (m.kind, m.by) == (kind, by))
    for one, names in ((match, ("dense-s0", "switch-s0")), (back, ("switch-s0", "dense-s0"))):
        true = {(int(a), int(b)) for a, m in enumerate(orders[names[0]]) for b, n in enumerate(orders[names[1]]) if m == n and m < SHARED}
        good = one.close(0.7) if by == DECODER else one.on_b_A >= 0.5
        said = {(a, int(one.partner_A[a])) for a in good.nonzero()[:, 0].tolist()}
        assert len(said & true) >= 0.95 * len(said) and len(said & true) >= 0.95 * len(true) == 0.95 * SHARED
        assert not bool(one.null.close(0.7).any()) if by == DECODER else float(one.null.on_b_A.max()) < 0.3


def test_what_pairing_flatters_is_not_what_is_scored(planted):
    """Latents that have no partner: paired by activations on A they look alike there, on B they do not."""
    sample, found, orders = planted
    first, second = sides(sample, [found[0], found[2]], 5)
    match = next(m for m in matches(first, second, Scores.of(first, second)) if (m.kind, m.by) == ("many_to_one", ACTIVATIONS))
    alone_A = orders["dense-s0"] >= SHARED
    assert float(match.on_a_A[alone_A].mean()) > 0.05 and abs(float(match.on_b_A[alone_A].mean())) < 0.02
    null = match.null.values(0.7, 0.5)
    assert null["correlation_on_a"][0] > 0.05 and abs(null["correlation"][0]) < 0.01


def test_every_value_of_a_match_is_by_brute_force(planted):
    sample, found, _ = planted
    first, second = sides(sample, [found[0], found[2]], 5)
    rows_a, rows_b = sample.halves()
    own, theirs = (side.seen.latents.to_dense()[:, side.keep_A] for side in (first, second))
    cosine = F.normalize(found[0].sae.decoder_weight(), dim=1) @ F.normalize(found[2].sae.decoder_weight(), dim=1).T
    for match in list(matches(first, second, Scores.of(first, second)))[:3]:
        values = match.values(0.7, 0.5)
        pairs = [(a, b) for a, b in enumerate(match.partner_A.tolist()) if b >= 0]
        on_a, on_b = ([pearson(own[rows, a], theirs[rows, b]) for a, b in pairs] for rows in (rows_a, rows_b))
        cosines = [float(cosine[first.keep_A[a], second.keep_A[b]]) for a, b in pairs]
        wanted = {
            "cosine": sum(cosines) / len(pairs),
            "close": sum(value >= 0.7 for value in cosines) / len(own.T),
            "correlation": sum(on_b) / len(pairs),
            "alike": sum(value >= 0.5 for value in on_b) / len(own.T),
            "correlation_on_a": sum(on_a) / len(pairs),
        }
        assert {name: value for name, (value, _) in values.items()} == pytest.approx(wanted, abs=1e-4)


def test_the_table_says_how_much_is_shared_beside_null_and_ceiling(table):
    analysis, records = table
    assert all(list(record) == list(records[0]) for record in records)
    share, ceiling = SHARED / (SHARED + OWN), (SHARED + OWN // 2) / (SHARED + OWN)
    for part in ("one_to_one", "many_to_one"):
        for at, measure in ((DECODER, "close"), (ACTIVATIONS, "alike")):
            for record in chosen(records, part=part, measure=measure, at=at):
                across = record["sae"][:3] != record["against"][:3]
                assert record["value"] == pytest.approx(share if across else ceiling, abs=0.02)
                assert record["null"] == pytest.approx(0, abs=0.02)
                assert record["ceiling"] == (pytest.approx(ceiling, abs=0.02) if across else None)
                assert measure == "close" or record["low"] <= record["value"] <= record["high"]
                assert (record["note"] != "") == (across and record["sae"][-1] == record["against"][-1])  # one seed: one start
    assert abs(chosen(records, part="shuffled", measure="correlation", at=ACTIVATIONS)[0]["value"]) < 0.02
    by_frequency = chosen(records, part="by_frequency", measure="close by decoder", sae="dense-s0", against="switch-s0")
    assert sum(record["n"] * record["value"] for record in by_frequency if record["n"]) == pytest.approx(SHARED, abs=2)
    merged = chosen(means(records), part="one_to_one", measure="close", at=DECODER, sae="dense", against="switch")
    singles = chosen(records, part="one_to_one", measure="close", at=DECODER, sae=("dense-s0", "dense-s1"), against=("switch-s0", "switch-s1"))
    different = [record["value"] for record in singles if record["sae"][-1] != record["against"][-1]]
    assert len(singles) == 4 and len(different) == 2 and merged[0]["note"] == "mean of 2"
    assert [record["value"] for record in merged] == [pytest.approx(sum(different) / 2)]
    together = means([record for record in singles if record["sae"][-1] == record["against"][-1]])
    assert together[0]["value"] is not None and len(together) == 1
    assert len(analysis.draw(records).axes) == 7 and "by_frequency" not in {record["part"] for record in analysis.shown(records)}


def test_stability_counts_latents_that_recur_and_pw_mcc_is_recoverys(table, planted):
    sample, found, _ = planted
    _, records = table
    ceiling = (SHARED + OWN // 2) / (SHARED + OWN)
    for record in chosen(records, part="stability", measure=("recurs", "recurs in all", "recurs in none")):
        assert record["value"] == pytest.approx(1 - ceiling if record["measure"] == "recurs in none" else ceiling, abs=0.02)
        assert record["null"] == (record["measure"] == "recurs in none") and record["note"] == "over 1 other seed"
    first, second = sides(sample, found[:2], 5)
    for record in chosen(records, part="stability", measure="pw_mcc", sae=("dense-s0", "dense-s1")):
        assert record["value"] == pytest.approx(mean_best_match(first.unit_AD @ second.unit_AD.T)) and 0.7 < record["value"] < 0.9
        assert record["null"] == pytest.approx(mean_best_match(first.unit_AD @ rotated(second.unit_AD).T)) and record["null"] < 0.4


def test_unstable_latents_that_share_a_subspace_are_told_from_those_that_do_not(planted):
    from scipy.linalg import subspace_angles

    sample, found, _ = planted
    one, other = (side for side in sides(sample, found[:2], 5))
    basis = torch.linalg.qr(torch.randn(D, 4, generator=torch.Generator().manual_seed(0)))[0]
    generator = torch.Generator().manual_seed(1)
    inside = [F.normalize(torch.randn(30, 4, generator=generator) @ basis.T, dim=1) for _ in range(2)]
    chosen_A = torch.zeros(len(one.keep_A), dtype=torch.bool)
    chosen_A[:30] = True
    low = [replace(side, unit_AD=torch.cat([rows, side.unit_AD[30:]])) for side, rows in zip((one, other), inside, strict=True)]
    (record,) = chosen(overlaps(*low, chosen_A, chosen_A), measure="overlap", at=4)
    assert record["value"] == pytest.approx(1, abs=1e-4) and record["null"] == 4 / D < record["null_high"] < 0.2
    (variance,) = chosen(overlaps(*low, chosen_A, chosen_A), measure="variance", at=4)
    assert variance["value"] == pytest.approx(1, abs=1e-4) and variance["null"] < 0.5
    free = [replace(side, unit_AD=directions(len(side.keep_A), 70 + n)) for n, side in enumerate((one, other))]
    (record,) = chosen(overlaps(*free, chosen_A, chosen_A), measure="overlap", at=16)
    assert record["value"] == pytest.approx(16 / D, abs=0.08)
    first, second = (principal(side.unit_AD[chosen_A])[0][:, :16] for side in free)
    angles = subspace_angles(first.numpy(), second.numpy())
    assert overlap(first, second, 16) == pytest.approx(float((torch.as_tensor(angles).cos() ** 2).mean()), abs=1e-5)
    (angle,) = chosen(overlaps(*free, chosen_A, chosen_A), measure="angle", at=16)
    assert angle["value"] == pytest.approx(float(torch.as_tensor(angles).rad2deg().median()), abs=0.01)
    (few,) = overlaps(one, other, chosen_A & False, chosen_A)
    assert few["value"] is None and "0 and 30 latents recur in no other seed" in few["note"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matching")
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    switch = SwitchSAE.Config(num_latents=32, k=4, num_experts=4)
    runs = [tiny_run(folder, TopKSAE.Config(num_latents=32, k=4), seed, source=source) for seed in (0, 1)]
    return collect([run.path for run in [*runs, tiny_run(folder, switch, source=source, baselines=[])]])


def test_trained_saes_are_matched_and_what_is_missing_is_said(rows, monkeypatch):
    records = analyze("matching", rows, {"rows": 400, "bootstrap": 20})
    assert records == analyze("matching", rows, {"rows": 400, "bootstrap": 20})
    lone = [record for record in chosen(records, part="stability") if record["value"] is None]
    assert [record["note"] for record in lone] == ["one seed of this kind: whether its latents recur is unknown"]
    switch = next(row for row in rows if row.num_experts > 1)
    dense = [row for row in rows if row.num_experts == 1]
    own = [record for record in chosen(records, part="one_to_one", sae=switch.name) if record["value"] is not None]
    assert all(record["ceiling"] is None and "no ceiling: one seed of switch" in record["note"] for record in own)
    with pytest.raises(ValueError, match="needs at least two SAEs"):
        analyze("matching", dense[:1])
    with pytest.raises(ValueError, match="Add a dense run"):
        analyze("matching", [switch, switch])
    with pytest.raises(ValueError, match="too few to pair"):
        analyze("matching", rows, {"rows": 400, "min_count": 400})
    with pytest.raises(ValueError, match=r"near=1\.0 must lie between 0 and 1"):
        build_analysis("matching", {"near": 1})
    monkeypatch.setattr("switch_sae.analysis.counterparts.pairing.LARGEST", 3)
    monkeypatch.setattr("switch_sae.analysis.matching.LARGEST", 3)
    analysis = build_analysis("matching", {"rows": 400, "bootstrap": 20})
    large = analysis.compute(rows, source_of(rows[0]))
    assert {record["value"] for record in chosen(large, part="one_to_one")} == {None}
    assert all("not matched one to one" in record["note"] for record in chosen(large, part="one_to_one"))
    assert all(record["value"] is not None for record in chosen(large, part="many_to_one"))
    assert len(analysis.draw(large).axes) == 7


def test_a_stranger_has_the_same_frequencies(rows):
    sample, found = observe(rows, source_of(rows[0]), 400)
    side = sides(sample, found, 5)[0]
    strange = stranger(side)
    assert torch.equal(strange.on_b.firing_counts(), side.on_b.firing_counts())
    assert not torch.equal(strange.on_b.to_dense(), side.on_b.to_dense())

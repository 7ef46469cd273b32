"""Screens against brute force and planted truth: lists of a perfect partition recover everything, exact keys and ranks find the true candidates."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from test_report import tiny_run

from switch_sae.activations import SyntheticSource
from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.observed import observe
from switch_sae.analysis.routes.scored import Scored
from switch_sae.analysis.routes.screens import (
    Drawn,
    Fitting,
    Fixed,
    Lists,
    LowRank,
    ProductKeys,
    Seeking,
    best_setting,
    clusters,
    found,
    low_rank_cost,
    made,
    means,
    options,
    spherical_means,
)
from switch_sae.analysis.screening import FAMILIES, Choice, why_not_screened
from switch_sae.models import SAES, BatchTopKSAE, SwitchSAE, TopKSAE
from switch_sae.models.inference import Inference, with_inference
from switch_sae.results import collect
from switch_sae.results.source import source_of

SOURCE = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
TOPICS, BLOCK = 4, 5


def planted(rows=400):
    """A TopK SAE whose latents are the dimensions, and rows of topics that each use the latents of one block and no others."""
    generator = torch.Generator().manual_seed(0)
    latents = TOPICS * BLOCK
    sae = TopKSAE(TopKSAE.Config(num_latents=latents, k=3), latents, generator).eval()
    topic_T = torch.randint(TOPICS, (rows,), generator=generator)
    x_TD = torch.zeros(rows, latents)
    for t in range(rows):
        x_TD[t, topic_T[t] * BLOCK : (topic_T[t] + 1) * BLOCK] = 2 + torch.rand(BLOCK, generator=generator)
    with torch.no_grad():
        for weight_MD in (sae.W_enc_MD, sae.W_dec_MD):
            weight_MD.copy_(torch.eye(latents))
        latents_TK = sae.encode(x_TD)
    fitting = Fitting(x_TD, latents_TK.values_TK, latents_TK.indices_TK, sae.W_enc_MD.detach(), sae.b_enc_M.detach(), topic_T, TOPICS)
    return sae, fitting, Seeking(x_TD, latents_TK.values_TK, latents_TK.indices_TK, topic_T, 0)


def recalls(screen, rows, latents):
    hits_t, active_t, hit_energy_t, energy_t = found(screen.candidates(rows), rows.values_tK, rows.indices_tK, latents)
    return float(hits_t.sum() / active_t.sum()), float(hit_energy_t.sum() / energy_t.sum())


def energy_of(rows, t, latents):
    """The sum of z^2 of a row over some latents."""
    return sum(float(value) ** 2 for value, latent in zip(rows.values_tK[t], rows.indices_tK[t], strict=True) if int(latent) in latents)


def test_lists_of_a_planted_partition_recover_everything_and_half_a_list_does_not():
    sae, fitting, rows = planted()
    centroid_ED = spherical_means(fitting.u_TD, TOPICS)
    of_topic = {int(topic): int(e) for topic, e in zip(rows.expert_t, (rows.u_tD @ centroid_ED.T).argmax(1), strict=True)}
    assert sorted(of_topic.values()) == list(range(TOPICS))
    for screen in (Lists(fitting, centroid_ED, BLOCK), Lists(fitting, centroid_ED, BLOCK, oracle=True), Lists(fitting, None, BLOCK)):
        assert screen.cost == TOPICS and recalls(screen, rows, 20) == (1.0, 1.0)
        latent_tC = screen.candidates(rows)
        assert torch.equal(latent_tC.sort(dim=1).values // BLOCK, rows.expert_t[:, None].expand(-1, BLOCK))
        with torch.no_grad():
            screened = Choice(sae).choose(rows.u_tD @ sae.W_enc_MD.T + sae.b_enc_M, latent_tC)
            assert torch.allclose(sae.decode(screened), sae(rows.u_tD).recon_TD)
    narrow = Lists(fitting, None, 2)
    assert 0.2 < recalls(narrow, rows, 20)[0] < 0.6
    for e in range(TOPICS):
        energy = [sum(energy_of(rows, t, {m}) for t in range(400) if rows.expert_t[t] == e) for m in range(20)]
        assert set(narrow.list_EF[e].tolist()) == set(sorted(range(20), key=lambda m: -energy[m])[:2])
    random, frequent = recalls(Drawn(20, 5), rows, 20)[0], recalls(Fixed(fitting, 5), rows, 20)[0]
    assert random == pytest.approx(0.25, abs=0.05) and frequent < 0.5


def test_the_oracle_takes_the_list_with_most_energy_and_beats_every_router():
    _, fitting, rows = planted()
    wrong = Fitting(fitting.u_TD, fitting.values_TK, fitting.indices_TK, fitting.W_MD, fitting.b_M, torch.arange(400) % 3, 3)
    asking = Seeking(rows.u_tD, rows.values_tK, rows.indices_tK, torch.arange(400) % 3, 0)
    routed, oracle = Lists(wrong, None, 8), Lists(wrong, None, 8, oracle=True)
    latent_tC = oracle.candidates(asking)
    for t in range(400):
        held = [energy_of(rows, t, set(one)) for one in oracle.list_EF.tolist()]
        assert energy_of(rows, t, set(latent_tC[t].tolist())) == pytest.approx(max(held))
    assert recalls(oracle, asking, 20)[1] >= recalls(routed, asking, 20)[1]


def test_a_list_that_its_cluster_leaves_open_is_filled_by_energy_over_all_rows():
    fitting = Fitting(torch.eye(3), torch.tensor([[4.0], [2.0], [3.0]]), torch.tensor([[4], [2], [5]]), torch.zeros(6, 3), torch.zeros(6))
    routed = Fitting(fitting.u_TD, fitting.values_TK, fitting.indices_TK, fitting.W_MD, fitting.b_M, torch.tensor([0, 0, 1]), 3)
    assert [set(one) for one in Lists(routed, None, 2).list_EF.tolist()] == [{4, 2}, {5, 4}, {5, 4}]


def test_keys_that_add_up_to_the_rows_find_the_latents_with_the_largest_scores():
    generator = torch.Generator().manual_seed(0)
    a_nD, b_nD = torch.randn(4, 12, generator=generator) * 5, torch.randn(4, 12, generator=generator)
    W_MD = (a_nD[:, None] + b_nD[None]).flatten(0, 1)[torch.randperm(16, generator=generator)]
    u_TD = torch.randn(200, 12, generator=generator)
    fitting = Fitting(u_TD, torch.ones(200, 1), torch.zeros(200, 1, dtype=torch.int64), W_MD, torch.zeros(16))
    keys = ProductKeys(fitting, 4, 5)
    approximate_MD = keys.a_nD[keys.cell_M // 4] + keys.b_nD[keys.cell_M % 4]
    latent_tC = keys.candidates(Seeking(u_TD, fitting.values_TK, fitting.indices_TK, None, 0))
    staircase = []
    for t in range(200):
        cells = sorted(product(range(4), range(4)), key=lambda cell: -float(keys.a_nD[cell[0]] @ u_TD[t] + keys.b_nD[cell[1]] @ u_TD[t]))
        latents = [m for i, j in cells for m in range(16) if int(keys.cell_M[m]) == 4 * i + j]
        staircase.append(set(latents[:5]))
    exact = torch.allclose(approximate_MD, W_MD, atol=1e-4)
    assert exact and len(set(keys.cell_M.tolist())) == 16 and keys.cost == 8
    assert staircase == [set(one) for one in latent_tC.tolist()] == [set(one) for one in (u_TD @ W_MD.T).topk(5).indices.tolist()]
    biased = ProductKeys(Fitting(u_TD, fitting.values_TK, fitting.indices_TK, W_MD, torch.arange(16) * 100.0), 4, 5)
    assert {15, 14, 13} <= set(biased.candidates(Seeking(u_TD, fitting.values_TK, fitting.indices_TK, None, 0))[0].tolist())


def test_low_rank_scores_have_the_least_error_and_are_exact_at_full_rank():
    generator = torch.Generator().manual_seed(0)
    W_MD, b_M = torch.randn(30, 8, generator=generator), torch.randn(30, generator=generator)
    u_TD = torch.randn(500, 8, generator=generator) * torch.arange(1, 9) + 3
    fitting = Fitting(u_TD, torch.ones(500, 1), torch.zeros(500, 1, dtype=torch.int64), W_MD, b_M)
    rows = Seeking(u_TD, fitting.values_TK, fitting.indices_TK, None, 0)
    score_TM = u_TD @ W_MD.T + b_M
    centred = (score_TM - score_TM.mean(0)).double()
    for rank in (1, 3, 8):
        screen = LowRank(fitting, rank, 6)
        assert screen.cost == rank + -(-30 * rank // 8) == low_rank_cost(rank, 30, 8)
        approximate_TM = (u_TD @ screen.key_RD.T) @ screen.left_MR.T + screen.bias_M
        tail = float(torch.linalg.svdvals(centred)[rank:].square().sum())  # Eckart & Young: no scores of this rank do better
        assert float((approximate_TM - score_TM).double().square().sum()) == pytest.approx(tail, rel=1e-3, abs=1e-4)
        latent_tC = screen.candidates(rows)
        assert [set(one) for one in latent_tC.tolist()] == [set(one) for one in approximate_TM.topk(6).indices.tolist()]
    assert [set(one) for one in latent_tC.tolist()] == [set(one) for one in score_TM.topk(6).indices.tolist()]


@pytest.mark.parametrize("kind", [LowRank, ProductKeys])
def test_calibrated_screens_rank_by_the_measured_chance_of_a_score_above_the_threshold(kind):
    generator = torch.Generator().manual_seed(0)
    W_MD, b_M = torch.randn(40, 8, generator=generator) * torch.rand(40, 1, generator=generator), torch.randn(40, generator=generator)
    u_TD = torch.randn(3000, 8, generator=generator) * torch.arange(1, 9) + 3
    values_TK, indices_TK = (u_TD @ W_MD.T + b_M).topk(2)
    values_TK[0] = 0
    fitting = Fitting(u_TD, values_TK, indices_TK, W_MD, b_M)
    rows, score_TM = Seeking(u_TD, values_TK, indices_TK, None, 0), u_TD @ W_MD.T + b_M
    plain, screen = kind(fitting, 4, 6), kind(fitting, 4, 6, calibrated=True)
    assert screen.cost - plain.cost == (5 if kind is ProductKeys else 0)
    if kind is LowRank:
        approximate_TM = (u_TD @ plain.key_RD.T) @ plain.left_MR.T
    else:
        approximate_TM = u_TD @ (plain.a_nD[plain.cell_M // 4] + plain.b_nD[plain.cell_M % 4]).T
    error_TM = score_TM - approximate_TM
    chance_TM = (approximate_TM + error_TM.mean(0) - values_TK[1:, 1].mean()) / (error_TM.var(0, correction=0) + 1e-6 * score_TM.var(0)).sqrt()
    best_TC = chance_TM.topk(6).indices
    same = sum(set(a) == set(b) for a, b in zip(best_TC.tolist(), screen.candidates(rows).tolist(), strict=True))
    assert same >= 2990  # ties in the last bits
    assert recalls(screen, rows, 40)[1] > recalls(plain, rows, 40)[1] - 0.05


def test_settings_spend_the_budget_and_are_chosen_on_rows_that_were_not_fitted():
    for budget, latents, d_in in product((1, 2, 5, 16, 128, 1024), (32, 4096), (16, 128)):
        for family in FAMILIES:
            for number, size in options(family, budget, latents, d_in):
                keys = 2 * number + (-(-latents // d_in) if family.endswith("calibrated") else 0)
                spent = {"lists": number, "low ra": low_rank_cost(number, latents, d_in), "produc": keys}[family[:6]] + size
                assert spent == budget and size >= budget / 4 and number >= 1
    assert not options("lists", 3, 32, 16) and options("lists", 4, 32, 16) == [(2, 2)]
    _, fitting, _ = planted()
    fold_T = torch.arange(400) % 2 == 1
    fitted, judged = fitting.part(~fold_T), fitting.part(fold_T)
    setting = best_setting("lists", 16, fitted, judged)
    rows = Seeking(judged.u_TD, judged.values_TK, judged.indices_TK, None, 0)
    energy = {option: recalls(made("lists", option, fitted), rows, 20)[1] for option in options("lists", 16, 20, 20)}
    assert len(energy) == 3 and energy[setting] == max(energy.values())
    assert best_setting("lists", 1, fitted, judged) is None


def test_clusters_are_found_and_none_stays_empty():
    generator = torch.Generator().manual_seed(0)
    centre_nD = torch.eye(6) * 10
    true_M = torch.arange(60) % 6
    rows_MD = centre_nD[true_M] + 0.1 * torch.randn(60, 6, generator=generator)
    mine_M = clusters(rows_MD, 6)
    assert len({(int(a), int(b)) for a, b in zip(true_M, mine_M, strict=True)}) == 6 == len(set(mine_M.tolist()))
    mean_nD = means(rows_MD, mine_M, 7)
    assert torch.allclose(mean_nD[mine_M[0]], rows_MD[true_M == 0].mean(0)) and bool((mean_nD[6] == 0).all())


def test_hits_are_counted_as_loops_count_them():
    latent_tC = torch.tensor([[0, 1, 2], [3, 4, 5]])
    values_tK, indices_tK = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 0.0]]), torch.tensor([[1, 5, 2], [0, 3, 4]])
    assert [one.tolist() for one in found(latent_tC, values_tK, indices_tK, 6)] == [[1, 0], [2, 1], [4, 0], [5, 9]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screening")
    kinds = {"topk": TopKSAE.Config, "batch": BatchTopKSAE.Config, "switch": SwitchSAE.Config, "jump": SAES.config_of("jumprelu")}
    settings = {"switch": {"num_experts": 4, "k": 4}, "jump": {}}
    runs = {name: tiny_run(folder, kind(num_latents=64, **settings.get(name, {"k": 4})), source=SOURCE, baselines=[]) for name, kind in kinds.items()}
    return {name: collect([run.path])[0] for name, run in runs.items()}


@pytest.mark.parametrize("name", ["topk", "batch"])
def test_the_nulls_and_the_whole_are_what_an_sae_with_fewer_latents_gives(rows, name):
    saes = [rows[name], rows["switch"]]
    table = analyze("screening", saes, {"rows": 400})
    sample, seen = observe(saes, source_of(saes[0]), 400)
    scored = Scored.of(sample)
    first, second = scored.halves
    sae, latents = seen[0].sae, seen[0].latents
    counts_M = latents.to_dense()[scored.kept_T][first].count_nonzero(0)
    x_TD, target_TD, total = scored.rows.x_TD[second], scored.rows.target_TD[second].double(), float(scored.variance_T[second].sum())
    whole = float((target_TD - seen[0].recon_TD[scored.kept_T][second].double()).square().sum()) / total
    assert chosen(table, part="whole")[0]["value"] == pytest.approx(whole)
    (trained,) = chosen(table, part="trained")
    assert trained["at"] == pytest.approx((4 + 16) / 64) and trained["sae"] == rows["switch"].name
    for share in (1 / 4, 1 / 8):
        kept_M = torch.zeros(64, dtype=torch.bool).index_fill(0, counts_M.topk(int(64 * share)).indices, True)
        with torch.no_grad():
            pre_TM = (x_TD * sae.activation_scale - sae.b_pre_D) @ sae.W_enc_MD.T + sae.b_enc_M
            pre_TM = torch.where(kept_M, pre_TM, -1.0)
            least_T1 = sae.threshold.clamp_min(0) if name == "batch" else pre_TM.topk(4).values[:, -1:]
            code_TM = torch.where((pre_TM > least_T1) if name == "batch" else (pre_TM >= least_T1), pre_TM, 0.0).relu()
            recon_TD = (code_TM @ sae.W_dec_MD + sae.b_pre_D) / sae.activation_scale
        expected = float((target_TD - recon_TD.double()).square().sum()) / total
        (record,) = chosen(table, part="frontier", measure="fvu", against="most frequent", at=share)
        assert record["value"] == pytest.approx(expected, rel=1e-5)
        own_TM = latents.to_dense()[scored.kept_T][second].double()
        (recall,) = chosen(table, part="frontier", measure="recall", against="most frequent", at=share)
        assert recall["value"] == pytest.approx(float((own_TM[:, kept_M] > 0).sum() / (own_TM > 0).sum()))
        (energy,) = chosen(table, part="frontier", measure="energy_recall", against="most frequent", at=share)
        assert energy["value"] == pytest.approx(float(own_TM[:, kept_M].square().sum() / own_TM.square().sum()))
        for base in ("lists", next(r["against"] for r in table if r["against"].startswith("router"))):
            plain, oracle = (chosen(table, measure="energy_recall", against=base + more, at=share)[0] for more in ("", ", oracle"))
            assert plain["value"] is None or plain["value"] <= oracle["value"] + 1e-9
            assert plain["null"] == energy["value"]
    assert all(record["low"] <= record["value"] <= record["high"] for record in table if record["low"] is not None)
    analysis = build_analysis("screening", {"rows": 400})
    assert analysis.compute(saes, source_of(saes[0])) == table and len(analysis.draw(table).axes) == 2
    notes = [record["note"] for record in chosen(table, against="low rank", at=1 / 32, measure="fvu")]
    assert notes == ["a budget of 2 products leaves no candidates"]
    assert {record["against"] for record in chosen(table, part="frontier")} >= {*FAMILIES, "lists, oracle", "random", "most frequent"}


def test_all_latents_as_candidates_are_no_screen(rows):
    for name in ("topk", "batch"):
        _, (one,) = observe([rows[name]], source_of(rows[name]), 100)
        x_TD = source_of(rows[name]).evaluation_set(100).x_TD
        encoder = Choice(one.sae)
        pre_TM = encoder.centred(x_TD) @ one.sae.W_enc_MD.detach().T + encoder.b_M
        chosen_latents = encoder.choose(pre_TM, torch.arange(64).expand(100, -1))
        assert torch.allclose(chosen_latents.to_dense(), one.latents.to_dense(), atol=1e-5)


def test_one_dense_run_alone_is_enough_and_what_cannot_be_screened_is_said(rows):
    table = analyze("screening", [rows["topk"]], {"rows": 400})
    assert not [record for record in table if record["against"].startswith("router")] and not chosen(table, part="trained")
    assert len(build_analysis("screening").draw(table).axes) == 2
    with pytest.raises(ValueError, match=r"nothing to work on: .*JumpReLUSAE does not choose by top-k"):
        analyze("screening", [rows["jump"]], {"rows": 400})
    table = analyze("screening", [rows["topk"], rows["jump"]], {"rows": 400})
    (record,) = chosen(table, part="frontier", sae=rows["jump"].name)
    assert record["value"] is None and "does not choose by top-k" in record["note"]
    with pytest.raises(ValueError, match="screening needs a dense SAE"):
        analyze("screening", [rows["switch"]], {"rows": 400})
    _, (one,) = observe([rows["topk"]], source_of(rows["topk"]), 100)
    x_TD = source_of(rows["topk"]).evaluation_set(100).x_TD
    assert why_not_screened(one, x_TD) is None
    assert "inference=refit" in why_not_screened(replace(one, sae=with_inference(one.sae, Inference.refit)), x_TD)
    odd = replace(one, latents=replace(one.latents, values_TK=one.latents.values_TK * 1.1))
    assert "a TopKSAE does not choose by top-k" in why_not_screened(odd, x_TD)

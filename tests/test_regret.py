"""Routing regret: forced experts against loops over tokens, a router that is wrong on a known share of them, and the split of a gap that adds up."""

from itertools import product

import pytest
import torch
from test_report import tiny_run

from switch_kernels import Dispatch
from switch_sae.activations import SyntheticSource
from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.observed import observe
from switch_sae.analysis.regret import Regret, transfer_matrix
from switch_sae.analysis.routes.forced import SCALES, pair_scales, through_every_expert, why_not_forced
from switch_sae.analysis.routes.scored import Scored
from switch_sae.models import ROUTERS, SAES, SwitchSAE, TopKSAE
from switch_sae.models.inference import Inference, with_inference
from switch_sae.results import collect
from switch_sae.results.source import source_of
from switch_sae.rows import Rows

HALVES = (torch.arange(0, 40, 2), torch.arange(1, 40, 2))
SOURCE = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)


def drawn(config, d_in=8):
    """A random SAE whose experts, router and biases all differ, that has seen activations of another scale."""
    generator = torch.Generator().manual_seed(0)
    sae = SAES.build(config, d_in, generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if "W_dec" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if "b_" in name else 0.5))
        sae.activation_scale.fill_(0.7)
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.4)
    return sae.eval(), torch.randn(40, d_in, generator=generator) * 2


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "bias_balanced"])
def test_every_token_goes_through_every_expert_with_the_routers_gate_for_it(kind):
    sae, x_TD = drawn(SwitchSAE.Config(num_latents=24, k=3, num_experts=4, router=ROUTERS.config_of(kind)()))
    forced = through_every_expert(sae, Rows.of(x_TD))
    error_TE = forced.errors("gate", HALVES)
    with torch.no_grad():
        u_TD = x_TD * 0.7 - sae.b_pre_D
        logits_TE = (x_TD * 0.7 - sae.router.b_D) @ sae.router.W_ED.T
        gate_TE = logits_TE.softmax(1) if kind == "softmax" else logits_TE.sigmoid()
        for t, e in product(range(40), range(4)):
            own = slice(6 * e, 6 * e + 6)
            pre = (sae.W_enc_MD[own] @ u_TD[t] + sae.b_enc_M[own]).relu()
            kept = pre * (pre >= pre.topk(3).values[-1])
            recon_D = (gate_TE[t, e] * kept @ sae.W_dec_MD[own] + sae.b_pre_D) / 0.7
            assert float(error_TE[t, e]) == pytest.approx(float((x_TD[t] - recon_D).square().sum()), rel=1e-4)
            assert float(forced.gate_TE[t, e]) == pytest.approx(float(gate_TE[t, e]), rel=1e-5)
        assert torch.equal(forced.rank_TE, logits_TE.argsort(dim=1, descending=True))
        assert torch.equal(forced.chosen_T, sae(x_TD).routing.expert_TS[:, 0])


@pytest.mark.parametrize("name", ["switch", "switch_refit", "switch_pursuit", "switch by refit"])
def test_refits_and_pursuit_are_searched_inside_the_forced_expert(name):
    refits = name == "switch by refit"
    shared = {} if "_" not in name else {"shared": 4}
    sae, x_TD = drawn(SAES.config_of("switch" if refits else name)(num_latents=28, k=2, num_experts=4, **shared))
    sae = with_inference(sae, Inference.refit) if refits else sae
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    forced = through_every_expert(sae, Rows.of(x_TD))
    error_TE = forced.errors("gate", HALVES)
    with torch.no_grad():
        own_T = (x_TD - sae(x_TD).recon_TD).square().sum(1)
        assert torch.allclose(error_TE.gather(1, forced.chosen_T[:, None])[:, 0].float(), own_T, rtol=1e-4)
        if "_" in name:
            for e in range(4):
                latents = sae._find(x_TD * 0.7, Dispatch.from_experts(torch.full((40, 1), e), 4))
                assert torch.allclose(error_TE[:, e].float(), (x_TD - sae.decode(latents)).square().sum(1), rtol=1e-4)
                used = latents.indices_TK[latents.values_TK > 0]
                assert bool(((used < 4) | ((used - 4) // 6 == e)).all())
            assert bool((forced.gate_TE == 1).all())
        assert bool((forced.gate_TE == 1).all()) == (name != "switch")
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items()) and type(sae.router).__name__ != "_OneExpert"


def test_scalars_are_fitted_on_other_documents_and_the_best_of_a_token_is_a_bound():
    sae, x_TD = drawn(SwitchSAE.Config(num_latents=24, k=3, num_experts=4))
    forced = through_every_expert(sae, Rows.of(x_TD))
    errors = {scale: forced.errors(scale, HALVES) for scale in SCALES}
    for t, f in product(range(40), range(4)):
        e, other = int(forced.chosen_T[t]), HALVES[1 - t % 2]
        same = other[forced.chosen_T[other] == e]
        same = same if float(forced.norm_TE[same, f].sum()) else other
        scale = max(0.0, float(forced.product_TE[same, f].sum() / forced.norm_TE[same, f].sum()))
        expected = float(forced.left_T[t] - 2 * scale * forced.product_TE[t, f] + scale**2 * forced.norm_TE[t, f])
        assert float(errors["pair"][t, f]) == pytest.approx(expected, rel=1e-9)
    assert bool((errors["token"] <= errors["pair"] + 1e-9).all()) and bool((errors["token"] <= errors["gate"] + 1e-9).all())
    grid = torch.linspace(0, 5, 2001, dtype=torch.float64)
    best = (forced.left_T[:, None, None] - 2 * grid * forced.product_TE[..., None] + grid**2 * forced.norm_TE[..., None]).amin(2)
    assert torch.allclose(best, errors["token"], rtol=1e-2)
    empty = pair_scales(torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 0.0]]), torch.tensor([1]), 3)
    assert empty.tolist() == [[0.5, 1.0]] * 3


def planted(wrong, rows=400):
    """Tokens of two topics that live in 4 dimensions each and an expert for each; the router reads a ninth dimension, which lies on some tokens."""
    generator = torch.Generator().manual_seed(1)
    topic_T, is_wrong_T = torch.arange(rows) % 2, torch.arange(rows) < wrong
    x_TD = torch.zeros(rows, 9)
    for t in range(rows):
        x_TD[t, 4 * topic_T[t] : 4 * topic_T[t] + 4] = 1 + torch.rand(4, generator=generator)
    x_TD[:, 8] = torch.where((topic_T == 1) ^ is_wrong_T, 0.5, -0.5)
    sae = SAES.build(SwitchSAE.Config(num_latents=8, k=4, num_experts=2, router=ROUTERS.config_of("softmax")(gate="hard")), 9, generator)
    with torch.no_grad():
        for weight_MD in (sae.W_enc_MD, sae.W_dec_MD):
            weight_MD.copy_(torch.eye(9)[:8])
        sae.router.W_ED.zero_()
        sae.router.W_ED[1, 8] = 1
    return sae.eval(), x_TD, is_wrong_T


@pytest.mark.parametrize("wrong", [0, 40])
def test_the_regret_of_a_router_that_is_wrong_on_a_known_share_of_tokens_is_the_computed_one(wrong):
    sae, x_TD, is_wrong_T = planted(wrong)
    error_TE = through_every_expert(sae, Rows.of(x_TD)).errors("gate", HALVES)
    forced = through_every_expert(sae, Rows.of(x_TD))
    own_T = error_TE.gather(1, forced.chosen_T[:, None])[:, 0]
    assert torch.equal(error_TE.argmin(1) != forced.chosen_T, is_wrong_T)
    lost = float(x_TD[is_wrong_T, :8].double().square().sum())
    assert float(own_T.sum() / error_TE.min(1).values.sum()) - 1 == pytest.approx(lost / (400 * 0.25), rel=1e-6)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regret")
    runs = [tiny_run(folder, TopKSAE.Config(num_latents=32, k=4), source=SOURCE)]
    runs += [tiny_run(folder, SwitchSAE.Config(num_latents=32, k=4, num_experts=4), source=SOURCE, baselines=[])]
    runs += [tiny_run(folder, SAES.config_of("switch_refit")(num_latents=36, k=3, num_experts=4, shared=4), source=SOURCE, baselines=[])]
    runs += [tiny_run(folder, SwitchSAE.Config(num_latents=32, k=4, num_experts=4, experts_per_token=2), source=SOURCE, baselines=[], name="two")]
    return {name: collect([run.path])[0] for name, run in zip(("dense", "switch", "refit", "two"), runs, strict=True)}


def test_the_table_is_what_loops_over_the_errors_say_and_the_split_adds_up(rows):
    saes = [rows["dense"], rows["switch"], rows["refit"]]
    table = analyze("regret", saes, {"rows": 300})
    sample, seen = observe(saes, source_of(saes[0]), 300)
    scored = Scored.of(sample)
    target_TD = scored.rows.target_TD.double()
    total = float((target_TD - target_TD.mean(0)).square().sum())
    fvu = {one.name: float((target_TD - one.recon_TD[scored.kept_T].double()).square().sum()) / total for one in seen}
    for one in seen[1:]:
        forced = through_every_expert(one.sae, scored.rows)
        for scale in SCALES:
            error_TE = forced.errors(scale, scored.halves)

            def value(part, measure, scale=scale, one=one, **more):
                (record,) = chosen(table, sae=one.name, part=part, measure=measure, at=scale, **more)
                if record["low"] is not None:
                    assert record["low"] <= record["value"] <= record["high"]
                return record["value"]

            routes = {name: value("routes", "fvu", against=name) for name in ("router", "oracle", "second best", "random")}
            best = [int(error_TE[t].argmin()) for t in range(len(error_TE))]
            picks = [int(e) for e in forced.chosen_T]
            assert routes["oracle"] == pytest.approx(sum(float(error_TE[t, e]) for t, e in enumerate(best)) / total)
            assert routes["router"] == pytest.approx(sum(float(error_TE[t, e]) for t, e in enumerate(picks)) / total)
            assert routes["second best"] == pytest.approx(sum(float(error_TE[t, e]) for t, e in enumerate(forced.rank_TE[:, 1])) / total)
            assert routes["random"] == pytest.approx(float(error_TE.mean()) * len(error_TE) / total)
            assert value("split", "regret") == pytest.approx(routes["router"] / routes["oracle"] - 1)
            assert value("split", "routing") + value("split", "partition") == pytest.approx(value("split", "gap"))
            (record,) = chosen(table, sae=one.name, measure="best_share", at=scale)
            assert record["value"] == pytest.approx(sum(a == b for a, b in zip(best, picks, strict=True)) / len(best))
            pairs = [(a, b) for a in range(4) for b in range(4) if a == b]
            assert record["null"] == pytest.approx(sum(picks.count(a) * best.count(b) for a, b in pairs) / len(best) ** 2)
        assert chosen(table, sae=one.name, part="routes", against="router", at="gate")[0]["value"] == pytest.approx(fvu[one.name], rel=1e-5)
        assert chosen(table, sae=one.name, measure="gap", at="gate")[0]["value"] == pytest.approx(fvu[one.name] - fvu[rows["dense"].name], rel=1e-4)
        error_TE, cells_EE = forced.errors("pair", scored.halves), transfer_matrix(table, one.name)
        for e, f in product(range(4), range(4)):
            mine = forced.chosen_T == e
            expected = error_TE[mine, f].sum() / scored.variance_T[mine].sum()
            assert float(cells_EE[e, f]) == pytest.approx(float(expected)) if bool(mine.any()) else bool(cells_EE[e, f].isnan())
        for part, cells in (("own", [error_TE[t, picks[t]] for t in range(len(picks))]), ("others", [])):
            others = [(error_TE[t].sum() - error_TE[t, picks[t]]) / 3 for t in range(len(picks))]
            (record,) = chosen(table, sae=one.name, part="transfer", measure=part, against="pair")
            assert record["value"] == pytest.approx(float(sum(cells or others)) / total)
    analysis = build_analysis("regret", {"rows": 300})
    assert analysis.compute(saes, source_of(saes[0])) == table
    (cell,) = chosen(table, sae=rows["switch"].name, part="transfer", against="pair", at="1->2")
    idle = [record | {"value": None} if record is cell else record for record in table]
    assert bool(transfer_matrix(idle, rows["switch"].name)[1, 2].isnan()) and len(analysis.draw(idle).axes) == 5
    assert len(analysis.draw(table).axes) == 2 + 2 + 1 and not any("->" in str(record.get("at")) for record in analysis.shown(table))


def test_what_is_missing_is_said(rows):
    with pytest.raises(ValueError, match="regret needs an SAE with experts"):
        analyze("regret", [rows["dense"]], {"rows": 300})
    with pytest.raises(ValueError, match=r"nothing to work on: .* experts_per_token=2: the experts of a token compete"):
        analyze("regret", [rows["dense"], rows["two"]], {"rows": 300})
    table = analyze("regret", [rows["switch"], rows["two"]], {"rows": 300})
    notes = {(record["sae"], record["measure"]): record["note"] for record in table if record["value"] is None}
    assert "no dense SAE among the runs" in notes[rows["switch"].name, "partition"] and "experts_per_token=2" in notes[rows["two"].name, "fvu"]
    assert len(build_analysis("regret").draw(table).axes) == 4
    with pytest.raises(ValueError, match=r"rows=1.* must be at least 2"):
        Regret.Config(rows=1)
    assert "has no experts" in why_not_forced(TopKSAE(TopKSAE.Config(num_latents=8, k=2), 4))
    with pytest.raises(ValueError, match="has no experts"):
        through_every_expert(TopKSAE(TopKSAE.Config(num_latents=8, k=2), 4), Rows.of(torch.zeros(2, 4)))

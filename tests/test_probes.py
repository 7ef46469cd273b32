"""Probes: stability against codes whose change is known, the judge against latents whose meaning is known, and the same bits in any company."""

import functools
import math

import pytest
import torch
from configs import CONTRACTS
from torch import nn

from switch_sae.activations import SyntheticSource
from switch_sae.activations.base import EvaluationSet
from switch_sae.analysis.pca import PCABaseline
from switch_sae.config import EvaluationConfig
from switch_sae.evaluation import Probes, evaluate, evaluate_group
from switch_sae.metrics import PROBES, Meaning, Stability
from switch_sae.metrics.clusters import spherical_kmeans
from switch_sae.metrics.stability import compare
from switch_sae.models import SAES, BatchTopKSAE, DenseLatents, Routing, SAEOutput, SparseLatents, SwitchSAE, SwitchSharedSAE, TopKSAE
from switch_sae.models.inference import Inference, why_no_inference, with_inference
from switch_sae.models.threshold import calibrate
from switch_sae.scoring import Asked, Scorer, trained

V, C, S, TOPICS = 120, 240, 64, 3


class Planted(nn.Module):
    """A stand-in whose codes are any function of the rows."""

    def __init__(self, code, num_latents, route=None):
        super().__init__()
        self.code, self.num_latents, self.num_experts, self.route = code, num_latents, 1 if route is None else 2, route
        self.register_buffer("nothing", torch.zeros(()))

    def forward(self, x_TD):
        routing = None
        if self.route is not None:
            expert_TS = self.route(x_TD)[:, None]
            routing = Routing(expert_TS, torch.ones(len(x_TD), 1), torch.full((len(x_TD), 2), 0.5))
        return SAEOutput(x_TD, self.code(x_TD), routing)


def grid(rows=500):
    """Rows on a grid of quarters, which noise leaves; one of them is an outlier."""
    x = torch.randint(-8, 9, (rows, 6), generator=torch.Generator().manual_seed(0)) / 4
    x[17] = 1000
    return EvaluationSet(x, torch.arange(rows) * 9 // rows)


def on_grid(x):
    return (x * 4 == (x * 4).round()).all(1).float()


def measured(probe, sae, evaluation_set):
    return PROBES[probe](evaluation_set, None).measure(sae).values()


@pytest.mark.parametrize("dense", [False, True])
def test_an_unstable_latent_lowers_jaccard_by_what_it_is_worth(dense):
    def code(x, unstable):
        values = torch.tensor([3.0, 1.0, 2.0, 2.0]).repeat(len(x), 1)
        if unstable:
            values[:, 1] *= on_grid(x)
        indices = torch.tensor([4, 0, 5, 2]).repeat(len(x), 1)
        latents = SparseLatents(values, indices, 7)
        return DenseLatents(latents.to_dense()) if dense else latents

    stable, unstable = (measured("stability", Planted(functools.partial(code, unstable=flag), 7), grid()) for flag in (False, True))
    for level in ("1pct", "3pct"):
        assert stable[f"jaccard_{level}"] == 1 and stable[f"code_change_{level}"] == 0
        assert unstable[f"jaccard_{level}"] == 3 / 4 and unstable[f"code_change_{level}"] == pytest.approx(1 / 18**0.5)
    assert "route_flips_1pct" not in stable


def test_codes_without_a_latent_and_routes_that_flip():
    def code(x):
        return DenseLatents(torch.zeros(len(x), 3))

    x = grid().x_TD
    rows = torch.arange(500) != 17
    found = measured("stability", Planted(code, 3, lambda x: ((on_grid(x) == 1) & (x[:, 0] > 0)).long()), grid())
    assert found["jaccard_1pct"] == 1 and found["route_flips_3pct"] == pytest.approx(float((x[rows, 0] > 0).double().mean()))
    quotients = Stability(grid(), None).measure(Planted(code, 3))
    assert float(quotients.below["code_change_1pct"].sum()) == 0  # nothing to divide by: no row counts


def test_noise_is_a_share_of_the_centred_norm():
    probe = Stability(grid(), None)
    x = grid().x_TD[torch.arange(500) != 17]
    assert torch.equal(probe.sample.rows.x_TD, x)
    assert torch.allclose(probe.noise_TD.norm(dim=1), (x - x.mean(0)).norm(dim=1), rtol=1e-5)
    assert float(nn.functional.normalize(probe.noise_TD, dim=1).mean(0).norm()) < 0.1  # isotropic
    few = Stability(grid(20_000), None).sample
    assert len(few.rows) == 12_000 and len(few.document_T.unique()) == 9


def test_sparse_codes_are_compared_as_dense_ones_are():
    generator = torch.Generator().manual_seed(2)
    codes = []
    for slots in (5, 7):
        values = torch.rand(300, slots, generator=generator) * (torch.rand(300, slots, generator=generator) > 0.3)
        indices = torch.stack([torch.randperm(12, generator=generator)[:slots] for _ in range(300)])
        codes.append(SparseLatents(values, indices, 12))
    sparse, dense = compare(*codes), compare(*(DenseLatents(code.to_dense()) for code in codes))
    by_hand = [({*a[0]} if (a := (code.to_dense()[7] != 0).nonzero().T.tolist()) else set()) for code in codes]
    assert (float(sparse[0][7]), float(sparse[1][7])) == (len(by_hand[0] & by_hand[1]), len(by_hand[0] | by_hand[1]))
    assert torch.equal(sparse.both_T, dense.both_T) and torch.equal(sparse.either_T, dense.either_T)
    first, second = (code.to_dense().double() for code in codes)
    assert all(
        torch.allclose(found.change_T, (first - second).norm(dim=1)) and torch.allclose(found.norm_T, first.norm(dim=1)) for found in (sparse, dense)
    )


@functools.cache
def corpus():
    """Text of three topics with words of their own. A row tells its topic loudly; its token, the one before and a random number softly."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.randint(TOPICS, (C, S), generator=generator)
    tokens = topic + TOPICS * (torch.rand(C, S, generator=generator) ** 2 * (V // TOPICS)).long()
    keep = torch.ones(C, S, dtype=torch.bool)
    keep[:, 0] = False
    before = tokens.roll(1, 1)
    x = torch.cat([3 * nn.functional.one_hot(topic, TOPICS), torch.stack([tokens / V, before / V, torch.rand(C, S, generator=generator)], 2)], 2)
    return EvaluationSet(x[keep], (torch.arange(C)[:, None].expand(C, S) // 6)[keep], tokens, keep)


class Readers(Planted):
    """Latents of four kinds, a quarter each: those of some words, of some words before, of nothing, and of nothing but only in topic 0."""

    KINDS = ("token", "before", "random", "region")

    def __init__(self, num_latents):
        super().__init__(self.fire, num_latents)
        self.of = torch.randint(0, V, (num_latents, 5), generator=torch.Generator().manual_seed(1))
        self.phase = torch.rand(num_latents, generator=torch.Generator().manual_seed(2))

    def fire(self, x):
        token, before, noise = (x[:, 3 + i] for i in range(3))
        kinds = torch.arange(self.num_latents) % 4
        words = torch.stack([(column * V).round() for column in (token, before)], 1)[:, (kinds == 1).long()]
        reads = (words[..., None] == self.of).any(2)
        luck = (noise[:, None] * 997 + self.phase) % 1
        fires = torch.where(kinds < 2, reads, torch.where(kinds == 2, luck < 0.1, (luck < 0.5) & (x[:, :1] > 1)))
        return DenseLatents(fires * (0.5 + luck))


def judged(sae):
    """Balanced accuracy by kind, easy and hard, of every latent."""
    quotients = Meaning(corpus(), None).measure(sae)
    drawn = torch.randperm(sae.num_latents, generator=torch.Generator().manual_seed(0))
    assert quotients.plain == {"judged_latents": sae.num_latents, "eligible_latents": sae.num_latents}
    return {
        (kind, name): float(quotients.above[name][drawn % 4 == n].mean())
        for n, kind in enumerate(Readers.KINDS)
        for name in ("judge_easy", "judge_hard")
    }


def test_the_judge_finds_what_tokens_tell_and_nothing_else():
    found = judged(Readers(80))
    for kind in ("token", "before"):
        assert found[kind, "judge_easy"] > 0.95 and found[kind, "judge_hard"] > 0.95, found
    for name in ("judge_easy", "judge_hard"):
        assert found["random", name] == pytest.approx(0.5, abs=0.03), found
    # The topic tells where it fires, not when: what a router knows already counts for nothing.
    assert found["region", "judge_easy"] > 0.85 and found["region", "judge_hard"] == pytest.approx(0.5, abs=0.03), found


def test_the_null_of_the_judge_is_chance_and_its_interval_is_over_latents():
    few = Probes(corpus())
    few.probes = {"meaning": few.probes["meaning"]}
    found = few.measure(Readers(300), bootstrap=200)
    assert found["judge_null"].value == pytest.approx(0.5, abs=0.01)
    assert found["judge_null"].low < 0.5 < found["judge_null"].high and found["judge_easy"].low < found["judge_easy"].value < found["judge_easy"].high
    assert found["judged_latents"].low is None and found["judged_latents"].value == 300


def test_the_judge_draws_300_eligible_latents_and_says_how_many_there_were():
    def rare(x):
        latents = Readers(320).fire(x).values_TM.clone()
        latents[:, 310:] *= (x[:, 5:] < 0.005).float()
        return DenseLatents(latents)

    plain = Meaning(corpus(), None).measure(Planted(rare, 320)).plain
    assert plain == {"judged_latents": 300, "eligible_latents": 310}
    nothing = Meaning(corpus(), None).measure(Planted(lambda x: DenseLatents(torch.zeros(len(x), 4)), 4))
    assert nothing.values() == {"judged_latents": 0, "eligible_latents": 0} and nothing.units == 0


def test_the_judge_is_chosen_on_one_half_and_scored_on_the_other():
    sae, (a, b) = Readers(24), corpus().halves()
    default = Meaning(corpus(), None).measure(sae).values()
    assert Meaning(b, (a, b)).measure(sae).values() == default
    assert Meaning(a, (b, a)).measure(sae).values() != default


def test_clusters_are_those_of_directions():
    generator = torch.Generator().manual_seed(0)
    direction = torch.eye(5).repeat_interleave(40, 0)
    x = (direction + 0.05 * torch.randn(200, 5, generator=generator)) * torch.rand(200, 1, generator=generator).add(0.1)
    label = spherical_kmeans(x, 20).nearest(x)
    assert all(len(set((label[direction[:, d] == 1]).tolist()) & set(label[direction[:, d] == 0].tolist())) == 0 for d in range(5))
    assert spherical_kmeans(x[:3], 24).nearest(x[:3]).sort().values.tolist() == [0, 1, 2]


def saes():
    return {
        "switch": SwitchSAE(SwitchSAE.Config(num_latents=24, k=3, num_experts=4), 6, torch.Generator().manual_seed(1)),
        "topk": TopKSAE(TopKSAE.Config(num_latents=24, k=3), 6, torch.Generator().manual_seed(2)),
    }


def test_probes_give_the_same_bits_on_every_call_and_in_any_company():
    evaluation_set, probes = corpus(), Probes(corpus())
    pca = PCABaseline.fit(evaluation_set.x_TD, 2)
    group = evaluate_group({**saes(), "pca": pca}, evaluation_set, bootstrap=20, probes=probes).results
    turned = evaluate_group(dict(reversed(saes().items())), evaluation_set, bootstrap=20, probes=Probes(evaluation_set)).results
    for name, sae in saes().items():
        alone = evaluate(sae, evaluation_set, bootstrap=20, probes=probes)
        assert alone.to_json() == group[name].to_json() == turned[name].to_json()
        without = evaluate(sae, evaluation_set, bootstrap=20)
        assert without.metrics.items() < alone.metrics.items()  # everything else is what it was
        assert {"jaccard_1pct", "code_change_3pct", "judge_hard", "judged_latents"} <= alone.metrics.keys() - without.metrics.keys()
        assert ("route_flips_1pct" in alone.metrics) == (name == "switch")
    assert "jaccard_1pct" not in group["pca"].metrics
    chosen = evaluate_group(saes(), evaluation_set, bootstrap=0, probes=probes, probed=["topk"]).results
    assert ["jaccard_1pct" in chosen[name].metrics for name in ("switch", "topk")] == [False, True]


def test_without_text_there_is_no_judge_and_mistakes_are_named():
    x = corpus().x_TD[:400]
    evaluation_set = EvaluationSet(x, torch.arange(400) // 100)
    assert "meaning" not in Probes(evaluation_set).probes and "jaccard_1pct" in Probes(evaluation_set).measure(saes()["topk"], 5)
    with pytest.raises(ValueError, match="probes: prepared from another evaluation set"):
        evaluate(saes()["topk"], corpus(), probes=Probes(evaluation_set))


def test_an_sae_that_cannot_be_probed_is_left_out_and_told():
    class Sick(TopKSAE):
        def forward(self, x_TD):
            if len(x_TD) == 1999:  # the last chunk of the sample alone
                raise ValueError("sick")
            return super().forward(x_TD)

    evaluation_set = grid(2000)
    told, ill = {}, Sick(TopKSAE.Config(num_latents=24, k=3), 6)
    probes = Probes(evaluation_set)
    results = evaluate_group({"ill": ill, **saes()}, evaluation_set, bootstrap=5, failed=told.__setitem__, probes=probes).results
    assert results.keys() == saes().keys() and str(told["ill"]) == "sick"


def test_the_amortisation_gap_is_that_of_the_same_weights_by_other_inference():
    evaluation_set = grid(700)
    for sae in saes().values():
        found = measured("amortisation", sae, evaluation_set)
        for way in Inference:
            fvu = evaluate(with_inference(sae, way), evaluation_set, bootstrap=0)["fvu_inliers"].value
            assert found[f"fvu_{way.name}"] == pytest.approx(fvu, rel=1e-6)
        assert found["fvu_refit"] < found["fvu_encoder"] and found["fvu_pursuit"] < found["fvu_encoder"]
        assert found["amortisation_gap"] == pytest.approx(found["fvu_encoder"] / found["fvu_pursuit"] - 1, rel=1e-6)
        refitted = measured("amortisation", with_inference(sae, "refit"), evaluation_set)
        assert refitted["amortisation_gap"] == pytest.approx(found["fvu_refit"] / found["fvu_pursuit"] - 1, rel=1e-6)
        assert measured("amortisation", with_inference(sae, "pursuit"), evaluation_set)["amortisation_gap"] == 0


def test_inference_that_an_sae_has_not_is_left_out():
    with_path = SwitchSharedSAE(SwitchSharedSAE.Config(num_latents=24, k=3, num_experts=4, shared=4, path_rank=1), 6)
    assert why_no_inference(with_path, Inference.pursuit) and why_no_inference(with_path, Inference.refit)
    assert measured("amortisation", with_path, grid()).keys() == {"fvu_encoder"}
    two = SwitchSAE(SwitchSAE.Config(num_latents=24, k=3, num_experts=4, experts_per_token=2), 6)
    assert measured("amortisation", two, grid()).keys() == {"fvu_encoder", "fvu_refit", "fvu_pursuit", "amortisation_gap"}


def test_the_gap_is_taken_at_equal_l0_and_thresholds_stay_what_they_were():
    evaluation_set = grid(700)
    sae = BatchTopKSAE(BatchTopKSAE.Config(num_latents=24, k=3), 6, torch.Generator().manual_seed(3))
    rows = Stability(evaluation_set, None).sample.rows
    l0 = calibrate(sae, rows[::4], 3.0)
    before = sae.threshold.clone()
    found = measured("amortisation", sae, evaluation_set)
    assert torch.equal(sae.threshold, before)
    assert found["fvu_encoder"] == pytest.approx(evaluate(sae, evaluation_set, bootstrap=0)["fvu_inliers"].value, rel=1e-6)
    other = with_inference(sae, Inference.pursuit)
    assert calibrate(other, rows[::4], l0) == pytest.approx(l0, rel=0.01)
    assert not torch.equal(sae.threshold, before)  # with its own it would have another L0
    again = evaluate(other, evaluation_set, bootstrap=0)
    assert found["fvu_pursuit"] == pytest.approx(again["fvu_inliers"].value, rel=1e-6)
    sae.threshold.fill_(0.0)  # more latents than pursuit may use
    assert "fvu_pursuit" not in measured("amortisation", sae, evaluation_set)


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_sae_can_be_probed_and_is_left_as_it_was(name):
    evaluation_set = grid(300)
    sae = SAES.build(CONTRACTS[name], 6, torch.Generator().manual_seed(4))
    sae.initialize(evaluation_set.rows[:16])
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    found = Probes(evaluation_set).measure(sae, bootstrap=5)
    assert all(math.isfinite(estimate.value) for estimate in found.values())
    assert 0 < found["jaccard_3pct"].value <= found["jaccard_1pct"].value <= 1
    assert ("route_flips_3pct" in found) == (sae.num_experts > 1) and f"fvu_{sae.inference.name}" in found
    assert sae.training and all(torch.equal(before[key], value) for key, value in sae.state_dict().items())


@pytest.mark.parametrize("probes", [True, False])
def test_the_scorer_probes_trained_saes_alone_and_none_where_it_is_switched_off(probes):
    source = SyntheticSource(SyntheticSource.Config(d_in=6, common=4, topics=2, per_topic=6, common_active=1.0, topic_active=2.0), 64)
    scorer = Scorer(EvaluationConfig(rows=300, bootstrap=5, probes=probes), source, say=lambda _: None)
    asked = [trained("main", saes()["topk"], "main"), Asked("untrained", saes()["topk"], {"architecture": "topk"})]
    entries = scorer.group(asked).entries
    assert ["jaccard_3pct" in entries[name]["metrics"] for name in ("main", "untrained")] == [probes, False]
    assert all(entries["main"]["metrics"][key] == value for key, value in entries["untrained"]["metrics"].items())

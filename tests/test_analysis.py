"""Geometry against brute force, recovery of dictionaries that are known, PCA against an SVD, and the text behind latents and experts."""

import math
from itertools import permutations

import pytest
import torch
from torch import nn

from switch_sae.activations import SyntheticSource
from switch_sae.activations.base import EvaluationSet
from switch_sae.analysis.features.neighbours import decoder_geometry
from switch_sae.analysis.pca import PCABaseline, participation_ratio
from switch_sae.analysis.recovery import normalized_mutual_information, recovery, recovery_scores
from switch_sae.analysis.text_examples import expert_tokens, format_example, sample_latents, top_examples
from switch_sae.models import Flops, Routing, SAEOutput, SparseLatents, SwitchSAE, TopKSAE

M, E, D = 24, 3, 4
F = M // E


def decoder(seed=0):
    """Unnormalised rows with one near duplicate within expert 0 and one across experts 0 and 2; near, because exact ones would tie."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(M, D, generator=generator)
    weight[3] = weight[1] * 2 + 0.01 * torch.randn(D, generator=generator)
    weight[20] = weight[5] * 0.5 + 0.001 * torch.randn(D, generator=generator)
    return weight


def brute_force(weight, alive):
    """closest[m][e] = (cosine, latent) by explicit loops; absent where there is none."""
    closest = [{} for _ in range(M)]
    for m in range(M):
        for other in range(M):
            if m == other or not alive[m] or not alive[other]:
                continue
            cosine = float(weight[m].double() @ weight[other].double() / weight[m].double().norm() / weight[other].double().norm())
            if other // F not in closest[m] or cosine > closest[m][other // F][0]:
                closest[m][other // F] = (cosine, other)
    return closest


@pytest.mark.parametrize("some_dead", [False, True])
@pytest.mark.parametrize("block", [2**24, 5])
def test_geometry_equals_brute_force_in_blocks_of_any_size(monkeypatch, some_dead, block):
    monkeypatch.setattr("switch_sae.analysis.features.neighbours.BLOCK_ELEMENTS", block)
    weight = decoder()
    counts = torch.ones(M, dtype=torch.int64)
    if some_dead:
        counts[[0, 5, 9]] = 0
        counts[17:] = 0  # expert 2 has one live latent: no neighbour within
    geometry = decoder_geometry(weight, E, counts if some_dead else None)
    alive = (counts > 0).tolist()
    closest = brute_force(weight, alive)
    for m in range(M):
        for e in range(E):
            cosine, other = closest[m].get(e, (math.nan, -1))
            assert float(geometry.cosine_ME[m, e]) == pytest.approx(cosine, abs=1e-6, nan_ok=True)
            assert geometry.neighbour_ME[m, e] == other
        within = closest[m].get(m // F, (math.nan,))[0]
        across = max((c for e, (c, _) in closest[m].items() if e != m // F), default=math.nan)
        nearest = max(closest[m].values(), default=(math.nan, -1))
        assert float(geometry.within_M[m]) == pytest.approx(within, abs=1e-6, nan_ok=True)
        assert float(geometry.across_M[m]) == pytest.approx(across, abs=1e-6, nan_ok=True)
        assert float(geometry.nearest_M[m]) == pytest.approx(nearest[0], abs=1e-6, nan_ok=True)
        assert int(geometry.nearest_latent_M[m]) == nearest[1]
    similarity = geometry.similarity_EE()
    for a in range(E):
        for b in range(E):
            values = [closest[m][b][0] for m in range(a * F, (a + 1) * F) if b in closest[m]]
            assert float(similarity[a, b]) == pytest.approx(sum(values) / len(values) if values else math.nan, abs=1e-6, nan_ok=True)
    shares = geometry.duplicate_shares(0.7)
    kinds = {"any": lambda m, e: True, "within": lambda m, e: e == m // F, "across": lambda m, e: e != m // F}
    for kind, counts_as in kinds.items():
        count = sum(any(c > 0.7 for e, (c, _) in closest[m].items() if counts_as(m, e)) for m in range(M))
        assert shares[kind] == pytest.approx(count / sum(alive)), kind
    assert shares["any"] > 0
    own = [max(closest[m].values())[1] // F == m // F for m in range(M) if closest[m]]
    assert geometry.same_expert_share() == pytest.approx(sum(own) / len(own))


def test_duplicates_are_told_apart_by_kind_and_counted_once():
    weight = torch.eye(8)[torch.tensor([0, 1, 2, 0, 2, 4, 2, 6])]  # latents 0 and 3 within expert 0; 2, 4 and 6 across
    geometry = decoder_geometry(weight, 2)
    assert geometry.duplicate_shares() == {"any": 5 / 8, "within": 4 / 8, "across": 3 / 8}
    assert decoder_geometry(weight, 1).duplicate_shares() == {"any": 5 / 8, "within": 5 / 8, "across": 0}
    assert decoder_geometry(weight, 1).similarity_EE().tolist() == [[5 / 8]]


def test_geometry_refuses_what_has_no_direction_or_no_experts():
    weight = decoder()
    weight[2] = 0
    with pytest.raises(ValueError, match="no direction"):
        decoder_geometry(weight, E)
    counts = torch.ones(M)
    counts[2] = 0
    assert decoder_geometry(weight, E, counts).cosine_ME[2].isnan().all()
    with pytest.raises(ValueError, match="split evenly over 5"):
        decoder_geometry(weight, 5)
    with pytest.raises(ValueError, match="firing_counts has shape"):
        decoder_geometry(weight, E, counts[1:])
    with pytest.raises(ValueError, match="no latent is alive"):
        decoder_geometry(weight, E, torch.zeros(M)).duplicate_shares()


def test_recovery_of_the_truth_itself_and_of_a_random_dictionary():
    pytest.importorskip("scipy")
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 30, generator=generator)
    found = recovery(3 * truth[torch.randperm(20, generator=generator)], truth)
    assert found.recall == found.precision == found.uniqueness == 1 and found.mcc == pytest.approx(1) and found.mmcs == pytest.approx(1)
    chance = recovery(torch.randn(20, 30, generator=generator), truth)
    assert chance.recall == 0 and chance.mcc < 0.5


def test_recovery_matches_one_to_one_and_sees_duplicates():
    pytest.importorskip("scipy")
    truth = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    latents = torch.cat([truth[:1], truth[:1] + 0.01, torch.randn(2, 6, generator=torch.Generator().manual_seed(2)), -truth[4:]])
    found = recovery(latents, truth)
    cosine = nn.functional.cosine_similarity(latents[:, None].double(), truth[None].double(), dim=2)
    best = max(sum(abs(float(cosine[m, p[m]])) for m in range(5)) for p in permutations(range(5)))
    assert found.mcc == pytest.approx(best / 5)
    assert found.recall == pytest.approx(1 / 5) and found.precision == pytest.approx(2 / 5)  # a negative copy is none: latents are >= 0
    assert found.uniqueness == len({int(row.abs().argmax()) for row in cosine}) / 5
    counts = torch.tensor([1, 0, 0, 0, 1])
    assert recovery(latents, truth, firing_counts=counts).precision == 1 / 2
    with pytest.raises(ValueError, match="nothing to match"):
        recovery(latents, truth, firing_counts=counts * 0)
    with pytest.raises(ValueError, match="must be"):
        recovery(latents[:, 1:], truth)


def test_normalized_mutual_information():
    labels = torch.randint(4, (4000,), generator=torch.Generator().manual_seed(0))
    other = torch.randint(3, (4000,), generator=torch.Generator().manual_seed(1))
    assert normalized_mutual_information(labels, (labels * 7 + 2) % 11) == pytest.approx(1)
    assert normalized_mutual_information(labels, other) < 0.005
    assert normalized_mutual_information(labels, torch.zeros_like(labels)) == pytest.approx(0, abs=1e-12)
    assert normalized_mutual_information(labels * 0, labels * 0 + 5) == 1
    # By hand: joint [[2, 0], [1, 1]] / 4; H(A) = log 2, H(B) = 3/4 log 4/3 + 1/4 log 4, H(A, B) = 1/2 log 2 + 1/2 log 4.
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    entropy_b = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    information = math.log(2) + entropy_b - 1.5 * math.log(2)
    assert normalized_mutual_information(first, second) == pytest.approx(2 * information / (math.log(2) + entropy_b))
    with pytest.raises(ValueError, match="labellings"):
        normalized_mutual_information(labels, other[1:])


def test_pca_equals_a_direct_svd():
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 0.5]) + 3
    mean = x.mean(0)
    _, sizes, directions = torch.linalg.svd(x - mean, full_matrices=False)
    for k in range(1, D + 1):
        output = PCABaseline.fit(x, k)(x)
        assert torch.allclose(output.recon_TD, mean + (x - mean) @ directions[:k].T @ directions[:k], atol=1e-10)
        assert (output.latents.values_TK >= 0).all() and output.latents.to_dense().shape == (200, 2 * k)
    assert participation_ratio(x) == pytest.approx(float(sizes.square().sum() ** 2 / sizes.pow(4).sum()))


def test_participation_ratio_counts_dimensions():
    corners = torch.cat([torch.eye(5), -torch.eye(5)])
    assert participation_ratio(corners + 100) == pytest.approx(5)
    assert participation_ratio(torch.outer(torch.arange(9.0), torch.ones(5))) == pytest.approx(1)


def test_pca_decodes_what_it_encodes_and_refuses_bad_sizes():
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    pca = PCABaseline.fit(x, 2)
    assert torch.equal(pca.decode(pca.encode(x)), pca(x).recon_TD)
    with pytest.raises(ValueError, match="k=5 components"):
        PCABaseline.fit(x, 5)
    with pytest.raises(ValueError, match="2 rows cannot fix 2"):
        PCABaseline.fit(x[:2], 2)
    with pytest.raises(ValueError, match="hold NaN"):
        PCABaseline.fit(x / 0, 2)
    with pytest.raises(ValueError, match="all 3 rows are equal"):
        participation_ratio(torch.ones(3, D))


C, S, WORDS = 6, 9, 5


class ByToken(nn.Module):
    """Rows carry (token, strength): the expert is token % 2, and latent `token` fires with the strength, latent 9 never."""

    num_latents, num_experts = 10, 2

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        token = x[:, 0].long()
        values, indices = torch.stack([x[:, 1], torch.zeros(len(x))], 1), torch.stack([token, torch.full_like(token, 9)], 1)
        routing = Routing(token[:, None] % 2, torch.ones(len(x), 1), nn.functional.one_hot(token % 2, 2).float())
        return SAEOutput(x, SparseLatents(values, indices, 10), routing)

    def flops(self):
        return Flops(0, 0, 0, 0)


def text_set():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(WORDS, (C, S), generator=generator, dtype=torch.int32)
    keep = torch.rand(C, S, generator=generator) > 0.3
    strength = torch.rand(C, S, generator=generator)
    rows = torch.stack([tokens.float(), strength], dim=2)[keep]
    document = torch.arange(C)[:, None].expand(C, S)[keep]
    return EvaluationSet(rows, document, tokens, keep, tuple(f"doc{i}" for i in range(C))), strength


def decode(ids):
    return "".join(f"<{i}>" for i in ids)


def test_top_examples_equal_a_search_by_hand():
    evaluation_set, strength = text_set()
    found = top_examples(ByToken(), evaluation_set, [2, 9, 4], decode, examples=2, window=3)
    assert list(found) == [2, 9, 4] and found[9] == []
    for latent in (2, 4):
        fires = (evaluation_set.tokens_CS == latent) & evaluation_set.keep_CS
        best = sorted(((float(strength[c][fires[c]].max()), c) for c in range(C) if fires[c].any()), reverse=True)[:2]
        assert [(e.activation, e.context) for e in found[latent]] == best
        for example in found[latent]:
            c, s = example.context, example.position
            window = range(max(0, s - 3), min(S, s + 4))
            assert example.tokens == tuple(f"<{int(evaluation_set.tokens_CS[c, i])}>" for i in window)
            assert example.activations == tuple(float(strength[c, i]) if fires[c, i] else 0.0 for i in window)
            assert example.tokens[example.centre] == f"<{latent}>" and example.activations[example.centre] == example.activation
            assert example.document == f"doc{c}"
            assert f"[[<{latent}>]]" in format_example(example)
    with pytest.raises(ValueError, match=r"latents \[10\]"):
        top_examples(ByToken(), evaluation_set, [10], decode)
    with pytest.raises(ValueError, match="has no text"):
        top_examples(ByToken(), EvaluationSet(evaluation_set.x_TD, evaluation_set.document_T), [1], decode)


def test_expert_tokens_have_the_lift_of_their_counts():
    evaluation_set, _ = text_set()
    tables = expert_tokens(ByToken(), evaluation_set, decode, top=9, min_count=4)
    kept = evaluation_set.tokens_CS[evaluation_set.keep_CS].tolist()
    for expert, table in enumerate(tables):
        load = sum(token % 2 == expert for token in kept) / len(kept)
        frequent = [token for token in range(WORDS) if kept.count(token) >= 4 and token % 2 == expert]
        assert [(t.token_id, t.count) for t in table] == sorted(((t, kept.count(t)) for t in frequent), key=lambda pair: (-pair[1], pair[0]))
        assert all(t.share == 1 and t.lift == pytest.approx(1 / load) and t.token == f"<{t.token_id}>" for t in table)
    one = ByToken()
    one.num_experts = 1
    with pytest.raises(ValueError, match="one expert"):
        expert_tokens(one, evaluation_set, decode)


def test_sample_latents_draws_live_latents_of_every_expert():
    counts = torch.tensor([0, 50, 9, 10, 11, 12, 0, 0, 0, 0, 3, 99])
    chosen = sample_latents(counts, 3, 2)
    assert chosen == sample_latents(counts, 3, 2) and len(chosen) == 3
    assert set(chosen[0]) == {1, 3} and set(chosen[1]) == {4, 5} and chosen[2] == [11]
    assert {tuple(sample_latents(counts, 1, 1, seed=seed)[0]) for seed in range(30)} == {(1,), (3,), (4,), (5,), (11,)}
    with pytest.raises(ValueError, match="split evenly"):
        sample_latents(counts, 5, 1)
    shared = sample_latents(torch.cat((torch.tensor([99, 99]), counts)), 3, 2, num_shared=2)
    assert shared == [[latent + 2 for latent in latents] for latents in chosen]


def test_shared_latents_are_no_experts_in_the_geometry():
    weight, counts = torch.randn(14, 5), torch.ones(14)
    whole, own = decoder_geometry(weight, 3, counts, num_shared=2), decoder_geometry(weight[2:], 3, counts[2:])
    assert torch.equal(whole.cosine_ME, own.cosine_ME) and torch.equal(whole.expert_M, own.expert_M) and len(whole.expert_M) == 12
    with pytest.raises(ValueError, match="one count for each of the 14 latents"):
        decoder_geometry(weight, 3, counts[2:], num_shared=2)


@pytest.mark.parametrize("kind", [TopKSAE, SwitchSAE])
def test_recovery_scores_are_those_of_recovery_and_of_the_topics(kind, monkeypatch):
    pytest.importorskip("scipy")
    source = SyntheticSource(SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6), 64)
    rows, truth = source.evaluation_set(300).rows, source.truth()
    sae = kind(kind.Config(num_latents=32, k=4, **({"num_experts": 4} if kind is SwitchSAE else {})), 16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec_MD[:28] = truth.dictionary_GD
        output = sae(rows.x_TD)
    counts, found = output.latents.firing_counts(), recovery_scores(sae, source, rows)
    for name, chosen in (("recall", truth.topic_G > -2), ("recall_common", truth.topic_G < 0), ("recall_topic", truth.topic_G >= 0)):
        by_hand = recovery(sae.decoder_weight(), truth.dictionary_GD[chosen], firing_counts=counts)
        assert found[name] == pytest.approx(by_hand.recall) and found[name] > 0
        assert name != "recall" or found["mcc"] == pytest.approx(by_hand.mcc)
    topics = source.evaluation_truth(300).topic_T
    nmi = None if output.routing is None else normalized_mutual_information(output.routing.expert_TS[:, 0], topics)
    assert found["nmi"] == nmi
    monkeypatch.setattr("switch_sae.analysis.recovery.LARGEST", 4)
    assert recovery_scores(sae, source, rows) == found | {"mcc": None}


def test_recovery_scores_of_a_dead_sae_are_nothing_and_one_world_has_one_recall():
    source = SyntheticSource(SyntheticSource.Config(d_in=16, common=0, common_active=0.0, topics=4, per_topic=6), 64)
    sae = TopKSAE(TopKSAE.Config(num_latents=32, k=4), 16, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc_M.fill_(-1e9)
    assert recovery_scores(sae, source, source.evaluation_set(50).rows) == {"mcc": 0.0, "recall": 0.0, "nmi": None}

"""Every metric against explicit loops over rows, exactness over splits, and what the bootstrap promises."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from switch_sae.metrics import METRICS, DownstreamLoss, Experts, Firing, MetricBatch, MetricSetup, PredictionBatch
from switch_sae.metrics.base import add_by_document
from switch_sae.metrics.bootstrap import bootstrap_intervals, document_weights
from switch_sae.metrics.error_spread import occurrences
from switch_sae.models import Routing, SAEOutput, SparseLatents

T, D, E, M, K, DOCUMENTS = 60, 5, 3, 12, 4, 7


def example():
    """Rows with an outlier, a zero row and a zero reconstruction; latents with unused slots; an expert that is rarely used."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=generator) + 1
    x[11] *= 100
    x[12] = 0
    recon = x + 0.3 * torch.randn(T, D, generator=generator)
    recon[13] = 0
    expert = torch.multinomial(torch.tensor([0.6, 0.35, 0.05]), T, replacement=True, generator=generator)
    expert[:E] = torch.arange(E)
    probs = torch.softmax(torch.randn(T, E, generator=generator), dim=1)
    values = torch.rand(T, K, generator=generator) * (torch.rand(T, K, generator=generator) > 0.3)
    inside = torch.stack([torch.randperm(M // E, generator=generator)[:K] for _ in range(T)])
    indices = expert[:, None] * (M // E) + inside
    values[indices == 5] = 0  # a dead latent
    output = SAEOutput(recon, SparseLatents(values, indices, M), Routing(expert[:, None], probs.gather(1, expert[:, None]), probs))
    document = torch.arange(T) * DOCUMENTS // T
    return x, output, document


def part(output, rows):
    routing = output.routing
    return SAEOutput(
        output.recon_TD[rows],
        SparseLatents(output.latents.values_TK[rows], output.latents.indices_TK[rows], M),
        Routing(routing.expert_TS[rows], routing.gate_TS[rows], routing.probs_TE[rows]),
    )


def run_all(splits):
    x, output, document = example()
    metrics = {name: metric(MetricSetup.of(x, DOCUMENTS, M, E)) for name, metric in METRICS.items()}
    for rows in splits:
        for metric in metrics.values():
            metric.update(MetricBatch.of(x[rows], part(output, rows), document[rows]))
    return metrics


def numbers(metrics):
    return {name: value for metric in metrics.values() for name, value in metric.compute().items()}


def test_every_number_equals_explicit_loops():
    x, output, _ = example()
    found = numbers(run_all([slice(0, T)]))
    rows = [[float(v) for v in row] for row in x.double()]
    recons = [[float(v) for v in row] for row in output.recon_TD.double()]

    def square(a):
        return sum(v * v for v in a)

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    norms = [math.sqrt(square(row)) for row in rows]
    median = sorted(norms)[(T - 1) // 2]
    inliers = [t for t in range(T) if norms[t] <= 10 * median]
    assert len(inliers) == T - 1
    residual = [square([a - b for a, b in zip(rows[t], recons[t], strict=True)]) for t in range(T)]
    for suffix, chosen in (("", range(T)), ("_inliers", inliers)):
        centre = [mean(rows[t][d] for t in chosen) for d in range(D)]
        variance = sum(square([v - c for v, c in zip(rows[t], centre, strict=True)]) for t in chosen)
        assert found[f"fvu{suffix}"] == pytest.approx(sum(residual[t] for t in chosen) / variance, rel=1e-12)
        assert found[f"normalized_mse{suffix}"] == pytest.approx(mean(residual[t] / norms[t] ** 2 for t in chosen if norms[t] > 0), rel=1e-12)
    cosine = [
        sum(a * b for a, b in zip(rows[t], recons[t], strict=True)) / norms[t] / max(math.sqrt(square(recons[t])), 1e-30)
        for t in range(T)
        if norms[t]
    ]
    assert found["cosine"] == pytest.approx(mean(cosine), rel=1e-12)
    assert found["relative_norm"] == pytest.approx(mean(math.sqrt(square(recons[t])) / norms[t] for t in range(T) if norms[t]), rel=1e-12)

    fired = [
        [(int(m), float(v)) for v, m in zip(vs, ms, strict=True) if v != 0]
        for vs, ms in zip(output.latents.values_TK, output.latents.indices_TK, strict=True)
    ]
    assert found["l0"] == pytest.approx(mean(len(f) for f in fired), rel=1e-12)
    assert found["unused_slots"] == pytest.approx(1 - mean(len(f) for f in fired) / K, rel=1e-12)
    rate = [mean(any(m == latent for m, _ in f) for f in fired) for latent in range(M)]
    assert rate[5] == 0
    assert found["dead_latents"] == pytest.approx(mean(r == 0 for r in rate))
    assert found["dense_latents_1pct"] == pytest.approx(mean(r > 0.01 for r in rate))
    assert found["dense_latents_10pct"] == pytest.approx(mean(r > 0.1 for r in rate))

    experts, probs = output.routing.expert_TS[:, 0].tolist(), output.routing.probs_TE.double().tolist()
    load = [experts.count(e) / T for e in range(E)]
    assert found["load_cv"] == pytest.approx(math.sqrt(mean((f - 1 / E) ** 2 for f in load)) * E, rel=1e-12)
    assert found["load_max"] == pytest.approx(max(load) * E, rel=1e-12)
    assert found["load_min"] == pytest.approx(min(load) * E, rel=1e-12)
    assert found["load_min_over_max"] == pytest.approx(min(load) / max(load), rel=1e-12)
    assert found["load_entropy"] == pytest.approx(-sum(f * math.log(f) for f in load) / math.log(E), rel=1e-12)
    assert found["router_entropy"] == pytest.approx(mean(-sum(q * math.log(q) for q in p) for p in probs) / math.log(E), rel=1e-12)
    assert found["gate"] == pytest.approx(mean(probs[t][experts[t]] for t in range(T)), rel=1e-12)
    assert found["load_balance"] == pytest.approx(E * sum(load[e] * mean(p[e] for p in probs) for e in range(E)), rel=1e-12)


def test_the_spread_of_the_error_equals_explicit_loops():
    x, output, document = example()
    seen = torch.tensor([1, 9, 10, 49, 50, 1000])[torch.arange(T) % 6]
    setup = MetricSetup.of(x, DOCUMENTS, M, E)
    metric = METRICS["error_spread"](setup)
    metric.update(MetricBatch.of(x, output, document, seen))
    found = metric.compute()
    inliers = [t for t in range(T) if t != 11]
    error = [float((x[t].double() - output.recon_TD[t].double()).square().sum()) for t in range(T)]
    mean = sum(error[t] for t in inliers) / len(inliers)
    assert found["error_cv"] == pytest.approx(math.sqrt(sum((error[t] - mean) ** 2 for t in inliers) / len(inliers)) / mean, rel=1e-12)
    centre = x[inliers].double().mean(0)
    for name, counts in {"lt10": (1, 9), "10_50": (10, 49), "50_200": (50,), "ge1000": (1000,)}.items():
        chosen = [t for t in inliers if int(seen[t]) in counts]
        variance = sum(float((x[t].double() - centre).square().sum()) for t in chosen)
        assert found[f"fvu_seen_{name}"] == pytest.approx(sum(error[t] for t in chosen) / variance, rel=1e-12)
    assert found.keys() == {"error_cv", *(f"fvu_seen_{name}" for name in ("lt10", "10_50", "50_200", "ge1000"))}  # no token stands on 200 to 999 rows
    assert bootstrap_intervals([metric], DOCUMENTS, 50).keys() == found.keys()
    even = METRICS["error_spread"](setup)
    even.update(MetricBatch.of(x, SAEOutput(x + 1, output.latents), document))
    assert even.compute() == {"error_cv": pytest.approx(0, abs=1e-6)}


def test_a_number_that_some_resamples_lack_has_no_interval():
    x, output, document = example()
    metric = METRICS["error_spread"](MetricSetup.of(x, DOCUMENTS, M, E))
    metric.update(MetricBatch.of(x, output, document, torch.where(document == 2, 5, 20)))
    assert metric.compute().keys() == {"error_cv", "fvu_seen_lt10", "fvu_seen_10_50"}
    assert bootstrap_intervals([metric], DOCUMENTS, 50).keys() == {"error_cv", "fvu_seen_10_50"}


def test_occurrences_count_kept_positions():
    tokens, keep = torch.tensor([[7, 5, 5], [7, 5, 9]]), torch.tensor([[False, True, True], [True, True, False]])
    assert occurrences(tokens, keep).tolist() == [3, 3, 1, 3]


def test_shared_latents_belong_to_no_expert():
    x, output, document = example()
    metric = METRICS["firing"](replace(MetricSetup.of(x, DOCUMENTS, M, 2), num_shared=4))
    metric.update(MetricBatch.of(x, output, document))
    dead = (output.latents.to_dense() == 0).all(0).double()
    assert metric.vectors()["expert_dead_latents"] == [float(dead[4:8].mean()), float(dead[8:].mean())] and dead[4:8].any()


def test_vectors_per_expert():
    metrics = run_all([slice(0, T)])
    _, output, _ = example()
    load = metrics["experts"].vectors()["expert_load"]
    assert load == pytest.approx([(output.routing.expert_TS == e).double().mean().item() for e in range(E)])
    assert sum(metrics["experts"].vectors()["expert_probability"]) == pytest.approx(1)
    dense = output.latents.to_dense()
    dead = [float((dense[:, e * 4 : (e + 1) * 4] == 0).all(0).double().mean()) for e in range(E)]
    assert metrics["firing"].vectors()["expert_dead_latents"] == dead and dead[1] == 0.25
    assert torch.equal(metrics["firing"].firing_counts, (dense != 0).sum(0))


@pytest.mark.parametrize("seed", range(4))
def test_results_and_intervals_are_bit_identical_however_rows_are_split(seed):
    whole = run_all([slice(0, T)])
    if seed == 0:
        cuts = list(range(T + 1))
    else:
        cuts = [0, *sorted(torch.randperm(T - 1, generator=torch.Generator().manual_seed(seed))[: 3 * seed].add(1).tolist()), T]
    split = run_all([slice(a, b) for a, b in pairwise(cuts)])
    assert numbers(split) == numbers(whole)
    assert bootstrap_intervals(split.values(), DOCUMENTS, 50) == bootstrap_intervals(whole.values(), DOCUMENTS, 50)


def test_sums_are_added_in_order_of_rows():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(500, 3, generator=generator, dtype=torch.float64).exp() * torch.tensor([1e-8, 1.0, 1e8], dtype=torch.float64)
    document = torch.randint(4, (500,), generator=generator)
    sums, expected = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    add_by_document(sums, rows, document)
    for t in range(500):
        expected[document[t]] += rows[t]
    assert torch.equal(sums, expected)


def setup_and_batch(x, recon):
    latents = SparseLatents(torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64), 1)
    return MetricSetup.of(x, 1, 1, 1), MetricBatch.of(x, SAEOutput(recon, latents), torch.zeros(len(x), dtype=torch.int64))


def score(name, x, recon):
    setup, batch = setup_and_batch(x, recon)
    metric = METRICS[name](setup)
    metric.update(batch)
    return metric.compute()


def test_fvu_is_one_at_the_mean_zero_when_perfect_and_blind_to_a_common_offset():
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 50
    assert score("fvu", x, x.mean(0).expand_as(x))["fvu"] == pytest.approx(1, rel=1e-12)
    assert score("fvu", x, x.clone()) == {"fvu": 0, "fvu_inliers": 0}
    recon = x + 0.1 * torch.sin(x)
    assert score("fvu", x, recon)["fvu"] == pytest.approx(score("fvu", x - 50, recon - 50)["fvu"], rel=1e-9)
    assert score("fvu", x, x.mean(0) * torch.ones_like(x) + 1)["fvu"] > 1.1  # a constant error is an error


def test_outliers_dominate_fvu_and_are_removed_by_name():
    x = torch.randn(400, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[0] = 1e4
    recon = x.clone()
    recon[1:] = 0  # nothing but the outlier is reconstructed
    fvu = score("fvu", x, recon)
    assert fvu["fvu"] < 1e-4 and fvu["fvu_inliers"] == pytest.approx(1, abs=0.02)


def test_experts_are_scored_only_where_there_are_experts():
    x, output, document = example()
    setup = MetricSetup.of(x, DOCUMENTS, M, 1)
    assert not METRICS["experts"].applies(setup) and all(metric.applies(setup) for name, metric in METRICS.items() if name != "experts")
    unrouted = MetricBatch.of(x, SAEOutput(output.recon_TD, output.latents), document)
    with pytest.raises(ValueError, match="has no routing"):
        METRICS["experts"](MetricSetup.of(x, DOCUMENTS, M, E)).update(unrouted)


def test_a_collapsed_router_has_the_extreme_scores():
    x, output, document = example()
    expert, probs = torch.zeros(T, dtype=torch.int64), torch.tensor([[1.0, 0.0, 0.0]]).expand(T, E)
    metric = METRICS["experts"](MetricSetup.of(x, DOCUMENTS, M, E))
    metric.update(MetricBatch.of(x, SAEOutput(output.recon_TD, output.latents, Routing(expert[:, None], torch.ones(T, 1), probs)), document))
    found = metric.compute()
    assert found["load_balance"] == pytest.approx(E) and found["load_max"] == pytest.approx(E) and found["load_min_over_max"] == 0
    assert found["load_entropy"] == 0 and found["router_entropy"] == 0 and found["load_cv"] == pytest.approx(math.sqrt(E - 1))


def test_downstream_numbers_equal_hand_computed_ratios():
    setup, _ = setup_and_batch(torch.eye(3), torch.eye(3))
    loss = DownstreamLoss(setup)
    columns = {"clean_T": [1.0, 2.0], "spliced_T": [1.5, 2.1], "zero_T": [5.0, 7.0], "mean_T": [3.0, 4.0], "kl_T": [0.25, 0.35]}
    columns |= {"spliced_inliers_T": [1.25, 2.05], "kl_inliers_T": [0.15, 0.2]}
    for i in range(2):
        loss.update(PredictionBatch(**{name: torch.tensor([v[i]], dtype=torch.float64) for name, v in columns.items()}, document_T=torch.tensor([0])))
    expected = {
        "ce_clean": 1.5,
        "ce_spliced": 1.8,
        "ce_zero": 6,
        "ce_mean": 3.5,
        "delta_ce": 0.3,
        "kl": 0.3,
        "delta_ce_inliers": 0.15,
        "kl_inliers": 0.175,
    }
    expected |= {"loss_recovered_zero": (12 - 3.6) / (12 - 3), "loss_recovered_mean": (7 - 3.6) / (7 - 3)}
    assert loss.compute() == pytest.approx(expected)


def test_bootstrap_weights_are_resamples_of_documents_and_the_same_for_everyone():
    weights = torch.cat(list(document_weights(DOCUMENTS, 200)))
    assert weights.shape == (200, DOCUMENTS) and (weights.sum(1) == DOCUMENTS).all() and weights.unique().tolist() == weights.unique().long().tolist()
    assert torch.equal(weights, torch.cat(list(document_weights(DOCUMENTS, 200))))
    assert weights.mean(0).sub(1).abs().max() < 0.25 and weights.var(0).mean() == pytest.approx(1 - 1 / DOCUMENTS, abs=0.15)


def test_bootstrap_blocks_do_not_change_the_resamples(monkeypatch):
    whole = torch.cat(list(document_weights(DOCUMENTS, 20)))
    monkeypatch.setattr("switch_sae.metrics.bootstrap.BLOCK_ELEMENTS", 3 * DOCUMENTS)
    blocks = list(document_weights(DOCUMENTS, 20))
    assert len(blocks) == 7 and torch.equal(torch.cat(blocks), whole)


def test_intervals_equal_recomputing_the_metric_on_resampled_rows():
    x, output, document = example()
    metrics = run_all([slice(0, T)])
    weights = torch.cat(list(document_weights(DOCUMENTS, 3)))
    for r in range(3):
        rows = torch.cat([(document == n).nonzero()[:, 0].repeat(int(weights[r, n])) for n in range(DOCUMENTS)])
        for name, metric in metrics.items():
            if name == "firing":
                continue
            again = type(metric)(metric.setup)  # the evaluation mean and the outlier limit are held fixed
            again.update(MetricBatch.of(x[rows], part(output, rows), document[rows]))
            for key, value in again.compute().items():
                if name == "experts" and key not in Experts.MEANS:
                    continue
                assert float(metric.replicates(weights)[key][r]) == pytest.approx(value, rel=1e-9), key


def interval_of_fvu(documents, seed=0, rows_per_document=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(documents * rows_per_document, D, generator=generator, dtype=torch.float64)
    hardness = torch.rand(documents, 1, generator=generator, dtype=torch.float64).repeat_interleave(rows_per_document, 0)
    document = torch.arange(documents).repeat_interleave(rows_per_document)
    latents = SparseLatents(torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64), 1)
    metric = METRICS["fvu"](MetricSetup.of(x, documents, 1, 1))
    metric.update(MetricBatch.of(x, SAEOutput(x * (1 - hardness), latents), document))
    return metric.compute()["fvu"], bootstrap_intervals([metric], documents)["fvu"]


def test_intervals_hold_the_value_narrow_with_documents_and_cover_the_truth():
    value, (low, high) = interval_of_fvu(20)
    wide = high - low
    assert low < value < high
    value, (low, high) = interval_of_fvu(320)
    assert low < value < high
    assert (high - low) / wide == pytest.approx(1 / 4, rel=0.35)  # 1 / sqrt(16)
    # E[hardness^2] = 1/3. 95 % of intervals should hold it; 60 draws of 40 documents, so at least 50 with room for a small-sample bias.
    covered = sum(low <= 1 / 3 <= high for low, high in (interval_of_fvu(40, seed, 2)[1] for seed in range(60)))
    assert 50 <= covered <= 60


def test_no_interval_where_none_is_defined():
    metrics = run_all([slice(0, T)])
    names = bootstrap_intervals(metrics.values(), DOCUMENTS, 10).keys()
    assert set(numbers(metrics)) - set(names) == {
        "dead_latents", "dense_latents_1pct", "dense_latents_10pct", "load_balance", "load_cv", "load_max", "load_min", "load_min_over_max",
        "load_entropy"
    }  # fmt: skip
    assert bootstrap_intervals(metrics.values(), 1) == {} and bootstrap_intervals(metrics.values(), DOCUMENTS, 0) == {}


def test_bad_input_is_refused_with_the_row_that_is_bad():
    x, output, document = example()
    broken = x.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 60 rows of the evaluation rows .* row 3"):
        MetricSetup.of(broken, DOCUMENTS, M, E)
    with pytest.raises(ValueError, match="rows of the reconstruction hold NaN"):
        MetricBatch.of(x, SAEOutput(broken, output.latents), document)
    with pytest.raises(ValueError, match="must be that of the target"):
        MetricBatch.of(x, SAEOutput(x[:, :-1], output.latents), document)
    with pytest.raises(ValueError, match="all 4 evaluation rows are equal"):
        MetricSetup.of(torch.ones(4, D), 1, M, E)
    with pytest.raises(ValueError, match="at least half of the rows are zero"):
        MetricSetup.of(torch.eye(11, D), 1, M, E)
    with pytest.raises(ValueError, match="at least one row"):
        MetricSetup.of(torch.ones(0, D), 1, M, E)
    for metric in METRICS.values():
        with pytest.raises(ValueError, match="has seen no rows"):
            metric(MetricSetup.of(x, DOCUMENTS, M, E)).compute()
    with pytest.raises(ValueError, match="coverage"):
        bootstrap_intervals([], DOCUMENTS, coverage=95)
    with pytest.raises(ValueError, match="replicates"):
        bootstrap_intervals([], DOCUMENTS, -1)


def test_signed_latents_fire_whatever_their_sign():
    x = torch.eye(4)
    latents = SparseLatents(torch.tensor([[-1.0, 0.0], [2.0, 0.0], [0.0, -3.0], [1.0, 1.0]]), torch.tensor([[0, 1]] * 4), 2)
    metric = Firing(MetricSetup.of(x, 1, 2, 1))
    metric.update(MetricBatch.of(x, SAEOutput(x, latents), torch.zeros(4, dtype=torch.int64)))
    assert metric.firing_counts.tolist() == [3, 2]

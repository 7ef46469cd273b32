"""`evaluate` end to end: real SAEs, the PCA control and a toy language model whose spliced predictions can be worked out by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from switch_sae.activations.base import EvaluationSet
from switch_sae.analysis.pca import PCABaseline
from switch_sae.evaluation import Estimate, Results, evaluate, evaluate_group
from switch_sae.metrics import Downstream
from switch_sae.models import Flops, SAEOutput, SparseLatents, SwitchSAE, TopKSAE

C, S, D, V = 10, 7, 6, 11


class ToyModel:
    """x = embedding[token] + mean embedding so far, then logits = (x + mean x so far) @ head: causal, and mixing positions after the hook too."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(V, D, generator=generator) + 0.5
        self.head = torch.randn(D, V, generator=generator)
        self.passes = 0

    def activations(self, tokens_CS):
        return self.mixed(self.embedding[tokens_CS.long()])

    @staticmethod
    def mixed(x_CSD):
        return x_CSD + x_CSD.cumsum(1) / torch.arange(1, x_CSD.shape[1] + 1)[:, None]

    def logits(self, tokens_CS, replace=None):
        self.passes += 1
        x = self.activations(tokens_CS)
        return self.mixed(x if replace is None else replace(x)) @ self.head


class Elementwise(nn.Module):
    """A stand-in whose reconstruction is any function of the rows."""

    num_latents, num_experts = 3, 1

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        latents = SparseLatents(torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64), 3)
        return SAEOutput(self.function(x), latents)

    def flops(self):
        return Flops(1, 2, 3, 4)


def text_set(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (C, S), generator=generator, dtype=torch.int32)
    keep = torch.rand(C, S, generator=generator) > 0.2
    keep[:, 0] = False
    keep[4] = False
    document = (torch.arange(C)[:, None].expand(C, S) // 2 * 10)[keep]
    return EvaluationSet(model.activations(tokens)[keep], document, tokens, keep, tuple(f"file{i}" for i in range(50)))


def plain_set(rows=300, documents=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return EvaluationSet(torch.randn(rows, D, generator=generator) * 2 + 1, torch.randint(documents, (rows,), generator=generator).sort().values)


def switch(k=3):
    return SwitchSAE(SwitchSAE.Config(num_latents=24, k=k, num_experts=4), D, torch.Generator().manual_seed(1))


def by_hand(model, evaluation_set, function, everywhere=False):
    """CE and KL of every counted prediction, one context and one position at a time; `everywhere` replaces positions that were not kept too."""
    clean_ce, spliced_ce, kl = [], [], []
    for tokens, keep in zip(evaluation_set.tokens_CS, evaluation_set.keep_CS, strict=True):
        x = model.activations(tokens[None])[0]
        spliced = torch.stack([function(row[None])[0] if kept or everywhere else row for row, kept in zip(x, keep, strict=True)])
        clean_logits, spliced_logits = (model.mixed(rows[None])[0] @ model.head for rows in (x, spliced))
        for s in range(S - 1):
            if keep[s] and keep[s + 1]:
                p, q = (logits[s].double().log_softmax(0) for logits in (clean_logits, spliced_logits))
                clean_ce.append(-float(p[tokens[s + 1]]))
                spliced_ce.append(-float(q[tokens[s + 1]]))
                kl.append(float((p.exp() * (p - q)).sum()))
    return (sum(values) / len(values) for values in (clean_ce, spliced_ce, kl))


def test_downstream_equals_predicting_one_position_at_a_time():
    model = ToyModel()
    evaluation_set = text_set(model)
    results = evaluate(Elementwise(lambda x: 0.7 * x + 0.1), evaluation_set, Downstream(model, evaluation_set), bootstrap=20)
    clean, spliced, kl = by_hand(model, evaluation_set, lambda x: 0.7 * x + 0.1)
    mean = evaluation_set.x_TD.mean(0, keepdim=True)
    _, zero_ce, _ = by_hand(model, evaluation_set, torch.zeros_like, everywhere=True)
    _, mean_ce, _ = by_hand(model, evaluation_set, lambda x: mean)
    expected = {"ce_clean": clean, "ce_spliced": spliced, "delta_ce": spliced - clean, "kl": kl, "ce_zero": zero_ce, "ce_mean": mean_ce}
    expected["loss_recovered_zero"] = (zero_ce - spliced) / (zero_ce - clean)
    expected["loss_recovered_mean"] = (mean_ce - spliced) / (mean_ce - clean)
    assert {name: results[name].value for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    keep = evaluation_set.keep_CS
    assert results.predictions == int((keep[:, :-1] & keep[:, 1:]).sum())
    assert results["kl"].low <= results["kl"].value <= results["kl"].high


def test_halves_keep_documents_whole_and_are_evaluation_sets_of_their_own():
    model = ToyModel()
    whole = text_set(model)
    keep = whole.keep_CS
    whole = replace(whole, dropped_TD=2 * model.activations(whole.tokens_CS)[~keep], target_TD=whole.x_TD * 2)
    halves = whole.halves()
    sizes = dict(zip(*(part.tolist() for part in whole.document_T.unique(return_counts=True)), strict=True))
    expected, rows = ([], []), [0, 0]
    for document in sorted(sizes, key=lambda document: (-sizes[document], document)):
        place = 0 if rows[0] <= rows[1] else 1
        expected[place].append(document)
        rows[place] += sizes[document]
    for half, documents in zip(halves, expected, strict=True):
        chosen = torch.isin(whole.document_T, torch.tensor(documents))
        assert torch.equal(half.x_TD, whole.x_TD[chosen]) and torch.equal(half.target_TD, whole.target_TD[chosen])
        assert torch.equal(half.document_T, whole.document_T[chosen]) and half.document_names == whole.document_names
        tokens, kept = half.text()
        assert len(tokens) < C and torch.equal(tokens[kept], whole.tokens_CS[keep][chosen])
        assert torch.equal(half.at_hook(), 2 * model.activations(tokens)), "what reconstructions replace"
        assert torch.equal(half.inputs()[kept], half.x_TD) and not half.inputs()[~kept].any()
        half = replace(half, target_TD=None, dropped_TD=half.dropped_TD / 2)
        results = evaluate(Elementwise(lambda x: 0.7 * x + 0.1), half, Downstream(model, half), bootstrap=5)
        clean, spliced, kl = by_hand(model, half, lambda x: 0.7 * x + 0.1)
        assert [results[name].value for name in ("ce_clean", "ce_spliced", "kl")] == pytest.approx([clean, spliced, kl], rel=1e-4)
    assert replace(whole, dropped_TD=None).halves()[0].at_hook() is None
    plain = plain_set(documents=4)
    a, b = plain.halves()
    assert len(a.x_TD) + len(b.x_TD) == 300 and not set(a.document_T.tolist()) & set(b.document_T.tolist()) and a.tokens_CS is None
    with pytest.raises(ValueError, match="1 document cannot be split"):
        plain_set(documents=1).halves()


def test_identity_changes_nothing_and_zero_is_zero_ablation():
    model = ToyModel()
    evaluation_set = text_set(model)
    downstream = Downstream(model, evaluation_set)
    same = evaluate(Elementwise(torch.clone), evaluation_set, downstream, bootstrap=10)
    for name in ("fvu", "normalized_mse", "delta_ce", "kl"):
        assert same[name] == Estimate(0, 0, 0), name
    assert same["loss_recovered_zero"].value == same["loss_recovered_mean"].value == 1
    assert same["cosine"].value == pytest.approx(1) and same["relative_norm"].value == 1
    nothing = evaluate(Elementwise(torch.zeros_like), evaluation_set, downstream, bootstrap=0)  # zeros at kept positions only: less is lost
    assert nothing["loss_recovered_zero"].value != 0 and nothing["ce_spliced"].value != nothing["ce_zero"].value
    mean = evaluation_set.x_TD.double().mean(0).float()
    average = evaluate(Elementwise(lambda x: mean.expand_as(x)), evaluation_set, downstream, bootstrap=0)
    assert average["loss_recovered_mean"].value == 0 and average["fvu"].value == pytest.approx(1, abs=1e-6)


def test_clean_predictions_are_shared_and_the_cache_does_not_change_numbers():
    model = ToyModel()
    evaluation_set = text_set(model)
    cached, uncached = Downstream(model, evaluation_set), Downstream(model, evaluation_set, cache_bytes=0)
    sae = switch()
    first = evaluate(sae, evaluation_set, cached, bootstrap=10)
    assert evaluate(sae, evaluation_set, uncached, bootstrap=10).to_json() == first.to_json()
    model.passes = 0
    assert evaluate(sae, evaluation_set, cached, bootstrap=10).to_json() == first.to_json() and model.passes == 3  # three chunks, the SAE's pass each
    assert evaluate(sae, evaluation_set, uncached, bootstrap=10).to_json() == first.to_json() and model.passes == 9  # and the clean run again


def test_a_group_shares_the_language_model_and_each_scores_as_alone():
    model = ToyModel()
    evaluation_set = text_set(model)
    saes = {
        "switch": switch(),
        "topk": TopKSAE(TopKSAE.Config(num_latents=24, k=3), D, torch.Generator().manual_seed(2)),
        "pca": PCABaseline.fit(evaluation_set.x_TD, 2),
    }
    alone = {name: evaluate(sae, evaluation_set, Downstream(model, evaluation_set), bootstrap=40).to_json() for name, sae in saes.items()}
    downstream, model.passes = Downstream(model, evaluation_set), 0
    group = evaluate_group(saes, evaluation_set, downstream, bootstrap=40)
    assert {name: results.to_json() for name, results in group.results.items()} == alone
    assert model.passes == 3 * (2 + 3) + 1  # clean, mean and every SAE for each chunk; zeros once
    ratios = group.ratios("switch")
    assert ratios.keys() == {"topk", "pca"}
    for other, ratio in ratios.items():
        for name, estimate in ratio.items():
            assert estimate.value == group.results["switch"][name].value / group.results[other][name].value
            assert estimate.low < estimate.value < estimate.high
    assert evaluate_group({"a": saes["topk"], "b": saes["topk"]}, evaluation_set, bootstrap=40).ratios("a") == {
        "b": {"fvu_inliers": Estimate(1, 1, 1)}
    }


@pytest.mark.parametrize("where", ["rows", "predictions"])
def test_an_sae_that_cannot_be_scored_leaves_the_others_alone(where):
    model, calls = ToyModel(), []
    evaluation_set = text_set(model)
    ill = Elementwise(lambda x: calls.append(0) or (x / 0 if where == "rows" or len(calls) > 1 else x))
    told = {}
    group = evaluate_group({"ill": ill, "well": switch()}, evaluation_set, Downstream(model, evaluation_set), 20, failed=told.__setitem__)
    assert group.results.keys() == {"well"} and "reconstruction hold NaN" in str(told["ill"])
    assert group.results["well"].to_json() == evaluate(switch(), evaluation_set, Downstream(model, evaluation_set), 20).to_json()
    with pytest.raises(ValueError, match="reconstruction hold NaN"):
        evaluate_group({"ill": Elementwise(lambda x: x / 0), "well": switch()}, evaluation_set)


class LooksBack(ToyModel):
    """Sees the tokens after the hook too, so that zeros at the hook do not make all contexts alike."""

    def logits(self, tokens_CS, replace=None):
        return super().logits(tokens_CS, replace) + self.embedding[tokens_CS.long()] @ self.head


def test_zero_ablation_is_computed_for_each_context_where_they_differ():
    for model in (ToyModel(), LooksBack()):
        evaluation_set = text_set(model)
        results = evaluate(switch(), evaluation_set, Downstream(model, evaluation_set), bootstrap=0)
        keep, tokens = evaluation_set.keep_CS, evaluation_set.tokens_CS.long()
        logprobs = model.logits(tokens, lambda x: 0 * x).log_softmax(2)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        assert results["ce_zero"].value == pytest.approx(-float(logprobs[keep[:, :-1] & keep[:, 1:]].double().mean()), rel=1e-6)


class Pointwise(ToyModel):
    """Mixes positions after the hook alone, so that one row of huge norm stays one."""

    def activations(self, tokens_CS):
        return self.embedding[tokens_CS.long()]


def test_outlier_rows_are_spliced_and_told_apart():
    model = Pointwise()
    model.embedding[3] *= 100
    evaluation_set = text_set(model)
    x = evaluation_set.x_TD
    limit = 10 * x.norm(dim=1).median()
    outliers = x.norm(dim=1) > limit
    assert 0 < outliers.sum() < len(x) / 5
    spoiled = evaluate(
        Elementwise(lambda x: torch.where(x.norm(dim=1, keepdim=True) > limit, 0 * x, x)), evaluation_set, Downstream(model, evaluation_set)
    )
    assert spoiled.outlier_rows == int(outliers.sum()) and spoiled["fvu_inliers"].value == 0 and spoiled["fvu"].value > 0.5
    assert spoiled["delta_ce_inliers"] == spoiled["kl_inliers"] == Estimate(0, 0, 0) and spoiled["delta_ce"].value != 0 and spoiled["kl"].value > 0
    same = evaluate(
        Elementwise(lambda x: torch.where(x.norm(dim=1, keepdim=True) > limit, x, 0.9 * x)), evaluation_set, Downstream(model, evaluation_set)
    )
    assert same["delta_ce_inliers"] == same["delta_ce"] and same["fvu"].value < same["fvu_inliers"].value == pytest.approx(0.014, rel=0.4)


def test_chunks_shrink_with_context_length_times_vocabulary(monkeypatch):
    model = ToyModel()
    evaluation_set = text_set(model)
    sizes, scores = [], []
    for room in (2**27, 4 * S * V * 2, 1):  # for four contexts, which are the most; for two; not even for one
        monkeypatch.setattr("switch_sae.metrics.downstream.CHUNK_BYTES", room)
        downstream = Downstream(model, evaluation_set)
        sizes.append(len(downstream))
        scores.append({name: e.value for name, e in evaluate(switch(), evaluation_set, downstream, bootstrap=0).metrics.items()})
    assert sizes == [3, 5, 9]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5) and scores[2] == pytest.approx(scores[0], rel=1e-5)


def test_a_limited_number_of_contexts_is_spread_over_the_text():
    model = ToyModel()
    evaluation_set = text_set(model)
    downstream = Downstream(model, evaluation_set, max_contexts=3)
    assert len(downstream.contexts) == 3 and downstream.contexts[0] == 0 and downstream.contexts[-1] == C - 1
    assert downstream.num_documents == 3
    assert len(Downstream(model, evaluation_set, max_contexts=99).contexts) == C - 1  # context 4 keeps nothing


def test_downstream_refuses_what_does_not_belong_together():
    model = ToyModel()
    evaluation_set = text_set(model)
    with pytest.raises(ValueError, match="not this model's activations"):
        Downstream(ToyModel(seed=1), evaluation_set)
    with pytest.raises(ValueError, match="has no text"):
        Downstream(model, plain_set())
    with pytest.raises(ValueError, match="mark exactly the positions"):
        Downstream(model, EvaluationSet(evaluation_set.x_TD[1:], evaluation_set.document_T[1:], evaluation_set.tokens_CS, evaluation_set.keep_CS))
    with pytest.raises(ValueError, match="max_contexts=0"):
        Downstream(model, evaluation_set, max_contexts=0)
    lonely = torch.zeros(C, S, dtype=torch.bool)
    lonely[:, 3] = True
    alone = EvaluationSet(model.activations(evaluation_set.tokens_CS)[lonely], torch.zeros(C, dtype=torch.int64), evaluation_set.tokens_CS, lonely)
    with pytest.raises(ValueError, match="no token to predict"):
        Downstream(model, alone)
    with pytest.raises(ValueError, match="another evaluation set"):
        evaluate(switch(), text_set(model), Downstream(model, evaluation_set))


@pytest.mark.parametrize("sae", [switch(), TopKSAE(TopKSAE.Config(num_latents=24, k=3), D, torch.Generator().manual_seed(2))], ids=["switch", "topk"])
def test_real_saes_get_every_number_and_survive_json(sae):
    model = ToyModel()
    evaluation_set = text_set(model)
    results = evaluate(sae, evaluation_set, Downstream(model, evaluation_set), bootstrap=30)
    assert results.rows == len(evaluation_set.x_TD) and results.documents == 5 and results.outlier_rows == 0
    assert all(math.isfinite(estimate.value) for estimate in results.metrics.values())
    assert 0 < results["l0"].value <= 3 and ("load_cv" in results.metrics) == (sae.num_experts > 1)
    assert results.flops == {"router": 2 * D * 4 if sae.num_experts > 1 else 0} | {
        name: getattr(sae.flops(), name) for name in ("encode", "decode", "backward", "forward", "total")
    }
    again = Results.from_json(json.loads(json.dumps(results.to_json(), allow_nan=False)))
    assert again.metrics == results.metrics and torch.equal(again.firing_counts, results.firing_counts)
    assert again.to_json() == results.to_json()
    assert torch.equal(results.firing_counts.float(), sae(evaluation_set.x_TD).latents.firing_counts())
    with pytest.raises(KeyError, match="no metric 'mse'"):
        results["mse"]


def test_numbers_that_are_not_finite_become_null_in_json():
    results = Results({"x": Estimate(math.nan, None, math.inf)}, {}, {}, 1, 1, 0, 0, torch.zeros(1, dtype=torch.int64))
    assert results.to_json()["metrics"]["x"] == {"value": None, "low": None, "high": None}
    assert math.isnan(Results.from_json(results.to_json())["x"].value)


def test_estimates_print_their_interval():
    assert f"{Estimate(0.123456)}" == "0.1235" and f"{Estimate(0.5, 0.25, 0.75):.2f}" == "0.50 [0.25, 0.75]"


class Stateful(Elementwise):
    """Draws random numbers, counts calls and has a submodule in another mode: everything that evaluation must undo."""

    def __init__(self):
        super().__init__(torch.clone)
        self.dropout = nn.Dropout(0.5).train()
        self.frozen = nn.Linear(1, 1).eval()
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, self.dropout.training, torch.is_grad_enabled()))
        self.calls += 1
        torch.rand(3)
        return super().forward(self.dropout(x))


@pytest.mark.parametrize("broken", [False, True])
def test_evaluation_leaves_no_trace(broken):
    model = ToyModel()
    evaluation_set = text_set(model)
    downstream = Downstream(model, evaluation_set)
    sae = Stateful().train()
    sae.frozen.eval()
    if broken:
        sae.function = lambda x: x / 0
    before, torch_state = {k: v.clone() for k, v in sae.state_dict().items()}, torch.get_rng_state()
    if broken:
        with pytest.raises(ValueError, match="reconstruction hold NaN"):
            evaluate(sae, evaluation_set, downstream)
    else:
        assert evaluate(sae, evaluation_set, downstream, bootstrap=5)["fvu"].value == 0  # dropout was off
    assert set(sae.modes) == {(False, False, False)}
    assert sae.training and sae.dropout.training and not sae.frozen.training and torch.is_grad_enabled()
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
    assert torch.equal(torch_state, torch.get_rng_state())


def test_chunks_cover_all_rows_once_and_the_result_is_repeatable():
    rows = 5000
    evaluation_set = plain_set(rows)
    sae = switch()
    results = evaluate(sae, evaluation_set, bootstrap=10)
    with torch.no_grad():
        x, output = evaluation_set.x_TD.double(), sae(evaluation_set.x_TD)
    fvu = (x - output.recon_TD.double()).square().sum() / (x - x.mean(0)).square().sum()
    assert results["fvu"].value == pytest.approx(float(fvu), rel=1e-6)
    assert results["l0"].value == pytest.approx(float((output.latents.values > 0).sum() / rows))
    assert int(results.firing_counts.sum()) == int((output.latents.values > 0).sum())
    assert results.to_json() == evaluate(sae, evaluation_set, bootstrap=10).to_json()


def test_document_numbers_need_not_be_dense():
    evaluation_set = plain_set()
    sparse = EvaluationSet(evaluation_set.x_TD, evaluation_set.document_T * 1000 + 7)
    assert evaluate(switch(), sparse, bootstrap=10).to_json() == evaluate(switch(), evaluation_set, bootstrap=10).to_json()


def test_one_document_gives_no_interval():
    one = EvaluationSet(plain_set().x_TD, torch.zeros(300, dtype=torch.int64))
    assert evaluate(switch(), one)["fvu"].low is None


def test_bad_rows_are_refused():
    evaluation_set = plain_set()
    evaluation_set.x_TD[5, 0] = torch.inf
    with pytest.raises(ValueError, match="row 5"):
        evaluate(switch(), evaluation_set)
    with pytest.raises(ValueError, match="needs one per row"):
        evaluate(switch(), EvaluationSet(torch.randn(4, D), torch.zeros(3, dtype=torch.int64)))


def test_pca_is_scored_like_an_sae():
    model = ToyModel()
    evaluation_set = text_set(model)
    downstream = Downstream(model, evaluation_set)
    x = evaluation_set.x_TD
    scores = [evaluate(PCABaseline.fit(x, k), evaluation_set, downstream, bootstrap=10) for k in (1, 3, D)]
    centred = (x - x.mean(0)).double()
    left = torch.linalg.svdvals(centred).square()
    for k, results in zip((1, 3, D), scores, strict=True):
        assert results["l0"].value == k and results["unused_slots"].value == 0
        assert results["fvu"].value == pytest.approx(float(left[k:].sum() / left.sum()), rel=1e-5, abs=1e-9)
    assert abs(scores[-1]["delta_ce"].value) < 1e-5 and scores[0]["kl"].value > scores[1]["kl"].value > 1e-3 > abs(scores[2]["kl"].value)

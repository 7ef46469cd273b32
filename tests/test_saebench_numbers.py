"""The comparison with SAEBench's and SAELens' evals, as far as it needs neither: their definitions, verdicts, and the table that is kept."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from experiments.benchmarks import saebench
from experiments.benchmarks.saebench import CHECKED, DELTA, DIFFERENT, EQUAL, EXPLAINED, NOT_OURS, OURS, Row
from experiments.benchmarks.saebench_definitions import by_definition
from experiments.benchmarks.saebench_peer import CONTEXTS_PER_BATCH, Store
from switch_sae.activations import EvaluationSet
from switch_sae.evaluation import evaluate
from switch_sae.interop.saebench import wrap
from switch_sae.metrics import Downstream
from switch_sae.models import SwitchSAE
from switch_sae.rows import Rows
from switch_sae.training import prepare

C, S, D, V, M = 21, 6, 8, 13, 32
COUNTS = {"theirs": 11, "ours": 10, "positions": 12}


class ToyModel:
    """x = embedding + mean embedding so far; logits = (x + mean x so far) @ head."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(V, D, generator=generator) + 0.5
        self.head = torch.randn(D, V, generator=generator)

    @staticmethod
    def mixed(x_CSD):
        return x_CSD + x_CSD.cumsum(1) / torch.arange(1, x_CSD.shape[1] + 1)[:, None]

    def activations(self, tokens_CS):
        return self.mixed(self.embedding[tokens_CS.long()])

    def logits(self, tokens_CS, replace=None):
        x_CSD = self.activations(tokens_CS)
        return self.mixed(x_CSD if replace is None else replace(x_CSD)) @ self.head


def contexts(with_separator: bool) -> EvaluationSet:
    """Token 0 begins each context, and may stand inside it."""
    tokens = torch.randint(0 if with_separator else 1, V, (C, S), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0
    keep = tokens != 0
    document = (torch.arange(C)[:, None].expand(C, S) // 3)[keep]
    return EvaluationSet(ToyModel().activations(tokens)[keep], document, tokens, keep)


def trained(rows: EvaluationSet) -> SwitchSAE:
    sae = SwitchSAE(SwitchSAE.Config(num_latents=M, k=3, num_experts=4), D, torch.Generator().manual_seed(2))
    prepare(sae, Rows.of(rows.x_TD), normalize_activations=True)
    return sae.eval()


def test_their_definitions_give_our_numbers_where_they_are_ours():
    rows = contexts(with_separator=False)
    sae, downstream = trained(rows), Downstream(ToyModel(), rows, max_contexts=C)
    ours = evaluate(sae, rows, downstream, bootstrap=0)
    variance = float((rows.x_TD - rows.x_TD.mean(0)).square().sum(1).mean())
    defined = by_definition({"sae": wrap(sae, "toy", "blocks.0.hook")}, rows, ToyModel(), downstream.contexts, [0])["sae"]
    mine = {name: of(ours, variance) for name, (_, of) in OURS.items()}
    theirs = {library: {name: value for name, value in numbers.items() if name in OURS} for library, numbers in defined.items()}
    other = {"sae-lens": ["kl_div_with_sae"], "sae-bench": ["kl_div_with_sae", "explained_variance", "mse"]}
    for library, numbers in theirs.items():
        same = {name: value for name, value in numbers.items() if name not in other[library]}
        assert same == pytest.approx({name: mine[name] for name in same}, rel=1e-5)
        assert all(not saebench.near(numbers[name], mine[name]) for name in other[library])
    assert 0 < mine["frac_alive"] <= 1 and mine["l0"] > 1


def test_their_predictions_are_those_of_one_position_at_a_time():
    rows, model = contexts(with_separator=True), ToyModel()
    peer = wrap(trained(rows), "toy", "blocks.0.hook")
    some_C = torch.tensor([0, 3, 4, 11, 20])
    entropy, divergence = {"clean": [], "spliced": [], "zero": []}, {"spliced": [], "zero": []}
    for tokens in rows.tokens_CS[some_C]:
        x = model.activations(tokens[None])[0]
        spliced = torch.stack([row if token == 0 else peer(row[None])[0] for row, token in zip(x, tokens, strict=True)])
        at_hook = {"clean": x, "spliced": spliced, "zero": torch.zeros_like(x)}
        logprobs = {name: (model.mixed(rows_SD[None])[0] @ model.head).double().log_softmax(1) for name, rows_SD in at_hook.items()}
        for s in range(S):
            if tokens[s] != 0:
                for name, found in divergence.items():
                    p, q = logprobs["clean"][s], logprobs[name][s]
                    found.append(float((p.exp() * (p - q)).sum()))
                if s + 1 < S:
                    for name, found in entropy.items():
                        found.append(-float(logprobs[name][s, tokens[s + 1]]))
    mean = {f"{kind} {name}": sum(v) / len(v) for kind, of in (("ce", entropy), ("kl", divergence)) for name, v in of.items()}
    expected = {
        "ce_loss_without_sae": mean["ce clean"],
        "ce_loss_with_sae": mean["ce spliced"],
        "ce_loss_with_ablation": mean["ce zero"],
        DELTA: mean["ce spliced"] - mean["ce clean"],
        "ce_loss_score": (mean["ce zero"] - mean["ce spliced"]) / (mean["ce zero"] - mean["ce clean"]),
        "kl_div_with_sae": mean["kl spliced"],
        "kl_div_with_ablation": mean["kl zero"],
        "kl_div_score": (mean["kl zero"] - mean["kl spliced"]) / mean["kl zero"],
    }
    for numbers in by_definition({"sae": peer}, rows, model, some_C, [0])["sae"].values():
        assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert saebench.counted(rows.tokens_CS[some_C], [0]) == {"theirs": len(entropy["clean"]), "positions": len(divergence["zero"])}


@torch.no_grad()
def test_numbers_of_rows_are_those_of_one_batch_and_one_row_at_a_time():
    rows = contexts(with_separator=True)
    peer = wrap(trained(rows), "toy", "blocks.0.hook").double()
    found = by_definition({"sae": peer}, rows, ToyModel(), torch.arange(2), [0])["sae"]
    batches = [rows.x_TD.double()[torch.arange(C).repeat_interleave(rows.keep_CS.sum(1)) // CONTEXTS_PER_BATCH == b] for b in range(2)]
    legacy, divided, bias, means, squares, errors, latents = [], [], [], [], [], [], []
    for x in batches:
        f, recon = peer.encode(x), peer(x)
        for row, made in zip(x, recon, strict=True):
            error = float(((row - made) ** 2).sum())
            legacy.append(1 - error / float(((row - x.mean(0)) ** 2).sum()))
            divided.append(error / len(x))
        bias.append(float((recon**2).sum(1).mean() / (x * recon).sum(1).mean()))
        means.append((x**2).sum(1).mean())
        squares.append((x**2).mean(0))
        errors.append(((x - recon) ** 2).sum(1).mean())
        latents.append(f)
    variance = torch.stack(means).mean() - torch.cat(squares).mean() ** 2
    density = (torch.cat(latents) > 0).double().mean(0)
    expected = {
        "explained_variance_legacy": sum(legacy) / len(legacy),
        "relative_reconstruction_bias": sum(bias) / 2,
        "l1": float(torch.cat(latents).sum(1).mean()),
        "l2_norm_in": float(torch.cat(batches).norm(dim=1).mean()),
        "l2_norm_out": float(peer(torch.cat(batches)).norm(dim=1).mean()),
    }
    assert {name: found["sae-lens"][name] for name in expected} == pytest.approx(expected)
    cosines = [torch.nn.functional.cosine_similarity(W[:, None], W[None], dim=2) - 2 * torch.eye(M) for W in (peer.W_enc.T, peer.W_dec)]
    expected |= {
        "explained_variance": float(1 - torch.stack(errors).mean() / variance),
        "mse": sum(divided) / len(divided),
        "normalized_freq_over_1_percent": float(density[density > 0.01].sum() / density.sum()),
        "normalized_freq_over_10_percent": float(density[density > 0.1].sum() / density.sum()),
        "average_max_encoder_cosine_sim": float(cosines[0].amax(1).mean()),
        "average_max_decoder_cosine_sim": float(cosines[1].amax(1).mean()),
    }
    assert {name: found["sae-bench"][name] for name in expected} == pytest.approx(expected)
    assert 0 < expected["normalized_freq_over_10_percent"] < 1
    assert {name for numbers in found.values() for name in numbers} == set(OURS) | set(NOT_OURS)


def test_a_number_is_equal_explained_or_different():
    def verdict(name, theirs, ours, defined):
        return Row.of("switch", "sae-bench", "0.6.0", name, theirs, ours, defined, COUNTS).verdict

    assert verdict("cossim", 0.5, 0.5 * (1 + saebench.LIMIT / 2), 0.4) == EQUAL
    assert verdict("mse", 0.5, 0.6, 0.5) == EXPLAINED and verdict("mse", 0.5, 0.6, 0.51) == DIFFERENT
    assert verdict("l1", 0.5, None, 0.5) == CHECKED and verdict("l1", 0.5, None, 0.6) == DIFFERENT
    assert verdict("cossim", 0.5, 0.6, 0.5) == DIFFERENT  # the same definition, so that nothing explains it
    assert verdict("mse", math.nan, math.nan, math.nan) == DIFFERENT and verdict("freq_over_10_percent", 0.0, 0.0, 0.0) == EQUAL
    row = Row.of("switch", "sae-lens", "6", "ce_loss_with_sae", 3.1, 3.0, 3.1, COUNTS)
    assert row.reason == "they count 11 predictions, we 10: we leave out those of a special token" and "12 positions" in saebench.REASONS[
        "kl_div_with_sae"
    ].format(**COUNTS)
    lines = saebench.table([row, dataclasses.replace(row, library="sae-bench", verdict=DIFFERENT)])
    assert "3.0000000" in lines and "explained" in lines and "different" in lines and row.reason in lines


def test_the_table_that_is_kept_has_no_difference():
    rows = list(csv.DictReader(saebench.CSV.read_text().splitlines()))
    assert {(row["sae"], row["library"]) for row in rows} >= {
        (s, library) for s in ("switch", "flop_matched") for library in ("sae-lens", "sae-bench")
    }
    for row in rows:
        ours, theirs, defined = (float(row[name]) if row[name] else None for name in ("ours", "theirs", "by_their_definition"))
        again = Row.of(row["sae"], row["library"], row["version"], row["their_name"], theirs, ours, defined, COUNTS)
        assert again.verdict == row["verdict"] != DIFFERENT and again.our_name == row["our_name"] and bool(row["reason"]) == (again.verdict != EQUAL)
    assert {row["their_name"] for row in rows} == set(OURS) | set(NOT_OURS)


def test_the_store_gives_some_contexts_and_after_a_reset_all():
    tokens = torch.arange(37 * 2).reshape(37, 2)
    store = Store(tokens, torch.tensor([1, 5, 36]))
    assert store.batches == (1, 3) and store.context_size == 2
    assert torch.equal(store.get_batch_tokens(16), tokens[[1, 5, 36]])
    store.reset_input_dataset()
    batches = [store.get_batch_tokens(16) for _ in range(store.batches[1])]
    assert torch.equal(torch.cat(batches), tokens) and [len(batch) for batch in batches] == [16, 16, 5]


def test_what_the_libraries_could_not_leave_out_is_refused():
    rows, model = contexts(with_separator=True), SimpleNamespace(special_token_ids=frozenset({0}))
    assert saebench.special_positions(model, rows) == [0]
    kept = rows.keep_CS.clone()
    first = kept.nonzero()[0]
    kept[first[0], first[1]] = False
    shorter = dataclasses.replace(rows, x_TD=rows.x_TD[1:], document_T=rows.document_T[1:], keep_CS=kept)
    with pytest.raises(ValueError, match="keeps other positions than those of tokens that are not special"):
        saebench.special_positions(model, shorter)
    with pytest.raises(ValueError, match=r"built here from the folder of a GPT-2, and 'some/model' is none"):
        saebench.model_folder(SimpleNamespace(name="some/model"))
    assert (saebench.model_folder(SimpleNamespace(name="bundled")) / "model.safetensors").is_file()

"""What the lab's analyses share: rows of many documents, codes before and after the gate, records, and one-to-one matches."""

import sys
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from test_report import tiny_run

from switch_sae.activations import SyntheticSource, build_source
from switch_sae.activations.language_model_source import LanguageModelSource
from switch_sae.activations.text import TextConfig
from switch_sae.analysis.assignment import one_to_one
from switch_sae.analysis.findings import chosen, compact, dots, finding
from switch_sae.analysis.observed import POOL, by_series, observe, only_dense, only_routed, sample_of, series, sparse
from switch_sae.models import DenseLatents, SwitchSAE, TopKSAE, with_inference
from switch_sae.models.routers import Gate, SoftmaxRouter
from switch_sae.results import collect
from switch_sae.results.source import source_of
from switch_sae.style import canvas


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A dense SAE and a Switch SAE with two experts per token, and a second seed of it."""
    folder = tmp_path_factory.mktemp("observed")
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    switch = SwitchSAE.Config(num_latents=32, k=4, num_experts=4, experts_per_token=2)
    runs = [tiny_run(folder, TopKSAE.Config(num_latents=32, k=4), source=source)]
    runs += [tiny_run(folder, switch, seed, source=source, baselines=[]) for seed in (0, 1)]
    return sorted(collect([run.path for run in runs]), key=lambda row: (row.num_experts, row.seed))


def test_every_sae_sees_the_same_rows_and_gives_what_it_gives_alone(rows):
    source = source_of(rows[0])
    sample, seen = observe(rows, source, 60)
    assert len(sample) == 60 and torch.equal(sample.rows.x_TD, source.evaluation_set(60).x_TD)
    for one in seen:
        with torch.no_grad():
            output = one.row.load()(sample.rows.x_TD)
        assert torch.equal(one.recon_TD, output.recon_TD) and torch.equal(one.latents.to_dense(), output.latents.to_dense())
        before = one.ungated().to_dense()
        if one.routing is None:
            assert one.ungated() is one.latents
            with pytest.raises(ValueError, match="has no experts, so its rows have no route"):
                one.expert_T()
            continue
        assert torch.equal(one.expert_T(), one.routing.expert_TS[:, 0])
        for t in range(60):
            for m in output.latents.to_dense()[t].nonzero()[:, 0].tolist():
                place = one.routing.expert_TS[t].tolist().index(int(one.expert_M[m]))
                assert float(before[t, m] * one.routing.gate_TS[t, place]) == pytest.approx(float(one.latents.to_dense()[t, m]))
    assert {name: len(group) for name, group in by_series(seen).items()} == {series(rows[0]): 1, series(rows[1]): 2}


def test_rows_of_text_come_from_many_documents_with_the_tokens_before_them(tmp_path):
    for n in range(120):
        (tmp_path / f"{n}.py").write_text(f"def f{n}(x):\n    return x + {n}\n" * 60)
    text = TextConfig(kind="files", paths=[str(tmp_path)])
    source = build_source(LanguageModelSource.Config(model="bundled", hook="blocks.1.hook_resid_post", text=text, context_length=16), 64)
    sample, known = sample_of(source, 500), source.evaluation_set(POOL * 500)
    assert 300 < len(sample) <= 500 and torch.equal(sample_of(source, 500).rows.x_TD, sample.rows.x_TD)
    tokens_CS, keep_CS = known.text()
    wanted = [(c, s) for c, s in keep_CS.nonzero().tolist() if c % POOL == 0][:500]
    assert [tuple(pair) for pair in torch.stack([sample.context_T, sample.position_T], 1).tolist()] == wanted
    assert sample.token_T.tolist() == [int(tokens_CS[c, s]) for c, s in wanted]
    assert sample.previous_T.tolist() == [int(tokens_CS[c, s - 1]) if s else -1 for c, s in wanted]
    first, second = sample.halves()
    assert sorted(torch.cat([first, second]).tolist()) == list(range(len(sample)))
    assert not set(sample.document_T[first].tolist()) & set(sample.document_T[second].tolist())


def test_what_cannot_be_compared_is_refused(rows, tmp_path):
    source = source_of(rows[0])
    other = collect([tiny_run(tmp_path, TopKSAE.Config(num_latents=32, k=4)).path])
    other[0].evaluated_on["source"] = {"kind": "synthetic", "d_in": 16, "seed": 9}
    with pytest.raises(ValueError, match=r"saw other activations \(source\)"):
        observe([rows[0], *other], source, 60)
    wider = build_source(SyntheticSource.Config(d_in=20, common=4, topics=4, per_topic=6), 64)
    with pytest.raises(ValueError, match="reads activations of size 16, these have 20"):
        observe(rows[:1], wider, 60)
    with pytest.raises(ValueError, match="rows=1 leaves nothing"):
        sample_of(source, 1)
    with pytest.raises(ValueError, match="no source was given"):
        observe(rows, None, 60)
    with pytest.raises(ValueError, match=r"routes needs an SAE with experts, and .* have none\. Add a Switch run"):
        only_routed(rows[:1], "routes")
    with pytest.raises(ValueError, match="Add a dense run"):
        only_dense(rows[1:], "this")
    assert only_dense(rows, "this") == rows[:1] and only_routed(rows, "this") == rows[1:]


def test_kinds_that_names_do_not_tell_apart_are_refused(rows, tmp_path):
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    hard = SwitchSAE.Config(num_latents=32, k=4, num_experts=4, experts_per_token=2, router=SoftmaxRouter.Config(gate=Gate.hard))
    other = collect([tiny_run(tmp_path, hard, seed=5, source=source, baselines=[]).path])
    with pytest.raises(ValueError, match=r"would both be called switch-e4-m32-k4, but have other settings \(sae\.router\.gate\)\. Rename one"):
        observe([*rows, *other], source_of(rows[0]), 60)


def test_values_of_least_squares_have_no_gate(rows):
    _, (one,) = observe(rows[1:2], source_of(rows[0]), 60)
    refitted = replace(one, sae=with_inference(one.sae, "refit"))
    assert refitted.ungated() is one.latents and one.ungated() is not one.latents


def test_codes_without_a_fixed_k_get_the_slots_they_need():
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    latents = sparse(DenseLatents(dense))
    assert latents.values_TK.shape == (3, 2) and torch.equal(latents.to_dense(), dense)


def test_findings_have_one_form_and_are_drawn(rows):
    table = [
        finding(row, "margins", "flip_rate", 0.1 * n, interval=(0.0, 0.4), null=0.5, null_interval=(0.4, 0.6), ceiling=0.9, n=3)
        for n, row in enumerate(rows)
    ]
    table += [finding(rows[0], "margins", "lost", None, note="no text")]
    assert all(list(record) == list(table[0]) for record in table)
    assert chosen(table, measure="flip_rate") == table[:-1] and chosen(table, measure=("flip_rate", "lost"), seed=0, architecture="topk") == [
        table[0],
        table[-1],
    ]
    assert list(compact(table)[0]) == ["sae", "part", "measure", "value", "interval", "null", "null interval", "ceiling", "n", "note"]
    assert (compact(table)[0]["interval"], compact(table)[-1]["note"]) == ("[0, 0.4]", "no text") and compact([]) == []
    axis = canvas(4, 2).subplots()
    dots(axis, table, [record["sae"] for record in table])
    assert len(axis.get_yticks()) == 4


def test_matches_are_the_best_of_all(monkeypatch):
    pytest.importorskip("scipy")
    score = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    a, b = one_to_one(score)
    assert a.tolist() == [0, 1, 2, 3] and float(score[a, b].sum()) == pytest.approx(
        max(sum(float(score[i, p[i]]) for i in range(4)) for p in permutations(range(6), 4))
    )
    with pytest.raises(ValueError, match="not all finite"):
        one_to_one(score * float("nan"))
    with pytest.raises(ValueError, match="take too long"):
        one_to_one(torch.zeros(1, 1).expand(8193, 8193))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"needs scipy. Type pip install 'switch-sae\[analysis\]'"):
        one_to_one(score)

"""What becomes of dense latents in a Switch SAE: planted fates are found, definitions hold by brute force, and what cannot be judged is said."""

from dataclasses import replace

import pytest
import torch
from planted import EXPERTS, SIZES, again, seen, world
from test_report import tiny_run

from switch_sae.activations import SyntheticSource
from switch_sae.analysis import analyze, build_analysis
from switch_sae.analysis.counterparts.pairing import SAME_START, sides
from switch_sae.analysis.counterparts.partners import KINDS, judge
from switch_sae.analysis.fates import Fates
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.observed import observe, series
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.results import collect
from switch_sae.results.source import source_of


def judged(planted, config=None, expert_B=None):
    found = [seen("dense", planted.dense_TA, planted.dense_AD), seen("switch", planted.switch_TB, planted.switch_BD, planted.expert_B)]
    dense, other = sides(planted.sample, found, 5)
    expert_B = planted.expert_B if expert_B is None else expert_B
    return dense, other, judge(dense, other, expert_B[other.keep_A], config or Fates.Config())


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_fates_are_found(seed):
    planted = world(seed=seed)
    dense, _, found = judged(planted)
    assert len(dense.keep_A) == len(planted.kind_A)
    named = [KINDS[place] for place in found.kind_A()]
    for kind in SIZES:
        both = sum(one == other == kind for one, other in zip(named, planted.kind_A, strict=True))
        assert both >= 0.95 * named.count(kind) and both >= 0.95 * planted.kind_A.count(kind), kind


def test_codes_of_other_documents_have_no_fate_but_lost():
    planted = world()
    shuffled = replace_codes(planted, planted.switch_TB.roll(2000, 0))
    _, _, found = judged(shuffled)
    assert float((found.kind_A() == KINDS.index("lost")).double().mean()) > 0.99


def replace_codes(planted, switch_TB):
    return type(planted)(**(vars(planted) | {"switch_TB": switch_TB}))


def test_every_number_is_what_the_definition_says():
    """By loops over rows, with weights as repeated documents."""
    planted = world(rows=1200)
    config = Fates.Config(min_count=2)
    dense, other, found = judged(planted, config)
    rows_a, rows_b = planted.sample.halves()
    weight_N = torch.randint(0, 3, (len(found.rows_N),), generator=torch.Generator().manual_seed(1))
    repeat_T = weight_N[planted.sample.document_T[rows_b].unique(return_inverse=True)[1]]
    again_b = rows_b.repeat_interleave(repeat_T)
    kind_A, mass_A = (value[0] for value in found.kinds(weight_N[None].double()))
    own, theirs = planted.dense_TA[:, dense.keep_A].double(), planted.switch_TB[:, other.keep_A].double()
    expert_B = planted.expert_B[other.keep_A]
    seen_kinds = set()
    for a in range(len(dense.keep_A)):
        za, zb = own[rows_a, a], own[again_b, a]
        partners, best, broadest, broad_share = [], (-1.0, None), None, 0.0
        for b in range(len(other.keep_A)):
            cosine = float(dense.unit_AD[a].double() @ other.unit_AD[b].double())
            share = float((za * (theirs[rows_a, b] > 0)).sum() / za.sum())
            inside = float((theirs[rows_a, b] * (za > 0)).sum() / theirs[rows_a, b].sum())
            if cosine >= config.near and share > broad_share:
                broadest, broad_share = b, share
            if cosine >= config.near and share >= config.part and inside >= config.inside:
                partners.append(b)
                best = (share, b) if share > best[0] else best
        assert found.partner_AB[a].nonzero()[:, 0].tolist() == partners
        experts = {int(expert_B[b]) for b in partners}
        assert int(found.experts_A[a]) == len(experts)
        pairs = [float(other.unit_AD[b] @ other.unit_AD[c]) for b in partners for c in partners if expert_B[b] != expert_B[c]]
        alike = sum(pairs) / len(pairs) if pairs else 0.0
        assert alike == pytest.approx(float(found.alike_A[a].nan_to_num(0)), abs=1e-5)
        assert float(mass_A[a]) == pytest.approx(float(zb.sum()))
        if (own[rows_b, a] > 0).sum() < 2 or zb.sum() == 0:
            assert kind_A[a] == -1
            continue
        cover = float((zb * (theirs[again_b][:, partners] > 0).any(1)).sum() / zb.sum())
        alone = float((zb * (theirs[again_b, best[1]] > 0)).sum() / zb.sum()) if partners else 0.0
        broad = float((zb * (theirs[again_b, broadest] > 0)).sum() / zb.sum()) if broadest is not None and broad_share >= config.cover else 0.0
        if cover < config.cover:
            kind = "absorbed" if broad >= config.cover else "lost"
        elif len(experts) >= 2 and alike >= config.copy:
            kind = "copied"
        elif alone >= config.whole * cover:
            kind = "matched"
        else:
            kind = "split" if len(experts) >= 2 else "refined"
        assert KINDS[kind_A[a]] == kind
        seen_kinds.add(kind)
    assert seen_kinds == set(KINDS)


def test_shared_latents_are_a_place_of_their_own():
    planted = world()
    _, _, found = judged(planted, expert_B=torch.where(planted.expert_B == 0, -1, planted.expert_B))
    assert int((found.experts_A == EXPERTS).sum()) >= 0.95 * (SIZES["copied"] + SIZES["split"])
    _, _, one = judged(planted, expert_B=torch.zeros_like(planted.expert_B))
    assert not {"copied", "split"} & {KINDS[place] for place in one.kind_A()}


@pytest.fixture(scope="module")
def table():
    planted = world()
    planted.sample = replace(planted.sample, token_T=torch.arange(len(planted.sample)) % 50)
    _, codes, decoder = again(planted.dense_TA, planted.dense_AD, 5)
    found = [
        seen("dense-s0", planted.dense_TA, planted.dense_AD),
        seen("dense-s1", codes, decoder, seed=1),
        seen("switch-s0", planted.switch_TB, planted.switch_BD, planted.expert_B),
    ]
    analysis = build_analysis("fates", {"bootstrap": 50})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switch_sae.analysis.fates.observe", lambda rows, source, number: (planted.sample, found))
        source = type("Source", (), {})()
        source.language_model = type("Model", (), {"tokenizer": type("Tokenizer", (), {"decode": staticmethod(lambda ids: f" t{ids[0]}")})()})()
        return planted, analysis, analysis.compute([one.row for one in found], source)


def test_the_table_has_the_shares_their_null_control_and_intervals(table):
    _, analysis, records = table
    assert all(list(record) == list(records[0]) for record in records)
    for kind in KINDS:
        record = chosen(records, part="latents", measure=kind, sae="dense-s0")[0]
        assert record["value"] == pytest.approx(SIZES[kind] / sum(SIZES.values()), abs=0.03)
        assert record["low"] <= record["value"] <= record["high"] and record["high"] - record["low"] < 0.2
        assert record["null"] == pytest.approx(float(kind == "lost"), abs=0.02)
        assert record["ceiling"] == pytest.approx(float(kind == "matched"), abs=0.05)
    for part, at in (("latents", ""), ("activation", ""), ("by_frequency", "above 1 %")):
        assert sum(record["value"] for record in chosen(records, part=part, at=at, sae="dense-s0")) == pytest.approx(1)
    number = {record["at"]: record["value"] for record in chosen(records, part="partners", sae="dense-s0")}
    assert number["copied"] == pytest.approx(4, abs=0.1) and number["matched"] == pytest.approx(1, abs=0.1)
    assert {record["measure"] for record in analysis.shown(records)} == {*KINDS, "number"}
    assert len(analysis.draw(records).axes) == len(KINDS) + 2  # one panel for the seeds together, one for their control


def test_examples_name_partners_with_their_text(table):
    planted, _, records = table
    heads = [record for record in records if record["part"] == "example" and record["partner"] is None]
    assert [head["measure"] for head in heads] == [kind for kind in KINDS for _ in range(3)]
    assert all(planted.kind_A[head["at"]] == head["measure"] for head in heads)
    for head in heads:
        value_T = planted.dense_TA[:, head["at"]]
        assert f"{float(value_T.max()):8.3f}" in head["text"] and f"[[ t{int(value_T.argmax()) % 50}]]" in head["text"]
        partners = [r for r in records if r["part"] == "example" and r["at"] == head["at"] and r["partner"] is not None]
        assert len(partners) == (4 if head["measure"] in ("copied", "split") else 2 if head["measure"] == "refined" else 1)
        for partner in partners:
            assert partner["expert"] == planted.expert_B[partner["partner"]]
            rows_a, rows_b = planted.sample.halves()
            pair = torch.stack([planted.dense_TA[rows_b, head["at"]], planted.switch_TB[rows_b, partner["partner"]]])
            assert partner["correlation"] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-4)
            assert partner["cosine"] == pytest.approx(float(planted.dense_AD[head["at"]] @ planted.switch_BD[partner["partner"]]), abs=1e-5)
            value_T = planted.dense_TA[rows_a, head["at"]]
            on_T = planted.switch_TB[rows_a, partner["partner"]] > 0
            assert partner["share"] == pytest.approx(float((value_T * on_T).sum() / value_T.sum()), abs=1e-4)


def test_trained_saes_without_text_or_a_second_seed_are_judged_too(tmp_path):
    source = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)
    runs = [tiny_run(tmp_path, TopKSAE.Config(num_latents=32, k=4), source=source)]
    runs += [tiny_run(tmp_path, SwitchSAE.Config(num_latents=32, k=4, num_experts=4), source=source, baselines=[])]
    rows = collect([run.path for run in runs])
    records = analyze("fates", rows, {"rows": 400, "bootstrap": 20})
    assert {record["note"] for record in chosen(records, part="latents")} == {f"{SAME_START}; no control: one seed of {series(only(rows))}"}
    assert {record["text"] for record in records} == {""} and chosen(records, part="latents")[0]["ceiling"] is None
    sample, found = observe(rows, source_of(rows[0]), 400)
    dense, other = sorted(sides(sample, found, 5), key=lambda side: side.seen.row.num_experts)
    again = judge(dense, other, other.seen.expert_M[other.keep_A], Fates.Config())
    for place, kind in enumerate(KINDS):
        of = again.kind_A()[again.kind_A() >= 0] == place
        assert chosen(records, part="latents", measure=kind)[0]["value"] == pytest.approx(float(of.double().mean()))
    with pytest.raises(ValueError, match="Add a dense run"):
        analyze("fates", [row for row in rows if row.num_experts > 1])
    with pytest.raises(ValueError, match="Add a Switch run"):
        analyze("fates", [only(rows)])
    with pytest.raises(ValueError, match=r"cover=1\.5 must lie between 0 and 1"):
        build_analysis("fates", {"cover": 1.5})


def only(rows):
    (dense,) = (row for row in rows if row.num_experts == 1)
    return dense

"""The analysis `similarity` of trained runs: what it compares, what it says is missing, and that chance scores 0."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from test_report import tiny_run

from experiments import analyze as command
from switch_sae.activations import SyntheticSource
from switch_sae.analysis import build_analysis
from switch_sae.analysis.findings import chosen
from switch_sae.analysis.likeness.representation import Codes, Vectors
from switch_sae.analysis.likeness.rsa import Ranked, cosine_distances, normalised, rho_a, rho_a_matrix, sampled_pairs
from switch_sae.analysis.observed import observe, series
from switch_sae.analysis.similarity import MEASURES, STAGES
from switch_sae.models import SwitchSAE, TopKSAE
from switch_sae.results import collect
from switch_sae.results.source import source_of
from switch_sae.style import render

SETTINGS = {"rows": 400, "pairs": 4000, "permutations": 39, "bootstrap": 10, "neighbours": 5}
SOURCE = SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, common_active=1.0, topic_active=2.0)


@pytest.fixture(scope="module", autouse=True)
def few_pairs():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RESAMPLED_PAIRS", "PAIRS_OF_PAIRS", "ORDERED_PAIRS"):
            patch.setattr(f"switch_sae.analysis.likeness.comparing.{name}", 2000)
        patch.setattr("switch_sae.analysis.likeness.calibration.MOST_DOCUMENTS", 40)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a Switch SAE and one dense SAE."""
    folder = tmp_path_factory.mktemp("similarity")
    switch = SwitchSAE.Config(num_latents=32, k=4, num_experts=4)
    paths = [tiny_run(folder, TopKSAE.Config(num_latents=32, k=4), source=SOURCE).path]
    return paths + [tiny_run(folder, switch, seed, source=SOURCE, baselines=[]).path for seed in (0, 1)]


@pytest.fixture
def rows(runs):
    return sorted(collect(runs), key=lambda row: (row.num_experts, row.seed))


@pytest.fixture(scope="module")
def table(runs):
    rows = collect(runs)
    return build_analysis("similarity", SETTINGS).compute(rows, source_of(rows[0]))


def test_every_stage_and_measure_is_there_once_with_its_interval_null_and_ceiling(table, rows):
    dense, switch = (series(row) for row in (rows[0], rows[1]))
    assert all(list(record) == list(table[0]) for record in table)
    for stage in STAGES:
        against = [(r["sae"], r["against"]) for r in chosen(table, part="path", at=stage, measure="rho_a")]
        assert against == [(dense, switch), (switch, "its other seeds"), (dense, "activations"), (switch, "activations")]
        for record in chosen(table, part="path", at=stage):
            assert record["n"] == (1 if (record["sae"] == dense and record["against"] == "activations") or "seeds" in record["against"] else 2)
            assert record["value"] is not None and -1 <= record["value"] <= 1 + 1e-9
            if record["measure"] != "rho_a_correlation":
                assert record["low"] <= record["value"] <= record["high"] and record["null_low"] <= record["null"] <= record["null_high"]
                assert 0 <= record["calibrated"] <= 1 and 1 / 40 <= record["p"] <= 1
            elif stage != "reconstructions":
                assert "do not trust" in record["note"]
    assert {r["measure"] for r in chosen(table, part="path", at="codes")} == set(MEASURES)
    assert {r["measure"] for r in chosen(table, part="path", at="soft")} == set(MEASURES) - {"rho_a_correlation"}
    (own,) = chosen(table, part="path", at="codes", measure="rho_a", against="its other seeds")
    assert own["seed"] is None and "two seeds" in own["note"]
    (against_activations,) = chosen(table, part="path", at="codes", measure="rho_a", sae=switch, against="activations")
    assert against_activations["ceiling"] == pytest.approx(own["value"] ** 0.5)
    (across,) = chosen(table, part="path", at="codes", measure="rho_a", sae=dense, against=switch)
    assert across["ceiling"] is None and f"no ceiling: one seed of {dense}" in across["note"]
    bounds = chosen(table, part="noise ceiling", at="codes")
    assert [r["note"] for r in bounds] == ["no noise ceiling: one seed", "", ""] and bounds[0]["value"] is None
    assert bounds[1]["value"] <= bounds[2]["value"]


def test_values_are_those_of_the_codes_that_the_saes_give(table, rows):
    source = source_of(rows[0])
    sample, seen = observe(rows, source, 400)
    pairs = sampled_pairs(len(sample), 4000)
    pairs = pairs.where(sample.document_T[pairs.left_P] != sample.document_T[pairs.right_P])
    mean_D = sample.rows.x_TD.mean(0)
    stages = {"ungated": lambda one: Codes.of(one.ungated()), "codes": lambda one: Codes.of(one.latents)}
    stages["reconstructions"] = lambda one: Vectors(one.recon_TD - mean_D)
    for stage, view in stages.items():
        entries = [cosine_distances(view(one), pairs) for one in seen]
        (record,) = chosen(table, part="path", at=stage, measure="rho_a", sae=series(rows[0]), against=series(rows[1]))
        assert record["value"] == pytest.approx((rho_a(entries[0], entries[1]) + rho_a(entries[0], entries[2])) / 2, abs=1e-9)
    dense, switch = (cosine_distances(Codes.of(one.latents), pairs) for one in seen[:2])
    expert_T = seen[1].expert_T()
    same = (expert_T[pairs.left_P] == expert_T[pairs.right_P]).double()
    centred = [Ranked(entries).centred() for entries in (dense, switch, 1 - same)]
    rest = centred[1] - torch.linalg.lstsq(centred[2][:, None], centred[1][:, None]).solution * centred[2]
    routes, without = (
        [record for record in chosen(table, part="route", at="codes", measure=measure)]
        for measure in ("rho_a of the route", "spearman without routes")
    )
    assert [record["sae"] for record in routes] == [series(rows[1])] == [record["sae"] for record in without]
    seeds = [float(torch.corrcoef(torch.stack([rest.flatten(), centred[0]]))[0, 1])]
    other = seen[2].expert_T()
    theirs = cosine_distances(Codes.of(seen[2].latents), pairs)
    apart = 1 - (other[pairs.left_P] == other[pairs.right_P]).double()
    centred = [Ranked(entries).centred() for entries in (theirs, apart)]
    rest = centred[0] - torch.linalg.lstsq(centred[1][:, None], centred[0][:, None]).solution * centred[1]
    seeds.append(float(torch.corrcoef(torch.stack([rest.flatten(), Ranked(dense).centred()]))[0, 1]))
    assert without[0]["value"] == pytest.approx(sum(seeds) / 2, abs=1e-6)
    assert routes[0]["value"] == pytest.approx((rho_a(1 - same, dense) + rho_a(apart, dense)) / 2, abs=1e-9)
    (stratum,) = chosen(table, part="strata", at="codes", measure="spearman, same expert")
    within = [(same == 1, switch), (apart == 0, theirs)]
    wanted = [float(normalised(rho_a_matrix([Ranked(dense[chosen]), Ranked(code[chosen])]))[0, 1]) for chosen, code in within]
    assert stratum["value"] == pytest.approx(sum(wanted) / 2, abs=1e-9) and stratum["value"] > stratum["null"]
    (tied,) = chosen(table, part="strata", at="codes", measure="spearman, different experts")
    assert tied["value"] is None and "all distances of one side tie" in tied["note"]


def test_saes_that_share_nothing_score_nothing(monkeypatch, rows):
    """Codes of random latents in place of an SAE's: s_cal is 0, and the interval reaches below what chance gives."""

    def independent(self, one, stage):
        generator = torch.Generator().manual_seed(self.seen.index(one))
        indices = torch.rand(len(self.sample), 64, generator=generator).topk(6).indices
        return Codes(torch.rand(indices.shape, generator=generator), indices, 64)

    monkeypatch.setattr("switch_sae.analysis.similarity._Found.view", independent)
    table = build_analysis("similarity", SETTINGS).compute(rows, source_of(rows[0]))
    records = [r for r in chosen(table, part="path", at="codes") if r["p"] is not None]
    assert len(records) == 4 * 5
    assert all(r["low"] <= r["null_high"] for r in records), "some interval leaves out what chance gives"
    found = {(r["sae"], r["against"]) for r in records if r["calibrated"] > 0}
    assert len(found) <= 1, found  # each with a chance of 5 %, the same for all of its measures


def test_it_is_the_same_on_every_call_and_in_any_order(table, rows):
    again = build_analysis("similarity", SETTINGS).compute(rows[::-1], source_of(rows[0]))
    assert again == table


def test_what_cannot_be_compared_is_refused(rows, tmp_path, monkeypatch):
    analysis = build_analysis("similarity", SETTINGS)
    with pytest.raises(ValueError, match=r"similarity compares SAEs, and only .* was given\. Give at least two runs"):
        analysis.compute(rows[:1], source_of(rows[0]))
    other = tiny_run(tmp_path, TopKSAE.Config(num_latents=32, k=4), source=SyntheticSource.Config(d_in=16, common=4, topics=4, per_topic=6, seed=5))
    with pytest.raises(ValueError, match="saw other activations"):
        analysis.compute([*rows, *collect([other.path])], source_of(rows[0]))
    with pytest.raises(ValueError, match=r"merge=1\.5 is a cosine"):
        build_analysis("similarity", {"merge": 1.5})
    with pytest.raises(ValueError, match=r"permutations=3 must be at least 19"):
        build_analysis("similarity", {"permutations": 3})
    monkeypatch.setattr("switch_sae.analysis.likeness.merging.MOST_MIXED", 3)
    table = analysis.compute(rows[:2], source_of(rows[0]))
    (record,) = chosen(table, at="soft")
    assert record["value"] is None and "no mixing matrix for more than" in record["note"]
    assert analysis.draw(table).axes


def test_few_documents_leave_numbers_uncalibrated_and_one_is_refused(rows, monkeypatch):
    from switch_sae.analysis import observed

    given = observed.sample_of

    def cut(count):
        def sample_of(source, rows):
            sample = given(source, rows)
            object.__setattr__(sample, "document_T", torch.arange(len(sample)) * count // len(sample))
            return sample

        monkeypatch.setattr(observed, "sample_of", sample_of)

    cut(3)
    analysis = build_analysis("similarity", SETTINGS)
    table = analysis.compute(rows[:2], source_of(rows[0]))
    (record,) = chosen(table, part="path", at="codes", measure="cka", against=series(rows[1]))
    assert record["value"] is not None and record["p"] is None and "not calibrated: fewer than 6 documents" in record["note"]
    assert not chosen(table, measure="mutual_knn") and analysis.draw(table).axes and analysis.shown(table)
    cut(1)
    with pytest.raises(ValueError, match="all rows come from one document"):
        analysis.compute(rows[:2], source_of(rows[0]))


def test_the_command_writes_its_table_and_a_figure(runs, table, monkeypatch, capsys, tmp_path):
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    monkeypatch.setattr(sys, "argv", ["analyze", "similarity", *map(str, runs), "--set", *settings, "--out", str(tmp_path)])
    command.main()
    said = capsys.readouterr().out
    assert "s_cal" in said and "spearman without routes" in said and "mutual_knn" in said
    with (tmp_path / "similarity.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(table)
    figure = build_analysis("similarity").draw(table)
    assert len(figure.axes) == 5 and render(figure).startswith(b"\x89PNG")
    alone = build_analysis("similarity").draw([r for r in table if r["part"] not in ("route", "strata")])
    assert len(alone.axes) == 3 and Path(tmp_path / "similarity.png").is_file()

"""Rows of huge norm: left out of training, scale and biases, exactly resumable, and told apart in scores."""

import math
from dataclasses import replace

import pytest
import torch

from switch_kernels import Execution
from switch_sae.activations import SOURCES, SyntheticSource
from switch_sae.activations.base import EvaluationSet
from switch_sae.config import RunConfig, config_from_plain, config_to_plain
from switch_sae.evaluation import evaluate
from switch_sae.models import SAES, SwitchSAE, TopKSAE
from switch_sae.orchestrator import run_training
from switch_sae.rows import NormLimit, Rows
from switch_sae.stream import Batches, Stream
from switch_sae.training import TrainerConfig, prepare, train

D, BATCH, STEPS = 16, 64, 60
WORLD = SyntheticSource.Config(d_in=D, common=16, topics=4, per_topic=12)


class Spoiled(SyntheticSource):
    """One row in a hundred is `factor` times as long as the others, in one direction, at places that do not depend on the factor."""

    factor = 100.0

    def _rows(self, rows, generator):
        x_TD, truth = super()._rows(rows, generator)
        hit_T = torch.rand(rows, generator=torch.Generator().manual_seed(int(x_TD[0, 0].abs() * 1e6))) < 0.01
        sink_D = torch.nn.functional.normalize(torch.ones(D), dim=0)
        return torch.where(hit_T[:, None], self.factor * x_TD.norm(dim=1).median() * sink_D, x_TD), truth


def source(factor: float = 100.0) -> Spoiled:
    made = Spoiled(WORLD, BATCH)
    made.factor = factor
    return made


def stream(made, outlier_factor=10.0) -> Stream:
    """A stream on a source that no table holds."""
    opened = Stream(WORLD, BATCH, BATCH * (STEPS + 4), 4 * BATCH, "cpu", Execution(), outlier_factor)
    opened.source = made
    first = Rows.cat([next(made) for _ in range(4)])
    opened.limit = None if outlier_factor is None else NormLimit.of(first, outlier_factor)
    opened.calibration = first if opened.limit is None else opened.limit.inliers(first)
    return opened


def test_a_limit_keeps_what_is_below_it_and_the_very_same_rows_where_all_are():
    x = torch.randn(100, D, generator=torch.Generator().manual_seed(0))
    rows = Rows.of(x)
    limit = NormLimit.of(rows)
    assert limit.inliers(rows) is rows
    x[[3, 50]] *= 30
    spoiled = Rows.of(x)
    kept = limit.inliers(spoiled)
    assert len(kept) == 98 and kept.target_TD is kept.x_TD and torch.equal(kept.x_TD, torch.cat([x[:3], x[4:50], x[51:]]))
    pair = Rows.of(torch.randn(100, D), x)  # a transcoder's: an outlier among its targets is one too
    assert len(NormLimit.of(pair).inliers(pair)) == 98
    with pytest.raises(ValueError, match="half of the rows are zero"):
        NormLimit.of(Rows.of(torch.zeros(4, D)))


def test_batches_are_full_hold_every_inlier_once_in_order_and_no_outlier():
    raw = Rows.cat([next(s) for s in [source()] for _ in range(20)]).x_TD
    limit = NormLimit.of(Rows.of(raw))
    batches = Batches(source(), limit)
    got = torch.cat([next(batches).x_TD for _ in range(15)])
    wanted = limit.inliers(Rows.of(raw)).x_TD
    assert len(got) == 15 * BATCH and torch.equal(got, wanted[: len(got)])
    assert 0 < batches.left_out < 0.05 * batches.rows and batches.left_out == int((raw[: batches.rows].norm(dim=1) > limit.x).sum())


def test_without_outliers_and_without_a_limit_batches_are_the_sources_own():
    for limit in (None, NormLimit(1e9, 1e9)):
        batches, plain = Batches(source(), limit), source()
        for _ in range(3):
            assert torch.equal(next(batches).x_TD, next(plain).x_TD)
        assert batches.left_out == 0 and batches.state_dict().items() >= plain.state_dict().items()


@pytest.mark.parametrize("taken", range(1, 12))
def test_going_on_from_any_batch_gives_the_same_rows_and_counts(taken):
    limit = NormLimit.of(next(source()))
    batches = Batches(source(), limit)
    for _ in range(taken):
        next(batches)
    state = batches.state_dict()
    following = [next(batches).x_TD for _ in range(5)]
    again = Batches(source(), limit)
    again.load_state_dict(state)
    assert (again.rows, again.left_out) == (state["outliers"]["rows"], state["outliers"]["left_out"])
    assert all(torch.equal(next(again).x_TD, x_TD) for x_TD in following)
    assert (again.rows, again.left_out) == (batches.rows, batches.left_out)
    later = Batches(source(), None)
    later.load_state_dict({key: value for key, value in state.items() if key != "outliers"})  # as an earlier version saved it
    assert later.rows == 0


def test_a_stream_of_nothing_but_outliers_is_refused_instead_of_read_for_ever():
    batches = Batches(source(), NormLimit(1e-6, 1e-6))
    with pytest.raises(ValueError, match="would be left out: they are not like the calibration rows"):
        next(batches)


def trained(factor, outlier_factor, sae_config, held_out):
    made = stream(source(factor), outlier_factor)
    sae = SAES.build(sae_config, D, torch.Generator().manual_seed(0))
    trainer = made.trainer(sae, TrainerConfig(lr=3e-3), STEPS, True)
    train({"sae": trainer}, made.batches(), STEPS, save=lambda _: None, checkpoint_every=0)
    return evaluate(sae, held_out, bootstrap=0)


@pytest.mark.parametrize(
    "config", [TopKSAE.Config(num_latents=48, k=4), SwitchSAE.Config(num_latents=48, k=4, num_experts=4)], ids=["topk", "switch"]
)
def test_planted_outliers_leave_training_as_it_is_on_clean_rows(config):
    clean = source(1.0).evaluation_set(4000)
    results = {}
    for factor in (1.0, 100.0, 300.0):
        x_TD = source(factor).evaluation_set(4000).x_TD
        spoiled = EvaluationSet(x_TD, clean.document_T)
        results[factor] = trained(factor, 10.0, config, spoiled)
    sane = results[1.0]
    assert sane.outlier_rows == 0 and sane["fvu"] == sane["fvu_inliers"]
    for factor in (100.0, 300.0):
        assert results[factor].outlier_rows > 20
        assert results[factor]["fvu_inliers"].value == pytest.approx(sane["fvu"].value, rel=0.05)
        assert results[factor]["dead_latents"].value == pytest.approx(sane["dead_latents"].value, abs=0.03)
    assert trained(100.0, None, config, spoiled)["fvu_inliers"].value > 1.08 * sane["fvu"].value  # what happens when they train


def test_scale_and_biases_are_set_without_outliers():
    rows = next(source())
    spoiled = Rows.of(torch.cat([rows.x_TD, 200 * rows.x_TD[:2]]))
    inliers = NormLimit.of(spoiled).inliers(spoiled)
    saes = [TopKSAE(TopKSAE.Config(num_latents=48, k=4), D, torch.Generator().manual_seed(0)) for _ in range(3)]
    prepare(saes[0], inliers, True, None)
    prepare(saes[1], spoiled, True)
    prepare(saes[2], spoiled, True, None)
    assert saes[0].activation_scale == saes[1].activation_scale > 1.5 * saes[2].activation_scale and torch.equal(saes[0].b_pre_D, saes[1].b_pre_D)
    assert len(inliers) < len(spoiled)


def test_a_run_counts_says_and_resumes_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "synthetic", Spoiled)
    monkeypatch.setattr(Spoiled, "Config", SyntheticSource.Config, raising=False)
    config = RunConfig(
        source=WORLD, sae=TopKSAE.Config(num_latents=48, k=4), baselines=[], tokens=BATCH * 20, batch_size=BATCH, calibration_rows=4 * BATCH,
        runs=str(tmp_path), checkpoint_every=0, log_every=0,
    )  # fmt: skip
    config = replace(
        config, evaluation=replace(config.evaluation, rows=500, bootstrap=50), wandb=replace(config.wandb, mode=type(config.wandb.mode).disabled)
    )
    said: list[str] = []
    run = run_training(config, said.append)
    results = run.read_json("results.json")
    assert results["outliers"]["factor"] == 10 and 0 < results["outliers"]["left_out"] < 0.05 * results["outliers"]["rows"]
    assert any("beyond 10 median norms" in line and "do not train" in line for line in said)
    evaluation = results["evaluation"]
    assert evaluation["participation_ratio_all_rows"] < 2 < evaluation["participation_ratio"]
    assert results["controls"]["pca_4"]["metrics"]["fvu_inliers"]["value"] < 0.9
    assert run_training(replace(config, outlier_factor=None), said.append).read_json("results.json")["outliers"] is None


@pytest.mark.parametrize("factor", [1.0, 0, -3, math.nan])
def test_impossible_factors_are_refused(factor):
    with pytest.raises(ValueError, match=r"outlier_factor=.* must be above 1"):
        RunConfig(outlier_factor=factor)


def test_a_run_saved_before_there_was_a_limit_goes_on_without_one():
    plain = config_to_plain(RunConfig())
    assert plain.pop("outlier_factor") == 10 and config_from_plain(plain).outlier_factor is None

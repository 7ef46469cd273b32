import json

import pytest
import torch

from switch_sae.activations import SyntheticSource, build_source
from switch_sae.activations.synthetic import firing_probabilities

SMALL = {"d_in": 24, "common": 6, "topics": 4, "per_topic": 5, "common_active": 2.0, "topic_active": 1.5}


def source(batch_size=64, **fields):
    return SyntheticSource(SyntheticSource.Config(**{**SMALL, **fields}), batch_size)


def test_same_config_same_rows_and_other_seeds_other_rows():
    first, again, other = source(), source(), source(seed=1)
    batches = [next(first).x_TD for _ in range(3)]
    assert all(torch.equal(batch, next(again).x_TD) for batch in batches)
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], next(other).x_TD)
    assert batches[0].shape == (64, 24) and batches[0].dtype == torch.float32


def test_resume_is_exact_and_refuses_other_rows():
    straight = source()
    for _ in range(5):
        next(straight)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = source()
    resumed.load_state_dict(state)
    assert all(torch.equal(next(straight).x_TD, next(resumed).x_TD) for _ in range(3))
    with pytest.raises(ValueError, match="batch_size: saved 64, now 32"):
        source(batch_size=32).load_state_dict(state)
    with pytest.raises(ValueError, match=r"noise: saved 0\.01, now 0\.5"):
        source(noise=0.5).load_state_dict(state)


def test_rows_are_the_dictionary_times_the_coefficients():
    made = source(noise=0.0, leakage=0.3)
    truth, rows, row_truth = made.truth(), made.evaluation_set(5000), made.evaluation_truth(5000)
    assert torch.allclose(truth.dictionary_GD.norm(dim=1), torch.ones(26))
    torch.testing.assert_close(row_truth.coefficients_TG @ truth.dictionary_GD + truth.bias_D, rows.x_TD)
    assert truth.is_common_G.sum() == 6 and truth.topic_G[6:].tolist() == [t for t in range(4) for _ in range(5)]
    assert torch.allclose(truth.bias_D.norm(), torch.tensor(1.0))


def test_evaluation_rows_ignore_the_training_seed_and_never_train():
    made, other = source(), source(seed=5)
    rows = made.evaluation_set(300)
    assert torch.equal(rows.x_TD, other.evaluation_set(300).x_TD)
    assert torch.equal(rows.x_TD[:100], made.evaluation_set(100).x_TD) and len(rows.document_T) == 300
    assert not torch.equal(next(made).x_TD, rows.x_TD[:64])
    assert not torch.equal(source(world_seed=1).truth().dictionary_GD, made.truth().dictionary_GD)


@pytest.mark.parametrize("leakage", [0.0, 0.25])
def test_firing_counts_topics_and_leakage(leakage):
    made = source(leakage=leakage)
    truth, rows = made.truth(), made.evaluation_truth(20_000)
    fires_TG = rows.coefficients_TG > 0
    assert abs(fires_TG[:, truth.is_common_G].sum(1).float().mean() - 2.0) < 0.05
    assert abs(fires_TG[:, ~truth.is_common_G].sum(1).float().mean() - 1.5) < 0.05
    foreign_TG = fires_TG & ~truth.is_common_G & (truth.topic_G != rows.topic_T[:, None])
    assert abs(foreign_TG.sum() / fires_TG[:, ~truth.is_common_G].sum() - leakage) < 0.02
    torch.testing.assert_close(fires_TG[:, :6].float().mean(0), truth.probability_G[:6], atol=0.02, rtol=0)
    assert torch.bincount(rows.topic_T).float().std() / 5000 < 0.03
    magnitudes = rows.coefficients_TG[fires_TG]
    assert abs(magnitudes.mean() - 1.0) < 0.02 and abs(magnitudes.std() - 0.25) < 0.02


def test_noise_and_topic_skew():
    made = source(noise=0.2, topic_skew=1.0)
    truth, rows, row_truth = made.truth(), made.evaluation_set(20_000), made.evaluation_truth(20_000)
    residual = rows.x_TD - row_truth.coefficients_TG @ truth.dictionary_GD - truth.bias_D
    assert abs(residual.std() - 0.2) < 0.005
    share = torch.bincount(row_truth.topic_T) / 20_000
    torch.testing.assert_close(share, torch.tensor([12.0, 6, 4, 3]) / 25, atol=0.02, rtol=0)


def test_firing_probabilities_keep_their_sum_below_one_each():
    p = firing_probabilities(10, 4.0, 2.0)
    assert p.max() <= 1 and abs(p.sum() - 4) < 1e-5 and bool((p.diff() <= 0).all()) and p[0] == 1
    assert torch.allclose(firing_probabilities(8, 2.0, 0.0), torch.full((8,), 0.25))
    assert torch.equal(firing_probabilities(3, 3.0, 1.0), torch.ones(3)) and len(firing_probabilities(0, 0.0, 1.0)) == 0
    ratio = firing_probabilities(10, 1.0, 1.0)
    torch.testing.assert_close(ratio[0] / ratio[4], torch.tensor(5.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topics": 0}, "topics=0 must be at least 1"),
        ({"common_active": 7.0}, "common_active=7.0 must lie between 0 and common=6"),
        ({"leakage": 1.5}, "between 0 and 1"),
        ({"leakage": 0.1, "topics": 1}, "needs another topic"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"magnitude_mean": 0.0}, "above 0"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        source(**fields)


def test_one_topic_without_common_features_and_build_source():
    made = build_source(SyntheticSource.Config(d_in=8, common=0, common_active=0, topics=1, per_topic=4, topic_active=2), 16)
    assert isinstance(made, SyntheticSource) and next(made).x_TD.shape == (16, 8) and made.describe()["features"] == 4
    with pytest.raises(ValueError, match="dict is no source of activations of the table"):
        build_source({}, 16)

"""The modelled step of pursuit on a GPU, where its answer is known without the model."""

from dataclasses import replace

import pytest

from experiments.benchmarks import pursuit_model
from experiments.benchmarks.cases import MAIN
from experiments.benchmarks.pursuit_model import pursuit_floor
from experiments.benchmarks.roofline import Roofs, floor


def test_half_of_the_parameters_cost_half_of_the_update():
    """Of the same bytes for each: weight, two moments, gradient; Switch's also writes bfloat16 copies."""
    ours = pursuit_floor(MAIN, Roofs()).device.stages["update"]
    theirs = floor(MAIN, Roofs(), plan="dense, recomputed").stages["update"]
    assert ours / theirs == pytest.approx(0.5 * 28 / 26)


def test_what_a_stage_grows_with():
    base, half = (pursuit_floor(replace(MAIN, E=E), Roofs()).device.stages for E in (16, 32))
    assert base["Gram matrices"] == pytest.approx(2 * half["Gram matrices"]) and base["update"] == half["update"]
    few = pursuit_floor(replace(MAIN, K=16), Roofs()).device.stages
    assert few["search"] < half["search"] / 2 and few["weight gradient"] < half["weight gradient"]
    alone = pursuit_floor(MAIN, Roofs(), rivals=0.0).device.stages
    assert half["search"] == pytest.approx(1.25 * alone["search"]) and half["clip"] == alone["clip"]


def test_a_step_takes_what_the_host_takes_where_that_is_longer(monkeypatch):
    found = pursuit_floor(MAIN, Roofs())
    assert found.total_us == found.device.total_us > found.host_us
    monkeypatch.setattr(pursuit_model, "HOST_US", 100.0)
    found = pursuit_floor(MAIN, Roofs())
    assert found.total_us == found.host_us == 100.0 * pursuit_model.OPERATORS

"""The modelled steps of searches on a GPU, where the answer is known without the model."""

from dataclasses import replace

import pytest

from experiments.benchmarks.cases import MAIN
from experiments.benchmarks.roofline import Roofs, floor
from experiments.benchmarks.search_model import search_floor


def stages(shape=MAIN, refit=False, **changes):
    return search_floor(shape, Roofs(), refit, 30, **changes).stages


def test_half_of_the_parameters_cost_half_of_the_update():
    theirs = floor(MAIN, Roofs(), plan="dense, buffered").stages["update"]
    assert stages()["update"] == pytest.approx(theirs / 2) and stages(refit=True)["update"] == pytest.approx(theirs)


def test_what_a_stage_grows_with():
    wide, narrow = stages(replace(MAIN, E=16)), stages()
    # half of E C^2 per expert, and the diagonal's tiles are 1 / 32 of the wide dictionary and 1 / 16 of the narrow
    assert wide["Gram matrices"] == pytest.approx(2 * narrow["Gram matrices"] * (33 / 32) / (17 / 16)) and wide["update"] == narrow["update"]
    few = stages(replace(MAIN, K=16))
    assert few["search"] < narrow["search"] / 2 and few["weight gradients"] < narrow["weight gradients"]
    assert narrow["search"] == pytest.approx(1.25 * stages(rivals=0.0)["search"])


def test_a_smaller_batch_renews_gram_matrices_less_often():
    assert stages(replace(MAIN, T=4096))["Gram matrices"] == pytest.approx(stages()["Gram matrices"] / 2)


def test_what_nobody_searches_costs_only_its_zeros():
    searched, not_searched = (stages(refit=True, missed=share)["missed"] for share in (0.25, 0.0))
    assert searched > not_searched == pytest.approx(8.0 * MAIN.T * MAIN.D / Roofs().copy * 1e6)

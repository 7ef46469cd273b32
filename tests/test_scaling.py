"""Power laws are found where they are, and the interval of the exponent holds what it promises."""

import math
import random
import sys

import pytest

from switch_sae.analysis.scaling import choose_power_law, fit_power_law, mean_over_seeds, t_quantile

WIDTHS = [2.0**power for power in range(11, 18)]


def noisy(exponent, sigma, seed, floor=0.0, coefficient=2.0):
    generator = random.Random(seed)
    return [(floor + coefficient * x**-exponent) * math.exp(sigma * generator.gauss(0, 1)) for x in WIDTHS]


@pytest.mark.parametrize("exponent", [0.07, 0.35, 1.2])
def test_an_exact_power_law_is_recovered(exponent):
    law = fit_power_law(WIDTHS, noisy(exponent, 0, 0, coefficient=3.0))
    assert law.exponent == pytest.approx(exponent, abs=1e-12) and law.coefficient == pytest.approx(3.0)
    assert law.low == pytest.approx(law.high) == pytest.approx(exponent)
    assert law(WIDTHS[2]) == pytest.approx(3.0 * WIDTHS[2] ** -exponent) and law.floor == 0


def test_an_exact_law_with_an_irreducible_loss_is_recovered():
    law = fit_power_law(WIDTHS, noisy(0.5, 0, 0, floor=0.1, coefficient=3.0), floor=True)
    assert (law.floor, law.exponent, law.coefficient) == pytest.approx((0.1, 0.5, 3.0), rel=1e-4)
    assert choose_power_law(WIDTHS, noisy(0.5, 0, 0, floor=0.1)).floor == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("floor", "sigma"), [(0.0, 0.03), (0.02, 0.003)])
def test_the_interval_covers_the_truth_about_95_times_in_100(floor, sigma):
    fits = [fit_power_law(WIDTHS, noisy(0.35, sigma, seed, floor), floor=floor > 0) for seed in range(300)]
    assert 0.92 <= sum(fit.low <= 0.35 <= fit.high for fit in fits) / len(fits) <= 0.98
    assert sum(fit.exponent for fit in fits) / len(fits) == pytest.approx(0.35, abs=0.01)


def test_an_irreducible_loss_is_chosen_where_the_data_have_one_and_seldom_elsewhere():
    assert sum(choose_power_law(WIDTHS, noisy(0.5, 0.005, seed, floor=0.1)).floor > 0 for seed in range(50)) == 50
    assert sum(choose_power_law(WIDTHS, noisy(0.35, 0.01, seed)).floor > 0 for seed in range(100)) <= 8
    assert choose_power_law(WIDTHS[:4], noisy(0.5, 0, 0, floor=0.1)[:4]).floor == 0


def test_two_widths_have_no_interval_and_one_no_fit():
    law = fit_power_law([1.0, 2.0], [1.0, 0.5])
    assert law.exponent == pytest.approx(1.0) and (law.low, law.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="1 different"):
        fit_power_law([2.0, 2.0], [1.0, 0.5])
    with pytest.raises(ValueError, match="positive and finite"):
        fit_power_law([1.0, 2.0], [1.0, 0.0])


def test_seeds_are_averaged_in_the_logarithm():
    assert mean_over_seeds([2.0, 1.0, 2.0], [1.0, 3.0, 4.0]) == ([1.0, 2.0], pytest.approx([3.0, 2.0]))


def test_quantiles_of_student_t():
    tabled = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 30: 2.042}
    assert all(t_quantile(freedom) == pytest.approx(value, abs=6e-4) for freedom, value in tabled.items()) and t_quantile(0) == math.inf


def test_without_scipy_it_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'pip install "switch-sae\[analysis\]"'):
        fit_power_law(WIDTHS, noisy(0.5, 0, 0))

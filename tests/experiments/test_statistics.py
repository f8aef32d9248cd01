"""Statistics of experiments: intervals that hold their level, and an honest smallest effect."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import statistics


def test_estimate_of_a_null_excludes_zero_no_more_often_than_its_level():
    # 600 null experiments of 5 seeds: 5 % are expected outside, 0.9 % is the standard error of that rate
    rng = np.random.default_rng(1)
    found = [statistics.estimate(rng.normal(size=5)) for _ in range(600)]
    assert np.mean([e.low > 0 or e.high < 0 for e in found]) <= 0.05 + 3 * 0.009


def test_estimate_shows_its_smallest_effect_with_the_power_it_claims():
    # the true mean is what 5 seeds of this deviation should show in 80 %; the rate of 600 has a standard error of 1.6 %,
    # and the formula takes the estimated deviation for the true one, which costs a few per cent more
    rng = np.random.default_rng(2)
    smallest = (statistics.stats.t.ppf(0.975, 4) + statistics.stats.t.ppf(0.8, 4)) / math.sqrt(5)
    found = [statistics.estimate(smallest + rng.normal(size=5)) for _ in range(600)]
    assert 0.7 <= np.mean([e.low > 0 for e in found]) <= 0.9


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_estimate_holds_its_mean_and_turns_with_the_sign(values):
    found, turned = statistics.estimate(values), statistics.estimate([-v for v in values])
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert math.isclose(found.low, -turned.high, rel_tol=1e-6, abs_tol=1e-6)  # quantiles interpolate from either end


def test_estimate_of_one_value_can_show_nothing():
    found = statistics.estimate([3.0])
    assert (found.low, found.high, found.smallest) == (-math.inf, math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one value"):
        statistics.estimate([])


def test_paired_takes_the_seeds_that_both_rows_have():
    assert statistics.paired({0: 1.0, 1: 5.0, 2: 2.0}, {1: 3.0, 2: 1.0, 3: 9.0}).tolist() == [2.0, 1.0]


def test_resampled_means_are_all_of_them_for_few_values():
    means = statistics.resampled_means(np.array([0.0, 3.0, 6.0]))
    assert len(means) == 27 and means.mean() == pytest.approx(3.0) and means.min() == 0 and means.max() == 6

"""What a few seeds can say: means, paired differences with their interval, and the smallest effect they could show.

n   seeds;  d_s  difference of two rows at seed s, which share data order and initial weights

The interval of a mean of d is the percentile interval of the bootstrap with levels expanded for small n (Hesterberg,
"What Teachers Should Know About the Bootstrap", arXiv 1411.5279, section 5.3), and Student's where that is wider: with
fewer than about eight seeds no resampling can reach beyond what was seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8
ENUMERATED = 50_000  # resamples up to which all are made, instead of so many at random


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` values, its interval at LEVEL, and the smallest true mean that so many values of this deviation
    would have set apart from 0 with probability POWER. All but the mean are infinite for a single value."""

    mean: float
    low: float
    high: float
    smallest: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}], n = {self.n}"


def summarise(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation over seeds); the deviation of a single value is NaN."""
    array = np.asarray(values, float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> np.ndarray:
    """Differences a - b at the seeds that both have, float64 [n]."""
    return np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], float)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, such as paired differences. Raises ValueError without any."""
    x = np.asarray(values, float)
    n = len(x)
    if not n:
        raise ValueError("an estimate needs at least one value")
    if n == 1:
        return Estimate(float(x[0]), -math.inf, math.inf, math.inf, 1)
    mean, error = float(x.mean()), float(x.std(ddof=1)) / math.sqrt(n)
    quantile = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1))
    tail = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * quantile))
    low, high = np.quantile(resampled_means(x), [tail, 1 - tail])
    low, high = min(low, mean - quantile * error), max(high, mean + quantile * error)
    smallest = (quantile + float(stats.t.ppf(POWER, n - 1))) * error
    return Estimate(mean, float(low), float(high), smallest, n)


def resampled_means(x: np.ndarray) -> np.ndarray:
    """Means of bootstrap resamples of x [n]: of all n^n if they are few, else of ENUMERATED drawn with a fixed seed."""
    n = len(x)
    if n**n <= ENUMERATED:
        return np.array([np.mean(sample) for sample in itertools.product(x, repeat=n)])
    picks = np.random.default_rng(0).integers(n, size=(ENUMERATED, n))
    return x[picks].mean(axis=1)

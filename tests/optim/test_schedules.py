"""The WSD schedule: bounds, continuity, end points, and errors for parts that do not fit into the run."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.config import ConfigError, OptimizerConfig
from kimi_jax.optim.schedules import wsd


@st.composite
def runs(draw):
    total = draw(st.integers(1, 400))
    fraction = draw(st.floats(0.0, 1.0))
    warmup = draw(st.integers(0, total - round(fraction * total)))
    peak = draw(st.floats(1e-5, 1.0))
    final = peak * draw(st.floats(0.0, 1.0))
    return OptimizerConfig(peak_lr=peak, final_lr=final, warmup_steps=warmup, decay_fraction=fraction), total


@given(runs())
def test_shape_of_the_whole_schedule(run):
    config, total = run
    rates = np.broadcast_to(np.asarray(wsd(config, total)(np.arange(405)), np.float64), 405)
    tiny = 1e-5 * config.peak_lr  # float32 rounding of the cosine
    warmup, decay = config.warmup_steps, round(config.decay_fraction * total)
    assert np.all(rates > -tiny) and np.all(rates <= config.peak_lr + tiny)
    np.testing.assert_allclose(rates[:warmup], config.peak_lr * np.arange(1, warmup + 1) / max(warmup, 1), atol=tiny)
    np.testing.assert_allclose(rates[warmup : total - decay], config.peak_lr, atol=tiny)
    if decay:
        np.testing.assert_allclose(rates[total - 1 :], config.final_lr, atol=tiny)
        assert np.all(np.diff(rates[total - decay :]) <= tiny)
        # A cosine never moves faster than pi / 2 times the straight line: no jump anywhere.
        slope = (config.peak_lr - config.final_lr) / decay * np.pi / 2
        assert np.abs(np.diff(rates[max(total - decay - 1, 0) :])).max() <= slope + tiny


def test_values_of_a_small_run():
    config = OptimizerConfig(peak_lr=1.0, final_lr=0.2, warmup_steps=4, decay_fraction=0.4)
    rates = [float(wsd(config, 10)(n)) for n in range(10)]
    cosine = [0.2 + 0.8 * (1 + np.cos(np.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, *cosine], rtol=1e-6)


def test_it_is_a_pure_function_of_the_step_under_jit():
    schedule = wsd(OptimizerConfig(warmup_steps=3), 20)
    np.testing.assert_allclose([jax.jit(schedule)(n) for n in range(20)], [schedule(n) for n in range(20)], rtol=1e-6)


@pytest.mark.parametrize(
    "settings,total,says",
    [
        ({"warmup_steps": 500}, 100, "set warmup_steps to 65 at most"),
        ({"warmup_steps": -1}, 100, "do not fit"),
        ({"warmup_steps": 60, "decay_fraction": 0.5}, 100, "set warmup_steps to 50 at most"),
        ({"decay_fraction": 1.5}, 100, "0..1"),
        ({"final_lr": 1.0}, 1000, "between 0 and it"),
        ({"peak_lr": 0.0, "final_lr": 0.0}, 1000, "must be positive"),
        ({}, 0, "at least one step"),
    ],
)
def test_parts_that_do_not_fit_are_refused(settings, total, says):
    with pytest.raises(ConfigError, match=says):
        wsd(OptimizerConfig(**settings), total)

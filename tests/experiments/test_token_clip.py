"""The token-clip experiment: its rows are settings of a run, and its claims can say yes and no."""

import pytest

from experiments import harness
from experiments.harness import CONFIRMED
from experiments.token_clip import EXPERIMENT, PASSES, SCORE
from kimi_jax.config_check import check_run


@pytest.mark.parametrize("row", EXPERIMENT.rows)
def test_rows_are_settings_of_a_run_of_equally_many_steps(row):
    config = EXPERIMENT.config(row, 1, "cpu")
    check_run(config)
    assert config.steps == 60 * PASSES and config.seed == 1 and config.rl.rollout.passes == PASSES


def table(effect):
    """Rewards that differ by `effect` between K2.5 and no bounds, with seeds that differ by more among themselves."""
    records = [
        {"row": row, "seed": seed, "task": task, "step": 120, "n": 1,
         "score": 0.6 + 0.05 * seed + (effect + 0.004 * (-1) ** seed if row == "k2_5" else 0.0)}
        for row in EXPERIMENT.rows for seed in EXPERIMENT.seeds for task in ("reward", SCORE)
    ]  # fmt: skip
    return harness.ResultsTable(EXPERIMENT, "cpu", records)


def test_planted_effect_is_confirmed_and_none_is_not():
    claim = EXPERIMENT.claims[0]
    assert claim.judge(table(0.1)).outcome == CONFIRMED
    assert claim.judge(table(0.0)).outcome != CONFIRMED

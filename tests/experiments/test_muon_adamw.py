"""The optimizer experiment: tokens to a target are read off curves as they should be."""

import pytest

from experiments import harness
from experiments.harness import CONFIRMED
from experiments.muon_adamw import CURVE, EXPERIMENT, best, fewer_tokens, steps_to, tokens_ratio


def test_steps_to_a_target_lie_between_the_points_of_the_curve():
    curve = [(10, 4.0), (20, 3.0), (30, 2.0)]
    assert steps_to(curve, 2.5) == 25 and steps_to(curve, 3.0) == 20 and steps_to(curve, 1.0) is None


def planted_table(speed: float) -> harness.ResultsTable:
    """AdamW falls from 4 by 0.01 a step over 160 steps, Muon `speed` times as fast, by 2 % more or less from seed to
    seed; other rates are worse."""
    results, curves = [], []
    for row in EXPERIMENT.rows:
        kind = row.rsplit("_", 1)[0]
        slope = 0.01 * (speed if kind == "muon" else 1.0) * (1.0 if row.endswith("_8e-3") else 0.6)
        for seed in EXPERIMENT.seeds:
            noise = 1 + 0.02 * (-1) ** seed if kind == "muon" else 1.0
            points = [(step, 4.0 - slope * noise * step) for step in range(5, 161, 5)]
            curves += [{"row": row, "seed": seed, "task": CURVE, "step": s, "score": v} for s, v in points]
            results.append({"row": row, "seed": seed, "task": CURVE, "step": 160, "score": points[-1][1]})
    return harness.ResultsTable(EXPERIMENT, "cpu", results, curves)


def test_tokens_ratio_is_the_planted_one_at_the_best_rates():
    table = planted_table(2.0)
    assert best(table, "muon") == "muon_8e-3" and best(table, "adamw") == "adamw_8e-3"
    assert list(tokens_ratio(table).values()) == pytest.approx([0.5] * 3, rel=0.03)
    assert fewer_tokens(table).outcome == CONFIRMED


def test_tokens_saved_are_not_confirmed_for_equal_optimizers():
    assert list(tokens_ratio(planted_table(1.0)).values()) == pytest.approx([1.0] * 3, rel=0.03)
    assert fewer_tokens(planted_table(1.0)).outcome != CONFIRMED


def test_tokens_ratio_of_a_slower_optimizer_is_what_it_took_at_least():
    # a tenth of the speed: the target is not reached in 160 steps, and AdamW was there after 120
    assert list(tokens_ratio(planted_table(0.1)).values()) == pytest.approx([160 / 120] * 3)

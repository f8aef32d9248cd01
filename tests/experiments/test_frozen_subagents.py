"""The experiment of frozen and trained subagents: its rows are settings of a run, its measures can say yes and no."""

import numpy as np
import pytest

from experiments import harness
from experiments.frozen_subagents import AVERAGED, EXPERIMENT, ITERATIONS, START, figures, largest_fall, of_log, start
from experiments.harness import CONFIRMED, CONTRADICTED
from kimi_jax.config_check import check_run

LEVEL = {"item_f1": 0.6, "no_row": 0.1, "right_row": 0.8, "entropy": 0.2, "subagent_entropy": 0.1}


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
@pytest.mark.parametrize("row", EXPERIMENT.rows)
def test_rows_are_settings_of_a_run_of_equally_many_steps(row, scale):
    config = EXPERIMENT.config(row, 1, scale)
    check_run(config)
    assert config.steps == (ITERATIONS if scale == "cpu" else 3) and config.seed == 1
    assert config.rl.orchestrator.subagents == ("trained" if row == "trained" else "frozen")


def test_rows_see_the_same_questions():
    frozen, trained = (EXPERIMENT.config(row, 2, "cpu") for row in ("frozen", "trained"))
    assert frozen.rl.rollout == trained.rl.rollout and frozen.rl.tasks == trained.rl.tasks
    assert frozen.optimizer == trained.optimizer and frozen.init_from == trained.init_from


def test_fall_is_the_largest_one_below_an_earlier_value():
    assert largest_fall(np.array([0.2, 0.5, 0.4, 0.6, 0.1])) == pytest.approx(0.5)
    assert largest_fall(np.array([0.1, 0.2, 0.2])) == 0.0


def test_log_of_a_run_that_breaks_down_has_a_fall_and_a_steady_one_has_none():
    steady = [{"data": LEVEL}] * 20
    broken = [*steady, *[{"data": {**LEVEL, "item_f1": 0.1}}] * AVERAGED]
    assert of_log(steady)["train/fall"][0] == pytest.approx(0.0)
    assert of_log(broken)["train/fall"][0] == pytest.approx(0.5)
    assert of_log(steady)["train/subagent_entropy"] == (pytest.approx(0.1), 20)


def table(trained):
    """Records of all rows: frozen ones level at 0.7, trained ones at `trained`, with a fall if that is less."""
    records = [
        {"row": row, "seed": seed, "task": task, "step": ITERATIONS, "n": 1, "score": score + 0.01 * seed}
        for row, level in (("start", 0.6), ("frozen", 0.7), ("trained", trained))
        for seed in EXPERIMENT.seeds
        for task, score in (
            ("item_f1", level), ("right_row", level), ("train/fall", max(0.7 - level, 0.0)),
            ("train/subagent_entropy", level), ("curve/0", 0.6), ("curve/1", level),
        )
    ]  # fmt: skip
    return harness.ResultsTable(EXPERIMENT, "cpu", records)


def test_claims_say_yes_and_no():
    helps, harms = table(0.9), table(0.3)
    by_text = {claim.text: claim for claim in EXPERIMENT.claims}
    higher = by_text["Trained subagents end with a higher item F1 than frozen ones"]
    assert higher.judge(helps).outcome == CONFIRMED and higher.judge(harms).outcome == CONTRADICTED
    fall = next(claim for text, claim in by_text.items() if "falls further" in text)
    assert fall.judge(harms).outcome == CONFIRMED and fall.judge(helps).outcome != CONFIRMED


def test_figure_is_drawn_of_whatever_there_is(tmp_path):
    figures.draw(table(0.5), tmp_path)
    assert (tmp_path / "training.png").stat().st_size > 0
    figures.draw(harness.ResultsTable(EXPERIMENT, "cpu", []), tmp_path / "none")


def test_smoke_runs_begin_with_a_start_of_their_own():
    """So that a few steps suffice, and are never the start of a run whose records are kept."""
    cpu, smoke = (EXPERIMENT.config("frozen", 0, scale).init_from.path for scale in ("cpu", "smoke"))
    assert cpu == str(START) != smoke and start(cpu).steps > start(smoke).steps == 3

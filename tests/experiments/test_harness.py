"""The harness of experiments: records, claims on planted effects and on nulls, and READMEs that are generated."""

import dataclasses
import fcntl
import json

import numpy as np
import pytest

from experiments import harness, report, run
from experiments.harness import CONFIRMED, CONTRADICTED, UNDECIDED, Claim, Experiment, Score
from kimi_jax.config import ConfigError, TrainConfig, freeze
from kimi_jax.config_check import check_run

SEEDS = (0, 1, 2, 3, 4)


def experiment(**changes) -> Experiment:
    """Three rows; the claims are set by the tests."""
    made = Experiment(
        name="planted",
        question="Is a planted effect found?",
        source="this test",
        setting="Made-up scores.",
        base={"cpu": lambda: TrainConfig(steps=10_000)},
        rows={"plain": {}, "planted": {"optimizer.peak_lr": 1e-3}, "null": {"optimizer.weight_decay": 0.2}},
        seeds=SEEDS,
        scores=(Score("task/accuracy", "accuracy", True),),
        claims=(
            Claim("planted is better", harness.better("task/accuracy", "planted", "plain")),
            Claim("null is better", harness.better("task/accuracy", "null", "plain")),
        ),
    )
    return dataclasses.replace(made, **changes)


def records(of: Experiment, effect: float, seed: int = 0, hashed: bool = False) -> list[dict]:
    """Scores that share a part by seed (what pairing removes) and differ by noise of 0.01 besides."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.2, len(SEEDS))
    runs = of.runs() if hashed else []
    hashes = {run: harness.config_hash(of.config(*run, "cpu")) for run in runs}
    found = []
    for row in of.rows:
        for k, s in enumerate(SEEDS):
            score = 0.5 + shared[k] + rng.normal(0, 0.01) + (effect if row == "planted" else 0.0)
            found.append(
                {"row": row, "seed": s, "config": hashes.get((row, s), ""), "commit": "c", "task": "task/accuracy",
                 "step": 10_000, "score": score, "n": 100}
            )  # fmt: skip
    return found


def verdicts(of: Experiment, effect: float, seed: int = 0) -> list[str]:
    table = harness.ResultsTable(of, "cpu", records(of, effect, seed))
    return [claim.judge(table).outcome for claim in of.claims]


def test_claims_confirm_a_planted_effect_and_not_a_null():
    # the effect is four times the noise and a quarter of what seeds share: only paired differences can show it
    assert verdicts(experiment(), 0.05) == [CONFIRMED, UNDECIDED]
    assert verdicts(experiment(), -0.05) == [CONTRADICTED, UNDECIDED]


def test_claims_on_nulls_are_confirmed_at_most_as_often_as_chance_allows():
    # a one-sided claim on a null is confirmed in 2.5 %; 15 of 200 lies more than four standard errors above
    confirmed = sum(verdicts(experiment(), 0.0, seed)[1] == CONFIRMED for seed in range(200))
    assert confirmed < 15


def test_claims_of_equivalence_need_an_interval_inside_the_margin():
    of = experiment()
    table = harness.ResultsTable(of, "cpu", records(of, 0.05))
    assert harness.equivalent("task/accuracy", "null", "plain", 0.05)(table).outcome == CONFIRMED
    assert harness.equivalent("task/accuracy", "planted", "plain", 0.01)(table).outcome == CONTRADICTED
    assert harness.equivalent("task/accuracy", "null", "plain", 1e-4)(table).outcome == UNDECIDED


def test_claim_above_a_control_compares_two_scores_of_one_row():
    of = experiment()
    found = records(of, 0.0)
    control = [{**r, "task": "task/control", "score": r["score"] - 0.05} for r in found]
    table = harness.ResultsTable(of, "cpu", [*found, *control])
    assert harness.above_control("task/accuracy", "plain", "task/control")(table).outcome == CONFIRMED
    assert harness.above_control("task/control", "plain", "task/accuracy")(table).outcome == CONTRADICTED


def test_second_process_waits_for_the_lock_of_the_first(tmp_path):
    path = tmp_path / "folder" / "lock"
    with harness.locked(path), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_claims_are_not_judged_by_one_seed():
    of = experiment()
    table = harness.ResultsTable(of, "cpu", [r for r in records(of, 1.0) if r["seed"] == 0])
    assert of.claims[0].judge(table) == harness.Verdict(UNDECIDED, None)


def test_table_leaves_out_runs_of_another_configuration(tmp_path):
    of = experiment()
    for r in records(of, 0.0, hashed=True):
        harness.add_records(of, "cpu", r["row"], r["seed"], "results", [r], tmp_path)
    assert harness.missing(harness.read_table(of, "cpu", tmp_path)) == []
    changed = experiment(rows={**of.rows, "planted": {"optimizer.peak_lr": 2e-3}})
    left = harness.missing(harness.read_table(changed, "cpu", tmp_path))
    assert left == [("planted", seed) for seed in SEEDS]


def test_records_of_a_run_replace_its_older_ones(tmp_path):
    of = experiment()
    one = records(of, 0.0)[0]
    for score in (0.1, 0.2):
        harness.add_records(of, "cpu", "plain", 0, "results", [{**one, "score": score}], tmp_path)
    lines = (tmp_path / "results" / "cpu" / "plain.jsonl").read_text().splitlines()
    assert [json.loads(line)["score"] for line in lines] == [0.2]
    assert set(json.loads(lines[0])) == {"row", "seed", "config", "commit", "task", "step", "score", "n"}


def test_run_takes_from_its_seed_what_the_experiment_says():
    of = experiment(by_seed=lambda config, seed: dataclasses.replace(config, steps=10 + seed))
    assert [of.config("plain", seed, "cpu").steps for seed in SEEDS] == [10 + seed for seed in SEEDS]


def test_config_hash_ignores_the_workdir_and_sees_every_other_setting():
    of = experiment()
    assert harness.config_hash(of.config("plain", 0, "cpu", "a")) == harness.config_hash(of.config("plain", 0, "cpu"))
    hashes = {harness.config_hash(of.config(row, seed, "cpu")) for row in of.rows for seed in SEEDS}
    assert len(hashes) == len(of.rows) * len(SEEDS)


def test_readme_says_what_was_not_run_and_what_the_claims_came_to():
    of = experiment()
    found = [r for r in records(of, 0.05) if (r["row"], r["seed"]) != ("null", 4)]
    text = report.render(of, harness.ResultsTable(of, "cpu", found))
    assert "| planted is better | **confirmed at this scale** |" in text
    assert "| null is better | **not distinguishable** |" in text
    assert "| null | 0, 1, 2, 3 (not run: 4) |" in text
    assert "**not run**" in report.render(of, harness.ResultsTable(of, "cpu", []))


def test_readme_says_when_rows_are_not_comparable():
    def check(table):
        raise ValueError("tokens differ by 5 %")

    of = experiment(check=check)
    assert "**Rows are not comparable**: tokens differ by 5 %" in report.render(
        of, harness.ResultsTable(of, "cpu", records(of, 0.0))
    )


def test_experiment_of_an_unknown_name_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'fusion_timing'"):
        run.load("fusion")


# ------------------------------------------------------------------------------------------------ the experiments here


@pytest.mark.parametrize("name", run.NAMES)
def test_readme_of_an_experiment_is_what_regenerating_it_gives(name):
    of = run.load(name)
    assert (of.folder / "README.md").read_text() == report.render(of, harness.read_table(of, report.SCALE))


@pytest.mark.parametrize("name", run.NAMES)
def test_rows_of_an_experiment_are_runs_that_the_trainer_takes_at_every_scale(name):
    of = run.load(name)
    for scale in of.base:
        for row in of.rows:
            config = of.config(row, of.seeds[0], scale)
            freeze(dataclasses.asdict(config))
            check_run(config)

"""The swarm experiment: its rows are settings of a run, and its measures and claims can say yes and no."""

import pytest

from experiments import harness
from experiments.agent_swarm import EXPERIMENT, LIMITS, START, context, of_log, reduction, start, steps_to
from experiments.harness import CONFIRMED
from kimi_jax.agents.orchestration import write_corpus
from kimi_jax.config import override
from kimi_jax.config_check import check_run
from kimi_jax.train.log import read_rows

ROW_OF_LOG = {
    "item_f1": 0.5, "r_parallel": 0.0, "r_finish": 0.5, "collapsed": 0.0, "no_gain": 0.0, "unused": 0.0,
    "duplicate": 0.0, "on_chains": 0.0, "subagents": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
@pytest.mark.parametrize("row", EXPERIMENT.rows)
def test_rows_are_settings_of_a_run_of_equally_many_steps(row, scale):
    config = EXPERIMENT.config(row, 1, scale)
    check_run(config)
    assert config.steps == (40 if scale == "cpu" else 3) and config.seed == 1


def test_records_are_those_of_the_present_configurations():
    """So that a setting that is added to `config.rl` does not call finished runs missing."""
    for path in (EXPERIMENT.folder / "results" / "cpu").glob("*.jsonl"):
        for seed, found in {(r["seed"], r["config"]) for r in read_rows(path)}:
            assert found == harness.config_hash(EXPERIMENT.config(path.stem, seed, "cpu")), (path.stem, seed)


def test_hash_tells_who_plays_the_subagents():
    config = EXPERIMENT.config("annealed", 0, "cpu")
    changed = (override(config, {"rl.orchestrator.subagents": who}) for who in ("script", "frozen", "trained"))
    assert len({harness.config_hash(each) for each in changed}) == 3


def log(steps=20, **last):
    """Rows of a log that go from ROW_OF_LOG to `last` in equal steps."""
    ends = {**ROW_OF_LOG, **last}
    return [
        {"data": {name: value + (ends[name] - value) * i / (steps - 1) for name, value in ROW_OF_LOG.items()}}
        for i in range(steps)
    ]


def test_log_of_useless_subagents_that_are_paid_for_is_spurious_and_others_are_not():
    assert of_log(log(r_parallel=0.9, r_finish=1.0, unused=1.0))["train/spurious"] == (1.0, 20)
    assert of_log(log(r_parallel=0.9, r_finish=1.0, unused=1.0, item_f1=0.9))["train/spurious"][0] == 0.0
    assert of_log(log(r_parallel=0.9, r_finish=1.0))["train/spurious"][0] == 0.0
    assert of_log(log(unused=1.0))["train/spurious"][0] == 0.0


def test_log_of_wide_questions_one_after_the_other_is_a_serial_collapse():
    assert of_log(log(collapsed=1.0))["train/serial"][0] == 1.0
    assert of_log(log(collapsed=0.3))["train/serial"][0] == 0.0


def table(policy, serial):
    """Item F1 under each limit that rises from 0 to 1 at so many critical steps, the same for all families."""
    records = [
        {"row": "annealed", "seed": seed, "task": f"limit_{limit}/wide/{name}", "step": 40, "n": 1,
         "score": float(limit >= (step if name == "serial" else step + 0.01 * seed))}
        for seed in EXPERIMENT.seeds for limit in LIMITS for name, step in (("policy", policy), ("serial", serial))
    ]  # fmt: skip
    return harness.ResultsTable(EXPERIMENT, "cpu", records)


def test_steps_to_a_target_lie_between_two_limits_and_are_infinite_where_it_is_not_reached():
    assert steps_to(table(8, 8), "annealed", 0, "wide", "policy", 0.5) == 7.0
    assert steps_to(table(8, 8), "annealed", 0, "wide", "policy", 0.25) == 6.5
    assert steps_to(table(4, 8), "annealed", 0, "wide", "policy") == 4.0
    assert steps_to(table(99, 8), "annealed", 0, "wide", "policy") == float("inf")


def test_reduction_is_confirmed_where_the_script_needs_more_steps_and_not_where_it_does_not():
    assert reduction("annealed", "wide")(table(6, 14)).outcome == CONFIRMED
    assert reduction("annealed", "wide")(table(14, 14)).outcome != CONFIRMED
    assert reduction("annealed", "wide")(table(99, 14)).estimate.mean == 0.0, "a target that is not reached is no gain"


def test_discarded_context_costs_rows_and_a_shared_one_does_not(tmp_path):
    rows = list(context.sweep(write_corpus(tmp_path), sizes=(6,), seeds=range(2)))
    found = {name: [row for row in rows if row["policy"] == name] for name in context.policies(6)}
    assert all(row["item_f1"] == 1.0 for name, each in found.items() if "discard" not in name for row in each)
    assert all(row["item_f1"] < 0.8 for row in found["one agent, discard_all"])
    assert all(row["largest"] > context.WINDOW for row in found["one agent, no limit"])
    assert all(row["largest"] < context.WINDOW for row in found["swarm, sharding"])


def test_table_of_context_policies_is_that_of_its_records():
    rows = read_rows(context.RESULTS)
    assert len(rows) == len(context.ITEMS) * len(context.SEEDS) * len(context.policies(1))
    assert context.section(rows) in (EXPERIMENT.folder / "README.md").read_text()


def test_records_of_context_policies_are_made_again_by_the_command(tmp_path):
    again = list(context.sweep(write_corpus(tmp_path), sizes=context.ITEMS[:1], seeds=range(2)))
    assert again == read_rows(context.RESULTS)[: len(again)]


def test_smoke_runs_begin_with_a_start_of_their_own():
    """So that a few steps suffice, and are never the start of a run whose records are kept."""
    cpu, smoke = (EXPERIMENT.config("annealed", 0, scale).init_from.path for scale in ("cpu", "smoke"))
    assert cpu == str(START) != smoke
    assert start(cpu).steps == 400 and start(smoke).steps == 3

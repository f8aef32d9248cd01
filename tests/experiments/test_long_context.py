"""The long-context experiment: rows are runs that differ in what they say, and begin where they should."""

import dataclasses

import pytest

from experiments import harness
from experiments.harness import CONFIRMED
from experiments.long_context import BATCH, CONTROLS, DATA, EXPERIMENT, TEXT, stage
from kimi_jax import sharding
from kimi_jax.config import YarnConfig
from kimi_jax.config_check import check_run
from kimi_jax.data.bins import check_bins
from kimi_jax.eval import tasks


@pytest.mark.parametrize("scale", ["smoke", "cpu", "pod"])
@pytest.mark.parametrize("row", ["yarn", "plain", "short"])
def test_rows_are_settings_of_a_run(row, scale):
    config = EXPERIMENT.config(row, 2, scale)
    check_run(config)
    check_bins(config.data, config.model)
    if scale == "pod":  # the topology that `python -m experiments --scale=pod` names: v5p:8x8x16
        sharding.mesh_sizes(config.mesh, 8 * 8 * 16)
    assert "{" not in config.init_from.path and (config.model.rope_scaling is not None) == (row == "yarn")


def test_rows_begin_with_the_weights_of_their_own_seed_and_positions():
    starts = {row: EXPERIMENT.config(row, 2, "cpu").init_from.path for row in EXPERIMENT.rows}
    folder = DATA / "cpu" / "2"
    assert starts == {
        "before": f"{folder}/joint", "before_yarn": f"{folder}/joint", "yarn": f"{folder}/2x-yarn",
        "plain": f"{folder}/2x-plain", "short": f"{folder}/joint",
    }  # fmt: skip
    for positions in ("yarn", "plain"):
        twice = stage("cpu", f"2x-{positions}")
        assert twice.init_from.path.endswith("joint") and twice.data.sequence_length == 512
        assert twice.model.rope_scaling == (YarnConfig(2.0, 256) if positions == "yarn" else None)


def test_rows_train_on_the_same_number_of_tokens():
    """Two stages of long rows, or one of short rows: `short` has no stage before it but the joint one."""
    long = sum(stage("cpu", name).steps for name in ("2x-yarn", "4x-yarn"))
    short = EXPERIMENT.config("short", 0, "cpu")
    assert short.steps == long and short.data.sequence_length * short.data.rows_per_pack == BATCH
    pod = {row: EXPERIMENT.config(row, 0, "pod") for row in ("yarn", "short")}
    batch = {c.data.num_packs * c.data.rows_per_pack * c.data.sequence_length for c in pod.values()}
    assert len(batch) == 1


def test_rows_with_and_without_interpolation_differ_in_it_alone():
    yarn, plain = (EXPERIMENT.config(row, 1, "cpu") for row in ("yarn", "plain"))
    model = dataclasses.replace(plain.model, rope_scaling=yarn.model.rope_scaling)
    assert dataclasses.replace(plain, model=model, init_from=yarn.init_from, workdir=yarn.workdir) == yarn


def table(effect):
    """Scores that differ by `effect` between training with and without interpolation, seeds that differ by more."""
    records = [
        {"row": row, "seed": seed, "task": f"{task}/accuracy{control}", "step": 60, "n": 1,
         "score": 0.4 + 0.05 * seed + (effect + 0.004 * (-1) ** seed if row == "yarn" and not control else 0.0)}
        for row in EXPERIMENT.rows for seed in EXPERIMENT.seeds for task in EXPERIMENT.tasks
        for control in ("", f"/{CONTROLS[TEXT]}", "/without the frame")
    ]  # fmt: skip
    return harness.ResultsTable(EXPERIMENT, "cpu", records)


def test_planted_effect_is_confirmed_and_none_is_not():
    for claim in EXPERIMENT.claims[:4]:
        assert claim.judge(table(0.1)).outcome == CONFIRMED, claim.text
        assert claim.judge(table(0.0)).outcome != CONFIRMED, claim.text


def test_needle_tasks_are_asked_by_name_only():
    asked = tasks.resolve(EXPERIMENT.tasks)
    every = {task.name for task in tasks.resolve("all")}
    for task in asked:
        assert (task.name in every) == (task.name == "wiki_bpb")
        if task.name == "wiki_bpb":
            continue
        questions = task.build(3)
        changed = [task.controls[0].change(question, i) for i, question in enumerate(questions)]
        for one, other in zip(questions, changed, strict=True):
            assert one.choices.count(one.gold) == 1 and other.choices == one.choices and other.gold == one.gold
            assert str(one.context[0]) != str(other.context[0])

"""Runs of a swarm as rollouts: batches of the one trainer, rewards by the iteration, the same again after a kill."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from kimi_jax import config as c
from kimi_jax.agents import finder
from kimi_jax.agents.finder import Finder, Orchestrator
from kimi_jax.agents.orchestration import PlannedRun, conversations, settings, write_corpus
from kimi_jax.config import ConfigError, LoRAConfig
from kimi_jax.config_rl import OrchestratorConfig, RLConfig, RolloutConfig, TaskConfig
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from kimi_jax.rl.orchestrator import OrchestratorWorker, RunGroup, evaluate
from kimi_jax.rl.rollout import RolloutSource
from tests.nn.tiny import QUICK
from tests.rl.tiny_run import TEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orchestrator")
    corpus = write_corpus(folder / "corpus")
    told = conversations(6, corpus, settings(14, 6, 256), 1.0, seed=0)
    train_tokenizer([json.dumps(messages) for messages in told], 320, folder / "tokenizer.json")
    return folder


def configured(folder, **changes):
    rl = RLConfig(
        {"wide": TaskConfig("orchestrate", path="wide/2"), "chain": TaskConfig("orchestrate", path="chain/2")},
        RolloutConfig(
            prompts=2, samples=2, max_new_tokens=12, slots=4, tokens_per_call=4, repeat_period=0, max_draws=1.0,
            drop_uninformative=False,
        ),
        orchestrator=OrchestratorConfig(corpus=str(folder / "corpus"), **changes),
    )  # fmt: skip
    data = c.DataConfig(
        tokenizer=str(folder / "tokenizer.json"), sequence_length=256, num_packs=1, rows_per_pack=4, vision_bins=()
    )
    return c.TrainConfig(model=TEXT, data=data, rl=rl, mesh=c.MeshConfig(1))


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: unbox(init_params(TEXT, jax.random.key(0))), compiler_options=QUICK)()


@pytest.fixture(scope="module")
def worker(folder):
    config = configured(folder)
    return OrchestratorWorker(config, config.rl)


def group_of(worker, asked, *orchestrators):
    group = RunGroup("wide", 0, asked, ["0"] * len(orchestrators))
    group.runs = worker.play([PlannedRun(asked, each, Finder()) for each in orchestrators])
    return group


def test_batch_holds_what_the_policy_wrote_and_a_restored_source_makes_the_same(folder, worker, params):
    config = configured(folder)
    source = RolloutSource(config, [0], None, worker)
    source.update(params, 0)
    first = next(source)
    state = source.state()
    assert first.loss_weights.sum() == (first.columns["logp_sampler"] < 0).sum() > 0
    assert source.report()["critical_steps"] >= 1 and source.report()["item_f1"] == 0.0
    source.update(params, 1)
    second = next(source)
    again = RolloutSource(config, [0], state, worker)
    again.update(params, 1)
    for a, b in zip(jax.tree.leaves(second.as_dict()), jax.tree.leaves(next(again).as_dict()), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.tokens, second.tokens)


def test_rewards_are_the_outcome_and_terms_that_are_annealed(folder):
    config = configured(folder, lambda_parallel=0.4, lambda_finish=0.2, anneal=10, width=2)
    worker = OrchestratorWorker(config, config.rl)
    asked = finder.question("wide", 0, 2)
    group = group_of(worker, asked, Orchestrator(asked, True), Orchestrator(asked, False))
    assert group.complete and [run.item_f1 for run in group.runs] == [1.0, 1.0]
    assert worker.rewards(group, 0) == pytest.approx([1.6, 1.2])
    assert worker.rewards(group, 5) == pytest.approx([1.3, 1.1])
    assert worker.rewards(group, 10) == worker.rewards(group, 1000) == [1.0, 1.0]
    metrics = worker.take_metrics()
    assert metrics["r_parallel"] == 0.5 and metrics["r_finish"] == 1.0 and metrics["width"] == 1.5
    assert metrics["unused"] == metrics["duplicate"] == 0.0, "the answers cite every row"
    assert worker.take_metrics() == {}


def test_reliability_of_subagents_follows_the_iteration():
    schedule = OrchestratorConfig(reliability=((0, 0.5), (10, 0.9)))
    assert [schedule.reliability_at(i) for i in (0, 9, 10, 99)] == [0.5, 0.5, 0.9, 0.9]
    assert OrchestratorConfig(reliability=((1, 0.5),)).conflict()
    assert OrchestratorConfig(reliability=((0, 0.5), (0, 0.6))).conflict()


def test_evaluation_has_subagents_that_are_up_to_every_brief(folder, params, monkeypatch):
    config = configured(folder, reliability=((0, 0.25),))
    worker = OrchestratorWorker(config, config.rl)
    worker.set_params(params, 0)
    subagents = []
    monkeypatch.setattr(
        worker, "play", lambda runs, *limit: subagents.append(runs[0].subagent._reliability) or [None] * 2 * (not limit)
    )
    asked = worker.open_task(TaskConfig("orchestrate", path="wide/2"))[0]
    worker.draw([worker.begin("wide", 0, asked, 2, 0)])
    worker.answer([asked])
    assert subagents == [0.25, 1.0]


def test_limit_of_critical_steps_ends_what_needs_more(worker):
    asked = [worker.open_task(TaskConfig("orchestrate", path="wide/2"))[0]]
    (free,), (limited,) = worker.one_by_one(asked, 40), worker.one_by_one(asked, 4)
    assert free.item_f1 == 1.0 and free.result.critical_steps > 4
    assert limited.item_f1 == 0.0 and limited.result.critical_steps <= 4


def test_run_without_anything_of_the_policy_makes_its_group_fail(worker):
    class Silent:
        name = "silent"

        async def complete(self, request):
            raise RuntimeError("no answer")

    asked = finder.question("wide", 0, 2)
    assert group_of(worker, asked, Silent()).failed
    assert not group_of(worker, asked, Orchestrator(asked, True)).failed


def test_evaluation_has_the_script_that_delegates_in_turn_as_its_control(folder, worker, params):
    shown = []
    rows = evaluate(worker, params, configured(folder), ("wide",), 2, samples=shown)
    by_metric = {row.metric: row for row in rows}
    assert by_metric["item_f1"].score == 0.0 and by_metric["item_f1"].control == 1.0
    assert by_metric["width"].control == 1.0 and len(shown) == 2


@pytest.mark.parametrize("path", ["wide", "wide/0", "wide/9", "deep/3", "../wide/3", ""])
def test_task_of_another_form_is_refused(worker, path):
    with pytest.raises(ConfigError, match="FAMILY/LINES"):
        worker.open_task(TaskConfig("orchestrate", path=path))
    with pytest.raises(ConfigError, match="orchestrate"):
        worker.open_task(TaskConfig("copy"))


def test_settings_that_no_run_can_be_made_with_are_refused(folder, tmp_path):
    config = configured(folder)
    stale = dataclasses.replace(config.rl, rollout=dataclasses.replace(config.rl.rollout, max_staleness=1))
    with pytest.raises(ConfigError, match="max_staleness"):
        OrchestratorWorker(config, stale)
    adapted = dataclasses.replace(config, lora=LoRAConfig())
    with pytest.raises(ConfigError, match="lora"):
        OrchestratorWorker(adapted, config.rl)
    lost = dataclasses.replace(config.rl, orchestrator=OrchestratorConfig(corpus=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="corpus"):
        OrchestratorWorker(config, lost)

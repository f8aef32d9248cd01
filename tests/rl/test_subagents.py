"""Subagents that a model plays: frozen ones are observations, trained ones have a share in their run's advantage."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from kimi_jax.agents import finder, searcher
from kimi_jax.agents.batched_model import EpisodeModel
from kimi_jax.agents.events import ROOT
from kimi_jax.agents.finder import Orchestrator
from kimi_jax.agents.orchestration import PlannedRun
from kimi_jax.agents.searcher import Searcher
from kimi_jax.config import ConfigError, InitFromConfig
from kimi_jax.config_rl import OrchestratorConfig
from kimi_jax.ranges import problem
from kimi_jax.rl import orchestrator
from kimi_jax.rl.orchestrator import OrchestratorWorker, RunGroup, entropies, means
from kimi_jax.rl.types import samples
from tests.rl.test_orchestrator import configured, folder, params  # noqa: F401 (fixtures)

START = InitFromConfig(path="the start")


class Recorded:
    """A script whose turns have ids, as if they had been sampled: bytes of what it read and of what it wrote."""

    name = "recorded"

    def __init__(self, script, first):
        self._script, self._first = script, first  # first: id that all its contexts begin with

    async def complete(self, request):
        response = await self._script.complete(request)
        prompt = [self._first, *json.dumps(list(request.messages)).encode()]
        written = list((response.text + str(response.calls)).encode())
        tokens = {"prompt": prompt, "sampled": written, "logprobs": [-0.5] * len(written), "version": 0}
        return dataclasses.replace(response, tokens=tokens)


def worker_of(folder, params, monkeypatch, subagents):  # noqa: F811
    """A worker whose run began with `params`."""
    config = dataclasses.replace(configured(folder, subagents=subagents), init_from=START)
    monkeypatch.setattr(orchestrator.init_from, "start", lambda config, fresh, mesh, console: params)
    return OrchestratorWorker(config, config.rl)


def other(params):  # noqa: F811
    """Weights that draw something else."""
    return jax.tree.map(lambda x: -x if x.ndim > 1 else x + 0, params)


def told(worker, asked, weights):
    """What subagents write in the runs of a scripted orchestrator while the policy has these weights."""
    worker.set_params(weights, 1)
    runs = worker.play([
        PlannedRun(q, Orchestrator(q, True), worker._plan(q, i, "seed", 1.0).subagent) for i, q in enumerate(asked)
    ])  # fmt: skip
    return runs, [e.detail["tokens"]["sampled"] for r in runs for e in r.events if e.kind == "step" and e.agent != ROOT]


@pytest.mark.parametrize("subagents", ["frozen", "trained"])
def test_loss_mask_of_subagents_is_0_when_frozen_and_1_with_the_runs_advantage_when_trained(
    folder, params, monkeypatch, subagents  # noqa: F811
):  # fmt: skip
    worker = worker_of(folder, params, monkeypatch, subagents)
    asked = finder.question("wide", 0, 2)
    group = worker.begin("wide", 0, asked, 2, 0)
    group.runs = worker.play(
        [PlannedRun(asked, Recorded(Orchestrator(asked, each), 1000 + i), Recorded(Searcher(), 2000 + i))
         for i, each in enumerate((True, False))]
    )  # fmt: skip
    advantages = [0.75, -0.75]
    of_role = {1000: 0, 2000: 0}
    for sample in samples(group.group([1.0, 0.0]), advantages, -1):
        role, run = divmod(int(sample.encoded.tokens[0]), 1000)
        mask = sample.encoded.loss_weights > 0
        of_role[1000 * role] += int(mask.sum())
        assert set(sample.columns["advantage"][mask]) == {advantages[run]}
        assert not sample.columns["advantage"][~mask].any()
    assert of_role[1000] > 0
    written = sum(len(e.detail["tokens"]["sampled"]) for r in group.runs for e in r.events
                  if e.kind == "step" and e.agent != ROOT)  # fmt: skip
    assert of_role[2000] == (written if subagents == "trained" else 0)


def test_frozen_subagents_keep_the_start_weights_bit_for_bit_and_write_the_same(
    folder, params, monkeypatch  # noqa: F811
):  # fmt: skip
    worker = worker_of(folder, params, monkeypatch, "frozen")
    asked = [finder.question("wide", i, 2) for i in range(2)]
    before = jax.device_get(params)
    _, first = told(worker, asked, jax.tree.map(lambda x: x + 0, params))
    worker.draw([worker.begin("wide", 0, asked[0], 2, 0)])
    _, second = told(worker, asked, other(params))
    assert first == second and first
    assert worker._batch.engine is not worker._frozen.engine
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_trained_subagents_are_played_by_the_policy_of_now(folder, params, monkeypatch):  # noqa: F811
    worker = worker_of(folder, params, monkeypatch, "trained")
    asked = [finder.question("wide", i, 2) for i in range(2)]
    _, first = told(worker, asked, params)
    _, second = told(worker, asked, other(params))
    assert first != second


@pytest.mark.parametrize("subagents", ["frozen", "trained"])
def test_bad_output_of_a_subagent_is_an_envelope_without_a_row(folder, params, monkeypatch, subagents):  # noqa: F811
    """Random weights write no tool call and no row."""
    worker = worker_of(folder, params, monkeypatch, subagents)
    runs, written = told(worker, [finder.question("wide", i, 2) for i in range(2)], params)
    assert written and all(run.result.status == "ok" for run in runs)
    found = means(runs)
    assert found["no_row"] == 1.0 and found["right_row"] == found["item_f1"] == 0.0
    assert entropies(runs)["subagent_entropy"] > 0


def test_shares_of_rows_are_those_of_the_subagents(folder, params, monkeypatch):  # noqa: F811
    worker = worker_of(folder, params, monkeypatch, "trained")
    asked = finder.question("wide", 0, 2)
    found = means(worker.play([PlannedRun(asked, Orchestrator(asked, True), Searcher(r)) for r in (1.0, 0.0)]))
    assert found["no_row"] == found["right_row"] == 0.5


def test_two_agents_of_a_run_draw_with_different_seeds(folder, params, monkeypatch):  # noqa: F811
    worker = worker_of(folder, params, monkeypatch, "trained")
    worker.set_params(params, 0)
    seeds = []
    run = worker._batch.engine.run
    monkeypatch.setattr(
        worker._batch.engine, "run", lambda asked: seeds.extend(r.sampling.seed for r in asked) or run(asked)
    )
    asked = finder.question("wide", 0, 2)
    worker.play([PlannedRun(asked, Orchestrator(asked, True), EpisodeModel(worker._batch, 0, "seed"))])
    assert len(seeds) == len(set(seeds)) >= 2


def test_settings_that_are_impossible_are_refused(folder):  # noqa: F811
    config = configured(folder, subagents="frozen")
    with pytest.raises(ConfigError, match=r"init_from\.path"):
        OrchestratorWorker(config, config.rl)
    assert "script" in problem(OrchestratorConfig(subagents="robot"), "config")
    assert "reliability" in OrchestratorConfig(subagents="frozen", reliability=((0, 0.5),)).conflict()
    assert not OrchestratorConfig(subagents="trained").conflict()


def test_group_of_scripts_has_no_subagents_to_train(folder):  # noqa: F811
    worker = OrchestratorWorker(configured(folder), configured(folder).rl)
    asked = finder.question("wide", 0, 2)
    group = RunGroup("wide", 0, asked, ["0"], worker.begin("wide", 0, asked, 1, 0).trains_subagents)
    group.runs = worker.play([PlannedRun(asked, Recorded(Orchestrator(asked, True), 1000), finder.Finder())])
    assert not group.trains_subagents and len(group.group([1.0]).trajectories) == 1
    assert searcher.NOTHING == "none"

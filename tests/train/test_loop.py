"""The loop's own decisions, on made-up batches instead of a data stream: giving up, evaluating, saying what is set."""

import dataclasses
import json

import numpy as np
import pytest

from kimi_jax.config import CheckpointConfig, ConfigError, EvalConfig, MeshConfig, preset
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.eval import runner
from kimi_jax.train import checkpoint, loop
from tests.train.tiny import CONFIG, make_batch


class Stream(BatchStream):
    """Stands in for BatchStream; batches from `bad_from` on have a weight that is not a number."""

    bad_from = 10**9

    def __init__(self, data, model, total_steps, shards=None, state=None):
        self.step = state["step"] if state else 0

    def __next__(self):
        batch = make_batch(self.step)
        if self.step >= self.bad_from:
            batch["loss_weights"][0, 0] = np.nan
        self.step += 1
        return batch

    def state(self):
        return {"step": self.step}

    def report(self):
        return {"token_fill": 0.9, "ratio": 0.1}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    monkeypatch.setattr(loop, "BatchStream", Stream)


def config(workdir, **changes):
    base = dataclasses.replace(CONFIG, workdir=str(workdir), steps=8, log_interval=4, mesh=MeshConfig(8))
    return dataclasses.replace(base, checkpoint=CheckpointConfig(interval=4), **changes)


def row(task):
    return runner.Row(task, "ocr", "image", "accuracy", 0.5, 0.1, 0.25, "blank", 0.1, 10)


def test_run_that_stays_not_finite_is_given_up_with_advice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Stream, "bad_from", 5)
    with pytest.raises(loop.Diverged, match=r"10 steps in a row, the last one step 15,"):
        loop.run(dataclasses.replace(config(tmp_path), steps=100, checkpoint=CheckpointConfig(interval=0)))
    assert "step 6: loss or gradient is not finite; its update is left out" in capsys.readouterr().out


def test_evaluation_on_the_way_and_at_the_end_and_not_again(tmp_path, monkeypatch):
    calls = []

    def evaluate(params, config, tasks, limit, samples=None):
        calls.append((tuple(tasks), limit))
        return [row(task) for task in tasks]

    monkeypatch.setattr(runner, "evaluate", evaluate)
    settings = config(tmp_path, eval=EvalConfig(tasks=("shape",), interval=3, limit=5, final_limit=50))
    monkeypatch.setattr(loop, "_check", lambda config: None)
    assert loop.run(settings) == 0
    assert calls == [(("shape",), 5), (("shape",), 5), (("shape",), 50)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results[0]["task"] == "shape" and {"modality", "score", "stderr", "control", "chance"} <= set(results[0])
    steps = [json.loads(line)["step"] for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 8]
    assert loop.run(settings) == 0 and len(calls) == 3  # complete: nothing is done again

    found, params = checkpoint.load(str(tmp_path))
    assert found == settings and params["embed"]["embedding"].shape == (64, 32)
    assert checkpoint.load(str(tmp_path), 4)[0] == settings
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .* there are: \[4, 8\]"):
        checkpoint.load(str(tmp_path), 5)


def test_unknown_task_is_found_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.eval\.tasks: no task is called 'nonsense'"):
        loop.run(config(tmp_path, eval=EvalConfig(tasks=("nonsense",))))


def test_describe_compares_with_the_nearest_preset():
    lines = loop.describe(dataclasses.replace(CONFIG, model=dataclasses.replace(preset("small"), remat=True)))
    assert lines[0] == "config.model = preset 'small'" and "config.model.remat = True (default False)" in lines
    assert not any("hidden_size" in line for line in lines)

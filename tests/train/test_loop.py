"""The loop's own decisions, on made-up batches instead of a data stream: giving up, evaluating, saying what is set."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from kimi_jax import cli, report, report_charts
from kimi_jax.config import CheckpointConfig, ConfigError, EvalConfig, MeshConfig, ProfileConfig, preset
from kimi_jax.eval import runner
from kimi_jax.train import checkpoint, loop
from kimi_jax.train.log import read_rows
from kimi_jax.train.metrics import ROW
from kimi_jax.train.xprof import Trace
from tests.synthetic_run import write_run
from tests.train.tiny import CONFIG, make_batch


class Source:
    """Made-up batches in place of a data stream; those from `bad_from` on have a weight that is not a number."""

    bad_from = 10**9

    def __init__(self, config, packs, state):
        self.step = state["step"] if state else 0

    def __next__(self):
        batch = make_batch(self.step)
        if self.step >= self.bad_from:
            batch.loss_weights[0, 0] = np.nan
        self.step += 1
        return batch

    def state(self):
        return {"step": self.step}

    def report(self):
        return {"batches": self.step, "token_fill": 0.9, "ratio": 0.1}

    def update(self, params, step):
        assert step == self.step

    def close(self):
        pass


def train(config, source=Source, **values):
    return loop.run(config, batches=source, **values)


def config(workdir, **changes):
    base = dataclasses.replace(CONFIG, workdir=str(workdir), steps=8, log_interval=4, mesh=MeshConfig(8))
    return dataclasses.replace(base, checkpoint=CheckpointConfig(interval=4), **changes)


def row(task):
    return runner.Row(task, "ocr", "image", "accuracy", 0.5, 0.1, 0.25, "blank", 0.1, 10)


def test_run_that_stays_not_finite_is_given_up_with_advice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Source, "bad_from", 5)
    with pytest.raises(loop.Diverged, match=r"10 steps in a row, the last one step 15,"):
        train(dataclasses.replace(config(tmp_path), steps=100, checkpoint=CheckpointConfig(interval=0)))
    assert "step 6: loss or gradient is not finite; its update is left out" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_on_the_way_and_at_the_end_and_not_again(tmp_path):
    """With an evaluation of one's own, whose tasks nobody has registered."""
    calls = []

    def evaluate(params, config, tasks, limit, samples=None, frozen=None):
        calls.append((tuple(tasks), limit))
        return [row(task) for task in tasks]

    settings = config(tmp_path, eval=EvalConfig(tasks=("shape",), interval=3, limit=5, final_limit=50))
    assert train(settings, evaluate=evaluate) == 0
    assert calls == [(("shape",), 5), (("shape",), 5), (("shape",), 50)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results[0]["task"] == "shape" and {"modality", "score", "stderr", "control", "chance"} <= set(results[0])
    steps = [json.loads(line)["step"] for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 8]
    assert train(settings, evaluate=evaluate) == 0 and len(calls) == 3  # complete: nothing is done again

    found, params = checkpoint.load(str(tmp_path))
    assert found == settings and params["embed"]["embedding"].shape == (64, 32)
    assert checkpoint.load(str(tmp_path), 4)[0] == settings
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .* there are: \[4, 8\]"):
        checkpoint.load(str(tmp_path), 5)


def test_report_draws_every_chart_from_the_log_of_a_real_run(tmp_path):
    assert train(config(tmp_path)) == 0
    for row in read_rows(tmp_path / "metrics.jsonl"):
        assert sorted(row) == sorted(ROW)
    found = report.load(tmp_path)
    titles = [chart.title for chart in report_charts.draw(found.rows, tau=100.0)]
    expected = "Loss by modality/Throughput/Model FLOPs utilisation/Largest attention logit/Gradient norm/"
    assert "/".join(titles) == expected + "Learning rate/Packing/Expert load"
    assert "Largest attention logit" in report.render(found)
    made_up = read_rows(write_run(tmp_path / "made_up", steps=2) / "metrics.jsonl")
    assert made_up and all(set(row) <= set(ROW) for row in made_up)  # what the tests of the report read


@pytest.mark.slow
def test_trace_of_some_steps_and_where_the_time_went(tmp_path, capsys):
    """A run of six steps, traced in two of them, and two more in a second start: sums go on over both."""
    settings = config(tmp_path, profile=ProfileConfig(start_step=3, steps=2))
    assert train(dataclasses.replace(settings, steps=6, log_interval=2)) == 0
    assert f"trace of steps 3 to 4 in {tmp_path / 'xprof'}" in capsys.readouterr().out
    traces = list((tmp_path / "xprof").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0
    assert train(dataclasses.replace(settings, log_interval=2)) == 0
    assert list((tmp_path / "xprof").rglob("*.xplane.pb")) == traces  # those steps are over
    said = capsys.readouterr().out
    assert "goodput " in said and "restarts included: " in said and "compiled programs are kept in" in said
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for before, after in itertools.pairwise(rows):
        assert all(after["seconds"][name] >= before["seconds"][name] - 1e-3 for name in before["seconds"])
    last = rows[-1]["seconds"]
    assert min(last[name] for name in ("steps", "start", "compile", "restore", "checkpoint", "away")) > 0
    assert 0 < rows[-1]["goodput_run"] < 1 and rows[-1]["goodput_run"] == pytest.approx(
        last["steps"] / sum(last.values()), rel=1e-2
    )
    assert rows[-1]["rounds"] == rows[-1]["imbalance"] == 1  # no expert axis


def test_trace_that_cannot_be_written_is_said_and_no_more(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no room")

    monkeypatch.setattr("jax.profiler.start_trace", full)
    said: list[str] = []
    with Trace(ProfileConfig(1, 1), str(tmp_path), said.append) as trace:
        trace.begin(1)
        trace.end(1, None)
    assert len(said) == 1 and said[0].startswith("WARNING: no trace in") and "no room" in said[0]


def test_compiled_programs_are_kept_unless_told_otherwise(monkeypatch, tmp_path):
    """In the user's cache, with several hosts in the folder that all of them see; a cache that is set is respected."""
    import jax

    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        assert cli.enable_compilation_cache() == before
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("KIMI_CACHE_DIR", raising=False)
        for shared, folder in ((None, tmp_path / ".cache" / "kimi_jax"), ("gs://b/run", "gs://b/run")):
            jax.config.update("jax_compilation_cache_dir", None)
            assert cli.enable_compilation_cache(shared) == f"{folder}/xla"
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("KIMI_CACHE_DIR", "/big")
        assert cli.enable_compilation_cache("gs://b/run") == "/big/xla"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_unknown_task_is_found_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.eval\.tasks: no task is called 'nonsense'"):
        train(config(tmp_path, eval=EvalConfig(tasks=("nonsense",))))


def test_describe_compares_with_the_nearest_preset():
    lines = loop.describe(dataclasses.replace(CONFIG, model=dataclasses.replace(preset("small"), remat=True)))
    assert lines[0] == "config.model = preset 'small'" and "config.model.remat = True (default False)" in lines
    assert not any("hidden_size" in line for line in lines)

"""Episodes with tools: what is trained on is what was drawn, whatever a call does is a result, and nothing of an
episode lies in a process. Scripted turns (tests/rl/scripted.py) and real interpreters."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from kimi_jax.config import ConfigError, RLConfig, TaskConfig, freeze, thaw
from kimi_jax.config_rl import ToolConfig
from kimi_jax.data import conversation
from kimi_jax.data.example import Image, Text
from kimi_jax.data.example import encode as encode_example
from kimi_jax.data.packing import unpack
from kimi_jax.data.reply import ToolCall
from kimi_jax.rl import page
from kimi_jax.rl.episode import ExecutedCall, Finished, Interpreters, user_message
from kimi_jax.rl.evaluate import evaluate
from kimi_jax.rl.rollout import RolloutSource
from kimi_jax.rl.tasks import LADDER, Problem
from kimi_jax.rl.types import GIVEN
from kimi_jax.sandbox import walls
from kimi_jax.sandbox.limits import SandboxError
from kimi_jax.sandbox.tool import IPYTHON
from kimi_jax.train.batches import join_arrays, split_arrays
from tests.rl.scripted import MODEL, ScriptedWorker, call, turn, write_tokenizer
from tests.rl.tiny_run import settings

LENGTH = 768
TOOLS = ToolConfig(sessions=2, timeout_seconds=10.0, characters=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("episode")
    write_tokenizer(folder)
    return folder


def configured(folder, workdir="", tools=TOOLS, length=LENGTH, **rollout):
    chosen = {"prompts": 1, "samples": 2, "max_new_tokens": 300, "repeat_period": 0} | rollout
    config = settings(folder, workdir, model=MODEL, **chosen)
    data = dataclasses.replace(config.data, sequence_length=length, rows_per_pack=8)
    rl = RLConfig({"toy": TaskConfig("product", tools=("ipython",))}, config.rl.rollout, tools=tools)
    return dataclasses.replace(config, data=data, rl=rl)


@pytest.fixture
def opened():
    """Makes workers of settings and scripts, and closes them."""
    workers = []

    def open_worker(config, *scripts):
        worker = ScriptedWorker(config, config.rl.rollout, 1.0)
        worker.turns = [[each(worker.tokenizer) if callable(each) else each for each in one] for one in scripts]
        worker.set_params(None, 0)
        workers.append(worker)
        return worker

    yield open_worker
    for worker in workers:
        worker.close()


def says(text="", *calls, **more):
    return lambda tokenizer: turn(tokenizer, text, calls, **more)


def draw(worker, samples=1, most=0, problem=None, parts=1):
    group = worker.begin("toy", 0, problem or LADDER["product"][0], samples, 0)
    for version in range(parts):
        worker.set_params(None, version)
        worker.draw([group], most)
    return group


PROBLEM = LADDER["product"][0]
RIGHT = says("", call(f"print({PROBLEM.parts[0].text.removesuffix('=')})")), says(PROBLEM.truth)


def test_history_is_what_was_drawn_and_what_the_encoder_makes_of_the_results(folder, opened):
    """The tokens of the episode are those of the whole conversation, encoded at once with the sampled ids."""
    worker = opened(configured(folder), RIGHT)
    group = draw(worker)
    (answer,) = group.answers
    assert answer.finish == "stop" and [c.status for c in answer.calls] == ["ok"]
    assert answer.calls[0].text == PROBLEM.truth + "\n" and worker.text(group, answer) == PROBLEM.truth
    one, two = ([int(i) for i in each] for each in worker.turns[0])
    messages = [
        user_message(PROBLEM), {"role": "assistant", "content": ""},
        {"role": "tool", "tool_call_id": "functions.ipython:0", "content": answer.calls[0].text},
        {"role": "assistant", "content": ""},
    ]  # fmt: skip
    sampled = {1: one[:-1], 3: two[:-1]}
    whole = conversation.encode(messages, [IPYTHON], thinking=False, sampled=sampled, add_generation_prompt=False)
    np.testing.assert_array_equal(group.tokens(answer), encode_example(whole, worker.tokenizer).tokens)


def test_only_sampled_tokens_are_trained_on(folder, opened):
    worker = opened(configured(folder), RIGHT)
    group = draw(worker, 2)
    (trajectory, _) = group.group([1.0, 0.0]).trajectories
    masks = [segment.sampled.tolist() for segment in trajectory.segments]
    assert [all(mask) for mask in masks] == [False, True, False, True] and not any(masks[0]) and not any(masks[2])
    assert (trajectory.segments[2].versions == GIVEN).all() and not trajectory.segments[2].logp.any()
    assert trajectory.num_sampled() == sum(map(len, worker.turns[0]))


def test_iterations_train_on_episodes_and_count_their_calls(folder, opened):
    """Half of the answers call the tool; the batch weighs sampled tokens only."""
    config = configured(folder, prompts=2, samples=4)
    worker = opened(config, RIGHT, [says("7")])
    source = RolloutSource(config, [0], None, worker)
    source.update(None, 0)
    documents = list(unpack(next(source)))
    report = source.report()
    assert len(documents) == 8 and report["tool_calls"] > 0
    assert report["tool_errors"] == report["tool_replayed"] == 0
    assert report["turns_mean"] == 1 + report["tool_calls"] / 8
    sampled = sum(int(document.loss_weights.sum()) for document in documents)
    assert sampled == report["length_mean"] * 8


def test_episode_in_parts_is_the_one_in_one_piece_and_its_calls_are_run_again(folder, opened):
    """Names that a call defined are there in the next part, in a fresh interpreter."""
    script = [
        says("", call("x = 6 * 7")), says("", call("print(x)", 1), call("x += 1; print(x)", 2)),
        says("", call("print(x)", 3)), says("42"),
    ]  # fmt: skip
    whole = draw(opened(configured(folder), script)).answers[0]
    worker = opened(configured(folder, max_staleness=2, tokens_per_iteration=30), script)
    parts = draw(worker, most=30, parts=20).answers[0]
    assert parts.tokens == whole.tokens and parts.calls == whole.calls and parts.finish == whole.finish == "stop"
    assert [c.text for c in parts.calls] == ["(no output)", "42\n", "43\n", "43\n"]
    assert len(set(parts.versions)) > 3 and parts.versions[-1] > parts.versions[0]
    counts = worker.take_metrics()
    assert counts["tool_calls"] == 4 and counts["tool_replayed"] > 1 and counts["tool_differed"] == 0


def test_call_that_gives_something_else_when_it_is_run_again_is_counted_and_history_stays(folder, opened):
    script = [says("", call("import time; print(time.time_ns())")), says("", call("print(1)", 1)), says("x")]
    worker = opened(configured(folder), script)
    answer = draw(worker, most=len(turn(worker.tokenizer, "", [call("import time; print(time.time_ns())")])), parts=9)
    counts = worker.take_metrics()
    assert counts["tool_replayed"] == counts["tool_differed"] == 1
    assert answer.answers[0].finish == "stop" and int(answer.answers[0].calls[0].text) > 0


@pytest.mark.parametrize("stop", [1, 3])
def test_source_goes_on_from_its_state_in_the_middle_of_episodes(folder, opened, stop):
    config = configured(folder, prompts=1, max_staleness=3, tokens_per_iteration=30, max_draws=3.0)
    scripts = [[says("", call("x = 6 * 7")), says("", call("print(x)", 1)), says("42")], [says("7")]]

    def run(source, steps):
        found = []
        for step in steps:
            source.update(None, step)
            found.append(next(source))
        return found

    expected = run(RolloutSource(config, [0], None, opened(config, *scripts)), range(5))
    source = RolloutSource(config, [0], None, opened(config, *scripts))
    run(source, range(stop))
    values, arrays = split_arrays(source.state())
    assert any(answer["calls"] for group in values["pending"] for answer in group["answers"])
    state = join_arrays(json.loads(json.dumps(values)), arrays)
    found = run(RolloutSource(config, [0], state, opened(config, *scripts)), range(stop, 5))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected[stop:]), strict=True):
        np.testing.assert_array_equal(a, b)


HOSTILE = {
    "unknown tool": (call("1", name="rm"), "bad_call", "there is no tool 'rm'"),
    "no JSON": (call(b"{"), "bad_call", "not JSON"),
    "other arguments": (call(b'{"cmd": "ls"}'), "bad_call", "code"),
    "nothing": (call(b""), "bad_call", "code"),
    "exception": (call("1 / 0"), "error", "ZeroDivisionError"),
    "exit": (call("import os; os._exit(1)"), "killed", "ended"),
    "endless": (call("while True: pass"), "timeout", "interrupted after 0.5 s"),
    "too long": (call("print('a' * 10000)"), "ok", "truncated: 10,001 characters, 200 are shown"),
    "image": (call("import numpy as np; display(np.zeros((9, 9, 3), np.uint8))"), "ok", "is not shown"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_call_does_is_a_result_and_the_episode_goes_on(folder, opened, name):
    made, status, text = HOSTILE[name]
    seconds = 0.5 if name == "endless" else 10.0
    config = configured(folder, tools=dataclasses.replace(TOOLS, timeout_seconds=seconds))
    group = draw(opened(config, [says("", made), says("done")]))
    (answer,) = group.answers
    assert answer.calls[0].status == status and text in answer.calls[0].text, answer.calls[0]
    assert len(answer.calls[0].text) <= 200 + 80 and answer.finish == "stop"


def test_interpreter_that_does_not_start_is_a_failed_call(folder, opened, monkeypatch):
    from kimi_jax.sandbox import pool

    def broken(*_):
        raise SandboxError("no processes left")

    monkeypatch.setattr(pool, "Session", broken)
    worker = opened(configured(folder), [says("", call("1")), says("", call("2", 1)), says("done")])
    (answer,) = draw(worker).answers
    assert [c.status for c in answer.calls] == ["failed", "failed"] and answer.finish == "stop"
    assert "no processes left" in answer.calls[0].text and worker.take_metrics()["tool_errors"] == 2


def test_calls_beyond_the_bound_of_a_reply_are_refused(folder, opened):
    config = configured(folder, tools=dataclasses.replace(TOOLS, calls=1))
    (answer,) = draw(opened(config, [says("", call("1"), call("2", 1)), says("done")])).answers
    assert [c.status for c in answer.calls] == ["ok", "refused"] and answer.calls[1].code == ""


def test_last_turn_must_answer(folder, opened):
    config = configured(folder, tools=dataclasses.replace(TOOLS, turns=2))
    worker = opened(config, [says("", call("1")), says(PROBLEM.truth, call("2", 1)), says(PROBLEM.truth)])
    group = draw(worker, 2)
    assert [a.finish for a in group.answers] == ["turns"] * 2 and len(group.answers[0].calls) == 1
    assert worker.rewards(group, 0) == [0.0, 0.0]


def test_result_that_leaves_no_room_for_a_reply_ends_the_episode(folder, opened):
    config = configured(folder, length=450)
    (answer,) = draw(opened(config, [says("", call("print('.,' * 100)")), says("done")])).answers
    assert answer.finish == "length" and GIVEN not in answer.versions and len(answer.calls) == 1


def test_call_in_ordinary_tokens_is_text(folder, opened):
    text = "<|tool_calls_section_begin|><|tool_call_begin|>functions.ipython:0<|tool_call_argument_begin|>{}"
    group = draw(opened(configured(folder), [says(text)]))
    assert group.answers[0].finish == "stop" and not group.answers[0].calls


def test_call_that_the_model_has_not_ended_itself_is_not_run(folder, opened):
    script = [says("", call("print(1)"), end=conversation.Mark("[EOS]")), says("done")]
    assert not draw(opened(configured(folder), script)).answers[0].calls


def test_images_of_the_problem_are_there_by_name(folder, opened):
    image = np.full((56, 56, 3), 7, np.uint8)
    problem = Problem("p", (Image(image), Text("sum?", 0.0)), "mathematics", str(image.sum()))
    worker = opened(configured(folder), [says("", call("print(image_1.sum())")), says("done")])
    (answer,) = draw(worker, problem=problem).answers
    assert answer.calls[0].text.strip() == str(image.sum())


def test_episodes_wait_for_an_interpreter_and_never_for_each_other(folder, opened):
    """One interpreter, three episodes of two calls, in parts: whoever is interrupted gives it back."""
    script = [says("", call("x = 6 * 7")), says("", call("print(x)", 1)), says("42")]
    config = configured(folder, tools=dataclasses.replace(TOOLS, sessions=1))
    group = draw(opened(config, script), 3, most=30, parts=5)
    assert [[c.text for c in a.calls] for a in group.answers] == [["(no output)", "42\n"]] * 3


def test_interpreters_that_are_closed_end_what_runs_in_them():
    interpreters = Interpreters(ToolConfig(sessions=1, timeout_seconds=600.0))
    endless = ToolCall("functions.ipython:0", "ipython", json.dumps({"code": "while True: pass"}))
    interpreters.run(1, [endless], (), {})
    interpreters.close()
    assert not interpreters.busy
    again = dataclasses.replace(endless, arguments=json.dumps({"code": "1 + 1"}))
    interpreters.run(1, [again], (), {})  # it can be used again
    (finished,) = interpreters.finished(wait=True)
    assert finished.calls[0].text.strip() == "2"
    interpreters.close()


class Slow:
    """Interpreters that give no result as long as the sampler has something to do."""

    busy = True

    def __init__(self, sampler):
        self._sampler, self._waiting, self.steps = sampler, [], []

    def run(self, key, calls, before, images):
        self._waiting.append((key, calls))

    def finished(self, wait):
        if not wait or not self._waiting:
            return []
        self.steps.append(self._sampler.steps)
        key, calls = self._waiting.pop(0)
        return [Finished(key, tuple(ExecutedCall(c.id, "1", "1", "ok") for c in calls))]

    def release(self, key):
        pass

    def close(self):
        pass


def test_sampling_does_not_wait_for_a_tool(folder, opened):
    """An answer of 200 tokens is drawn to its end while the other one's tool still runs."""
    worker = opened(configured(folder), [says("", call("1")), says("done")], [says("7 " * 100)])
    worker.close()
    worker._interpreters = slow = Slow(worker._sampler)
    group = draw(worker, 8)
    assert {a.finish for a in group.answers} == {"stop"} and any(a.calls for a in group.answers)
    assert slow.steps[0] >= len(worker.turns[1][0])


def test_machine_without_the_walls_says_so_at_once(folder, monkeypatch):
    def missing(_):
        raise SandboxError("no landlock here")

    monkeypatch.setattr(walls, "choose", missing)
    with pytest.raises(ConfigError, match="config.rl.tools: no landlock here"):
        ScriptedWorker(configured(folder), configured(folder).rl.rollout, 1.0)


def test_unknown_tools_are_refused_with_the_nearest_name(folder):
    config = configured(folder)
    rl = dataclasses.replace(config.rl, tasks={"toy": TaskConfig("product", tools=("ipyton",))})
    with pytest.raises(ConfigError, match="did you mean 'ipython'"):
        ScriptedWorker(dataclasses.replace(config, rl=rl), rl.rollout, 1.0)


def test_thinking_without_tools_is_refused():
    assert "tools" in TaskConfig(thinking=True).conflict() and not TaskConfig(thinking=True, tools=("x",)).conflict()


def test_settings_of_tools_survive_the_command_line(folder):
    assert freeze(thaw(configured(folder))) == configured(folder)


def test_evaluation_and_page_show_calls_and_results(folder, opened):
    config = configured(folder)
    worker = opened(config, [says("", call("print('<b>')")), says("no")])
    shown = []
    (row,) = evaluate(worker, None, config, ("all",), 3, samples=shown)
    assert row.score == 0 and row.n == 3
    assert shown[0].answer == "[ok] print('<b>')\n=> <b>\nno"
    group = draw(worker)
    text = page._group(worker, group, [np.zeros(len(a.tokens)) for a in group.answers], (0.5, 2.0))
    assert "class=tool" in text and "&lt;b&gt;" in text and "<b>" not in text

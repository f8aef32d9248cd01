"""Rollouts as batches: what is trained on is what was drawn, bounds hold, and a run that was killed draws the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from kimi_jax.config import ConfigError, LoRAConfig, MeshConfig, RLConfig, TaskConfig
from kimi_jax.data.packing import PackShape, unpack
from kimi_jax.eval.runner import EvalSample, Row
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from kimi_jax.rl import page
from kimi_jax.rl.pending import PendingAnswer
from kimi_jax.rl.rollout import RolloutSource
from kimi_jax.rl.tasks import LADDER, Problem
from kimi_jax.rl.worker import RolloutWorker
from kimi_jax.train.batches import BatchSource, join_arrays, split_arrays
from tests.nn.tiny import QUICK
from tests.rl.tiny_run import TEXT, VISION, settings, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    write_tokenizer(folder)
    return folder


def params_of(model, seed=0):
    return jax.jit(lambda: unbox(init_params(model, jax.random.key(seed))), compiler_options=QUICK)()


@pytest.fixture(scope="module")
def text_params():
    return params_of(TEXT)


def worker_of(config):
    return RolloutWorker(config, config.rl.rollout, config.rl.policy.temperature)


@pytest.fixture(scope="module")
def worker(folder):
    """One engine for all tests of the text model with these settings: it is compiled once."""
    return worker_of(settings(folder))


def open_source(config, worker, state=None, shown=None):
    show = None if shown is None else lambda iteration, groups, rewards: shown.append((iteration, groups, rewards))
    return RolloutSource(config, [0], state, worker, show)


def batches_of(source, params, count):
    found = []
    for step in range(count):
        source.update(params, step)
        found.append(next(source))
    return found


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_source_is_a_batch_source(folder, worker):
    assert isinstance(open_source(settings(folder), worker), BatchSource)


def test_batch_holds_the_tokens_that_were_drawn_with_the_log_probability_of_the_sampler(folder, worker, text_params):
    """Token in, token out: the documents of the batch are prompt and answer as they were drawn, in order."""
    shown = []
    config = settings(folder)
    (batch,) = batches_of(open_source(config, worker, shown=shown), text_params, 1)
    documents = list(unpack(batch))
    answers = [t for group in shown[0][1] for t in group.trajectories]
    assert len(documents) == len(answers) == 8
    drawn = {tuple(np.concatenate([s.tokens for s in t.segments])): t for t in answers}
    for document in documents:
        trajectory = drawn[tuple(document.tokens)]
        given, answer = trajectory.segments
        weighed = document.loss_weights.astype(bool)
        assert weighed.sum() == len(answer.tokens)
        np.testing.assert_array_equal(document.targets[weighed], answer.tokens)
        at = np.s_[document.row, document.start : document.start + len(document.tokens)]
        np.testing.assert_array_equal(batch.columns["logp_sampler"][at][weighed], answer.logp)


def test_advantages_are_rewards_minus_the_mean_of_the_group(folder, worker, text_params):
    shown = []
    (batch,) = batches_of(open_source(settings(folder), worker, shown=shown), text_params, 1)
    expected = sorted(r - np.mean(rewards) for rewards in shown[0][2] for r in rewards)
    firsts = [
        batch.columns["advantage"][d.row, d.start : d.start + len(d.tokens)][d.loss_weights.astype(bool)][0]
        for d in unpack(batch)
    ]
    np.testing.assert_allclose(sorted(firsts), expected, atol=1e-6)  # float32 of float64


def test_rollouts_are_the_same_for_any_number_of_tokens_a_call(folder, worker, text_params):
    """Repetition too ends an answer at one token, wherever the engine reports it."""
    changes = {"max_new_tokens": 20, "repeat_period": 4, "repeat_times": 2}
    found = []
    for tokens_per_call in (1, 5):
        config = settings(folder, **changes, tokens_per_call=tokens_per_call)
        shown = []
        batches_of(open_source(config, worker_of(config), shown=shown), text_params, 1)
        found.append([[(t.finish, s.tokens.tolist()) for t in g.trajectories for s in t.segments] for g in shown[0][1]])
    assert found[0] == found[1]


def test_repetition_ends_an_answer_and_is_worth_nothing(folder):
    config = settings(folder, repeat_period=3, repeat_times=4)
    worker = worker_of(config)
    ends = [[7, 8] * 8, [5] * 16, [1, 2, 3, 4] + [7, 8, 9] * 4]
    # the last ones differ; a longer period; looked for at multiples of 16 only
    goes_on = [[7, 8] * 7 + [7, 9], [7, 8, 9, 10] * 4, [5] * 15]
    for tokens, repeats in [*((t, True) for t in ends), *((t, False) for t in goes_on)]:
        assert worker._repeats(PendingAnswer(0, tokens, [0.0] * len(tokens), [0] * len(tokens))) is repeats, tokens
    given = PendingAnswer(
        0, [*range(8), *[5] * 8], [0.0] * 16, [0] * 8 + [-1] * 8
    )  # what a tool says is no repetition of the model
    assert not worker._repeats(given)


@pytest.mark.parametrize("eta", [0, 1, 3])
def test_no_token_is_older_than_the_bound(folder, worker, text_params, eta):
    """Even if most groups say nothing and are replaced, and with whole answers as with those in parts."""
    for cut in (0, 1) if eta else (0,):
        config = settings(
            folder, max_staleness=eta, tokens_per_iteration=cut, drop_uninformative=True, max_draws=2.0, samples=4
        )
        source = open_source(config, worker)
        ages = []
        for batch in range(5):
            batches_of(source, text_params, 1)
            ages.append({int(age) for age, share in source.report()["staleness"].items() if share > 0})
            assert len(source.state()["pending"]) + len(source.state()["ready"]) <= (eta + 1) * 4, batch
        assert max(max(each, default=0) for each in ages) <= eta


def test_answers_in_parts_are_those_in_one_piece_and_their_tokens_tell_who_drew_them(folder, worker, text_params):
    """With weights that stay: what a cut answer gets next depends on its seed and its tokens alone."""
    whole, cut = [], []
    config = settings(folder)
    batches_of(open_source(config, worker, shown=whole), text_params, 4)
    parts = settings(folder, max_staleness=3, tokens_per_iteration=1)
    batches_of(open_source(parts, worker, shown=cut), text_params, 6)

    def answers(shown):
        groups = [group for _, groups, _ in shown for group in groups]
        return {(group.key, k): t.segments[1] for group in groups for k, t in enumerate(group.trajectories)}

    one, other = answers(whole), answers(cut)
    both = one.keys() & other.keys()
    assert len(both) >= 8
    for key in both:
        np.testing.assert_array_equal(one[key].tokens, other[key].tokens)
        # a prompt of another length is read by another program: rounding of float32
        np.testing.assert_allclose(one[key].logp, other[key].logp, atol=1e-5)
    longest = max(other.values(), key=lambda s: len(s.tokens))
    assert len(longest.tokens) > 1 and (np.diff(longest.versions) >= 0).all()
    assert any(len(set(s.versions.tolist())) > 1 for s in other.values())


@pytest.mark.parametrize("changes", [
    {"updates": 2, "passes": 2},
    {"max_staleness": 2, "tokens_per_iteration": 1, "drop_uninformative": True, "max_draws": 2.0},
    {"sync_interval": 3},
    {"max_staleness": 2, "tokens_per_iteration": 2, "replay_experts": True},
])  # fmt: skip
def test_source_goes_on_from_its_state_with_the_same_batches(folder, worker, text_params, changes):
    """The state travels as JSON and arrays, as in a checkpoint; weights differ from step to step."""
    config = settings(folder, **changes)
    params = [jax.tree.map(lambda x, f=1 + 0.02 * i: x * f, text_params) for i in range(7)]

    def run(source, steps):
        found = []
        for step in steps:
            source.update(params[step], step)
            found.append(next(source))
        return found

    expected = run(open_source(config, worker), range(7))
    for stop in (2, 5):
        source = open_source(config, worker)
        run(source, range(stop))
        values, arrays = split_arrays(source.state())
        state = join_arrays(json.loads(json.dumps(values)), arrays)
        assert_equal(run(open_source(config, worker, state), range(stop, 7)), expected[stop:])


def test_images_of_a_group_lie_in_the_batch_once(folder):
    config = settings(folder, kind="count", model=VISION)
    worker = worker_of(config)
    (batch,) = batches_of(open_source(config, worker), params_of(VISION), 1)
    places = [document.places for document in unpack(batch)]
    assert len(places) == 8 and len(set(places)) == 4
    assert PackShape.of(config.data, config.model).bins == ((16, 8),)


class Fragile(RolloutWorker):
    """Fails to draw the first answer of every group whose index is even."""

    def draw(self, groups, most=0, greedy=False):
        super().draw(groups, most, greedy)
        for group in groups:
            if group.index % 2 == 0:
                group.answers[0].finish = "error"


def test_group_that_could_not_be_drawn_is_counted_and_replaced(folder, text_params):
    config = settings(folder, max_draws=4.0)
    source = open_source(config, Fragile(config, config.rl.rollout, 1.0))
    (batch,) = batches_of(source, text_params, 1)
    assert len(list(unpack(batch))) == 8
    assert source.report()["failed"] >= 3


def test_iteration_without_any_difference_in_reward_has_no_advantages(folder, worker, text_params):
    """All-or-nothing rewards of an untrained model: nothing is learned, and nothing fails."""
    config = settings(folder, kind="reverse_sparse", drop_uninformative=True)
    source = open_source(config, worker)
    (batch,) = batches_of(source, text_params, 1)
    assert not batch.columns["advantage"].any() and batch.loss_weights.any()
    assert source.report()["solve_none"] == 1.0 and source.report()["dropped"] == 4


def test_penalty_meets_answers_that_were_cut_off(folder, text_params):
    config = settings(folder, truncation_penalty=-0.5)
    shown = []
    batches_of(open_source(config, worker_of(config), shown=shown), text_params, 1)
    for group, rewards in zip(shown[0][1], shown[0][2], strict=True):
        for trajectory, reward in zip(group.trajectories, rewards, strict=True):
            assert reward == (-0.5 if trajectory.finish == "length" else trajectory.reward)


def test_problems_of_a_finite_task_come_once_an_epoch(folder, worker, tmp_path):
    lines = [{"q": f"copy: {s} =", "a": s} for s in "abcde"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TaskConfig("jsonl", path=str(tmp_path / "p.jsonl"), prompt="{{q}}", truth="{{a}}", verifier="exact")
    config = dataclasses.replace(settings(folder), rl=RLConfig({"mine": task}))
    source = open_source(config, worker)
    for epoch in range(2):
        assert sorted(source._problem("mine", 5 * epoch + i).truth for i in range(5)) == list("abcde")


@pytest.mark.parametrize("change, message", [
    (lambda c: dataclasses.replace(c, rl=None), "config.rl.tasks is empty"),
    (lambda c: dataclasses.replace(c, rl=RLConfig({"x": TaskConfig("cuont")})), "did you mean 'count'"),
    (lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, rows_per_pack=1)), "found no room in 1 packs"),
])  # fmt: skip
def test_settings_that_cannot_work_are_one_sentence(folder, worker, text_params, change, message):
    with pytest.raises(ConfigError, match=message):
        batches_of(open_source(change(settings(folder)), worker), text_params, 1)


def test_adapters_are_refused(folder):
    config = dataclasses.replace(settings(folder), lora=LoRAConfig(base="x"))
    with pytest.raises(ConfigError, match="config.lora"):
        worker_of(config)


def test_state_of_other_tasks_is_refused(folder, worker):
    state = open_source(settings(folder), worker).state()
    other = dataclasses.replace(settings(folder), rl=RLConfig({"other": TaskConfig("copy")}))
    with pytest.raises(ConfigError, match="use another workdir"):
        open_source(other, worker, state)


def test_prompt_that_leaves_no_room_is_counted_and_another_one_taken(folder, worker):
    class Long:
        def __len__(self):
            return 1 << 30

        def __getitem__(self, index):
            problem = LADDER["copy"][index]
            text = dataclasses.replace(problem.parts[0], text=problem.parts[0].text * (40 if index % 2 else 1))
            return Problem(problem.key, (text,), problem.verifier, problem.truth)

    source = open_source(settings(folder), worker)
    source._tasks = {"toy": Long()}
    groups = [source._begin() for _ in range(4)]
    assert [g.index for g in groups] == [0, 2, 4, 6] and source.report()["unfit"] == 3


def test_rollouts_on_a_mesh_are_those_of_one_device(folder, worker, text_params):
    one, other = [], []
    config = settings(folder)
    batches_of(open_source(config, worker, shown=one), text_params, 1)
    from kimi_jax.sharding import make_mesh

    meshed = RolloutWorker(config, config.rl.rollout, 1.0, make_mesh(MeshConfig(8)))
    batches_of(open_source(config, meshed, shown=other), text_params, 1)
    for a, b in zip(one[0][1], other[0][1], strict=True):
        for s, t in zip(a.trajectories, b.trajectories, strict=True):
            np.testing.assert_array_equal(s.segments[1].tokens, t.segments[1].tokens)
            np.testing.assert_allclose(s.segments[1].logp, t.segments[1].logp, atol=1e-5)  # order of float32 sums


def test_scores_of_the_weights_that_drew_are_the_recorded_ones(folder, text_params):
    config = settings(folder)
    worker = worker_of(config)
    worker.set_params(text_params, 0)
    groups = [worker.begin("toy", i, LADDER["copy"][i], 3, 0) for i in range(2)]
    worker.draw(groups)
    for group, logp in zip(groups, worker.score(groups), strict=True):
        for answer, found in zip(group.answers, logp, strict=True):
            np.testing.assert_allclose(found, answer.logp, atol=1e-5)  # read in pieces instead of token by token


def test_page_shows_problems_and_marks_tokens_and_takes_answers_for_text(folder, text_params):
    config = settings(folder)
    worker = worker_of(config)
    other = jax.tree.map(lambda x: 3 * x, text_params)
    groups = page.rollouts(worker, config, text_params, other)
    assert len(groups) == page.GROUPS and "class=low" not in groups[0]
    assert any('class="low"' in group or 'class="high"' in group for group in groups)
    hostile = "<script>alert(1)</script>"
    row = Row("toy", "copy", "text", "reward", 0.5, 0.1, 0.1, "next answer", 0.2, 9)
    shown = EvalSample("toy", hostile, "a", hostile, "b", False, ())
    text = page.page({n: [row] for n in page.NAMES}, {n: [shown] for n in page.NAMES}, groups, (0.5, 2.0))
    assert "0.500 ± 0.100" in text and hostile not in text and "&lt;script&gt;" in text


def test_experts_of_the_sampler_are_in_the_batch_for_every_token_that_was_read(folder, text_params):
    """Of whole answers and of those in parts, prompts that a group shares included; the last token was never read."""
    for changes in ({}, {"max_staleness": 2, "tokens_per_iteration": 1, "max_draws": 3.0}):
        config = settings(folder, replay_experts=True, **changes)
        source = open_source(config, worker_of(config))
        for batch in batches_of(source, text_params, 3):
            for document in unpack(batch):
                rows = np.s_[document.start : document.start + len(document.tokens)]
                experts = batch.routed_experts[document.row][:, rows]
                assert (experts[:, :-1] >= 0).all() and (experts[:, -1] == -1).all()

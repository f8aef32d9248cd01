"""Tasks: the same number is the same problem, the truth scores one, the image is needed, files are checked at once."""

import json
import pickle

import numpy as np
import pytest

from kimi_jax.config import ConfigError
from kimi_jax.data.example import Image, Text
from kimi_jax.data.sources import demo_count
from kimi_jax.rl import tasks
from kimi_jax.rl.tasks import LADDER, JsonlProblems, Problem, ReasoningGym


def truth_of(problem):
    return problem.truth if isinstance(problem.truth, str) else json.dumps(problem.truth)


@pytest.mark.parametrize("name", LADDER)
def test_ladder_is_deterministic_varied_and_solved_by_its_truth(name):
    task = LADDER[name]
    problems = [task[i] for i in range(40)]
    assert all(p.reward(truth_of(p)) == 1 for p in problems)
    assert len({p.key for p in problems}) == 40 and len({truth_of(p) for p in problems}) > 3
    again = pickle.loads(pickle.dumps(task))[7]
    assert again.key == problems[7].key and truth_of(again) == truth_of(problems[7])
    for a, b in zip(again.parts, problems[7].parts, strict=True):
        np.testing.assert_array_equal(a.image, b.image) if isinstance(a, Image) else None
        assert isinstance(a, Image) or (a == b and a.loss_weight == 0)


def test_splits_differ():
    train, validation = (tasks.Symbols("reverse", 8, split=s) for s in ("train", "validation"))
    assert sum(train[i].truth == validation[i].truth for i in range(20)) == 0
    with pytest.raises(ConfigError, match="no split"):
        tasks.ModularSum("test")


def test_dense_reverse_pays_for_parts_and_sparse_does_not():
    dense, sparse = LADDER["reverse"][3], LADDER["reverse_sparse"][3]
    assert dense.truth == sparse.truth
    symbols = dense.truth.split()
    wrong = " ".join([*symbols[:3], "z"])
    assert dense.reward(wrong) == 0.75 and sparse.reward(wrong) == 0


@pytest.mark.parametrize("count", range(1, demo_count.MAX_COUNT + 1))
def test_rendered_discs_can_be_counted(count):
    """As many connected dark regions as discs, whatever the draw."""
    from scipy import ndimage

    for seed in range(20):
        image = demo_count.render_blobs(count, np.random.default_rng(seed))
        assert image.shape == (demo_count.SIDE, demo_count.SIDE, 3) and image.dtype == np.uint8
        assert ndimage.label((image < 150).all(-1))[1] == count


def test_blank_takes_only_the_image_away():
    problem = LADDER["count"][5]
    control = tasks.blank(problem)
    assert (np.asarray(control.parts[0].image) == 255).all() and control.parts[1:] == problem.parts[1:]
    assert np.asarray(control.parts[0].image).shape == np.asarray(problem.parts[0].image).shape
    assert control.truth == problem.truth


def test_real_digits_are_read_by_edit_distance():
    task = tasks.ReadDigits("validation")
    problems = [task[i] for i in range(12)]
    assert {len(p.truth.split()) for p in problems} >= {1, 2, 3}
    assert all(p.reward(p.truth) == 1 and p.reward("") < 1 for p in problems)


# ---------------------------------------------------------------------------------------------------------------- JSONL


def jsonl(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_jsonl_with_templates_and_a_marker(tmp_path):
    path = jsonl(
        tmp_path, {"question": "1+1?", "answer": "one and one #### 2"}, "", {"question": "2+3?", "answer": "#### 5"}
    )
    task = JsonlProblems(path, "Q: {{question}}\nA:", "{{ answer }}", "mathematics", after="####")
    assert len(task) == 2 and task[1].parts == (Text("Q: 2+3?\nA:", 0.0),)
    assert task[0].reward("2.0") == 1 and task[0].reward("3") == 0
    assert task[1].key.endswith("problems.jsonl:3")


def test_jsonl_with_raw_truths(tmp_path):
    path = jsonl(tmp_path, {"q": "where?", "boxes": [[0, 0, 2, 2]]})
    assert JsonlProblems(path, "{{q}}", "boxes", "boxes", raw=True)[0].reward("[[0, 0, 2, 2]]") == 1


@pytest.mark.parametrize(("lines", "settings", "match"), [
    (["{"], {}, r"jsonl:1 is not JSON"),
    ([{"q": "x", "a": "1"}, [1]], {}, r"jsonl:2 must hold a JSON object"),
    ([{"q": "x"}], {}, r"jsonl:1 has no text or number 'a'"),
    ([{"q": "x", "a": None}], {}, r"no text or number 'a'"),
    ([{"q": "x", "a": "1"}], {"verifier": "magic"}, "no verifier 'magic'"),
    ([{"q": "x", "a": "1"}], {"verifier": "count"}, "truth is a count"),
    ([{"q": "x", "a": "1"}], {"truth": "b", "raw": True}, "no field 'b'"),
    ([""], {}, "no lines"),
])  # fmt: skip
def test_jsonl_that_is_none_is_refused_with_its_line(tmp_path, lines, settings, match):
    arguments = {"prompt": "{{q}}", "truth": "{{a}}", "verifier": "exact", **settings}
    with pytest.raises(ConfigError, match=match):
        JsonlProblems(jsonl(tmp_path, *lines), **arguments)


def test_fields_are_not_templates_again(tmp_path):
    path = jsonl(tmp_path, {"q": "{{a}}", "a": "secret"})
    assert JsonlProblems(path, "{{q}}", "{{a}}", "exact")[0].parts[0].text == "{{a}}"


def test_problem_checks_its_truth():
    with pytest.raises(ValueError, match="truth is a count"):
        Problem("p", (Text("x"),), "count", "3")


# -------------------------------------------------------------------------------------------------------- reasoning-gym


@pytest.mark.parametrize("family", tasks.GYM)
def test_reasoning_gym_answers_score_one_and_partial_copies_do_not(family):
    """Their own scorer pays for an answer that contains the right one; ours does not."""
    pytest.importorskip("reasoning_gym", reason="package reasoning-gym")
    task = ReasoningGym(family, size=5, seed=3)
    for i in range(5):
        problem = task[i]
        assert problem.reward(problem.truth) == 1 and problem.reward(problem.truth + " or something else") == 0
    assert [task[i].truth for i in range(5)] == [ReasoningGym(family, 5, 3)[i].truth for i in range(5)]


def test_reasoning_gym_families_without_a_verifier_are_refused():
    with pytest.raises(ConfigError, match="countdown"):
        ReasoningGym("countdown")

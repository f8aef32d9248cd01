"""The registry, and what the controls take away."""

import numpy as np
import pytest

from kimi_jax.data.example import Image, Text, Video
from kimi_jax.eval import tasks
from kimi_jax.eval.tasks import COLUMNS, Control, EvalTask, Question

EVERY = [*tasks.resolve("all"), *(task for task in tasks.TASKS.values() if task.only_by_name)]


def media(question, kind):
    return [p for p in question.context if isinstance(p, kind)]


def test_every_column_of_table_1_and_video_and_held_out_text_has_a_task():
    assert {t.column for t in EVERY} == set(COLUMNS)
    assert {t.kind for t in EVERY} == {"choice", "generate", "text"}
    for column in ("vision_knowledge", "vision_reasoning", "ocr"):
        assert all(t.controls[0].name == "blank image" for t in EVERY if t.column == column)


@pytest.mark.parametrize("task", EVERY, ids=lambda t: t.name)
def test_questions_are_fixed_well_formed_and_chance_is_right(task):
    questions = task.build(40)
    assert 30 <= len(questions) <= 40
    again = task.build(12)
    assert [q.gold for q in again] == [q.gold for q in questions[:12]]
    for question in questions:
        assert question.gold.strip()
        if task.kind == "choice":
            assert (
                question.choices.count(question.gold) == 1 == len({c for c in question.choices if c == question.gold})
            )
            assert len(set(question.choices)) == len(question.choices)
    if task.kind == "choice":
        # a random guesser's expectation
        expected = np.mean([1 / len(q.choices) for q in questions])
        np.testing.assert_allclose(task.chance(questions, "accuracy"), expected)
    assert len(task.doc) > 80 and task.controls
    modality = {"image": Image, "video": Video}.get(task.modality)
    assert all(bool(modality) == bool(q.context and isinstance(q.context[0], modality or int)) for q in questions)


@pytest.mark.parametrize("task", [t for t in EVERY if t.kind == "choice"], ids=lambda t: t.name)
def test_right_answer_has_no_favourite_place(task):
    """Where the gold stands among shuffled choices (4 places, 200 questions): no place has more than 40 %."""
    questions = task.build(200)
    if len(questions[0].choices) == 4 and questions[0].choices != questions[1].choices:
        places = np.bincount([q.choices.index(q.gold) for q in questions], minlength=4)
        assert places.max() < 0.4 * len(questions)


def test_capital_distractors_are_of_the_same_region_and_the_control_hides_the_country():
    task = tasks.TASKS["factbook_capital"]
    questions = {q.cluster: q for q in task.build(1000)}
    france = questions["France"]
    assert france.gold == " Paris." and "France" in france.context[0].text
    assert not {" Tokyo.", " Lima.", " Nairobi."} & set(france.choices)
    hidden = task.controls[0].change(france, 0)
    assert hidden.choices == france.choices and "France" not in hidden.context[0].text


def test_arithmetic_asks_only_held_out_pairs():
    from kimi_jax.data.sources.demo_text import operand_pairs

    trained = set(operand_pairs("train"))
    for question in tasks.TASKS["arithmetic"].build(1000):
        a, _, b, *_ = question.shown.split()
        assert (int(a), int(b)) not in trained and (int(b), int(a)) not in trained
        assert eval(question.shown.split(" =")[0]) == int(question.gold)


def test_blank_image_has_the_size_and_nothing_else():
    question = tasks.TASKS["digit_string"].build(3)[2]
    blank = tasks.blank_image(question, 0)
    (before,), (after,) = media(question, Image), media(blank, Image)
    assert np.asarray(before.image).shape == np.asarray(after.image).shape
    assert np.ptp(np.asarray(before.image)) > 100 and np.ptp(np.asarray(after.image)) == 0
    assert [p for p in blank.context if isinstance(p, Text)] == [p for p in question.context if isinstance(p, Text)]


def test_video_controls_keep_one_frame_or_all_in_another_order():
    question = tasks.TASKS["video_direction"].build(2)[1]
    (video,) = media(question, Video)
    (one,) = media(tasks.single_frame(question, 0), Video)
    assert len(one.frames) == len(one.timestamps) == 1
    np.testing.assert_array_equal(one.frames[0], video.frames[0])
    (mixed,) = media(tasks.shuffled_frames(question, 0), Video)
    assert list(mixed.timestamps) == list(video.timestamps)
    assert sorted(f.tobytes() for f in map(np.asarray, mixed.frames)) == sorted(
        f.tobytes() for f in map(np.asarray, video.frames)
    )
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(mixed.frames, video.frames, strict=True))


def test_shuffled_orders_say_nothing_about_the_direction_on_average():
    for seed in range(30):
        order = tasks.balanced_order(4, np.random.default_rng(seed))
        assert sum(order[i] > order[j] for i in range(4) for j in range(i + 1, 4)) == 3


def test_unknown_tasks_and_bad_registrations_are_refused():
    with pytest.raises(KeyError, match="wiki_bpb"):
        tasks.resolve("wiki_bbp")
    with pytest.raises(ValueError, match="already"):
        tasks.register(tasks.TASKS["wiki_bpb"])
    plain = {"modality": "text", "doc": "", "build": lambda n: [Question((), "x")], "chance": lambda q, m: 0.0}
    with pytest.raises(ValueError, match="no control"):
        tasks.register(EvalTask("t", "code", kind="choice", metrics=("accuracy",), controls=(), **plain))
    with pytest.raises(ValueError, match="metrics"):
        tasks.register(EvalTask("t", "code", kind="choice", metrics=("bits",), controls=(Control("c"),), **plain))

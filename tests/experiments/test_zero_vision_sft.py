"""The zero-vision experiment: programs that see, new questions, replies taken apart, rows that can be compared."""

import json

import numpy as np
import pytest

from experiments import harness
from experiments.harness import CONFIRMED
from experiments.zero_vision_sft import EXPERIMENT, TRAINED, asking, check, data, programs, scenes
from experiments.zero_vision_sft.asking import Said
from kimi_jax.config_check import check_run
from kimi_jax.data.bins import check_bins
from kimi_jax.data.reply import Reply
from kimi_jax.data.sources.demo_base import generator

QUESTIONS = [scenes.asked("test", "validation", i) for i in range(64)]


def test_programs_answer_every_kind_of_question_from_pixels():
    for question in QUESTIONS:
        found = eval(question.program, {**vars(programs), "image_1": question.scene.image})
        assert str(found) == question.answer, (question.scene.words, question.question)


def test_questions_are_of_every_kind_and_counts_take_turns():
    assert [q.kind for q in QUESTIONS[:4]] == list(scenes.KINDS)
    counts = [q.answer for q in QUESTIONS if q.kind == "count"]
    assert {counts.count(str(n)) for n in range(4)} == {4}


def test_scene_in_words_names_what_is_drawn_where():
    for i in range(20):
        shown = scenes.scene(generator("words", "validation", i))
        for colour in programs.COLOURS:
            things = [thing.place for thing in shown.things if thing.colour == colour]
            assert sorted(programs.quadrants(shown.image, colour)) == sorted(things)


def test_text_vision_sft_never_asks_what_is_asked_afterwards():
    """No question of it begins as those do: how many, where, which is bigger, which number."""
    beginnings = {" ".join(q.question.split()[:2]) for q in QUESTIONS}
    assert beginnings == {"how many", "where is", "which is", "which number"}
    for templates in (data.FEW, data.MANY):
        visual = {scenes.asked_visually("train", i, templates).question for i in range(100)}
        assert not {v for v in visual if " ".join(v.split()[:2]) in beginnings}


@pytest.mark.parametrize("templates", [data.FEW, data.MANY])
def test_visual_answers_are_true(templates):
    for i in range(40):
        question = scenes.asked_visually("train", i, templates)
        if question.answer in ("yes", "no"):
            kind = question.question.strip("?").split()[-1]
            assert (kind in question.scene.words) == (question.answer == "yes")
        else:
            assert question.answer in question.scene.words


def test_story_says_the_scene_twice_and_what_is_true():
    for i in range(30):
        text = scenes.story(i)
        first, again = text.removeprefix("scene: ").split(". again: ")
        assert again.startswith(first)
        if "the number is" in again:
            assert f" {again.split('the number is ')[1][0]} at " in first


def test_conversations_hold_images_only_where_they_are_meant_to(tmp_path):
    for name, row in data.ROWS.items():
        made = json.dumps(row(3, tmp_path))
        assert ('"image"' in made) == (name in ("captions", "few", "many"))


def reply(content, finished=True):
    return Reply(content=content, finished=finished)


def test_reply_is_taken_apart_only_if_it_has_the_form_that_was_taught():
    question = QUESTIONS[0]
    right = data.reply(question.scene.words, question.answer)
    assert Said.of(reply(right)) == Said(question.scene.words, question.answer)
    for wrong in (reply(right, finished=False), reply(question.answer), reply("so: 2")):
        assert Said.of(wrong) == Said(None, None)


def test_format_reading_and_answer_are_scored_apart():
    first = QUESTIONS[0]
    wrong = "a big red circle at top left"
    assert all(wrong != thing.words for thing in first.scene.things)
    said = [Said(first.scene.words, "none"), Said(wrong, first.answer), Said(None, None), Said(wrong, "none")]
    found = asking.scores("image", [first] * 4, said)
    assert found["image/format"] == (0.75, 4) and found["image/scene"] == (0.25, 4)
    assert found["image/correct"] == (0.25, 4) and found["image/things"] == (0.25, 4)


def test_things_are_scored_by_how_many_of_them_are_named():
    shown = next(q for q in QUESTIONS if len(q.scene.things) == 2)
    one = shown.scene.things[0].words
    assert asking.things_read(one, shown) == pytest.approx(2 / 3)
    assert asking.things_read(shown.scene.words, shown) == 1.0 and asking.things_read(None, shown) == 0.0


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_rows_are_settings_of_a_run_and_take_equally_many_steps(scale):
    steps = set()
    for row in TRAINED:
        for seed in (0, 3):
            config = EXPERIMENT.config(row, seed, scale)
            check_run(config)
            check_bins(config.data, config.model)
            steps.add(config.steps)
            assert config.init_from.path.endswith(f"{scale}/{row.split('_')[1]}-{seed // 3}")
            assert any(s.vision for s in config.data.sources.values()) == (not row.startswith("zero"))
    assert len(steps) == 1


def table(changes):
    """Scores of the rows, 0.5 but for `changes`, with seeds that differ among themselves."""
    names = [score.task for score in EXPERIMENT.scores] + [
        score.control for score in EXPERIMENT.scores if score.control
    ]
    records = [
        {"row": row, "seed": seed, "task": task, "step": 100, "n": 1,
         "score": changes.get((row, task), changes.get(task, 0.5)) + 0.01 * seed + 0.002 * np.sin(seed + len(row))}
        for row in EXPERIMENT.rows for seed in EXPERIMENT.seeds for task in names
    ]  # fmt: skip
    return harness.ResultsTable(EXPERIMENT, "cpu", records)


def test_planted_effects_are_confirmed_and_none_is_not():
    planted = table({("zero_high", "image/correct"): 0.7, ("zero_high", "words/correct"): 0.95})
    first, sees, few = EXPERIMENT.claims[0], EXPERIMENT.claims[2], EXPERIMENT.claims[5]
    for claim in (first, sees, few):
        assert claim.judge(planted).outcome == CONFIRMED, claim.text
        assert claim.judge(table({})).outcome != CONFIRMED, claim.text


def test_rows_of_unequal_tokens_are_refused():
    assert check(table({"tokens": 1000.0}))
    with pytest.raises(ValueError, match="differ by"):
        check(table({"tokens": 1000.0, ("few_high", "tokens"): 900.0}))

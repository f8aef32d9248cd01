"""Tasks with images and video."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kimi_jax.data.example import Image, Text, Video
from kimi_jax.data.sources import demo_image as images
from kimi_jax.data.sources import demo_video as videos
from kimi_jax.data.sources.demo_base import generator, prompt, reply
from kimi_jax.eval import scorers
from kimi_jax.eval.tasks import (
    Control,
    EvalTask,
    Question,
    blank_image,
    register,
    shuffled,
    shuffled_frames,
    single_frame,
)

BLANK = Control("blank image", change=blank_image)


def answer(text: str) -> str:
    """An answer without the new line that ends it: what is compared by likelihood."""
    return reply(text).rstrip("\n")


def ask(media: Image | Video, question: str, gold: str, choices: tuple[str, ...], cluster: str) -> Question:
    """A question about one image or video, in the form of the training documents."""
    context = (media, Text("\n", 0.0), Text(prompt(question), 0.0))
    return Question(context, answer(gold), tuple(map(answer, choices)), question, cluster)


# ------------------------------------------------------------------------------------------------------------- easy-VQA


def _vqa(limit: int, answers: tuple[str, ...]) -> list[Question]:
    asked = [(r.image, q, a) for r in images.vqa_records("validation") for q, a in r.questions if a in answers]
    return [
        ask(Image(images.vqa_image("validation", k)), question, gold, answers, f"image {k}")
        for k, question, gold in shuffled(asked, limit)
    ]


register(
    EvalTask(
        name="easyvqa_open",
        column="vision_knowledge",
        modality="image",
        kind="choice",
        metrics=("accuracy",),
        doc="easy-VQA's test images at their native 64 x 64, questions that are not answered by yes or no: shape and "
        "colour. Likelihood of the 3 shapes and 8 colours. Control: a white image.",
        build=lambda limit: _vqa(limit, images.VQA_ANSWERS),
        chance=lambda questions, metric: 1 / len(images.VQA_ANSWERS),
        controls=(BLANK,),
        report_majority=True,
    )
)
register(
    EvalTask(
        name="easyvqa_yesno",
        column="vision_reasoning",
        modality="image",
        kind="choice",
        metrics=("accuracy",),
        doc="easy-VQA's test images, yes/no questions (is there, is there not, contains a shape or colour). Likelihood "
        "of the two answers. The wording alone gives away more than half: read it against its control, a white image.",
        build=lambda limit: _vqa(limit, ("yes", "no")),
        chance=lambda questions, metric: 0.5,
        controls=(BLANK,),
        report_majority=True,
    )
)

# --------------------------------------------------------------------------------------------------------------- digits


def _digit_names(limit: int) -> list[Question]:
    glyphs, labels = images.digits("validation")
    names = tuple("0123456789")
    return [
        ask(
            Image(images.eval_digits(glyphs[k : k + 1], k)), images.NAME_QUESTION, names[labels[k]], names, f"digit {k}"
        )
        for k in shuffled(range(len(labels)), limit)
    ]


def _digit_pairs(limit: int) -> list[Question]:
    glyphs, labels = images.digits("validation")
    questions: list[Question] = []
    for i in range(limit):
        rng = generator("digit_compare", "validation", i)
        pair = rng.integers(len(labels), size=2)
        while labels[pair[0]] == labels[pair[1]]:
            pair = rng.integers(len(labels), size=2)
        gold = "left" if labels[pair[0]] > labels[pair[1]] else "right"
        media = Image(images.eval_digits(glyphs[pair], i))
        questions.append(ask(media, images.COMPARE_QUESTION, gold, ("left", "right"), f"pair {i}"))
    return questions


def _digit_strings(limit: int) -> list[Question]:
    glyphs, labels = images.digits("validation")
    questions = []
    for i in range(limit):
        chosen = generator("digit_string", "validation", i).integers(len(labels), size=2 + i % 3)
        media = Image(images.eval_digits(glyphs[chosen], i))
        questions.append(ask(media, images.READ_QUESTION, images.spell(labels[chosen]), (), f"string {i}"))
    return questions


register(
    EvalTask(
        name="digit_name",
        column="vision_knowledge",
        modality="image",
        kind="choice",
        metrics=("accuracy",),
        doc="Held-out scanned handwritten digits (UCI set in scikit-learn) at 28, 35 and 42 pixels; likelihood of the "
        "ten names. Control: a white image.",
        build=_digit_names,
        chance=lambda questions, metric: 0.1,
        controls=(BLANK,),
        report_majority=True,
    )
)
register(
    EvalTask(
        name="digit_compare",
        column="vision_reasoning",
        modality="image",
        kind="choice",
        metrics=("accuracy",),
        doc="Two different held-out handwritten digits side by side: which one is larger? Likelihood of left and "
        "right. Control: a white image.",
        build=_digit_pairs,
        chance=lambda questions, metric: 0.5,
        controls=(BLANK,),
        report_majority=True,
    )
)


def _string_chance(questions: Sequence[Question], metric: str) -> float:
    """Exact: a random string of the right length. Similarity: each right answer against the next one."""
    golds = [q.gold for q in questions]
    if metric == "exact_match":
        return float(np.mean([10.0 ** -len(gold.split()) for gold in golds]))
    return float(np.mean([scorers.edit_similarity(a, b) for a, b in zip(golds, golds[1:] + golds[:1], strict=True)]))


register(
    EvalTask(
        name="digit_string",
        column="ocr",
        modality="image",
        kind="generate",
        metrics=("exact_match", "edit_similarity"),
        doc="Strings of two to four held-out handwritten digits, images of many widths; greedy generation. Scored by "
        "exact match and by 1 - edit distance over length. Control: a white image.",
        build=_digit_strings,
        chance=_string_chance,
        controls=(BLANK,),
        max_new_tokens=9,  # four digits, four spaces, the new line
    )
)

# ---------------------------------------------------------------------------------------------------------------- video


def _directions(limit: int) -> list[Question]:
    glyphs, labels = images.digits("validation")
    background = videos.clip(videos.CLIPS["validation"][0])
    questions = []
    for i in range(limit):
        rng = generator("video_direction", "validation", i)
        direction = videos.DIRECTIONS[i % 4]
        frames = videos.moving_digit(background, glyphs[rng.integers(len(labels))], direction, 4, videos.SIZE, rng)
        media = Video(list(np.asarray(frames)), videos.timestamps(4))
        questions.append(ask(media, videos.DIRECTION_QUESTION, direction, videos.DIRECTIONS, f"video {i}"))
    return questions


register(
    EvalTask(
        name="video_direction",
        column="video",
        modality="video",
        kind="choice",
        metrics=("accuracy",),
        doc="A held-out handwritten digit moves left, right, up or down over four frames of a held-out real clip; its "
        "first frame shows it anywhere, whatever the direction. Likelihood of the four answers. Controls: the first "
        "frame only; the four frames in an order with three of six pairs reversed, which still tells the axis.",
        build=_directions,
        chance=lambda questions, metric: 0.25,
        controls=(Control("single frame", change=single_frame), Control("shuffled frames", change=shuffled_frames)),
        report_majority=True,
    )
)

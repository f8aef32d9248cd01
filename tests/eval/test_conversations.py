"""Image questions in conversations: what is asked, format and correctness apart, and a page that strangers' text cannot
break."""

import numpy as np
import pytest

from kimi_jax.data.sources.demo_image import VQA_ANSWERS
from kimi_jax.eval import conversations
from kimi_jax.eval.conversations import ImageAnswer, ImageQuestion, ask, page, questions_of, score
from tests.serve.server import load_checkpoint

ASKED = [ImageQuestion(k, "what shape is shown?", gold) for k, gold in enumerate(("circle", "red", "blue", "circle"))]


def test_format_and_correctness_are_scored_apart():
    answers = [
        ImageAnswer("circle", True),
        ImageAnswer("blue", True),
        ImageAnswer("blue", False),
        ImageAnswer("a circle", True),
    ]
    found = score("m", "as it is", ASKED, answers)
    assert (found.well_formed, found.correct, found.n) == (0.5, 0.25, 4)
    assert found.stderr == pytest.approx(np.sqrt(0.25 * 0.75 / 4))


def test_questions_are_held_out_and_have_one_word_answers():
    asked = questions_of(40)
    assert len(asked) == 40 and asked == questions_of(40) and {q.gold for q in asked} <= set(VQA_ANSWERS)


def test_page_escapes_what_models_write():
    answers = {"before": [ImageAnswer("<script>alert(1)</script>", False)], "after": [ImageAnswer("circle", True)]}
    text = page([score("m", "as it is", ASKED[:1], answers["after"])], ASKED[:1], answers)
    assert "<script>" not in text and "&lt;script&gt;" in text and "(not ended)" in text
    assert text.count("data:image/png;base64,") == 1 and "<code>circle</code>" in text


def test_conversations_are_asked_of_a_real_engine(tmp_path, monkeypatch):
    """Random weights: the answers are nonsense and bounded, and a white image is another prompt."""
    model = load_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(conversations, "TOKENS_OF_AN_ANSWER", 3)
    answers = ask(model, questions_of(2))
    assert len(answers) == 2 and all(len(answer.text.encode()) < 100 for answer in answers)
    assert len(ask(model, questions_of(2), blank=True)) == 2

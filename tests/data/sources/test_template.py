"""Templates: text, columns, kinds and loss marks; every mistake is an error of the config."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.config import ConfigError
from kimi_jax.data.example import Text
from kimi_jax.data.sources.record import Media
from kimi_jax.data.sources.template import Column, check_columns, parse_template, split_path


def test_question_and_answer():
    """Loss starts at 0 when there is a mark, neighbouring text of one weight is one part, media keep their place."""
    template = parse_template("{image:photo}Q: {question} A:{loss=1} {answer}")
    assert template.columns == (Column("photo", "image"), Column("question"), Column("answer"))
    photo = Media("image", "x", data=b"")
    parts = template.fill({template.columns[0]: photo, Column("question"): "why?", Column("answer"): "so."})
    assert parts == (photo, Text("Q: why? A:", 0.0), Text(" so.", 1.0))


def test_without_a_mark_everything_counts():
    template = parse_template("{a}, {b}")
    assert template.fill({Column("a"): "x", Column("b"): None}) == (Text("x, ", 1.0),)


def test_lists_of_media_stand_in_turn():
    template = parse_template("{images}.")
    photos = [Media("image", str(i), data=b"") for i in range(3)]
    assert template.fill({Column("images"): photos}) == (*photos, Text(".", 1.0))


@given(st.text())
def test_braces_double(text):
    """Any literal text can be written."""
    literal = text.replace("{", "{{").replace("}", "}}")
    assert parse_template(literal + "{a}").fill({Column("a"): None}) == ((Text(text, 1.0),) if text else ())


@pytest.mark.parametrize(
    "bad", ["", "no column", "{a", "a}", "{}", "{a!r}", "{a:>10}", "{audio:a}", "{loss=x}{a}", "{loss=-1}{a}"]
)
def test_mistakes_are_errors(bad):
    with pytest.raises(ConfigError, match="template"):
        parse_template(bad)


@given(st.text())
def test_any_text_is_a_template_or_an_error(text):
    with contextlib.suppress(ConfigError):
        parse_template(text)


def test_paths():
    """Everything behind `?template=` belongs to it, question marks and equal signs too."""
    path, template = split_path("a/b.parquet?template={q}? yes=no", "")
    assert path == "a/b.parquet"
    assert template.source == "{q}? yes=no"
    assert split_path("a/b.parquet", "") == ("a/b.parquet", None)
    with pytest.raises(ConfigError, match="unknown option 'tmpl'"):
        split_path("a?tmpl={q}", "")
    with pytest.raises(ConfigError, match="did you mean 'question'"):
        check_columns(parse_template("{qestion}"), ["question", "answer"], "x")

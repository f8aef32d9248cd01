"""Long documents of the demo: the fact is there, once, and its control differs in it alone."""

import numpy as np
import pytest

from kimi_jax.data.example import Text
from kimi_jax.data.sources import demo, demo_long
from kimi_jax.data.sources.demo_scene import COLOURS


@pytest.mark.parametrize("tokens", demo_long.TOKENS)
def test_needle_in_text_is_said_once_and_fits_its_row(tokens):
    for i in range(20):
        text, question, number = demo_long.needle_text("validation", tokens, i)
        assert text.count(f"{demo_long.FACT} {number}") == text.count(demo_long.FACT) == 1
        # three characters a token, as the demo's vocabulary has on average; its tests say how long documents really are
        assert 0.6 * tokens < len(text + question) / 3 < tokens
        control, _, same = demo_long.needle_text("validation", tokens, i, fact=False)
        assert demo_long.FACT not in control and same == number and len(text) - len(control) < 40


def test_needle_stands_anywhere_in_a_text():
    places = []
    for i in range(60):
        text, _, _ = demo_long.needle_text("validation", 1024, i)
        places.append(text.index(demo_long.FACT) / len(text))
    assert min(places) < 0.1 and max(places) > 0.9 and 0.4 < np.mean(places) < 0.6


def test_needle_in_video_is_one_frame_and_the_rest_is_grey():
    for i in range(8):
        video, colour = demo_long.needle_video("validation", 512, i)
        frames = np.stack(video.frames).astype(int)
        coloured = np.flatnonzero(np.ptp(frames, axis=3).max(axis=(1, 2)) > 0)
        shade = np.abs(frames - np.array(COLOURS[colour])).max(axis=(1, 2, 3))
        assert (shade <= 12).sum() == 1
        assert len(coloured) <= 1 and (not len(coloured) or shade[coloured[0]] <= 12)
        control, same = demo_long.needle_video("validation", 512, i, fact=False)
        differ = [k for k, (a, b) in enumerate(zip(video.frames, control.frames, strict=True)) if (a != b).any()]
        assert differ == np.flatnonzero(shade <= 12).tolist() and same == colour


@pytest.mark.parametrize("name", ["needle_video_512", "scenes", "scene_clips"])
def test_records_are_the_examples_without_media(name):
    source = demo.open_demo(name, "train")
    for i in range(0, 60, 7):
        assert source.record(i).parts == tuple(part for part in source[i].parts if isinstance(part, Text))


def test_long_documents_are_whole_and_their_splits_apart():
    train, held_out = (demo.open_demo("long_documents", split) for split in ("train", "validation"))
    lengths = [len(train[i].parts[0].text) for i in range(0, len(train), 40)]
    assert np.median(lengths) > 10 * demo_long.CHARACTERS_A_TOKEN * demo_long.TOKENS[0]
    first = {source[i].parts[0].text[:200] for source in (train, held_out) for i in range(0, len(source), 9)}
    assert len(first) == len(range(0, len(train), 9)) + len(range(0, len(held_out), 9))

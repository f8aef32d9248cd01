"""The demo's sources: deterministic, disjoint splits, true answers, many sizes, no answer told by a single frame."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data.example import Image, Text, Video
from kimi_jax.data.sources import demo, demo_base, demo_image, demo_text, demo_video, open_source

NAMES = tuple(demo.OPENERS)
IMAGES = ("easyvqa", "digits", "video")


def text_of(example):
    return "".join(p.text for p in example.parts if isinstance(p, Text))


def pixels_of(example):
    arrays = []
    for part in example.parts:
        if isinstance(part, Image):
            arrays.append(np.asarray(part.image))
        elif isinstance(part, Video):
            arrays += list(part.frames)
    return arrays


def indices(source, count):
    return range(0, len(source), max(1, len(source) // count))


# --------------------------------------------------------------------------------------------------------- all sources


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", demo_base.SPLITS)
def test_items_are_deterministic_and_survive_pickling(name, split):
    source = open_source(SourceConfig(kind="demo", path=name, split=split))
    copy = pickle.loads(pickle.dumps(source))
    for i in indices(source, 7):
        a, b = source[i], copy[i]
        assert text_of(a) == text_of(b) and a.key == b.key
        assert text_of(a).strip()
        for x, y in zip(pixels_of(a), pixels_of(b), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", IMAGES)
def test_record_is_the_example_without_images(name):
    source = demo.open_demo(name, "train")
    for i in indices(source, 40):
        parts = tuple(p for p in source[i].parts if isinstance(p, Text))
        assert source.record(i).parts == parts


@pytest.mark.parametrize("name", IMAGES)
def test_answers_carry_the_loss_and_questions_little(name):
    source = demo.open_demo(name, "train")
    for i in indices(source, 40):
        for part in source.record(i).parts:
            if part.text.startswith("Q: "):
                assert part.text.endswith("\nA:") and part.loss_weight == demo_base.QUESTION_WEIGHT
            elif part.text != "\n":
                assert part.text.startswith(" ") and part.loss_weight == demo_base.ANSWER_WEIGHT
            else:
                assert part.loss_weight in (0.0, demo_base.END_WEIGHT)


def test_unknown_names_and_splits_say_what_there_is():
    with pytest.raises(ConfigError, match="wiki"):
        demo.open_demo("wikipedia", "train")
    with pytest.raises(ConfigError, match="validation"):
        demo.open_demo("wiki", "test")


def test_missing_package_names_the_extra(monkeypatch):
    demo_text.wiki_documents.cache_clear()
    monkeypatch.setattr(demo_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo_base.MissingDemoPackage, match=r"pip install 'kimi_jax\[demo\]'"):
        demo.open_demo("wiki", "train")


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "documents", [demo_text.wiki_documents, demo_text.factbook_documents, demo_text.python_documents]
)
def test_held_out_documents_are_not_trained_on(documents):
    train, held_out = set(documents("train")), set(documents("validation"))
    assert len(held_out) > 300 and len(train) > 8 * len(held_out) / 1.5
    # equal pieces in two files of the standard library are licence headers and the like
    assert len(train & held_out) <= 0.005 * len(held_out)
    assert max(map(len, train | held_out)) <= demo_text.PROSE_LIMIT


def test_text_is_cut_whole_at_sentences():
    text = "One two three. Four five six. Seven eight nine. " + "x" * 50
    pieces = demo_text.cut(text, 32)
    assert pieces[0] == "One two three. Four five six."
    assert max(map(len, pieces)) <= 32
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")


def test_every_capital_is_taught_once_in_a_while():
    capitals = {c.name: c.capital for c in demo_text.countries() if c.capital}
    assert capitals["France"] == "Paris" and capitals["Bolivia"] == "La Paz" and len(capitals) > 200
    assert not any(c in name for name in capitals.values() for c in "<&;(")
    source = demo.open_demo("factbook", "train")
    lists = [text_of(source[i]) for i in range(len(source) // 2 + 1, len(source), 25)]
    taught = sum(
        demo_text.capital_prompt(n) + demo_text.capital_reply(c) in "\n".join(lists) for n, c in capitals.items()
    )
    assert taught > 0.9 * len(capitals)


def test_operand_pairs_are_held_out_in_both_orders():
    train, held_out = set(demo_text.operand_pairs("train")), set(demo_text.operand_pairs("validation"))
    assert not train & held_out and not {(b, a) for a, b in train} & held_out
    assert len(train | held_out) == (demo_text.LARGEST_OPERAND + 1) ** 2
    for line in text_of(demo.open_demo("arithmetic", "train")[3]).strip().split("Q: ")[1:]:
        question, answer = line.strip().split(" = ?\nA: ")
        assert eval(question) == int(answer)


# -------------------------------------------------------------------------------------------------------------- images


def test_easy_vqa_comes_in_many_sizes_with_the_drawing_intact():
    source = demo.open_demo("easyvqa", "train")
    grids, tokens = set(), []
    chosen = indices(source, 300)
    for i in chosen:
        (image,) = pixels_of(source[i])
        h, w = -(-image.shape[0] // 28), -(-image.shape[1] // 28)
        grids.add((h, w))
        tokens.append(h * w)
    assert len(grids) >= 12 and any(h != w for h, w in grids)
    assert max(tokens) == demo_image.MAX_TOKENS and 6 < np.mean(tokens) < 12


def test_large_scenes_fill_the_largest_bin_exactly():
    source = demo.open_demo("easyvqa_large", "train")
    shapes = {pixels_of(source[i])[0].shape[:2] for i in range(20)}
    assert shapes == set(demo_image.LIMIT_SHAPES)
    assert all(h // 14 * (w // 14) == 256 for h, w in shapes)


def test_cropping_and_padding_never_touch_the_shape():
    """The number of coloured pixels, scaled, stays: nothing of a shape is cut away."""
    for number in range(60):
        scene = demo_image.vqa_image("train", number)
        colour = demo_image._background(scene)
        rng = np.random.default_rng(number)
        cropped = demo_image._crop(scene, colour, rng)
        padded = demo_image._pad(cropped, colour, cropped.shape[0] + 9, cropped.shape[1] + 17, rng)

        def drawn(pixels, colour=colour):
            return int((np.abs(pixels.astype(int) - colour).max(axis=2) > 8).sum())

        assert drawn(scene) == drawn(cropped) == drawn(padded)
        assert min(cropped.shape[:2]) >= 28


def test_no_open_question_gives_away_the_answer_of_a_later_one():
    for k, record in enumerate(demo_image.vqa_records("train")[::5]):
        asked = demo_image.choose_questions(record, np.random.default_rng(k))
        opens = [(q, a) for q, a in asked if a in demo_image.VQA_ANSWERS]
        assert 2 <= len(asked) <= 3 or len(record.questions) < 3
        assert len(opens) < 2 or opens[1][1] not in opens[0][0]


def test_digits_read_as_their_answer_and_splits_are_disjoint():
    train, held_out = demo_image.digits("train"), demo_image.digits("validation")
    assert len(train[1]) + len(held_out[1]) == 1797 and len(held_out[1]) > 300
    assert not {g.tobytes() for g in train[0]} & {g.tobytes() for g in held_out[0]}
    source = demo.open_demo("digits", "train")
    kinds, widths = Counter(), set()
    for i in range(200):
        example = source[i]
        text = text_of(example)
        kinds["larger" in text, len(pixels_of(example))] += 1
        widths.add(pixels_of(example)[0].shape[1] // 28)
        if "larger" in text:
            left, right = text.split(f"{demo_image.READ_QUESTION}\nA: ")[1].split("\n")[0].split()
            assert ("left" in text.split("larger, left or right?\nA: ")[1].split("\n")[0]) == (left > right)
    assert len(widths) >= 4 and {n for _, n in kinds} == {1, 2, 3}


def test_drawn_digit_is_the_scan_enlarged():
    glyphs = demo_image.digits("train")[0][:3]
    strip = demo_image.draw_digits(glyphs, 32, gap=4, dark_ink=False)
    assert strip.shape == (32, 3 * 32 + 2 * 4, 3)
    back = strip[:, 36:68, 0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
    assert np.corrcoef(back.ravel(), glyphs[1].ravel())[0, 1] > 0.95
    np.testing.assert_array_equal(demo_image.draw_digits(glyphs, 32, 4, True), 255 - strip)


# --------------------------------------------------------------------------------------------------------------- video


GLYPH = np.zeros((8, 8), np.uint8)  # no ink: a white card
BLACK = np.zeros((40, 120, 160, 3), np.uint8)


@pytest.mark.parametrize("direction", demo_video.DIRECTIONS)
def test_digit_moves_the_way_the_answer_says(direction):
    """The edges of a bright tile on black frames, while the whole tile is seen."""
    y, x = demo_video.STEPS[direction]
    moves = []
    for seed in range(20):
        frames = demo_video.moving_digit(BLACK, GLYPH, direction, 4, (84, 112), np.random.default_rng(seed))
        bright = frames[..., 0] > 128
        ends = [[(np.flatnonzero(f.any(axis=1 - axis))[[0, -1]]) for axis in (0, 1)] for f in bright if f.any()]
        for before, after in itertools.pairwise(ends):
            if all(a[1] - a[0] == b[1] - b[0] for a, b in zip(before, after, strict=True)):  # not yet cut by an edge
                moves.append([after[axis][0] - before[axis][0] for axis in (0, 1)])
    moves = np.array(moves)
    assert len(moves) > 20
    np.testing.assert_array_equal(np.sign(moves), np.tile([y, x], (len(moves), 1)))
    sizes = np.abs(moves).max(axis=1)
    assert sizes.min() >= 9 and sizes.max() <= 14


def test_first_frame_says_nothing_about_the_direction():
    """With the same random numbers the first frame is the same array for every direction; the second one is not."""
    for seed in range(5):
        drawn = [
            demo_video.moving_digit(BLACK, GLYPH, d, 4, (84, 84), np.random.default_rng(seed))
            for d in demo_video.DIRECTIONS
        ]
        for other in drawn[1:]:
            np.testing.assert_array_equal(drawn[0][0], other[0])
            assert (drawn[0][1] != other[1]).any()


def test_every_mixed_video_document_has_six_grids_and_chunks_of_one_to_four_frames():
    source = demo.open_demo("video_mixed", "train")
    orders = set()
    for i in range(30):
        clips = [part for part in source[i].parts if isinstance(part, Video)]
        grids = {(min(4, len(c.frames) - k), *c.frames[0].shape) for c in clips for k in range(0, len(c.frames), 4)}
        assert len(grids) == 6 and {t for t, *_ in grids} == {1, 2, 3, 4}
        orders.add(tuple(c.frames[0].shape for c in clips))
    assert len(orders) == 6


def test_plain_video_documents_are_one_chunk_of_four_frames():
    source = demo.open_demo("video", "train")
    for i in range(10):
        frames = pixels_of(source[i])
        assert len(frames) == 4 and frames[0].shape == (56, 56, 3)


def test_clips_of_validation_are_held_out():
    assert not set(demo_video.CLIPS["train"]) & set(demo_video.CLIPS["validation"])

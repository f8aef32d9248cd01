"""The demo's sources: deterministic, disjoint splits, true answers, many sizes, no answer told by a single frame."""

import pickle
from collections import Counter

import numpy as np
import pytest

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data.example import Image, Text, Video
from kimi_jax.data.sources import demo, demo_base, demo_image, demo_text, demo_video, open_source

NAMES = tuple(demo.OPENERS)
PICTURES = ("easyvqa", "digits", "video")


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


@pytest.mark.parametrize("name", PICTURES)
def test_a_record_is_the_example_without_pictures(name):
    source = demo.open_demo(name, "train")
    for i in indices(source, 40):
        parts = tuple(p for p in source[i].parts if isinstance(p, Text))
        assert source.record(i).parts == parts


@pytest.mark.parametrize("name", PICTURES)
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


def test_a_missing_package_names_the_extra(monkeypatch):
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
    grids, at_limit, tokens = set(), 0, []
    chosen = indices(source, 300)
    for i in chosen:
        (image,) = pixels_of(source[i])
        h, w = -(-image.shape[0] // 28), -(-image.shape[1] // 28)
        grids.add((h, w))
        tokens.append(h * w)
        at_limit += 4 * h * w == 256
        assert 4 * h * w <= 100 or 4 * h * w == 256
    assert len(grids) >= 12 and any(h != w for h, w in grids)
    assert 0.01 < at_limit / len(tokens) < 0.12
    assert 6 < np.mean(tokens) < 16


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
        asked = demo_image._choose_questions(record, np.random.default_rng(k))
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


def test_a_drawn_digit_is_the_scan_enlarged():
    glyphs = demo_image.digits("train")[0][:3]
    strip = demo_image.draw_digits(glyphs, 32, gap=4, dark_ink=False)
    assert strip.shape == (32, 3 * 32 + 2 * 4, 3)
    back = strip[:, 36:68, 0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
    assert np.corrcoef(back.ravel(), glyphs[1].ravel())[0, 1] > 0.95
    np.testing.assert_array_equal(demo_image.draw_digits(glyphs, 32, 4, True), 255 - strip)


# --------------------------------------------------------------------------------------------------------------- video


def _tile_position(frames):
    """(y, x) of a bright 20 x 20 tile on black frames, from the phase of the first Fourier component (it may wrap)."""
    positions = []
    for frame in frames:
        mass = frame[..., 0].astype(float)
        angles = [np.angle((mass.sum(axis=1 - axis) * np.exp(2j * np.pi * np.arange(n) / n)).sum()) * n / (2 * np.pi)
                  for axis, n in enumerate(mass.shape)]  # fmt: skip
        positions.append(angles)
    return np.array(positions)


@pytest.mark.parametrize("direction", demo_video.DIRECTIONS)
def test_the_digit_moves_the_way_the_answer_says(direction):
    background = np.zeros((40, 120, 160, 3), np.uint8)
    for seed in range(5):
        frames = demo_video.moving_digit(
            background, np.full((8, 8), 255, np.uint8), direction, 4, (84, 112), np.random.default_rng(seed)
        )
        steps = np.diff(_tile_position(frames), axis=0)
        size = np.array([84, 112])
        steps = (steps + size / 2) % size - size / 2
        y, x = demo_video.STEPS[direction]
        np.testing.assert_allclose(np.sign(np.round(steps)), np.tile([y, x], (3, 1)))
        assert (np.abs(steps).max(axis=1) >= 13.5).all() and (np.abs(steps).max(axis=1) <= 18.5).all()


def test_one_frame_says_nothing_about_the_direction():
    """Every frame, the first one included, is the same function of the random numbers up to where the tile stands, and
    the tile's place is uniform for each direction: means over many starts agree to 4 standard errors."""
    background = np.zeros((40, 120, 160, 3), np.uint8)
    glyph = np.full((8, 8), 255, np.uint8)
    means = {}
    for direction in demo_video.DIRECTIONS:
        frames = [demo_video.moving_digit(background, glyph, direction, 4, (84, 84), np.random.default_rng(s))
                  for s in range(400)]  # fmt: skip
        means[direction] = (
            np.stack([f[..., 0] for f in frames]).astype(float).reshape(400, 4, 3, 28, 3, 28).mean(axis=(3, 5))
        )
    for k in range(4):
        cells = {d: m[:, k].reshape(400, 9) for d, m in means.items()}
        error = np.hypot(*(cells[d].std(axis=0) / 20 for d in ("left", "right")))
        for a, b in (("left", "right"), ("up", "down"), ("left", "up")):
            assert (np.abs(cells[a].mean(axis=0) - cells[b].mean(axis=0)) < 4 * error).all()


def test_videos_have_chunks_of_one_to_four_frames_and_held_out_clips():
    assert not set(demo_video.CLIPS["train"]) & set(demo_video.CLIPS["validation"])
    source = demo.open_demo("video", "train")
    chunks, sizes, full = set(), set(), 0
    for i in range(60):
        frames = pixels_of(source[i])
        chunks |= {min(4, len(frames) - k) for k in range(0, len(frames), 4)}
        sizes.add(frames[0].shape)
        full += len(frames) >= 4 and frames[0].shape == (112, 112, 3)
        if len(frames) == 1:
            assert demo_video.DIRECTION_QUESTION not in text_of(source[i])
    assert chunks == {1, 2, 3, 4} and len(sizes) == 5 and full > 0

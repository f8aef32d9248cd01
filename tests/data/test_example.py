"""Encoding: the released text around media, loss weights, re-planning instead of cutting, and every refusal."""

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kimi_jax.data import BadRecord
from kimi_jax.data.example import EncodeLimits, Example, Image, Text, Video, encode, place_items, split
from kimi_jax.data.image import process_image
from tests.data.synthetic import make_image
from tests.data.synthetic import tokenizer as train

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer"))


def weights_of(encoded, tokenizer) -> list[tuple[str, float]]:
    return [(tokenizer.decode([int(t)]), float(w)) for t, w in zip(encoded.tokens, encoded.loss_weights, strict=True)]


def test_image_stands_in_the_text_as_released(tokenizer):
    image_56 = make_image(RNG, 56, 56)
    encoded = encode(Example((Text("red", 0.0), Image(image_56), Text(" blue", 0.5)), "k"), tokenizer)
    assert tokenizer.decode(encoded.tokens) == (
        "red<|media_begin|>image<|media_content|>" + "<|media_pad|>" * 4 + "<|media_end|> blue[EOS]"
    )
    assert encoded.tokens.dtype == np.int32 and encoded.loss_weights.dtype == np.float32
    assert encoded.modality == 1 and encoded.key == "k"
    assert [w for t, w in weights_of(encoded, tokenizer) if w] == [0.5] * (len(tokenizer.encode(" blue")) + 1)
    pixels, _ = process_image(image_56)
    (item,) = encoded.media
    assert item.grid == (1, 4, 4) and item.patches.dtype == np.uint8
    floats = (item.patches / 255.0).astype(np.float32) * 2 - 1
    assert np.allclose(floats.reshape(pixels.shape), pixels, atol=1e-6)  # two roundings in another order


def test_video_is_chunks_with_time_stamps(tokenizer):
    frames = np.stack([make_image(RNG, 40, 30) for _ in range(6)])
    encoded = encode(Example((Video(frames, tuple(i / 2 for i in range(6))), Text("town"))), tokenizer)
    block = "{}<|media_begin|>video<|media_content|>" + "<|media_pad|>" * 4 + "<|media_end|>"
    text = block.format("00:00:00.000") + block.format("00:00:02.000") + "town[EOS]"
    assert tokenizer.decode(encoded.tokens) == text
    assert [m.grid for m in encoded.media] == [(4, 4, 4), (2, 4, 4)]
    assert encoded.modality == 2
    learned = [t for t, w in weights_of(encoded, tokenizer) if w]
    assert "".join(learned) == "town[EOS]"


def test_text_that_spells_a_pad_makes_no_pad(tokenizer):
    encoded = encode(Example((Text("a <|media_pad|> b"),)), tokenizer)
    assert tokenizer.media_pad_id not in encoded.tokens and encoded.modality == 0


def test_end_of_document_has_the_weight_of_the_last_text(tokenizer):
    assert encode(Example((Text("a", 1.0), Text("b", 0.25))), tokenizer).loss_weights[-1] == 0.25
    assert encode(Example((Image(make_image(RNG, 28, 28)),)), tokenizer).loss_weights[-1] == 1.0


def test_image_larger_than_the_largest_bin_is_planned_smaller(tokenizer):
    image = make_image(RNG, 300, 200)
    limits = EncodeLimits(512, ((64, 2), (160, 1)))
    (item,) = encode(Example((Image(image), Text("red"))), tokenizer, limits).media
    _, h, w = item.grid
    assert 100 <= h * w <= 160 and abs(w / h - 1.5) < 0.4  # smaller, in about the same form, and whole
    (free,) = encode(Example((Image(image), Text("red"))), tokenizer).media
    assert free.grid == (1, 16, 22)


def test_images_of_one_example_shrink_together(tokenizer):
    large, small = Image(make_image(RNG, 420, 420)), Image(make_image(RNG, 112, 112))
    example = Example((large, Text(" red "), large, small, Text("blue")))
    free = encode(example, tokenizer)
    assert [m.grid for m in free.media] == [(1, 30, 30), (1, 30, 30), (1, 8, 8)]
    encoded = encode(example, tokenizer, EncodeLimits(256, ((900, 3),)))
    assert 200 < len(encoded.tokens) <= 256
    first, second, third = (m.grid for m in encoded.media)
    assert first == second and first[1] < 30 and third[1] < 8
    assert tokenizer.decode(encoded.tokens, skip_special_tokens=True) == "image red imageimageblue"


def test_example_always_fits_an_empty_group(tokenizer):
    """Three images that fit alone, but not together, in the one bin there is."""
    example = Example(tuple(Image(make_image(RNG, 112, 112)) for _ in range(3)) + (Text("red"),))
    limits = EncodeLimits(512, ((64, 1),))
    encoded = encode(example, tokenizer, limits)
    assert sum(len(m.patches) for m in encoded.media) <= 64


@given(st.data())
def test_whatever_is_encoded_fits_its_limits(tokenizer, data):
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), max_size=4))
    words = data.draw(st.integers(0, 30))
    bins = data.draw(st.sampled_from([((16, 2),), ((64, 2), (256, 1)), ((1024, 1),)]))
    length = data.draw(st.sampled_from([48, 128, 1024]))
    parts = [Image(np.zeros((h, w, 3), np.uint8)) for w, h in sizes]
    if data.draw(st.booleans()):
        parts.append(Video(np.zeros((5, 33, 57, 3), np.uint8), (0.0, 0.5, 1.0, 1.5, 2.0)))
    limits = EncodeLimits(length, bins)
    try:
        encoded = encode(Example((*parts, Text("red " * words))), tokenizer, limits)
    except BadRecord as bad:
        event(bad.reason)
        if bad.reason != ("too_long" if parts else "empty"):
            raise
        return
    features = sum(m.grid[1] * m.grid[2] // 4 for m in encoded.media)
    assert (encoded.tokens == tokenizer.media_pad_id).sum() == features
    assert (encoded.loss_weights[encoded.tokens == tokenizer.media_pad_id] == 0).all()
    for m in encoded.media:
        assert len(m.patches) == np.prod(m.grid)
    if parts:
        assert len(encoded.tokens) <= length
        free = [[p] * v for p, v in bins]
        assert place_items([len(m.patches) for m in encoded.media], free) is not None
    pieces = split(encoded, length)
    assert np.array_equal(np.concatenate([p.tokens for p in pieces]), encoded.tokens)
    assert np.array_equal(np.concatenate([p.loss_weights for p in pieces]), encoded.loss_weights)
    assert all(len(p.tokens) <= length for p in pieces)


def test_media_whose_text_leaves_no_room_are_refused(tokenizer):
    with pytest.raises(BadRecord) as bad:
        encode(
            Example((Image(make_image(RNG, 28, 28)), Text("red " * 200)), "k"), tokenizer, EncodeLimits(64, ((64, 1),))
        )
    assert bad.value.reason == "too_long" and bad.value.key == "k"


@pytest.mark.parametrize("parts", [(), (Text(""),), (Text(""), Text("", 0.0))])
def test_nothing_is_refused(tokenizer, parts):
    with pytest.raises(BadRecord) as bad:
        encode(Example(parts, "k"), tokenizer)
    assert bad.value.reason == "empty"


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_loss_weights_must_make_sense(tokenizer, weight):
    with pytest.raises(BadRecord, match="loss weight"):
        encode(Example((Text("red", weight),)), tokenizer)


def test_items_go_to_the_smallest_class_with_room():
    free = [[16, 16], [64]]
    assert place_items([16, 64, 8], free) == [(0, 0), (1, 0), (0, 1)]
    assert place_items([16, 16, 16], free) == [(0, 0), (0, 1), (1, 0)]  # the small class is full
    assert place_items([65], free) is None
    assert free == [[16, 16], [64]]

"""From messages with images to ids, pixels and grids; and which URLs are opened at all."""

import base64
import io

import numpy as np
import PIL.Image
import pytest

import kimi_jax as kimi
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Span, fill_pads
from kimi_jax.data.image import process_image
from kimi_jax.data.kimi_tokenizer import KimiTokenizer
from kimi_jax.data.media_part import read_data_uri
from kimi_jax.data.processor import prepare
from kimi_jax.data.video import process_video
from tests.data.test_video import movie
from tests.environment import shared


@pytest.fixture(scope="module")
def tokenizer() -> KimiTokenizer:
    """Bytes only: what is tested here does not depend on the words."""
    return KimiTokenizer(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))


def make_image(width: int = 60, height: int = 40) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def user(*parts: object) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def test_text_alone_has_no_pixels(tokenizer):
    prompt = prepare([{"role": "user", "content": "Hi"}], tokenizer)
    assert prompt.pixel_values is None and prompt.grid_thws is None and prompt.input_ids.dtype == np.int32
    assert tokenizer.decode(prompt.input_ids) == prompt.text
    assert prompt.text == tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_images_and_videos_in_reading_order(tokenizer):
    """Pads are expanded to (h/2)(w/2) an item; every chunk has its own stamp, wrapper and pads."""
    image, data = make_image(), movie(30, rate=10)
    messages = user(
        {"type": "image", "image": image},
        {"type": "text", "text": "then"},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + base64.b64encode(data).decode()}},
    )
    prompt = prepare(messages, tokenizer)
    pixels, grid = process_image(image)
    chunks = process_video(data)
    assert [c.timestamp for c in chunks] == [
        "00:00:00.000",
        "00:00:02.299",
    ]  # (2.3 mod 1) * 1000 is 299.99, cut off: as released
    assert np.array_equal(prompt.pixel_values, np.concatenate([pixels, *(c.pixel_values for c in chunks)]))
    assert np.array_equal(prompt.grid_thws, np.concatenate([grid, *(c.grid_thw for c in chunks)]))
    wrapper = "<|media_begin|>{}<|media_content|><|media_pad|><|media_end|>"
    assert wrapper.format("image") + "\nthen00:00:00.000" + wrapper.format("video") + "00:00:02.299" in prompt.text
    assert prompt.text.endswith("<|media_end|>\n<|im_end|><|im_assistant|>assistant<|im_middle|><think>")
    features = (prompt.grid_thws[:, 1] * prompt.grid_thws[:, 2] // 4).tolist()
    is_pad = prompt.input_ids == tokenizer.media_pad_id
    runs = [len(r) for r in "".join("p" if p else " " for p in is_pad).split()]
    assert runs == features


def test_every_way_to_give_an_image_is_the_same(tokenizer):
    image = make_image()
    uri = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    ways = [
        {"type": "image", "image": image},
        {"type": "image", "image": np.asarray(image)},
        {"type": "image", "image": png(image)},
        {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        {"type": "image_url", "image_url": uri},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
    ]
    prompts = [prepare(user(way), tokenizer, open_url=lambda url: png(image)) for way in ways]
    for prompt in prompts[1:]:
        assert np.array_equal(prompt.input_ids, prompts[0].input_ids)
        assert np.array_equal(prompt.pixel_values, prompts[0].pixel_values)


@pytest.mark.parametrize("url", ["https://example.com/a.png", "file:///etc/passwd", "/etc/passwd", "a.png", ""])
@pytest.mark.parametrize("kind", ["image_url", "video_url", "image", "video"])
def test_urls_are_refused_unless_someone_opens_them(tokenizer, url, kind):
    with pytest.raises(BadRecord) as bad:
        prepare(user({"type": kind, kind: {"url": url}}), tokenizer)
    assert bad.value.reason == "refused"


@pytest.mark.parametrize("uri", ["data:", "data:image/png;base64", "data:image/png;base64,a", "data:x;base64,????"])
def test_malformed_data_uris(uri):
    with pytest.raises(BadRecord) as bad:
        read_data_uri(uri)
    assert bad.value.reason == "broken_image"


def test_data_uris_of_other_forms():
    assert read_data_uri("data:text/plain;charset=utf-8,a%20b") == b"a b"
    assert read_data_uri("DATA:image/png;name=x;base64,YWI\n=") == b"ab"


def test_text_that_spells_a_pad_stays_text(tokenizer):
    messages = user({"type": "text", "text": "<|media_pad|>"})
    assert tokenizer.media_pad_id not in prepare(messages, tokenizer).input_ids


def test_part_without_its_image(tokenizer):
    with pytest.raises(ValueError, match="nothing under 'image_url'"):
        prepare(user({"type": "image_url"}), tokenizer)


def test_pads_take_the_features_of_a_frame_whatever_t():
    pads = Span([7], 0.0, 0, is_pads=True)
    ids, weights = fill_pads([pads, Span([1], 0.5, 1), pads], [(1, 2, 4), (4, 4, 4)], 7)
    assert ids.tolist() == [7, 7, 1, 7, 7, 7, 7]
    assert weights.tolist() == [0, 0, 0.5, 0, 0, 0, 0]


def test_with_the_released_vocabulary():
    prompt = prepare(user({"type": "image", "image": make_image()}), kimi.load_tokenizer(shared("kimi_tokenizer")))
    assert prompt.input_ids[:8].tolist() == [163587, 2482, 163601, 163602, 4017, 163603, 163605, 163605]
    assert (prompt.input_ids == 163605).sum() == 6

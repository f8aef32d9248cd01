"""Tensor values as media: shapes, types and channels that count, and those that make a BadRecord."""

import numpy as np
import pytest

from kimi_jax.data import BadRecord
from kimi_jax.data.example import Image, Video
from kimi_jax.data.image import decode
from kimi_jax.data.sources.arrays import media_value, text_value

FRAME = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def test_images():
    """Grey, RGB and RGBA; one more axis or a list is several; nothing is None."""
    image = media_value(FRAME, "image", "column", "key")
    np.testing.assert_array_equal(np.asarray(decode(image.image)), FRAME)
    grey = media_value(FRAME[..., :1], "image", "column", "key")
    np.testing.assert_array_equal(np.asarray(decode(grey.image)), np.repeat(FRAME[..., :1], 3, -1))
    assert decode(media_value(np.zeros((4, 5, 4), np.uint8), "image", "column", "key").image).mode == "RGB"
    for several in (np.stack([FRAME] * 3), [FRAME, FRAME[:2], FRAME]):
        assert [type(p) for p in media_value(several, "image", "column", "key")] == [Image] * 3
    assert media_value(FRAME[:0], "image", "column", "key") is None


def test_videos():
    """One array or a list of frames is one clip, two frames a second; a list of clips is several."""
    for one in (np.stack([FRAME] * 3), [FRAME] * 3):
        video = media_value(one, "video", "column", "key")
        assert isinstance(video, Video)
        np.testing.assert_array_equal(np.asarray(video.frames), np.stack([FRAME] * 3))
        assert list(video.timestamps) == [0.0, 0.5, 1.0]
    assert len(media_value([np.stack([FRAME] * 3)] * 2, "video", "column", "key")) == 2


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("value", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2)), 7])
def test_what_is_not_pixels(kind, value):
    with pytest.raises(BadRecord) as e:
        media_value(value, kind, "column", "key")
    assert e.value.reason == f"broken_{kind}"


def test_text():
    values = (b"gr\xc3\xb6\xc3\x9fer", b"\xff", np.float64(0.5), np.array(b"x"), 3)
    assert [text_value(v) for v in values] == ["größer", "\ufffd", "0.5", "x", "3"]

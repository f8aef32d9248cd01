"""Plans of media from their headers: what they promise holds for what is decoded."""

import io

import av
import numpy as np
import PIL.Image
import pytest

from kimi_jax.data import BadRecord
from kimi_jax.data.media_plan import PATCH_BYTES, plan_media
from tests.data.test_image import png_header


def clip(frames: int, rate: int, container: str, codec: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width = stream.height = 64
        for i in range(frames):
            image = np.full((64, 64, 3), i % 256, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("frames", [1, 30, 130])
@pytest.mark.parametrize("rate", [1, 4, 25])
@pytest.mark.parametrize("form", [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")])
def test_video_plan_bounds_what_is_decoded(frames, rate, form):
    if form[1] == "mpeg2video" and rate < 24:
        rate = 24  # MPEG-2 has no other
    plan = plan_media(clip(frames, rate, *form), is_video=True)
    decoded = plan.decode()
    kept = sum(item.grid[0] for item, _ in decoded)
    assert plan.num_frames <= kept <= plan.num_frames + 1
    assert kept * 64 * 64 * 3 <= plan.max_bytes
    assert sum(item.patches.nbytes for item, _ in decoded) <= plan.lasting_bytes
    assert all(item.patches.dtype == np.uint8 for item, _ in decoded)


def test_image_plan_is_what_is_decoded():
    plan = plan_media(PIL.Image.new("RGB", (300, 200)), is_video=False)
    ((item, stamp),) = plan.decode()
    assert (plan.grids, stamp) == ([item.grid], "")
    assert item.patches.nbytes == plan.lasting_bytes == plan.frame.patches * PATCH_BYTES


def test_plan_of_a_header_alone_decodes_nothing():
    plan = plan_media(png_header(8000, 8000), is_video=False)
    assert plan.passing_bytes == 16 * 8000 * 8000
    with pytest.raises(BadRecord, match="broken_image"):
        plan.decode()


@pytest.mark.parametrize(
    "source", [b"", b"x" * 100, clip(30, 10, "mp4", "mpeg4")[:500], 5, None, [None], [[[1]]], ["x"], []], ids=repr
)
def test_what_is_no_video_is_a_bad_record(source):
    with pytest.raises(BadRecord):
        plan_media(source, is_video=True)

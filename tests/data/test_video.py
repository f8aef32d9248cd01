"""Video: the released frame rule, time stamps, chunks of four with one plan, and files read by PyAV."""

import io

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.data import BadRecord
from kimi_jax.data.video import (
    Video,
    chunk_patches,
    chunks,
    fit_frame,
    plan_frame,
    read_video,
    sample_indices,
    sample_video,
    timestamp,
    video_size,
)


def test_released_example():
    """300 frames at 30 a second (docs/released_model.md section 5)."""
    indices = sample_indices(300, 30)
    assert indices[:8].tolist() == [0, 16, 31, 47, 63, 79, 94, 110] and len(indices) == 20
    assert [timestamp(indices[i] / 30) for i in (0, 4, 8)] == ["00:00:00.000", "00:00:02.100", "00:00:04.200"]


@pytest.mark.parametrize(
    ("frames", "fps", "kept"),
    [
        (1, 30, [0]),
        (3, 1.0, [0, 1, 2]),
        (5, 0.5, [0, 1, 2, 3, 4]),
        (4, 30, [0]),
        (30, 30, [0, 29]),
        (60, 24, [0, 15, 30, 44, 59]),
    ],
)
def test_short_and_slow_videos(frames, fps, kept):
    assert sample_indices(frames, fps).tolist() == kept


@given(st.integers(1, 5000), st.floats(0.1, 120))
def test_selection_is_ascending_and_within_the_video(frames, fps):
    indices = sample_indices(frames, fps)
    assert len(indices) == max(round(frames * min(2.0, fps) / fps), 1)
    assert indices[0] == 0 and indices[-1] <= frames - 1
    assert (np.diff(indices) > 0).all() or fps < 2


@pytest.mark.parametrize("frames, fps", [(0, 30), (10, 0), (10, float("nan"))])
def test_no_frames_or_no_rate(frames, fps):
    with pytest.raises(ValueError, match="video of"):
        sample_indices(frames, fps)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00.000"),
        (3661.9999, "01:01:01.999"),
        (59.0005, "00:00:59.000"),
        (86399.5, "23:59:59.500"),
        (86400, "00:00:00.000"),
    ],
)
def test_time_stamps_are_cut_not_rounded(seconds, text):
    assert timestamp(seconds) == text


def test_chunks_of_four_share_one_plan_and_the_last_is_shorter():
    frames = np.random.default_rng(0).integers(0, 256, (10, 50, 70, 3), dtype=np.uint8)
    video = sample_video(frames, fps=2.0)
    assert chunks(video) == [(0, 4), (4, 8), (8, 10)]
    plan = plan_frame(70, 50)
    patches, grid = chunk_patches(video, (8, 10), plan)
    assert grid == (2, 4, 6) and patches.shape == (48, 588)
    assert np.array_equal(patches[24].reshape(3, 14, 14), frames[9][:14, :14].transpose(2, 0, 1))


def test_frame_has_at_most_4096_patches_before_padding():
    plan = plan_frame(1920, 1080)
    assert (plan.width // 14) * (plan.height // 14) <= 4096 < 137 * 77
    # by hand: sqrt(4096 / (137 * 77)) = 0.6231, so 1196 x 672 pixels, padded to 43 x 24 windows of 28
    assert (plan.width, plan.height, plan.h, plan.w) == (1196, 672, 48, 86)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 4), st.integers(4, 1024))
def test_fitted_chunk_keeps_its_bound(width, height, frames, quarter):
    plan = fit_frame(width, height, frames, 4 * quarter)
    assert frames * plan.patches <= 4 * quarter


def movie(count: int, rate: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """An mp4 whose frame i is a flat grey of brightness 8*i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 8 * i, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("as_file", [True, False])
def test_reading_a_file_keeps_the_right_frames(tmp_path, as_file):
    data = movie(30, rate=10)
    source = io.BytesIO(data)
    if as_file:
        source = tmp_path / "clip.mp4"
        source.write_bytes(data)
    video = read_video(source, key="clip")
    wanted = sample_indices(30, 10.0)
    assert np.allclose(video.timestamps, wanted / 10)
    brightness = [float(f.mean()) for f in video.frames]
    assert np.allclose(brightness, 8 * wanted, atol=4)  # lossy: a flat grey moves by at most a few levels


@pytest.mark.parametrize(("data", "reason"), [(b"", "broken_video"), (b"no video at all" * 9, "broken_video")])
def test_files_that_are_no_video(data, reason):
    with pytest.raises(BadRecord) as bad:
        read_video(io.BytesIO(data), key="clip")
    assert bad.value.reason == reason


def test_damaged_and_missing_files(tmp_path):
    data = movie(20, rate=10)
    with pytest.raises(BadRecord) as bad:
        read_video(io.BytesIO(data[: len(data) // 2]), key="clip")
    assert bad.value.reason == "broken_video"  # the index of an mp4 stands at its end
    with pytest.raises(BadRecord) as bad:
        read_video(tmp_path / "none.mp4")
    assert bad.value.reason == "missing_file"


FRAME = np.zeros((20, 20, 3), np.uint8)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (Video([], ()), "empty"),
        (Video([FRAME, FRAME], (0.0,)), "broken_video"),
        (Video([FRAME, FRAME[:10]], (0.0, 1.0)), "broken_video"),
        (Video([FRAME.astype(np.float32)], (0.0,)), "broken_video"),
        (Video([FRAME], (float("nan"),)), "broken_video"),
        (Video([FRAME[:0]], (0.0,)), "absurd_size"),
    ],
)
def test_frames_that_are_no_video(video, reason):
    with pytest.raises(BadRecord) as bad:
        video_size(video, "clip")
    assert bad.value.reason == reason

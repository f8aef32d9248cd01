"""Images and videos of strangers through the public functions: what the release does, or a typed error; never a
crash, a hang, or a file or URL that nobody asked for."""

import io
import os
import threading
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kimi_jax as kimi
from kimi_jax.data import video
from kimi_jax.data.video import Video, process_video, read_video
from tests.data.test_image import encoded, noise, png_header
from tests.data.test_video import movie


def reason(function, *args, **options) -> str:
    with pytest.raises(kimi.BadRecord) as bad:
        function(*args, **options)
    return bad.value.reason


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("data", "slug"),
    [
        (b"", "broken_image"),
        (b"<html></html>", "broken_image"),
        (encoded(noise(), "PNG")[:200], "broken_image"),
        (encoded(noise(), "JPEG")[:300], "broken_image"),
        (png_header(0, 10), "broken_image"),  # PIL itself refuses an image without width
        (png_header(50_000, 50_000), "absurd_size"),
        (png_header(1, 100_000_000), "absurd_size"),
        (png_header(100_000_000, 1), "absurd_size"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n", "broken_image"),
    ],
)
def test_bytes_that_give_no_image(data, slug, tmp_path):
    assert reason(kimi.process_image, data) == slug
    path = tmp_path / "image.png"
    path.write_bytes(data)
    assert reason(kimi.process_image, path) == slug


def test_no_program_is_run_for_an_image_that_is_one():
    """An endless EPS, opened by the caller with PIL itself: PIL would hand it to Ghostscript and wait."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    assert reason(kimi.process_image, PIL.Image.open(io.BytesIO(data))) == "broken_image"


@pytest.mark.parametrize("value", [None, 5, np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), [[0]]])
def test_things_that_are_no_image(value):
    inner = getattr(kimi.process_image, "__wrapped__", kimi.process_image)  # without the tests' own type checks
    assert reason(inner, value) == "broken_image"


def test_missing_image(tmp_path):
    assert reason(kimi.process_image, tmp_path / "none.png") == "missing_file"


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (7169, 3)])
def test_thin_and_tiny_images_are_padded(size):
    pixels, grid = kimi.process_image(PIL.Image.new("RGB", size, "white"))
    assert grid[0, 1] % 2 == grid[0, 2] % 2 == 0 and 1 <= max(grid[0, 1:]) <= 512
    assert pixels.shape == (grid.prod(), 3, 14, 14) and pixels.max() == 1


def test_released_behaviour_for_odd_images():
    """First frame of an animation, `convert("RGB")` for CMYK, EXIF rotation ignored (released_model.md)."""
    red, blue = (PIL.Image.new("RGB", (30, 30), c) for c in ("red", "blue"))
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert np.array_equal(kimi.process_image(data)[0], kimi.process_image(red)[0])
    cmyk = encoded(noise().convert("CMYK"), "TIFF")
    assert np.array_equal(kimi.process_image(cmyk)[0], kimi.process_image(noise().convert("CMYK").convert("RGB"))[0])
    exif = PIL.Image.Exif()
    exif[274] = 6
    assert np.array_equal(kimi.process_image(encoded(noise(), "PNG", exif=exif))[0], kimi.process_image(noise())[0])


# --------------------------------------------------------------------------------------------------------------- videos


def test_file_as_path_bytes_or_open(tmp_path):
    data = movie(30, rate=10)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    from_path = kimi.process_video(str(path))
    with open(path, "rb") as file:
        for other in (kimi.process_video(data), kimi.process_video(file)):
            assert all(np.array_equal(a.pixel_values, b.pixel_values) for a, b in zip(from_path, other, strict=True))
    # 30 frames at 10 a second: six are kept, 0, 6, 12, 17, 23, 29
    assert [c.grid_thw.tolist() for c in from_path] == [[[4, 4, 6]], [[2, 4, 6]]]
    assert [c.seconds for c in from_path] == [0.0, 2.3]


def test_frames_as_arrays_images_or_sampled():
    frames = np.random.default_rng(0).integers(0, 256, (10, 50, 70, 3), dtype=np.uint8)
    whole = kimi.process_video(frames)
    assert [c.grid_thw[0, 0] for c in whole] == [4, 4, 2] and [c.seconds for c in whole] == [0, 2, 4]
    ways = [list(frames), [PIL.Image.fromarray(f) for f in frames], Video(frames, [i / 2 for i in range(10)])]
    for way in ways:
        assert np.array_equal(kimi.process_video(way)[2].pixel_values, whole[2].pixel_values)
    # the last chunk has one frame, and is what the image of it would be
    one = kimi.process_video(frames[:5])[1]
    assert one.grid_thw.tolist() == [[1, 4, 6]]
    assert np.array_equal(one.pixel_values, kimi.process_image(frames[4])[0])
    # all frames of a faster video: the released rule chooses
    assert [c.timestamp for c in kimi.process_video(frames, fps=5)] == ["00:00:00.000"]
    with pytest.raises(ValueError, match="0 frames a second"):
        kimi.process_video(frames, fps=0)


FRAME = np.zeros((20, 20, 3), np.uint8)


@pytest.mark.parametrize(
    ("frames", "slug"),
    [
        ([], "empty"),
        (np.zeros((0, 20, 20, 3), np.uint8), "empty"),
        ([FRAME, FRAME[:10]], "broken_video"),
        (FRAME, "broken_video"),
        (np.zeros((2, 20, 20, 3), np.float32), "broken_video"),
        ([FRAME[:0]], "absurd_size"),
        ([5, 6], "broken_video"),
        (5, "broken_video"),
        (None, "broken_video"),
    ],
)
def test_frames_that_are_no_video(frames, slug):
    inner = getattr(process_video, "__wrapped__", process_video)  # without the tests' own type checks
    assert reason(inner, frames) == slug


@pytest.mark.parametrize("data", [b"", b"text " * 99, encoded(noise(), "JPEG"), movie(20, rate=10)[:900]])
def test_bytes_that_are_no_video(data, tmp_path):
    assert reason(kimi.process_video, data) == "broken_video"
    (tmp_path / "clip.mp4").write_bytes(data)
    assert reason(kimi.process_video, tmp_path / "clip.mp4") == "broken_video"


def sound_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return buffer.getvalue()


def test_sound_without_an_image_and_a_video_without_frames():
    assert reason(kimi.process_video, sound_only()) == "broken_video"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        container.start_encoding()
    assert reason(kimi.process_video, buffer.getvalue()) in ("empty", "broken_video")


def test_pixels_decoded_of_one_video_are_bounded(monkeypatch):
    """Six frames of 64x48 against a bound of five: refused after the sixth, whatever the header counts."""
    data = movie(6, rate=10)
    monkeypatch.setattr(video, "MAX_DECODED", 6 * 64 * 48)
    read_video(data)
    monkeypatch.setattr(video, "MAX_DECODED", 5 * 64 * 48)
    assert reason(read_video, data) == "too_long"


def test_frames_that_outgrow_their_header_are_refused_inside_the_decoder(monkeypatch):
    """Motion JPEG declared as 64x48 whose second image has 640x480: FFmpeg itself does not allocate it."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i, (width, height) in enumerate([(64, 48), (640, 480)]):
            packet = av.Packet(encoded(noise(width, height), "JPEG"))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, stream.time_base or Fraction(1, 2)
            container.mux(packet)
    assert reason(read_video, file.getvalue()) == "broken_video"
    monkeypatch.setattr(video, "MAX_PIXELS", 100 * 100)
    with pytest.raises(kimi.BadRecord, match="avcodec|Invalid|InvalidData|empty|without frames"):
        read_video(file.getvalue())


def test_there_is_an_end_to_frames_and_memory():
    data = movie(30, rate=10)
    assert reason(read_video, data, max_frames=29) == "too_long"
    assert reason(read_video, data, max_bytes=6 * 64 * 48 * 3 - 1) == "too_long"
    assert len(read_video(data, max_frames=30, max_bytes=6 * 64 * 48 * 3).frames) == 6


@pytest.mark.parametrize("name", ["list.m3u8", "list.txt", "image%03d.png"])
def test_list_of_other_files_is_not_followed(name, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(movie(10, rate=10))
    target = tmp_path / "clip.mp4"
    text = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "list.txt": "ffconcat version 1.0\nfile clip.mp4\n",
    }.get(name)
    if text:
        (tmp_path / name).write_text(text)
    else:
        noise().save(tmp_path / "picture001.png")
    with pytest.raises(kimi.BadRecord):
        kimi.process_video(tmp_path / name)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.mp4", "concat:a.mp4|b.mp4", "file:a.mp4"])
def test_only_files_are_opened(address):
    assert reason(kimi.process_video, address) == "missing_file"


@pytest.mark.parametrize("name", ["process_image", "process_video"])
@pytest.mark.parametrize("path", ["/dev/zero", ".", "a\0b", "x" * 5000])
def test_paths_that_are_no_file(name, path):
    assert reason(getattr(kimi, name), path) == "missing_file"


@pytest.mark.parametrize("name", ["process_image", "process_video"])
def test_pipe_nobody_writes_to_does_not_hang(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(reason(getattr(kimi, name), tmp_path / "pipe")), daemon=True)
    thread.start()
    thread.join(120)
    assert found == ["missing_file"]


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    clips = [movie(8, rate=4)]
    for kind, codec, pixels in (("matroska", "mpeg4", "yuv420p"), ("gif", "gif", "rgb8")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=kind) as container:
            stream = container.add_stream(codec, rate=4)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for i in range(8):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 30 * i, np.uint8), format="rgb24")
                for packet in stream.encode(frame):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        clips.append(buffer.getvalue())
    return clips


@settings(max_examples=60)
@given(st.integers(0, 2), st.integers(0, 10**9), st.integers(1, 20), st.floats(0.1, 1))
def test_damaged_videos_never_crash(clips, which, seed, count, part):
    """Either chunks come out, or a BadRecord."""
    data = np.frombuffer(clips[which], np.uint8).copy()
    rng = np.random.default_rng(seed)
    data[rng.integers(0, len(data), count)] = rng.integers(0, 256, count)
    try:
        chunks = process_video(data[: int(len(data) * part)].tobytes())
        assert all(len(c.pixel_values) == c.grid_thw.prod() for c in chunks)
    except kimi.BadRecord as bad:
        if bad.reason not in ("broken_video", "absurd_size", "empty", "too_long"):
            raise

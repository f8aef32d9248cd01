"""Video by the released rule: two frames a second, chunks of four, a time stamp each.

Source: docs/released_model.md section 5.

N      frames of the file;  n  frames kept
h, w   grid of a frame in patches;  t = 1 .. 4 frames of a chunk
C      3 * patch_size^2

The released decoder is not public; frames are decoded by PyAV here and may differ from it by a grey level. Where the
rate is constant, frames and time stamps are those of the released rule, index / fps. Where it is not, the rule is
applied to the times in the stream: as many frames as it keeps at N / duration a second, at times evenly spread, a frame
at most once. Videos that a phone marks as rotated are turned upright, as the decoders that engines use for the release
(OpenCV, torchcodec) do; mirroring and pixels that are not square are left as they are. A file that is cut short counts
as broken (container.py).
Files are strangers' files: only plain containers are opened (a play list would name further files and URLs), and
there is an end to the frames that are decoded and to the memory that they take.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.container
import numpy as np
import PIL.Image

from kimi_jax.data import BadRecord
from kimi_jax.data.container import cut_short
from kimi_jax.data.files import bad_file_reason
from kimi_jax.data.image import (
    MAX_PIXELS,
    MAX_SIDE,
    SIDE_LIMIT,
    ResizePlan,
    decode,
    image_patches_of,
    largest,
    normalise,
    plan_image,
)
from kimi_jax.untrusted import open_regular

SAMPLE_FPS = 2.0  # sample_fps
CHUNK_FRAMES = 4  # temporal_merge_kernel_size
FRAME_PATCH_LIMIT = 4096  # in_patch_limit_each_frame
MAX_FRAMES = 200_000  # decoded of one file, almost two hours at 30 a second; the release has no limit
MAX_BYTES = 4 << 30  # of the frames kept
MAX_DECODED = 1 << 39  # pixels of all frames of a file together, about two hours of 1080p at 30 a second
MAX_FILE_BYTES = 64 << 30  # of a file that is read from its path
TICK = 0.0015  # seconds: containers that count in milliseconds round the times of a constant rate so far
LATE = 0.5  # seconds that a video may end before its header says
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf"


@dataclass(frozen=True)
class Video:
    """One video of an example, already sampled.

    frames:     uint8 [N, H, W, 3], or a list of uint8 [H, W, 3] of one size.
    timestamps: seconds of each frame since the start, N of them.
    """

    frames: np.ndarray | Sequence[np.ndarray]
    timestamps: Sequence[float] | np.ndarray


class VideoChunk(NamedTuple):
    """Up to four frames as the vision tower takes them, an item of its own.

    pixel_values: float32 [t*h*w, 3, 14, 14]; grid_thw: int64 [1, 3].
    timestamp:    HH:MM:SS.mmm of the first frame, as it stands in the prompt; seconds: the same as a number.
    """

    pixel_values: np.ndarray
    grid_thw: np.ndarray
    timestamp: str
    seconds: float


def sample_indices(num_frames: int, fps: float | int, sample_fps: float | int = SAMPLE_FPS) -> np.ndarray:
    """int64 [n]: which frames the released rule keeps: n = max(round(N * min(2, fps) / fps), 1), evenly spread.

    Raises ValueError for a video without frames or without a frame rate.
    """
    if num_frames < 1 or not fps > 0:
        raise ValueError(f"video of {num_frames} frames at {fps} frames a second")
    keep = max(round(num_frames * min(sample_fps, fps) / fps), 1)
    return np.round(np.linspace(0, num_frames - 1, keep)).astype(np.int64)


def sample_video(frames: np.ndarray | Sequence[np.ndarray], fps: float | int) -> Video:
    """All decoded frames of a video to the released selection, with times index / fps."""
    indices = sample_indices(len(frames), fps)
    return Video([frames[i] for i in indices], tuple(float(i / fps) for i in indices))


def timestamp(seconds: float | int) -> str:
    """HH:MM:SS.mmm as released: of the day (UTC), milliseconds cut off, not rounded."""
    whole = int(seconds) % 86400
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{int((seconds % 1) * 1000):03d}"


def plan_frame(
    width: int,
    height: int,
    patch_limit: float | int = FRAME_PATCH_LIMIT,
    side_limit: int = SIDE_LIMIT,
    patch_size: int = 14,
) -> ResizePlan:
    """The one plan of all frames of a video: an image's, with the limit of a frame."""
    return plan_image(width, height, patch_limit, side_limit, patch_size)


def fit_frame(
    width: int,
    height: int,
    frames: int,
    max_patches: int | None,
    patch_limit: float | int = FRAME_PATCH_LIMIT,
    side_limit: int = SIDE_LIMIT,
    patch_size: int = 14,
) -> ResizePlan:
    """`plan_frame`, made smaller where needed so that a chunk of `frames` frames has at most `max_patches` patches."""
    per_frame = None if max_patches is None else max_patches // frames
    return largest(lambda a: plan_frame(width, height, a, side_limit, patch_size), patch_limit, per_frame)


def chunks(video: Video) -> list[tuple[int, int]]:
    """(first frame, end) of each chunk of up to four frames."""
    count = len(video.frames)
    return [(i, min(i + CHUNK_FRAMES, count)) for i in range(0, count, CHUNK_FRAMES)]


def video_size(video: Video, key: str = "") -> tuple[int, int]:
    """(width, height) of the frames. Raises BadRecord(empty | absurd_size | broken_video) for what is no video."""
    frames = video.frames
    if len(frames) == 0:
        raise BadRecord("empty", key, "a video without frames")
    if len(video.timestamps) != len(frames):
        raise BadRecord("broken_video", key, f"{len(frames)} frames, but {len(video.timestamps)} time stamps")
    if any(not 0 <= s < float("inf") for s in video.timestamps):
        raise BadRecord("broken_video", key, "a time stamp is negative or not a number")
    shape = np.shape(frames[0])
    if any(np.shape(f) != shape or f.dtype != np.uint8 for f in frames) or len(shape) != 3 or shape[2] != 3:
        raise BadRecord("broken_video", key, f"frames must all be uint8 [H, W, 3] of one size; the first is {shape}")
    height, width = shape[:2]
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise BadRecord("absurd_size", key, f"frames of {width}x{height} pixels")
    return width, height


def chunk_patches(
    video: Video, chunk: tuple[int, int], plan: ResizePlan, patch_size: int = 14
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches of one chunk: (uint8 [t*h*w, C] frame by frame in raster order, grid (t, h, w))."""
    start, end = chunk
    frames = [image_patches_of(decode(video.frames[i]), plan, patch_size) for i in range(start, end)]
    return np.concatenate(frames), (end - start, plan.h, plan.w)


def as_video(source: Any, fps: float | int | None = None) -> Video:
    """The sampled video of anything that `process_video` takes, decoded. Raises as that does."""
    if isinstance(source, (str, Path, bytes, io.BufferedIOBase)):
        return read_video(source)
    if isinstance(source, Video):
        return source
    if not isinstance(source, (np.ndarray, Sequence)):
        raise BadRecord("broken_video", "video", f"a video is a file or frames, not {type(source).__name__}")
    if len(source) == 0:
        raise BadRecord("empty", "video", "a video without frames")
    frames = [np.asarray(decode(f, "video") if isinstance(f, PIL.Image.Image) else f) for f in source]
    return sample_video(frames, SAMPLE_FPS if fps is None else fps)


def process_video(
    source: str | Path | bytes | io.BufferedIOBase | Video | np.ndarray | Sequence[np.ndarray | PIL.Image.Image],
    fps: float | int | None = None,
) -> list[VideoChunk]:
    """The released video processor: frames at two a second, in chunks of four, all planned and resized alike.

    source: a file (path, bytes, or open), all frames (uint8 [N, H, W, 3], or arrays or PIL images of one size), or a
            `Video`, which is already sampled.
    fps:    rate of frames given as such; None: they are already sampled, at two a second. A file knows its own.
    Raises BadRecord (broken_video, empty, missing_file, absurd_size, too_long) and ValueError for a bad rate.
    """
    video = as_video(source, fps)
    plan = plan_frame(*video_size(video, "video"))
    result = []
    for chunk in chunks(video):
        patches, grid = chunk_patches(video, chunk, plan)
        seconds = float(video.timestamps[chunk[0]])
        result.append(VideoChunk(normalise(patches), np.array([grid], np.int64), timestamp(seconds), seconds))
    return result


def read_video(
    source: str | Path | bytes | io.BufferedIOBase,
    key: str = "",
    name: str = "",
    max_frames: int = MAX_FRAMES,
    max_bytes: int = MAX_BYTES,
) -> Video:
    """Decodes a file with PyAV and keeps the frames of the released rule; only those are held in memory.

    source: a path, the bytes of a file, or an open binary file. key, name: of the record and of the file, for messages.
    Two passes over the file, since the number of frames in a header is often missing or wrong.
    Raises BadRecord(missing_file | broken_video | empty | absurd_size | too_long).
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "video")
    key = key or name
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        try:  # neither a URL nor a device, which ffmpeg would open too
            opened = open_regular(Path(source), MAX_FILE_BYTES)
        except OSError as error:
            raise BadRecord(bad_file_reason(error), key, f"{name}: {error.strerror or error}") from error
        with opened as file:
            return read_video(file, key, name, max_frames, max_bytes)
    try:
        return _read(source, key, name, max_frames, max_bytes)
    except BadRecord:
        raise
    except Exception as error:  # ffmpeg's errors, a file without a video stream, a frame that fails to convert
        raise BadRecord("broken_video", key, f"{name}: {type(error).__name__}: {error}") from error


def _read(file: io.BufferedIOBase, key: str, name: str, max_frames: int, max_bytes: int) -> Video:
    if missing := cut_short(file):
        raise BadRecord("broken_video", key, f"{name} is cut short: {missing}")
    with _open(file) as container:
        stream = container.streams.video[0]
        width, height, rate = stream.codec_context.width, stream.codec_context.height, _frame_rate(stream)
        if not 0 < width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise BadRecord("absurd_size", key, f"{name}: frames of {width}x{height} pixels")
        max_frames = min(max_frames, max(1, MAX_DECODED // (width * height)))
        times, turns, end = _times(itertools.islice(container.decode(stream), max_frames + 1), rate)
        declared = _declared_seconds(container, stream)
    count = len(times)
    if count == 0:
        raise BadRecord("empty", key, f"{name}: a video without frames")
    if count > max_frames:
        raise BadRecord("too_long", key, f"{name}: more than {max_frames} frames of {width}x{height}")
    if declared - end > LATE + 2 * end / count:
        raise BadRecord(
            "broken_video", key, f"{name} is cut short: {end:.2f} s of frames, its header says {declared:.2f}"
        )
    indices, stamps = _sample_times(times, rate, end)
    if len(indices) * width * height * 3 > max_bytes:
        raise BadRecord("too_long", key, f"{name}: {len(indices)} frames of {width}x{height} exceed {max_bytes} bytes")
    wanted = set(indices.tolist())
    frames = {}
    with _open(file) as container:
        for i, frame in enumerate(itertools.islice(container.decode(container.streams.video[0]), count)):
            if (frame.width, frame.height) != (width, height):
                raise BadRecord(
                    "broken_video", key, f"{name}: frame {i} is {frame.width}x{frame.height}, not as before"
                )
            if i in wanted:
                frames[i] = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    return Video([frames[int(i)] for i in indices], stamps)


def _times(frames: Iterable[av.VideoFrame], rate: float) -> tuple[np.ndarray, int, float]:
    """(float64 [N] seconds since the first frame, never falling; quarter turns to the left; where the last frame ends).

    A frame without a time follows the one before by 1 / rate.
    """
    times: list[float] = []
    turns, last, start = 0, 1 / rate, 0.0
    for frame in frames:
        if not times:
            turns = round(frame.rotation / 90) % 4
            start = frame.time or 0.0
        expected = times[-1] + 1 / rate if times else 0.0
        times.append(expected if frame.time is None else max(frame.time - start, times[-1] if times else 0.0))
        last = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 1 / rate
    return np.array(times), turns, times[-1] + last if times else 0.0


def _sample_times(times: np.ndarray, rate: float, end: float) -> tuple[np.ndarray, tuple[float, ...]]:
    """(int64 indices of the frames kept, their seconds): the released rule, by time where the rate is not constant."""
    count = len(times)
    regular = np.arange(count) / rate
    if np.abs(times - regular).max() <= min(TICK, 0.25 / rate):
        indices = sample_indices(count, rate)
        return indices, tuple(float(i / rate) for i in indices)
    keep = len(sample_indices(count, count / end))
    targets = np.linspace(0, times[-1], keep)
    after = np.clip(np.searchsorted(times, targets), 1, max(count - 1, 1))
    nearest = np.where(targets - times[after - 1] <= times[after] - targets, after - 1, after)
    indices = np.unique(nearest).astype(np.int64)
    return indices, tuple(float(times[i]) for i in indices)


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long the header says that the frames are, 0 if it does not: that of the file is of its longest stream."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    alone = len(container.streams) == 1
    return container.duration / av.time_base if alone and container.duration else 0.0


def _open(file: io.BufferedIOBase) -> av.container.InputContainer:
    file.seek(0)
    container = av.open(file, mode="r", options={"format_whitelist": CONTAINERS})
    for stream in container.streams.video:  # frames of a stream may be larger than its header says
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return container


def _frame_rate(stream: av.VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return float(rate)

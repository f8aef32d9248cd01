"""What an image or a video will take, read from its header, so that a server can refuse it before it is decoded.

W, H   size of the original in pixels;  N patches of an item;  C = 3 * patch_size^2

A file of a few kilobytes can decode to gigabytes. `plan_media` opens a file and reads its sizes; a video's packets are
counted, not decoded. `MediaPlan.decode` then decodes within what the plan said, to uint8 patches.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
from PIL.IcoImagePlugin import IcoFile

from kimi_jax.data import BadRecord
from kimi_jax.data.example import MediaItem
from kimi_jax.data.image import MAX_PIXELS, ResizePlan, image_patches, image_size, open_image, plan_image
from kimi_jax.data.video import (
    CHUNK_FRAMES,
    CONTAINERS,
    MAX_BYTES,
    MAX_FRAMES,
    SAMPLE_FPS,
    Video,
    as_video,
    chunk_patches,
    chunks,
    plan_frame,
    read_video,
    sample_indices,
    timestamp,
    video_size,
)

ICON = b"\0\0\1\0"
PATCH_BYTES = 3 * 14 * 14
DECODED_PIXEL_BYTES = 16  # the decoder's copy, PIL's own and its RGB form at 4 bytes a pixel each, and the resize
VIDEO_DECODER_FRAMES = 16  # reference frames and threads of a decoder, at 3 bytes a pixel each
PROBE = {"format_whitelist": CONTAINERS, "probesize": "1000000", "max_probe_packets": "64"}


@dataclass(frozen=True)
class MediaPlan:
    """One image or video that is opened and not yet decoded.

    source:        what is decoded: a PIL image, an array, a `Video`, or the bytes of a video file.
    frame:         the plan of the image, or of each frame.
    num_frames:    0 for an image; of a video, the fewest frames that its header allows to be kept. The exact number is
                   known only after decoding.
    max_frames:    most frames that decoding may find, and max_bytes what the frames kept may take, for `read_video`.
    lasting_bytes: host memory that stays taken until the request is over: the file and its uint8 patches.
    passing_bytes: host memory that decoding takes on top, at most.
    """

    source: Any
    key: str
    frame: ResizePlan
    num_frames: int = 0
    max_frames: int = MAX_FRAMES
    max_bytes: int = MAX_BYTES
    lasting_bytes: int = 0
    passing_bytes: int = 0

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """(t, h, w) of each item: one for an image, one for each chunk of a video."""
        if not self.num_frames:
            return [(1, self.frame.h, self.frame.w)]
        starts = range(0, self.num_frames, CHUNK_FRAMES)
        return [(min(CHUNK_FRAMES, self.num_frames - i), self.frame.h, self.frame.w) for i in starts]

    def decode(self) -> list[tuple[MediaItem, str]]:
        """The items in order, each with its time stamp ("" for an image); patches are uint8 [N, C].

        Raises BadRecord for what cannot be decoded, or decodes to something else than the header said.
        """
        if not self.num_frames:
            patches, grid = image_patches(self.source, self.frame, key=self.key)
            return [(MediaItem(patches, grid), "")]
        video = self.source
        if isinstance(video, bytes):
            video = read_video(video, self.key, "video", self.max_frames, self.max_bytes)
        plan = plan_frame(*video_size(video, self.key))
        stamps = [timestamp(float(video.timestamps[start])) for start, _ in chunks(video)]
        return [(MediaItem(*chunk_patches(video, c, plan)), s) for c, s in zip(chunks(video), stamps, strict=True)]


def plan_media(source: Any, is_video: bool, key: str = "") -> MediaPlan:
    """The plan of an image or video. source: what `process_image` or `process_video` takes.

    Raises BadRecord(broken_image | broken_video | absurd_size | too_long | missing_file | empty).
    """
    return _plan_video(source, key) if is_video else _plan_image(source, key)


def _plan_image(source: Any, key: str) -> MediaPlan:
    size = len(source) if isinstance(source, bytes) else 0
    if isinstance(source, bytes) and source.startswith(ICON):
        _check_icon(source, key)
    if isinstance(source, (bytes, Path)):
        source = open_image(source, key)
    if not isinstance(source, (PIL.Image.Image, np.ndarray)):
        raise BadRecord(
            "broken_image", key, f"an image is a PIL image, an array or a file, not {type(source).__name__}"
        )
    width, height = image_size(source, key)
    plan = plan_image(width, height)
    passing = DECODED_PIXEL_BYTES * width * height
    return MediaPlan(source, key, plan, lasting_bytes=size + plan.patches * PATCH_BYTES, passing_bytes=passing)


def _check_icon(data: bytes, key: str) -> None:
    """Refuses an icon that holds an image of another size than it says: PIL decodes icons when it opens them."""
    try:
        icon = IcoFile(io.BytesIO(data))
        inside, said = icon.frame(0).size, icon.sizes()
    except Exception as error:  # PIL raises anything on a damaged file
        raise BadRecord("broken_image", key, f"{type(error).__name__} in an icon") from error
    if inside not in said:
        raise BadRecord("broken_image", key, f"the icon says {sorted(said)} pixels and holds {inside}")


def _plan_video(source: Any, key: str) -> MediaPlan:
    if isinstance(source, (str, Path)):
        video: Any = read_video(source, key)
    elif isinstance(source, bytes):
        return _plan_video_file(source, key)
    elif isinstance(source, (Video, np.ndarray)) or _are_frames(source):
        video = as_video(source)
    else:
        raise BadRecord("broken_video", key, f"a video is a file or frames, not {type(source).__name__}")
    width, height = video_size(video, key)
    return _video_plan(video, key, width, height, (len(video.frames), len(video.frames)))


def _are_frames(source: Any) -> bool:
    """A list of anything else comes from a client's JSON."""
    return isinstance(source, Sequence) and all(isinstance(f, (np.ndarray, PIL.Image.Image)) for f in source)


def _plan_video_file(data: bytes, key: str) -> MediaPlan:
    try:
        with av.open(io.BytesIO(data), mode="r", options=PROBE) as container:
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            rate = float(stream.average_rate or stream.guessed_rate or Fraction(25))
            times = []
            for packet in container.demux(stream):
                if packet.size:
                    times.append(packet.pts)
                if len(times) > MAX_FRAMES:
                    raise BadRecord("too_long", key, f"a video of more than {MAX_FRAMES} frames")
            base = float(stream.time_base or 0)
    except BadRecord:
        raise
    except Exception as error:  # ffmpeg's errors, and a file without a video stream
        raise BadRecord("broken_video", key, f"not a video that can be read: {type(error).__name__}") from error
    if not times or not rate > 0:
        raise BadRecord("empty", key, "a video without frames")
    if not 0 < width * height <= MAX_PIXELS:
        raise BadRecord("absurd_size", key, f"frames of {width}x{height} pixels")
    return _video_plan(data, key, width, height, _kept_frames(times, base, rate), len(times))


def _kept_frames(times: Sequence[int | None], base: float, rate: float) -> tuple[int, int]:
    """(fewest, most) frames that two a second are, by the number of packets and their rate and by their time stamps."""
    count = len(times)
    by_rate = len(sample_indices(count, rate))
    known = [t for t in times if t is not None]
    seconds = (max(known) - min(known)) * base if known else 0.0
    by_time = max(1, min(count, int(min(seconds, 1e9) * SAMPLE_FPS) + 1))
    return min(by_rate, by_time), min(count, max(by_rate, by_time) + 1)


def _video_plan(
    source: bytes | Video, key: str, width: int, height: int, kept: tuple[int, int], count: int = MAX_FRAMES
) -> MediaPlan:
    frame = plan_frame(width, height)
    file_bytes = len(source) if isinstance(source, bytes) else 0
    frames_bytes = kept[1] * width * height * 3
    return MediaPlan(
        source, key, frame, kept[0], count, frames_bytes,
        lasting_bytes=file_bytes + kept[1] * frame.patches * PATCH_BYTES,
        passing_bytes=frames_bytes + VIDEO_DECODER_FRAMES * 3 * width * height if file_bytes else 0,
    )  # fmt: skip

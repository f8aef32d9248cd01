"""Small media for the tests of sources: images and clips as files."""

import io
import json
from pathlib import Path

import av
import numpy as np
import PIL.Image


def png(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def clip(frames: int = 8, width: int = 64, height: int = 48, fps: int = 4) -> bytes:
    """An MPEG-4 clip whose grey level rises from frame to frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_jsonl(path: Path, records: list) -> Path:
    """One record a line; a str or bytes is written as it stands."""
    with path.open("wb") as f:
        for r in records:
            f.write(
                (r if isinstance(r, bytes) else r.encode() if isinstance(r, str) else json.dumps(r).encode()) + b"\n"
            )
    return path

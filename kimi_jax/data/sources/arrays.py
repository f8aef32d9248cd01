"""Values of tensor data sets (TFDS, seqio) as what a template takes: text, images, videos. NumPy only.

H, W pixels;  T frames;  c channels: 1 (grey), 3 (RGB) or 4 (RGBA)
"""

from typing import Any

import numpy as np
import PIL.Image

from kimi_jax.data import BadRecord
from kimi_jax.data.example import Image, Video

VIDEO_FPS = 2.0  # tensor data sets keep no frame rate: their frames count as sampled at the released rate


def text_value(value: Any) -> str:
    """Bytes as UTF-8 (what is not becomes U+FFFD), everything else as it prints."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def media_value(value: Any, kind: str, name: str, key: str) -> Any:
    """An image from uint8 [H, W, c], a video from uint8 [T, H, W, c], a list of them from one more axis or a sequence.

    None for an empty one. Raises BadRecord broken_image or broken_video for another shape or type.
    """
    rank = 3 if kind == "image" else 4
    if (
        kind == "video"
        and isinstance(value, list | tuple)
        and len({np.shape(v) for v in value if np.ndim(v) == 3}) == 1
    ):
        value = np.stack(value)  # one clip as a list of its frames
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == rank + 1):
        return [media_value(v, kind, name, key) for v in value]
    value = np.asarray(value)
    if value.dtype != np.uint8 or value.ndim != rank or value.shape[-1] not in (1, 3, 4):
        detail = f"{name!r} is {value.dtype} {list(value.shape)}, not uint8 with 1, 3 or 4 channels and {rank} axes"
        raise BadRecord(f"broken_{kind}", key, detail)
    if not value.size:
        return None
    if kind == "image":
        return Image(_pil_image(value))
    frames = np.stack([np.asarray(_pil_image(f).convert("RGB")) for f in value])
    return Video(frames, [i / VIDEO_FPS for i in range(len(frames))])


def _pil_image(pixels: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

"""Images by the released rule: size plan, bicubic resize, zero padding, patches.

Source: docs/released_model.md sections 1.4 and 5.

W, H   size of the original in pixels
h, w   grid in patches, both even (a language token is a 2x2 window of patches)
N      h*w patches;  p = patch_size;  C = 3*p*p

Never upscaled; padding is at the right and the bottom and black, so -1 after normalisation. EXIF orientation is
ignored, alpha and palettes go through `convert("RGB")`, an animation counts as its first frame: all as released.
Unlike the release, which lets PIL clip them to white, grey images of 16 bits keep their upper 8 bits (as PIL itself
does for colour images of 16 bits), and images of floats or of 32-bit integers, whose range nobody states, are refused.
The pipeline carries uint8 patches; the float form is made from them at the end, bit for bit the released arithmetic.
"""

from __future__ import annotations

import functools
import io
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from kimi_jax.data import BadRecord
from kimi_jax.data.files import MAX_MEDIA_BYTES, bad_file_reason
from kimi_jax.untrusted import read_regular

PATCH_LIMIT = 16384  # in_patch_limit
SIDE_LIMIT = 512  # patch_limit_on_one_side
MAX_PIXELS = 2 * 89_478_485  # the size at which PIL itself speaks of a decompression bomb
MAX_SIDE = 1 << 17  # PIL keeps a pointer for each row: 1 x 100,000,000 pixels would take a gigabyte
# What is opened; PIL's others are rare or, as EPS, are handed to other programs.
FORMATS = (
    "PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF",
)  # fmt: skip

SCALED = ("PNG", "PPM")  # formats whose images of mode I are 16 bits deep

BLOCK = 1 << 16  # pixels normalised at a time: their float32 form stays in cache between the two operations


@dataclass(frozen=True)
class Image:
    """One image of an example. `image`: a PIL image (may still be undecoded) or uint8 [H, W, 3]."""

    image: PIL.Image.Image | np.ndarray


@dataclass(frozen=True)
class ResizePlan:
    """What becomes of an image: resized to (width, height) pixels, padded to h by w patches."""

    width: int
    height: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        """Patches of one frame, padding included."""
        return self.h * self.w

    @property
    def tokens(self) -> int:
        """Language-model tokens."""
        return self.h * self.w // 4


def plan_image(
    width: int,
    height: int,
    patch_limit: float | int = PATCH_LIMIT,
    side_limit: int = SIDE_LIMIT,
    patch_size: int = 14,
) -> ResizePlan:
    """The released size plan.

    patch_limit bounds the area before padding (padding may exceed it), side_limit each side; both in patches.
    Raises ValueError for an image without pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"image of {width}x{height} pixels")
    p = patch_size
    scale = min(
        1.0,
        math.sqrt(patch_limit / (max(1.0, width // p) * max(1.0, height // p))),
        side_limit * p / width,
        side_limit * p / height,
    )
    new_w = min(max(1, int(width * scale)), side_limit * p)
    new_h = min(max(1, int(height * scale)), side_limit * p)
    window = 2 * p
    return ResizePlan(new_w, new_h, 2 * -(-new_h // window), 2 * -(-new_w // window))


def largest(
    plan_with_limit: Callable[[float | int], ResizePlan], patch_limit: float | int, max_patches: int | None
) -> ResizePlan:
    """The plan of the largest area limit up to `patch_limit` whose *padded* patches are at most `max_patches`.

    Raises ValueError if even the smallest plan, 2x2 patches, is too large.
    """
    plan = plan_with_limit(patch_limit)
    if max_patches is None or plan.patches <= max_patches:
        return plan
    if max_patches < 4:
        raise ValueError(f"an image takes at least 4 patches, only {max_patches} are allowed")
    low, high = 0.0, float(min(patch_limit, max_patches))
    if plan_with_limit(high).patches <= max_patches:
        return plan_with_limit(high)
    for _ in range(24):  # to a relative 1e-7 of the limit: far below one pixel
        middle = (low + high) / 2
        low, high = (middle, high) if plan_with_limit(middle).patches <= max_patches else (low, middle)
    return plan_with_limit(low)


def fit_image(
    width: int,
    height: int,
    max_patches: int | None,
    patch_limit: float | int = PATCH_LIMIT,
    side_limit: int = SIDE_LIMIT,
    patch_size: int = 14,
) -> ResizePlan:
    """`plan_image`, made smaller where needed so that the padded patches are at most `max_patches`."""
    return largest(lambda a: plan_image(width, height, a, side_limit, patch_size), patch_limit, max_patches)


def open_image(data: bytes | str | Path, key: str = "") -> PIL.Image.Image:
    """Opens, and does not yet decode, an encoded image.

    data: the bytes of the file, or its path. Raises BadRecord(missing_file | broken_image | absurd_size).
    """
    if not isinstance(data, bytes):
        try:
            content = read_regular(data, MAX_MEDIA_BYTES)
        except OSError as error:
            detail = f"{os.fsdecode(data)}: {error.strerror or error}"
            raise BadRecord(bad_file_reason(error), key, detail) from error
        return open_image(content, key)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            return PIL.Image.open(io.BytesIO(data), formats=_formats())
    except PIL.Image.DecompressionBombError as error:
        raise BadRecord("absurd_size", key, str(error)) from error
    except PIL.UnidentifiedImageError as error:  # its own text holds a memory address
        raise BadRecord(
            "broken_image", key, "not an image in a format that is read, or damaged at its start"
        ) from error
    except Exception as error:  # PIL raises anything from SyntaxError to struct.error on damaged headers
        raise BadRecord("broken_image", key, f"{type(error).__name__}: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)  # AVIF is not in every build


def image_size(image: PIL.Image.Image | np.ndarray, key: str = "") -> tuple[int, int]:
    """(width, height) in pixels, before decoding. Raises BadRecord(broken_image | absurd_size)."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise BadRecord("broken_image", key, f"an array must be uint8 [H, W, 3], not {image.dtype} {image.shape}")
        width, height = image.shape[1], image.shape[0]
    else:
        if image.format == "EPS":
            raise BadRecord("broken_image", key, "EPS is a program, not an image; it is not run")
        if image.mode == "F" or (
            image.mode.startswith("I") and image.mode[:4] != "I;16" and image.format not in SCALED
        ):
            detail = f"pixels of mode {image.mode} (32 bits) have no known range: convert the image to 8 or 16 bits"
            raise BadRecord("broken_image", key, detail)
        width, height = image.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        limits = f"1 to {MAX_PIXELS} are read, sides up to {MAX_SIDE}"
        raise BadRecord("absurd_size", key, f"{width}x{height} pixels ({limits})")
    return width, height


def decode(image: PIL.Image.Image | np.ndarray, key: str = "") -> PIL.Image.Image:
    """The image in RGB, first frame of an animation. Raises BadRecord(broken_image | absurd_size)."""
    image_size(image, key)
    if isinstance(image, np.ndarray):
        return PIL.Image.fromarray(image)
    try:
        if image.tell() != 0:
            image.seek(0)
        image.load()
        if image.mode.startswith("I"):
            return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # truncated data, broken chunks, unknown modes: each decoder has its own exceptions
        raise BadRecord("broken_image", key, f"{type(error).__name__}: {error}") from error


def image_patches_of(rgb: PIL.Image.Image, plan: ResizePlan, patch_size: int = 14) -> np.ndarray:
    """Resizes, pads and cuts one RGB image. Returns uint8 [h*w, C], rasters of (channel, y, x) patches."""
    if rgb.size != (plan.width, plan.height):
        rgb = rgb.resize((plan.width, plan.height), PIL.Image.Resampling.BICUBIC)
    p = patch_size
    rows = np.dtype((np.void, p))  # a patch's row of one channel, moved as one item: three times as fast as by pixels
    patches = np.empty((plan.h, plan.w, 3, p), rows)
    for c, channel in enumerate(rgb.split()):
        plane = np.asarray(channel)
        if (plan.height, plan.width) != (plan.h * p, plan.w * p):
            plane = np.pad(plane, ((0, plan.h * p - plan.height), (0, plan.w * p - plan.width)))
        patches[:, :, c] = plane.view(rows).reshape(plan.h, p, plan.w).swapaxes(1, 2)
    return patches.view(np.uint8).reshape(plan.patches, 3 * p * p)


def image_patches(
    image: PIL.Image.Image | np.ndarray,
    plan: ResizePlan | None = None,
    patch_size: int = 14,
    key: str = "",
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches of one image by `plan` (default: the released one).

    Returns (uint8 [N, C], grid (1, h, w)). Raises BadRecord(broken_image | absurd_size).
    """
    if plan is None:
        plan = plan_image(*image_size(image, key), patch_size=patch_size)
    return image_patches_of(decode(image, key), plan, patch_size), (1, plan.h, plan.w)


def normalise(patches: np.ndarray, patch_size: int = 14) -> np.ndarray:
    """uint8 [N, C] to the released `pixel_values`: float32 [N, 3, p, p] in [-1, 1].

    The release divides by 255, subtracts 0.5 and doubles. To double first changes no bit (a factor of two is exact), so
    it is x / 127.5 - 1, which vectorises: four times as fast as a table of 256 entries.
    """
    result = np.empty((len(patches), 3, patch_size, patch_size), np.float32)
    source, target = patches.reshape(-1), result.reshape(-1)
    for start in range(0, source.size, BLOCK):
        block = target[start : start + BLOCK]
        np.copyto(block, source[start : start + BLOCK])
        block /= np.float32(127.5)
        block -= np.float32(1.0)
    return result


def process_image(image: PIL.Image.Image | np.ndarray | bytes | str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The released image processor for one image, bit for bit.

    image: a PIL image, uint8 [H, W, 3], the bytes of an image file, or its path.
    Returns (pixel_values float32 [N, 3, 14, 14], grid_thw int64 [1, 3]). Raises BadRecord for an image that cannot be
    decoded. Source: docs/released_model.md section 5.
    """
    if isinstance(image, (bytes, str, Path)):
        image = open_image(image, "" if isinstance(image, bytes) else str(image))
    if not isinstance(image, (PIL.Image.Image, np.ndarray)):
        raise BadRecord("broken_image", "", f"an image is a PIL image, an array or a file, not {type(image).__name__}")
    patches, grid = image_patches(image)
    return normalise(patches), np.array([grid], np.int64)

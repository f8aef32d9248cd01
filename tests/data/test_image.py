"""Images: bit for bit the released processor on the fixtures, its size plan, and every kind of bad or odd image."""

import hashlib
import io
import json

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.data import BadRecord
from kimi_jax.data.image import (
    BLOCK,
    MAX_PIXELS,
    fit_image,
    image_patches,
    normalise,
    open_image,
    plan_image,
    process_image,
)
from tests.environment import FIXTURES


def test_released_pixels_bit_for_bit():
    """sha256 of the float32 bytes of the released `pixel_values`, for RGB, RGBA, palette and grey images."""
    goldens = json.loads((FIXTURES / "images/goldens.json").read_text())
    assert len(goldens) >= 7
    for name, golden in goldens.items():
        pixels, grid = process_image(PIL.Image.open(FIXTURES / f"images/{name}"))
        assert grid.tolist() == [golden["grid_thw"]], name
        assert pixels.dtype == np.float32 and pixels.shape[1:] == (3, 14, 14), name
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == golden["sha256"], name
        width, height = PIL.Image.open(FIXTURES / f"images/{name}").size
        plan = plan_image(width, height)
        assert [plan.width, plan.height] == golden["resized"], name
        assert [plan.w * 14 - plan.width, plan.h * 14 - plan.height] == golden["pad"], name


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((2048, 1365), 3626), ((17, 64), 3), ((5000, 6000), 4189), ((640, 427), 368), ((1000, 700), 900), ((56, 56), 4),
        ((4000, 500), 2574), ((30, 9000), 256), ((3000, 3000), 4225),
    ],
)  # fmt: skip
def test_plan_of_known_sizes(size, tokens):
    """The checks of docs/released_model.md section 5; the last is above the limit through padding, as released."""
    assert plan_image(*size).tokens == tokens


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 4096))
def test_fitted_plan_keeps_its_bound_and_its_shape(width, height, quarter):
    bound = 4 * quarter
    plan = fit_image(width, height, bound)
    free = plan_image(width, height)
    assert plan.patches <= bound and plan.h % 2 == 0 == plan.w % 2
    assert plan.width <= free.width and plan.height <= free.height
    if free.patches <= bound:
        assert plan == free
    elif bound >= 64 and min(free.width, free.height) > 200 and max(free.h, free.w) < 2 * min(free.h, free.w):
        # as large as windows of 28 pixels allow: one more row or column of windows on each side would be too many
        assert (plan.h + 2) * (plan.w + 2) > bound


def test_patches_are_channel_row_column_in_raster_order():
    image = np.arange(28 * 56 * 3, dtype=np.int64).reshape(28, 56, 3).astype(np.uint8)
    patches, grid = image_patches(image)
    assert grid == (1, 2, 4)
    assert np.array_equal(patches[5].reshape(3, 14, 14), image[14:28, 14:28].transpose(2, 0, 1))


def test_every_byte_is_normalised_as_released():
    """Divided by 255 in float64, rounded to float32, minus 0.5, doubled; across the ends of blocks too."""
    patches = np.resize(np.arange(256, dtype=np.uint8), (BLOCK // 294 + 3, 588))
    want = ((patches / np.float64(255)).astype(np.float32) - np.float32(0.5)) * np.float32(2)
    assert normalise(patches).tobytes() == want.tobytes()


@pytest.mark.parametrize("size", [(56, 84), (60, 40), (5, 5), (8000, 30)])
def test_array_is_as_good_as_an_image(size):
    """A whole grid, padded, tiny, resized; the image given is left as it was."""
    image = noise(*size)
    array = np.asarray(image)
    before = array.copy()
    (a, grid_a), (b, grid_b) = process_image(image), process_image(array)
    assert a.tobytes() == b.tobytes() and grid_a.tolist() == grid_b.tolist()
    np.testing.assert_array_equal(np.asarray(image), before)
    flipped, _ = process_image(array[:, ::-1])
    assert flipped.tobytes() == process_image(np.ascontiguousarray(array[:, ::-1]))[0].tobytes()


def test_padding_is_minus_one_right_and_below():
    pixels, grid = process_image(np.full((20, 30, 3), 255, np.uint8))
    _, h, w = grid[0]
    image = pixels.reshape(h, w, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, h * 14, w * 14)
    assert (image[:, :20, :30] == 1).all()
    assert (image[:, 20:] == -1).all() and (image[:, :, 30:] == -1).all()


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 60, height: int = 40) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"GIF89a"])
def test_bytes_that_are_no_image(data):
    with pytest.raises(BadRecord) as bad:
        open_image(data, "record 7")
    assert bad.value.reason == "broken_image" and bad.value.key == "record 7"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_image(kind):
    data = encoded(noise(), kind)
    with pytest.raises(BadRecord) as bad:
        image_patches(open_image(data[: len(data) * 2 // 3], "k"), key="k")
    assert bad.value.reason == "broken_image"


@given(st.integers(0, 10**9), st.integers(1, 20), st.sampled_from(["PNG", "JPEG", "GIF"]))
def test_damaged_bytes_never_crash(seed, count, kind):
    """Either an image comes out, or a BadRecord."""
    rng = np.random.default_rng(seed)
    data = np.frombuffer(encoded(noise(), kind), np.uint8).copy()
    data[rng.integers(0, len(data), count)] = rng.integers(0, 256, count)
    try:
        patches, grid = image_patches(open_image(data.tobytes()))
        assert len(patches) == grid[1] * grid[2]
    except BadRecord as bad:
        if bad.reason not in ("broken_image", "absurd_size"):
            raise


def test_missing_file(tmp_path):
    with pytest.raises(BadRecord) as bad:
        open_image(tmp_path / "none.png", "k")
    assert bad.value.reason == "missing_file"


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3)])
def test_image_without_pixels(shape):
    with pytest.raises(BadRecord) as bad:
        image_patches(np.zeros(shape, np.uint8))
    assert bad.value.reason == "absurd_size"


@pytest.mark.parametrize("array", [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 4), np.uint8), np.zeros((5, 5, 3))])
def test_array_of_another_form(array):
    with pytest.raises(BadRecord) as bad:
        image_patches(array)
    assert bad.value.reason == "broken_image"


def png_header(width: int, height: int) -> bytes:
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0")
    chunk = [struct.pack(">I", len(b) - 4) + b + struct.pack(">I", zlib.crc32(b)) for b in (body, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk)


@pytest.mark.parametrize("size", [(100_000, 100_000), (MAX_PIXELS + 1, 1), (60_000, 3_000)])
def test_decompression_bomb_is_refused_before_decoding(size):
    with pytest.raises(BadRecord) as bad:
        image_patches(open_image(png_header(*size), "bomb"), key="bomb")
    assert bad.value.reason == "absurd_size"


def test_animation_counts_as_its_first_frame():
    frames = [PIL.Image.new("RGB", (30, 30), c) for c in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image = open_image(data)
    image.seek(1)
    patches, _ = image_patches(image)
    assert tuple(patches[0].reshape(3, 14, 14)[:, 0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_8_bits_is_converted_as_pil_does(mode):
    """Released behaviour is `convert("RGB")` and nothing else."""
    image = noise().convert(mode)
    assert image.mode == mode
    patches, _ = image_patches(image)
    wanted = np.asarray(image.convert("RGB"))[:14, :14].transpose(2, 0, 1).reshape(-1)
    assert np.array_equal(patches[0], wanted)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", ""])
def test_grey_image_of_16_bits_keeps_its_upper_8_bits(kind):
    """Not clipped to white, as PIL's own conversion does; a PGM arrives in PIL's mode I instead of I;16."""
    deep = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    image = PIL.Image.fromarray(deep)
    patches, _ = image_patches(open_image(encoded(image, kind)) if kind else image)
    assert np.array_equal(patches[0], np.tile((deep[:14, :14] >> 8).reshape(-1), 3))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_image_of_32_bits_is_refused_by_its_mode(mode):
    for image in (noise().convert(mode), open_image(encoded(noise().convert(mode), "TIFF"))):
        with pytest.raises(BadRecord, match=f"mode {mode} .*convert the image to 8 or 16 bits") as bad:
            image_patches(image)
        assert bad.value.reason == "broken_image"


def test_exif_orientation_is_ignored_as_released():
    image = noise(60, 40)
    exif = PIL.Image.Exif()
    exif[274] = 6  # "rotate by 90 degrees to view"
    turned = open_image(encoded(image, "PNG", exif=exif))
    assert turned.getexif()[274] == 6
    assert np.array_equal(image_patches(turned)[0], image_patches(image)[0])

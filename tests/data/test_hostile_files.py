"""Files that strangers name or wrote: pipes, devices, huge and damaged ones: one bad record each."""

import io
import json
import logging
import os
import resource
import socket
import struct
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.build import build, summary
from kimi_jax.data.example import Image, Text
from kimi_jax.data.files import MAX_MEDIA_BYTES
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.sources import jsonl, open_source, parquet_rows
from kimi_jax.data.video import read_video, sample_indices
from tests.data.sources.media import png, write_jsonl
from tests.data.synthetic import SOURCES, tokenizer
from tests.data.synthetic import settings as run_settings


def opened(kind: str, path):
    return open_source(SourceConfig(kind=kind, path=str(path)))


def reason_of(source, index: int) -> str:
    try:
        source[index]
    except BadRecord as bad:
        return bad.reason
    return "good"


# ---------------------------------------------------------------------------------------------------------------- files


def test_media_that_are_no_regular_file_are_one_bad_record_each(tmp_path):
    """A FIFO, a device (through a link), a socket, a folder, a large file, half a surrogate pair."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket.png"))
    (tmp_path / "folder.png").mkdir()
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_MEDIA_BYTES + 1)  # takes no room on the disk
    names = ["pipe.png", "zero.png", "socket.png", "folder.png", "large.png", "\ud800.png", "a\0.png"]
    records = [{"parts": [{kind: name}]} for name in names for kind in ("image", "video")]
    source = opened("jsonl", write_jsonl(tmp_path / "d.jsonl", [*records, {"text": "fine"}]))
    found = [reason_of(source, i) for i in range(len(source))]
    assert found == ["missing_file"] * 8 + ["absurd_size"] * 2 + ["unsafe_path"] * 4 + ["good"]
    manifest = build(str(tmp_path / "d.jsonl"), str(tmp_path / "out"), workers=0, max_bad_fraction=1.0)
    assert manifest["records"] == 1 and sum(manifest["bad"].values()) == 14


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_data_file_that_is_a_pipe_is_refused(kind, tmp_path):
    os.mkfifo(tmp_path / f"d.{kind}")
    with pytest.raises(ConfigError, match="not a regular file"):
        opened(kind, tmp_path / f"d.{kind}{'?template={a}' if kind == 'parquet' else ''}")


# ---------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl_skips_a_byte_order_mark_and_blank_lines(tmp_path):
    """Line numbers stay those of an editor; `null` is no id."""
    for head in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b" \t\r\n"):
        text = head + b'{"text": "a"}\r\n\r\n   \r\n\t\n {"id": null, "text": "b"}'
        (tmp_path / "d.jsonl").write_bytes(text)
        source = opened("jsonl", tmp_path / "d.jsonl")
        first = 1 + head.count(b"\n")
        assert [source[i].key for i in range(len(source))] == [f"d.jsonl:{first}", f"d.jsonl:{first + 4}"]


def test_jsonl_line_that_is_too_long_is_a_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    source = opened("jsonl", write_jsonl(tmp_path / "d.jsonl", [{"text": "x" * 100}, {"text": "y"}, " " * 101]))
    assert [reason_of(source, i) for i in range(3)] == ["absurd_size", "good", "absurd_size"]


JSONL_BYTES = st.lists(
    st.binary(max_size=30)
    | st.sampled_from(
        [b"\n", b"\r\n", b"\xef\xbb\xbf", b" ", b'{"text": "a"}', b'{"parts": [{"image": "\\ud800"}]}', b"{"]
    )
)


def jsonl_never_crashes(folder, pieces: list[bytes]) -> None:
    file = folder / "d.jsonl"
    file.write_bytes(b"".join(pieces))
    try:
        source = opened("jsonl", file)
    except ConfigError:
        return
    for i in range(len(source)):
        reason_of(source, i)


@settings(max_examples=150)
@given(JSONL_BYTES)
def test_any_jsonl_bytes_give_examples_or_bad_records(tmp_path_factory, pieces):
    jsonl_never_crashes(tmp_path_factory.mktemp("fuzz"), pieces)


@pytest.mark.fuzz
@settings(max_examples=20_000)
@given(JSONL_BYTES)
def test_any_jsonl_bytes_at_length(tmp_path_factory, pieces):
    jsonl_never_crashes(tmp_path_factory.getbasetemp(), pieces)


# -------------------------------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize(
    "dtype", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()), "fixed"]
)
def test_parquet_column_of_any_binary_type_holds_images(dtype, tmp_path):
    dtype = pa.binary(len(png(8, 8))) if dtype == "fixed" else dtype
    values = pa.array([png(8, 8)] * 3)
    column = values.dictionary_encode() if pa.types.is_dictionary(dtype) else values.cast(dtype)
    pq.write_table(pa.table({"image": column, "t": ["x"] * 3}), tmp_path / "d.parquet")
    image, text = opened("parquet", f"{tmp_path}/d.parquet?template={{image}}{{t}}")[1].parts
    assert isinstance(image, Image) and text == Text("x", 1.0)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"1", b"2"]),
        pa.array(["1", "2"], pa.large_string()),
        pa.array(["1", "2"], pa.string_view()),
        pa.array([1, 2], pa.timestamp("ns", "Europe/Berlin")),
        pa.array([1, 2], pa.time64("ns")),
        pa.array([1, 2], pa.duration("ns")),
    ],
)
def test_parquet_column_of_any_plain_type_prints_as_text(column, tmp_path):
    odd = pa.array([[("a", {"b": [1]})]] * 2, pa.map_(pa.string(), pa.struct([("b", pa.list_(pa.int8()))])))
    pq.write_table(pa.table({"odd": odd, "t": column}), tmp_path / "d.parquet")
    source = opened("parquet", f"{tmp_path}/d.parquet?template={{t}}!")
    assert all(isinstance(part, Text) and part.text.endswith("!") for i in range(2) for part in source[i].parts)


def test_parquet_files_may_differ_in_order_width_and_nulls(tmp_path):
    tables = [
        pa.table({"a": ["1"], "b": ["2"]}),
        pa.table({"b": pa.array(["2"], pa.large_string()), "c": [0], "a": ["1"]}),
        pa.table({"a": ["1"], "b": pa.nulls(1)}),
    ]
    for i, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{i}.parquet")
    source = opened("parquet", f"{tmp_path}/*.parquet?template={{a}}{{b}}")
    assert [source[i].parts[0].text for i in range(3)] == ["12", "12", "1"]


def test_parquet_with_repeated_values_is_read_in_little_memory(tmp_path):
    """1,000 rows of one value of 600 KB: a file of a kilobyte that would decode to 600 MB."""
    cell = {"bytes": png(400, 500)[:600_000].ljust(600_000, b"\0"), "path": "a.png"}
    pq.write_table(pa.table({"image": pa.array([cell] * 1000)}), tmp_path / "d.parquet", compression="zstd")
    source = opened("parquet", f"{tmp_path}/d.parquet?template={{image}}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason_of(source, 999) == "good"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_parquet_row_group_too_large_for_memory_is_refused_with_advice(tmp_path):
    """Run lengths hide 400 MB of numbers in a small file; the limit is a gigabyte, so it is tried at a tenth."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10_000_000, np.int32)), pa.array([7.5])).cast(
        pa.float64()
    )
    pq.write_table(pa.table({"t": column}), tmp_path / "d.parquet", row_group_size=10_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_rows, "MAX_GROUP_BYTES", 100_000_000)
        with pytest.raises(ConfigError, match="row_group_size=1000"):
            opened("parquet", f"{tmp_path}/d.parquet?template={{t}}")


def damaged_parquet(folder, seed: int, count: int) -> None:
    file = folder / "d.parquet"
    table = pa.table({"image": [png(4, 4)] * 9, "t": [f"text {i}" for i in range(9)], "n": list(range(9))})
    pq.write_table(table, file, row_group_size=3, compression="none" if seed % 2 else "snappy")
    data = bytearray(file.read_bytes())
    rng = np.random.default_rng(seed)
    end = len(data) if seed % 3 else 500  # a third of them in the pages of the first rows only
    for at, value in zip(rng.integers(0, end, count), rng.integers(0, 256, count), strict=True):
        data[at] = value
    file.write_bytes(data)
    try:
        source = opened("parquet", f"{file}?template={{image}}{{t}}{{n}}")
    except ConfigError:
        return
    for i in range(min(len(source), 20)):
        reason_of(source, i)


@settings(max_examples=150)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_damaged_parquet_gives_rows_bad_records_or_a_message(tmp_path_factory, seed, count):
    damaged_parquet(tmp_path_factory.mktemp("fuzz"), seed, count)


@pytest.mark.fuzz
@settings(max_examples=20_000)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_damaged_parquet_at_length(tmp_path_factory, seed, count):
    damaged_parquet(tmp_path_factory.getbasetemp(), seed, count)


@pytest.mark.parametrize("seed", [1205, 2090, 2707, 2873, 3169])
def test_damaged_parquet_metadata_does_not_end_the_process(seed, tmp_path):
    """Statistics that pyarrow's own metadata calls abort on, and a negative number of rows; found by `make fuzz`."""
    damaged_parquet(tmp_path, seed, 1 + seed % 12)


def test_damaged_parquet_row_group_is_a_bad_record_a_row(tmp_path):
    table = pa.table({"t": [f"text {i}" * 50 for i in range(30)]})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=10, compression="gzip", use_dictionary=False)
    column = pq.ParquetFile(tmp_path / "d.parquet").metadata.row_group(1).column(0)
    end = column.data_page_offset + column.total_compressed_size
    data = bytearray((tmp_path / "d.parquet").read_bytes())
    data[end - 40 : end] = bytes(40)
    (tmp_path / "d.parquet").write_bytes(data)
    source = opened("parquet", f"{tmp_path}/d.parquet?template={{t}}")
    assert [reason_of(source, i) for i in range(30)] == ["good"] * 10 + ["damaged_file"] * 10 + ["good"] * 10


def test_damaged_array_record_is_a_bad_record_by_name(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [{"text": f"text {i} " * 20} for i in range(10)])
    build(str(tmp_path / "d.jsonl"), str(tmp_path / "out"), workers=0)
    (shard,) = (tmp_path / "out").glob("*.array_record")
    data = bytearray(shard.read_bytes())
    filled = np.flatnonzero(np.frombuffer(data, np.uint8))
    data[filled[len(filled) // 2]] ^= 0xFF  # in one of the records in the middle
    shard.write_bytes(data)
    source = opened("array_record", tmp_path / "out")
    found = [reason_of(source, i) for i in range(10)]
    assert sorted(found) == ["damaged_file"] + ["good"] * 9
    at = found.index("damaged_file")
    with pytest.raises(BadRecord, match=rf"{shard.name}#{at}"):
        source[at]


# --------------------------------------------------------------------------------------------------------------- videos


def film(kind: str, codec: str, times: list[int], base: Fraction, rate: int) -> bytes:
    """64 x 48; the left half of the image is white, the right one a noise that grows."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = base
        for time in times:
            pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
            pixels[:, :32] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("matroska", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4"), ("mpegts", "mpeg2video"), ("flv", "flv"),
        ("mp4", "mpeg4"),
    ],
)  # fmt: skip
def test_video_that_is_cut_short_is_broken(kind, codec, part):
    data = film(kind, codec, list(range(50)), Fraction(1, 25), 25)
    assert len(read_video(data).frames) == 4
    cut = int(len(data) * part)
    with pytest.raises(BadRecord) as bad:
        read_video(data[: cut + (cut % 188 == 0)])
    assert bad.value.reason == "broken_video"


def test_video_of_variable_rate_is_sampled_by_its_own_times():
    """25 frames in the first second, then one a second: at most two a second are kept, at their true times."""
    times = [40 * i for i in range(25)] + [1000 + 1000 * i for i in range(30)]
    for kind, codec in (("webm", "libvpx"), ("mp4", "mpeg4")):
        video = read_video(film(kind, codec, times, Fraction(1, 1000), 1000 if kind == "mp4" else 25))
        stamps = np.array(video.timestamps)
        assert stamps[-30:] == pytest.approx(np.arange(1, 31), abs=0.002)  # both count in milliseconds
        assert (stamps < 1).sum() <= 3 and len(video.frames) == len(stamps)


def test_video_of_constant_rate_keeps_the_released_frames_and_stamps():
    """Times in whole milliseconds do not move the stamps of a video at 30 frames a second."""
    data = film("webm", "libvpx", [round(1000 * i / 30) for i in range(90)], Fraction(1, 1000), 30)
    assert list(read_video(data).timestamps) == [i / 30 for i in sample_indices(90, 30)]


@pytest.mark.parametrize(
    ("matrix", "shape", "white"),
    [
        ((0, 1, -1, 0), (64, 48), np.s_[:24]),  # to the right: the left half comes to the top
        ((0, -1, 1, 0), (64, 48), np.s_[40:]),
        ((-1, 0, 0, -1), (48, 64), np.s_[:, 40:]),
    ],
)
def test_video_that_a_phone_turned_is_upright(matrix, shape, white):
    data = film("mp4", "mpeg4", list(range(5)), Fraction(1, 10), 10)
    at = data.index(b"tkhd") + 44
    a, b, c, d = (v * 0x10000 for v in matrix)
    data = data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000) + data[at + 36 :]
    frame = read_video(data).frames[0]
    assert frame.shape == (*shape, 3)
    assert frame[white].mean() > 230  # white but for the compression; noise has 128


# --------------------------------------------------------------------------------------------------------------- masked


def test_source_without_any_loss_is_named_by_the_stream_and_the_build(tmp_path, caplog):
    tokenizer(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", [{"parts": [{"text": f"red {i}", "loss": 0}]} for i in range(8)])
    masked = opened("jsonl", tmp_path / "d.jsonl")
    data, model = run_settings(tmp_path / "tokenizer.json")
    name = next(name for name, source in data.sources.items() if not source.vision)
    with BatchStream(data, model, 40, sources=dict(SOURCES) | {name: masked}) as stream:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                next(stream)
        assert stream.report()["masked"] == [name]
    (warning,) = (r.getMessage() for r in caplog.records if "no example has a loss" in r.getMessage())
    assert warning.startswith(f"source {name!r}")
    manifest = build(str(tmp_path / "d.jsonl"), str(tmp_path / "out"), workers=0)
    assert "no record has a loss anywhere" in summary(manifest, "out")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["learned"] == 0

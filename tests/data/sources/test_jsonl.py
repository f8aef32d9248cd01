"""JSONL: both forms of a record, what is refused and by which name, and an index that survives any bytes."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Image, Text, Video
from kimi_jax.data.image import decode
from kimi_jax.data.sources import jsonl, open_source
from kimi_jax.data.sources.jsonl import parse_line
from kimi_jax.data.sources.record import Media
from tests.data.sources.media import clip, png, write_jsonl


def _open(path):
    return open_source(SourceConfig(kind="jsonl", path=str(path)))


def _reason(values) -> str:
    line = values if isinstance(values, bytes) else json.dumps(values).encode()
    with pytest.raises(BadRecord) as e:
        parse_line(line, "x.jsonl:1", PurePath("folder"))
    return e.value.reason


def test_both_forms_read(tmp_path):
    """Parts in reading order, loss weights kept, media decoded from beside the file, keys from `id` or the line."""
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(png(40, 30))
    (tmp_path / "run.mp4").write_bytes(clip())
    file = write_jsonl(
        tmp_path / "d.jsonl",
        [
            {"id": 7, "parts": [{"text": "Q", "loss": 0}, {"image": "img/a.png"}, {"text": "A"}]},
            "",
            {"text": "see <image>then <video>", "images": ["img/a.png"], "videos": ["run.mp4"]},
            {"text": "only text"},
        ],
    )
    source = _open(file)
    assert len(source) == 3
    first, second, third = (source[i] for i in range(3))
    assert first.key == "7"
    assert second.key == "d.jsonl:3"  # the blank line counts as a line of the file
    assert first.parts[0] == Text("Q", 0.0)
    assert first.parts[2] == Text("A", 1.0)
    assert decode(first.parts[1].image).size == (40, 30)
    assert [type(p) for p in second.parts] == [Text, Image, Text, Video]
    # 8 frames at 4 a second are 2 s; the released rule keeps two a second
    assert len(second.parts[3].frames) == 4
    assert third.parts == (Text("only text", 1.0),)


@pytest.mark.parametrize(
    "values, reason",
    [
        (b"{", "bad_json"),
        (b"\xff\xfe{}", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"text": ' + b"9" * 5000 + b"}", "bad_json"),
        ([1], "bad_json"),
        ({}, "bad_json"),
        ({"text": 3}, "bad_json"),
        ({"text": "a", "imgs": []}, "bad_json"),
        ({"text": "a", "images": "a.png"}, "bad_json"),
        ({"parts": {}}, "bad_json"),
        ({"parts": [{}]}, "bad_json"),
        ({"parts": ["a"]}, "bad_json"),
        ({"parts": [{"text": "a", "image": "b"}]}, "bad_json"),
        ({"parts": [{"text": "a", "weight": 1}]}, "bad_json"),
        ({"parts": [{"text": "a", "loss": -1}]}, "bad_json"),
        ({"parts": [{"text": "a", "loss": 10**400}]}, "bad_json"),
        ({"parts": [{"text": "a", "loss": True}]}, "bad_json"),
        ({"parts": [{"image": 3}]}, "bad_json"),
        ({"parts": [{"text": "a"}], "text": "b"}, "bad_json"),
        ({"text": "<image>"}, "placeholder_mismatch"),
        ({"text": "a", "images": ["a.png"]}, "placeholder_mismatch"),
        ({"text": "<video><image>", "images": ["a.png", "b.png"]}, "placeholder_mismatch"),
        ({"parts": []}, "empty"),
        ({"text": ""}, "empty"),
        ({"parts": [{"text": ""}]}, "empty"),
        ({"parts": [{"image": "/etc/passwd"}]}, "unsafe_path"),
        ({"parts": [{"image": "a/../../b.png"}]}, "unsafe_path"),
        ({"parts": [{"image": "..\\b.png"}]}, "unsafe_path"),
        ({"parts": [{"image": "gs://bucket/b.png"}]}, "unsafe_path"),
        ({"parts": [{"image": "C:/b.png"}]}, "unsafe_path"),
        ({"parts": [{"image": "a\0b"}]}, "unsafe_path"),
    ],
)
def test_bad_lines_have_a_reason(values, reason):
    """Each way to be wrong has its own slug, before any file is opened."""
    assert _reason(values) == reason


def test_media_that_do_not_read(tmp_path):
    """A missing, a broken and an absurd file show when the example is asked for, named by record and file."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "bad.mp4").write_bytes(b"no clip")
    header = png(1, 1)[:16] + (100_000).to_bytes(4, "big") * 2 + png(1, 1)[24:]  # says 100,000 x 100,000
    (tmp_path / "huge.png").write_bytes(header)
    names = [("image", "gone.png"), ("image", "bad.png"), ("video", "bad.mp4"), ("image", "huge.png")]
    source = _open(write_jsonl(tmp_path / "d.jsonl", [{"id": n, "parts": [{k: n}]} for k, n in names]))
    reasons = []
    for i, (_, name) in enumerate(names):
        with pytest.raises(BadRecord) as e:
            source[i]
        assert e.value.key == name
        assert name in e.value.detail
        reasons.append(e.value.reason)
    # the checksum of the forged header is wrong: PIL may call it broken before it looks at the size
    assert reasons[:3] == ["missing_file", "broken_image", "broken_video"]
    assert reasons[3] in ("absurd_size", "broken_image")


def test_link_of_the_users_own_is_followed(tmp_path):
    """Media folders are often links to a larger disk; only the path in the record is restricted."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").write_bytes(png(8, 8))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "img").symlink_to(tmp_path / "disk")
    source = _open(write_jsonl(tmp_path / "data" / "d.jsonl", [{"parts": [{"image": "img/a.png"}]}]))
    assert decode(source[0].parts[0].image).size == (8, 8)


@given(st.lists(st.text().map(lambda t: json.dumps({"text": "x" + t})), min_size=1), st.integers(1, 40), st.booleans())
def test_index_finds_every_line(tmp_path_factory, lines, chunk, newline):
    """Whatever the text and wherever the file is cut into chunks, with or without a last newline, CRLF or LF."""
    file = tmp_path_factory.mktemp("index") / "d.jsonl"
    separator = b"\r\n" if chunk % 2 else b"\r\n\n\r\n"  # also with blank lines between
    file.write_bytes(separator.join(line.encode() for line in lines) + (b"\n" if newline else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_CHUNK", chunk)
        source = _open(file)
    assert [source[i].parts[0].text for i in range(len(source))] == [json.loads(line)["text"] for line in lines]


_KEYS = st.sampled_from(["text", "parts", "images", "videos", "id", "image", "video", "loss"]) | st.text()
_LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text()


@given(st.recursive(_LEAVES, lambda x: st.lists(x) | st.dictionaries(_KEYS, x)))
def test_any_json_gives_a_record_or_a_bad_record(values):
    """No line can stop a run: whatever JSON it holds."""
    try:
        record = parse_line(json.dumps(values).encode(), "here", PurePath("folder"))
    except BadRecord:
        return
    assert record.parts
    assert all(isinstance(p, Text | Media) for p in record.parts)


def test_copies_and_threads_read_the_same(tmp_path):
    """Workers get a pickled copy and read from several threads at once."""
    source = _open(write_jsonl(tmp_path / "d.jsonl", [{"text": f"line {i}"} for i in range(200)]))
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).permutation(200).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: copy[i].parts[0].text, order)) == [f"line {i}" for i in order]


def test_what_is_not_there(tmp_path):
    """No file, no lines, and a split that the path cannot express are errors of the config."""
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "val.jsonl").write_text('{"text": "a"}\n')
    for path in ("gone.jsonl", "empty.jsonl"):
        with pytest.raises(ConfigError, match=path):
            _open(tmp_path / path)
    with pytest.raises(ConfigError, match="no split 'val'"):
        open_source(SourceConfig(kind="jsonl", path=str(tmp_path / "val.jsonl"), split="val"))
    assert len(open_source(SourceConfig(kind="jsonl", path=str(tmp_path / "{split}.jsonl"), split="val"))) == 1

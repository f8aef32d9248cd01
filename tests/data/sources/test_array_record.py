"""Stored records: bytes that come back as they went in, random access over shards, damage that is named."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data.build import build
from kimi_jax.data.example import Image, Text, Video
from kimi_jax.data.sources import open_source
from kimi_jax.data.sources.record import Media, Record, pack, unpack
from tests.data.sources.media import clip, png, write_jsonl

# beartype picks at random which item of a tuple it checks, and hypothesis warns about that
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")

_TEXT = st.builds(Text, st.text(st.characters()), st.floats(0, 10))
_MEDIA = st.builds(Media, st.sampled_from(["image", "video"]), st.text(), st.binary())
_RECORD = st.builds(Record, st.text(), st.lists(_TEXT | _MEDIA).map(tuple))


@given(_RECORD, st.integers(-1, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_record_survives(record, tokens, patches):
    """Any text (half surrogates too) and any bytes; the same record always gives the same bytes."""
    data = pack(record, tokens, patches)
    assert unpack(data) == (record, tokens, patches)
    assert pack(unpack(data).record, tokens, patches) == data


@given(_RECORD, st.data())
def test_damaged_record_is_refused(record, data):
    """Every proper beginning of a record, and one with a byte too many."""
    whole = pack(record, 1, 2)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:cut], whole + b"x"):
        with pytest.raises(ValueError, match="record"):
            unpack(damaged)


@given(st.binary())
def test_foreign_bytes_are_refused(data):
    with pytest.raises(ValueError, match="record"):
        unpack(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Ten records in shards of three: text, an image and a clip, in turn."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "run.mp4").write_bytes(clip())
    records = []
    for i in range(10):
        (folder / f"{i}.png").write_bytes(png(20 + i, 30, seed=i))
        media = [{}, {"images": [f"{i}.png"]}, {"videos": ["run.mp4"]}][i % 3]
        records.append({"id": f"r{i}", "text": f"{i} " + ["", "<image>", "<video>"][i % 3], **media})
    write_jsonl(folder / "d.jsonl", records)
    build(str(folder / "d.jsonl"), str(folder / "out"), workers=0, shard_size=3)
    return folder


def _open(folder):
    return open_source(SourceConfig(kind="array_record", path=str(folder)))


def test_what_was_built_reads_as_the_jsonl_does(built):
    """Order, keys, text and media of every record; the stored bytes are the files themselves."""
    jsonl = open_source(SourceConfig(kind="jsonl", path=str(built / "d.jsonl")))
    stored = _open(built / "out")
    assert len(stored) == 10
    for i in range(10):
        ours, theirs = stored[i], jsonl[i]
        assert ours.key == theirs.key
        for a, b in zip(ours.parts, theirs.parts, strict=True):
            if isinstance(a, Image):
                np.testing.assert_array_equal(np.asarray(a.image), np.asarray(b.image))
            elif isinstance(a, Video):
                np.testing.assert_array_equal(np.asarray(a.frames), np.asarray(b.frames))
            else:
                assert a == b
    assert stored.record(1).parts[1].data == (built / "1.png").read_bytes()


def test_lengths(built):
    """Patches of every record in one array, without reading the records."""
    source = _open(built / "out")
    assert source.lengths.dtype == np.int32
    assert source.lengths[:, 0].tolist() == [-1] * 10  # built without a tokenizer
    assert source.lengths[:, 1].tolist() == [source.stored(i).patch_length for i in range(10)]
    # 21 x 30 pixels: 2 x 4 patches of 14 after padding to windows of 28; the clip: 4 frames of 64 x 48
    assert source.lengths[:3, 1].tolist() == [0, 8, 4 * 6 * 4]


def test_copies_and_threads_read_the_same(built):
    source = _open(built / "out")
    source[0]  # an open reader must not travel
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: copy[i].key, [i % 10 for i in range(200)]))
    assert keys == [f"r{i % 10}" for i in range(200)]
    with pytest.raises(IndexError):
        copy[10]


def test_damage_is_named(built, tmp_path):
    """No manifest, a manifest of a later version, a shard cut short, a shard that is gone."""
    with pytest.raises(ConfigError, match=r"no dataset\.json.*kimi_jax\.data build"):
        _open(tmp_path)
    manifest = json.loads((built / "out" / "dataset.json").read_text())
    shards = [built / "out" / s["name"] for s in manifest["shards"]]
    for s in shards:
        (tmp_path / s.name).write_bytes(s.read_bytes())
    (tmp_path / "dataset.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ConfigError, match="99"):
        _open(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        _open(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    (tmp_path / shards[1].name).write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{shards[1].name}.*copy it again"):
        _open(tmp_path)
    (tmp_path / shards[1].name).unlink()
    with pytest.raises(ConfigError, match="is missing"):
        _open(tmp_path)

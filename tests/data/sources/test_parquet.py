"""Parquet: generated files of every column type that Hugging Face writes, and the real NLVR and GSM8K files."""

import pickle

import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from kimi_jax.config import ConfigError, SourceConfig  # noqa: E402
from kimi_jax.data import BadRecord  # noqa: E402
from kimi_jax.data.example import Text, Video  # noqa: E402
from kimi_jax.data.image import decode  # noqa: E402
from kimi_jax.data.sources import open_source, parquet_rows  # noqa: E402
from tests.data.sources.media import clip, png  # noqa: E402
from tests.environment import shared  # noqa: E402


def _open(path):
    return open_source(SourceConfig(kind="parquet", path=str(path)))


@pytest.fixture
def folder(tmp_path):
    """Two files of three rows in row groups of two."""
    for n in range(2):
        rows = [
            {
                "id": f"r{n}{i}",
                "image": {"bytes": png(10 + i, 20), "path": f"{i}.png"},
                "pages": [{"bytes": png(8, 8 + j), "path": None} for j in range(i)],
                "movie": clip(),
                "answer": f"answer {i}",
                "score": i * 0.5,
            }
            for i in range(3)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"train-{n}.parquet", row_group_size=2)
    return tmp_path


def test_every_column_type(folder):
    """A struct image, a list of images (also an empty one), a clip as bytes, text and a number, over several files."""
    source = _open(f"{folder}/train-*.parquet?template={{image}}{{pages}}{{video:movie}}{{loss=1}}{{answer}} {{score}}")
    assert len(source) == 6
    for i in range(6):
        example = source[i]
        image, *pages, movie, text = example.parts
        assert example.key == f"r{i // 3}{i % 3}"
        assert decode(image.image).size == (10 + i % 3, 20)
        assert [decode(p.image).size for p in pages] == [(8, 8 + j) for j in range(i % 3)]
        assert isinstance(movie, Video)
        assert text == Text(f"answer {i % 3} {i % 3 * 0.5}", 1.0)


def test_copies_and_a_small_cache(folder, monkeypatch):
    """A pickled copy reads the same, and a cache too small for two row groups changes nothing but speed."""
    monkeypatch.setattr(parquet_rows, "CACHE_BYTES", 1)
    source = _open(f"{folder}/train-*.parquet?template={{answer}}")
    copy = pickle.loads(pickle.dumps(source))
    for i in (5, 0, 3, 1, 4, 2):
        assert copy[i] == source[i]
    assert len(copy.rows._cache) == 1


def test_bad_rows(tmp_path):
    """A path without bytes, nothing at all, and bytes that are no image."""
    rows = [
        {"image": {"bytes": None, "path": "somewhere/else.png"}, "text": "a"},
        {"image": None, "text": None},
        {"image": {"bytes": b"junk", "path": None}, "text": "c"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    source = _open(f"{tmp_path}/d.parquet?template={{image}}{{text}}")
    for i, reason in enumerate(("unsafe_path", "empty", "broken_image")):
        with pytest.raises(BadRecord) as e:
            source[i]
        assert (e.value.reason, e.value.key) == (reason, f"d.parquet#{i}")


def test_mistakes_of_the_config(folder):
    for path, message in (
        ("train-0.parquet", "needs a template"),
        ("gone.parquet?template={answer}", "no parquet file"),
        ("train-0.parquet?template={anwser}", "did you mean 'answer'"),
    ):
        with pytest.raises(ConfigError, match=message):
            _open(folder / path)
    (folder / "text.parquet").write_text("not parquet")
    with pytest.raises(ConfigError, match="not a readable parquet file"):
        _open(folder / "text.parquet?template={a}")


def test_nlvr():
    """The real file: 5,934 statements about images of 400 x 100 pixels."""
    file = shared("data/nlvr_dev.parquet")
    source = _open(f"{file}?template={{image}}{{statement}} True or false?{{loss=1}} {{label}}")
    assert len(source) == 5934
    image, question, answer = source[1234].parts
    assert decode(image.image).size == (400, 100)
    assert question.loss_weight == 0.0
    assert question.text.endswith(" True or false?")
    assert answer.text in (" true", " false")


def test_gsm8k():
    """Text only."""
    source = _open(f"{shared('data/gsm8k_train.parquet')}?template={{question}}{{loss=1}}\n{{answer}}")
    assert len(source) == 7473
    assert "####" in source[7472].parts[1].text

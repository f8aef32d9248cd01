"""TFDS and seqio sources with the real libraries, multimodal, up to packed batches (`make test-tfds` has them).

Where they are not installed the tests skip, unless KIMI_SLOW=tfds says that they must be there.
"""

import importlib
import importlib.util
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from kimi_jax.config import ConfigError, DataConfig, SourceConfig, preset
from kimi_jax.data.example import Image, Text, Video
from kimi_jax.data.image import decode
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.sources import open_source
from kimi_jax.data.tokenizer import train_tokenizer
from tests.environment import REPO

pytestmark = pytest.mark.slow
TEMPLATE = "{image}{question}{loss=1} {answer}"


def _needs(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing and os.environ.get("KIMI_SLOW") == "tfds":
        pytest.fail(f"KIMI_SLOW=tfds, but {missing} cannot be imported")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make test-tfds")


def _tfds(path, split="train"):
    return open_source(SourceConfig(kind="tfds", path=str(path), split=split))


def _seqio(path, split="train"):
    return open_source(SourceConfig(kind="seqio", path=f"tests.slow.tfds_dataset.tasks:{path}", split=split))


def _pixels(part: Image) -> np.ndarray:
    return np.asarray(decode(part.image))


def _row(index: int) -> dict:
    from tests.slow.tfds_dataset.boxes import row

    return row(index)


def _packed(tmp_path, **sources: SourceConfig) -> tuple[dict, dict]:
    """One batch of those sources through the real pipeline with worker processes, and its report."""
    tokenizer = str(tmp_path / "tokenizer.json")
    train_tokenizer([_row(i)["question"] for i in range(9)], 300, tokenizer)
    data = DataConfig(
        sources=sources, tokenizer=tokenizer, sequence_length=256, rows_per_pack=1, num_packs=2,
        vision_bins=((64, 2),), vision_ratio=((0.0, 0.05),), num_workers=1,
    )  # fmt: skip
    stream = BatchStream(data, preset("demo"), total_steps=10)
    try:
        return next(stream), stream.report()
    finally:
        stream.close()


# --------------------------------------------------------------------------------------------------------------- TFDS


def _prepare(name: str, folder, file_format: str = "array_record") -> str:
    """Writes the data set as `tfds build` does and returns its folder."""
    _needs("tensorflow_datasets")
    boxes = importlib.import_module("tests.slow.tfds_dataset.boxes")
    builder = getattr(boxes, name)(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Images and text, in ArrayRecord format."""
    return _prepare("Boxes", tmp_path_factory.mktemp("boxes"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Images, clips and text, in ArrayRecord format."""
    return _prepare("Clips", tmp_path_factory.mktemp("clips"))


@pytest.mark.tfds
def test_tfds_examples(clips):
    """Every feature type of a multimodal data set, example by example, equal to the rows it was written from."""
    source = _tfds(
        f"{clips}?template={{image}}{{pages}}{{clip}}{{grey}}{{question}}{{loss=1}} {{answer}} {{meta/number}}"
    )
    assert len(source) == 30
    seen = set()
    for i in range(30):
        example = source[i]
        number = int(example.parts[-1].text.split()[-1])  # TFDS shuffles when it writes
        seen.add(number)
        row = _row(number)
        image, *pages, clip, grey, question, answer = example.parts
        np.testing.assert_array_equal(_pixels(image), row["image"])
        assert len(pages) == number % 3
        for page, expected in zip(pages, row["pages"], strict=True):
            np.testing.assert_array_equal(_pixels(page), expected)
        assert isinstance(clip, Video)
        np.testing.assert_array_equal(np.asarray(clip.frames), row["clip"])
        assert list(clip.timestamps) == [t / 2 for t in range(len(row["clip"]))]
        np.testing.assert_array_equal(_pixels(grey)[..., :1], row["grey"])
        assert question == Text(row["question"], 0.0)
        assert answer == Text(f" {row['answer']} {number}", 1.0)
    assert seen == set(range(30))


@pytest.mark.tfds
def test_tfds_splits_and_copies(prepared):
    """Another split, a slice of one, and a pickled copy."""
    path = f"{prepared}?template={{question}}"
    assert len(_tfds(path, "validation")) == 6
    part = _tfds(path, "train[10:15]")
    assert [part[i].parts for i in range(5)] == [_tfds(path)[10 + i].parts for i in range(5)]
    copy = pickle.loads(pickle.dumps(part))
    assert [copy[i] for i in range(5)] == [part[i] for i in range(5)]


@pytest.mark.tfds
def test_tfds_reads_without_tensorflow(prepared):
    """TensorFlow is not imported: neither its start-up time nor its hold on the accelerators."""
    code = (
        "import sys; from kimi_jax.config import SourceConfig; from kimi_jax.data.sources import open_source\n"
        f"s = open_source(SourceConfig(kind='tfds', path={prepared + '?template=' + TEMPLATE!r}))\n"
        "assert len(s[0].parts) == 3; print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.tfds
def test_tfds_mistakes(prepared, tmp_path):
    """An unknown name, split or feature, no template, and a data set in a format without random access."""
    for path, split, message in (
        ("no_such_set?template={a}", "train", "no TFDS data set 'no_such_set'"),
        (f"{prepared}?template={{imge}}", "train", "did you mean 'image'"),
        (prepared, "train", "needs a template"),
        (f"{prepared}?template={TEMPLATE}", "tset", "no split 'tset'"),
    ):
        with pytest.raises(ConfigError, match=message):
            _tfds(path, split)
    with pytest.raises(ConfigError, match="file_format=array_record"):
        _tfds(f"{_prepare('Boxes', tmp_path, 'tfrecord')}?template={TEMPLATE}")


@pytest.mark.tfds
def test_tfds_becomes_batches(prepared, clips, tmp_path):
    """Images and clips arrive in the vision bins, read by a worker process."""
    path = f"{clips}?template={{image}}{{clip}}{{question}}{{loss=1}} {{answer}}"
    with_media = SourceConfig(kind="tfds", path=path, vision=True)
    text = SourceConfig(kind="tfds", path=f"{prepared}?template={{question}} {{answer}}")
    batch, report = _packed(tmp_path, boxes=with_media, text=text)
    assert (batch.feature_index >= 0).sum() > 0
    assert set(np.unique(batch.modality[batch.segment_ids > 0])) == {0, 2}
    assert not report["bad"]


# -------------------------------------------------------------------------------------------------------------- seqio


@pytest.mark.seqio
def test_seqio_multimodal():
    """A task with images and clips, in the task's own order."""
    _needs("seqio")
    source = _seqio("boxes_vqa?template={image}{clip}{question}{loss=1} {answer}")
    assert len(source) == 30
    for i in range(30):
        image, clip, question, answer = source[i].parts
        row = _row(i)
        np.testing.assert_array_equal(_pixels(image), row["image"])
        np.testing.assert_array_equal(np.asarray(clip.frames), row["clip"])
        assert (question, answer) == (Text(row["question"], 0.0), Text(" " + row["answer"], 1.0))
    assert len(_seqio("boxes_vqa?template={question}", "validation")) == 6
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3].parts[2:] == source[3].parts[2:]


@pytest.mark.seqio
@pytest.mark.parametrize("task", ["boxes_tokens", "boxes_pretokenized"])
def test_seqio_text(task):
    """Without a template: inputs given, targets learned; ids go back to text by the task's vocabulary, end mark off."""
    _needs("seqio")
    source = _seqio(task)
    assert [e.parts for e in (source[i] for i in range(len(source)))] == [
        (Text(f"Frage {i}: größer?", 0.0), Text(f"ja {i}", 1.0)) for i in range(5)
    ]


@pytest.mark.seqio
def test_seqio_mistakes(monkeypatch):
    _needs("seqio")
    from kimi_jax.data.sources import seqio

    for path, split, message in (
        ("boxes_vpa", "train", "did you mean 'boxes_vqa'"),
        ("boxes_mixture", "train", "is a seqio mixture"),
        ("boxes_vqa", "train", "has no `targets`"),
        ("boxes_vqa?template={imge}", "train", "did you mean 'image'"),
        ("boxes_vqa?template={image}", "test", "no split 'test'"),
    ):
        with pytest.raises(ConfigError, match=message):
            _seqio(path, split)
    with pytest.raises(ConfigError, match="cannot import 'no.such.module'"):
        open_source(SourceConfig(kind="seqio", path="no.such.module:task"))
    monkeypatch.setattr(seqio, "MAX_EXAMPLES", 29)
    with pytest.raises(ConfigError, match="over 29 examples"):
        _seqio("boxes_vqa?template={image}")


@pytest.mark.seqio
def test_seqio_becomes_batches(tmp_path):
    _needs("seqio")
    module = "tests.slow.tfds_dataset.tasks"
    images = SourceConfig(kind="seqio", path=f"{module}:boxes_vqa?template={TEMPLATE}", vision=True)
    text = SourceConfig(kind="seqio", path=f"{module}:boxes_tokens")
    batch, report = _packed(tmp_path, boxes=images, text=text)
    assert (batch.feature_index >= 0).sum() > 0
    assert set(np.unique(batch.modality[batch.segment_ids > 0])) == {0, 1}
    assert not report["bad"]

"""TensorFlow Datasets as a source, without TensorFlow: data sets prepared in ArrayRecord format, read by number.

    SourceConfig(kind="tfds", path="mnist?template={image}The digit is{loss=1} {label}", split="train[:90%]")

`path` is the name of a data set, `NAME/CONFIG:VERSION` as `tfds.builder` takes it (its files under $TFDS_DATA_DIR or
~/tensorflow_datasets), or the folder of a prepared one (`.../mnist/3.0.1`, with its `features.json`), then the template
(`template.py`). `split` may be a slice in TFDS's own notation. Nothing is downloaded here: prepare the data set once,

    tfds build --file_format=array_record NAME

Columns are the features by name, nested ones as `a/b`: Text, ClassLabel (its name), numbers, Image, Video, and
sequences of Image. A video's frames count as two a second: TFDS does not keep the rate. TFDS itself imports TensorFlow
for a data set with a Video feature; for all others none is needed.
"""

import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kimi_jax.config import ConfigError
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Example, Text
from kimi_jax.data.sources.arrays import media_value, text_value
from kimi_jax.data.sources.template import Column, Template, check_columns, split_path

EXAMPLE = "NAME?template={image}{question}{loss=1} {answer}"


class TfdsSource:
    """One split of a prepared TFDS data set. Opened again, lazily, in every process that it is sent to."""

    def __init__(self, name: str, split: str, template: Template) -> None:
        self.name, self.split, self.template = name, split, template
        self._open()
        check_columns(template, list(self._features), f"the data set {name!r}")
        self._kinds = {c: c.kind or _kind(self._features[c.name], c.name) for c in template.columns}

    def _open(self) -> None:
        self._builder = _builder(self.name)
        self._features = dict(_flat(self._builder.info.features, ""))
        self._data = _data_source(self._builder, self.name, self.split)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_builder", "_features", "_data")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        """Example `index` of the split. Raises BadRecord empty, broken_image or broken_video."""
        key = f"{self._builder.name}/{self.split}#{index}"
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        try:
            row = self._data[index]
        except (ValueError, OSError, RuntimeError, IndexError) as e:  # a damaged file, an image that does not decode
            raise BadRecord("broken_image", key, str(e)) from e
        values = {c: self._value(row, c, kind, key) for c, kind in self._kinds.items()}
        parts = self.template.fill(values)
        if all(isinstance(p, Text) and not p.text.strip() for p in parts):
            raise BadRecord("empty", key, "the features of the template are empty")
        return Example(parts, key)

    def _value(self, row: Any, column: Column, kind: str, key: str) -> Any:
        value = row
        for name in column.name.split("/"):
            value = value[name]
        if kind:
            return media_value(value, kind, column.name, key)
        feature = self._features[column.name]
        if isinstance(feature, tfds.features.ClassLabel):
            return feature.int2str(int(value)) if value >= 0 else None  # -1 is TFDS's "not known"
        return text_value(value)


def open_tfds(path: str, split: str) -> TfdsSource:
    """The source of `NAME?template=...`. Raises ConfigError for what is not prepared, a missing template or column."""
    name, template = split_path(path, EXAMPLE)
    if template is None:
        raise ConfigError(f"the TFDS source {path!r} needs a template that says how an example reads: {EXAMPLE}")
    return TfdsSource(name, split, template)


def _builder(name: str) -> Any:
    try:
        if os.path.isfile(os.path.join(name, "features.json")):
            return tfds.builder_from_directory(name)
        return tfds.builder(name)
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"TFDS needs {e.name!r} to read {name!r} (it has a Video feature?): pip install {e.name}"
        ) from e
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ConfigError(
            f"no TFDS data set {name!r}: {reason}. Give the name of one that is prepared or the folder with its "
            "features.json; a builder of your own must be imported before, or named by its folder"
        ) from e


def _data_source(builder: Any, name: str, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except (NotImplementedError, FileNotFoundError, AssertionError) as e:
        raise ConfigError(
            f"the TFDS data set {name!r} is not prepared in ArrayRecord format: run "
            f"`tfds build --file_format=array_record {builder.name}` once, or set TFDS_DATA_DIR to where it is"
        ) from e
    except ValueError as e:
        if not builder.info.splits:
            raise ConfigError(f"the TFDS data set {name!r} is not prepared: `tfds build` it once") from e
        raise ConfigError(f"the TFDS data set {name!r} has no split {split!r}: {list(builder.info.splits)}") from e


def _flat(features: Any, prefix: str) -> list[tuple[str, Any]]:
    flat = []
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            flat += _flat(feature, f"{prefix}{name}/")
        else:
            flat.append((prefix + name, feature))
    return flat


def _kind(feature: Any, name: str) -> str:
    """ "image", "video" or "" for text. Raises ConfigError for what a template cannot show."""
    inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
    if isinstance(feature, tfds.features.Video):  # itself a sequence of images
        return "video"
    if isinstance(inner, tfds.features.Image):
        return "image"
    if isinstance(feature, tfds.features.Text | tfds.features.ClassLabel | tfds.features.Scalar):
        return ""
    if isinstance(feature, tfds.features.Tensor) and feature.shape == ():
        return ""
    if isinstance(feature, tfds.features.Tensor) and feature.np_dtype == np.uint8 and len(feature.shape) in (3, 4):
        return "image" if len(feature.shape) == 3 else "video"
    raise ConfigError(f"feature {name!r} is {feature}: a template takes text, labels, numbers, images and videos")

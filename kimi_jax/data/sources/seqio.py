"""A seqio Task as a source: one split, before its tokens, read into memory.

    SourceConfig(kind="seqio", path="my_tasks.shapes:shapes_vqa?template={image}{question}{loss=1} {answer}")

`path` is `MODULE:TASK`: the module is imported (it registers the task), or `TASK` alone when something already did. The
task runs its preprocessors unshuffled and untrimmed. Columns of the template are the features that come out: strings,
images (uint8, 3 axes) and videos (4 axes), numbers, and token ids, which the task's own vocabulary turns back into text
(our tokenizer then makes its own tokens). The default template is

    {inputs_pretokenized}{loss=1}{targets_pretokenized}    where the task keeps them, else {inputs}{loss=1}{targets}

seqio yields streams, and exact resumption needs examples by number. So a split is read into memory once a process, at
most MAX_EXAMPLES and MAX_BYTES; beyond that, write the task out once as JSONL or as a TFDS data set. A seqio *mixture*
is refused: name its tasks as sources with weights, the packer's own mixture is the one that can be resumed.
"""

import importlib
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from kimi_jax.config import ConfigError, nearest
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Example, Text
from kimi_jax.data.sources.arrays import media_value, text_value
from kimi_jax.data.sources.template import Column, Template, check_columns, parse_template, split_path

MAX_EXAMPLES = 1_000_000
MAX_BYTES = 4 << 30
EXAMPLE = "MODULE:TASK?template={image}{question}{loss=1} {answer}"


class SeqioSource:
    """One split of a seqio Task, in memory. Sent to another process it is read again there, not copied."""

    def __init__(self, path: str, split: str, template: Template | None) -> None:
        self.path, self.split = path, split
        self._open()
        names = list(self._rows[0])
        self.template = template or _default_template(names, path)
        check_columns(self.template, names, f"the seqio task {path!r}")

    def _open(self) -> None:
        # TensorFlow would otherwise take the accelerators that JAX is about to use
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
        self._task = _task(self.path)
        self._rows = _read(self._task, self.split)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_task", "_rows")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """Example `index` of the split. Raises BadRecord empty, broken_image or broken_video."""
        key = f"{self._task.name}/{self.split}#{index}"
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = self._rows[index]
        parts = self.template.fill({c: self._value(row[c.name], c, key) for c in self.template.columns})
        if all(isinstance(p, Text) and not p.text.strip() for p in parts):
            raise BadRecord("empty", key, "the features of the template are empty")
        return Example(parts, key)

    def _value(self, value: Any, column: Column, key: str) -> Any:
        value = np.asarray(value)
        if column.kind or (value.dtype == np.uint8 and value.ndim in (3, 4)):
            return media_value(value, column.kind or ("image" if value.ndim == 3 else "video"), column.name, key)
        if value.ndim == 0:
            return text_value(value)
        feature = self._task.output_features.get(column.name)
        if value.ndim == 1 and np.issubdtype(value.dtype, np.integer) and feature is not None:
            ids = value.tolist()
            if feature.add_eos and ids and ids[-1] == feature.vocabulary.eos_id:
                ids = ids[:-1]
            return feature.vocabulary.decode(ids)
        raise ConfigError(
            f"feature {column.name!r} of {self.path!r} is {value.dtype} {list(value.shape)}: a template takes "
            "text, numbers, token ids with a vocabulary, images and videos"
        )


def open_seqio(path: str, split: str) -> SeqioSource:
    """The source of `MODULE:TASK?template=...`. Raises ConfigError for an unknown module, task, split or column, for a
    mixture, and for a split that is empty or too large for memory.
    """
    path, template = split_path(path, EXAMPLE)
    return SeqioSource(path, split, template)


def _task(path: str) -> Any:
    module, mark, name = path.rpartition(":")
    if mark:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            raise ConfigError(f"the seqio source {path!r} cannot import {module!r} ({e}): write {EXAMPLE}") from e
    if name in seqio.MixtureRegistry.names():
        raise ConfigError(f"{name!r} is a seqio mixture: name its tasks as sources, each with its weight")
    known = list(seqio.TaskRegistry.names())
    if name not in known:
        raise ConfigError(f"no seqio task {name!r}{nearest(name, known)}: name the module that registers it: {EXAMPLE}")
    return seqio.TaskRegistry.get(name)


def _read(task: Any, split: str) -> list[dict[str, Any]]:
    if split not in task.splits:
        raise ConfigError(f"the seqio task {task.name!r} has no split {split!r}, but: {', '.join(task.splits)}")
    stream = task.get_dataset(
        sequence_length=None, split=split, use_cached=False, shuffle=False, num_epochs=1, trim_output_features=False
    )
    rows: list[dict[str, Any]] = []
    size = 0
    for row in stream.as_numpy_iterator():
        size += sum(
            v.nbytes if isinstance(v, np.ndarray) else len(v) if isinstance(v, bytes) else 8 for v in row.values()
        )
        rows.append(row)
        if len(rows) > MAX_EXAMPLES or size > MAX_BYTES:
            raise ConfigError(
                f"split {split!r} of the seqio task {task.name!r} is over {MAX_EXAMPLES:,} examples or "
                f"{MAX_BYTES >> 30} GB in memory: write it out once as JSONL or TFDS and read that"
            )
    if not rows:
        raise ConfigError(f"split {split!r} of the seqio task {task.name!r} is empty")
    return rows


def _default_template(names: list[str], path: str) -> Template:
    for suffix in ("_pretokenized", ""):
        if f"targets{suffix}" in names:
            inputs = f"{{inputs{suffix}}}" if f"inputs{suffix}" in names else ""
            return parse_template(f"{inputs}{{loss=1}}{{targets{suffix}}}")
    raise ConfigError(f"the seqio task {path!r} has no `targets`, only {', '.join(names)}: write {EXAMPLE}")

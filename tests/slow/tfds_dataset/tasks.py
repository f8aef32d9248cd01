"""seqio tasks over the same rows: one with images, one of tokens, one too large, and a mixture."""

import functools

import numpy as np
import seqio
import tensorflow as tf

from tests.slow.tfds_dataset.boxes import row

BYTES = seqio.ByteVocabulary()
ROWS = {"train": (0, 30), "validation": (30, 36)}


def _images(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    def generate():
        for i in range(*ROWS[split]):
            r = row(i)
            yield {k: r[k] for k in ("image", "clip", "question", "answer")}

    shapes = {"image": (None, None, 3), "clip": (None, 24, 32, 3), "question": (), "answer": ()}
    types = {"image": tf.uint8, "clip": tf.uint8, "question": tf.string, "answer": tf.string}
    return tf.data.Dataset.from_generator(
        generate, output_signature={k: tf.TensorSpec(shapes[k], types[k]) for k in shapes}
    )


def _text(split: str, shuffle_files: bool = False, seed: int | None = None, count: int = 5) -> tf.data.Dataset:
    texts = {"inputs": [f"Frage {i}: größer?" for i in range(count)], "targets": [f"ja {i}" for i in range(count)]}
    return tf.data.Dataset.from_tensor_slices(texts)


_TOKENS = {
    "inputs": seqio.Feature(BYTES, add_eos=False),
    "targets": seqio.Feature(BYTES, add_eos=True),
}
_IMAGES = {
    "image": seqio.Feature(seqio.PassThroughVocabulary(256), add_eos=False, rank=3, dtype=np.uint8),
}

seqio.TaskRegistry.add(
    "boxes_vqa",
    source=seqio.FunctionDataSource(_images, splits=tuple(ROWS)),
    preprocessors=[],
    output_features=_IMAGES,
)
for name, keep in (("boxes_tokens", False), ("boxes_pretokenized", True)):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(_text, splits=("train",)),
        preprocessors=[
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=keep),
            seqio.preprocessors.append_eos,
        ],
        output_features=_TOKENS,
    )
seqio.MixtureRegistry.add("boxes_mixture", ["boxes_tokens"], default_rate=1.0)

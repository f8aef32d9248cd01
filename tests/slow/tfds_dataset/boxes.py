"""The rows of the data set, and its TFDS builders: with and without clips."""

import numpy as np
import tensorflow_datasets as tfds

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def box(index: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: a coloured box on white; its colour and place depend on the index."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    x, y = index * 5 % (width - 12), index * 3 % (height - 12)
    pixels[y : y + 12, x : x + 12] = list(COLOURS.values())[index % 3]
    return pixels


def row(index: int) -> dict:
    """Example `index`: images of changing size, none to two pages, a clip of one to five frames."""
    return {
        "image": box(index, 24 + 4 * (index % 5), 30),
        "question": f"Which colour has box {index}?",
        "answer": list(COLOURS)[index % 3],
        "pages": [box(index + j, 16, 16) for j in range(index % 3)],
        "clip": np.stack([box(index + t, 32, 24) for t in range(1 + index % 5)]),
        "grey": box(index, 20, 20).mean(-1, keepdims=True).astype(np.uint8),
        "meta": {"number": index},
    }


def _splits(names: list[str]) -> dict:
    """Thirty examples for training, six for validation, with the named features."""

    def generate(start: int, end: int):
        for i in range(start, end):
            yield i, {name: row(i)[name] for name in names}

    return {"train": generate(0, 30), "validation": generate(30, 36)}


def _features(clip: bool) -> dict:
    f = tfds.features
    features = {
        "image": f.Image(shape=(None, None, 3)),
        "question": f.Text(),
        "answer": f.ClassLabel(names=list(COLOURS)),
        "pages": f.Sequence(f.Image(shape=(None, None, 3))),
        "grey": f.Image(shape=(None, None, 1)),
        "meta": {"number": f.Scalar(np.int64)},
    }
    return features | ({"clip": f.Video(shape=(None, 24, 32, 3))} if clip else {})


class Boxes(tfds.core.GeneratorBasedBuilder):
    """Images and text."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(_features(clip=False)))

    def _split_generators(self, dl_manager):
        return _splits(list(_features(clip=False)))

    def _generate_examples(self):
        raise NotImplementedError("the splits hold their own generators")


class Clips(Boxes):
    """Also with clips; TFDS imports TensorFlow for those."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(_features(clip=True)))

    def _split_generators(self, dl_manager):
        return _splits(list(_features(clip=True)))

"""What the demo sources share: finding a package's data, the split rule, and the form of a question.

The demo trains on data that comes inside ordinary Python packages (extra `[demo]`): nothing is downloaded at run time
and nothing of it lives in this repository. Item i of a source depends on the source, the split and i only.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from kimi_jax.config import ConfigError
from kimi_jax.data.example import Text

SEED = 20260127
SPLITS = ("train", "validation")
# Loss weights of documents with an image or video. Only the words of an answer need the image, and they are one token
# in forty: at weight 1 they would be a few per cent of the loss, and the demo too short to learn to look.
QUESTION_WEIGHT = 0.1
ANSWER_WEIGHT = 8.0
END_WEIGHT = 0.5  # the new line behind an answer


class MissingDemoPackage(ImportError):
    """A package that holds demo data is not installed."""


def package_file(module: str, distribution: str, path: str) -> Path:
    """A file or folder inside an installed package, found without importing (and so running) the package.

    Raises MissingDemoPackage, which says what to install, if the package or the path is not there.
    """
    spec = importlib.util.find_spec(module)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(root) / path).exists():
            return Path(root) / path
    raise MissingDemoPackage(
        f"the demo data {path!r} of package {distribution!r} is missing; install it with: pip install 'kimi_jax[demo]'"
    )


def held_out(key: str, share: float) -> bool:
    """True for a fixed pseudo-random `share` of all keys: those belong to the validation split."""
    digest = hashlib.sha256(f"{SEED}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_split(split: str) -> str:
    """The split itself. Raises ConfigError unless it is one of SPLITS."""
    if split not in SPLITS:
        raise ConfigError(f"the demo data has no split {split!r}; there are: {', '.join(SPLITS)}")
    return split


def generator(name: str, split: str, index: int) -> np.random.Generator:
    """The random numbers of item `index`; the same in every process and on every machine."""
    word = int.from_bytes(hashlib.sha256(f"{name}/{split}".encode()).digest()[:8], "big")
    return np.random.default_rng((SEED, word, index))


def prompt(question: str) -> str:
    """What stands before an answer, in training and in evaluation alike: `Q: ...`, a new line, `A:`."""
    return f"Q: {question}\nA:"


def reply(answer: str) -> str:
    """An answer as the model has to write it: a space before, a new line after."""
    return f" {answer}\n"


def question_parts(question: str, answer: str) -> tuple[Text, Text, Text]:
    """One question and its answer, about an image or video, as parts of an Example."""
    words, end = reply(answer)[:-1], reply(answer)[-1:]
    return Text(prompt(question), QUESTION_WEIGHT), Text(words, ANSWER_WEIGHT), Text(end, END_WEIGHT)

"""From what a model answered to a score and its standard error. NumPy only, no model.

Every score here is a ratio of two sums over questions: right answers over questions, bits over bytes. Questions about
the same image, document or country are not independent, so the standard error is that of a ratio with clusters
(linearised, with the small-sample factor m / (m - 1) for m clusters).
"""

from __future__ import annotations

import collections
import lzma
import math
from collections.abc import Hashable, Sequence

import numpy as np


def ratio_estimate(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """(sum of numerators / sum of denominators, standard error); the error is NaN for a single cluster.

    Raises ValueError without questions, or if the denominators sum to 0.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    total = bottom.sum() if len(bottom) else 0.0
    if total <= 0:
        raise ValueError("a score needs at least one question")
    ratio = top.sum() / total
    residuals: dict[Hashable, float] = collections.defaultdict(float)
    for residual, cluster in zip(top - ratio * bottom, clusters, strict=True):
        residuals[cluster] += residual
    m = len(residuals)
    if m < 2:
        return float(ratio), math.nan
    return float(ratio), float(np.sqrt(m / (m - 1) * sum(r * r for r in residuals.values())) / total)


def pick(log_likelihoods: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """Index of the likeliest choice, or of the likeliest one for each unit of `lengths`. Ties go to the first."""
    values = np.asarray(log_likelihoods, float)
    return int(np.argmax(values if lengths is None else values / np.asarray(lengths, float)))


def normalise_answer(text: str) -> str:
    """An answer as it is compared: first line, without case and without outer and repeated spaces."""
    return " ".join(text.strip().split("\n")[0].lower().split())


def exact_match(answer: str, gold: str) -> float:
    """1.0 if the two agree after `normalise_answer`."""
    return float(normalise_answer(answer) == normalise_answer(gold))


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def edit_similarity(answer: str, gold: str) -> float:
    """1 - edit distance / length of the longer, of what is written, spaces aside; 1.0 is equal."""
    a, b = normalise_answer(answer).replace(" ", ""), normalise_answer(gold).replace(" ", "")
    return 1.0 - edit_distance(a, b) / max(len(a), len(b), 1)


def majority_rate(golds: Sequence[str]) -> float:
    """Share of the most frequent answer: the score of always giving it."""
    return max(collections.Counter(golds).values()) / len(golds)


def unigram_bits_per_byte(train: Sequence[str], held_out: Sequence[str]) -> float:
    """Bits per byte of `held_out` under the byte frequencies of `train` (one added to each of the 256 counts)."""
    counts = np.bincount(np.frombuffer("".join(train).encode(), np.uint8), minlength=256) + 1.0
    bits = -np.log2(counts / counts.sum())
    return float(bits[np.frombuffer("".join(held_out).encode(), np.uint8)].mean())


def compressed_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits per byte of all texts in one LZMA stream: what a good general compressor makes of them, without training."""
    data = "\n".join(texts).encode()
    return 8.0 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)

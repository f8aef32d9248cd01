"""Rewards that a rule can compute: one number in [0, 1] from an answer and the truth, by the name of a verifier.

Source: Kimi K2.5 report (arXiv 2602.02276), section 5.2, which names the ideas and gives no closed forms; the readings
are in docs/rl.md section 5.

An answer is what an optimiser wrote to get a high score, so it is hostile: its size is bounded before it is parsed;
what cannot be parsed scores 0, and so do two answers at once, duplicates, numbers that are not finite or are enormous.
The truth is ours: a truth of the wrong form raises ValueError where the task is loaded (`Verifier.truth`).

n predicted, m true items
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.rl.mathematics import Unreadable, same_value

MAX_ANSWER = 1 << 15  # characters; a longer answer scores 0
MAX_ITEMS = 256  # boxes or points of an answer, vertices of a polygon
MAX_COORDINATE = 1e6  # pixels; squares of it are exact enough in float64
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def final_answer(text: str) -> str:
    """The part of an answer that counts: after `</think>`, inside <answer>..</answer> or \\boxed{..}, or all of it.

    Raises Unreadable for more than MAX_ANSWER characters, and for two answers, of which one might be right.
    """
    if len(text) > MAX_ANSWER:
        raise Unreadable(f"{len(text)} characters are more than {MAX_ANSWER}")
    text = text.rpartition("</think>")[2]
    tags, boxes = text.count("<answer>"), text.count("\\boxed{")
    if tags + boxes > 1 or text.count("</answer>") != tags:
        raise Unreadable("there is not exactly one answer")
    if tags:
        return text.partition("<answer>")[2].partition("</answer>")[0].strip()
    if boxes:
        return _until_closed(text.partition("\\boxed{")[2])
    return text.strip()


def _until_closed(text: str) -> str:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i].strip()
    raise Unreadable("a brace is not closed")


# ----------------------------------------------------------------------------------------------------- text and numbers


def _text_truth(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_ANSWER:
        raise ValueError(f"the truth is a text of at most {MAX_ANSWER} characters, not {value!r:.60}")
    return value


def _count_truth(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COORDINATE:
        raise ValueError(f"the truth is a count, not {value!r:.60}")
    return value


def exact(answer: str, truth: str) -> float:
    """1 if the two agree up to case and white space; an empty answer scores 0."""
    given = " ".join(answer.split()).casefold()
    return float(bool(given) and given == " ".join(truth.split()).casefold())


def mathematics(answer: str, truth: str) -> float:
    """1 if the two are the same number, or the same text if the truth is no number."""
    return float(same_value(answer, truth))


def count(answer: str, truth: int) -> float:
    """max(0, 1 - |p - g| / max(1, g)) of the one number p in the answer; 0 if there is none or several."""
    found = NUMBER.findall(answer)
    if len(found) != 1 or len(found[0]) > 12:
        raise Unreadable("an answer of counting holds one number")
    p = float(found[0])
    return max(0.0, 1 - abs(p - truth) / max(1, truth)) if p >= 0 and p == int(p) else 0.0


def positions(answer: str, truth: str) -> float:
    """Share of places, of the longer of the two, at which the symbols between spaces agree: a dense reward."""
    given, wanted = answer.split(), truth.split()
    return sum(a == b for a, b in zip(given, wanted, strict=False)) / max(len(given), len(wanted), 1)


def ocr(answer: str, truth: str) -> float:
    """1 - edit distance / length of the longer, by characters, after white space is made single."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(" ".join(answer.split()), " ".join(truth.split())))


# ------------------------------------------------------------------------------------------------------------- geometry


def _items(answer: str, width: int) -> np.ndarray:
    """float64 [n, width]: the JSON array of arrays between the first [ and the last ]."""
    start, end = answer.find("["), answer.rfind("]")
    if start < 0 or end < start:
        raise Unreadable("there is no JSON array")
    try:
        value = json.loads(answer[start : end + 1], parse_int=float)
    except (ValueError, RecursionError) as problem:
        raise Unreadable("the array is not JSON") from problem
    return _rows(value, width, Unreadable)


def _rows(value: Any, width: int, error: type[ValueError]) -> np.ndarray:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise error(f"at most {MAX_ITEMS} items are a list")
    for row in value:
        if not isinstance(row, list) or len(row) != width or any(type(x) not in (int, float) for x in row):
            raise error(f"an item is a list of {width} numbers")
        if not all(abs(x) <= MAX_COORDINATE for x in row):  # NaN and infinity are not
            raise error("a coordinate is not finite or enormous")
    rows = np.array(value, np.float64).reshape(len(value), width)
    if len(np.unique(rows, axis=0)) != len(rows):
        raise error("an item appears twice")
    return rows


def _boxes_truth(value: Any) -> np.ndarray:
    rows = _rows(value, 4, ValueError)
    if (rows[:, :2] >= rows[:, 2:]).any():
        raise ValueError("a true box is x1, y1, x2, y2 with x1 < x2 and y1 < y2")
    return rows


def _points_truth(value: Any) -> tuple[np.ndarray, float]:
    if not isinstance(value, dict) or set(value) != {"points", "sigma"}:
        raise ValueError('the truth of points is {"points": [[x, y], ...], "sigma": pixels}')
    sigma = value["sigma"]
    if type(sigma) not in (int, float) or not 0 < sigma <= MAX_COORDINATE:
        raise ValueError(f"sigma is a positive number of pixels, not {sigma!r:.60}")
    return _rows(value["points"], 2, ValueError), float(sigma)


def _polygon_truth(value: Any) -> Any:
    shape = _shape(_rows(value, 2, ValueError))
    if shape.area <= 0:
        raise ValueError("a true polygon has an area")
    return shape


def soft_f1(similarity: np.ndarray) -> float:
    """2 S / (n + m), S the largest sum of a one-to-one matching of [n, m] similarities 0..1; 1 if both are empty."""
    from scipy.optimize import linear_sum_assignment

    n, m = similarity.shape
    if n + m == 0:
        return 1.0
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return float(2 * similarity[rows, columns].sum() / (n + m))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, m] intersection over union of boxes [n, 4] and [m, 4]; 0 for a box without area."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = (np.clip(x[:, 2:] - x[:, :2], 0, None).prod(-1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def boxes(answer: str, truth: np.ndarray) -> float:
    """Grounding: F1 of [[x1, y1, x2, y2], ...] with IoU as the soft match."""
    return soft_f1(box_iou(_items(answer, 4), truth))


def points(answer: str, truth: tuple[np.ndarray, float]) -> float:
    """F1 of [[x, y], ...] with exp(-distance^2 / (2 sigma^2)) as the soft match."""
    centres, sigma = truth
    d = ((_items(answer, 2)[:, None] - centres[None]) ** 2).sum(-1)
    return soft_f1(np.exp(-d / (2 * sigma * sigma)))


def _shape(vertices: np.ndarray) -> Any:
    """The region that the closed line encloses, whatever crosses itself repaired."""
    import shapely

    if len(vertices) < 3:
        raise Unreadable("a polygon has at least three vertices")
    return shapely.make_valid(shapely.Polygon(vertices))


def polygon(answer: str, truth: Any) -> float:
    """Intersection over union of the area inside [[x, y], ...] and the true one."""
    import shapely

    try:
        shape = _shape(_items(answer, 2))
        both, union = shape.intersection(truth).area, shape.union(truth).area
    except shapely.errors.GEOSException as problem:
        raise Unreadable("the polygon cannot be repaired") from problem
    return both / union


# -------------------------------------------------------------------------------------------------------------- by name


class Verifier(NamedTuple):
    """truth: from JSON to what `score` compares with; raises ValueError. score: may raise Unreadable, which is 0."""

    truth: Callable[[Any], Any]
    score: Callable[[str, Any], float]


VERIFIERS = {
    "exact": Verifier(_text_truth, exact),
    "mathematics": Verifier(_text_truth, mathematics),
    "count": Verifier(_count_truth, count),
    "positions": Verifier(_text_truth, positions),
    "ocr": Verifier(_text_truth, ocr),
    "boxes": Verifier(_boxes_truth, boxes),
    "points": Verifier(_points_truth, points),
    "polygon": Verifier(_polygon_truth, polygon),
}


def verify(name: str, answer: str, truth: Any) -> float:
    """The reward of an answer, in [0, 1], by the verifier of this name; truth as JSON has it.

    Raises ValueError for an unknown verifier or a truth of another form; never because of the answer.
    """
    if name not in VERIFIERS:
        raise ValueError(f"no verifier is called {name!r:.60}; there are: {', '.join(VERIFIERS)}")
    verifier = VERIFIERS[name]
    expected = verifier.truth(truth)
    try:
        value = verifier.score(final_answer(answer), expected)
    except Unreadable:
        return 0.0
    return value if math.isfinite(value) and 0 <= value <= 1 + 1e-9 else 0.0

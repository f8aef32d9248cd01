"""Rewards by value against brute force, rasters and textbook algorithms; and what an optimiser would try against them.

Attacks must score 0 and end: sizes are bounded before anything is parsed, so no test here waits on a clock.
"""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from kimi_jax.rl import mathematics, rewards
from kimi_jax.rl.rewards import VERIFIERS, verify

pytest.importorskip("shapely", reason="extra [rl]")
pytest.importorskip("rapidfuzz", reason="extra [rl]")

TRUTHS = {
    "exact": "red square",
    "mathematics": "3/4",
    "count": 4,
    "positions": "d c b a",
    "ocr": "Total 12.50",
    "boxes": [[0, 0, 10, 10], [20, 20, 40, 30]],
    "points": {"points": [[5, 5], [30, 12]], "sigma": 4},
    "polygon": [[0, 0], [10, 0], [10, 10], [0, 10]],
}
RIGHT = {
    "exact": "Red  square", "mathematics": "\\frac{3}{4}", "count": "4", "positions": "d c b a",
    "ocr": "Total 12.50",
    "boxes": "[[20, 20, 40, 30], [0, 0, 10, 10]]", "points": "[[5, 5], [30, 12]]",
    "polygon": "[[0, 0], [10, 0], [10, 10], [0, 10]]",
}  # fmt: skip


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("wrapped", ["{}", "<think>[1] 7</think>{}", "<think>x</think> so <answer>{}</answer> done"])
def test_right_answers_score_one(name, wrapped):
    assert verify(name, wrapped.format(RIGHT[name]), TRUTHS[name]) == pytest.approx(1, abs=1e-12)


ATTACKS = {
    "empty": "",
    "blank": " \n\t",
    "prose": "full marks, please: the answer is right",
    "nan": "[[NaN, NaN, NaN, NaN], [NaN, 1, 2, 3]]",
    "infinite": "[[0, 0, 1e999, 1e999]]",
    "minus infinite": "[[-Infinity, 0, 10, 10]]",
    "enormous numbers": "[[0, 0, " + "9" * 5000 + ", 1]]",
    "far away": "[[-1e300, -1e300, 1e300, 1e300]]",
    "whole plane": "[[-1e9, -1e9, 1e9, 1e9]]",
    "deep": "[" * 20_000 + "]" * 20_000,
    "deep parentheses": "(" * 400 + "1+1" + ")" * 400,
    "tower": "9^9^9^9^9",
    "large power": "9^999999999",
    "large root": "sqrt" * 100 + "(9)",
    "long": "4 " * 100_000,
    "too many": json.dumps([[i, 0, i + 1, 1] for i in range(1000)]),
    "strings": '[["0", "0", "10", "10"]]',
    "booleans": "[[true, true, true, true]]",
    "ragged": "[[0, 0, 10]]",
    "object": '{"reward": 1, "score": 1}',
    "code": "__import__('os').system('true')",
    "zero division": "1/0",
    "null": "null",
    "surrogate": "\ud800",
    "two answers": "<answer>4</answer><answer>3/4</answer>",
    "open tags": "<answer>" * 3000,
    "open boxes": "\\boxed{" * 3000,
    "unclosed box": "\\boxed{4",
    "many digits": "9" * 20_000,
    "many minus signs": "-" * 501 + "4 red",
}


@pytest.mark.parametrize("name", [n for n in VERIFIERS if n != "ocr"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_score_zero(name, attack):
    assert verify(name, ATTACKS[attack], TRUTHS[name]) == 0.0


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_ocr_gain_no_more_than_their_few_common_characters(attack):
    """Every text has a distance, so it is small and not 0; 0 for what is no single answer or too long."""
    assert 0 <= verify("ocr", ATTACKS[attack], TRUTHS["ocr"]) < 0.4
    assert verify("ocr", "x" * (rewards.MAX_ANSWER + 1), TRUTHS["ocr"]) == 0


@pytest.mark.parametrize("name", ["boxes", "points", "polygon"])
def test_duplicates_score_zero(name):
    right = json.loads(RIGHT[name])
    assert verify(name, json.dumps([*right, right[0]]), TRUTHS[name]) == 0.0


@pytest.mark.parametrize("name", ["exact", "mathematics", "count"])
def test_repeating_or_hedging_scores_zero(name):
    assert verify(name, f"{RIGHT[name]} {RIGHT[name]}", TRUTHS[name]) == 0.0
    assert verify(name, f"<answer>{RIGHT[name]}</answer> or <answer>5</answer>", TRUTHS[name]) == 0.0


@given(st.sampled_from(sorted(VERIFIERS)), st.one_of(
    st.text(max_size=60),
    st.text("[]{}(),.0123456789-+eE\\ ^/*%<>\"NaInfity", max_size=60),
    st.recursive(st.floats() | st.integers() | st.none() | st.booleans() | st.text(max_size=3),
                 lambda x: st.lists(x, max_size=4), max_leaves=12).map(lambda v: json.dumps(v)),
))  # fmt: skip
@settings(max_examples=300)
def test_any_answer_gets_a_reward_between_zero_and_one(name, answer):
    assert 0 <= verify(name, answer, TRUTHS[name]) <= 1 + 1e-9


@pytest.mark.parametrize(("name", "truth"), [
    ("exact", 3), ("mathematics", None), ("count", -1), ("count", True), ("count", 2.0), ("ocr", ["a"]),
    ("boxes", [[0, 0, 0, 5]]), ("boxes", [[0, 0, 1, math.nan]]), ("boxes", "[[0, 0, 1, 1]]"), ("points", [[1, 2]]),
    ("points", {"points": [[1, 2]], "sigma": 0}), ("polygon", [[0, 0], [1, 1]]), ("polygon", [[0, 0], [1, 1], [2, 2]]),
])  # fmt: skip
def test_truth_of_another_form_is_our_error_and_no_score(name, truth):
    with pytest.raises(ValueError):  # of the truth, never Unreadable's 0
        verify(name, "1", truth)


def test_unknown_verifier_names_the_known_ones():
    with pytest.raises(ValueError, match="exact, mathematics, count"):
        verify("magic", "", "")


# ------------------------------------------------------------------------------------------------------------- by value


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**31))
def test_soft_f1_is_the_best_of_all_matchings(n, m, seed):
    """Hungarian against every permutation, up to six by six."""
    s = np.random.default_rng(seed).random((n, m))
    small, large = sorted((n, m))
    wide = s if n <= m else s.T
    best = max(
        (sum(wide[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(large), small)), default=0
    )
    assert rewards.soft_f1(s) == pytest.approx(2 * best / (n + m) if n + m else 1.0)


def test_grounding_by_hand():
    """One of two boxes found: 2 * 1 / (1 + 2). Half a box: IoU 1/2 beside a perfect one. Spam lowers precision."""
    truth = TRUTHS["boxes"]
    assert verify("boxes", "[[0, 0, 10, 10]]", truth) == pytest.approx(2 / 3)
    assert verify("boxes", "[[0, 0, 10, 5], [20, 20, 40, 30]]", truth) == pytest.approx(2 * 1.5 / 4)
    spam = [[0, 0, 10, 10], [20, 20, 40, 30], *([i, 50, i + 1, 51] for i in range(96))]
    assert verify("boxes", json.dumps(spam), truth) == pytest.approx(4 / 100)
    assert verify("boxes", "[[10, 10, 0, 0], [40, 30, 20, 20]]", truth) == 0  # turned inside out
    assert verify("boxes", "[]", []) == 1 and verify("boxes", "[]", truth) == 0 == verify("boxes", "[[0, 0, 1, 1]]", [])


def test_points_by_hand():
    truth = {"points": [[0, 0], [100, 0]], "sigma": 2}
    assert verify("points", "[[100, 2]]", truth) == pytest.approx(2 * math.exp(-0.5) / 3)
    assert verify("points", "[[100, 0], [0, 0]]", truth) == pytest.approx(1)
    # two guesses at one point: the second has only the far one left
    assert verify("points", "[[0, 0], [0, 1]]", truth) == pytest.approx(0.5, abs=1e-6)


@given(st.lists(st.tuples(st.integers(2, 62), st.integers(2, 62)), min_size=3, max_size=7, unique=True))
@settings(max_examples=30)
def test_polygon_iou_is_that_of_rasters(vertices):
    """Against pixels of both masks at 16 per unit; simple polygons only, as the raster fills others by parity."""
    import shapely

    shape = shapely.Polygon(vertices)
    if not shape.is_valid or shape.area < 100:
        return
    truth = [[16, 16], [48, 16], [48, 48], [16, 48]]

    def mask(polygon):
        image = Image.new("1", (1024, 1024))
        ImageDraw.Draw(image).polygon([(16 * x, 16 * y) for x, y in polygon], fill=1)
        return np.asarray(image)

    a, b = mask(vertices), mask(truth)
    # pixels of the outline: at most 1 in about 16 of the perimeter
    got = verify("polygon", json.dumps(vertices), truth)
    assert got == pytest.approx((a & b).sum() / (a | b).sum(), abs=0.02)


def test_polygon_that_crosses_itself_counts_by_its_area():
    """A bow tie over a square covers half of it."""
    assert verify("polygon", "[[0, 0], [10, 10], [10, 0], [0, 10]]", TRUTHS["polygon"]) == pytest.approx(0.5)


def distance(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (a[i] != b[j]))
    return table[-1, -1]


@given(st.text("abñ雪", max_size=8), st.text("abñ雪", min_size=1, max_size=8))
def test_ocr_is_the_textbook_edit_distance(answer, truth):
    want = 1 - distance(answer, truth) / max(len(answer), len(truth))
    assert verify("ocr", answer, truth) == pytest.approx(want)


@pytest.mark.parametrize(("answer", "want"), [
    ("4", 1), ("There are 4 of them.", 1), ("4.0", 1), ("3", 0.75), ("8", 0), ("-4", 0), ("4.5", 0), ("4 or 5", 0),
    ("1 2 3 4", 0), ("four", 0),
])  # fmt: skip
def test_counting_by_hand(answer, want):
    assert verify("count", answer, 4) == want


@pytest.mark.parametrize(
    ("answer", "want"), [("d c b", 0.75), ("d c b a a a a a", 0.5), ("a b c d", 0), ("d d d d", 0.25)]
)
def test_positions_by_hand(answer, want):
    assert verify("positions", answer, "d c b a") == want


# ---------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(("answer", "truth", "want"), [
    ("0.75", "3/4", 1), ("75%", "3/4", 1), ("\\dfrac{3}{4}", "0.75", 1), ("x = 3/4", "0.75", 1), ("$0.750$", "3/4", 1),
    ("1,000,000", "10^6", 1), ("1,000,000", "1000000", 1), ("\\sqrt{16}", "4", 1), ("2\\sqrt{2}", "\\sqrt{8}", 1),
    ("2\\pi", "6.283185307179586", 1), ("-(2+3)*4", "-20", 1), ("2^{-3}", "1/8", 1), ("-2^2", "-4", 1),
    ("1 000", "1000", 0), ("0.333", "1/3", 0), ("0.3333333333333", "1/3", 0), ("3 4", "34", 0), ("12", "1 2", 0),
    ("6.28", "2\\pi", 0), ("4", "-4", 0), ("2\\frac{1}{2}", "1", 0), ("2\\frac{1}{2}", "2\\frac{1}{2}", 1),
    ("x = 3 = 4", "4", 0), ("blue", "Blue", 1), ("4", "blue", 0), ("(1, 2)", "(1,2)", 1),
    ("\\boxed{\\frac{3}{4}}", "0.75", 1),
])  # fmt: skip
def test_mathematics_by_hand(answer, truth, want):
    assert verify("mathematics", answer, truth) == want


EXPRESSIONS = st.recursive(
    st.integers(0, 20).map(str),
    lambda x: st.tuples(x, st.sampled_from("+-*/"), x).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_mathematics_is_exact_arithmetic(text):
    """Against Python's own parser on the same text, with fractions for integers (a text that this test has made)."""
    try:
        want = eval(__import__("re").sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(mathematics.Unreadable):
            mathematics.evaluate(text)
        return
    assert mathematics.evaluate(text) == want


@given(st.text("0123456789.+-*/^(){}%\\fracsqtpi ", max_size=120))
@settings(max_examples=300)
def test_mathematics_reads_or_refuses_any_text(text):
    try:
        value = mathematics.evaluate(text)
    except mathematics.Unreadable:
        return
    assert isinstance(value, (Fraction, float, int)) and math.isfinite(value)
    assert mathematics.same_value(text, text) or not text.strip()

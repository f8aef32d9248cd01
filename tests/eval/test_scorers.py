"""Scores and their standard errors against closed forms, a bootstrap and hand-made cases."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.eval import scorers


def test_accuracy_is_the_mean_with_its_usual_error():
    right = [1.0, 0.0, 1.0, 1.0]
    score, error = scorers.ratio_estimate(right, [1.0] * 4, range(4))
    assert score == 0.75
    np.testing.assert_allclose(error, np.std(right, ddof=1) / 2)  # exact: same formula


def test_error_of_a_ratio_with_clusters_agrees_with_a_bootstrap():
    """Bits over bytes of documents of unequal length in clusters; 4,000 resamplings of clusters, to 10 %: their own
    error is about 1 %, the linearisation's a few per cent at 150 clusters."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(150), rng.integers(1, 6, 150))
    level = rng.normal(2.0, 0.3, 150)[clusters]
    bytes_ = rng.integers(50, 900, len(clusters)).astype(float)
    bits = bytes_ * (level + rng.normal(0, 0.1, len(clusters)))
    score, error = scorers.ratio_estimate(bits.tolist(), bytes_.tolist(), clusters.tolist())
    np.testing.assert_allclose(score, bits.sum() / bytes_.sum())
    top, bottom = (np.bincount(clusters, weights=x) for x in (bits, bytes_))
    drawn = rng.integers(150, size=(4000, 150))
    bootstrap = (top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)).std()
    assert abs(error / bootstrap - 1) < 0.1
    independent = scorers.ratio_estimate(bits.tolist(), bytes_.tolist(), range(len(bits)))[1]
    assert independent < 0.8 * bootstrap  # what ignoring the clusters would claim


def test_no_questions_is_an_error_and_one_has_no_error():
    with pytest.raises(ValueError, match="at least one question"):
        scorers.ratio_estimate([], [], [])
    assert math.isnan(scorers.ratio_estimate([1.0], [1.0], ["a"])[1])


def test_picking_by_likelihood_and_by_length():
    assert scorers.pick([-4.0, -3.0, -9.0]) == 1
    assert scorers.pick([-4.0, -3.0, -9.0], [4, 2, 18]) == 2


def test_exact_match_reads_the_first_line_only():
    assert scorers.exact_match(" 4 0 7\nQ: what", "4 0 7") == 1.0
    assert scorers.exact_match("Red", " red\n") == 1.0
    assert scorers.exact_match("4 07", "4 0 7") == 0.0
    assert scorers.exact_match("", "7") == 0.0


@pytest.mark.parametrize("a, b, n", [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)])
def test_edit_distance_of_known_pairs(a, b, n):
    assert scorers.edit_distance(a, b) == n


words = st.text(alphabet="abc", max_size=6)


@given(words, words, words)
def test_edit_distance_is_a_metric(a, b, c):
    d = scorers.edit_distance
    assert d(a, b) == d(b, a) and (d(a, b) == 0) == (a == b)
    assert d(a, c) <= d(a, b) + d(b, c)
    assert abs(len(a) - len(b)) <= d(a, b) <= max(len(a), len(b))


def test_edit_similarity_ignores_spaces():
    assert scorers.edit_similarity("407", "4 0 7") == 1.0
    np.testing.assert_allclose(scorers.edit_similarity("4 1 7", "4 0 7"), 2 / 3)
    assert scorers.edit_similarity("", "4 0 7") == 0.0


def test_majority_rate():
    assert scorers.majority_rate(["a", "b", "a", "c"]) == 0.5


def test_unigram_bits_of_uniform_bytes_are_eight_minus_what_the_text_shows():
    text = "".join(chr(c) for c in range(128)) * 100
    np.testing.assert_allclose(scorers.unigram_bits_per_byte([text], [text]), 7.0, atol=0.02)  # half of all bytes
    assert scorers.unigram_bits_per_byte(["a" * 10_000], ["a"]) < 0.05


def test_compression_finds_what_repeats():
    noise = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 5000)))
    assert scorers.compressed_bits_per_byte(["abc" * 2000]) < 0.2 < 6.0 < scorers.compressed_bits_per_byte([noise])

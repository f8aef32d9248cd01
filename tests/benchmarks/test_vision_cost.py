"""The stream whose vision share and padding benchmarks/README.md reports is one that a run accepts."""

import pytest

from kimi_jax.config import preset
from kimi_jax.data.bins import check_bins

pytest.importorskip("sklearn")


def test_vision_bins_of_the_benchmark_hold_its_ratio():
    from benchmarks.vision_cost import DATA

    check_bins(DATA, preset("demo"))

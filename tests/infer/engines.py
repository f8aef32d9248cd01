"""Engines that several test files share, so that each program is compiled once in a process."""

from __future__ import annotations

import functools

from kimi_jax.infer.engine import Engine
from tests.infer.test_engine import LENGTH, model

SIZES = {"slots": 3, "page_size": 4, "max_sequence_length": LENGTH, "chunks": (4, 16)}


@functools.cache
def one_by_one():
    """One token a call, one prompt at a time but for the shortest pieces."""
    return Engine(model().config, model().params, **SIZES)


@functools.cache
def eight_a_call():
    """Up to eight tokens a call; three pieces of 4 tokens or four of 16 in a step."""
    return Engine(model().config, model().params, **SIZES, tokens_per_call=8, prefill_tokens=64)


def fresh(engine):
    """As if new but for its compiled programs."""
    engine.set_params(model().params, version=0)
    return engine

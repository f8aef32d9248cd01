"""Who gets the next slot: callers take turns, alone in the line and in the engine."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from kimi_jax.infer.line import NOBODY, Line
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.infer.sequence import Answer
from tests.infer.engines import fresh, one_by_one
from tests.infer.test_engine import text


def answer(number, caller=NOBODY):
    return Answer(number, Sampling(), (), [1], 1, 2, np.full(1, -1, np.int32), [], 0, caller)


def line_of(*callers):
    line = Line()
    for number, caller in enumerate(callers):
        line.append(answer(number, caller))
    return line


def taken(line):
    """Numbers in the order in which slots are given, one slot at a time."""
    order = []
    while line:
        first = next(iter(line))
        line.take(first)
        order.append(first.number)
    return order


def test_one_caller_is_a_queue():
    assert taken(line_of(*[NOBODY] * 5)) == [0, 1, 2, 3, 4]


def test_callers_take_turns_and_the_greedy_one_waits_for_itself():
    a, b, c = ("a", ""), ("b", ""), ("c", "")
    assert taken(line_of(a, a, a, a, b, c, c)) == [0, 4, 5, 1, 6, 2, 3]


def test_users_share_the_turns_of_their_address():
    """Ten users of one address get every second slot together, not ten of eleven."""
    many = [("a", f"user {i}") for i in range(10)]
    order = taken(line_of(*many, *[("b", "")] * 4))
    assert [order.index(10 + i) for i in range(4)] == [1, 3, 5, 7]
    assert [number for number in order if number < 10] == list(range(10))


def test_order_that_is_shown_is_the_order_that_is_taken():
    rng = random.Random(0)
    for _ in range(200):
        line = line_of(*((rng.choice("ab"), rng.choice("xyz")) for _ in range(rng.randrange(12))))
        for each in list(line):
            if rng.random() < 0.2:
                line.remove(each)
        shown = [each.number for each in line]
        assert len(line) == len(shown) == len(set(shown))
        assert taken(line) == shown


def test_who_had_a_slot_and_lost_it_is_next():
    """The engine puts them back from the last to the first."""
    line = line_of(("a", ""), ("a", ""), ("b", ""))
    running = [answer(7, ("b", "")), answer(8, ("b", "")), answer(9, ("a", ""))]
    for each in reversed(running):
        line.put_back(each)
    assert taken(line) == [7, 9, 8, 0, 2, 1]


def test_who_is_not_in_the_line_cannot_leave_it():
    line = line_of(NOBODY)
    with pytest.raises(ValueError, match="not in"):
        line.remove(answer(5))
    with pytest.raises(KeyError):
        line.remove(answer(5, ("b", "")))
    line.clear()
    assert not line and list(line) == []


def test_engine_serves_a_newcomer_before_the_rest_of_a_greedy_caller():
    """Twelve answers of one caller, then two of another: those end second and third of the next ones, and get the
    tokens that they get without a crowd."""
    engine = fresh(one_by_one())
    short = Sampling(temperature=0.0, max_new_tokens=4)
    requests = [Request(text(i, 5), (), short) for i in range(14)]
    alone = engine.run(requests[12:])
    engine = fresh(engine)
    greedy = [engine.submit(request, ("a", "")) for request in requests[:12]]
    engine.step()
    late = [engine.submit(dataclasses.replace(request), ("b", "")) for request in requests[12:]]
    ended, tokens = [], {number: [] for number in late}
    while not engine.idle:
        for event in engine.step():
            if event.request_id in tokens:
                tokens[event.request_id].append(event.token_id)
            if event.finish_reason:
                ended.append(event.request_id)
    assert sorted(ended) == sorted(greedy + late)
    assert max(ended.index(number) for number in late) <= 3 + 3  # three ran, and every second slot is theirs
    assert [tuple(tokens[number]) for number in late] == [done.token_ids for done in alone]

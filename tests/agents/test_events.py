"""The event record: it survives JSON, and its canonical order does not depend on the schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.agents.events import Event, Usage, canonical, from_json, to_json

EVENTS = st.builds(
    Event,
    id=st.integers(0, 100),
    time=st.floats(0, 1e6),
    agent=st.sampled_from(["root", "root/0.0", "root/0.1"]),
    parent=st.sampled_from([None, "root"]),
    kind=st.sampled_from(["spawn", "start", "step", "tool", "join", "end"]),
    usage=st.builds(Usage, st.integers(0, 9), st.integers(0, 9), st.floats(0, 9)),
    detail=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
    clock=st.integers(0, 50),
)


@given(EVENTS)
def test_event_survives_json(event):
    assert from_json(to_json(event)) == event


@pytest.mark.parametrize("line", ["{}", "[]", "3", '{"usage": {}}', '{"usage": {"x": 1}}', "{"])
def test_event_of_a_damaged_line_is_a_value_error(line):
    with pytest.raises(ValueError):
        from_json(line)


def test_canonical_order_ignores_which_child_was_faster():
    def run(order):
        clocks = {"root/0.0": 2, "root/0.1": 2}
        return [Event(i, float(i), agent, "root", "start", clock=clocks[agent]) for i, agent in enumerate(order)]

    fast, slow = run(["root/0.0", "root/0.1"]), run(["root/0.1", "root/0.0"])
    assert fast != slow
    assert canonical(fast) == canonical(slow)

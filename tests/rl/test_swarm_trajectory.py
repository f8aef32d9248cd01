"""A run as an RL trajectory: exactly the ids that were sampled, contexts that continue, frozen subagents."""

import numpy as np
import pytest

from kimi_jax.agents.events import Event, Usage
from kimi_jax.rl.swarm_trajectory import trajectory
from kimi_jax.rl.types import TrajectoryError


def step(number, agent, prompt, sampled, index=0):
    tokens = {"prompt": prompt, "sampled": sampled, "logprobs": [-0.5] * len(sampled), "version": 3}
    return Event(number, 0.0, agent, None, "step", detail={"tokens": tokens}, usage=Usage(1, 1), step=index)


def test_trajectory_has_the_sampled_ids_once_and_freezes_subagents():
    events = [
        step(0, "root", [1, 2, 3], [4, 5]),
        step(1, "root/0.0", [9], [8, 7]),
        step(2, "root", [1, 2, 3, 4, 5, 6], [7], 1),  # continues
        step(3, "root", [1, 2, 30], [40], 2),  # the history was replaced
        Event(4, 0.0, "root", None, "end", status="ok"),
    ]
    record = trajectory(events)
    assert [segment.tokens.tolist() for segment in record.segments] == [
        [1, 2, 3], [4, 5], [9], [8, 7], [6], [7], [1, 2, 30], [40],
    ]  # fmt: skip
    assert [segment.parent for segment in record.segments] == [None, 0, None, 2, 1, 4, None, 6]
    assert [segment.frozen for segment in record.segments].count(True) == 1 and record.segments[3].frozen
    assert record.num_sampled() == 4 and record.finish == "ok"
    assert np.unique(np.concatenate([s.versions[s.sampled] for s in record.segments])).tolist() == [3]
    ids = [np.concatenate([record.segments[i].tokens for i in path]).tolist() for path in record.contexts()]
    assert [1, 2, 3, 4, 5, 6, 7] in ids and [1, 2, 30, 40] in ids


def test_trajectory_of_an_endpoint_is_refused_for_what_is_trained_only():
    text_only = Event(0, 0.0, "root", None, "step", detail={"text": "x"})
    with pytest.raises(TrajectoryError, match="step 0 of root has no token ids"):
        trajectory([text_only])
    frozen = Event(1, 0.0, "root/0.0", "root", "step", detail={"text": "x"})
    assert len(trajectory([step(0, "root", [1], [2]), frozen]).segments) == 2

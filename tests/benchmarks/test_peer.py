"""The pipe to a peer in another interpreter: answers are found among what libraries print, an end is an error."""

import sys

import pytest

from benchmarks.peer import Peer


def test_peer_says_that_it_is_ready_and_then_times_steps():
    peer = Peer(sys.executable, "tests.benchmarks.peer_program", {"rows": 2})
    assert peer.ready == {"given": {"rows": 2}}
    assert 0 <= peer.seconds("works") < 60
    with pytest.raises(RuntimeError, match="the step failed"):
        peer.seconds("fails")

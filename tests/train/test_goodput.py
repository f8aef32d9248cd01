"""Goodput: every second has one name, over restarts too, and data is waited for only while the devices are idle."""

import threading

import pytest

from kimi_jax.train import goodput
from kimi_jax.train.goodput import NAMES, Goodput, Idle


class Clock:
    """Stands in for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def pass_time(clock: Clock, found: Goodput, name: str, seconds: float) -> None:
    with found.spend(name):
        clock.now += seconds


def test_every_second_has_one_name(clock):
    found = Goodput()
    clock.now += 2
    with found.spend("steps"):
        clock.now += 5
        pass_time(clock, found, "compile", 3)
        clock.now += 4
        found.move(1.5, "data")
        with found.spend("checkpoint"):
            clock.now += 1
            pass_time(clock, found, "restore", 2)
            clock.now += 1
        with pytest.raises(KeyError), found.spend("evaluation"):
            clock.now += 6
            raise KeyError
    wanted = {"start": 2, "steps": 7.5, "compile": 3, "data": 1.5, "checkpoint": 2, "restore": 2, "evaluation": 6}
    assert found.seconds() == dict.fromkeys(NAMES, 0.0) | wanted
    row = found.row()
    assert row["goodput"] == row["goodput_run"] == pytest.approx(7.5 / 24) and sum(row["seconds"].values()) == 24
    assert found.line().startswith("goodput 31.2% of 0.4 min, restarts included: steps 31.2%, start 8.3%")


def test_restart_counts_what_was_lost_and_the_time_between(clock):
    first = Goodput()
    pass_time(clock, first, "steps", 10)
    saved = first.state()
    pass_time(clock, first, "steps", 30)  # lost: killed before the next checkpoint
    clock.now += 20  # nobody at work
    second = Goodput()
    clock.now += 5
    second.restore(saved)
    pass_time(clock, second, "steps", 15)
    assert second.seconds() == dict.fromkeys(NAMES, 0.0) | {"steps": 25, "start": 5, "away": 50}
    row = second.row()
    assert row["goodput"] == 15 / 20 and row["goodput_run"] == 25 / 80
    second.restore(None)  # a checkpoint from before there was goodput
    assert second.seconds()["steps"] == 25


class Results:
    """Stands in for the arrays of a step; ready when it is said."""

    def __init__(self) -> None:
        self.ready = threading.Event()

    def block_until_ready(self) -> None:
        assert self.ready.wait(60)


def test_data_is_waited_for_only_while_the_devices_are_idle(clock):
    idle, step = Idle(), Results()
    clock.now += 3
    assert idle.since(clock.now - 2) == 2  # nothing was dispatched yet
    idle.watch(step)
    clock.now += 4
    assert idle.since(clock.now - 4) == 0  # the devices are busy with the step
    step.ready.set()
    idle.close()  # after the step was seen to end
    clock.now += 1.5
    assert idle.since(clock.now - 5) == 1.5  # a batch that came so long after the step had ended
    assert idle.since(clock.now - 0.5) == 0.5

"""Detectors fire on scripted collapse, scripted spam and idle children, and not on healthy runs."""

import pytest

from kimi_jax.agents import detectors
from kimi_jax.agents.detectors import Child, Episode
from kimi_jax.agents.events import ROOT, Event

GOOD = Child(brief="find the capital of Norway", gain=6, used=True, finished=True, tool_calls=5)


def healthy(i: int = 0) -> Episode:
    return Episode(8.0, 7.0, 6.0, 8, (GOOD,), r_parallel=0.5, r_finish=0.9, r_perf=0.8)


def serial(oracle: float = 8.0) -> Episode:
    """One subagent a turn: many assignments, never two at once."""
    return Episode(oracle, 1.0, 1.0, 1, (Child("find the capital of Norway", 0, True, True, 5),) * 4)


def spam(i: int, oracle: float = 1.0) -> Episode:
    """More and more copies of one brief on a chain: the first two rewards rise, the outcome does not."""
    copies = (Child("read the next page", 3, False, True, 1),) * 8
    return Episode(oracle, 6.0, 4.0, 8, copies, r_parallel=0.1 * i, r_finish=0.5 + 0.04 * i, r_perf=0.4 - 0.01 * i)


def test_serial_collapse_is_found_by_overlap_and_only_on_wide_tasks():
    assert detectors.serial_collapse([serial()] * 10).alarm
    assert not detectors.serial_collapse([healthy()] * 10).alarm
    assert not detectors.serial_collapse([serial(oracle=1.0)] * 10).alarm, "a chain has to be done in order"
    mixed = [healthy()] * 6 + [serial()] * 4
    assert not detectors.serial_collapse(mixed).alarm
    assert detectors.serial_collapse(mixed, share=0.3).signs["collapsed"] == pytest.approx(0.4)


def test_serial_collapse_is_found_while_it_happens():
    """Groups become rare long before the mean shows it."""
    fading = [healthy()] * 20 + [Episode(8.0, 1.6, 1.5, 1)] * 20  # some overlap is left, by asynchronous joins
    finding = detectors.serial_collapse(fading)
    assert finding.alarm and finding.signs == {"collapsed": 0.0, "before": 1.0, "after": 0.0}


def test_spurious_parallelism_is_found_on_spam_and_not_on_healthy_growth():
    finding = detectors.spurious_parallelism([spam(i) for i in range(10)])
    assert finding.alarm and finding.signs["paid"] == 1
    assert finding.signs["duplicate"] == 7 / 8 and finding.signs["unused"] == 1 and finding.signs["on_chains"] == 1
    growth = [Episode(8.0, i, i, i, (GOOD,) * i, 0.1 * i, 0.1 * i, 0.08 * i) for i in range(2, 10)]
    assert not detectors.spurious_parallelism(growth).alarm, "the outcome rises too"


@pytest.mark.parametrize(
    "change", ["no_gain", "unused", "duplicate", "on_chains"], ids=lambda name: f"only_{name}_beside_rewards"
)
def test_spurious_parallelism_needs_one_sign_beside_the_rewards(change):
    def one(i: int, bad: bool) -> Episode:
        child = Child(
            brief="same task" if bad and change == "duplicate" else "",
            gain=0 if bad and change == "no_gain" else 5,
            used=not (bad and change == "unused"),
            finished=True,
            tool_calls=3,
        )
        names = ("red apple", "blue pear", "green plum")
        briefs = [child.brief or name for name in names]
        children = tuple(Child(b, child.gain, child.used, True, 3) for b in briefs)
        return Episode(1.0 if bad and change == "on_chains" else 8.0, 3.0, 3.0, 3, children, 0.1 * i, 0.1 * i, 0.5)

    assert detectors.spurious_parallelism([one(i, True) for i in range(10)]).alarm
    assert not detectors.spurious_parallelism([one(i, False) for i in range(10)]).alarm


def test_finish_hacking_is_children_that_finish_without_a_tool():
    idle = Episode(8.0, 5.0, 5.0, 5, (Child("look it up", 1, True, True, 0),) * 5)
    lazy_but_failing = Episode(8.0, 5.0, 5.0, 5, (Child("look it up", 1, True, False, 0),) * 5)
    assert detectors.finish_hacking([idle] * 3).alarm
    assert not detectors.finish_hacking([healthy()] * 3).alarm
    assert not detectors.finish_hacking([lazy_but_failing] * 3).alarm
    assert not detectors.finish_hacking([]).alarm


def test_duplicates_are_briefs_of_the_same_words():
    briefs = [
        "Find the capital of Norway and its area",
        "find the area of Norway, and its capital!",
        "Find the capital of Sweden and its area",
        "",
        "",
    ]
    assert detectors.duplicates(briefs) == [(0, 1), (3, 4)]


def test_result_is_used_when_a_word_that_only_it_brought_comes_back():
    brief = "What is the capital of Norway?"
    assert detectors.is_used("The capital is Oslo.", brief, "Norway's capital: Oslo")
    assert not detectors.is_used("The capital is Oslo.", brief, "What is the capital of Norway? Bergen")


def test_episode_reads_a_record():
    def event(agent: str, kind: str, step: int = 0, **detail) -> Event:
        events.append(Event(len(events), 0.0, agent, None, kind, step=step, detail=detail))

    events: list[Event] = []
    event(ROOT, "start")
    event(ROOT, "step")
    for i, place in enumerate(("Norway", "Norway", "Chile")):
        event(ROOT, "spawn", child=f"root/0.{i}")
        event(f"root/0.{i}", "start", brief=f"capital of {place}")
    for i, answer in enumerate(("Oslo", "", "Santiago")):
        for step in range(4):
            event(f"root/0.{i}", "step", step)
            if i < 2:
                event(f"root/0.{i}", "tool", step, name="search")
        event(f"root/0.{i}", "end", 4, summary=answer)
    for i in range(3):
        event(ROOT, "join", child=f"root/0.{i}")
    event(ROOT, "step", 1)
    event(ROOT, "end", 2, summary="The capital of Norway is Oslo.")
    found = detectors.episode(events, 3.0, (0.5, 1.0, 0.2))
    assert (found.width, found.largest_group, found.parallelism, found.r_perf) == (3.0, 3, 14 / 6, 0.2)
    assert [child.used for child in found.children] == [True, False, False]
    assert [child.tool_calls for child in found.children] == [4, 4, 0]
    assert [child.gain for child in found.children] == [4, 4, 4] and all(c.finished for c in found.children)

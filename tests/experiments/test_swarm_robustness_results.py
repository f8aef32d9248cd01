"""The committed results of the robustness sweep: they recompute, the page is theirs, and its verdicts can say no."""

import json
import random

import numpy as np
import pytest

from experiments.swarm_robustness import page, run
from experiments.swarm_robustness.verdicts import LOSS, Break, broken, estimates, find_break, quality, speed, useful

LINES = (run.HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()


def test_results_are_one_line_for_each_setting():
    names = next(run.settings()).keys()
    assert [{name: row[name] for name in names} for row in run.read()] == list(run.settings())
    assert {row["n"] for row in run.read()} == {len(run.SEEDS)}


def test_results_recompute_to_the_committed_lines():
    """Four lines of one set of tasks, drawn at random: making the tasks is what costs time."""
    number = {json.dumps(setting): i for i, setting in enumerate(run.settings())}
    of_mixed = [s for s in run.settings() if (s["family"], s["items"]) == ("mixed", run.ITEMS)]
    tasks, alone = run.tasks_of("mixed", run.ITEMS)
    for setting in random.Random(0).sample(of_mixed, 4):
        assert json.dumps(run.measure(setting, tasks, alone)) == LINES[number[json.dumps(setting)]]


def test_page_and_plots_written_again_are_the_committed_page(tmp_path):
    run.write_report(tmp_path)
    assert (tmp_path / "README.md").read_text() == (run.HERE / "README.md").read_text()
    for name in ("faults.png", "scale.png"):  # the pixels depend on the version of matplotlib
        assert (tmp_path / name).stat().st_size > 10_000 and f"({name})" in (tmp_path / "README.md").read_text()


def planted(gain, change, n=20, seed=0):
    """The verdicts' input for n tasks whose log gain and change of F1 have these true means."""
    rng = np.random.default_rng(seed)
    return estimates(rng.normal(gain, 0.2, n), rng.normal(change, 0.05, n))


@pytest.mark.parametrize(
    "gain, change, verdicts, why",
    [
        (0.5, 0.0, ("faster", "kept"), ""),
        (-0.5, 0.0, ("slower", "kept"), "time"),
        (0.5, -0.2, ("faster", "lost"), "quality"),
        (-0.5, -0.2, ("slower", "lost"), "time, quality"),
    ],
)
def test_verdicts_find_a_planted_effect(gain, change, verdicts, why):
    for seed in range(10):
        row = planted(gain, change, seed=seed)
        assert (speed(row), quality(row)) == verdicts
        assert broken(row) == why and useful(row) == (why == "")


def test_verdicts_leave_a_null_open():
    """No gain, and a loss of exactly LOSS: at a level of 95 % about one in twenty is decided by chance, 3 of 60."""
    rows = [planted(0.0, -LOSS, seed=seed) for seed in range(60)]
    assert sum(speed(row) != "open" for row in rows) <= 8
    assert sum(quality(row) != "open" for row in rows) <= 8


def test_verdicts_show_the_smallest_effect_with_the_probability_they_say():
    smallest = np.mean([np.log(planted(0.0, 0.0, seed=seed)["gain_smallest"]) for seed in range(30)])
    found = [speed(planted(smallest, 0.0, seed=seed)) for seed in range(100, 160)]
    assert 0.65 <= found.count("faster") / len(found) <= 0.95, "0.8; 60 draws have a deviation of 0.05"


def test_break_is_between_the_last_useful_and_the_first_broken_level():
    truth = [(0.5, 0.0), (0.5, 0.0), (0.0, 0.0), (0.5, -0.3), (-0.5, -0.3)]
    line = [{"level": x, **planted(gain, change, seed=1)} for x, (gain, change) in zip("abcde", truth, strict=True)]
    assert speed(line[2]) == "open"
    assert find_break(line) == Break("b", "d", "quality", "e")
    assert find_break(line[:2]) == Break("b", None, "", "b")
    assert find_break(line[3:]) == Break(None, "d", "quality", "e")


def test_page_says_contradicted_where_the_rows_contradict():
    """The same page from rows in which the swarm is slow everywhere: the claim of a gain turns over."""
    rows = [{**row, "gain": 0.5, "gain_low": 0.4, "gain_high": 0.6} for row in run.read()]
    claim = "| On independent items a swarm is faster than one agent | **{}** |"
    assert claim.format("confirmed at this scale") in page.render(run.read())
    assert claim.format("contradicted") in page.render(rows)

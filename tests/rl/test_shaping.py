"""Advantages, Toggle, budgets, filtering: by value, over resumption, and what must not change."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.rl import shaping
from kimi_jax.rl.shaping import Anneal, ScoredGroup, ShapingState, Toggle, advantages
from kimi_jax.rl.types import Group, Segment, Trajectory


def apply_toggle(toggle, state, rewards, lengths):
    """Of one prompt, "x"."""
    (shaped,), state = shaping.apply_toggle(toggle, state, [ScoredGroup("x", rewards, lengths)])
    return shaped, state


REWARDS = st.lists(st.floats(-3, 3), min_size=2, max_size=8)
BINARY = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=8)


@given(REWARDS, st.floats(-5, 5), st.floats(0.1, 5))
def test_advantages_are_centred_shift_free_and_scale_with_rewards(rewards, shift, scale):
    """K2.5 divides by no deviation, so a factor on the rewards stays; GRPO's deviation is the control that loses it."""
    r = np.array(rewards)
    a = advantages(r)
    np.testing.assert_allclose(a, r - r.mean(), atol=1e-12)
    np.testing.assert_allclose(advantages(r + shift), a, atol=1e-12)
    np.testing.assert_allclose(advantages(scale * r), scale * a, atol=1e-12)
    if r.std() > 1e-3:
        np.testing.assert_allclose(advantages(scale * r, deviation=True), advantages(r, deviation=True), rtol=1e-9)


@given(st.floats(-3, 3), st.integers(1, 9), st.booleans(), st.sampled_from(["mean", "leave_one_out"]))
def test_equal_rewards_have_advantage_exactly_zero(reward, count, deviation, baseline):
    assert not advantages([reward] * count, baseline, deviation).any()


@given(REWARDS.filter(lambda r: np.ptp(r) > 0))
def test_leave_one_out_is_the_mean_of_the_others(rewards):
    others = [np.mean(rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]
    np.testing.assert_allclose(advantages(rewards, "leave_one_out"), np.array(rewards) - others, atol=1e-12)


@pytest.mark.parametrize(("arguments", "match"), [
    (([0.0], "median"), "baseline"), (([],), "finite reward"), (([math.nan, 1.0],), "finite reward"),
])  # fmt: skip
def test_groups_without_advantages_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        advantages(*arguments)


# --------------------------------------------------------------------------------------------------------------- Toggle


@given(BINARY, st.integers(0, 40))
def test_toggle_leaves_hard_prompts_alone_in_both_phases(rewards, step):
    """(a) Mean reward below lambda: both phases give the rewards unchanged, however long the answers."""
    toggle = Toggle(period=5, threshold=math.nextafter(np.mean(rewards), 9), percentile=10)
    lengths = list(range(10, 10 + len(rewards)))
    shaped, _ = apply_toggle(toggle, ShapingState(step), rewards, lengths)
    assert shaped.tolist() == rewards


@given(st.integers(1, 7), st.integers(0, 30))
def test_toggle_changes_phase_exactly_at_multiples_of_m_and_survives_resume(period, steps):
    """(b) Step by step, with the state through JSON before every step: phases 0 0 .. 1 1 .. 0 0 .."""
    toggle, state = Toggle(period=period), ShapingState()
    for step in range(steps):
        state = ShapingState.from_json(json.loads(json.dumps(state.to_json())))
        assert toggle.has_budget(state.step) == ((step // period) % 2 == 0)
        state = state.advance()


@given(st.lists(st.tuples(BINARY, st.integers(1, 50)), min_size=1, max_size=6))
def test_toggle_measures_a_prompt_once(rounds):
    """(c) The first group decides, correct answers only; without one there is no budget, then or later."""
    toggle, state = Toggle(period=2, threshold=0.0, percentile=50), ShapingState()
    first = None
    for i, (rewards, base) in enumerate(rounds):
        lengths = [base + j for j in range(len(rewards))]
        _, state = apply_toggle(toggle, state, rewards, lengths)
        if i == 0:
            right = [n for r, n in zip(rewards, lengths, strict=True) if r == 1]
            first = float(np.percentile(right, 50)) if right else None
        assert state.budgets == {"x": first}
        state = state.advance()


def test_toggle_makes_long_correct_answers_worse_than_short_ones():
    """(d) Phase 0: over budget is reward 0 and a negative advantage; exactly at the budget it stays. Phase 1: equal."""
    toggle = Toggle(period=1, threshold=0.5, percentile=50)
    state = ShapingState(0, {"x": 20.0})
    rewards, lengths = [1.0, 1.0, 1.0, 0.0], [10, 20, 21, 5]
    shaped, _ = apply_toggle(toggle, state, rewards, lengths)
    assert shaped.tolist() == [1, 1, 0, 0] and advantages(shaped)[2] < 0 < advantages(shaped)[1]
    plain, _ = apply_toggle(toggle, state.advance(), rewards, lengths)
    assert plain.tolist() == rewards


def test_toggle_threshold_is_inclusive():
    """The budget is enforced from mean = lambda on: the printed condition for leaving it out is mean < lambda."""
    state = ShapingState(0, {"x": 1.0})
    assert apply_toggle(Toggle(threshold=0.5), state, [1.0, 0.0], [9, 9])[0].tolist() == [0, 0]
    assert apply_toggle(Toggle(threshold=0.51), state, [1.0, 0.0], [9, 9])[0].tolist() == [1, 0]


def test_toggle_measures_all_prompts_of_an_iteration_and_the_first_group_of_a_prompt():
    toggle = Toggle(percentile=100)
    groups = [ScoredGroup("x", [1.0], [3]), ScoredGroup("y", [0.0], [9]), ScoredGroup("x", [1.0], [5])]
    shaped, state = shaping.apply_toggle(toggle, ShapingState(), groups)
    assert state.budgets == {"x": 3.0, "y": None}
    assert [r.tolist() for r in shaped] == [[1], [0], [0]]


def test_toggle_does_not_change_a_state_in_place():
    state = ShapingState()
    _, new = apply_toggle(Toggle(), state, [1.0], [3])
    assert state.budgets == {} and new.budgets == {"x": 3.0}


@given(st.one_of(st.none(), st.integers(), st.lists(st.integers()), st.dictionaries(st.text(), st.integers())))
def test_state_of_another_form_is_refused(value):
    for odd in (value, {"step": value, "budgets": {}}, {"step": 0, "budgets": value}):
        try:
            state = ShapingState.from_json(odd)
        except ValueError:
            continue
        assert state.to_json() == odd


@pytest.mark.parametrize("odd", [
    {"step": True, "budgets": {}}, {"step": -1, "budgets": {}}, {"step": 0, "budgets": {"x": math.nan}},
    {"step": 0, "budgets": {"x": -1.0}}, {"step": 0, "budgets": {"x": True}}, {"step": 0}, {"step": 0.0, "budgets": {}},
])  # fmt: skip
def test_state_with_odd_values_is_refused(odd):
    with pytest.raises(ValueError, match="shaping|budget"):
        ShapingState.from_json(odd)


@pytest.mark.parametrize("settings", [{"period": 0}, {"percentile": 101.0}, {"threshold": math.nan}])
def test_toggle_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match="period"):
        Toggle(**settings)


# ------------------------------------------------------------------------------------------------------- other shaping


@given(st.floats(-1, 1), st.integers(1, 50), st.integers(0, 100))
def test_annealed_weight_is_linear_and_ends_exactly(start, steps, step):
    anneal = Anneal(start, steps)
    np.testing.assert_allclose(anneal.at(step), start * max(0.0, 1 - step / steps), atol=1e-12)
    assert anneal.at(0) == start and anneal.at(steps) == anneal.at(steps + step) == 0


def test_budget_control_penalises_what_was_cut_off():
    assert shaping.control_budget([1.0, 1.0, 0.0], [9, 10, 10], 10).tolist() == [1, 0, 0]
    assert shaping.control_budget([1.0, 0.0], [10, 9], 10, -0.5).tolist() == [-0.5, 0]
    with pytest.raises(ValueError, match="at most 0"):
        shaping.control_budget([1.0], [1], 10, 0.1)


def group(key, rewards, finish="stop"):
    prompt = Segment.given([5])
    return Group(key, tuple(
        Trajectory((prompt, Segment.drawn([6] * (i + 1), [-1.0] * (i + 1), [0] * (i + 1), 0)), r, finish)
        for i, r in enumerate(rewards)
    ))  # fmt: skip


def test_groups_that_say_nothing_are_dropped_and_counted():
    groups = [group("none", [0.0, 0.0]), group("all", [1.0, 1.0], "length"), group("some", [0.0, 1.0])]
    kept, metrics = shaping.drop_uninformative(groups)
    assert [g.key for g in kept] == ["some"]
    want = {"reward_mean": 0.5, "reward_std": 0.5, "solve_none": 1 / 3, "solve_all": 1 / 3, "length_mean": 1.5,
            "length_max": 2.0, "truncated": 1 / 3}  # fmt: skip
    assert metrics == pytest.approx(want)
    assert shaping.drop_uninformative([]) == ([], {})
    with pytest.raises(ValueError, match="no reward"):
        shaping.drop_uninformative([Group("open", (Trajectory((Segment.given([5]),)),))])

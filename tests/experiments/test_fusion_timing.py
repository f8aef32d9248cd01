"""The fusion-timing experiment: scenes that say what they show, exact budgets, and dips that are measured as such."""

import dataclasses

import numpy as np
import pytest

from experiments import harness
from experiments.fusion_timing import EXPERIMENT, MAIN, TOLERANCE, check, dip, figures, scenes
from kimi_jax.config import override
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.sources import demo_scene
from kimi_jax.data.vocabulary import tokenizer_for
from kimi_jax.eval import tasks

CURVE = [(4 * k, 3.0 - 0.01 * k) for k in range(1, 51)]  # falls from 2.99 to 2.5 over 200 steps


def test_scene_shows_what_its_caption_says():
    for i in (0, 1, 2, 3, 4, 6, 7, 8):
        shown = demo_scene.scene("validation", i)
        _, first, _, link, _, second, _ = shown.words
        pixels = np.asarray(shown.image).astype(int)
        centres = [np.argwhere((pixels == demo_scene.COLOURS[c]).all(-1)).mean(0) for c in (first, second)]
        (y, x), (other_y, other_x) = centres
        relation = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}
        assert relation[link], shown.caption


def test_scene_depends_on_split_and_number_only():
    assert np.array_equal(demo_scene.scene("train", 3).image, demo_scene.scene("train", 3).image)
    assert demo_scene.scene("train", 3).caption != demo_scene.scene("validation", 3).caption


def test_scene_tasks_offer_one_right_answer():
    scenes.register_tasks()
    for name in ("scene_colour", "scene_shape", "scene_relation", "scene_digit"):
        for question in tasks.TASKS[name].build(20):
            assert question.choices.count(question.gold) == 1
            caption = demo_scene.scene("validation", int(question.cluster.split()[1])).words
            if name == "scene_colour":  # the other shape's colour would be right as well
                assert f" {caption[5]}" not in question.choices and len(question.choices) == 5


@pytest.mark.parametrize(("early_seed", "drawn"), [(0, True), (1, False)])
def test_plot_needs_a_seed_that_its_rows_share(early_seed, drawn, tmp_path):
    seeds = {"early": early_seed, "mid": 0, "late": 0}
    records = [{"row": row, "seed": seed, "task": "x", "step": 0, "score": 0.0} for row, seed in seeds.items()]
    curves = [{**r, "task": figures.CURVE, "step": s, "score": v} for r in records for s, v in CURVE]
    figures.draw(harness.ResultsTable(EXPERIMENT, "cpu", records, curves), tmp_path)
    assert (tmp_path / "text.png").exists() == drawn


def test_dip_of_a_falling_curve_is_none():
    depth, length = dip(CURVE, 100)
    assert depth == pytest.approx(-0.01) and length == 0


def test_dip_has_the_depth_and_length_that_were_planted():
    planted = [(step, score + (0.1 if 100 < step <= 132 else 0.0)) for step, score in CURVE]
    depth, length = dip(planted, 100)
    # the first point after the switch is 0.01 lower by itself; step 136 is the first below the level at step 100
    assert depth == pytest.approx(0.1 - 0.01) and length == 36


def test_dip_that_does_not_recover_lasts_to_the_end():
    worse = [(step, score if step <= 100 else 9.0) for step, score in CURVE]
    assert dip(worse, 100) == (pytest.approx(9.0 - 2.75), 100)


def test_budgets_that_differ_are_refused():
    def table(late: float) -> harness.ResultsTable:
        tokens = {"early": 1000.0, "mid": 1000.0, "late": late}
        records = [
            {"row": row, "seed": 0, "task": name, "score": n}
            for row, n in tokens.items()
            for name in ("vision_tokens", "text_tokens")
        ]
        return harness.ResultsTable(EXPERIMENT, "cpu", records)

    assert len(check(table(999.0))) == 2
    with pytest.raises(ValueError, match=r"vision_tokens of early, mid, late differ by 0\.50%"):
        check(table(995.0))


def test_rows_that_are_compared_ask_for_the_same_vision_tokens():
    for scale in ("smoke", "cpu", "pod"):
        totals = set()
        for row in MAIN:
            config = EXPERIMENT.config(row, 0, scale)
            begin, ratio = config.data.vision_ratio[-1]
            totals.add(round(ratio * (1 - begin), 9))
        assert totals == {0.1}


def test_rows_differ_in_the_ratio_and_the_bins_only():
    early, late = (EXPERIMENT.config(row, 0, "cpu") for row in ("early", "late"))
    data = dataclasses.replace(late.data, vision_ratio=early.data.vision_ratio, vision_bins=early.data.vision_bins)
    assert dataclasses.replace(late, data=data, workdir=early.workdir) == early


@pytest.mark.slow  # a tokenizer and three times 240 packs: half a minute
def test_streams_of_the_main_rows_deliver_the_same_vision_and_text_tokens(tmp_path):
    scenes_file = scenes.write(tmp_path / "scenes", 512)
    found = []
    for row in MAIN:
        config = override(
            EXPERIMENT.config(row, 0, "cpu"),
            {"data.sources.scenes.path": str(scenes_file), "data.tokenizer": str(tmp_path / "tokenizer.json")},
        )
        tokenizer_for(config, config.data.tokenizer, config.model.vocab_size)
        with BatchStream(config.data, config.model, config.steps) as stream:
            for _ in range(config.steps):
                next(stream)
            report = stream.report()
        found.append((report["vision_tokens"], report["tokens"] - report["vision_tokens"]))
    vision, text = np.array(found).T
    assert np.ptp(vision) < 36  # tokens of the largest scene
    assert np.ptp(text) < TOLERANCE * text.max()

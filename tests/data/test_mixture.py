"""Mixture: the vision share of tokens within one item at all times, weights within a modality, and honest refusals."""

import contextlib
import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.config import ConfigError, DataConfig, SourceConfig, freeze, preset
from kimi_jax.data import DataError
from kimi_jax.data.bins import check_bins
from kimi_jax.data.example import Encoded, MediaItem
from kimi_jax.data.mixture import Mixture, ratio_at
from kimi_jax.data.shard import Shard
from tests.data.synthetic import tokenizer

SOURCES = {
    "wiki": SourceConfig(weight=3.0),
    "books": SourceConfig(weight=1.0),
    "vqa": SourceConfig(weight=5.0, vision=True),
    "clips": SourceConfig(weight=2.0, vision=True),
}


def draw(mixture: Mixture, name: str, tokens: int, media: int, ratio: float) -> None:
    """A draw that is delivered at once, so that text counts when it is drawn."""
    mixture.record_draw(name, tokens, media, ratio)
    mixture.delivered(name, tokens, ratio)


def run(mixture: Mixture, schedule, draws: int, rng: np.random.Generator, bad: float = 0.0) -> list[tuple]:
    """(source, tokens, media, ratio) of each draw."""
    out = []
    for i in range(draws):
        ratio = ratio_at(schedule, i / draws)
        name = mixture.choose()
        tokens = int(rng.integers(40, 120))
        media = int(tokens * rng.uniform(0.6, 0.9)) if SOURCES[name].vision else 0
        if rng.random() < bad:
            tokens = media = 0
        draw(mixture, name, tokens, media, ratio)
        out.append((name, tokens, media, ratio))
    return out


@given(st.floats(0, 0.5), st.integers(0, 2**31), st.sampled_from([0.0, 0.2]))
def test_ratio_is_never_off_by_more_than_one_item(ratio, seed, bad):
    schedule = ((0.0, ratio),)
    mixture = Mixture(SOURCES, schedule)
    tokens = media = 0
    for _, n, v, _ in run(mixture, schedule, 300, np.random.default_rng(seed), bad):
        tokens, media = tokens + n, media + v
        assert abs(media - ratio * tokens) <= 120  # tokens of the longest example
    assert ratio == 0 or media > 0 or tokens * ratio < 120


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_schedule_is_followed_piece_by_piece(ratios, seed):
    schedule = tuple((i / len(ratios), r) for i, r in enumerate(ratios))
    mixture = Mixture(SOURCES, schedule)
    draws = run(mixture, schedule, 400, np.random.default_rng(seed))
    for _, ratio in schedule:
        piece = [(n, v) for _, n, v, r in draws if r == ratio]
        tokens, media = (sum(x) for x in zip(*piece, strict=True))
        # each piece begins and ends within one example of the line
        assert abs(media - ratio * tokens) <= 2 * 120 * max(1, ratios.count(ratio))
    assert abs(mixture.excess) <= 120


def test_ratio_at_takes_the_last_entry_that_has_begun():
    schedule = ((0.0, 0.1), (0.5, 0.3))
    assert [ratio_at(schedule, f) for f in (0, 0.49, 0.5, 1.0, 7.0)] == [0.1, 0.1, 0.3, 0.3, 0.3]
    assert ratio_at(((0.2, 0.5),), 0.1) == 0.0


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=6))
def test_sources_of_a_modality_get_their_weight_of_the_draws(weights):
    sources = {f"s{i}": SourceConfig(weight=w) for i, w in enumerate(weights)}
    mixture = Mixture(sources, ((0.0, 0.0),))
    counts = dict.fromkeys(sources, 0)
    for i in range(1, 200):
        name = mixture.choose()
        draw(mixture, name, 10, 0, 0.0)
        counts[name] += 1
        for j, w in enumerate(weights):
            # below its share by less than one example; above it only by what the others lack
            assert counts[f"s{j}"] - w / sum(weights) * i > -len(weights)
            assert counts[f"s{j}"] - w / sum(weights) * i <= 1 + 1e-9


def test_weight_schedule_changes_the_draws_from_then_on_and_owes_nothing_for_before():
    sources = {
        "video": SourceConfig(weight=9.0, weight_schedule=((0.5, 1.0), (0.75, 0.0))),
        "images": SourceConfig(weight=1.0),
    }
    mixture = Mixture(sources, ((0.0, 0.0),))
    names = []
    for i in range(400):
        names.append(mixture.choose(i / 400))
        mixture.record_draw(names[-1], 10, 0, 0.0, i / 400)
    by_part = [names[a:b].count("video") for a, b in ((0, 200), (200, 300), (300, 400))]
    assert by_part == [180, 50, 0]


def test_time_without_any_source_of_a_modality_is_an_error():
    paused = SourceConfig(weight_schedule=((0.5, 0.0),))
    with pytest.raises(DataError, match="without media has weight 0 at 50% of training"):
        Mixture({"wiki": paused}, ((0.0, 0.0),))
    Mixture({"wiki": paused, "books": SourceConfig()}, ((0.0, 0.0),))


def test_state_continues_exactly():
    schedule = ((0.0, 0.3),)
    one, rng = Mixture(SOURCES, schedule), np.random.default_rng(0)
    run(one, schedule, 57, rng)
    two = Mixture(SOURCES, schedule)
    two.restore(json.loads(json.dumps(one.state())))
    assert run(one, schedule, 100, np.random.default_rng(1)) == run(two, schedule, 100, np.random.default_rng(1))
    assert one.state() == two.state()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.39])
def test_ratio_out_of_reach_is_an_error_that_names_the_share(share):
    schedule = ((0.0, 0.4),)
    mixture = Mixture(SOURCES, schedule)
    with pytest.raises(DataError, match=rf"cannot be reached: media are only {share:.1%}"):
        for _ in range(500):
            name = mixture.choose()
            draw(mixture, name, 100, int(100 * share) if SOURCES[name].vision else 0, 0.4)


def test_ratio_just_within_reach_is_no_error():
    mixture = Mixture(SOURCES, ((0.0, 0.4),))
    for _ in range(3000):
        name = mixture.choose()
        draw(mixture, name, 100, 41 if SOURCES[name].vision else 0, 0.4)
    assert abs(mixture.excess) <= 100


def test_scatter_is_not_taken_for_a_ratio_out_of_reach():
    """Images of 4 to 60 tokens, 22 % of the tokens on average, and 20 % asked for: runs of small ones are chance."""
    rng = np.random.default_rng(0)
    mixture = Mixture(SOURCES, ((0.0, 0.2),))
    tokens = media = 0
    for _ in range(30_000):
        vision = SOURCES[mixture.choose()].vision
        v = int(rng.choice([4, 9, 16, 60], p=[0.4, 0.35, 0.15, 0.1])) if vision else 0
        n = v + 47 if vision else 150
        draw(mixture, "vqa" if vision else "wiki", n, v, 0.2)
        tokens, media = tokens + n, media + v
    assert abs(media / tokens - 0.2) < 0.002


def test_slightly_out_of_reach_is_noticed_in_the_end():
    rng = np.random.default_rng(0)
    mixture = Mixture(SOURCES, ((0.0, 0.24),))
    with pytest.raises(DataError, match="cannot be reached: media are only 2"):
        for _ in range(10_000):
            vision = SOURCES[mixture.choose()].vision
            v = int(rng.choice([4, 9, 16, 60], p=[0.4, 0.35, 0.15, 0.1])) if vision else 0
            draw(mixture, "vqa" if vision else "wiki", v + 47 if vision else 150, v, 0.24)


def test_rare_source_with_large_images_is_waited_for():
    sources = {
        "text": SourceConfig(),
        "small": SourceConfig(vision=True, weight=99.0),
        "large": SourceConfig(vision=True, weight=1.0),
    }
    mixture = Mixture(sources, ((0.0, 0.2),))
    for _ in range(5000):
        name = mixture.choose()
        tokens, media = {"text": (100, 0), "small": (50, 5), "large": (4000, 3900)}[name]
        draw(mixture, name, tokens, media, 0.2)
    assert abs(mixture.excess) <= 4000


def test_text_that_waits_asks_for_no_vision_tokens_until_it_is_delivered():
    """500 texts drawn while nothing is delivered, as where text fills rows for want of bins, leave the share alone."""
    mixture = Mixture(SOURCES, ((0.0, 0.2),))
    for _ in range(500):
        mixture.record_draw("wiki", 100, 0, 0.2)
    assert mixture.excess == 0 and not SOURCES[mixture.choose()].vision
    mixture.delivered("wiki", 100, 0.2)
    assert mixture.excess == pytest.approx(-20) and SOURCES[mixture.choose()].vision
    assert not SOURCES[mixture.choose(text_only=True)].vision


def test_text_that_the_next_pack_takes_asks_for_vision_tokens_ahead():
    mixture = Mixture(SOURCES, ((0.0, 0.2),))
    assert not SOURCES[mixture.choose()].vision and SOURCES[mixture.choose(ahead=20.0)].vision
    mixture.record_draw("vqa", 25, 25, 0.2)
    assert not SOURCES[mixture.choose(ahead=20.0)].vision


def test_vision_only_and_text_only():
    vision = Mixture({"vqa": SourceConfig(vision=True)}, ((0.0, 0.1),))
    for _ in range(300):
        assert vision.choose() == "vqa"
        vision.record_draw("vqa", 100, 50, 0.1)
    with pytest.raises(DataError, match=r"no source has vision=True.*vision_ratio=\(\(0\.0, 0\.0\),\)"):
        Mixture({"wiki": SourceConfig()}, ((0.0, 0.1),))
    Mixture({"wiki": SourceConfig()}, ((0.0, 0.0),))


@pytest.mark.parametrize(
    ("sources", "schedule", "message"),
    [
        ({}, ((0.0, 0.0),), "sources is empty"),
        ({"a": SourceConfig(weight=0.0)}, ((0.0, 0.0),), r"sources\.a\.weight"),
        (
            {"a": SourceConfig(weight_schedule=((0.5, 1.0), (0.1, 2.0)))},
            ((0.0, 0.0),),
            r"a\.weight_schedule.*ascending",
        ),
        ({"a": SourceConfig(weight_schedule=((0.5, -1.0),))}, ((0.0, 0.0),), r"a\.weight_schedule"),
        (SOURCES, ((0.5, 0.1), (0.0, 0.2)), "ascending"),
        (SOURCES, ((0.0, 1.2),), "vision_ratio"),
    ],
)
def test_settings_that_cannot_work(sources, schedule, message):
    with pytest.raises(DataError, match=message):
        Mixture(sources, schedule)


def test_rows_stay_full_and_the_vision_share_falls_where_the_bins_are_short(tmp_path):
    model = preset("demo")
    pads = [model.media_placeholder_token_id] * 16
    pieces = {
        "t": Encoded(np.full(125, 5, np.int32), np.ones(125, np.float32), (), 0, "t"),
        "v": Encoded(np.array([5] * 10 + pads, np.int32), np.ones(26, np.float32),
                     (MediaItem(np.zeros((64, 588), np.uint8), (1, 8, 8)),), 1, "v"),
    }  # fmt: skip
    data = DataConfig(
        sources={"t": SourceConfig(), "v": SourceConfig(vision=True)}, sequence_length=1024, num_packs=1,
        vision_bins=((64, 2),), vision_ratio=((0.0, 0.1),),
    )  # fmt: skip
    shard = Shard(0, data, model, 1000, {"t": range(50), "v": range(50)}, tokenizer(tmp_path))
    for name, reader in shard._readers.items():
        # an image of its own each time: one that two examples of a pack share would lie there once
        reader.encode = lambda *_, piece=pieces[name]: [
            dataclasses.replace(piece, media=tuple(MediaItem(m.patches, m.grid) for m in piece.media))
        ]
    packs = [shard.next_pack() for _ in range(80)][-40:]
    # a text of 125 tokens leaves up to 124 of 1,024 unused; the old steering left 0.2 of the row filled
    assert np.mean([(pack.segment_ids > 0).mean() for pack in packs]) > 0.88
    assert all((pack.feature_index >= 0).sum() == 32 for pack in packs)
    with pytest.raises(ConfigError, match="raise the bins to at least 451 patches"):
        check_bins(data, model)


CONFIGS = Path(__file__).parents[2] / "configs"
PODS = runpy.run_path(str(CONFIGS / "pods.py"))


@pytest.mark.parametrize("name", ["demo", "kimi_k2_5", "kimi_vl_a3b", "moonlight_16b_a3b", "small"])
def test_bins_of_every_config_and_pod_hold_the_vision_ratio_with_slack(name):
    configs = [runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()]
    for topology in PODS["TOPOLOGIES"]:
        with contextlib.suppress(ConfigError):  # a model that is too large for the pod
            configs.append(PODS["get_config"](f"{name}@{topology}"))
    for config in map(freeze, configs):
        check_bins(config.data, config.model)

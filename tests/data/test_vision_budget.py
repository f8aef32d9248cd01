"""Exact vision ratios: every schedule of one total delivers that total, to within one example, and resumes exactly."""

import dataclasses
import json

import numpy as np
import pytest

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data import DataError
from kimi_jax.data.pipeline import BatchStream
from tests.data.synthetic import Synthetic, settings
from tests.data.synthetic import tokenizer as train

STEPS = 40
IMAGES = Synthetic("image", size=53, words=(3, 6))
TEXTS = Synthetic("text")
LARGEST = 25  # tokens of an image of 130 x 130 pixels, the largest of IMAGES
# a fifteenth of the positions in each: at the start, from half, from three fifths with a change, in the end
SCHEDULES = (
    ((0.0, 1 / 15),),
    ((0.0, 0.0), (0.5, 2 / 15)),
    ((0.0, 0.0), (0.6, 1 / 6), (0.8, 1 / 6)),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train(folder)
    return folder / "tokenizer.json"


def stream(path, ratio, state=None, images=IMAGES, **changes) -> BatchStream:
    sources = {"wiki": SourceConfig(kind="synthetic"), "vqa": SourceConfig(kind="synthetic", vision=True)}
    changes = {"vision_bins": ((160, 8),), "num_packs": 1, "sources": sources, **changes}
    data, model = settings(path, **{"vision_ratio": ratio, "exact_vision_ratio": True, **changes})
    return BatchStream(data, model, STEPS, state=state, sources={"wiki": TEXTS, "vqa": images})


def vision(batch) -> int:
    return int(np.count_nonzero(batch.feature_index >= 0))


@pytest.mark.parametrize("ratio", SCHEDULES)
def test_exact_ratio_delivers_the_share_of_every_prefix_of_the_run(path, ratio):
    due = delivered = 0.0
    with stream(path, ratio) as s:
        for step in range(STEPS):
            due += [r for begin, r in ratio if begin <= step / STEPS][-1] * 2 * 256
            batch = next(s)
            delivered += vision(batch)
            # from below, and by less than one example: nothing runs ahead, nothing piles up
            assert -1e-6 <= due - delivered < LARGEST
        assert s.report()["vision_tokens"] == delivered
    assert abs(delivered - STEPS * 2 * 256 / 15) < LARGEST + 1


def test_exact_ratio_has_no_vision_before_the_switch(path):
    with stream(path, SCHEDULES[1]) as s:
        found = [vision(next(s)) for _ in range(STEPS)]
    assert not any(found[: STEPS // 2]) and all(found[STEPS // 2 :])


def test_exact_ratio_continues_exactly_from_a_state(path):
    with stream(path, SCHEDULES[1]) as s:
        batches = []
        for step in range(30):
            batches.append(next(s))
            if step == 22:
                state = json.loads(json.dumps(s.state()))
    with stream(path, SCHEDULES[1], state=state) as s:
        for expected in batches[23:]:
            found = next(s)
            assert np.array_equal(found.tokens, expected.tokens)
            assert np.array_equal(found.vision[0].patches, expected.vision[0].patches)


def test_exact_ratio_reads_around_bad_records(path):
    with stream(path, SCHEDULES[0], images=dataclasses.replace(IMAGES, bad_every=9)) as s:
        found = sum(vision(next(s)) for _ in range(STEPS))
    assert abs(found - STEPS * 2 * 256 / 15) < LARGEST + 1


def test_exact_ratio_out_of_reach_stops_the_run(path):
    # of an example with media less than half is: no choice of them fills half of the positions
    wordy = Synthetic("image", size=53, words=(20, 40))
    with stream(path, ((0.0, 0.5),), images=wordy) as s:
        with pytest.raises(DataError, match="cannot be reached"):
            for _ in range(STEPS):
                next(s)


def test_exact_ratio_goes_with_no_forced_examples(path):
    sources = {"vqa": SourceConfig(kind="synthetic", vision=True, min_per_pack=1)}
    data, _ = settings(path, sources=sources, exact_vision_ratio=True)
    assert "min_per_pack" in data.conflict()


def test_exact_ratio_does_not_change_between_a_state_and_its_continuation(path):
    with stream(path, SCHEDULES[0]) as s:
        next(s)
        state = s.state()
    with pytest.raises((DataError, ConfigError), match="exact_vision_ratio"):
        with stream(path, SCHEDULES[0], state=state, exact_vision_ratio=False) as s:
            next(s)

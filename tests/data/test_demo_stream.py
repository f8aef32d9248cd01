"""Every batch of the demo has eight shapes of media or more, chunks of all lengths and a full bin."""

import dataclasses
import runpy

import numpy as np
import pytest

from configs.demo import get_config
from kimi_jax.config import TrainConfig, freeze
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.vocabulary import tokenizer_for
from tests.environment import REPO

SFT = runpy.run_path(str(REPO / "configs" / "sft" / "demo.py"))


def demo(path, max_bytes: int) -> TrainConfig:
    """The demo's settings with a tokenizer of its own texts, read in this process."""
    config = freeze(get_config())
    tokenizer_for(config, str(path), config.model.vocab_size, max_bytes)
    data = dataclasses.replace(config.data, tokenizer=str(path), num_workers=0)
    return dataclasses.replace(config, data=data)


def check(config: TrainConfig, batches: int) -> dict:
    """Looks at the first batches; the stream's report at their end."""
    limit = max(patches for patches, _ in config.data.vision_bins)
    with BatchStream(config.data, config.model, config.steps) as stream:
        for number in range(batches):
            grids = set()
            for bins in next(stream).vision:
                real = bins.segment_ids > 0
                grids |= {tuple(grid) for grid in np.unique(bins.grids[real], axis=0).tolist()}
            seen = f"batch {number}: {sorted(grids)}"
            assert len(grids) >= 8, seen
            assert {t for t, _, _ in grids} == {1, 2, 3, 4}, seen
            assert any(h != w for _, h, w in grids), seen
            assert any(t * h * w == limit for t, h, w in grids), seen
        return stream.report()


def test_first_batches_of_the_demo(tmp_path):
    report = check(demo(tmp_path / "tokenizer.json", 500_000), 6)
    assert report["token_fill"] >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("get", "packs"), [(get_config, 50), (SFT["get_config"], 60)], ids=["demo", "sft"])
def test_token_fill_and_vision_ratio_of_a_demo_last(get, packs, tmp_path):
    """Rows of short images and long texts, which piled up in the buffer from pack 20 on; a ratio that the images of
    the conversations reach. 2 % of the ratio are the images that still wait at the end: one pack moves the
    ratio by 3 % at 30 packs of conversations, too much with the texts of Python 3.12's packages, and by 1 % at 60."""
    config = demo(tmp_path / "tokenizer.json", 500_000)
    data = dataclasses.replace(freeze(get()).data, tokenizer=config.data.tokenizer, num_workers=0)
    with BatchStream(data, config.model, config.steps) as stream:
        for _ in range(packs):
            next(stream)
        report = stream.report()
    assert report["token_fill"] >= 0.97
    assert abs(report["ratio"] / data.vision_ratio[0][1] - 1) < 0.02


@pytest.mark.slow
def test_every_batch_of_the_demo(tmp_path):
    """The whole run, with the tokenizer that `make demo` trains: the stream depends on the seed alone."""
    config = demo(tmp_path / "tokenizer.json", 20_000_000)
    report = check(config, config.steps)
    assert report["token_fill"] >= 0.97 and not report["bad"]

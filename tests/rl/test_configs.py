"""The settings of configs/rl can be trained with: they freeze, keep the rules of a run, and their rollouts fit."""

import runpy

import pytest

from kimi_jax.config import freeze
from kimi_jax.config_check import check_run
from tests.environment import REPO

CONFIGS = sorted((REPO / "configs" / "rl").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_keep_the_rules_of_a_run(path):
    check_run(freeze(runpy.run_path(str(path))["get_config"]()))


def test_every_answer_of_the_demo_has_a_row_and_every_image_room():
    config = freeze(runpy.run_path(str(REPO / "configs" / "rl" / "count.py"))["get_config"]())
    rollout, data = config.rl.rollout, config.data
    assert data.rows_per_pack * data.num_packs >= rollout.prompts * rollout.samples
    ((patches, count),) = data.vision_bins
    assert patches // 16 * count >= rollout.prompts  # an image of 56 x 56 pixels is 4 x 4 patches

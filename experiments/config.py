"""Any run of an experiment as settings of another command: `--config=experiments/config.py:NAME/ROW/SEED@SCALE`.

python -m kimi_jax.train --config=experiments/config.py:fusion_timing/early/0@cpu
python -m kimi_jax.plan --config=experiments/config.py:fusion_timing/early/0@pod --topology=v5p:8x8x16
"""

import runpy

import ml_collections

from experiments.harness import HERE
from experiments.run import load
from kimi_jax.config import TrainConfig, freeze, thaw


def settings_of(file: str) -> TrainConfig:
    """The settings of a file below configs/, such as "rl/count.py", which an experiment builds on."""
    return freeze(runpy.run_path(str(HERE.parent / "configs" / file))["get_config"]())


def get_config(name: str = "fusion_timing/early/0@cpu") -> ml_collections.ConfigDict:
    """Settings of NAME/ROW/SEED@SCALE."""
    run, _, scale = name.partition("@")
    experiment, row, seed = run.split("/")
    return thaw(load(experiment).config(row, int(seed), scale))

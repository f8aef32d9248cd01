"""Any run of an experiment as settings of another command: `--config=experiments/config.py:NAME/ROW/SEED@SCALE`.

python -m kimi_jax.train --config=experiments/config.py:fusion_timing/early/0@cpu
python -m kimi_jax.plan --config=experiments/config.py:fusion_timing/early/0@pod --topology=v5p:8x8x16
"""

import ml_collections

from experiments.run import load
from kimi_jax.config import thaw


def get_config(name: str = "fusion_timing/early/0@cpu") -> ml_collections.ConfigDict:
    """Settings of NAME/ROW/SEED@SCALE."""
    run, _, scale = name.partition("@")
    experiment, row, seed = run.split("/")
    return thaw(load(experiment).config(row, int(seed), scale))

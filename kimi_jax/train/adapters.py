"""What a run of adapters (`config.lora`) stands on: the weights of its base.

Source: LoRA (arXiv:2106.09685); `nn.lora`. The base is read part by part onto the mesh and is
never written: it has no gradient, no moments and no place in the checkpoints, which hold the adapters alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, MeshConfig, TrainConfig
from kimi_jax.hf.files import CheckpointError
from kimi_jax.train import checkpoint
from kimi_jax.train.weights import load_weights

COMPUTED = ("dtype", "scan_layers", "remat", "remat_policy")  # what of `config.model` is the run's, not the base's


def load_base(config: TrainConfig, mesh: Mesh) -> tuple[TrainConfig, Any]:
    """The settings with the model of the base, and its weights sharded over the mesh, in `config.model.dtype`.

    Without `config.lora`: (config, None). Raises ConfigError for a base that cannot be loaded.
    """
    if config.lora is None:
        return config, None
    if not config.lora.base:
        raise ConfigError("config.lora.base is empty; name a released directory or a workdir")
    try:
        base = load_weights(config.lora.base, config.model.dtype, config.lora.experts, mesh, config.checkpoint.verify)
    except (FileNotFoundError, CheckpointError) as error:
        raise ConfigError(f"config.lora.base: {error}") from error
    own = {name: getattr(config.model, name) for name in COMPUTED}
    return dataclasses.replace(config, model=dataclasses.replace(base.config, **own)), base.params


def load_run(workdir: str, step: int | None = None) -> tuple[TrainConfig, Any, Any]:
    """The settings of a run, what it learned, and with `config.lora` the weights of its base, for evaluation.

    As `checkpoint.load` and `load_base`, with their errors.
    """
    config, params = checkpoint.load(workdir, step)
    config, frozen = load_base(config, sharding.make_mesh(MeshConfig()))
    return config, params, frozen

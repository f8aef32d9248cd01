"""The public surface of kimi_jax, loaded on first use.

`import kimi_jax as kimi` itself imports nothing, not even jax; `kimi.nn`, `kimi.preset` and the rest come with their
first use. So a data worker never pays for the model, and a notebook never for TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_jax import agents, config, data, eval, hf, kernels, nn, optim, rl, sharding, train
    from kimi_jax.config import (
        ConfigError,
        DataConfig,
        ModelConfig,
        MoEConfig,
        OptimizerConfig,
        SourceConfig,
        TrainConfig,
        VisionConfig,
        YarnConfig,
        diff,
        freeze,
        preset,
        thaw,
    )
    from kimi_jax.data import BadRecord
    from kimi_jax.data.image import process_image
    from kimi_jax.data.tokenizer import load_tokenizer
    from kimi_jax.data.video import process_video
    from kimi_jax.model import Model, load

__version__ = "0.1.0"

_MODULES = ("agents", "config", "data", "eval", "hf", "kernels", "nn", "optim", "rl", "sharding", "train")
_NAMES = {
    "BadRecord": "data",
    "ConfigError": "config",
    "DataConfig": "config",
    "ModelConfig": "config",
    "MoEConfig": "config",
    "OptimizerConfig": "config",
    "SourceConfig": "config",
    "TrainConfig": "config",
    "VisionConfig": "config",
    "YarnConfig": "config",
    "diff": "config",
    "freeze": "config",
    "preset": "config",
    "thaw": "config",
    "Model": "model",
    "load": "model",
    "load_tokenizer": "data.tokenizer",
    "process_image": "data.image",
    "process_video": "data.video",
}

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"kimi_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"kimi_jax.{_NAMES[name]}"), name)
    raise AttributeError(f"kimi_jax has no {name!r}; it has: {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

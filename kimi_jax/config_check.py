"""What the settings of a run have to keep to together, beyond the range of each: checked before anything long starts.

Each rule stands with what it is about (`packing.PackShape`, `mixture.Mixture`, `data.sources`,
`config.check_schedule`); `check_run` asks them all. Nothing here needs jax or opens a file.
"""

from __future__ import annotations

import dataclasses

from kimi_jax.config import TrainConfig, check_schedule
from kimi_jax.config_tree import ConfigError


def check_run(config: TrainConfig) -> None:
    """Raises ConfigError for the first rule that the settings of a run break."""
    from kimi_jax.data import DataError, sources
    from kimi_jax.data.mixture import Mixture
    from kimi_jax.data.packing import PackShape

    check_schedule(config.optimizer, config.steps)
    # Weights alone do not need these ids (converted checkpoints of small vocabularies exist); packing does.
    for name in ("media_placeholder_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        token, vocab_size = getattr(config.model, name), config.model.vocab_size
        if token >= vocab_size and (name != "media_placeholder_token_id" or config.model.vision):
            raise ConfigError(f"config.model.{name} = {token} lies outside config.model.vocab_size = {vocab_size}")
    if config.lora is not None and any(dataclasses.astuple(config.init_from)):
        raise ConfigError("config.init_from and config.lora exclude each other: adapters start from config.lora.base")
    parts = config.memory.microbatches
    if parts < 1 or config.data.num_packs % parts:
        raise ConfigError(
            f"config.memory.microbatches = {parts} does not divide config.data.num_packs = {config.data.num_packs}"
        )
    try:
        PackShape.of(config.data, config.model)
        for name, source in config.data.sources.items():
            sources.check_kind(source, f"config.data.sources.{name}.kind: ")
        if config.data.sources:  # a run whose batches come from elsewhere has none; the data stream refuses that
            Mixture(config.data.sources, config.data.vision_ratio if config.model.vision else ((0.0, 0.0),))
    except DataError as error:
        raise ConfigError(f"config.{error}") from error

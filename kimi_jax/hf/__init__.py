"""Released checkpoints in and out: names, config.json, INT4, FP8, streaming, conversion (kimi_jax.convert)."""

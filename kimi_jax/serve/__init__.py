"""An OpenAI-compatible server over the sampler: `python -m kimi_jax.serve --model=DIR` (extra `[serve]`)."""

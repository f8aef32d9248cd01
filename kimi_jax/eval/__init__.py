"""Evaluation: named tasks with chance levels and controls, run on packed batches. `python -m kimi_jax.eval --help`."""

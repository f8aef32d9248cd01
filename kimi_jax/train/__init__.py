"""Training: `step` (one jitted function), `loop` (reads top to bottom), `checkpoint`, `metrics`, `flops`.

The command is `python -m kimi_jax.train --config=configs/demo.py`.
"""

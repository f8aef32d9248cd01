"""The learning-rate schedule: warm-up, stable, decay (WSD).

Source: docs/paper_notes.md section 2.5 (Kimi K2, arXiv:2507.20534: linear warm-up, constant, cosine to a tenth).
"""

from __future__ import annotations

import optax

from kimi_jax.config import OptimizerConfig, check_schedule


def wsd(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a pure function of the number of updates already made (0 for the first).

    The n-th update (n = count + 1) gets `peak_lr * n / warmup_steps` in the warm-up, so that the first one moves and
    the last one of the warm-up has the peak; then `peak_lr`; then a cosine over the last `decay_fraction * total_steps`
    updates, the last of which has `final_lr`. It stays there after the end.
    Raises ConfigError if the parts do not fit into the run.
    """
    check_schedule(config, total_steps)
    warmup = config.warmup_steps
    decay = round(config.decay_fraction * total_steps)
    parts, ends = [optax.constant_schedule(config.peak_lr)], []
    if warmup:
        parts, ends = [optax.linear_schedule(0.0, config.peak_lr, warmup), *parts], [warmup]
    if decay:
        parts.append(optax.cosine_decay_schedule(config.peak_lr, decay, alpha=config.final_lr / config.peak_lr))
        ends.append(total_steps - decay)
    by_number = optax.join_schedules(parts, ends)
    return lambda count: by_number(count + 1)

"""Settings of where a run's weights come from before its first step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InitFromConfig:
    """Weights of step 0: each a released directory (bf16, fp16, fp32, INT4, FP8) or a workdir (trained or converted).

    What none of them gives starts fresh, so `language` and `vision` alone leave a new projector. A run that goes on
    from its own checkpoint does not look at them. Optimizer moments always start fresh.
    """

    path: str = ""  # the whole model
    vision: str = ""  # the vision tower, instead of that of `path`
    projector: str = ""  # the projector, likewise
    language: str = ""  # all the rest: embedding, decoder, output head

"""MuonClip and its schedule: `muonclip` (the gradient part), `qk_clip`, `router_bias`, `schedules`.

`param_groups` lets `muonclip` train a model that is not ours.
"""

from kimi_jax.nn.param import AdamW, Frozen, Muon
from kimi_jax.optim import newton_schulz, qk_clip, router_bias, schedules
from kimi_jax.optim.groups import param_groups
from kimi_jax.optim.muonclip import MuonClip, group_rms, muonclip, step_metrics

__all__ = [
    "AdamW", "Frozen", "Muon", "MuonClip", "group_rms", "muonclip", "newton_schulz", "param_groups", "qk_clip",
    "router_bias", "schedules", "step_metrics",
]  # fmt: skip

"""MuonClip and its schedule: `muonclip` (the gradient part), `qk_clip`, `router_bias`, `schedules`."""

from kimi_jax.optim import newton_schulz, qk_clip, router_bias, schedules
from kimi_jax.optim.muonclip import group_rms, muonclip, step_metrics

__all__ = ["group_rms", "muonclip", "newton_schulz", "qk_clip", "router_bias", "schedules", "step_metrics"]

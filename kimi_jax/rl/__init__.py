"""Reinforcement learning: `policy_loss`, the token-level objective of K2.5."""

from kimi_jax.rl.losses import policy_loss

__all__ = ["policy_loss"]

"""Reinforcement learning: objectives, trajectories, reward shaping, rewards and tasks. See docs/rl.md."""

from kimi_jax.rl.losses import policy_loss

__all__ = ["policy_loss"]

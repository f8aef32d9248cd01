"""The model as Flax Linen modules over pure functions: arrays in, (arrays, aux) out."""

from kimi_jax.nn.kimi import KimiK25
from kimi_jax.nn.mla import MLA
from kimi_jax.nn.moe import MoE
from kimi_jax.nn.moonvit import MoonViT3D
from kimi_jax.nn.projector import Projector

__all__ = ["MLA", "KimiK25", "MoE", "MoonViT3D", "Projector"]

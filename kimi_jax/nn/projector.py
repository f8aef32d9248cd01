"""MLP projector: four patches of a window become one token of the language model.

Source: docs/released_model.md section 2 item 9 (exact GELU).

W windows   Dv vision width   D language width
"""

from __future__ import annotations

import math

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from kimi_jax.config import ModelConfig
from kimi_jax.nn.layers import LayerNorm, Linear


class Projector(nn.Module):
    """LayerNorm of each patch, join the window's patches, Linear, GELU (erf), Linear."""

    config: ModelConfig

    def setup(self) -> None:
        """Parameters pre_norm, fc0, fc1."""
        c, v = self.config, self.config.vision
        merged = v.hidden_size * math.prod(v.merge_kernel_size)
        parts = ("projector",)
        settings = (c.initializer_range, c.dtype, c.param_dtype, True, None, parts)
        self.pre_norm = LayerNorm(v.projector_ln_eps, c.param_dtype, parts)
        self.fc0 = Linear((merged,), (merged,), ("merged",), ("vision_mlp",), *settings)
        self.fc1 = Linear((merged,), (c.hidden_size,), ("vision_mlp",), ("embed",), *settings)

    def __call__(self, x: Float[Array, "*b W 4 Dv"]) -> Float[Array, "*b W D"]:
        """Pooled windows to features, in the activations' dtype."""
        x = self.pre_norm(x)
        x = self.fc0(x.reshape(*x.shape[:-2], -1))
        return self.fc1(jax.nn.gelu(x, approximate=False))

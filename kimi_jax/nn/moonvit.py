"""MoonViT-3D: packed native-resolution patches of images and short video chunks to pooled windows.

Source: docs/released_model.md section 2, items 1 to 8. Bins hold several items; every patch carries
its item id, its (t, y, x) and its item's (t, h, w), so shapes are static whatever the grids. Patches lie window by
window (`kimi_jax.data.patches`), which makes the 2x2 merge a reshape and the mean over frames a segment mean.

V bins   P patches a bin   W = P/4 windows   C = 3*14*14 pixels of a patch   D width   H0, W0 table size
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Num

from kimi_jax.config import ModelConfig
from kimi_jax.kernels.attention.segment import segment_attention
from kimi_jax.nn.decoder import stacked
from kimi_jax.nn.layers import LayerNorm, Linear
from kimi_jax.nn.layout import Layout
from kimi_jax.nn.param import AdamW, declare
from kimi_jax.nn.rope import rotate_interleaved, vision_rotary
from kimi_jax.packed_batch import VisionBins

PARTS = ("vision",)
CUBIC = -0.75  # torch's bicubic; jax.image.resize has -0.5


def pixel_table() -> np.ndarray:
    """float32 [256]: normalised value of every byte, rounded exactly as the released image processor rounds."""
    unit = (np.arange(256) / 255.0).astype(np.float32)
    return (unit - np.float32(0.5)) * np.float32(2.0)


def normalise_pixels(patches: Num[Array, "*b C"]) -> Float[Array, "*b C"]:
    """Bytes to [-1, 1] by table (bit exact); floating-point patches count as already normalised."""
    if patches.dtype == jnp.uint8:
        return jnp.asarray(pixel_table())[patches]
    return patches


def cubic_weights(index: Int[Array, "*b"], size: Int[Array, "*b"], table_size: int) -> Float[Array, "*b n"]:
    """Weights of the table's rows for row `index` of a grid with `size` rows: [*b, table_size] float32.

    torch's bicubic: half-pixel centres, no antialias, four taps, the border row repeated. If size == table_size the
    weights are exactly one-hot.
    """
    source = (index.astype(jnp.float32) + 0.5) * (table_size / size.astype(jnp.float32)) - 0.5
    first = jnp.floor(source)
    t = (source - first)[..., None]
    distance = jnp.concatenate([t + 1.0, t, 1.0 - t, 2.0 - t], axis=-1)
    near = ((CUBIC + 2.0) * distance - (CUBIC + 3.0)) * distance * distance + 1.0
    far = ((CUBIC * distance - 5.0 * CUBIC) * distance + 8.0 * CUBIC) * distance - 4.0 * CUBIC
    taps = jnp.where(distance <= 1.0, near, far)
    rows = jnp.clip(first.astype(jnp.int32)[..., None] + jnp.arange(-1, 3), 0, table_size - 1)
    hits = rows[..., None] == jnp.arange(table_size)
    return (taps[..., None] * hits).sum(axis=-2)


def temporal_table(frames: int, width: int) -> np.ndarray:
    """float32 [frames, width]: sines, then cosines, of frame * 10000^(-i / (width/2)). Fixed, not a parameter."""
    omega = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.arange(frames)[:, None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def position_embedding(
    table: Float[Array, "H0 W0 D"], coords: Int[Array, "V P 3"], grids: Int[Array, "V P 3"], frames: int
) -> Float[Array, "V P D"]:
    """Float32: the table resized to each patch's own grid, plus the frame's temporal row where the item has t > 1."""
    high, wide, width = table.shape
    y = cubic_weights(coords[..., 1], grids[..., 1], high)
    x = cubic_weights(coords[..., 2], grids[..., 2], wide)
    weights = (y[..., :, None] * x[..., None, :]).reshape(*y.shape[:-1], high * wide)
    flat = table.reshape(high * wide, width).astype(jnp.float32)
    spatial = jnp.matmul(weights, flat, precision=lax.Precision.HIGHEST)
    temporal = jnp.asarray(temporal_table(frames, width))[coords[..., 0]]
    return spatial + jnp.where(grids[..., :1] > 1, temporal, 0.0)


def pool_frames(x: Float[Array, "V P D"], slots: Int[Array, "V W"]) -> Float[Array, "V W 4 D"]:
    """Mean over the frames of each window; the result stands in the slot of the first frame's window.

    Slots that no window names (later frames, padding) are zero; windows with a slot out of range (padding) vanish.
    """
    windows = x.reshape(x.shape[0], slots.shape[1], -1, x.shape[-1])

    def one(windows: Array, slots: Array) -> Array:
        total = jnp.zeros(windows.shape, jnp.float32).at[slots].add(windows.astype(jnp.float32), mode="drop")
        count = jnp.zeros(slots.shape, jnp.float32).at[slots].add(1.0, mode="drop")
        return total / jnp.maximum(count, 1.0)[:, None, None]

    return jax.vmap(one)(windows, slots).astype(x.dtype)


def on_bins(
    layout: Layout | None, function: Callable[..., Array], *args: Array, whole: tuple[Array, ...] = ()
) -> Array:
    """function(*whole, *args), [V, ...] like args. On each device its own bins of args meet all of `whole`.

    The compiler, left alone, gathers the bins of all devices to where a part of a parameter lies.
    """
    if layout is None:
        return function(*whole, *args)
    bins = PartitionSpec(layout.axes("bins") or None)
    specs = (PartitionSpec(),) * len(whole) + (bins,) * len(args)
    here = jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=bins, check_vma=False)
    return here(*whole, *args)


class PositionTable(nn.Module):
    """Owns the learned table [H0, W0, D]."""

    config: ModelConfig
    layout: Layout | None = None

    @nn.compact
    def __call__(self, coords: Int[Array, "V P 3"], grids: Int[Array, "V P 3"]) -> Float[Array, "V P D"]:
        """See `position_embedding`."""
        c, v = self.config, self.config.vision
        normal = nn.initializers.normal(c.initializer_range)
        init = declare(normal, ("grid", "grid", "vision_position"), AdamW(), PARTS)
        shape = (v.init_pos_emb_height, v.init_pos_emb_width, v.hidden_size)
        table = self.param("table", init, shape, c.param_dtype)
        embed = functools.partial(position_embedding, frames=v.init_pos_emb_time)
        return on_bins(self.layout, embed, coords, grids, whole=(table,))


class VisionBlock(nn.Module):
    """Pre-norm block: full attention inside an item, then a GELU (tanh) MLP."""

    config: ModelConfig
    layout: Layout | None = None

    def setup(self) -> None:
        """Parameters norm0, qkv, o, norm1, fc0, fc1."""
        c, v = self.config, self.config.vision
        settings = (c.initializer_range, c.dtype, c.param_dtype, True, None, PARTS)
        heads, width = v.num_attention_heads, v.hidden_size
        head_axes = ("vision_heads", "vision_head_dim")
        each = (heads, width // heads)
        self.norm0 = LayerNorm(v.layer_norm_eps, c.param_dtype, PARTS)
        self.qkv = Linear((width,), (3, *each), ("vision_embed",), ("qkv", *head_axes), *settings)
        self.o = Linear(each, (width,), head_axes, ("vision_embed",), *settings)
        self.norm1 = LayerNorm(v.layer_norm_eps, c.param_dtype, PARTS)
        self.fc0 = Linear((width,), (v.intermediate_size,), ("vision_embed",), ("vision_mlp",), *settings)
        self.fc1 = Linear((v.intermediate_size,), (width,), ("vision_mlp",), ("vision_embed",), *settings)

    def __call__(
        self, x: Float[Array, "V P D"], cos: Float[Array, "V P p"], sin: Float[Array, "V P p"], ids: Int[Array, "V P"]
    ) -> tuple[Float[Array, "V P D"], None]:
        """The new x. ids: 0 padding, 1.. items of the bin."""
        q, k, v = jnp.moveaxis(self.qkv(self.norm0(x)), 2, 0)
        q, k = rotate_interleaved(q, cos, sin), rotate_interleaved(k, cos, sin)

        def attention(*args: Array) -> Array:
            return segment_attention(*args, causal=False, scale=q.shape[-1] ** -0.5)[0]

        out = on_bins(self.layout, attention, q, k, v, ids)
        x = x + self.o(out)
        x = x + self.fc1(jax.nn.gelu(self.fc0(self.norm1(x)), approximate=True))
        return (x if self.layout is None else self.layout.constrain(x, "bins", None, None)), None


class MoonViT3D(nn.Module):
    """The vision tower."""

    config: ModelConfig
    layout: Layout | None = None

    def setup(self) -> None:
        """Parameters patch_embed, pos_emb, blocks (stacked), final_norm."""
        c, v = self.config, self.config.vision
        self.patch_embed = Linear(
            (3 * v.patch_size**2,), (v.hidden_size,), ("pixels",), ("vision_embed",),
            c.initializer_range, c.dtype, c.param_dtype, True, None, PARTS,
        )  # fmt: skip
        self.pos_emb = PositionTable(c, self.layout)
        remat = jax.checkpoint_policies.nothing_saveable if c.remat else None
        self.blocks = stacked(VisionBlock, v.num_hidden_layers, 3, scan=c.scan_layers, remat=remat)(c, self.layout)
        self.final_norm = LayerNorm(v.layer_norm_eps, c.param_dtype, PARTS)

    def __call__(self, bins: VisionBins) -> Float[Array, "V W 4 D"]:
        """Pooled windows of one bin class, each in its feature slot. Slots without an item hold zeros."""
        v = self.config.vision
        x = self.patch_embed(normalise_pixels(bins.patches))
        x = x + self.pos_emb(bins.coords, bins.grids).astype(x.dtype)
        if self.layout is not None:
            x = self.layout.constrain(x, "bins", None, None)
        cos, sin = vision_rotary(bins.coords, v.hidden_size // v.num_attention_heads, v.rope_theta)
        x, _ = self.blocks(x, cos, sin, bins.segment_ids)
        return pool_frames(self.final_norm(x), bins.feature_slots)

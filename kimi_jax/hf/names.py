"""Released tensor names and our tree, in one table.

Source: docs/released_model.md section 4 (names and shapes of moonshotai/Kimi-K2.5), section 1.3 (relatives: Kimi-VL
names its projector otherwise, text-only models have no prefix, `q_lora_rank: null` has `q_proj`).

torch linears are [out, in], ours [*inputs, *outputs]: heads are axes of their own. Layers are stacked on axis 0 (dense
and MoE layers apart), experts on axis 1.

D width   H heads   F inner width   E experts   P patch size
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kimi_jax.config import ConfigError, ModelConfig, nearest
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import leaf_name, unbox

# How a released tensor becomes ours.
SAME = "same"  # as it is
FLAT = "flat"  # one released axis, several of ours
LINEAR = "linear"  # [out, in] -> [in, *out]
JOIN = "join"  # [out, in] -> [heads, head_dim, out]: two axes of ours form the input
CONV = "conv"  # [out, 3, P, P] -> [3*P*P, out]

INPUT_AXES = {SAME: 0, FLAT: 0, LINEAR: 1, JOIN: 2, CONV: 1}

# {layer}: number over all layers; {stack}: dense_layers or moe_layers, whichever holds it; {expert}, {block}: numbers.
TEXT = (
    ("lm_head.weight", "lm_head.kernel", LINEAR),
    ("model.embed_tokens.weight", "embed.embedding", SAME),
    ("model.norm.weight", "final_norm.scale", SAME),
    ("model.layers.{layer}.input_layernorm.weight", "{stack}.input_norm.scale", SAME),
    ("model.layers.{layer}.post_attention_layernorm.weight", "{stack}.post_attention_norm.scale", SAME),
    ("model.layers.{layer}.self_attn.q_proj.weight", "{stack}.attention.q.kernel", LINEAR),
    ("model.layers.{layer}.self_attn.q_a_proj.weight", "{stack}.attention.q_a.kernel", LINEAR),
    ("model.layers.{layer}.self_attn.q_a_layernorm.weight", "{stack}.attention.q_a_norm.scale", SAME),
    ("model.layers.{layer}.self_attn.q_b_proj.weight", "{stack}.attention.q_b.kernel", LINEAR),
    ("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight", "{stack}.attention.kv_a.kernel", LINEAR),
    ("model.layers.{layer}.self_attn.kv_a_layernorm.weight", "{stack}.attention.kv_a_norm.scale", SAME),
    ("model.layers.{layer}.self_attn.kv_b_proj.weight", "{stack}.attention.kv_b.kernel", LINEAR),
    ("model.layers.{layer}.self_attn.o_proj.weight", "{stack}.attention.o.kernel", JOIN),
    ("model.layers.{layer}.mlp.gate_proj.weight", "dense_layers.mlp.gate.kernel", LINEAR),
    ("model.layers.{layer}.mlp.up_proj.weight", "dense_layers.mlp.up.kernel", LINEAR),
    ("model.layers.{layer}.mlp.down_proj.weight", "dense_layers.mlp.down.kernel", LINEAR),
    ("model.layers.{layer}.mlp.gate.weight", "moe_layers.mlp.router.kernel", LINEAR),
    ("model.layers.{layer}.mlp.gate.e_score_correction_bias", "moe_layers.mlp.router.bias", SAME),
    ("model.layers.{layer}.mlp.shared_experts.gate_proj.weight", "moe_layers.mlp.shared.gate.kernel", LINEAR),
    ("model.layers.{layer}.mlp.shared_experts.up_proj.weight", "moe_layers.mlp.shared.up.kernel", LINEAR),
    ("model.layers.{layer}.mlp.shared_experts.down_proj.weight", "moe_layers.mlp.shared.down.kernel", LINEAR),
    ("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "moe_layers.mlp.experts.gate", LINEAR),
    ("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "moe_layers.mlp.experts.up", LINEAR),
    ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", "moe_layers.mlp.experts.down", LINEAR),
)
VISION = (
    ("patch_embed.proj.weight", "vision.patch_embed.kernel", CONV),
    ("patch_embed.proj.bias", "vision.patch_embed.bias", SAME),
    ("patch_embed.pos_emb.weight", "vision.pos_emb.table", SAME),
    ("encoder.blocks.{block}.norm0.weight", "vision.blocks.norm0.scale", SAME),
    ("encoder.blocks.{block}.norm0.bias", "vision.blocks.norm0.bias", SAME),
    ("encoder.blocks.{block}.norm1.weight", "vision.blocks.norm1.scale", SAME),
    ("encoder.blocks.{block}.norm1.bias", "vision.blocks.norm1.bias", SAME),
    ("encoder.blocks.{block}.wqkv.weight", "vision.blocks.qkv.kernel", LINEAR),
    ("encoder.blocks.{block}.wqkv.bias", "vision.blocks.qkv.bias", FLAT),
    ("encoder.blocks.{block}.wo.weight", "vision.blocks.o.kernel", JOIN),
    ("encoder.blocks.{block}.wo.bias", "vision.blocks.o.bias", SAME),
    ("encoder.blocks.{block}.mlp.fc0.weight", "vision.blocks.fc0.kernel", LINEAR),
    ("encoder.blocks.{block}.mlp.fc0.bias", "vision.blocks.fc0.bias", SAME),
    ("encoder.blocks.{block}.mlp.fc1.weight", "vision.blocks.fc1.kernel", LINEAR),
    ("encoder.blocks.{block}.mlp.fc1.bias", "vision.blocks.fc1.bias", SAME),
    ("encoder.final_layernorm.weight", "vision.final_norm.scale", SAME),
    ("encoder.final_layernorm.bias", "vision.final_norm.bias", SAME),
)
PROJECTOR = (
    ("pre_norm.weight", "projector.pre_norm.scale", SAME),
    ("pre_norm.bias", "projector.pre_norm.bias", SAME),
    ("{first}.weight", "projector.fc0.kernel", LINEAR),
    ("{first}.bias", "projector.fc0.bias", SAME),
    ("{second}.weight", "projector.fc1.kernel", LINEAR),
    ("{second}.bias", "projector.fc1.bias", SAME),
)


@dataclass(frozen=True)
class Family:
    """What a `model_type` calls its parts. An empty `projector` means a text-only model."""

    text: str = ""
    projector: str = ""
    first: str = ""
    second: str = ""


FAMILIES = {
    "kimi_k25": Family("language_model.", "mm_projector.", "proj.0", "proj.2"),
    "kimi_vl": Family("language_model.", "multi_modal_projector.", "linear_1", "linear_2"),
    "kimi_k2": Family(),
    "deepseek_v3": Family(),
}
# Buffers that some checkpoints carry and no model needs (Moonlight has one for each layer): docs/released_model.md
# section 3 computes them from the settings. They are kept as they are for the way back.
BUFFERS = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Tensor:
    """One released tensor and where it goes: `leaf`[index] of our tree.

    shape: released shape; inner: shape of leaf[index]; inputs: how many leading axes of `inner` form the input of a
    matrix that torch holds transposed (0: not transposed).
    """

    name: str
    shape: tuple[int, ...]
    leaf: str
    index: tuple[int, ...]
    inner: tuple[int, ...]
    inputs: int

    @property
    def rows(self) -> int:
        """Rows of the released tensor seen as a matrix."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Its columns: the input width of a linear map."""
        return math.prod(self.inner) // self.rows

    @property
    def step(self) -> int:
        """Rows that belong to one position of our first output axis; pieces are split at multiples of it."""
        return self.rows // self.inner[self.inputs]

    def place(self, first: int, last: int) -> tuple[Any, ...]:
        """Where released rows first..last-1 stand in the leaf."""
        return (*self.index, *(slice(None),) * self.inputs, slice(first // self.step, last // self.step))

    def to_ours(self, rows: np.ndarray) -> np.ndarray:
        """Released rows [n, columns] in our layout."""
        if not self.inputs:
            return rows.reshape(-1, *self.inner[1:])
        inner = self.inner
        return transpose(rows).reshape(*inner[: self.inputs], -1, *inner[self.inputs + 1 :])

    def to_released(self, ours: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`: [n, columns]."""
        if not self.inputs:
            return ours.reshape(-1, self.columns)
        return transpose(ours.reshape(self.columns, -1))


def transpose(matrix: np.ndarray, tile: int = 128) -> np.ndarray:
    """A contiguous transpose; in strips, because NumPy's own walks the cache eight times slower."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), tile):
        out[:, start : start + tile] = matrix[start : start + tile].T
    return out


def family(model_type: str) -> Family:
    """The names of a released `model_type`. Raises ConfigError for one that is not here."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported{nearest(model_type, FAMILIES)}; "
            f"there are: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of our tree by its path, `moe_layers.mlp.experts.gate`. Allocates nothing.

    Experts that are held as INT4 count as the one leaf that they are as floats.
    """
    moe = dataclasses.replace(config.moe, int4_group_size=None) if config.moe else None
    return _leaf_shapes(dataclasses.replace(config, moe=moe, dtype="float32", param_dtype="float32", remat=False))


@functools.lru_cache(maxsize=16)  # tracing the model takes a second
def _leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(unbox(abstract_params(config)))
    return {leaf_name(path): leaf.shape for path, leaf in leaves}


def tensors(config: ModelConfig, model_type: str) -> list[Tensor]:
    """Every tensor that a released checkpoint of this model must hold, in the order of the table.

    Raises ConfigError if the family has no vision part and the model has, or the other way round.
    """
    names = family(model_type)
    if bool(names.projector) != bool(config.vision):
        have = "a vision tower" if config.vision else "no vision tower"
        raise ConfigError(f"a model with {have} cannot be written as model_type {model_type!r}")
    shapes = leaf_shapes(config)
    rows = [(names.text + released, path, how) for released, path, how in TEXT]
    if config.vision:
        rows += [("vision_tower." + released, path, how) for released, path, how in VISION]
        rows += [
            (names.projector + released.format(first=names.first, second=names.second), path, how)
            for released, path, how in PROJECTOR
        ]
    found = [tensor for row in rows for tensor in _expand(row, shapes, config)]
    forgotten = set(shapes) - {tensor.leaf for tensor in found}
    if forgotten:
        raise KeyError(f"no released name for {sorted(forgotten)}; add them to kimi_jax.hf.names")
    return found


def _expand(row: tuple[str, str, str], shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> Iterator[Tensor]:
    """The tensors of one row of the table: all layers, blocks and experts; none if the model has no such leaf."""
    released, path, how = row
    for stack in ("dense_layers", "moe_layers") if "{stack}" in path else ("",):
        leaf = path.format(stack=stack)
        if leaf not in shapes:
            continue
        first = config.num_dense_layers if leaf.startswith("moe_layers") else 0
        axes = [key for key in ("layer", "block", "expert") if "{" + key + "}" in released]
        counts, inner = shapes[leaf][: len(axes)], shapes[leaf][len(axes) :]
        for index in np.ndindex(counts):
            numbers = dict(zip(axes, index, strict=True))
            if "layer" in numbers:
                numbers["layer"] += first
            shape = _released_shape(how, inner, config)
            yield Tensor(released.format(**numbers), shape, leaf, tuple(index), inner, INPUT_AXES[how])


def _released_shape(how: str, inner: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    if how == SAME:
        return inner
    if how == FLAT:
        return (math.prod(inner),)
    if how == CONV:
        assert config.vision  # only vision rows are convolutions
        return (inner[1], 3, config.vision.patch_size, config.vision.patch_size)
    inputs = INPUT_AXES[how]
    return (math.prod(inner[inputs:]), math.prod(inner[:inputs]))

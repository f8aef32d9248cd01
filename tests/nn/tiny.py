"""A tiny configuration with every mechanism on, and a batch with ten distinct grids that it can take."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.config import ModelConfig, MoEConfig, VisionConfig, YarnConfig
from kimi_jax.nn.kimi import KimiK25, abstract_params
from kimi_jax.nn.param import unbox
from kimi_jax.packed_batch import PackedBatch
from tests.nn.packed import Grid, pack, pixels

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=32), max_position_embeddings=128,
    initializer_range=0.1,
    moe=MoEConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, routed_scaling_factor=1.5),
    vision=VisionConfig(patch_size=4, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                        init_pos_emb_height=6, init_pos_emb_width=6),
    media_placeholder_token_id=9, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="float32",
)  # fmt: skip
BIN = 64  # patches a bin
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time; the programs are tiny
# images, non-square ones, chunks of 1 to 4 frames, the table's own size (6, 6), one that fills a bin
GRIDS: list[Grid] = [
    (1, 8, 8), (1, 2, 4), (4, 2, 2), (1, 6, 6), (2, 4, 2), (3, 2, 4), (1, 2, 10), (1, 4, 2), (1, 2, 2), (4, 2, 6),
]  # fmt: skip


def replace(**changes: Any) -> ModelConfig:
    """CONFIG with other values."""
    return dataclasses.replace(CONFIG, **changes)


def params(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    """Plain random parameters, drawn by NumPy (nothing to compile); scales near 1, biases not 0, so that all matter."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.1, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, unbox(abstract_params(config)))


def documents(seed: int = 0) -> list[list[list[Any]]]:
    """rows[b] = documents = spans: 2 rows, 8 documents, all GRIDS, several images in a document, text-only ones too."""
    rng = np.random.default_rng(seed)

    def text(n: int) -> np.ndarray:
        return rng.integers(10, CONFIG.vocab_size, n)

    def media(number: int) -> tuple[np.ndarray, Grid]:
        return pixels(rng, GRIDS[number], CONFIG), GRIDS[number]

    return [
        [[text(3), media(0), text(2), media(1), text(3)], [text(9)], [text(1), media(2), media(3), text(4)], [text(2)]],
        [[text(2), media(4), text(1), media(5), text(2)], [media(6), text(2)], [text(5)],
         [media(7), text(3), media(8), media(9), text(5)]],
    ]  # fmt: skip


def batch(rows: list | None = None, length: int = 64, bins: int = 4, groups: int = 1) -> PackedBatch:
    """The packed batch of `rows` (default: `documents()`), on device."""
    return jax.tree.map(jnp.asarray, pack(CONFIG, rows or documents(), length, BIN, bins, groups))


def _loss(config: ModelConfig) -> Any:
    def run(params: dict, batch: PackedBatch, balance: float = 0.1) -> Any:
        nll, aux = KimiK25(config).apply({"params": params}, batch, method="token_nll")
        return (nll * batch.loss_weights).sum() + balance * aux.balance_loss, (nll, aux)

    return run


@functools.cache
def loss(config: ModelConfig = CONFIG) -> Any:
    """Compiled (params, batch, balance weight) -> (sum of weighted nll + weight * balance loss, (nll, aux))."""
    return jax.jit(_loss(config), compiler_options=QUICK)


@functools.cache
def loss_and_grads(config: ModelConfig = CONFIG) -> Any:
    """The same with gradients of the parameters: ((loss, (nll, aux)), grads)."""
    return jax.jit(jax.value_and_grad(_loss(config), has_aux=True), compiler_options=QUICK)


def assert_trees_close(got: Any, want: Any, tolerance: float) -> None:
    """Every leaf: max |difference| <= tolerance * max(|want|) of that leaf (and an absolute floor of 1e-7)."""
    flat, _ = jax.tree_util.tree_flatten_with_path(want)
    for (path, a), b in zip(flat, jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        error, size = np.abs(a - b).max(initial=0), np.abs(a).max(initial=0)
        assert error <= tolerance * size + 1e-7, f"{jax.tree_util.keystr(path)}: {error:.2e} of {size:.2e}"

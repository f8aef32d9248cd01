"""Kimi K2.5: vision tower, projector and decoder joined by early fusion; initialisation, counts, assembly of parts.

Source: docs/released_model.md section 3 (merge: features replace the embeddings of media pads; untied head, float32
logits), section 1.5 (sizes); docs/architecture.md section 3 (bins lie beside the rows of their pack).

G packs   B = G*R rows   S tokens   D width   V vocabulary   F features a pack   Lmoe MoE layers   k experts a token
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from kimi_jax.config import ModelConfig
from kimi_jax.kernels.vocab.cross_entropy import chunked_cross_entropy
from kimi_jax.kernels.vocab.vocab_parallel import look_up, sharded_cross_entropy
from kimi_jax.nn.decoder import Aux, gather_aux, layer_stack
from kimi_jax.nn.layers import RMSNorm, precision
from kimi_jax.nn.layout import Layout
from kimi_jax.nn.moonvit import MoonViT3D
from kimi_jax.nn.param import AdamW, declare, unbox
from kimi_jax.nn.projector import Projector
from kimi_jax.nn.vision_stage import fuse, join_classes, shard_bins
from kimi_jax.packed_batch import PackedBatch, VisionBins, empty_bins, padding

jax.tree_util.register_dataclass(PackedBatch)


class Embedding(nn.Module):
    """Token embeddings [V, D]."""

    config: ModelConfig
    layout: Layout | None = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b D"]:
        """Rows of the table, in the activations' dtype."""
        c = self.config
        normal, parts = nn.initializers.normal(c.initializer_range), ("language", "embedding")
        init = declare(normal, ("vocab", "embed"), AdamW(), parts)
        table = self.param("embedding", init, (c.vocab_size, c.hidden_size), c.param_dtype)
        if self.layout is None:
            return table[tokens].astype(c.dtype)
        return look_up(self.layout.vocabulary(("vocab", "embed"), table.shape), c.dtype, table, tokens)


class Head(nn.Module):
    """The untied output matrix [D, V]."""

    config: ModelConfig
    layout: Layout | None = None

    def setup(self) -> None:
        """Parameter kernel."""
        c = self.config
        normal, parts = nn.initializers.normal(c.initializer_range), ("language", "lm_head")
        init = declare(normal, ("embed", "vocab"), AdamW(), parts)
        self.kernel = self.param("kernel", init, (c.hidden_size, c.vocab_size), c.param_dtype)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 logits."""
        kernel = self.kernel.astype(x.dtype)
        return jnp.matmul(x, kernel, precision=precision(x.dtype), preferred_element_type=jnp.float32)

    def token_nll(
        self, x: Float[Array, "B S D"], targets: Int[Array, "B S"], temperature: float = 1.0
    ) -> Float[Array, "B S"]:
        """-log softmax(logits / temperature)[target], float32, without holding the logits."""
        if self.layout is not None:
            sharding = self.layout.vocabulary(("embed", "vocab"), self.kernel.shape)
            return sharded_cross_entropy(sharding, x, self.kernel, targets, temperature)
        flat = x.reshape(-1, x.shape[-1])
        nll = chunked_cross_entropy(flat, self.kernel, targets.reshape(-1), temperature=temperature)
        return nll.reshape(targets.shape)


class KimiK25(nn.Module):
    """The whole model. Text-only batches (`vision == ()`) use the same parameters.

    layout: how it lies over a mesh; None on one device, or where the compiler shall decide.
    """

    config: ModelConfig
    layout: Layout | None = None

    def setup(self) -> None:
        """Parameters embed, dense_layers, moe_layers, final_norm, lm_head, vision, projector (those the config has)."""
        c = self.config
        self.embed = Embedding(c, self.layout)
        if c.num_dense_layers:
            self.dense_layers = layer_stack(c, routed=False, layout=self.layout)
        if c.num_moe_layers:
            self.moe_layers = layer_stack(c, routed=True, layout=self.layout)
        self.final_norm = RMSNorm(c.rms_norm_eps, c.param_dtype, ("language", "norm"))
        self.lm_head = Head(c, self.layout)
        if c.vision:
            self.vision = MoonViT3D(c, self.layout)
            self.projector = Projector(c)

    def vision_features(self, vision_bins: tuple[VisionBins, ...]) -> Float[Array, "F D"]:
        """Features of the bins of one pack: for each class its bins, for each bin its slots."""
        return join_classes(self.encode(vision_bins), 1)[0]

    def encode(self, vision_bins: tuple[VisionBins, ...]) -> tuple[Float[Array, "_ _ D"], ...]:
        """Features of each bin class. They are rematerialised in the backward pass."""
        bins = jax.tree.map(jnp.asarray, vision_bins)
        if self.layout is not None:
            bins = tuple(shard_bins(self.layout, each) for each in bins)
        tower = nn.remat(
            lambda model, each: model.projector(model.vision(each)), policy=jax.checkpoint_policies.nothing_saveable
        )
        return tuple(tower(self, each) for each in bins)

    def hidden(self, batch: PackedBatch) -> tuple[Float[Array, "B S D"], Aux]:
        """Final-normed hidden states of a packed batch.

        Reads tokens, positions, segment_ids, routed_experts, and, if there are vision bins, feature_index and vision.
        Raises ValueError for routed experts of another shape or dtype than the model has.
        """
        tokens, positions, segment_ids = map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids))
        x = self.embed(tokens)
        if batch.vision:
            features = self.encode(batch.vision)
            bins = tuple(len(each.segment_ids) for each in batch.vision)
            x = fuse(self.layout, x, features, jnp.asarray(batch.feature_index), bins, batch.num_packs)
        if self.layout is not None:
            x = self.layout.constrain(x, "batch", "sequence", None)
        dense = routed = None
        if self.config.num_dense_layers:
            x, dense = self.dense_layers(x, positions, segment_ids, None)
        if self.config.num_moe_layers:
            x, routed = self.moe_layers(x, positions, segment_ids, self._forced_experts(batch))
        return self.final_norm(x), gather_aux(dense, routed)

    def _forced_experts(self, batch: PackedBatch) -> Int[Array, "Lmoe B S k"] | None:
        """The batch's routed experts as the scan over layers takes them, sharded as the tokens; None if it has none."""
        if batch.routed_experts is None:
            return None
        experts, (rows, length) = jnp.asarray(batch.routed_experts), batch.tokens.shape
        wanted = (rows, self.config.num_moe_layers, length, self.config.moe.num_experts_per_tok)
        if experts.shape != wanted or experts.dtype != jnp.int32:
            raise ValueError(
                f"routed_experts of a batch must be int32 {wanted} (rows, MoE layers, tokens, experts of a token), not "
                f"{experts.dtype} {experts.shape}"
            )
        experts = experts.swapaxes(0, 1)
        return experts if self.layout is None else self.layout.constrain(experts, None, "batch", "sequence", None)

    def __call__(self, batch: PackedBatch) -> tuple[Float[Array, "B S V"], Aux]:
        """Float32 logits of every position."""
        x, aux = self.hidden(batch)
        return self.lm_head(x), aux

    def token_nll(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Float[Array, "B S"], Aux]:
        """-log p(target) of every position under softmax(logits / temperature), float32, without holding the logits.

        Also reads targets.
        """
        x, aux = self.hidden(batch)
        targets = jnp.asarray(batch.targets)
        return self.lm_head.token_nll(x, targets, temperature), aux


# ------------------------------------------------------------------------------------------------------- initialisation


def _tiny_batch(config: ModelConfig) -> PackedBatch:
    """One row of two tokens and, with vision, one bin of one 2x2 image: enough to create every parameter."""
    bins = (empty_bins(1, 4, 3 * config.vision.patch_size**2),) if config.vision else ()
    return padding(1, 2, 1, config.pad_token_id, bins)


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, boxed with their metadata (`nn.param.unbox` / `metadata`). Works under jit and eval_shape."""
    return KimiK25(config).init(key, _tiny_batch(config))["params"]


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """The boxed tree with shapes and dtypes in place of arrays; allocates nothing."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def count_params(config: ModelConfig) -> dict[str, int]:
    """Exact parameter counts from shapes alone.

    Keys: text (language model with embedding and head), text_active (of those, used by one token), attention_per_layer,
    vision, projector, total.
    """
    tree = unbox(abstract_params(config))

    def size(part: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))

    parts = {name: size(tree.get(name, {})) for name in ("vision", "projector")}
    total = size(tree)
    text = total - sum(parts.values())
    layers = tree.get("dense_layers") or tree["moe_layers"]
    attention = size(layers["attention"]) // layers["input_norm"]["scale"].shape[0]
    idle = 0
    if config.num_moe_layers:
        moe = config.moe
        experts = size(tree["moe_layers"]["mlp"]["experts"])
        idle = experts * (moe.n_routed_experts - moe.num_experts_per_tok) // moe.n_routed_experts
    return {"text": text, "text_active": text - idle, "attention_per_layer": attention, **parts, "total": total}


# ---------------------------------------------------------------------------------------------------- assembly of parts


def merge_params(
    base: dict[str, Any],
    *,
    vision: dict[str, Any] | None = None,
    projector: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`base` with parts taken from other checkpoints: the vision tower, the projector, everything else.

    Each argument is a plain parameter tree that holds (at least) that part. Values take the dtype of `base`.
    Raises ValueError that lists every missing, unexpected or differently shaped parameter.
    """
    towers = ("vision", "projector")
    wanted: dict[str, Any] = {}
    for source, keys in (
        (vision, ("vision",)), (projector, ("projector",)), (language, [k for k in base if k not in towers]),
    ):  # fmt: skip
        if source is not None:
            wanted |= {key: source.get(key, {}) for key in keys}
            if source is language:
                wanted |= {key: source[key] for key in source if key not in base and key not in towers}
    have = _leaves({key: base.get(key, {}) for key in wanted})
    new = _leaves(wanted)
    wrong = [f"missing: {name}" for name in have if name not in new]
    wrong += [f"unexpected: {name}" for name in new if name not in have]
    wrong += [
        f"shape of {name}: {new[name].shape}, needs {have[name].shape}"
        for name in have if name in new and new[name].shape != have[name].shape
    ]  # fmt: skip
    if wrong:
        raise ValueError("these parts do not fit together:\n  " + "\n  ".join(sorted(wrong)))
    cast = {key: jax.tree.map(lambda a, b: b.astype(a.dtype), base[key], wanted[key]) for key in wanted}
    return {**base, **cast}


def _leaves(tree: dict[str, Any]) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}

"""A model that is loaded to be asked: `kimi.load(DIR)` and what it can do.

Source: docs/architecture.md section 4 (the public surface). Requests of any size are padded to a few shapes, so that
each shape is compiled once: four lengths an octave (at most a quarter is padding), images in bins of their own by
rounded size.

B rows   S tokens   V vocabulary   D width   N patches   P patches of a bin   p patch size   F features
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from kimi_jax import hosts, sharding
from kimi_jax.config import ModelConfig
from kimi_jax.data.conversation import Message
from kimi_jax.data.example import MediaItem
from kimi_jax.data.patches import num_features
from kimi_jax.data.reply import Reply
from kimi_jax.data.routing import FREE, RoutingShape
from kimi_jax.data.tokenizer import Tokenizer, load_tokenizer
from kimi_jax.infer.media import VisionEncoder, bucket, fill_bins
from kimi_jax.infer.request import Sampling
from kimi_jax.nn.kimi import KimiK25
from kimi_jax.packed_batch import padding
from kimi_jax.train.weights import load_weights

if TYPE_CHECKING:
    from kimi_jax.infer.engine import Engine

MIN_TOKENS, LEAST_CACHE = 16, 1024


def load(
    path: str | os.PathLike[str],
    dtype: str = "float32",
    experts: str = "float",
    mesh: Mesh | None = None,
    verify: bool = True,
) -> Model:
    """A released-format directory (config.json and safetensors: bf16, fp16, fp32, INT4 or FP8), or a workdir of ours
    (trained, or made by `python -m kimi_jax.convert from-hf`; its newest checkpoint; adapters come merged into their
    base, as that was loaded to train them).

    dtype: of the weights and the activations. experts: "float" (in `dtype`), or "int4": a released directory's routed
    experts stay INT4 in memory, 4.5 bits a weight, and the numbers are the same. mesh: of `kimi_jax.sharding`; each of
    its devices gets its own part of every weight and never more. Without, everything is on one device. verify: compare
    the files of a workdir with their checksums first.
    Raises FileNotFoundError if `path` is neither, ConfigError for a model that is not supported, an unknown dtype, or
    "int4" for experts that are not, hf.files.CheckpointError that lists every tensor that does not fit, or
    every damaged file of a workdir.
    """
    return Model(*load_weights(path, dtype, experts, mesh, verify), mesh)


def load_alike(path: str, dtype: str, experts: str, sharded: bool) -> Model:
    """`load` with the tokenizer, on all hosts or on none. sharded: over all devices; several hosts always are.

    Raises ValueError for what cannot be loaded on one of them, naming the hosts where there are several.
    """
    problem, model = "", None
    try:
        model = load(path, dtype, experts, sharding.serving_mesh() if sharded or jax.process_count() > 1 else None)
        _ = model.tokenizer
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = hosts.gather(problem)
    if any(problems):
        several = len(problems) > 1
        raise ValueError("; ".join(f"host {n}: {each}" if several else each for n, each in enumerate(problems) if each))
    assert model is not None
    return model


class Model:
    """Configuration and weights, with the questions one asks most. `params` is the plain tree of `nn.kimi`.

    tokenizer_path: where `load_tokenizer` finds the tokenizer, for what takes or gives text. mesh: over which the
    weights lie, if they do.
    """

    def __init__(self, config: ModelConfig, params: dict[str, Any], tokenizer_path: str = "", mesh: Mesh | None = None):
        self.config = config
        self.params = params
        self.mesh = mesh
        self.tokenizer_path = tokenizer_path
        self._engine: tuple[Any, Engine] | None = None  # and the params it was made for

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that lies beside the weights. Raises FileNotFoundError if there is none; it can be set instead."""
        return load_tokenizer(self.tokenizer_path)

    def generate(
        self, messages: Sequence[Message], *, max_new_tokens: int = 256, temperature: float = 1.0, top_p: float = 0.95,
        seed: int | None = None, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool = True,
        stop: Sequence[str] = (), open_url: Callable[[str], bytes] | None = None,
    ) -> Reply:  # fmt: skip
        """The answer to a conversation, taken apart (`.content`, `.reasoning`, `.tool_calls`, `.message()`).

        messages: as in `data.conversation`, with images and videos in their parts (`data.media_part`). temperature 0
        is greedy; the defaults are the release's for thinking (0.6 without). seed: the same one gives the same answer.
        stop: strings that end the answer and are not part of it. open_url: opens URLs that are not data URIs.
        Raises ValueError, BadRecord for what cannot be answered, FileNotFoundError without a tokenizer.

        One conversation at a time; `kimi_jax.infer.engine.Engine` runs many.
        """
        from kimi_jax.infer import generate  # here, as the engine is not needed for logits
        from kimi_jax.infer.engine import Engine

        sampling = Sampling(temperature, top_p, seed, max_new_tokens)
        chat = generate.Chat(messages, tools, thinking, open_url=open_url)
        request = generate.chat_request(chat, self.tokenizer, self.config, sampling)
        length = bucket(len(request.token_ids) + max_new_tokens, LEAST_CACHE)
        made_for, engine = self._engine or (None, None)
        if engine is None or made_for is not self.params or engine.max_sequence_length < length:
            engine = Engine(self.config, self.params, slots=1, max_sequence_length=length, mesh=self.mesh)
            self._engine = self.params, engine
        return generate.answer(engine, request, self.tokenizer, chat.reasons, stop)

    def logits(
        self, input_ids: Any, pixel_values: Any = None, grid_thws: Any = None, *, routed_experts: Any = None
    ) -> np.ndarray:
        """Next-token logits, float32 [B, S, V].

        input_ids: ints [B, S], each image or video chunk as as many media pads as it has features; pixel_values:
        [N, 3, p, p], floats in [-1, 1] or uint8 as in the image, all items one after the other in order of appearance,
        patches in raster order;
        grid_thws: [items, 3]. routed_experts: ints [B, MoE layers, S, k] force the experts of every token; -1 in
        place of all k lets the router choose.
        Raises ValueError for shapes, ids or counts that do not fit together.
        """
        tokens = self._check_tokens(input_ids)
        rows, length = tokens.shape
        padded = (bucket(rows, 1), bucket(length, MIN_TOKENS))
        items = self._check_media(pixel_values, grid_thws)
        pads = tokens == self.config.media_placeholder_token_id if self.config.vision else np.zeros_like(tokens, bool)
        wanted = sum(num_features(item.grid) for item in items)
        if pads.sum() != wanted:
            raise ValueError(
                f"{pads.sum()} media pads (id {self.config.media_placeholder_token_id}) in input_ids, but the items "
                f"have {wanted} features: each needs h*w/4 pads"
            )
        bins, places = fill_bins(items)
        batch = padding(*padded, padded[0], self.config.pad_token_id, bins)
        batch.tokens[:rows, :length] = tokens
        batch.positions[:] = np.arange(padded[1])
        batch.segment_ids[:rows, :length] = 1
        batch.feature_index[:rows, :length][pads] = np.concatenate([np.zeros(0, np.int32), *map(_numbers, places)])
        if routed_experts is not None:
            experts = self._check_routed_experts(np.asarray(routed_experts), tokens.shape, padded)
            batch = dataclasses.replace(batch, routed_experts=experts)
        return np.asarray(self._logits(self.params, batch)[:rows, :length])

    def vision_features(self, pixel_values: Any, grid_thws: Any) -> np.ndarray:
        """What the language model sees of images and video chunks, float32 [sum(h*w/4), D], item after item.

        Arguments as in `logits`. Raises ValueError for shapes that do not fit together or a text-only model.
        """
        items = self._check_media(pixel_values, grid_thws)
        features = VisionEncoder(self.config, self.params, self.mesh).features(items) if items else []
        return np.concatenate([np.zeros((0, self.config.hidden_size), np.float32), *features])

    @functools.cached_property
    def _logits(self) -> Callable:
        module = KimiK25(self.config)
        # on every device, so that each host can read them
        whole = None if self.mesh is None else sharding.replicated(self.mesh)
        return jax.jit(lambda params, batch: module.apply({"params": params}, batch)[0], out_shardings=whole)

    def _patch_size(self) -> int:
        return self.config.vision.patch_size if self.config.vision else 0

    def _check_tokens(self, input_ids: Any) -> np.ndarray:
        tokens = np.asarray(input_ids)
        if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"input_ids must be ints [B, S] with at least one token, not {tokens.dtype} {tokens.shape}"
            )
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"input_ids holds {tokens.min()}..{tokens.max()}, the vocabulary has 0..{self.config.vocab_size - 1}"
            )
        return tokens.astype(np.int32)

    def _check_media(self, pixel_values: Any, grid_thws: Any) -> list[MediaItem]:
        if (pixel_values is None) != (grid_thws is None):
            raise ValueError("pixel_values and grid_thws belong together; one of them is missing")
        if pixel_values is None:
            return []
        if self.config.vision is None:
            raise ValueError("this model is text-only; it cannot take pixel_values")
        pixels, grids, size = np.asarray(pixel_values), np.asarray(grid_thws), self._patch_size()
        if grids.ndim != 2 or grids.shape[1] != 3 or not np.issubdtype(grids.dtype, np.integer):
            raise ValueError(f"grid_thws must be ints [items, 3], not {grids.dtype} {grids.shape}")
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values must be [N, 3, {size}, {size}], not {pixels.shape}")
        if (grids < (1, 2, 2)).any() or (grids[:, 1:] % 2).any():
            raise ValueError(f"every grid needs t >= 1 and even h, w >= 2, not {grids.tolist()}")
        frames = self.config.vision.init_pos_emb_time
        if (grids[:, 0] > frames).any():
            raise ValueError(f"a video chunk has at most {frames} frames; grid_thws has {grids[:, 0].max()}")
        counts = grids.prod(axis=1)
        if counts.sum() != len(pixels):
            raise ValueError(f"grid_thws asks for {counts.sum()} patches, pixel_values has {len(pixels)}")
        pixels = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)  # the model scales uint8 itself
        flat = np.split(pixels.reshape(len(pixels), 3 * size * size), np.cumsum(counts)[:-1])
        return [MediaItem(patches, (t, h, w)) for patches, (t, h, w) in zip(flat, grids.tolist(), strict=True)]

    def _check_routed_experts(self, experts: np.ndarray, shape: tuple[int, ...], padded: tuple[int, int]) -> np.ndarray:
        routing = RoutingShape.of(self.config)
        if routing is None:
            raise ValueError("this model has no experts; it cannot take routed_experts")
        (rows, length), (layers, k, _) = shape, routing
        routing.check(experts, (rows, layers, length, k), "the batch")
        return _pad(experts.astype(np.int32), (padded[0], layers, padded[1], k), FREE)


def _pad(array: np.ndarray, shape: Sequence[int], value: int) -> np.ndarray:
    """The array in the corner of a larger one."""
    return np.pad(array, [(0, to - size) for size, to in zip(array.shape, shape, strict=True)], constant_values=value)


def _numbers(place: slice) -> np.ndarray:
    return np.arange(place.start, place.stop, dtype=np.int32)

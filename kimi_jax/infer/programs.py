"""The engine's hands: weights, pages and compiled programs, and the arrays that a call of them takes.

Everything that is compiled has a fixed shape. One program decodes all slots; one for each length of a prompt's pieces
reads as many of them as a step's budget of tokens allows. Rows that nobody needs are padding, which is routed to no
expert and writes to no page that anybody reads. Lengths, tables and settings are data.

B slots   R rows of pieces   T tokens of a piece   N most tokens a call   W pages in a table   S stop ids   D width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import ModelConfig
from kimi_jax.infer import forward as decoder
from kimi_jax.infer import sequence as state
from kimi_jax.infer.cache import NULL_PAGE, Cache, empty_cache
from kimi_jax.infer.sampler import Settings
from kimi_jax.infer.step import Decoded, Drawn, Ends, copy_pages, decode_tokens, next_tokens, rows_sharding
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import metadata, unbox

STOP_IDS = 8  # of a row that the device knows; the engine sees to the others when the call is over


@dataclass(frozen=True)
class Sizes:
    """Of the arrays: slots, pages, tokens a page, pages in a table, tokens a call, rows for each length of pieces."""

    slots: int
    pages: int
    page_size: int
    width: int
    tokens: int
    rows: Mapping[int, int]


class PrefillChunk(NamedTuple):
    """The next tokens of a prompt: `length` of them from number `start` on."""

    sequence: state.Answer
    start: int
    length: int


class Programs:
    """What lies on the devices. `cache` is given up and made anew by every call.

    compilations: how many programs jax has traced.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh | None, sizes: Sizes):
        self.config, self.mesh, self.sizes = config, mesh, sizes
        self.compilations = 0
        self.weights: decoder.Weights | None = None
        make = functools.partial(empty_cache, config, sizes.pages, sizes.page_size)
        self._cache_sharding = None if mesh is None else rows_sharding(mesh, sizes.pages)
        self.cache: Cache = make() if mesh is None else jax.jit(make, out_shardings=self._cache_sharding)()

    # ------------------------------------------------------------------------------------------------------- weights

    def place(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters sharded over the mesh, if there is one."""
        if self.mesh is None:
            return params
        boxed = abstract_params(self.config)
        return jax.device_put(params, sharding.param_shardings(metadata(boxed), unbox(boxed), self.mesh))

    def set_weights(self, params: dict[str, Any]) -> None:
        """Decode with these from now on. The first ones are split into layers one by one, later ones by a program."""
        split = None if self.weights is None else self._split
        self.weights = decoder.prepare(self.config, params, split)

    @functools.cached_property
    def _split(self) -> Callable:
        """Leaves the layers on the devices where the first ones lie."""
        assert self.weights is not None
        places = None if self.mesh is None else jax.tree.map(lambda a: a.sharding, self.weights.layers)
        return jax.jit(functools.partial(decoder.split_layers, self.config), out_shardings=places)

    # ------------------------------------------------------------------------------------------------------ programs

    @functools.cached_property
    def step(self) -> Callable:
        """Compiled once for each shape of the chunk, and for whatever is asked for beside the tokens."""

        def run(
            weights: decoder.Weights, cache: Cache, chunk: decoder.Chunk, settings: Settings,
            targets: Any = None, record: bool = False,
        ) -> tuple[Cache, Drawn]:  # fmt: skip
            self.compilations += 1  # runs only while jax traces
            return next_tokens(self.config, self.mesh, weights, cache, chunk, settings, targets, record)

        return jax.jit(run, donate_argnums=1, static_argnames="record")

    @functools.cached_property
    def _loop(self) -> Callable:
        def run(
            weights: decoder.Weights, cache: Cache, chunk: decoder.Chunk, settings: Settings, ends: Ends, record: bool
        ) -> tuple[Cache, Decoded]:
            self.compilations += 1
            most = self.sizes.tokens
            return decode_tokens(self.config, self.mesh, most, weights, cache, chunk, settings, ends, record)

        return jax.jit(run, donate_argnums=1, static_argnames="record")

    @functools.cached_property
    def _copy(self) -> Callable:
        def run(cache: Cache, source: Any, target: Any) -> Cache:
            self.compilations += 1
            return copy_pages(cache, source, target)

        return jax.jit(run, donate_argnums=0, out_shardings=self._cache_sharding)

    # --------------------------------------------------------------------------------------------------------- calls

    def prefill(self, pieces: Sequence[PrefillChunk], size: int, scored: bool, record: bool) -> Drawn:
        """Pieces of prompts, each padded to `size` tokens, in rows of one call; arrays of the host.

        Several pieces of one prompt may stand in it one after the other: in every layer all of them are in the pages
        before any of them is looked at. scored: give the log-probabilities of the tokens that follow.
        """
        rows = self.sizes.rows[size]
        shape = rows, size
        tokens, targets, is_media = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        features = np.zeros((*shape, self.config.hidden_size), self.config.dtype)
        start, count = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for row, (sequence, first, length) in enumerate(pieces):
            start[row], count[row] = first, length
            piece = sequence.tokens[first : first + length + 1]
            tokens[row, :length], targets[row, : len(piece) - 1] = piece[:length], piece[1:]
            if sequence.features is not None:
                pads = sequence.owners[first : first + length] >= 0
                is_media[row, : len(pads)] = pads
                before = (sequence.owners[:first] >= 0).sum()
                features[row, : len(pads)][pads] = sequence.features[before : before + pads.sum()]
        table, settings = self._rows(dict(enumerate(piece.sequence for piece in pieces)), rows, start + count)
        chunk = decoder.Chunk(tokens, start, count, table, features, is_media)
        self.cache, drawn = self.step(
            self.weights, self.cache, chunk, settings, targets if scored else None, record=record
        )
        return jax.device_get(drawn)

    def decode(
        self, running: Sequence[state.Answer], steps: int, ended: int, record: bool,
        allowed: Mapping[int, np.ndarray] | None = None,
    ) -> Decoded:  # fmt: skip
        """Up to `steps` tokens of every running sequence; fewer once `ended` of them have come to their end.

        allowed: by slot, the masks of those that have a grammar (`request.Matcher`); with any of them one token, by a
        program that only they need.
        """
        slots = self.sizes.slots
        tokens, start, count, limit = (np.zeros(slots, np.int32) for _ in range(4))
        stop_ids = np.full((slots, STOP_IDS), -1, np.int32)
        for s in running:
            tokens[s.slot], start[s.slot], count[s.slot], limit[s.slot] = s.tokens[-1], s.num_cached, 1, s.limit
            known = [i for i in s.sampling.stop_ids if 0 <= i < self.config.vocab_size][:STOP_IDS]
            stop_ids[s.slot, : len(known)] = known
        table, settings = self._rows({s.slot: s for s in running}, slots, start + count)
        chunk = decoder.Chunk(tokens[:, None], start, count, table)
        if allowed:
            settings = settings._replace(allowed=self._masks(allowed))
        if allowed or self.sizes.tokens == 1:
            self.cache, drawn = self.step(self.weights, self.cache, chunk, settings, record=record)
            drawn = jax.device_get(drawn)
            experts = None if drawn.experts is None else drawn.experts.swapaxes(0, 1)
            return Decoded(np.int32(1), jax.tree.map(lambda a: a[None], drawn.sampled), experts)
        ends = Ends(stop_ids, limit, np.int32(steps), np.int32(ended))
        self.cache, decoded = self._loop(self.weights, self.cache, chunk, settings, ends, record=record)
        return jax.device_get(decoded)

    def _masks(self, allowed: Mapping[int, np.ndarray]) -> np.ndarray:
        """uint32 [B, W]: those of the slots, everything for the others."""
        masks = np.full((self.sizes.slots, -(-self.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for slot, mask in allowed.items():
            width = min(len(mask), masks.shape[1])
            masks[slot, :width], masks[slot, width:] = mask[:width], 0
        return masks

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies pages, at most as many as there are slots: (from, to)."""
        source, target = np.full((2, self.sizes.slots), NULL_PAGE, np.int32)
        for i, (old, new) in enumerate(pairs):
            source[i], target[i] = old, new
        self.cache = self._copy(self.cache, source, target)

    def _rows(self, placed: Mapping[int, state.Answer], rows: int, position: np.ndarray) -> tuple[np.ndarray, Settings]:
        """Tables and settings of the sequences at these rows; the others are idle. position: of the new token."""
        table = np.full((rows, self.sizes.width), NULL_PAGE, np.int32)
        settings = Settings(
            np.zeros(rows, np.float32), np.ones(rows, np.float32), np.zeros(rows, np.uint32), position,
            np.zeros(rows, np.int32),
        )  # fmt: skip
        for row, sequence in placed.items():
            wanted = sequence.sampling
            table[row, : len(sequence.pages)] = sequence.pages
            settings.temperature[row], settings.top_p[row] = wanted.temperature, wanted.top_p
            settings.seed[row], settings.top_logprobs[row] = sequence.seed, wanted.top_logprobs
        return table, settings


def shapes(params: Any) -> Any:
    """The tree of (shape, dtype) of the arrays."""
    return jax.tree.map(lambda x: (x.shape, x.dtype), params)


def common_entropy(mesh: Mesh | None) -> int:
    """What numbers can be drawn with that are alike on all hosts of the mesh: 32 bits, which host 0 has drawn."""
    own = np.random.SeedSequence().generate_state(1)
    if mesh is not None and mesh.is_multi_process:
        own = multihost_utils.broadcast_one_to_all(own)
    return int(own[0])

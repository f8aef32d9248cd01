"""Continuous batching: requests join and leave a fixed number of slots; prompts in chunks, all slots decoded at once.

Source: docs/architecture.md section 9. Everything that is compiled has a fixed shape: one program
decodes all slots, one for each of CHUNKS takes the next piece of one prompt. Lengths, tables and settings are data, so
nothing is compiled after each of them has run once (`warmup` runs them); only the vision tower has a program for each
class of picture sizes (`kimi_jax.model`).

Order: first come, first served. One prompt is read at a time; while others decode, the two take turns, so a long prompt
does not stop the others. Pages: a request gets all that it can ever need (prompt and max_new_tokens) when its prompt
starts, and waits, as does everybody behind it, until there are enough. So nothing ever has to be taken back, at the
price of room for tokens that an early stop leaves unused. A prompt that begins like an earlier one, of this or another
request, shares its full pages; a request that gives a seed or asks for log-probabilities (`Sampling.reproducible`) only
those that were made by reading prompts, since decoding rounds otherwise (visibly so in bfloat16).

Under a mesh the weights are cut by `kimi_jax.sharding`, the pages and the slots along the axis of the batch.

B slots   T tokens of a chunk   W pages in a table   P pages   s tokens a page   A alternatives listed
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.data.example import MediaItem
from kimi_jax.data.image import normalise
from kimi_jax.data.patches import num_features
from kimi_jax.infer import forward as decoder
from kimi_jax.infer.cache import NOWHERE, Cache, PagePool, empty_cache, media_digest, page_keys
from kimi_jax.infer.request import Completion, Event, Request, Sampling
from kimi_jax.infer.sampler import Sampled, Settings
from kimi_jax.infer.step import cut, next_tokens
from kimi_jax.model import Model
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import metadata, unbox

CHUNKS = (32, 128, 512)  # lengths of a prompt's pieces; the last one also bounds how long a decoding step may wait


@dataclass(eq=False)
class _Sequence:
    """A request on its way. `tokens` holds the prompt, then what was sampled; the first `filled` are in the cache."""

    number: int
    sampling: Sampling
    media: tuple[MediaItem, ...]
    tokens: list[int]
    prompt: int  # tokens of it
    limit: int  # most tokens it can get to
    owners: np.ndarray  # int32 [prompt]: the media item whose feature stands there, or -1
    digests: list[bytes]
    keys: list[bytes]
    seed: int
    features: np.ndarray | None = None  # [F, D], until the prompt is read
    pages: list[int] = field(default_factory=list)
    filled: int = 0
    cached: int = 0
    read: int = 0  # tokens whose cache entries are the work of reading prompts alone; at most `prompt`
    slot: int = -1
    cancelled: bool = False
    events: list[Event] = field(default_factory=list)

    def report(
        self, token: int | None, logprob: float | None, top: tuple, reason: str | None, error: str | None = None
    ) -> Event:
        """The next event, remembered for `Engine.run`."""
        self.events.append(Event(self.number, token, logprob, top, reason, error, self.cached))
        return self.events[-1]


class Engine:
    """Runs requests on a model. Single thread: `submit`, `cancel` and `step` are called by one thread.

    slots: requests that decode together. page_size: tokens a page, a power of two. num_pages: of the cache; default:
    enough for every slot at the longest sequence. max_sequence_length: most tokens of prompt and answer together.
    mesh: of `kimi_jax.sharding`; slots and pages are cut where they divide. chunks: lengths of a prompt's pieces.
    Raises ValueError for sizes without sense.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        page_size: int = 64,
        num_pages: int | None = None,
        max_sequence_length: int = 4096,
        mesh: Mesh | None = None,
        chunks: Sequence[int] = CHUNKS,
    ):
        if any(n < 1 or n & (n - 1) for n in (page_size, *chunks)) or list(chunks) != sorted(set(chunks)):
            raise ValueError(f"page_size={page_size} and the ascending chunks={chunks} must be powers of two")
        if slots < 1 or max_sequence_length < 2:
            raise ValueError(f"slots={slots} must be at least 1, max_sequence_length={max_sequence_length} at least 2")
        self.model, self.config, self.mesh = model, model.config, mesh
        self.page_size, self.max_sequence_length = page_size, max_sequence_length
        self._width = -(-max_sequence_length // page_size)
        num_pages = 1 + slots * self._width if num_pages is None else num_pages
        if mesh is not None:
            num_pages += -num_pages % sharding.batch_parts(mesh)
        self._pool = PagePool(num_pages)
        longest = 1 << (max_sequence_length - 1).bit_length()
        self._chunks = [n for n in chunks if n <= longest] or [chunks[0]]
        self._slots: list[_Sequence | None] = [None] * slots
        self._waiting: deque[_Sequence] = deque()
        self._reading: _Sequence | None = None
        self._numbers = itertools.count()
        self._counts = dict.fromkeys(("compilations", "prefill_tokens", "decode_tokens", "prefix_hit_tokens"), 0)
        self._decoded_last = False
        self._cache = self._empty_cache(num_pages)
        self.set_params(model.params)

    # ------------------------------------------------------------------------------------------------ the public part

    def submit(self, request: Request) -> int:
        """Put a request at the end of the line; its number.

        Raises ValueError for tokens outside the vocabulary, a prompt that leaves no room for an answer or needs more
        pages than there are, media that do not fit the pads or the model, settings out of range.
        """
        return self._enter(request).number

    def _enter(self, request: Request) -> _Sequence:
        tokens = self._check_tokens(request.token_ids)
        problem = request.sampling.problem()
        if problem:
            raise ValueError(problem)
        owners = self._check_media(tokens, request.media)
        limit = min(len(tokens) + request.sampling.max_new_tokens, self.max_sequence_length)
        if self._num_pages(limit) > self._pool.capacity:
            raise ValueError(
                f"{len(tokens)} tokens and up to {limit - len(tokens)} new ones need {self._num_pages(limit)} pages, "
                f"the cache has {self._pool.capacity}: shorten the prompt, lower max_new_tokens or raise num_pages"
            )
        digests = [media_digest(item) for item in request.media]
        keys = page_keys(tokens[:-1], owners[:-1], digests, self.page_size)  # the last one is always computed
        seed = request.sampling.seed
        if seed is None:
            seed = int(np.random.default_rng().integers(1 << 32))
        sequence = _Sequence(
            next(self._numbers), request.sampling, request.media, tokens.tolist(), len(tokens), limit, owners, digests,
            keys, seed % (1 << 32),
        )  # fmt: skip
        self._waiting.append(sequence)
        return sequence

    def cancel(self, request_id: int) -> None:
        """End a request at the next step, which reports it. Unknown and finished ones are ignored."""
        for sequence in (*self._waiting, *self._slots):
            if sequence is not None and sequence.number == request_id:
                sequence.cancelled = True

    def step(self) -> list[Event]:
        """Let in who can start, then read one piece of a prompt or decode one token for every slot. What happened."""
        events = self._drop_cancelled()
        if self._reading is None:
            events += self._start_next()
        running = [s for s in self._slots if s is not None and s is not self._reading]
        if self._reading is not None and (self._decoded_last or not running):
            self._decoded_last = False
            return events + self._read(self._reading)
        self._decoded_last = True
        return events + self._decode(running) if running else events

    @property
    def idle(self) -> bool:
        """Nothing waits or runs."""
        return not self._waiting and not any(self._slots)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """All of them, to the end, in the order given. Raises ValueError as `submit`, RuntimeError if one fails.

        Events of requests that others submitted are dropped.
        """
        sequences = [self._enter(request) for request in requests]
        for sequence in sequences:
            while not (sequence.events and sequence.events[-1].finish_reason):
                self.step()
        return [_completion(sequence) for sequence in sequences]

    def stats(self) -> dict[str, int]:
        """waiting, running, free_pages (cached_pages are among them), and since the start: compilations,
        prefill_tokens, decode_tokens, prefix_hit_tokens."""
        return {
            "waiting": len(self._waiting), "running": sum(s is not None for s in self._slots),
            "free_pages": self._pool.free, "cached_pages": self._pool.cached, **self._counts,
        }  # fmt: skip

    def set_params(self, params: dict[str, Any]) -> None:
        """Go on with other weights of the same shapes (RL between two rollouts); forgets all known prefixes.

        Raises RuntimeError unless idle. Pictures are seen with `model.params`.
        """
        if not self.idle:
            raise RuntimeError("set_params needs an idle engine: keys and values in the cache are of the old weights")
        if self.mesh is not None:
            boxed = abstract_params(self.config)
            params = jax.device_put(params, sharding.param_shardings(metadata(boxed), unbox(boxed), self.mesh))
        self._pool.forget()
        self._weights = decoder.prepare(self.config, params)

    def warmup(self) -> None:
        """Compile every program now. Raises RuntimeError unless idle."""
        if not self.idle:
            raise RuntimeError("warmup needs an idle engine")
        for size in self._chunks:
            self._run_chunk({}, 0, size)
        self._decode([])

    # -------------------------------------------------------------------------------------------------- checks at entry

    def _check_tokens(self, token_ids: Any) -> np.ndarray:
        tokens = np.asarray(token_ids)
        if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"token_ids must be ints [n] with at least one token, not {tokens.dtype} {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"token_ids holds {tokens.min()}..{tokens.max()}, the vocabulary has 0..{self.config.vocab_size - 1}"
            )
        if len(tokens) >= self.max_sequence_length:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; prompt and answer together have at most "
                f"{self.max_sequence_length}"
            )
        return tokens.astype(np.int32)

    def _check_media(self, tokens: np.ndarray, media: tuple[MediaItem, ...]) -> np.ndarray:
        """int32 [n]: which item each pad belongs to, -1 elsewhere."""
        vision, pad = self.config.vision, self.config.media_placeholder_token_id
        owners = np.full(len(tokens), -1, np.int32)
        if vision is None:
            if media:
                raise ValueError("this model is text-only; it cannot take media")
            return owners
        for item in media:
            (t, h, w), patches = item.grid, item.patches
            if not 1 <= t <= vision.init_pos_emb_time or h < 2 or w < 2 or h % 2 or w % 2:
                raise ValueError(f"media grid {item.grid}: needs 1..{vision.init_pos_emb_time} frames, even h, w >= 2")
            if patches.shape != (t * h * w, 3 * vision.patch_size**2):
                raise ValueError(f"media patches must be {(t * h * w, 3 * vision.patch_size**2)}, not {patches.shape}")
        wanted = [num_features(item.grid) for item in media]
        pads = tokens == pad
        if pads.sum() != sum(wanted):
            raise ValueError(
                f"{pads.sum()} media pads (id {pad}) in token_ids, but the {len(media)} media items have {sum(wanted)} "
                "features: each item needs h*w/4 pads"
            )
        owners[pads] = np.repeat(np.arange(len(media)), wanted)
        return owners

    def _num_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # ------------------------------------------------------------------------------------------------- joining, leaving

    def _drop_cancelled(self) -> list[Event]:
        gone = [s for s in (*self._waiting, *self._slots) if s is not None and s.cancelled]
        self._waiting = deque(s for s in self._waiting if not s.cancelled)
        return [self._end(sequence, "cancelled") for sequence in gone]

    def _start_next(self) -> list[Event]:
        """The first in line gets a free slot and its pages, if there are both; its pictures are looked at."""
        if not self._waiting or None not in self._slots:
            return []
        sequence = self._waiting[0]
        decoded = not sequence.sampling.reproducible
        reserved = self._pool.reserve(sequence.keys, self._num_pages(sequence.limit), decoded)
        if reserved is None:
            return []
        self._waiting.popleft()
        sequence.pages, known = reserved
        sequence.cached = sequence.filled = known * self.page_size
        first = self._pool.first_decoded(sequence.pages[:known])
        sequence.read = sequence.prompt if first == known else first * self.page_size
        self._counts["prefix_hit_tokens"] += sequence.cached
        sequence.slot = self._slots.index(None)
        self._slots[sequence.slot] = self._reading = sequence
        if (sequence.owners[sequence.filled :] >= 0).any():
            try:
                sequence.features = self._look(sequence.media)
            except Exception as error:  # one bad request must not end the others
                return [self._end(sequence, "error", f"vision: {type(error).__name__}: {error}")]
        return []

    def _look(self, media: tuple[MediaItem, ...]) -> np.ndarray:
        """Features of all items, float32 [F, D]."""
        size = self.config.vision.patch_size  # type: ignore[union-attr]
        pixels = [item.patches.reshape(-1, 3, size, size) for item in media]
        if any(p.dtype != np.uint8 for p in pixels):  # bytes reach the device as bytes unless floats stand beside them
            pixels = [normalise(item.patches, size) if item.patches.dtype == np.uint8 else p
                      for item, p in zip(media, pixels, strict=True)]  # fmt: skip
        return self.model.vision_features(np.concatenate(pixels), [item.grid for item in media])

    def _end(self, sequence: _Sequence, reason: str, error: str | None = None) -> Event:
        self._leave(sequence)
        return sequence.report(None, None, (), reason, error)

    def _leave(self, sequence: _Sequence) -> None:
        """Frees slot and pages. Full pages stay known, the answer's too: it is part of the next turn's prompt."""
        if sequence.slot >= 0:
            self._slots[sequence.slot] = None
            tokens = np.array(sequence.tokens[: sequence.filled], np.int32)
            owners = np.pad(sequence.owners, (0, len(sequence.tokens) - sequence.prompt), constant_values=-1)
            self._keep(sequence, page_keys(tokens, owners, sequence.digests, self.page_size))
            self._pool.release(sequence.pages)
        if sequence is self._reading:
            self._reading = None

    def _keep(self, sequence: _Sequence, keys: Sequence[bytes]) -> None:
        full = keys[: sequence.filled // self.page_size]
        for i, (page, key) in enumerate(zip(sequence.pages, full, strict=False), 1):
            self._pool.keep(page, key, decoded=i * self.page_size > sequence.read)

    # ------------------------------------------------------------------------------------------------- the two programs

    def _read(self, sequence: _Sequence) -> list[Event]:
        """The next piece of its prompt; after the last one its first new token."""
        left = sequence.prompt - sequence.filled
        size = next((n for n in self._chunks if n >= left), self._chunks[-1])
        count = min(left, size)
        sampled = self._run_chunk({0: sequence}, count, size)
        sequence.filled += count
        self._counts["prefill_tokens"] += count
        self._keep(sequence, sequence.keys)
        if sequence.filled < sequence.prompt:
            return []
        self._reading = sequence.features = None
        return [self._advance(sequence, sampled, 0)]

    def _run_chunk(self, placed: dict[int, _Sequence], count: int, size: int) -> Sampled:
        """The next `count` tokens of the prompt at row 0, if there is one, padded to `size`."""
        tokens, start = np.zeros((1, size), np.int32), np.zeros(1, np.int32)
        features = np.zeros((1, size, self.config.hidden_size), self.config.dtype)
        is_media = np.zeros((1, size), bool)
        for row, sequence in placed.items():
            start[row] = sequence.filled
            piece = slice(sequence.filled, sequence.filled + count)
            tokens[row, :count] = sequence.tokens[piece]
            if sequence.features is not None:
                is_media[row, :count] = sequence.owners[piece] >= 0
                before = (sequence.owners[: sequence.filled] >= 0).sum()
                features[is_media] = sequence.features[before : before + is_media.sum()]
        return self._run(placed, tokens, start, np.array([count], np.int32), (features, is_media))

    def _decode(self, running: list[_Sequence]) -> list[Event]:
        """The next token of every running sequence."""
        tokens, start, count = (np.zeros(len(self._slots), np.int32) for _ in range(3))
        for s in running:
            tokens[s.slot], start[s.slot], count[s.slot] = s.tokens[-1], s.filled, 1
            s.filled += 1
        sampled = self._run({s.slot: s for s in running}, tokens[:, None], start, count)
        self._counts["decode_tokens"] += len(running)
        return [self._advance(sequence, sampled, sequence.slot) for sequence in running]

    def _advance(self, sequence: _Sequence, sampled: Sampled, row: int) -> Event:
        """The row's new token, and the end if it is one."""
        token, wanted = int(sampled.tokens[row]), sequence.sampling
        sequence.tokens.append(token)
        reason = None
        if token in wanted.stop_ids:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.limit:
            reason = "length"
        if reason:
            self._leave(sequence)
        listed = range(min(wanted.top_logprobs, sampled.top_tokens.shape[1]))
        top = tuple((int(sampled.top_tokens[row, i]), float(sampled.top_logprobs[row, i])) for i in listed)
        return sequence.report(token, float(sampled.logprobs[row]), top, reason)

    def _run(
        self,
        placed: dict[int, _Sequence],
        tokens: np.ndarray,
        start: np.ndarray,
        count: np.ndarray,
        media: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Sampled:
        """One call of the program: tokens [B, T] of the sequences at the rows of `placed`; the other rows are idle."""
        rows = len(tokens)
        table = np.full((rows, self._width), NOWHERE, np.int32)
        settings = Settings(
            np.zeros(rows, np.float32), np.ones(rows, np.float32), np.zeros(rows, np.uint32), start + count,
            np.zeros(rows, np.int32),
        )  # fmt: skip
        for row, sequence in placed.items():
            wanted = sequence.sampling
            table[row, : len(sequence.pages)] = sequence.pages
            settings.temperature[row], settings.top_p[row] = wanted.temperature, wanted.top_p
            settings.seed[row], settings.top_logprobs[row] = sequence.seed, wanted.top_logprobs
        chunk = decoder.Chunk(tokens, start, count, table, *(media or (None, None)))
        self._cache, sampled = self._program(self._weights, self._cache, chunk, settings)
        return jax.device_get(sampled)

    @functools.cached_property
    def _program(self) -> Callable:
        """Compiled once for each shape of the chunk: one for decoding, one for each of CHUNKS."""

        def run(
            weights: decoder.Weights, cache: Cache, chunk: decoder.Chunk, settings: Settings
        ) -> tuple[Cache, Sampled]:
            self._counts["compilations"] += 1  # runs only while jax traces
            return next_tokens(self.config, self.mesh, weights, cache, chunk, settings)

        return jax.jit(run, donate_argnums=1)

    def _empty_cache(self, num_pages: int) -> Cache:
        make = functools.partial(empty_cache, self.config, num_pages, self.page_size)
        return make() if self.mesh is None else jax.jit(make, out_shardings=cut(self.mesh, num_pages))()


def _completion(sequence: _Sequence) -> Completion:
    """Raises RuntimeError if the request failed."""
    events = sequence.events
    if events[-1].finish_reason == "error":
        raise RuntimeError(f"request {sequence.number}: {events[-1].error}")
    sampled = [event for event in events if event.token_id is not None]
    return Completion(
        tuple(event.token_id for event in sampled if event.token_id is not None),
        tuple(event.logprob for event in sampled if event.logprob is not None),
        events[-1].finish_reason or "",
        sequence.prompt,
        sequence.cached,
        tuple(event.top for event in sampled),
    )

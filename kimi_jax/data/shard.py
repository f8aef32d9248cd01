"""One logical shard of the data stream: its part of every source, its mixture, its packer.

Source: docs/architecture.md section 3.

G   number of shards of the stream, fixed for a run, whatever the number of hosts or workers
n   records of a source

Read i of a source in shard k is number i*G + k of the endless stream of that source: its records in an order that is
shuffled anew each epoch and reached by computation, not by reading ahead. So a shard's state is a few counters, the
mixture, and *references* to the examples that wait in the buffer; restoring encodes those again. Nothing in it knows of
hosts or workers, which is why a run continues exactly on any number of either.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping

import grain

from kimi_jax.config import DataConfig, ModelConfig
from kimi_jax.data import BadRecord, DataError
from kimi_jax.data.bins import SAMPLE, check_sizes
from kimi_jax.data.example import Encoded, EncodeLimits, Source, encode, split
from kimi_jax.data.mixture import Mixture, ratio_at
from kimi_jax.data.packing import BufferedExample, Pack, PackShape, fill_pack
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.vision_budget import VisionBudget
from kimi_jax.packed_batch import PackedBatch

NAMED = 5  # bad records that are remembered by name, for each source
QUARANTINED = 1000  # bad records of a source that a shard remembers, so as not to open them again
MOST_DRAWS = 8  # for one example that `min_per_pack` asks for; with so many bad ones a pack goes without it
MOST_PACKS = 2  # packs' bins that waiting images may fill while less text waits than as many packs' rows hold
JUDGED = 100  # draws after which the share of bad records of a source is judged; fewer if it has fewer records


def limits_of(data: DataConfig, model: ModelConfig) -> EncodeLimits:
    """What one example may take so that it fits an empty pack of this run."""
    return EncodeLimits(data.sequence_length, data.vision_bins if model.vision else ())


def check_bad(name: str, draws: int, size: int, bad: Mapping[str, int], named: list, max_fraction: float) -> None:
    """Raises DataError if too large a share of a source's records was bad, with counts by reason and some names.

    Judged from 100 draws on, or from all records of a smaller source. Until a source has been seen whole, three
    standard deviations are allowed on top, so that a few bad records early on do not stop a healthy run.
    """
    count = sum(bad.values())
    if draws < min(JUDGED, size) or count == 0:
        return
    expected = max_fraction * draws
    allowed = expected + 3 * math.sqrt(expected) if draws < size else math.ceil(expected)
    if count > allowed or count == draws:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(bad.items()))
        examples = "; ".join(named)
        raise DataError(
            f"source {name!r}: {count} of {draws} records ({count / draws:.1%}) cannot be used, more than "
            f"data.max_bad_fraction = {max_fraction:g} allows: {reasons}. For example: {examples}"
        )


def wholly_masked(draws: int, size: int, bad: int, learned: int) -> bool:
    """Whether none of a source's examples has a loss anywhere, judged from as many draws as `check_bad` needs."""
    return learned == 0 and draws > bad and draws >= min(JUDGED, size)


class Quarantine:
    """Bad records that the shards of one process have met, and what it reads just now.

    A record in quarantine is not opened again: meeting it has the same effect on the stream as having read it and found
    it bad, so the batches are the same whoever knows of it. The note about reading outlives a process that hangs.
    """

    def __init__(self, states: Iterable[dict] = (), note: Callable[[str], None] | None = None):
        self.bad: dict[tuple[str, int], list[str]] = {}
        self._note = note
        for state in states:
            for name, source in state["sources"].items():
                for index, known in source["quarantined"].items():
                    self.bad[name, int(index)] = known

    def reading(self, name: str, index: int) -> None:
        """Notes which record is being opened."""
        if self._note is not None:
            self._note(f"source {name!r}, record {index}")


class _Reader:
    """A shard's part of one source: counters, and the order of its records."""

    def __init__(self, name: str, source: Source, shard: int, num_shards: int, seed: int, quarantine: Quarantine):
        self.name, self.source, self.size, self._quarantine = name, source, len(source), quarantine
        if self.size == 0:
            raise DataError(f"source {name!r} has no records")
        self.drawn = 0  # reads so far, bad ones included
        self.learned = 0  # examples with a loss anywhere
        self.shortened = 0  # conversations that lost turns
        self.bad: dict[str, int] = {}
        self.named: list[str] = []
        self.met: dict[str, list[str]] = {}  # index -> reason, key, detail of the bad records it met
        self._shard, self._num_shards = shard, num_shards
        # its own seed for each source: equal ones would walk sources of one size in step
        order_seed = (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**32
        self._order = grain.MapDataset.range(self.size).seed(order_seed).shuffle().repeat()

    def _index(self, read: int) -> int:
        return int(self._order[read * self._num_shards + self._shard])

    def peek(self, read: int, tokenizer: Tokenizer, limits: EncodeLimits, shape: PackShape) -> list[Encoded]:
        """Pieces of read number `read`, without a trace. Raises BadRecord, and DataError naming source and record."""
        index = self._index(read)
        self._quarantine.reading(self.name, index)
        try:
            return split(encode(self.source[index], tokenizer, limits, shape.patch_size), shape.sequence_length)
        except BadRecord:
            raise
        except Exception as error:
            raise DataError(f"source {self.name!r}, record {index}: {type(error).__name__}: {error}") from error

    def encode(self, read: int, tokenizer: Tokenizer, limits: EncodeLimits, shape: PackShape) -> list[Encoded]:
        """Pieces of read number `read`, a bad one remembered. Raises BadRecord, and DataError for other errors."""
        index = self._index(read)
        if known := self._quarantine.bad.get((self.name, index)):
            self.met[str(index)] = known
            raise BadRecord(*known)
        try:
            pieces = self.peek(read, tokenizer, limits, shape)
        except BadRecord as bad:
            known = [bad.reason, bad.key or f"record {index}", bad.detail[:300]]
            if len(self.met) < QUARANTINED:
                self.met[str(index)] = self._quarantine.bad[self.name, index] = known
            raise BadRecord(*known) from bad
        if not limits.bins and any(piece.media for piece in pieces):
            raise DataError(f"source {self.name!r}, record {index} holds media, but the model has no vision bins")
        return pieces

    def count_bad(self, bad: BadRecord, max_fraction: float) -> None:
        """Counts a record that cannot be used. Raises DataError when they are too many."""
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1
        text = str(bad)[:300]
        if len(self.named) < NAMED and text not in self.named:
            self.named.append(text)
        check_bad(self.name, self.drawn, self.size, self.bad, self.named, max_fraction)

    def state(self) -> dict:
        counts = {
            "drawn": self.drawn,
            "learned": self.learned,
            "shortened": self.shortened,
            "size": self.size,
            "bad": dict(self.bad),
            "named": list(self.named),
        }
        return counts | {"quarantined": dict(self.met)}

    def restore(self, state: dict) -> None:
        if state["size"] != self.size:
            raise DataError(
                f"source {self.name!r} had {state['size']} records when the state was written and has {self.size} now; "
                "its order is another one. Restore the old files, or start with a fresh data state"
            )
        self.drawn, self.bad, self.named = state["drawn"], dict(state["bad"]), list(state["named"])
        self.learned = state.get("learned", 1)  # states of before it was counted say nothing
        self.shortened = state.get("shortened", 0)
        self.met = dict(state["quarantined"])


class Shard:
    """Logical shard `index` of `data.num_packs`: an endless sequence of packs.

    sources: the opened sources by name, as in `data.sources`. state: of `state()`, to continue after that pack.
    quarantine: shared with the other shards of this process.
    Raises DataError for settings or a state that cannot work.
    """

    def __init__(
        self,
        index: int,
        data: DataConfig,
        model: ModelConfig,
        total_steps: int,
        sources: Mapping[str, Source],
        tokenizer: Tokenizer,
        state: dict | None = None,
        quarantine: Quarantine | None = None,
    ):
        quarantine = quarantine or Quarantine()
        self._data, self._total_steps, self._tokenizer = data, total_steps, tokenizer
        self._limits = limits_of(data, model)
        self._shape = PackShape.of(data, model)
        self._patches = sum(patches * count for patches, count in self._shape.bins)
        ratio = data.vision_ratio if model.vision else ((0.0, 0.0),)
        self._mixture = Mixture(data.sources, ratio, MOST_PACKS * self._patches / 4)
        self._readers = {
            name: _Reader(name, sources[name], index, data.num_packs, data.seed, quarantine) for name in data.sources
        }
        self._buffer: list[BufferedExample] = []
        exact = data.exact_vision_ratio and model.vision is not None
        positions = data.rows_per_pack * data.sequence_length
        self._budget = VisionBudget(positions, data.buffer_size // 4) if exact else None
        self._step = 0
        self._used: dict = {"tokens": 0, "vision_tokens": 0, "documents": 0, "patches": [0] * len(self._shape.bins)}
        if state is not None:
            self._restore(state)

    def next_pack(self) -> PackedBatch:
        """The next pack. Raises DataError."""
        ratio = ratio_at(self._data.vision_ratio, self._fraction())
        if self._budget:
            pack, packed = self._exact_pack(self._budget, ratio)
        else:
            first = [w for name, source in self._data.sources.items() for w in self._wanted(name, source.min_per_pack)]
            due = 4 * ratio * self._shape.rows * self._shape.sequence_length
            pack, packed = fill_pack(self._shape, self._buffer, self._draw, self._data.buffer_size, first, due)
        for waiting in packed:
            self._mixture.delivered(waiting.reference[0], len(waiting.example.tokens), ratio)
        used = pack.used()
        for name in ("tokens", "vision_tokens", "documents"):
            self._used[name] += used[name]
        self._used["patches"] = [a + b for a, b in zip(self._used["patches"], used["patches"], strict=True)]
        self._step += 1
        return pack.batch

    def _exact_pack(self, budget: VisionBudget, ratio: float) -> tuple[Pack, list[BufferedExample]]:
        """A pack of exactly the vision tokens that are due, and what it holds; text fills what they leave of it."""
        fraction = self._fraction()
        chosen = budget.choose(ratio, lambda: self._draw(self._mixture.choose_within(True, fraction)))
        self._buffer = chosen + self._buffer  # before the oldest text, which might leave them too little room
        draw_text = lambda: self._draw(self._mixture.choose_within(False, fraction))  # noqa: E731
        pack, packed = fill_pack(self._shape, self._buffer, draw_text, self._data.buffer_size, chosen)
        held = {id(waiting) for waiting in packed}
        left_over = [waiting for waiting in chosen if id(waiting) not in held]
        self._buffer = [waiting for waiting in self._buffer if not any(waiting is one for one in left_over)]
        budget.delivered(chosen, left_over)
        return pack, packed

    def _wanted(self, name: str, count: int) -> list[BufferedExample]:
        """The `count` oldest examples of a source in the buffer, drawn ahead of the mixture if fewer wait there."""
        for _ in range(MOST_DRAWS * count):
            if sum(waiting.reference[0] == name for waiting in self._buffer) >= count:
                break
            self._buffer += self._draw(name)
        return [waiting for waiting in self._buffer if waiting.reference[0] == name][:count]

    def _fraction(self) -> float:
        return self._step / max(1, self._total_steps)

    def _choose(self, fraction: float, ratio: float) -> str:
        """The source to draw from; text when images for the bins of MOST_PACKS packs wait, and text for fewer."""
        rows = self._shape.rows * self._shape.sequence_length
        text = sum(len(w.example.tokens) for w in self._buffer if not self._data.sources[w.reference[0]].vision)
        patches = sum(len(item.patches) for waiting in self._buffer for item in waiting.example.media)
        short_of_bins = patches > MOST_PACKS * self._patches and text < MOST_PACKS * rows
        return self._mixture.choose(fraction, ratio * min(text, rows), short_of_bins)

    def _draw(self, source: str | None = None) -> list[BufferedExample]:
        fraction = self._fraction()
        ratio = ratio_at(self._data.vision_ratio, fraction)
        name = source or self._choose(fraction, ratio)
        reader = self._readers[name]
        read = reader.drawn
        reader.drawn += 1
        try:
            pieces = reader.encode(read, self._tokenizer, self._limits, self._shape)
        except BadRecord as bad:
            self._mixture.record_draw(name, 0, 0, ratio, fraction)
            reader.count_bad(bad, self._data.max_bad_fraction)
            return []
        reader.learned += any(piece.loss_weights.any() for piece in pieces)
        reader.shortened += any(piece.shortened for piece in pieces)
        tokens = sum(len(piece.tokens) for piece in pieces)
        media = sum(item.grid[1] * item.grid[2] // 4 for piece in pieces for item in piece.media)
        self._mixture.record_draw(name, tokens, media, ratio, fraction)
        return [BufferedExample(piece, (name, read, i)) for i, piece in enumerate(pieces)]

    def check_sizes(self) -> None:
        """Raises ConfigError if the bins do not hold the vision ratio with images of the sizes that the sources have.

        Reads the first examples that this shard will draw of each source with media; bad ones are left out here, and
        counted when they are drawn. Changes nothing.
        """
        sample: dict[str, list[Encoded]] = {}
        for name, reader in self._readers.items():
            sample[name] = []
            for read in range(min(SAMPLE, reader.size) if self._data.sources[name].vision else 0):
                with contextlib.suppress(BadRecord):
                    sample[name] += reader.peek(read, self._tokenizer, self._limits, self._shape)
        check_sizes(self._data, sample)

    def state(self) -> dict:
        """The state after the last pack, JSON-able: counters, mixture, references of the waiting examples."""
        return {
            "step": self._step,
            "sources": {name: reader.state() for name, reader in self._readers.items()},
            "mixture": self._mixture.state(),
            "buffer": [list(waiting.reference) for waiting in self._buffer],
            "used": {**self._used, "patches": list(self._used["patches"])},
            **({"budget": self._budget_state(self._budget)} if self._budget else {}),
        }

    def _budget_state(self, budget: VisionBudget) -> dict:
        return {"left": budget.left, "buffer": [list(waiting.reference) for waiting in budget.buffer]}

    def _restore(self, state: dict) -> None:
        if set(state["sources"]) != set(self._readers):
            raise DataError(
                f"the state was written with the sources {sorted(state['sources'])}, the config has "
                f"{sorted(self._readers)}; continue with the same ones, or start with a fresh data state"
            )
        for name, reader in self._readers.items():
            reader.restore(state["sources"][name])
        self._mixture.restore(state["mixture"])
        self._step = state["step"]
        self._used = {**state["used"], "patches": list(state["used"]["patches"])}
        self._buffer = self._waiting(state["buffer"])
        if (self._budget is not None) != ("budget" in state):
            raise DataError("data.exact_vision_ratio was another one when the state was written; put it back")
        if self._budget:
            self._budget.left = state["budget"]["left"]
            self._budget.buffer = self._waiting(state["budget"]["buffer"])

    def _waiting(self, references: Iterable[list]) -> list[BufferedExample]:
        """The examples of a packing buffer, encoded once more."""
        encoded: dict[tuple[str, int], list[Encoded]] = {}
        for name, read, _ in references:
            if (name, read) not in encoded:
                encoded[name, read] = self._again(name, read)
        return [BufferedExample(encoded[name, read][piece], (name, read, piece)) for name, read, piece in references]

    def _again(self, name: str, read: int) -> list[Encoded]:
        try:
            return self._readers[name].encode(read, self._tokenizer, self._limits, self._shape)
        except BadRecord as bad:
            raise DataError(
                f"source {name!r}: a record that was good when the state was written is not: {bad}"
            ) from bad

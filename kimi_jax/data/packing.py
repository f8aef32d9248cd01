"""Documents into token rows, and their images into the bins beside them, both at once.

Source: docs/architecture.md section 3.

R, S       rows of a pack, tokens of a row
K          bin classes; class k has v_k bins of P_k patches, W_k = P_k/4 windows (one feature each)
n, N       tokens of an example, patches of an item
C          3 * patch_size^2
L, k       MoE layers, experts of a token
F          features of a pack, sum of v_k * W_k

A pack is the unit of packing: an example takes a span of one row, and each of its items a span of one bin of the
same pack, so no feature ever leaves the pack. Static shapes; what is not used is padding. An item that several
examples of a pack hold (the same object, as the samples of one prompt do) lies there once and is encoded once.

Examples wait in a buffer. A pack takes the oldest first, then fills row after row with the subset of the buffer that
fills it best, older ones preferred, skipping what the bins have no room for. So rows are nearly full even where they
are short, the buffer stays bounded, and nobody waits for more packs than the buffer has places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_jax.config import ConfigError, DataConfig, ModelConfig
from kimi_jax.data.example import Encoded, MediaItem, place_items
from kimi_jax.data.patches import item_layout, num_features, place_item
from kimi_jax.data.routing import RoutingShape
from kimi_jax.packed_batch import PackedBatch, concatenate, empty_bins, padding


@dataclass(frozen=True)
class PackShape:
    """Static shape of a pack."""

    rows: int
    sequence_length: int
    bins: tuple[tuple[int, int], ...]  # (P_k, v_k), ascending P; empty for text only
    pad_id: int
    media_pad_id: int
    patch_size: int = 14
    routing: RoutingShape | None = None  # that a pack holds routed experts, and of which model

    @classmethod
    def of(cls, data: DataConfig, model: ModelConfig, routed_experts: bool = False) -> PackShape:
        """The shape a run's settings ask for; routed_experts: with the column that replays a sampler's routing.

        Raises ConfigError for bins that cannot work, or routed experts of a model that has none.
        """
        routing = RoutingShape.of(model) if routed_experts else None
        if routed_experts and routing is None:
            raise ConfigError("routed experts cannot be replayed: config.model.moe is None, this model has none")
        bins = data.vision_bins if model.vision else ()
        for i, (patches, count) in enumerate(bins):
            if patches < 4 or patches % 4 or count < 1:
                raise ConfigError(
                    f"data.vision_bins[{i}] = ({patches}, {count}): patches must be a multiple of 4 (a feature is a "
                    "window of 2x2), with at least one bin"
                )
            if i and patches <= bins[i - 1][0]:
                raise ConfigError(f"data.vision_bins must ascend in patches, not {bins}")
        if data.rows_per_pack < 1 or data.sequence_length < 2:
            raise ConfigError("data.rows_per_pack must be at least 1 and data.sequence_length at least 2")
        patch_size = model.vision.patch_size if model.vision else 14
        return cls(
            data.rows_per_pack,
            data.sequence_length,
            bins,
            model.pad_token_id,
            model.media_placeholder_token_id,
            patch_size,
            routing,
        )

    @property
    def bin_offsets(self) -> tuple[int, ...]:
        """Where the features of each class begin among the F features of a pack."""
        return tuple(int(o) for o in np.cumsum([0] + [p // 4 * v for p, v in self.bins]))[:-1]


class Pack:
    """One pack while it is filled. `add` takes an example or says that there is no room; `batch` is what lies in it.

    columns: the names of the batch's columns. With `shape.routing` it has `routed_experts` too.
    """

    def __init__(self, shape: PackShape, columns: Sequence[str] = ()):
        self.shape = shape
        bins = [empty_bins(count, patches, 3 * shape.patch_size**2) for patches, count in shape.bins]
        routing = shape.routing and (shape.routing.num_layers, shape.routing.experts_per_token)
        self.batch = padding(
            shape.rows, shape.sequence_length, shape.rows, shape.pad_id, bins, columns=columns, routing=routing
        )
        self._row_room = [shape.sequence_length] * shape.rows
        self._row_documents = [0] * shape.rows
        self._bin_room = [[patches] * count for patches, count in shape.bins]
        self._bin_items = [[0] * count for _, count in shape.bins]
        self._features: dict[int, tuple[MediaItem, np.ndarray]] = {}  # by id of the item, which is kept alive
        self.documents = 0

    def room(self, row: int) -> int:
        """Tokens left in a row."""
        return self._row_room[row]

    def holds(self, item: MediaItem) -> bool:
        """Whether this very item lies in the bins already."""
        return id(item) in self._features

    def add(
        self,
        example: Encoded,
        row: int,
        columns: Mapping[str, np.ndarray] | None = None,
        experts: np.ndarray | None = None,
    ) -> bool:
        """Packs the example into the row and returns True, or changes nothing and returns False for lack of room.

        columns: float32 [n] for each name of the pack's, beside the example's tokens as its loss weights are. experts:
        ints [n, L, k] that each token is sent to, which a pack without `shape.routing` does not hold.
        Raises ValueError for an example that does not fit an empty pack, or experts that the model cannot have.
        """
        n = len(example.tokens)
        new = list({id(m): m for m in example.media if not self.holds(m)}.values())
        places = place_items([len(m.patches) for m in new], self._bin_room)
        if n > self._row_room[row] or places is None:
            if self.documents == 0:
                raise ValueError(
                    f"example {example.key} ({n} tokens, items of {[len(m.patches) for m in example.media]} patches) "
                    f"does not fit an empty pack of {self.shape}; encode it with the limits of the pack"
                )
            return False
        if experts is not None:
            self._add_experts(experts, row, n, example.key)
        for item, (k, b) in zip(new, places, strict=True):
            self._features[id(item)] = item, self._add_item(item, k, b)
        self._add_document(example, row, [self._features[id(m)][1] for m in example.media], columns or {})
        return True

    def _add_experts(self, experts: np.ndarray, row: int, n: int, key: str) -> None:
        routing = self.shape.routing
        if routing is None:
            return
        routing.check(experts, (n, routing.num_layers, routing.experts_per_token), f"example {key}")
        start = self.shape.sequence_length - self._row_room[row]
        self.batch.routed_experts[row, :, start : start + n] = experts.swapaxes(0, 1)

    def _add_document(
        self, example: Encoded, row: int, features: list[np.ndarray], columns: Mapping[str, np.ndarray]
    ) -> None:
        n = len(example.tokens)
        start = self.shape.sequence_length - self._row_room[row]
        here, before_last = np.s_[row, start : start + n], np.s_[row, start : start + n - 1]
        self.batch.tokens[here] = example.tokens
        self.batch.targets[before_last] = example.tokens[1:]
        pads = example.tokens == self.shape.media_pad_id
        self.batch.loss_weights[before_last] = np.where(pads[1:], 0, example.loss_weights[1:])
        for name, column in self.batch.columns.items():
            column[before_last] = columns[name][1:]
        self._row_documents[row] += 1
        self.batch.segment_ids[here] = self._row_documents[row]
        self.batch.positions[here] = np.arange(n)
        self.batch.modality[here] = example.modality
        if features:
            self.batch.feature_index[here][pads] = np.concatenate(features)
        self._row_room[row] -= n
        self.documents += 1

    def _add_item(self, item: MediaItem, k: int, b: int) -> np.ndarray:
        patches = self.shape.bins[k][0]
        start = patches - self._bin_room[k][b]
        self._bin_items[k][b] += 1
        place_item(self.batch.vision[k], b, start, self._bin_items[k][b], item.patches, item.grid)
        self._bin_room[k][b] -= len(item.patches)
        first = self.shape.bin_offsets[k] + b * (patches // 4) + start // 4
        return first + np.arange(num_features(item.grid), dtype=np.int32)

    def used(self) -> dict:
        """{"tokens", "vision_tokens", "documents": int, "patches": [K] ints}: what is not padding."""
        patches = [p * v - sum(room) for (p, v), room in zip(self.shape.bins, self._bin_room, strict=True)]
        return {
            "tokens": self.shape.rows * self.shape.sequence_length - sum(self._row_room),
            "vision_tokens": int(np.count_nonzero(self.batch.feature_index >= 0)),
            "documents": self.documents,
            "patches": patches,
        }


class BufferedExample(NamedTuple):
    """An encoded example in the buffer, and what its shard needs to find it again."""

    example: Encoded
    reference: tuple


def fill_pack(
    shape: PackShape,
    buffer: list[BufferedExample],
    draw: Callable[[], list[BufferedExample]],
    buffer_size: int,
    first: Sequence[BufferedExample] = (),
    patches: float = 0.0,
) -> tuple[Pack, list[BufferedExample]]:
    """The next pack and what it holds. `buffer` (oldest first) is changed in place; `draw` yields what comes next.

    The buffer is kept at `buffer_size` examples; one draw may take it above (a long text in pieces), or yield nothing.
    Every call takes at least the oldest example, so none waits for more than `buffer_size` packs. Then come `first`
    (examples of the buffer), then others with media, into up to half of each row, until the pack holds `patches`
    patches, so that no bin stays empty because text has taken the rows; then row after row is filled as well as
    the buffer allows. More media do not go first, and rows are begun one after the other: short examples with media are
    what fills up the rows of long texts, and long texts need rows that are whole.
    """
    pack = Pack(shape)
    packed: list[BufferedExample] = []

    def take(chosen: Sequence[BufferedExample], rows: Sequence[int], least: int = 0) -> None:
        """Packs what there is room for; `least`: tokens that must be left in a row that holds something."""
        for waiting in chosen:
            left = {row: pack.room(row) - len(waiting.example.tokens) for row in rows}
            able = [r for r in rows if left[r] >= least or pack.room(r) == shape.sequence_length]
            if any(pack.add(waiting.example, row) for row in able):
                packed.append(waiting)
        held = {id(w) for w in packed}
        buffer[:] = [w for w in buffer if id(w) not in held]

    while len(buffer) < buffer_size:
        buffer += draw()
    everywhere = range(shape.rows)
    take([buffer[0]], everywhere)
    take([w for w in first if any(w is waiting for waiting in buffer)], everywhere)
    for waiting in [w for w in buffer if w.example.media]:
        if sum(len(item.patches) for w in packed for item in w.example.media) >= patches:
            break
        take([waiting], everywhere, shape.sequence_length // 2)
    refused: set[int] = set()  # no room in the bins, and there will be none before the next pack
    for row in range(shape.rows):
        while pack.room(row):
            while len(buffer) < buffer_size:
                buffer += draw()
            able = [w for w in buffer if id(w) not in refused]
            chosen = [able[i] for i in best_subset([len(w.example.tokens) for w in able], pack.room(row))]
            if not chosen:
                break
            take(chosen, [row])
            refused |= {id(w) for w in chosen if any(w is waiting for waiting in buffer)}
    return pack, packed


def best_subset(lengths: Sequence[int], room: int) -> list[int]:
    """Indices (ascending) of the lengths whose sum comes nearest to `room` from below; earlier ones are preferred.

    Bit s of `reachable` says that some subset sums to s: one shift and one `or` an item.
    """
    if sum(lengths) <= room:
        return list(range(len(lengths)))
    mask = (1 << (room + 1)) - 1
    reachable = [1]
    for length in lengths:
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
    total = reachable[-1].bit_length() - 1
    chosen = []
    for i in reversed(range(len(lengths))):
        if not reachable[i] >> total & 1:
            chosen.append(i)
            total -= lengths[i]
    return chosen[::-1]


def empty_batch(shape: PackShape, num_packs: int = 1, columns: Sequence[str] = ()) -> PackedBatch:
    """A batch of padding only, `num_packs` packs: what shapes and dtypes a run has."""
    return concatenate([Pack(shape, columns).batch for _ in range(num_packs)])


@dataclass(frozen=True)
class PackedDocument:
    """One document read back from a batch: where it lies, and what the model sees of it.

    tokens, targets int32 [n], loss_weights float32 [n] (of predicting each *target*), positions int32 [n];
    media: items with patches in released raster order, places: (class, bin) of each, bins counted over the batch.
    """

    row: int
    start: int
    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    modality: int
    media: tuple[MediaItem, ...]
    places: tuple[tuple[int, int], ...]


def unpack(batch: PackedBatch) -> Iterator[PackedDocument]:
    """The documents of a batch, row by row: the inverse of packing, for tests and for looking at a batch."""
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, int(segments.max()) + 1):
            where = np.flatnonzero(segments == segment)
            index = batch.feature_index[row][where]
            media, places = _media_of(batch, row // batch.rows_per_pack, index[index >= 0])
            yield PackedDocument(
                row,
                int(where[0]),
                batch.tokens[row][where],
                batch.targets[row][where],
                batch.loss_weights[row][where],
                batch.positions[row][where],
                int(batch.modality[row][where[0]]),
                media,
                places,
            )


def _media_of(
    batch: PackedBatch, pack: int, features: np.ndarray
) -> tuple[tuple[MediaItem, ...], tuple[tuple[int, int], ...]]:
    media, places = [], []
    at = 0
    while at < len(features):
        k, b, window = _locate(batch, pack, int(features[at]))
        bins = batch.vision[k]
        t, h, w = (int(x) for x in bins.grids[b, 4 * window])
        grid = (t, h, w)
        order, _, _ = item_layout(grid)
        patches = np.empty((len(order), bins.patches.shape[-1]), bins.patches.dtype)
        patches[order] = bins.patches[b, 4 * window : 4 * window + len(order)]
        media.append(MediaItem(patches, grid))
        places.append((k, b))
        at += num_features(grid)
    return tuple(media), tuple(places)


def _locate(batch: PackedBatch, pack: int, feature: int) -> tuple[int, int, int]:
    for k, bins in enumerate(batch.vision):
        count, windows = len(bins.feature_slots) // batch.num_packs, bins.feature_slots.shape[1]
        if feature < count * windows:
            return k, pack * count + feature // windows, feature % windows
        feature -= count * windows
    raise ValueError(f"feature index {feature} lies beyond the bins of pack {pack}")

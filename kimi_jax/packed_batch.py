"""The packed batch: what the data pipeline, rollouts and evaluation make, and what a model and a training step read.

The one description of its layout. Arrays are NumPy on the host and jax.Array on devices; `kimi_jax.nn.kimi` registers
`PackedBatch` as a pytree, so `jax.tree.map`, `jit` and `scan` take it. Axis 0 of every array runs over whole packs, so
batches are concatenated, sharded over devices and divided into microbatches along it, and each part still knows its
packs. How documents get there is `kimi_jax.data.packing`.

G packs   R rows a pack   B = G*R rows   S tokens of a row   L MoE layers   k experts of a token
V bins of a class (a multiple of G)   P patches of a bin   W = P/4 windows, one feature each   C = 3 * patch_size^2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class VisionBins(NamedTuple):
    """The bins of one class: images and video chunks, each a span of one bin, window by window (`data.patches`)."""

    patches: Any  # [V, P, C] uint8 as in the image, or floats already in [-1, 1]; 0 where nothing lies
    segment_ids: Any  # int32 [V, P], 1.. for the items of a bin, 0 for padding
    coords: Any  # int32 [V, P, 3], (t, y, x) of each patch in its item
    grids: Any  # int32 [V, P, 3], (t, h, w) of each patch's item; (1, 2, 2) for padding
    feature_slots: Any  # int32 [V, W], the slot of each window's feature in its bin; W (none) for padding


@dataclass(frozen=True)
class PackedBatch:
    """A whole number of packs: their rows of tokens, and beside them the vision bins of the items in those rows.

    A document is a span of one row. What stands at a position is about the token there, except for `loss_weights` and
    `columns`, which are about its target: the next token of the document.

    vision: a class of bins each, ascending in P; () without vision. Features of a pack are numbered class by class, bin
    by bin, slot by slot: that is what `feature_index` counts.
    columns: what an objective reads beside the loss weights (`train.objective`), by name.
    routed_experts: the experts that tokens are sent to; -1 in place of all k lets the router choose. None: everywhere.
    """

    tokens: Any  # int32 [B, S]
    targets: Any  # int32 [B, S], the next token of the document; the pad id at its end
    loss_weights: Any  # float32 [B, S], of predicting the target; 0 at the end and for media pads
    segment_ids: Any  # int32 [B, S], 1.. for the documents of a row, 0 for padding
    positions: Any  # int32 [B, S], from 0 in each document
    modality: Any  # int32 [B, S], of the document: 0 text only, 1 with images, 2 with video
    feature_index: Any  # int32 [B, S], the feature of the pack in place of a media pad, -1 for other tokens
    rows_per_pack: int = field(metadata={"static": True})
    vision: tuple[VisionBins, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)  # float32 [B, S] each
    routed_experts: Any = None  # int32 [B, L, S, k]

    @property
    def num_packs(self) -> int:
        """G."""
        return self.tokens.shape[0] // self.rows_per_pack

    def as_dict(self) -> dict[str, Any]:
        """Plain containers of the very arrays, for what stores or sends trees that it does not know the types of."""
        vision = [bins._asdict() for bins in self.vision]
        return {**vars(self), "vision": vision, "columns": dict(self.columns)}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> PackedBatch:
        """The inverse of `as_dict`."""
        return cls(**{**tree, "vision": tuple(VisionBins(**bins) for bins in tree["vision"])})


def padding(
    rows: int, length: int, rows_per_pack: int, pad_id: int, bins: Sequence[VisionBins] = (),
    columns: Sequence[str] = (), routing: tuple[int, int] | None = None,
) -> PackedBatch:  # fmt: skip
    """A batch in which nothing lies: what every host batch begins as. `columns`: names; routing: (L, k)."""

    def ints(value: int) -> np.ndarray:
        return np.full((rows, length), value, np.int32)

    def floats() -> np.ndarray:
        return np.zeros((rows, length), np.float32)

    return PackedBatch(
        tokens=ints(pad_id), targets=ints(pad_id), loss_weights=floats(), segment_ids=ints(0), positions=ints(0),
        modality=ints(0), feature_index=ints(-1), rows_per_pack=rows_per_pack, vision=tuple(bins),
        columns={name: floats() for name in columns},
        routed_experts=None if routing is None else np.full((rows, routing[0], length, routing[1]), -1, np.int32),
    )  # fmt: skip


def empty_bins(count: int, patches: int, channels: int, dtype: Any = np.uint8) -> VisionBins:
    """`count` bins of one class in which nothing lies: V = count, P = patches, C = channels."""
    return VisionBins(
        patches=np.zeros((count, patches, channels), dtype),
        segment_ids=np.zeros((count, patches), np.int32),
        coords=np.zeros((count, patches, 3), np.int32),
        grids=np.tile(np.array([1, 2, 2], np.int32), (count, patches, 1)),
        feature_slots=np.full((count, patches // 4), patches // 4, np.int32),
    )


def map_arrays(function: Callable[..., Any], *batches: PackedBatch) -> PackedBatch:
    """The batch of function(*arrays), the arrays being those of the same name. All batches have the same fields."""
    trees = [batch.as_dict() for batch in batches]

    def walk(*values: Any) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {name: walk(*(value[name] for value in values)) for name in first}
        if isinstance(first, list):
            return [walk(*each) for each in zip(*values, strict=True)]
        return first if first is None or isinstance(first, int) else function(*values)

    return PackedBatch.from_dict(walk(*trees))


def concatenate(batches: Sequence[PackedBatch]) -> PackedBatch:
    """The packs of several host batches, one behind the other."""
    return batches[0] if len(batches) == 1 else map_arrays(lambda *arrays: np.concatenate(arrays), *batches)

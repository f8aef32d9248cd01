"""Small packed batches for the model's tests, laid out by hand from the written contract (not by the packer).

A document is a list of spans: an int array of text tokens, or (pixels, grid) for one image or video chunk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kimi_jax.config import ModelConfig
from kimi_jax.data.patches import item_layout, num_features
from kimi_jax.packed_batch import PackedBatch, VisionBins

Grid = tuple[int, int, int]


def pixels(rng: np.random.Generator, grid: Grid, config: ModelConfig) -> np.ndarray:
    """Random bytes of an item in released raster order: uint8 [t*h*w, C]."""
    return rng.integers(0, 256, (math.prod(grid), 3 * config.vision.patch_size**2), dtype=np.uint8)


def fill_bins(
    items: list[list[tuple[np.ndarray, Grid]]], patches: int, channels: int
) -> tuple[VisionBins, list[list[int]]]:
    """One bin class: `items[v]` go into bin v. Returns the bins and the first slot of each item in its bin."""
    bins, windows = len(items), patches // 4
    out = {
        "patches": np.zeros((bins, patches, channels), items[0][0][0].dtype if items and items[0] else np.uint8),
        "segment_ids": np.zeros((bins, patches), np.int32),
        "coords": np.zeros((bins, patches, 3), np.int32),
        "grids": np.tile(np.array([1, 2, 2], np.int32), (bins, patches, 1)),
        "feature_slots": np.full((bins, windows), windows, np.int32),
    }
    first = []
    for v, content in enumerate(items):
        start, starts = 0, []
        for number, (pixel, grid) in enumerate(content, 1):
            order, coords, slots = item_layout(grid)
            place = slice(start, start + len(order))
            out["patches"][v, place], out["coords"][v, place] = pixel[order], coords
            out["segment_ids"][v, place], out["grids"][v, place] = number, grid
            out["feature_slots"][v, start // 4 : place.stop // 4] = start // 4 + slots
            starts.append(start // 4)
            start = place.stop
        assert start <= patches, f"bin {v} holds {start} patches, more than {patches}"
        first.append(starts)
    return VisionBins(**out), first


def pack(
    config: ModelConfig, rows: list[list[list[Any]]], length: int, bin_patches: int, bins: int, groups: int = 1
) -> PackedBatch:
    """A batch of one bin class. rows[b] is a list of documents; a media span is (pixels, grid).

    Items fill the group's bins first fit in order of appearance.
    """
    count = len(rows)
    names = ("tokens", "targets", "segment_ids", "positions", "modality")
    batch: dict[str, Any] = {name: np.zeros((count, length), np.int32) for name in names}
    batch["tokens"] += config.pad_token_id
    batch["targets"] += config.pad_token_id
    batch["feature_index"] = np.full((count, length), -1, np.int32)
    batch["loss_weights"] = np.zeros((count, length), np.float32)
    content: list[list] = [[] for _ in range(groups * bins)]
    for b, documents in enumerate(rows):
        group, at = b // (count // groups), 0
        for number, spans in enumerate(documents, 1):
            start = at
            for span in spans:
                if isinstance(span, tuple):
                    n = num_features(span[1])
                    size = math.prod(span[1])
                    used = [sum(math.prod(g) for _, g in content[group * bins + v]) for v in range(bins)]
                    v = next(v for v in range(bins) if used[v] + size <= bin_patches)
                    slot = (v * bin_patches + used[v]) // 4
                    content[group * bins + v].append(span)
                    batch["feature_index"][b, at : at + n] = slot + np.arange(n)
                    batch["tokens"][b, at : at + n] = config.media_placeholder_token_id
                else:
                    n = len(span)
                    batch["tokens"][b, at : at + n] = span
                at += n
            assert at <= length, f"row {b} holds {at} tokens, more than {length}"
            batch["segment_ids"][b, start:at] = number
            batch["positions"][b, start:at] = np.arange(at - start)
            batch["targets"][b, start : at - 1] = batch["tokens"][b, start + 1 : at]
            real = batch["targets"][b, start : at - 1] != config.media_placeholder_token_id
            batch["loss_weights"][b, start : at - 1] = real
    channels = 3 * config.vision.patch_size**2
    vision = (fill_bins(content, bin_patches, channels)[0],)
    return PackedBatch(**batch, rows_per_pack=count // groups, vision=vision)

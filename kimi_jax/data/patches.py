"""Where each patch of an item goes: the layout that makes the 2x2 merge a reshape and the time mean a segment mean.

Released order is raster per frame (docs/released_model.md section 2). Ours keeps frames in order, but inside a frame
walks 2x2 windows in raster order, and the four patches of a window row by row. So patches 4j..4j+3 of an item are one
window, and window j of every frame has the same slot.

t, h, w   grid of an item in patches (h and w even)
N = t*h*w patches;  N/4 windows;  h*w/4 slots (features that the item yields)
"""

from __future__ import annotations

import functools

import numpy as np

from kimi_jax.packed_batch import VisionBins

Grid = tuple[int, int, int]


@functools.lru_cache(maxsize=4096)
def item_layout(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How to lay out one item.

    Returns (read-only int32 arrays):
      order [N]: index into the released raster order of the patch that stands at each place,
      coords [N, 3]: (t, y, x) of each place,
      slots [N/4]: slot of each window, 0 .. h*w/4 - 1, the same for every frame.
    Raises ValueError for an empty grid or odd h or w.
    """
    t, h, w = grid
    if t < 1 or h < 2 or w < 2 or h % 2 or w % 2:
        raise ValueError(f"grid {grid}: needs t >= 1 and even h, w >= 2")
    raster = np.arange(t * h * w, dtype=np.int32).reshape(t, h // 2, 2, w // 2, 2)
    order = raster.transpose(0, 1, 3, 2, 4).reshape(-1)
    coords = np.stack(np.unravel_index(order, (t, h, w)), axis=-1).astype(np.int32)
    slots = np.tile(np.arange(h * w // 4, dtype=np.int32), t)
    for a in (order, coords, slots):
        a.setflags(write=False)
    return order, coords, slots


def place_item(bins: VisionBins, index: int, start: int, number: int, patches: np.ndarray, grid: Grid) -> None:
    """Writes an item (patches [N, C] in released order) into bin `index` from patch `start`, as its item `number`."""
    order, coords, slots = item_layout(grid)
    here = np.s_[index, start : start + len(order)]
    np.take(patches, order, axis=0, out=bins.patches[here])
    bins.segment_ids[here] = number
    bins.coords[here] = coords
    bins.grids[here] = grid
    bins.feature_slots[index, start // 4 : (start + len(order)) // 4] = start // 4 + slots


def num_features(grid: Grid) -> int:
    """Language-model tokens that an item of this grid takes: one for each 2x2 window, whatever t."""
    return grid[1] * grid[2] // 4

"""Sample packs as a figure: rows as bars of segments with their text, and the bins beside them with their images.

Everything is drawn from the batch itself, not from the examples: what is wrong in the batch is wrong in the figure.

S   tokens of a row;  P patches of a bin;  p = patch_size;  C = 3*p*p
"""

import math
import textwrap
import warnings
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.config import TrainConfig
from kimi_jax.data.patches import item_layout
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.packed_batch import PackedBatch, VisionBins

# text only, with images, with video: a light and a darker shade each, so that neighbours differ (Okabe-Ito hues)
SHADES = (("#cfe3f3", "#b3d0ea"), ("#fde2c0", "#f9cf9a"), ("#c9ead9", "#a9dcc4"))
EDGES = ("#2f6ea5", "#c46a00", "#00805a")
NAMES = ("text only", "with images", "with video")
PADDING = "#f2f2f2"
LEARNED = "#333333"
WIDTH, LEFT = 17.0, 0.6  # inches: the figure, and where the bars begin
BAR = WIDTH - LEFT - 0.2
ROW, BIN, GAP = 0.8, 1.2, 0.3  # inches: a row, a line of bins, between packs
FONT = 5.8  # points


class DrawnItem(NamedTuple):
    """One image or video chunk in a bin."""

    start: int  # first patch
    grid: tuple[int, int, int]
    frames: np.ndarray  # uint8 [t, h*p, w*p, 3]


def items_of(bins: VisionBins, index: int) -> list[DrawnItem]:
    """The items of bin `index`, in order, their pixels put together again from the patches (uint8 or [-1, 1])."""
    segments, grids, patches = bins.segment_ids[index], bins.grids[index], bins.patches[index]
    items = []
    for segment in range(1, int(segments.max(initial=0)) + 1):
        where = np.flatnonzero(segments == segment)
        t, h, w = grids[where[0]].tolist()
        items.append(DrawnItem(int(where[0]), (t, h, w), _frames(patches[where], (t, h, w))))
    return items


def _frames(patches: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    t, h, w = grid
    p = math.isqrt(patches.shape[1] // 3)
    if patches.dtype != np.uint8:
        patches = np.clip((patches + 1) * 127.5, 0, 255).astype(np.uint8)
    raster = np.empty_like(patches)
    raster[item_layout(grid)[0]] = patches
    return raster.reshape(t, h, w, 3, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(t, h * p, w * p, 3)


def draw(config: TrainConfig, batch: PackedBatch, tokenizer: Tokenizer, packs: int, out: str) -> None:
    """Draws the first packs of a batch into the file `out`. Raises OSError, and ValueError for an unknown format."""
    from matplotlib.figure import Figure  # a second to import, and only this function needs it

    data = config.data
    packs = min(packs, batch.num_packs)
    rows, bins = data.rows_per_pack, data.vision_bins if batch.vision else ()
    lines = [_bin_lines(patches, count, bins) for patches, count in bins]
    height = packs * (rows * ROW + sum(lines) * BIN + GAP)
    figure = Figure(figsize=(WIDTH, height + 1.0), dpi=110, facecolor="white")
    _title(figure, config)
    top = height + 0.1
    for g in range(packs):
        top = _draw_pack(figure, batch, tokenizer, g, rows, bins, lines, top)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks shows as boxes
        figure.savefig(out)


def _bin_lines(patches: int, count: int, bins: tuple) -> int:
    """Lines that the bins of a class take, those of the largest class being as wide as the figure."""
    return -(-count // (bins[-1][0] // patches))


def _axes(figure: Any, top: float, height: float, left: float = LEFT, width: float = BAR) -> Any:
    """Axes by inches from the bottom of the figure."""
    total = figure.get_size_inches()[1]
    axes = figure.add_axes((left / WIDTH, (top - height) / total, width / WIDTH, height / total))
    axes.set_axis_off()
    return axes


def _title(figure: Any, config: TrainConfig) -> None:
    from matplotlib.patches import Patch

    d = config.data
    total = figure.get_size_inches()[1]
    text = f"The first packs of the run: rows of {d.sequence_length:,} tokens"
    if d.vision_bins and config.model.vision:
        text += ", bins of " + " and ".join(f"{p:,}" for p, _ in d.vision_bins) + " patches"
    figure.text(LEFT / WIDTH, 1 - 0.32 / total, text, fontsize=13, weight="bold", va="center")
    handles = [Patch(facecolor=SHADES[m][1], edgecolor=EDGES[m], label=f"document {NAMES[m]}") for m in range(3)]
    handles += [
        Patch(facecolor="white", edgecolor="#666666", hatch="////", label="media tokens"),
        Patch(facecolor=LEARNED, label="predicting this token counts"),
        Patch(facecolor=PADDING, edgecolor="#bbbbbb", label="padding"),
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.5 / WIDTH, 1 - 0.42 / total), ncols=6, frameon=False
    )


def _draw_pack(
    figure: Any, batch: PackedBatch, tokenizer: Tokenizer, g: int, rows: int, bins: tuple, lines: list[int], top: float
) -> float:
    """Draws pack g below `top` (inches) and returns where the next one begins."""
    total = figure.get_size_inches()[1]
    users: dict[int, tuple] = {}
    for r in range(g * rows, (g + 1) * rows):
        figure.text(0.1 / WIDTH, (top - 0.35) / total, f"row\n{r}", fontsize=8, va="center", color="#444444")
        users |= _draw_row(_axes(figure, top, ROW - 0.1), batch, tokenizer, r)
        top -= ROW
    first_feature = 0
    for k, (patches, count) in enumerate(bins):
        figure.text(0.1 / WIDTH, (top - 0.5) / total, f"bins\n{patches}", fontsize=8, va="center", color="#444444")
        beside = bins[-1][0] // patches
        width = BAR * patches / bins[-1][0]
        for b in range(count):
            line, place = divmod(b, beside)
            axes = _axes(figure, top - line * BIN, BIN - 0.12, LEFT + place * width, width - 0.06)
            _draw_bin(axes, batch.vision[k], g * count + b, width, users, first_feature, rows)
            first_feature += patches // 4
        top -= lines[k] * BIN
    return top - GAP


# ---------------------------------------------------------------------------------------------------------------- rows


def _draw_row(axes: Any, batch: PackedBatch, tokenizer: Tokenizer, row: int) -> dict[int, tuple]:
    """Draws one row. Returns, by feature of the pack, (modality, document, row) of who uses it."""
    from matplotlib.patches import Rectangle

    tokens, segments, features = batch.tokens[row], batch.segment_ids[row], batch.feature_index[row]
    weights, modality = batch.loss_weights[row], batch.modality[row]
    length = len(tokens)
    axes.set_xlim(0, length)
    axes.set_ylim(0, 1)
    axes.add_patch(Rectangle((0, 0.12), length, 0.88, facecolor=PADDING, edgecolor="#bbbbbb", lw=0.5))
    users: dict[int, tuple] = {}
    for start, end in _runs(segments):
        if not segments[start]:
            continue
        m, shade = int(modality[start]), int(segments[start]) % 2
        face = SHADES[m][shade]
        axes.add_patch(Rectangle((start, 0.12), end - start, 0.88, facecolor=face, edgecolor=EDGES[m], lw=0.8))
        for a, b in _runs(features[start:end] >= 0):
            a, b = a + start, b + start
            if features[a] >= 0:
                style: dict[str, Any] = {
                    "facecolor": "white",
                    "alpha": 0.55,
                    "edgecolor": EDGES[m],
                    "hatch": "////",
                    "lw": 0,
                }
                axes.add_patch(Rectangle((a, 0.12), b - a, 0.88, **style))
                _number(axes, int(segments[start]), a, b, length)
                users |= {int(f): (m, int(segments[start]), row) for f in features[a:b]}
            else:
                _write(axes, tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=True), a, b, length)
    # weights[i] is that of predicting token i + 1: shown under the token that is predicted
    for start, end in _runs(weights > 0):
        if weights[start] > 0:
            axes.add_patch(Rectangle((start + 1, 0), end - start, 0.07, facecolor=LEARNED, lw=0))
    return users


def _number(axes: Any, document: int, start: int, end: int, length: int) -> None:
    """The number of a document on its media tokens: its images in the bins carry the same one."""
    if (end - start) / length * BAR > 0.1:
        style = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        where = {"ha": "center", "va": "center", "fontsize": 7, "weight": "bold", "color": "#222222"}
        axes.text((start + end) / 2, 0.56, str(document), bbox=style, **where)


def _write(axes: Any, text: str, start: int, end: int, length: int) -> None:
    """As much of the text as fits between the tokens start and end."""
    inches = (end - start) / length * BAR - 0.06
    columns = int(inches / (FONT / 72 * 0.605))
    if columns < 2:
        return
    # matplotlib reads $...$ as formulas
    clean = " ".join(text.replace("$", "\\$").split())
    lines = textwrap.wrap(clean, columns, max_lines=6, placeholder="…") if columns > 3 else [clean[:columns]]
    x = start + 0.03 * length / BAR
    axes.text(x, 0.96, "\n".join(lines), fontsize=FONT, family="monospace", va="top", linespacing=1.05, clip_on=True)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of the runs of equal values."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(values)], strict=True))


# ---------------------------------------------------------------------------------------------------------------- bins


def _draw_bin(
    axes: Any, bins: VisionBins, index: int, width: float, users: dict[int, tuple], first_feature: int, rows: int
) -> None:
    """Draws one bin, `width` inches wide: each item a frame over the patches it takes, its images inside."""
    from matplotlib.patches import Rectangle

    length = bins.segment_ids.shape[1]
    axes.set_xlim(0, length)
    axes.set_ylim(0, 1)
    axes.add_patch(Rectangle((0, 0), length, 1, facecolor=PADDING, edgecolor="#bbbbbb", lw=0.5))
    items = items_of(bins, index)
    if not items:
        axes.text(length / 2, 0.5, "empty", fontsize=8, ha="center", va="center", color="#999999")
    for item in items:
        t, h, w = item.grid
        count = t * h * w
        feature = first_feature + int(bins.feature_slots[index, item.start // 4])
        m, document, row = users.get(feature, (0, 0, -1))
        face, edge = SHADES[m][document % 2], EDGES[m]
        axes.add_patch(Rectangle((item.start, 0), count, 1, facecolor=face, edgecolor=edge, lw=1.0))
        _inline(axes, item, item.start, count, length / width)
        label = f"{t}×{h}×{w}"
        name = f"{document}" if rows == 1 else f"row {row}, {document}"
        if count / length * width > 0.35:
            axes.text(item.start + count / 2, 0.025, label, fontsize=6.5, ha="center", color="#222222")
        corner = {"fontsize": 7, "weight": "bold", "va": "top", "color": "#222222", "zorder": 4}
        style = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        axes.text(item.start + 0.06 * length / width, 0.94, name, bbox=style, **corner)


def _inline(axes: Any, item: DrawnItem, start: int, count: int, per_inch: float) -> None:
    """The frames of an item beside each other, true to shape and as large as its span allows."""
    t, height, width = item.frames.shape[:3]
    bottom, tall = 0.14, 0.82  # of the bar's height
    scale = min((count / per_inch - 0.06) / (t * width), tall * (BIN - 0.12) / height)  # inches a pixel
    across, up = scale * width * per_inch, scale * height / (BIN - 0.12)
    room = (count - t * across) / (t + 1)
    y = bottom + (tall - up) / 2
    limits = axes.get_xlim()
    for i, frame in enumerate(item.frames):
        x = start + room + i * (across + room)
        axes.imshow(frame, extent=(x, x + across, y, y + up), aspect="auto", interpolation="nearest", zorder=3)
    axes.set_xlim(limits)
    axes.set_ylim(0, 1)

"""The loss mask over the text: documents of a batch token by token, with what is learned of them marked.

Everything is drawn from the batch itself, not from the examples. A token whose prediction counts has a coloured ground,
the deeper the larger its weight; a given one has none. Special tokens are bold, media pads are counted.

n   tokens of a document
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kimi_jax.data.packing import PackedDocument, unpack
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.packed_batch import PackedBatch

COLUMNS, MOST_LINES = 150, 40  # characters of a line, lines of a document
FONT = 7.0  # points
ACROSS, DOWN = FONT / 72 * 0.602, FONT / 72 * 1.75  # inches of a character of DejaVu Sans Mono, and of a line
MARGIN, HEAD = 0.3, 0.9  # inches
LEARNED, GIVEN, SPECIAL = "#f2a33c", "#555555", "#1f4e79"


class StyledSpan(NamedTuple):
    """Characters of one line in one style. weight: of predicting the tokens they belong to."""

    text: str
    weight: float
    special: bool


def pieces_of(document: PackedDocument, tokenizer: Tokenizer) -> Iterator[StyledSpan]:
    """The text of a document, special tokens by name, runs of pads as their number. Line ends show as ⏎ and remain."""
    # loss_weights[i] is that of predicting token i + 1; nothing predicts the first one
    weights = np.concatenate([[0.0], document.loss_weights[:-1]])
    kinds = [_kind(int(token), tokenizer) for token in document.tokens]
    for (kind, weight), group in itertools.groupby(range(len(kinds)), key=lambda i: (kinds[i], float(weights[i]))):
        ids = document.tokens[list(group)]
        if kind == "pad":
            yield StyledSpan(f"[{len(ids)} media tokens]", weight, True)
        elif kind == "special":
            yield from (StyledSpan(tokenizer.decode([int(token)]), weight, True) for token in ids)
        else:
            yield StyledSpan(tokenizer.decode(ids.tolist()).replace("\n", "⏎\n"), weight, False)


def _kind(token: int, tokenizer: Tokenizer) -> str:
    if token == tokenizer.media_pad_id:
        return "pad"
    return "text" if tokenizer.token_bytes([token]) else "special"


def lines_of(pieces: Sequence[StyledSpan], columns: int = COLUMNS) -> list[list[StyledSpan]]:
    """Pieces broken into lines of at most `columns` characters, and where a text has a line end."""
    lines: list[list[StyledSpan]] = [[]]
    room = columns
    for piece in pieces:
        for number, text in enumerate(piece.text.split("\n")):
            if number:
                lines.append([])
                room = columns
            while text:
                if not room or (piece.special and room < len(text) <= columns):  # a name stays in one piece
                    lines.append([])
                    room = columns
                lines[-1].append(piece._replace(text=text[:room]))
                text, room = text[room:], room - len(text[:room])
    return lines


def draw_text(batch: PackedBatch, tokenizer: Tokenizer, documents: int, out: str) -> int:
    """Draws the first documents of a batch into the file `out`; returns how many.

    Raises OSError, and ValueError for an unknown format.
    """
    from matplotlib import rc_context  # a second to import, and only this function needs it
    from matplotlib.figure import Figure

    chosen = list(itertools.islice(unpack(batch), documents))
    texts = [lines_of(list(pieces_of(document, tokenizer))) for document in chosen]
    height = HEAD + sum((min(len(lines), MOST_LINES) + 2) * DOWN for lines in texts) + MARGIN
    width = COLUMNS * ACROSS + 2 * MARGIN
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # inches from the top
    axes.set_axis_off()
    _head(axes, max(float(document.loss_weights.max(initial=0)) for document in chosen))
    top = HEAD
    for document, lines in zip(chosen, texts, strict=True):
        top = _draw_document(axes, document, lines, top, width)
    with warnings.catch_warnings(), rc_context({"text.hinting": "none"}):  # hinted characters are of whole pixels
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks shows as boxes
        figure.savefig(out)
    return len(chosen)


def _head(axes: Any, largest: float) -> None:
    axes.text(MARGIN, 0.3, "What is learned", fontsize=13, weight="bold", va="center")
    x = MARGIN
    for text, weight, special in (
        ("learned", 1.0, False), ("given", 0.0, False), ("special token, learned", 1.0, True),
        ("special token, given", 0.0, True),
    ):  # fmt: skip
        _write(axes, StyledSpan(text, weight, special), x, 0.62, 1.0)
        x += (len(text) + 3) * ACROSS
    axes.text(x, 0.62, f"largest weight here: {largest:g}", fontsize=FONT, va="center", color=GIVEN)


def _draw_document(
    axes: Any, document: PackedDocument, lines: list[list[StyledSpan]], top: float, width: float
) -> float:
    """Draws a document below `top` (inches) and returns where the next one begins."""
    learned = int((document.loss_weights > 0).sum())
    title = f"row {document.row}, token {document.start}: {len(document.tokens)} tokens, {learned} of them learned"
    axes.plot([MARGIN, width - MARGIN], [top, top], color="#cccccc", lw=0.6)
    axes.text(MARGIN, top + 0.5 * DOWN, title, fontsize=FONT, va="center", color=GIVEN, style="italic")
    largest = max(float(document.loss_weights.max(initial=0)), 1e-9)
    for line in lines[:MOST_LINES]:
        top += DOWN
        x = MARGIN
        for piece in line:
            _write(axes, piece, x, top + 0.5 * DOWN, piece.weight / largest)
            x += len(piece.text) * ACROSS
    if len(lines) > MOST_LINES:
        axes.text(width - MARGIN, top + 0.5 * DOWN, f"... {len(lines) - MOST_LINES} lines more", fontsize=FONT,
                  va="center", ha="right", backgroundcolor="white")  # fmt: skip
    return top + 2 * DOWN


def _write(axes: Any, piece: StyledSpan, x: float, y: float, share: float) -> None:
    """share: of the largest weight of the document."""
    from matplotlib.patches import Rectangle

    if piece.weight > 0:
        size = len(piece.text) * ACROSS, 0.9 * DOWN
        axes.add_patch(Rectangle((x, y - 0.45 * DOWN), *size, facecolor=LEARNED, alpha=0.25 + 0.5 * share, lw=0))
    colour = SPECIAL if piece.special else "#111111" if piece.weight > 0 else GIVEN
    # matplotlib reads $...$ as formulas
    axes.text(x, y, piece.text.replace("$", "\\$"), fontsize=FONT, family="monospace", va="center", color=colour,
              weight="bold" if piece.special else "normal")  # fmt: skip

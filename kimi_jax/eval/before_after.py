"""Pages about two models: the same questions before and after training, in one HTML file with its images inside.

What SFT (`kimi_jax.eval.conversations`) and reinforcement learning (`kimi_jax.rl.page`) have changed is shown in the
same way. Text of models and data is escaped; images are uint8 [h, w, 3].
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import flags
from etils import epath
from PIL import Image as PILImage

from kimi_jax import cli
from kimi_jax.config import ConfigError

T = TypeVar("T")

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.35em .8em;border-bottom:1px solid #ddd;text-align:left}
.p{display:flex;gap:1em;padding:.8em 0;border-bottom:1px solid #eee}
img{width:90px;height:90px;image-rendering:pixelated;border:1px solid #ddd}
.q{color:#555}.ok{color:#00705a}.no{color:#b3401a}code{background:#f3f3f3;padding:0 .25em;margin-right:2px}
code,pre{white-space:pre-wrap}pre{margin:.4em 0;font-size:.85em}.tool{background:none;color:#777}
.low{background:#ffd9c7}.high{background:#cfe3ff}td.n{text-align:right;font-variant-numeric:tabular-nums}"""


class ShownAnswer(NamedTuple):
    """One model's answer. model: its name. note: what stands behind the answer, such as "(not ended)"."""

    model: str
    text: str
    correct: bool
    note: str = ""


def define_flags(before: str, after: str, limit: int, questions: str) -> None:
    """--before, --after, --out and --limit. questions: what is limited, for the help."""
    flags.DEFINE_string("before", before, "Workdir of the model before.")
    flags.DEFINE_string("after", after, "Workdir of the model after.")
    flags.DEFINE_string("out", "", "Folder of the results; default: that of --after.")
    flags.DEFINE_integer("limit", limit, questions, lower_bound=2)


def compared(argv: Sequence[str], compare: Callable[[str, str, int], T]) -> T:
    """What `compare(before, after, limit)` says of the models of the command line.

    Ends the process with a message and status 1 for arguments that are no flags, and folders that are no workdirs.
    """
    f = flags.FLAGS
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    cli.enable_compilation_cache()
    try:
        return compare(f.before, f.after, f.limit)
    except (ConfigError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def document(title: str, heading: str, body: str) -> str:
    """The whole page. body: HTML."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(heading)}</h1>{body}</html>"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """Cells are texts, or numbers, which are shown with three digits."""
    lines = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(name)}' for name in columns)}</tr>{lines}</table>"


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}"
    return f"<td class=n>{value}" if isinstance(value, int) else f"<td class=n>{value:.3f}"


def question(images: Sequence[np.ndarray], text: str, gold: str, body: str) -> str:
    """A question with its images and right answer, and HTML below it."""
    return (
        f"<div class=p>{''.join(map(image_tag, images))}<div>"
        f"<div class=q>{html.escape(text)} ({html.escape(gold)})</div>{body}</div></div>"
    )


def answers(shown: Iterable[ShownAnswer]) -> str:
    """A line for each."""
    return "".join(
        f"<div class={'ok' if a.correct else 'no'}>{html.escape(a.model)}: "
        f"<code>{html.escape(a.text) or '&nbsp;'}</code>{html.escape(a.note)}</div>"
        for a in shown
    )


def image_tag(pixels: np.ndarray) -> str:
    """The image inside the page."""
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def write(folder: str, name: str, numbers: Any, page: str) -> epath.Path:
    """FOLDER/NAME.json and FOLDER/NAME.html; the path of the page."""
    out = epath.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(numbers, indent=1))
    (out / f"{name}.html").write_text(page)
    return out / f"{name}.html"

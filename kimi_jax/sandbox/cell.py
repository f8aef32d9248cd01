"""Runs cells in one namespace and collects what they show: printed text, images, the value of the last expression.

This runs inside the sandbox beside code that may rewrite all of it, so nothing here is a wall: bounds are kept so that
an honest reply fits, and the parent checks them again.

h, w  height and width of an image; images are uint8 [h, w, 3]
"""

from __future__ import annotations

import ast
import io
import linecache
import signal
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

SMALLEST_IMAGE = 16  # a two-dimensional uint8 array below this on a side is a table of numbers
REPEAT_SECONDS = 0.25  # an interrupt that the cell swallowed comes again
TRACEBACK_CHARS = 4000


class CellTimeout(BaseException):
    """Raised in a cell whose time is over. Not an Exception, so that `except Exception` lets it pass."""


class Shown:
    """What a cell has shown so far, in its order: {"text": str} and {"image": [h, w]}, and the images' pixels."""

    def __init__(self, limits: dict[str, Any]):
        self._chars, self._images, self._pixels = (
            limits["output_chars"], limits["output_images"], limits["output_image_pixels"]
        )  # fmt: skip
        self.parts: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self._dropped = 0

    def text(self, text: str) -> None:
        """Adds printed text; what is over the limit is counted instead."""
        kept = text[: self._chars]
        self._chars -= len(kept)
        self._dropped += len(text) - len(kept)
        if kept and self.parts and "text" in self.parts[-1]:
            self.parts[-1]["pieces"].append(kept)
        elif kept:
            self.parts.append({"text": "", "pieces": [kept]})

    def image(self, pixels: Any) -> None:
        """Adds an image, uint8 [h, w, 3], or says in words why not."""
        height, width = pixels.shape[:2]
        if self._images < 1 or height * width > self._pixels:
            self.text(f"[an image of {width}x{height} pixels is not shown: too many or too large]\n")
            return
        self._images -= 1
        self._pixels -= height * width
        self.parts.append({"image": [height, width]})
        self.bodies.append(pixels.tobytes())

    def reserve(self, chars: int) -> None:
        """Keeps room for that much text to come."""
        self._chars = max(self._chars, chars)

    def finish(self) -> tuple[list[dict[str, Any]], bytes]:
        """All parts, and the pixels of all images."""
        parts = [{"text": "".join(p["pieces"])} if "text" in p else p for p in self.parts]
        if self._dropped:
            parts.append({"text": f"\n[{self._dropped} more characters are not shown]"})
        return parts, b"".join(self.bodies)


class _Stream(io.TextIOBase):
    """`sys.stdout` of a cell."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._write(str(text))
        return len(text)


class Interpreter:
    """One namespace. limits: the fields of `limits.SandboxLimits`."""

    def __init__(self, limits: dict[str, Any]):
        self._limits = limits
        self._count = 0
        self._module = types.ModuleType("__main__")  # dataclasses and pickle look their module up
        sys.modules["__main__"] = self._module
        self._space = self._module.__dict__

    def put(self, images: list[dict[str, Any]], body: bytes) -> None:
        """Binds names to writable arrays. images: name and shape of each; body: their pixels one after another."""
        import numpy as np

        offset = 0
        for image in images:
            shape = tuple(image["shape"])
            size = int(np.prod(shape))
            pixels = np.frombuffer(body, np.uint8, size, offset).reshape(shape)
            self._space[image["name"]] = pixels.copy()
            offset += size

    def run(self, code: str, timeout: float) -> tuple[str, list[dict[str, Any]], bytes]:
        """Status (ok, error, timeout), parts and pixels. timeout: seconds."""
        shown = Shown(self._limits)

        def display(*values: Any) -> None:
            for value in values:
                _show(value, shown)

        self._space["display"] = display
        before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = _Stream(shown.text)
        status = "timeout"
        try:
            try:
                signal.signal(signal.SIGALRM, _interrupt)
                signal.setitimer(signal.ITIMER_REAL, timeout, REPEAT_SECONDS)
                status = self._execute(code, shown)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except CellTimeout:
            status = "timeout"
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        sys.stdout, sys.stderr = before
        if status == "timeout":
            shown.reserve(200)
            shown.text(f"\nTimeoutError: the cell was interrupted after {timeout:g} s; names keep their values")
        parts, body = shown.finish()
        return status, parts, body

    def _execute(self, code: str, shown: Shown) -> str:
        self._count += 1
        name = f"<cell {self._count}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            tree = ast.parse(code, name)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), self._space)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), name, "eval"), self._space)
                if value is not None:
                    self._space["_"] = value
                    _show(value, shown)
            _show_figures(shown)
        except CellTimeout:
            raise
        except BaseException as error:  # SystemExit too: a cell does not end the session
            shown.reserve(TRACEBACK_CHARS)
            shown.text(_describe(error))
            return "error"
        return "ok"


def _interrupt(number: int, frame: Any) -> None:
    raise CellTimeout


def _describe(error: BaseException) -> str:
    """The traceback from the cell on, or just the kind of an error that cannot be printed."""
    try:
        own = error.__traceback__
        while own is not None and not own.tb_frame.f_code.co_filename.startswith("<cell"):
            own = own.tb_next
        text = "".join(traceback.format_exception(type(error), error, own, limit=-10))
    except Exception:
        text = type(error).__name__
    return text if len(text) <= TRACEBACK_CHARS else f"{text[:1000]}\n...\n{text[-(TRACEBACK_CHARS - 1010) :]}"


def _show(value: Any, shown: Shown) -> None:
    pixels = _as_image(value)
    if pixels is not None:
        shown.image(pixels)
    else:
        shown.text(f"{value!r}\n")


def _as_image(value: Any) -> Any:
    """uint8 [h, w, 3] of an array or a PIL image that can be shown; None for anything else."""
    np, pil = sys.modules.get("numpy"), sys.modules.get("PIL.Image")
    figure = getattr(sys.modules.get("matplotlib.figure"), "Figure", ())
    if figure and isinstance(value, figure):
        return _draw(value)
    if pil is not None and isinstance(value, pil.Image):
        if value.mode in ("RGBA", "LA", "PA") or "transparency" in value.info:
            white = pil.new("RGBA", value.size, "white")
            value = pil.alpha_composite(white, value.convert("RGBA"))
        value = sys.modules["numpy"].asarray(value.convert("RGB"))
    if np is None or not isinstance(value, np.ndarray) or value.dtype != np.uint8 or 0 in value.shape:
        return None
    if value.ndim == 2 and min(value.shape) >= SMALLEST_IMAGE:
        return np.repeat(value[:, :, None], 3, axis=2)
    if value.ndim == 3 and value.shape[2] == 1:
        return np.repeat(value, 3, axis=2)
    if value.ndim == 3 and value.shape[2] == 4:
        return _as_image(pil.fromarray(np.ascontiguousarray(value))) if pil is not None else value[:, :, :3]
    return value if value.ndim == 3 and value.shape[2] == 3 else None


def _draw(figure: Any) -> Any:
    figure.canvas.draw()
    pixels = sys.modules["numpy"].array(figure.canvas.buffer_rgba())[:, :, :3]
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(figure)  # shown once
    return pixels


def _show_figures(shown: Shown) -> None:
    """Draws and closes the open figures of matplotlib."""
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        for number in pyplot.get_fignums():
            shown.image(_draw(pyplot.figure(number)))

"""python -m kimi_jax.sandbox: which walls hold on this machine, a self-check, and a small interpreter behind them.

  python -m kimi_jax.sandbox                       a cell ends with an empty line; images are told by their size
  echo "1 + 1" | python -m kimi_jax.sandbox        what is piped in is one cell
  python -m kimi_jax.sandbox --check               only the self-check; status 1 if an attack succeeds

--sandbox=auto takes bubblewrap, else the lock alone, else refuses; none has to be typed. --image=FILE (several times)
puts image_1, image_2, ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags

from kimi_jax import cli
from kimi_jax.config_rl import SANDBOXES
from kimi_jax.data import BadRecord
from kimi_jax.data.image import decode, open_image
from kimi_jax.sandbox.limits import SandboxError, SandboxLimits
from kimi_jax.sandbox.session import CellResult, Session
from kimi_jax.sandbox.walls import choose

# what must fail inside; each tells what would have been reached
CHECKS = {
    "start a process": "import os; os.fork()",
    "open a socket": "import socket; socket.socket()",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "list the root of the host": "import os; assert 'home' in os.listdir('/')",
    "write beside Python's files": "import os; open(os.path.join(os.path.dirname(os.__file__), 'x'), 'w')",
    "signal another process": "import os; os.kill(os.getppid() or 2**22, 0)",
    "trace a process": "import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "take more memory than allowed": "bytearray(2**40)",
}


def check(session: Session) -> list[str]:
    """Tries every entry of CHECKS; returns those that succeeded, which is bad."""
    return [what for what, code in CHECKS.items() if session.run(code).status != "error"]


def cells(typed: bool) -> Iterator[str]:
    """Cells from stdin: of a terminal those between empty lines, otherwise all of it."""
    if not typed:
        yield sys.stdin.read()
        return
    lines: list[str] = []
    while True:
        try:
            line = input("... " if lines else ">>> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def show(result: CellResult) -> None:
    """Prints texts as they are, and images by their size."""
    for part in result.parts:
        height_width = "" if isinstance(part, str) else f"[image {part.shape[1]}x{part.shape[0]}]"
        print(part if isinstance(part, str) else height_width, end="" if isinstance(part, str) else "\n")
    if result.status not in ("ok", "error"):
        print(f"\n[{result.status}]")


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_enum("sandbox", "auto", list(SANDBOXES), "Which walls; none is for code that you trust.")
    flags.DEFINE_bool("check", False, "Only the self-check.")
    flags.DEFINE_multi_string("image", [], "An image, which is put as image_1, image_2, ...")
    flags.DEFINE_float("timeout", 30.0, "Seconds of a cell.", 0.1, 86_400)


def main(argv: list[str]) -> None:
    """Exits with status 1 if the walls that were asked for do not hold, or a piped cell failed."""
    f = flags.FLAGS
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}")
    try:
        walls = choose(f.sandbox)
        start = time.perf_counter()
        session = Session(walls, SandboxLimits(timeout_seconds=f.timeout))
        milliseconds = (time.perf_counter() - start) * 1000
        images = {f"image_{i}": np.asarray(decode(open_image(name))) for i, name in enumerate(f.image, 1)}
        session.put(images)
    except (SandboxError, BadRecord, ValueError) as error:
        sys.exit(f"error: {error}")
    with session:
        broken = check(session) if walls.name != "none" else []
        verdict = f"; FAILED, the code inside could: {', '.join(broken)}" if broken else f"; {len(CHECKS)} checks hold"
        print(f"walls: {walls}{'' if walls.name == 'none' else verdict}; start {milliseconds:.0f} ms", file=sys.stderr)
        if f.check or broken:
            sys.exit(1 if broken else 0)
        result = None
        for code in cells(sys.stdin.isatty()):
            result = session.run(code)
            show(result)
    sys.exit(0 if sys.stdin.isatty() or result is None or result.status == "ok" else 1)


if __name__ == "__main__":
    sys.modules["__main__"].__doc__ = __doc__
    define_flags()
    app.run(main, flags_parser=cli.parse_plain)

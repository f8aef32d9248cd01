"""Start and latency of the sandbox beside the bare interpreter, for every wall configuration of this machine.

Run:    python -m benchmarks.sandbox [--repeats=15]
Goal:   a start below 1 s (median) with numpy and Pillow imported.

`bare start` is this Python with the same imports and no sandbox at all, started and ended; `bare call` is `exec` of the
same cell in this process. The configurations take turns, so that a busy machine slows all of them. A megapixel image
is 3 MB of uint8, in (`put`) or out (the value of a cell).
"""

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
from absl import app, flags

from kimi_jax.sandbox import walls
from kimi_jax.sandbox.limits import SandboxError
from kimi_jax.sandbox.session import PRELOAD, Session
from kimi_jax.sandbox.walls import Walls

FLAGS = flags.FLAGS
flags.DEFINE_integer("repeats", 15, "Starts of each configuration; ten times as many calls.", lower_bound=3)
CELL = "x = 1"
IMAGE = np.zeros((1000, 1000, 3), np.uint8)


def milliseconds(action: Callable[[], object]) -> float:
    """Wall time of one call of `action`."""
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def bare_start() -> float:
    """Milliseconds of a Python without site packages' start-up code that imports what a session imports."""
    program = walls.find_program(PRELOAD)
    code = f"import sys; sys.path[:0] = {list(program.path)!r}; import {', '.join(PRELOAD)}"
    return milliseconds(lambda: subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True))


def configurations() -> list[Walls]:
    """What this machine offers, strongest first."""
    found = []
    for name in ("bubblewrap", "lock", "none"):
        try:
            found.append(walls.choose(name))
        except SandboxError as error:
            print(error, file=sys.stderr)
    return found


def measure(chosen: Walls, times: dict[str, list[float]], calls: int) -> None:
    """One session: a start, calls, images."""
    begin = time.perf_counter()
    with Session(chosen) as session:
        times["start"].append(1000 * (time.perf_counter() - begin))
        times["call"] += [milliseconds(lambda: session.run(CELL)) for _ in range(calls)]
        times["in"].append(milliseconds(lambda: session.put({"image_1": IMAGE})))
        times["out"].append(milliseconds(lambda: session.run("image_1")))


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    warnings.simplefilter("ignore", RuntimeWarning)
    offered = configurations()
    results: dict[Walls, dict[str, list[float]]] = {
        one: {"start": [], "call": [], "in": [], "out": []} for one in offered
    }
    starts, calls = [], []
    for _ in range(FLAGS.repeats):
        starts.append(bare_start())
        calls += [milliseconds(lambda: exec(compile(CELL, "<cell>", "exec"), {})) for _ in range(10)]
        for one in offered:
            measure(one, results[one], 10)
    print(f"{'walls':48} {'start ms':>9} {'call us':>8} {'megapixel in ms':>16} {'out ms':>7}")
    print(f"{'bare interpreter':48} {statistics.median(starts):9.0f} {1000 * statistics.median(calls):8.0f}")
    for one, times in results.items():
        start, call, came, went = (statistics.median(times[key]) for key in ("start", "call", "in", "out"))
        print(f"{one!s:48} {start:9.0f} {1000 * call:8.0f} {came:16.1f} {went:7.1f}")


if __name__ == "__main__":
    app.run(main)

"""A peer whose steps are timed in an interpreter of its own, and which waits while others take their turns.

The benchmark starts a script with `Peer`; the script makes its steps and calls `serve`, which answers one name at a
time with seconds. Only the standard library: a peer's environment does not have this package's requirements.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[], object]  # makes one step and waits for its end
_MARK = "peer answers "  # libraries print, too


class Peer:
    """`python -m module SETTINGS` (JSON), running. `ready` is what it said when its steps were made."""

    def __init__(self, python: str, module: str, settings: dict[str, Any]):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closes with the peer)
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(settings)], cwd=Path(__file__).parents[1], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self.ready: dict[str, Any] = self._answer()

    def seconds(self, name: str) -> float:
        """Time of one step of that name. Raises RuntimeError if the peer ends instead."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        self._log.seek(0)
        raise RuntimeError(f"{' '.join(self._process.args[:3])} ended: ...{self._log.read()[-3000:]}")


def serve(ready: dict[str, Any], steps: dict[str, Step]) -> None:
    """In the script: says `ready`, then times the steps that are asked for until there is nobody to ask."""
    print(_MARK + json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(_MARK + json.dumps(seconds(steps[line.strip()])), flush=True)


def seconds(step: Step) -> float:
    """Time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start

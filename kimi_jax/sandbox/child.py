"""The process inside the sandbox: imports, locks itself, then answers requests until its input ends.

The first request says how to lock (`lock.Lock`) and what to import before that: afterwards nothing outside the walls
can be opened. Requests: start, put (images by name), run (one cell).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from kimi_jax.sandbox import lock as locking
from kimi_jax.sandbox.cell import Interpreter
from kimi_jax.sandbox.protocol import MAX_JSON, Ended, Frame, pack, read_blocking, read_frame, write_blocking

MAX_BODY = 2**31


def main() -> None:
    """Serves the pipe on stdin and stdout, which the code that it runs finds replaced by /dev/null."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # 2 stays the parent's pipe until the walls are closed, so that a failed start can say why

    def read(size: int) -> bytes:
        return read_blocking(requests, size)

    first = read_frame(read, MAX_JSON, MAX_BODY)
    start = first.head
    lock = locking.Lock(**start["lock"])
    locking.mount_scratch(lock)
    sys.path[:] = start["path"] + sys.path
    for name in start["preload"]:
        importlib.import_module(name)
    if "PIL.Image" in sys.modules:
        sys.modules["PIL.Image"].init()  # its readers of files, which it would import on the first use
    locking.close(lock)
    os.dup2(null, 2)
    interpreter = Interpreter(lock.limits)
    write_blocking(replies, pack(Frame(first.id, {"status": "ok", "parts": []}, b"")))
    try:
        _serve(read, replies, interpreter)
    except Ended:
        os._exit(0)


def _serve(read: Callable[[int], bytes], replies: int, interpreter: Interpreter) -> None:
    while True:
        request = read_frame(read, MAX_JSON, MAX_BODY)
        head: dict[str, Any] = request.head
        if head["op"] == "put":
            interpreter.put(head["images"], request.body)
            reply = Frame(request.id, {"status": "ok", "parts": []}, b"")
        else:
            status, parts, body = interpreter.run(head["code"], head["timeout"])
            reply = Frame(request.id, {"status": status, "parts": parts}, body)
        write_blocking(replies, pack(reply))

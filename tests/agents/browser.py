"""A headless Chromium over its DevTools pipe: opens a page, evaluates, clicks, takes a screenshot."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe", "about:blank")
# the browser reads commands from descriptor 3 and writes answers to 4
EXEC = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(ends[0], 3); os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    """The path of a browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own. Use as a context."""

    def __init__(self, url: str, width: int = 1280, height: int = 800):
        self._url, self._size = url, (width, height)

    def __enter__(self):
        read, child_write = os.pipe()
        child_read, write = os.pipe()
        size = f"--window-size={self._size[0]},{self._size[1]}"
        line = [sys.executable, "-I", "-S", "-c", EXEC, str(child_read), str(child_write), find(), *FLAGS, size]
        self._process = subprocess.Popen(line, pass_fds=(child_read, child_write), stderr=subprocess.DEVNULL)
        os.close(child_read)
        os.close(child_write)
        self._in, self._out = os.fdopen(write, "wb", buffering=0), os.fdopen(read, "rb")
        self._number, self._buffer = 0, b""
        target = self.call("Target.createTarget", {"url": self._url})["targetId"]
        self._session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        return self

    _session = None

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def call(self, method, parameters, may_fail=False):
        """One command of the protocol; events in between are dropped."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        self._in.write(json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                chunk = os.read(self._out.fileno(), 1 << 16)
                assert chunk, "the browser ended"
                self._buffer += chunk
            line, self._buffer = self._buffer.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert may_fail or "error" not in answer, answer
                return answer.get("result", {})

    def evaluate(self, expression):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_ready(self):
        """Until the page's script has run to its end; milliseconds from the start of loading to there."""
        while True:  # until then every call may hit a document that is about to be replaced
            command = {"expression": "document.body.dataset.ready", "returnByValue": True}
            value = self.call("Runtime.evaluate", command, may_fail=True).get("result", {}).get("value")
            if value:
                return float(value)

    def click(self, x, y):
        """A click of the mouse."""
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", event)

    def screenshot(self, path):
        """A PNG of the page."""
        data = self.call("Page.captureScreenshot", {"format": "png"})["data"]
        Path(path).write_bytes(base64.b64decode(data))

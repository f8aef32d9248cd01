"""A session: one Python process behind its walls, whose state is kept from call to call.

  session.put({"image_1": pixels})      the images of a conversation, by name
  result = session.run("image_1.mean()")

A process that breaks a limit or the protocol is killed as a whole and replaced; its images are put again, its names are
lost, and the result says so. Between calls the process is stopped, so that threads that a cell left behind do not run.

A session belongs to the thread that starts it, and ends with it (PR_SET_PDEATHSIG follows threads).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import keyword
import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from kimi_jax.sandbox import walls as walling
from kimi_jax.sandbox.limits import SandboxError, SandboxLimits
from kimi_jax.sandbox.lock import CAP_DAC_READ_SEARCH, Lock
from kimi_jax.sandbox.protocol import MAX_SIDE, Deadline, Ended, Frame, Pipes, ProtocolError, pack, read_frame
from kimi_jax.sandbox.walls import Program, Walls

PRELOAD = ("numpy", "PIL.Image", "PIL.ImageDraw")
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from kimi_jax.sandbox.child import main; sys.path.pop(0); main()"
MAX_NAME = 64
MAX_REASON = 2000  # characters of a failed start
STATUSES = ("ok", "error", "timeout")
Part: TypeAlias = "str | np.ndarray"  # a text, or an image uint8 [h, w, 3]


@dataclass(frozen=True)
class CellResult:
    """parts: texts and images (uint8 [h, w, 3]) in their order. All of it is the word of model-written code.

    status: ok, error (an exception), timeout (interrupted, names kept), or killed (the process was replaced).
    """

    status: Literal["ok", "error", "timeout", "killed"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All texts together."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[np.ndarray]:
        """All images, uint8 [h, w, 3]."""
        return [part for part in self.parts if not isinstance(part, str)]


class TooManyThreads(Exception):
    """The process has more threads than its limit."""


class Session:
    """One interpreter. Not for use by two threads at once, except `kill`.

    walls:   from `walls.choose`; None: the strongest that hold here.
    preload: modules imported before the walls are closed; under the lock alone matplotlib works only if it is one.
    Raises SandboxError if the process cannot be started and locked.
    """

    def __init__(
        self, walls: Walls | None = None, limits: SandboxLimits | None = None, preload: Sequence[str] = PRELOAD
    ):
        self.limits = limits or SandboxLimits()
        self.limits.check()
        self.walls = walls or walling.choose()
        self._preload = tuple(preload)
        self._program = walling.find_program(self._preload)
        self._images: dict[str, np.ndarray] = {}
        self._folder = ""
        self._alive = self._ended = False
        self._start()

    def put(self, images: Mapping[str, np.ndarray]) -> None:
        """Binds names to arrays inside, now and after a restart. images: uint8 [h, w], [h, w, 3] or [h, w, 4].

        Raises ValueError for another name, type or size, SandboxError if a new process cannot be started either.
        """
        merged = {**self._images, **images}
        for name, pixels in images.items():
            if not name.isidentifier() or keyword.iskeyword(name) or len(name) > MAX_NAME:
                raise ValueError(
                    f"{name!r:.80} is no name for an image: an identifier of at most {MAX_NAME} characters"
                )
            shape = pixels.shape
            if pixels.dtype != np.uint8 or len(shape) not in (2, 3) or 0 in shape or shape[2:] not in ((), (3,), (4,)):
                raise ValueError(f"{name} is uint8 [h, w], [h, w, 3] or [h, w, 4], not {pixels.dtype} {list(shape)}")
        total = sum(pixels.shape[0] * pixels.shape[1] for pixels in merged.values())
        if total > self.limits.image_pixels:
            raise ValueError(f"images of {total} pixels together; at most {self.limits.image_pixels}")
        self._images = merged
        try:
            self._put(images)
        except _FAILURES:
            if not self._ended:
                self.restart()

    def run(self, code: str) -> CellResult:
        """Runs one cell. Nothing that the code does raises; SandboxError if a new process cannot be started."""
        if len(code) > self.limits.code_chars:
            return CellResult(
                "error", (f"the code has {len(code)} characters; at most {self.limits.code_chars} are run",)
            )
        request = {"op": "run", "code": code, "timeout": self.limits.timeout_seconds}
        try:
            return self._ask(request, b"", self.limits.timeout_seconds + self.limits.grace_seconds)
        except _FAILURES as failure:
            reason = self._why(failure)
        if self._ended:
            return CellResult("killed", ("The interpreter was ended by its owner.",))
        self.restart()
        return CellResult(
            "killed", (f"The interpreter was ended: {reason}. A new one has the images, but no other name.",)
        )

    def restart(self) -> None:
        """A new process, with the images of the old one. Raises SandboxError."""
        self._end_process()
        self._start()
        try:
            self._put(self._images)
        except _FAILURES as failure:
            raise SandboxError("a new interpreter does not take its images") from failure

    def kill(self) -> None:
        """Ends the session at once. May be called from another thread: a `run` that waits there returns."""
        self._ended = True
        self._kill_group()

    def close(self) -> None:
        """Ends the session and waits until its process is gone."""
        self._ended = True
        self._end_process()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the Python inside, as the host sees it."""
        return self._pid

    def _start(self) -> None:
        limits, walls, program = self.limits, self.walls, self._program
        behind = walls.name == "bubblewrap"
        scratch = walling.scratch_folder(program) if behind else ""
        if not behind:
            self._folder = tempfile.mkdtemp(prefix="kimi_sandbox_")
        as_root = os.getuid() == 0 and walls.name != "none"
        lock = Lock(
            scratch=scratch if behind else self._folder if walls.name == "none" else "",
            readable=walling.readable(program, walls),
            user=walling.unused_user(secrets.randbits(32)) if as_root else 0,
            read_search=as_root and walling.needs_read_search(program, walls),
            landlock=walls.landlock > 0,
            seccomp=walls.name != "none",
            thread_limit=walling.counts_threads(walls),
            limits=dataclasses.asdict(limits),
        )
        try:
            self._launch(program, scratch)
        except OSError as error:
            self._remove_folder()
            raise SandboxError(f"the sandbox ({walls}) did not start: {error}") from error
        start = {"path": program.path, "preload": self._preload, "lock": dataclasses.asdict(lock)}
        try:
            self._ask(start, b"", limits.start_seconds)
            self._pid = self._find_python()
            if lock.seccomp:
                walling.check_locked(self._pid, 1 << CAP_DAC_READ_SEARCH if lock.read_search else 0)
        except (*_FAILURES, SandboxError, OSError) as failure:
            self._kill_group()
            said = self._last_words()
            self._end_process()
            late = f"it took longer than {limits.start_seconds:g} s" if isinstance(failure, Deadline) else ""
            reason = said or late or self._why(failure)
            raise SandboxError(f"the sandbox ({walls}) did not start: {reason}") from failure
        finally:
            self._errors.close()
        if walls.name == "lock":
            self._remove_folder()  # it was for caches of the imports only

    def _launch(self, program: Program, scratch: str) -> None:
        """Starts the process with an environment of its own, in a process group of its own."""
        home = scratch or self._folder
        environment = {
            "PATH": "/nonexistent", "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home,
            "MPLCONFIGDIR": home, "MPLBACKEND": "Agg",
            # landlock holds the thread that asks for it, so there must be one
            "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        }  # fmt: skip
        command = [program.python, "-I", "-S", "-B", "-c", BOOT, program.root]
        kept: tuple[int, ...] = ()
        if self.walls.name == "bubblewrap":
            info, info_inside = os.pipe()
            kept = (info_inside,)
            front = walling.bubblewrap(program, scratch, self.walls.proc)
            for name, value in environment.items():
                front += ["--setenv", name, value]
            command = [*front, "--info-fd", str(info_inside), *command]
        pipe, folder = subprocess.PIPE, self._folder if self.walls.name == "none" else "/"
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=environment, cwd=folder,
            pass_fds=kept, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._pipes = Pipes(os.dup(self._process.stdin.fileno()), os.dup(self._process.stdout.fileno()), self._watch)
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors = self._process.stderr
        self._alive = True
        self._init = self._pid = self._process.pid
        if kept:
            os.close(info_inside)
            self._init = _read_child_pid(info, self.limits.start_seconds)

    def _find_python(self) -> int:
        """Behind bubblewrap, the only child of its init, which ends everything in the namespace when it dies itself.

        Python is not that init: as root it becomes another user, whom a dying bubblewrap may not signal.
        """
        if self.walls.name != "bubblewrap":
            return self._process.pid
        children = Path(f"/proc/{self._init}/task/{self._init}/children").read_text().split()
        if len(children) != 1:
            raise SandboxError(f"bubblewrap has {len(children)} processes inside instead of one")
        return int(children[0])

    def _put(self, images: Mapping[str, np.ndarray]) -> None:
        head = {"op": "put", "images": [{"name": name, "shape": pixels.shape} for name, pixels in images.items()]}
        body = b"".join(np.ascontiguousarray(pixels).tobytes() for pixels in images.values())
        self._ask(head, body, self.limits.timeout_seconds + self.limits.grace_seconds)

    def _ask(self, head: Mapping[str, Any], body: bytes, seconds: float) -> CellResult:
        """Sends a request to the process, which runs only until it has replied. Raises one of _FAILURES."""
        limits, deadline = self.limits, time.monotonic() + seconds
        if not self._alive:
            raise Ended
        if self._pipes.unread():
            raise ProtocolError("something was written that nobody asked for")
        request = Frame(secrets.token_bytes(16), dict(head), body)
        with self._awake():
            self._pipes.write(pack(request), deadline)
            max_json = 65_536 + 12 * (limits.output_chars + limits.code_chars)  # \ud83d\ude00 is one character
            reply = read_frame(lambda size: self._pipes.read(size, deadline), max_json, 3 * limits.output_image_pixels)
        if reply.id != request.id:
            raise ProtocolError("a reply to another request")
        return read_result(reply, limits)

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Lets the process run, and stops it again."""
        group = self._process.pid
        try:
            os.killpg(group, signal.SIGCONT)
            yield
            os.killpg(group, signal.SIGSTOP)
        except ProcessLookupError as error:
            raise Ended from error

    def _watch(self) -> None:
        """Called while waiting. Raises TooManyThreads where RLIMIT_NPROC cannot."""
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self._pid}/status").read_text()
            threads = int(text.partition("\nThreads:")[2].split(maxsplit=1)[0])
            if threads > self.limits.threads:
                raise TooManyThreads

    def _why(self, failure: Exception) -> str:
        """In words, for the model."""
        if isinstance(failure, Deadline):
            return f"it ran longer than {self.limits.timeout_seconds:g} s and did not stop when interrupted"
        if isinstance(failure, TooManyThreads):
            return f"it had more than {self.limits.threads} threads"
        if isinstance(failure, Ended):
            return "its process ended (a crash, an exit, or more memory or CPU time than allowed)"
        return f"it broke the protocol: {failure}" if isinstance(failure, ProtocolError) else str(failure)

    def _last_words(self) -> str:
        """What a failed start wrote on stderr."""
        os.set_blocking(self._errors.fileno(), False)
        with contextlib.suppress(OSError, ValueError):
            said = self._errors.read(1 << 16) or b""
            return said.decode(errors="replace").strip()[-MAX_REASON:]
        return ""

    def _kill_group(self) -> None:
        if self._alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _end_process(self) -> None:
        if self._alive:
            self._kill_group()
            self._alive = False  # from here on the number may belong to another group
            self._process.wait()
            self._pipes.close()
        self._remove_folder()

    def _remove_folder(self) -> None:
        """By rm, which follows no link and does not recurse in Python: nested folders end `shutil.rmtree`."""
        if self._folder:
            subprocess.run(["rm", "-rf", "--", self._folder], check=False, stderr=subprocess.DEVNULL)
            self._folder = ""


_FAILURES = (Deadline, Ended, ProtocolError, TooManyThreads)


def _read_child_pid(descriptor: int, seconds: float) -> int:
    """The process id that bubblewrap writes as JSON; 0 if it writes none, and then says why on stderr."""
    data, deadline = b"", time.monotonic() + seconds
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000) and (piece := os.read(descriptor, 4096)):
            data += piece
            with contextlib.suppress(ValueError):
                return int(json.loads(data)["child-pid"])
    finally:
        os.close(descriptor)
    return 0


def read_result(reply: Frame, limits: SandboxLimits) -> CellResult:
    """The result in a frame that an enemy wrote. Raises ProtocolError for anything that an honest one does not hold."""
    status, parts = reply.head.get("status"), reply.head.get("parts")
    if not isinstance(status, str) or status not in STATUSES or not isinstance(parts, list):
        raise ProtocolError("a reply without status and parts")
    found: list[Part] = []
    chars, images, offset = 0, 0, 0
    for part in parts:
        if not isinstance(part, dict) or len(part) != 1:
            raise ProtocolError("a part that is neither text nor image")
        if isinstance(text := part.get("text"), str):
            chars += len(text)
            found.append(text.encode("utf-8", "replace").decode())  # lone surrogates cannot be encoded later
            continue
        height, width = _image_size(part.get("image"))
        images += 1
        size = 3 * height * width
        if images > limits.output_images or offset + size > len(reply.body):
            raise ProtocolError("more images than were sent or allowed")
        pixels = np.frombuffer(reply.body, np.uint8, size, offset)
        found.append(pixels.reshape(height, width, 3))
        offset += size
    if chars > limits.output_chars + 8192 or len(found) > 2 * limits.output_images + 4 or offset != len(reply.body):
        raise ProtocolError("a reply above its limits")
    return CellResult(status, tuple(found))  # type: ignore[arg-type]  # checked above


def _image_size(value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and 1 <= n <= MAX_SIDE for n in value):
        return value[0], value[1]
    raise ProtocolError("an image without a size")

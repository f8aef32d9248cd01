"""The lock of a workdir: two processes in one would tear its log and delete each other's checkpoints.

`WORKDIR/run.lock` says who holds it: host, process id, since when. On a file system it is an `flock`, which ends with
its process however that dies, so that a run that was killed is simply started again. Host 0 holds it for all hosts of a
run. An object store has no locks: there (and on a file system without them) the file only names the last run, and a
warning says that nothing keeps a second one out.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from kimi_jax.config import ConfigError

NAME = "run.lock"


class WorkdirBusy(ConfigError):
    """Another process trains in this workdir; the message names it."""


@contextlib.contextmanager
def held(workdir: str, warn: Callable[[str], Any]) -> Iterator[None]:
    """Inside, this process holds the lock. Raises WorkdirBusy if another one does, OSError if it cannot be written."""
    path = epath.Path(workdir) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):
        before = f"; the last one, which did not end in order: {_describe(path)}" if _named(path) else ""
        warn(f"WARNING: {workdir} is an object store and cannot be locked: see that no second run uses it{before}")
        path.write_text(_holder())
        yield
        path.write_text("")
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise WorkdirBusy(f"another process trains in {workdir}: {_describe(path)}") from error
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            warn(f"WARNING: {workdir} cannot be locked ({error}): see that no second run uses it")
        file.truncate(0)
        file.write(_holder())
        file.flush()
        yield
        with contextlib.suppress(OSError):  # a disk that is full meanwhile
            file.truncate(0)


def _holder() -> str:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"


def _named(path: Any) -> bool:
    """Whether the file names a run; one that ends in order empties it."""
    return path.exists() and bool(path.read_text(encoding="utf-8").strip())


def _describe(path: Any) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"host {holder['host']}, process {holder['pid']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun or just ended
        return f"{path} does not say which"

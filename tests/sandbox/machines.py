"""Sessions behind each wall that this machine offers, and what can be seen of them from outside."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kimi_jax.sandbox import walls
from kimi_jax.sandbox.limits import SandboxError, SandboxLimits
from kimi_jax.sandbox.session import Session
from kimi_jax.sandbox.walls import Walls

PATIENCE = 60.0  # seconds that a test waits for what must happen; never how long something takes
# the time limit is not meant to be reached, however busy the machine
SMALL = SandboxLimits(
    timeout_seconds=300, grace_seconds=30, memory_mb=768, threads=16, scratch_mb=16, scratch_files=500
)
# for what has to run into its time limit; the grace is for a machine that is busy
QUICK = SandboxLimits(timeout_seconds=0.5, grace_seconds=2, memory_mb=768, threads=16, scratch_mb=16, scratch_files=500)
# bubblewrap without landlock and without /proc are what older kernels and containers offer
CONFIGURATIONS = ("bubblewrap", "bubblewrap without landlock or proc", "lock")


def walls_or_skip(configuration: str) -> Walls:
    """The walls of a configuration; skips the test, with the reason, where the machine does not offer them."""
    name = configuration.split()[0]
    try:
        found = walls.choose(name)
    except SandboxError as error:
        pytest.skip(f"{configuration}: {error}")
    return Walls("bubblewrap", landlock=0, proc=False) if "without" in configuration else found


def group(session: Session) -> list[int]:
    """Ids of all processes in the session's process group, zombies left out."""
    leader, found = session._process.pid, []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[2]) == leader and fields[0] != "Z":
                found.append(int(name))
    return found


def status(pid: int, field: str) -> str:
    """A line of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(field + ":"))


def kilobytes(pid: int, field: str) -> int:
    """A size in /proc/PID/status, in KiB."""
    return int(status(pid, field).split()[0])


def cpu_ticks(pid: int) -> int:
    """CPU time of a process and all its threads, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_until_gone(pid: int) -> None:
    """Returns when the process has ended (or is a zombie); fails the test if it does not."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} still runs")

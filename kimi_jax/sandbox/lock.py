"""The lock: what the process inside the sandbox takes away from itself before it runs a line that a model wrote.

The order matters: scratch folder, imports, user, limits, landlock, seccomp. Every step but the last uses calls that the
next one forbids. The parent checks the result from outside (`walls.check_locked`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from dataclasses import dataclass
from typing import Any

from kimi_jax.sandbox import landlock, seccomp, syscalls

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
CAPABILITY_VERSION = 0x20080522
CAP_DAC_READ_SEARCH = 2
MIB = 2**20


@dataclass(frozen=True)
class Lock:
    """What the parent tells the process inside about its walls; JSON on the way.

    scratch:     folder where a tmpfs of its own is mounted; empty: no file may be written.
    readable:    files and folders that stay readable.
    user:        id of user and group that it becomes; 0: it stays who it is.
    read_search: keeps CAP_DAC_READ_SEARCH, for a Python that only root can reach; landlock holds what it may read.
    landlock, seccomp: whether these walls are wanted.
    limits:      the fields of `limits.SandboxLimits`. thread_limit: whether RLIMIT_NPROC counts this process only.
    """

    scratch: str
    readable: list[str]
    user: int
    read_search: bool
    landlock: bool
    seccomp: bool
    thread_limit: bool
    limits: dict[str, Any]


def libc() -> ctypes.CDLL:
    """The C library, whose `syscall` returns a long."""
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def mount_scratch(lock: Lock) -> None:
    """Mounts a tmpfs bounded in bytes and in inodes, which bubblewrap's own is not. Raises OSError.

    Before the imports, because some of them need a folder to write to.
    """
    if not (lock.scratch and lock.seccomp):
        return
    library = libc()
    size = f"size={lock.limits['scratch_mb'] * MIB},nr_inodes={lock.limits['scratch_files']},mode=1777"
    place = lock.scratch.encode()
    if library.mount(b"tmpfs", place, b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size.encode()):
        raise OSError(ctypes.get_errno(), f"a scratch folder cannot be mounted on {lock.scratch}")
    os.chdir(lock.scratch)


def close(lock: Lock) -> None:
    """Closes the walls around this process, which must have one thread. Raises OSError."""
    library = libc()
    if lock.user:
        _become(library, lock.user, lock.read_search)
    elif lock.seccomp:
        _drop_capabilities(library, 0)
    _prctl(library, PR_SET_PDEATHSIG, signal.SIGKILL)  # changing the user clears it
    _prctl(library, PR_SET_NO_NEW_PRIVS, 1)
    _prctl(library, PR_SET_DUMPABLE, 0)
    _set_limits(lock)
    if lock.landlock:
        landlock.restrict(library, lock.readable, [lock.scratch] if lock.scratch else [])
    if lock.seccomp:
        seccomp.install(library, os.getpid(), bool(lock.scratch))


def _become(library: ctypes.CDLL, user: int, read_search: bool) -> None:
    if read_search:
        _prctl(library, PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    _drop_capabilities(library, 1 << CAP_DAC_READ_SEARCH if read_search else 0)


def _drop_capabilities(library: ctypes.CDLL, kept: int) -> None:
    header = struct.pack("<Ii", CAPABILITY_VERSION, 0)
    sets = struct.pack("<6I", kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable; then their upper halves
    number = syscalls.numbers(syscalls.LOCK, syscalls.machine())["capset"]
    if library.syscall(number, header, sets):
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def _prctl(library: ctypes.CDLL, option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    if library.prctl(option, ctypes.c_ulong(value), zero, zero, zero):
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")


def _set_limits(lock: Lock) -> None:
    import resource  # not on every system; there, `walls.choose` says that Linux is needed

    limits = lock.limits
    bounds = {
        resource.RLIMIT_AS: limits["memory_mb"] * MIB,
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["file_mb"] * MIB,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_STACK: 8 * MIB,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if lock.thread_limit:
        bounds[resource.RLIMIT_NPROC] = limits["threads"]
    for kind, wanted in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (bound, bound))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file above its limit is an OSError, not the end of the process

"""Landlock: from here on this process opens only listed files and folders, and reaches no TCP port.

Source: Documentation/userspace-api/landlock.rst of Linux. What the kernel's version does not know is left out; the
seccomp filter forbids sockets and signals anyway. Landlock does not cover `stat`, `chdir`, `chmod`, `utime`, `flock`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from kimi_jax.sandbox import syscalls

FILES_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights over files a version knows; from the fifth on 16
NETWORK_SINCE, SCOPES_SINCE = 4, 6
WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
EXECUTE, REFER, DEVICES = 1 << 0, 1 << 13, (1 << 6) | (1 << 11) | (1 << 15)  # devices: make character, block; ioctl
OF_FILES = WRITE_FILE | READ_FILE | TRUNCATE
BIND_AND_CONNECT, ABSTRACT_SOCKETS_AND_SIGNALS = 3, 3
GET_VERSION, PATH_BENEATH = 1, 1


def version(libc: ctypes.CDLL) -> int:
    """Landlock's version in this kernel; 0 where there is none."""
    try:
        number = syscalls.numbers(syscalls.LOCK, syscalls.machine())["landlock_create_ruleset"]
    except ValueError:
        return 0
    return max(0, libc.syscall(number, None, ctypes.c_size_t(0), GET_VERSION))


def rights(abi: int) -> int:
    """Every right over files that a version knows, all of which are taken away."""
    return (1 << FILES_BY_VERSION.get(abi, 16)) - 1


def restrict(libc: ctypes.CDLL, readable: list[str], writable: list[str]) -> None:
    """Takes every right but reading below `readable` and reading and writing below `writable`. Raises OSError.

    Needs no_new_privs. Only the calling thread and its descendants are held, so it is called while there is one thread.
    """
    abi = version(libc)
    numbers = syscalls.numbers(syscalls.LOCK, syscalls.machine())
    handled = rights(abi)
    attribute = struct.pack("<Q", handled)
    if abi >= NETWORK_SINCE:
        attribute += struct.pack("<Q", BIND_AND_CONNECT)
    if abi >= SCOPES_SINCE:
        attribute += struct.pack("<Q", ABSTRACT_SOCKETS_AND_SIGNALS)
    size = ctypes.c_size_t(len(attribute))
    rules = _checked(libc.syscall(numbers["landlock_create_ruleset"], attribute, size, 0), "create_ruleset")
    for paths, allowed in ((readable, READ_FILE | READ_DIR), (writable, handled & ~(EXECUTE | REFER | DEVICES))):
        for path in paths:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            rule = struct.pack("<Qi", allowed & handled & (-1 if is_folder else OF_FILES), descriptor)
            _checked(libc.syscall(numbers["landlock_add_rule"], rules, PATH_BENEATH, rule, 0), f"add_rule for {path}")
            os.close(descriptor)
    _checked(libc.syscall(numbers["landlock_restrict_self"], rules, 0), "restrict_self")
    os.close(rules)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock_{what} failed")
    return result

"""A seccomp filter that allows listed system calls and makes all others fail with EPERM.

Source: Documentation/userspace-api/seccomp_filter.rst of Linux. The filter is classic BPF: a list of (code, jt, jf, k),
where a comparison jumps jt or jf instructions ahead. Another architecture (32-bit calls, x32) kills the process.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from kimi_jax.sandbox import syscalls

LOAD, EQUAL, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06  # absolute word; jumps and `and` with a constant
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NR, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 64-bit words, low half first
X32 = 0x40000000
SET_MODE_FILTER, TSYNC = 1, 1

CLONE_THREAD = 0x00010000
CLONE_NAMESPACES = 0x7E020000
FCNTL = (0, 1, 2, 3, 4, 1030)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC; not SETOWN, which sends signals
FCNTL_LOCKS = (5, 6, 7, 36, 37, 38)  # GETLK, SETLK, SETLKW, and those of open file descriptions
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
PRCTL = (15, 16)  # PR_SET_NAME, PR_GET_NAME; not PR_SET_PDEATHSIG
WRITING = 0o3 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
AF_UNIX, SOCK_STREAM = 1, 1

Instruction = tuple[int, int, int, int]
PASS, FAIL, NOT_THERE = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | errno.EPERM), (RETURN, 0, 0, ERRNO | errno.ENOSYS)


def program(machine: str, pid: int, scratch: bool) -> list[Instruction]:
    """The filter. pid: the process's own, the only one that it may signal. scratch: whether it may change files."""
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, syscalls.AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NR),
    ]
    if machine == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL_PROCESS)]
    plain = syscalls.numbers(syscalls.COMPUTE, machine)
    if scratch:
        plain |= syscalls.numbers(syscalls.SCRATCH, machine)
    for number in plain.values():
        code += [(EQUAL, 0, 1, number), PASS]
    rules = _conditions(pid, scratch)
    for name, number in syscalls.numbers(syscalls.CONDITIONAL, machine).items():
        body = rules[name]
        code += [(EQUAL, 0, len(body), number), *body]
    return [*code, FAIL]


def _conditions(pid: int, scratch: bool) -> dict[str, list[Instruction]]:
    """Instructions for each call that depends on its arguments; each list ends with a return."""
    if scratch:
        opens = {"open": [PASS], "openat": [PASS]}
    else:  # O_RDONLY | O_TRUNC truncates, and landlock knows that only since its third version
        opens = {"open": _no_bits(1, WRITING), "openat": _no_bits(2, WRITING)}
    thread = [_low(0), (AND, 0, 0, CLONE_NAMESPACES), (EQUAL, 1, 0, 0), FAIL,
              _low(0), (AND, 0, 0, CLONE_THREAD), (EQUAL, 1, 0, 0), PASS, FAIL]  # fmt: skip
    stream = [_low(0), (EQUAL, 1, 0, AF_UNIX), FAIL,
              _low(1), (AND, 0, 0, 0xF), (EQUAL, 0, 1, SOCK_STREAM), PASS, FAIL]  # fmt: skip
    no_address = [_low(4), (EQUAL, 1, 0, 0), FAIL, _high(4), (EQUAL, 1, 0, 0), FAIL, PASS]
    return opens | {
        "clone": thread,
        "clone3": [NOT_THERE],  # its flags are in memory, where a filter cannot look; the C library falls back to clone
        "fcntl": _one_of(1, FCNTL + (FCNTL_LOCKS if scratch else ())),
        "ioctl": _one_of(1, IOCTL),
        "kill": _one_of(0, (pid,)),
        "tgkill": _one_of(0, (pid,)),
        "prlimit64": _one_of(0, (0,)),
        "prctl": _one_of(0, PRCTL),
        "socketpair": stream,  # asyncio needs it; a datagram pair could send to other sockets
        "sendto": no_address,
    }


def _low(argument: int) -> Instruction:
    return (LOAD, 0, 0, ARGUMENTS + 8 * argument)


def _high(argument: int) -> Instruction:
    return (LOAD, 0, 0, ARGUMENTS + 8 * argument + 4)


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    code = [_low(argument)]  # these arguments are 32 bits wide to the kernel
    for value in values:
        code += [(EQUAL, 0, 1, value), PASS]
    return [*code, FAIL]


def _no_bits(argument: int, bits: int) -> list[Instruction]:
    return [_low(argument), (AND, 0, 0, bits), (EQUAL, 0, 1, 0), PASS, FAIL]


def install(libc: ctypes.CDLL, pid: int, scratch: bool) -> None:
    """Turns the filter on for all threads. Needs no_new_privs. Raises OSError."""
    machine = syscalls.machine()
    code = program(machine, pid, scratch)
    filters = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in code))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(filters)))
    number = syscalls.numbers(syscalls.LOCK, machine)["seccomp"]
    if found := libc.syscall(number, SET_MODE_FILTER, TSYNC, fprog):
        code_of = ctypes.get_errno() if found < 0 else errno.ESRCH  # positive: a thread that could not follow
        raise OSError(code_of, "seccomp refused the filter")

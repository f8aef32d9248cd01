"""The system calls that model-written code may make, with their numbers: everything else fails with EPERM.

Source: the kernel's tables (asm/unistd_64.h for x86_64, asm-generic/unistd.h for aarch64). None: the call does not
exist there. Absent on purpose, among others: fork, vfork, execve (one process only), socket, connect, bind, sendmsg (no
network), ptrace, process_vm_*, pidfd_* (no other process), mount, unshare, setns, bpf, io_uring, keyctl, userfaultfd,
perf_event_open (kernel surface), memfd_create, shmget (memory outside of the limit), sync (the disk of all).
"""

from __future__ import annotations

import platform

Table = dict[str, tuple[int | None, int | None]]

MACHINES = {"x86_64": 0, "aarch64": 1}  # column of the tables
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# fmt: off
# computing, reading, waiting, threads
COMPUTE: Table = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "lseek": (8, 62), "close": (3, 57),
    "close_range": (436, 436), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "stat": (4, None), "lstat": (6, None), "fstat": (5, 80),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "membarrier": (324, 283), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "times": (100, 153), "futex": (202, 98), "set_robust_list": (273, 99),
    "set_tid_address": (218, 96), "rseq": (334, 293), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getcpu": (309, 168), "exit": (60, 93), "exit_group": (231, 94), "getpid": (39, 172), "gettid": (186, 178),
    "getppid": (110, 173), "getpgrp": (111, None), "getpgid": (121, 155), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getrlimit": (97, 163), "getrusage": (98, 165),
    "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "pipe": (22, None),
    "pipe2": (293, 59), "recvfrom": (45, 207), "shutdown": (48, 210), "getsockopt": (55, 209),
    "getsockname": (51, 204),
}
# what changes files: only where there is a scratch folder, because landlock does not cover chmod, utime and flock
SCRATCH: Table = {
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None),
    "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "utimensat": (280, 88), "truncate": (76, 45),
    "ftruncate": (77, 46), "fallocate": (285, 47), "fadvise64": (221, 223), "fsync": (74, 82),
    "fdatasync": (75, 83), "flock": (73, 32), "umask": (95, 166), "sendfile": (40, 71),
    "copy_file_range": (326, 285),
}
# allowed for some arguments only (seccomp.py)
CONDITIONAL: Table = {
    "fcntl": (72, 25), "ioctl": (16, 29), "open": (2, None), "openat": (257, 56), "clone": (56, 220),
    "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "prctl": (157, 167), "socketpair": (53, 199),
    "sendto": (44, 206), "clone3": (435, 435),
}
# made by the lock itself, before the filter is on
LOCK: Table = {
    "capset": (126, 91), "mount": (165, 40), "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
}
# fmt: on


def machine() -> str:
    """x86_64 or aarch64. Raises ValueError elsewhere."""
    name = platform.machine()
    if name not in MACHINES:
        raise ValueError(f"system call numbers are known for {' and '.join(MACHINES)}, not for {name}")
    return name


def numbers(table: Table, name: str) -> dict[str, int]:
    """Name to number on a machine, of the calls that exist there."""
    column = MACHINES[name]
    return {call: number for call, both in table.items() if (number := both[column]) is not None}

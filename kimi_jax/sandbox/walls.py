"""Which walls there are on this machine, and the command that starts Python behind them.

bubblewrap  namespaces (files, processes, network) around the lock: rlimits, landlock, seccomp
lock        the lock alone: no scratch folder, and `stat` still tells which files of the host exist
none        a plain process with rlimits; only for code that is trusted, and only if asked for by name
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import kimi_jax
from kimi_jax.config_rl import SANDBOXES
from kimi_jax.sandbox import landlock, syscalls
from kimi_jax.sandbox.limits import SandboxError
from kimi_jax.sandbox.lock import libc

SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/fonts", "/usr/share/zoneinfo",
          "/etc/ld.so.cache", "/etc/alternatives")  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
LOWEST_USER_LIMIT = (5, 14)  # Linux from which RLIMIT_NPROC counts per user namespace
HIGHEST_USER = 0x7FFFFFF0  # ids just below are nobody's by the tables of Debian and systemd
PROBE_SECONDS = 20


@dataclass(frozen=True)
class Walls:
    """What holds: name is bubblewrap, lock or none; landlock its version, 0 where the kernel has none; proc whether
    bubblewrap may mount a /proc of its own (containers often forbid it)."""

    name: str
    landlock: int
    proc: bool = False

    def __str__(self) -> str:
        if self.name == "none":
            return "none: a plain process with limits"
        files = f"landlock {self.landlock}" if self.landlock else "no landlock"
        proc = "" if self.proc or self.name == "lock" else ", no /proc"
        return f"{'bubblewrap + ' if self.name == 'bubblewrap' else ''}rlimits + {files} + seccomp{proc}"


@dataclass(frozen=True)
class Program:
    """The Python inside. files: what it must be able to read, links followed. path: its folders of packages."""

    python: str
    root: str
    path: tuple[str, ...]
    files: tuple[str, ...]


def find_program(preload: Sequence[str]) -> Program:
    """This interpreter without its site packages' start-up code. preload: modules that it imports before it is locked.

    Raises SandboxError for a module that is not installed.
    """
    python = os.path.realpath(sys.executable)
    package = Path(kimi_jax.__file__).resolve().parent
    folders = []
    for name in preload:
        spec = importlib.util.find_spec(name.partition(".")[0])
        if spec is None or not spec.origin:
            raise SandboxError(
                f"the sandbox is to import {name}, which is not installed: pip install it, or leave it out"
            )
        folders.append(os.path.realpath(Path(spec.origin).parents[1 if spec.submodule_search_locations else 0]))
    path = tuple(dict.fromkeys(folders))
    base = os.path.realpath(sys.base_prefix)
    own = [python, f"{base}/lib", f"{base}/lib64", str(package / "__init__.py"), str(package / "sandbox"), *path]
    files = dict.fromkeys(name for name in (*SYSTEM, *own) if os.path.exists(name))
    return Program(python, str(package.parent), path, tuple(files))


def choose(sandbox: str = "auto", probe: Sequence[str] = ("bubblewrap", "lock")) -> Walls:
    """The strongest walls that hold here, or those that are asked for.

    sandbox: auto (bubblewrap, else the lock alone with a warning, else refusal), bubblewrap, lock, or none.
    probe:   what may be tried.
    Raises SandboxError if what is asked for is missing, and ValueError for another name.
    """
    if sandbox not in SANDBOXES:
        raise ValueError(f"sandbox is one of {', '.join(SANDBOXES)}, not {sandbox!r}")
    if not sys.platform.startswith("linux"):
        raise SandboxError(
            f"the sandbox needs Linux, and this is {sys.platform}: run it in a container or a machine with it"
        )
    if sandbox == "none":
        return Walls("none", 0)
    reasons = []
    try:
        syscalls.machine()
    except ValueError as error:
        raise SandboxError(f"there is no seccomp filter for this machine: {error}") from error
    abi = landlock.version(libc())
    if sandbox in ("auto", "bubblewrap") and "bubblewrap" in probe:
        # without landlock, /proc/1/mem would let code of the same user into bubblewrap's init, which has no filter
        for proc in (True, False) if abi else (False,):
            if not (reason := _try_bubblewrap(proc)):
                return Walls("bubblewrap", abi, proc)
            reasons.append(reason)
    if sandbox in ("auto", "lock") and "lock" in probe:
        if abi:
            if sandbox == "auto":
                warnings.warn(
                    f"no bubblewrap ({'; '.join(reasons)}): model-written code is held by landlock and seccomp alone, "
                    "without a scratch folder, and can tell which files exist",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return Walls("lock", abi)
        reasons.append("this kernel has no landlock (Linux 5.13, with landlock among its security modules)")
    raise SandboxError(
        f"sandbox={sandbox} does not hold here: {'; '.join(reasons) or 'nothing was tried'}. Install bubblewrap and "
        "allow user namespaces, or use a kernel with landlock. sandbox=none runs model-written code with your rights"
    )


def _try_bubblewrap(proc: bool) -> str:
    """Starts nothing much in a namespace; what went wrong, or empty."""
    if shutil.which("bwrap") is None:
        return "the command bwrap is not installed"
    program = Program(sys.executable, "", (), tuple(name for name in SYSTEM if os.path.exists(name)))
    command = [*bubblewrap(program, "/tmp", proc), "/usr/lib/does-not-exist"]
    try:
        done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bwrap does not run: {error}"
    said = done.stderr.strip()
    return "" if "execvp" in said else f"bwrap says {said[:200]!r}"


def bubblewrap(program: Program, scratch: str, proc: bool) -> list[str]:
    """The command up to the program: new namespaces, the files of `program` read-only, and nothing else of the host."""
    command = [str(shutil.which("bwrap")), "--die-with-parent", "--clearenv", "--hostname", "sandbox"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    # for the scratch folder that the program mounts, and for becoming another user; dropped before any cell runs
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if os.getuid() == 0:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_DAC_READ_SEARCH"):
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user"]
    if proc:
        command += ["--proc", "/proc"]
    mounts = [("--ro-bind", name) for name in program.files]
    mounts += [("--dev-bind", name) for name in DEVICES if os.path.exists(name)]
    folders = {parent for _, name in mounts for parent in map(str, Path(name).parents)} | {scratch}
    for folder in sorted(folders - {"/"}):  # parents first; bubblewrap itself would make them 0700
        command += ["--perms", "0755", "--dir", folder]
    for kind, name in sorted(mounts, key=lambda mount: mount[1]):
        command += [kind, name, name]
    return [*command, "--remount-ro", "/", "--chdir", scratch]


def scratch_folder(program: Program) -> str:
    """Where the scratch folder is mounted: /tmp, unless something that must stay readable lies below it."""
    return "/scratch" if any(name.startswith("/tmp/") for name in program.files) else "/tmp"


def readable(program: Program, walls: Walls) -> list[str]:
    """What landlock leaves readable: under bubblewrap also /proc, which knows this process only."""
    names = [*program.files, *(name for name in DEVICES if os.path.exists(name))]
    return [*names, "/proc"] if walls.proc else names


def unused_user(salt: int) -> int:
    """An id of user and group that this namespace knows and nobody has; different for neighbouring salts."""
    extents = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    end = max(first + count for first, _, count in extents)
    return min(end, HIGHEST_USER) - 2 - salt % 4096


def needs_read_search(program: Program, walls: Walls) -> bool:
    """Whether another user could not read the Python inside by the modes of its files."""
    modules = [*(str(Path(p) / "numpy/__init__.py") for p in program.path), program.python]
    names = [name for name in modules if os.path.exists(name)]
    if any(not os.stat(name).st_mode & stat.S_IROTH for name in names):
        return True
    if walls.name == "bubblewrap":  # makes its own folders around them
        return False
    parents = set(itertools.chain.from_iterable(Path(name).parents for name in program.files))
    return any(not os.stat(parent).st_mode & stat.S_IXOTH for parent in parents)


def counts_threads(walls: Walls) -> bool:
    """Whether RLIMIT_NPROC counts the threads of one session only: as root with its own user, or in a namespace."""
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    return walls.name != "none" and (os.getuid() == 0 or (walls.name == "bubblewrap" and release >= LOWEST_USER_LIMIT))


def check_locked(pid: int, kept: int) -> None:
    """Looks at a process from outside. kept: capabilities that it may hold. Raises SandboxError if it is not locked."""
    text = Path(f"/proc/{pid}/status").read_text()
    status = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    wanted = {"Seccomp": 2, "NoNewPrivs": 1, "Threads": 1}  # landlock does not hold threads from before it
    for name, value in wanted.items():
        if int(status[name]) != value:
            raise SandboxError(f"process {pid} has {name} {status[name].strip()} instead of {value}: it is not locked")
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        if int(status[name], 16) & ~kept:
            raise SandboxError(f"process {pid} holds capabilities ({name} {status[name].strip()}): it is not locked")

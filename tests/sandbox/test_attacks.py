"""Attacks of model-written code on the machine, each behind every wall configuration; what counts is seen from outside.

Attacks on the parent through its pipe are in test_forgery.py.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_jax.sandbox import syscalls
from kimi_jax.sandbox.limits import SandboxLimits
from kimi_jax.sandbox.session import Session
from kimi_jax.sandbox.walls import Walls
from tests.environment import REPO
from tests.sandbox.machines import (
    CONFIGURATIONS,
    QUICK,
    SMALL,
    cpu_ticks,
    group,
    kilobytes,
    status,
    wait_until_gone,
    walls_or_skip,
)

SECRET = "the-secret-of-the-host"
LEAKED = "LEAKED"


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def session(request):
    """One session for all attacks of a configuration: those that end it get a new process, as in production."""
    os.environ["KIMI_TEST_SECRET"] = SECRET
    os.environ["LD_PRELOAD"] = "/usr/lib/not-a-library.so"
    try:
        with Session(walls_or_skip(request.param), SMALL) as opened:
            yield opened
    finally:
        del os.environ["KIMI_TEST_SECRET"], os.environ["LD_PRELOAD"]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    path.chmod(0o644)
    return path


@pytest.fixture
def victim():
    """A process of the same user, which the attacks are after; it must survive."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def attempts(session: Session, *actions: str, before: str = "") -> list[str]:
    """Runs each action inside; returns for each the name of its exception, or LEAKED and its value."""
    lines = ["import ctypes, os, socket, subprocess, sys, signal, fcntl", before, "results = []"]
    for action in actions:
        lines += ["try:", f"    results.append('{LEAKED} ' + repr({action}))",
                  "except BaseException as e: results.append(type(e).__name__)"]  # fmt: skip
    result = session.run("\n".join([*lines, "print('\\n'.join(results))"]))
    assert result.status == "ok", result
    return result.text.splitlines()


def test_sandbox_is_locked_as_seen_from_outside(session: Session):
    assert status(session.pid, "Seccomp") == "2"
    assert status(session.pid, "NoNewPrivs") == "1"
    assert int(status(session.pid, "CapEff"), 16) & ~(1 << 2) == 0
    assert status(session.pid, "Threads") == "1"
    if os.getuid() == 0:
        assert "0" not in status(session.pid, "Uid").split()


def test_fork_bomb_makes_no_process(session: Session):
    before = group(session)
    found = attempts(
        session,
        "os.fork()",
        "subprocess.run(['/bin/true'])",
        "os.posix_spawn(sys.executable, ['x'], {})",
        "os.execv(sys.executable, ['python'])",
        "__import__('multiprocessing').get_context('fork').Process(target=print).start()",
        "os.popen('true')",
        "os.forkpty()",
    )
    assert found[:6] == ["PermissionError"] * 6
    assert found[6] in ("PermissionError", "FileNotFoundError")  # without /dev there is no terminal to open either
    session.run("import os\nos.system('true')")  # it reports the failed fork as a status
    assert group(session) == before
    assert len(before) <= 3  # bubblewrap outside and inside, and Python


def test_memory_bomb_stays_within_its_limit_and_keeps_its_names(session: Session):
    session.run("kept = 1")
    result = session.run("blocks = []\nwhile True: blocks.append(bytearray(10 << 20))")
    assert "MemoryError" in result.text
    assert kilobytes(session.pid, "VmPeak") <= SMALL.memory_mb * 1024
    assert session.run("del blocks\nkept").text == "1\n"


def test_infinite_loop_is_interrupted_and_keeps_its_names(session: Session):
    with Session(session.walls, QUICK) as quick:
        result = quick.run("n = 5\nwhile True: pass")
        assert result.status == "timeout"
        assert quick.run("n").text == "5\n"


def test_loop_that_swallows_interrupts_is_killed_and_replaced(session: Session):
    with Session(session.walls, QUICK) as quick:
        first = quick.pid
        result = quick.run("import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass")
        assert result.status == "killed" and "did not stop" in result.text
        wait_until_gone(first)
        assert quick.run("1 + 1").text == "2\n"


def test_threads_left_behind_do_not_run_between_calls(session: Session):
    session.run(
        "import threading\ndef spin():\n    while True: pass\n"
        "for i in range(4): threading.Thread(target=spin, daemon=True).start()"
    )
    assert int(status(session.pid, "Threads")) > 1
    # the group was signalled before `run` returned; each thread stops at its next return to user space
    deadline_ticks = cpu_ticks(session.pid) + 100
    while status(session.pid, "State")[0] != "T":
        assert cpu_ticks(session.pid) < deadline_ticks
    before = cpu_ticks(session.pid)
    sum(range(10**7))  # time for others
    assert cpu_ticks(session.pid) - before <= 1
    session.restart()


def test_thread_bomb_stays_below_its_limit(session: Session):
    result = session.run(
        "import threading\nthreading.stack_size(65536)\nstop = threading.Event()\nn = 0\n"
        "while n < 5000: threading.Thread(target=stop.wait, daemon=True).start(); n += 1"
    )
    if result.status == "killed":  # where RLIMIT_NPROC counts other processes too, the parent counts
        assert "threads" in result.text
    else:
        assert "can't start new thread" in result.text
        assert int(status(session.pid, "Threads")) <= SMALL.threads
    session.restart()


def test_files_of_the_host_cannot_be_read(session: Session, secret: Path):
    names = [str(secret), "/etc/passwd", "/etc/shadow", "/etc/hostname", str(REPO / "README.md"), "/proc/1/cmdline"]
    found = attempts(session, *(f"open({name!r}).read()" for name in names[:5]))
    assert set(found) <= {"PermissionError", "FileNotFoundError"}
    folders = attempts(session, f"os.listdir({str(secret.parent)!r})", "os.listdir('/home')", "os.listdir('/var')")
    assert set(folders) <= {"PermissionError", "FileNotFoundError"}


def test_environment_of_the_host_is_not_there(session: Session):
    text = session.run(
        "import os\nprint(dict(os.environ))\n"
        "try: print(open('/proc/self/environ').read())\nexcept OSError as e: print(e)"
    ).text
    assert SECRET not in text and "KIMI_TEST_SECRET" not in text
    for name in ("LD_PRELOAD", "PYTHONPATH", "PYTHONSTARTUP", "AWS_", "SSH_"):
        assert name not in text


def test_ld_preload_reaches_nothing(session: Session, tmp_path: Path):
    # set inside, it could only work in a program that is started; set outside, it would have been reported on stderr
    found = attempts(session, "os.execve(sys.executable, ['x'], {'LD_PRELOAD': '/tmp/x.so'})")
    assert found == ["PermissionError"]
    if os.getuid() == 0:
        assert b"LD_PRELOAD" not in Path(f"/proc/{session.pid}/environ").read_bytes()


def test_proc_of_the_parent_cannot_be_read(session: Session):
    own = os.getpid()
    names = ["environ", "mem", "maps", "cmdline", "status", "fd/0", "root/etc/passwd", "cwd/README.md"]
    found = attempts(session, *(f"open('/proc/{own}/{name}', 'rb').read(10)" for name in names))
    assert set(found) <= {"PermissionError", "FileNotFoundError"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make files of another user")
def test_files_of_other_users_cannot_be_read(session: Session, secret: Path):
    os.chown(secret, 12345, 12345)
    secret.chmod(0o600)
    assert attempts(session, f"open({str(secret)!r}).read()")[0] in ("PermissionError", "FileNotFoundError")


def test_sockets_reach_nobody(session: Session, tmp_path: Path):
    path, abstract = str(tmp_path / "s"), f"\0kimi-test-{os.getpid()}"
    listeners = []
    for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, path), (socket.AF_UNIX, abstract)):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
        listeners.append(listener)
    mailbox = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mailbox.bind(("127.0.0.1", 0))
    mailbox.setblocking(False)
    port, mail = listeners[0].getsockname()[1], mailbox.getsockname()[1]
    datagrams = tmp_path / "d"
    box = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    box.bind(str(datagrams))
    box.setblocking(False)
    found = attempts(
        session,
        f"socket.create_connection(('127.0.0.1', {port}))",
        f"socket.socket(socket.AF_UNIX).connect({path!r})",
        f"socket.socket(socket.AF_UNIX).connect({abstract!r})",
        f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {mail}))",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "socket.socket(socket.AF_INET6).bind(('::', 0))",
        # a pair is allowed, for asyncio, but not one that could send elsewhere
        f"socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', {str(datagrams)!r})",
        f"socket.socketpair()[0].sendto(b'x', {str(datagrams)!r})",
        "socket.socketpair()[0].sendmsg([b'x'])",
    )
    assert found == ["PermissionError"] * 10
    for one in listeners:
        with pytest.raises(BlockingIOError):
            one.accept()
        one.close()
    for one in (mailbox, box):
        with pytest.raises(BlockingIOError):
            one.recv(1)
        one.close()


def test_nothing_outside_can_be_written_or_changed(session: Session, secret: Path):
    before = os.stat(secret)
    writable = [str(secret), str(secret.parent / "new"), "/usr/lib/kimi_test", "/kimi_test", "/dev/shm/kimi_test"]
    writable += [str(Path(pytest.__file__).parent / "kimi_test"), str(REPO / "kimi_jax/sandbox/kimi_test")]
    found = attempts(session, *(f"open({name!r}, 'w').write('x')" for name in writable))
    assert set(found) <= {"PermissionError", "FileNotFoundError", "OSError"}
    package = REPO / "kimi_jax/sandbox/limits.py"  # readable inside, so that a change would have a target
    modes = os.stat(package)
    target = str(package)
    changes = [f"os.{change}" for change in (
        f"chmod({target!r}, 0o777)", f"utime({target!r})", f"truncate({target!r}, 0)", f"unlink({target!r})",
        f"rename({target!r}, {target + 'x'!r})", f"link({target!r}, '/tmp/kimi_test')", f"chown({target!r}, 1, 1)",
        f"open({target!r}, os.O_RDONLY | os.O_TRUNC)", f"mkdir({str(package.parent / 'x')!r})",
        f"setxattr({target!r}, 'user.x', b'1')", f"chmod({str(secret)!r}, 0o777)",
        f"fchmod(os.open({target!r}, os.O_RDONLY), 0o777)",
    )]  # fmt: skip
    refused = attempts(session, *changes)
    assert not any(one.startswith(LEAKED) for one in refused), dict(zip(changes, refused, strict=True))
    after = os.stat(package)
    assert (after.st_mode, after.st_mtime_ns, after.st_size) == (modes.st_mode, modes.st_mtime_ns, modes.st_size)
    assert os.stat(secret).st_mode == before.st_mode and secret.read_text() == SECRET
    assert not [name for name in writable[1:] if os.path.exists(name)]


def test_links_planted_in_scratch_lead_nowhere(session: Session, secret: Path):
    found = attempts(
        session,
        f"os.symlink({str(secret)!r}, 'link') or open('link').read()",
        "os.symlink('/etc/passwd', 'link2') or open('link2').read()",
        "os.symlink('/', 'up') or open('up/etc/passwd').read()",
        f"os.symlink({str(secret.parent)!r}, 'folder') or open('folder/new', 'w')",
    )
    assert set(found) <= {"PermissionError", "FileNotFoundError"}
    session.restart()
    assert secret.read_text() == SECRET and not (secret.parent / "new").exists()


def test_other_processes_cannot_be_signalled_or_traced(session: Session, victim: subprocess.Popen):
    number = {"x86_64": {"ptrace": 101, "process_vm_readv": 310, "pidfd_open": 434, "tkill": 200}}.get(
        syscalls.machine(), {"ptrace": 117, "process_vm_readv": 270, "pidfd_open": 434, "tkill": 130}
    )
    code = "libc = ctypes.CDLL(None, use_errno=True)\ndef call(*a):\n    r = libc.syscall(*a)\n"
    code += "    if r < 0: raise OSError(ctypes.get_errno(), 'refused')\n    return r"
    targets = (victim.pid, os.getpid(), -1, 0)
    found = attempts(
        session,
        *(f"os.kill({pid}, signal.SIGKILL)" for pid in targets if pid != 0),
        f"os.killpg({os.getpgid(0)}, signal.SIGKILL)",
        f"call({number['ptrace']}, 16, {victim.pid}, 0, 0)",  # PTRACE_ATTACH
        f"call({number['process_vm_readv']}, {victim.pid}, 0, 0, 0, 0, 0)",
        f"call({number['pidfd_open']}, {victim.pid}, 0)",
        f"call({number['tkill']}, {victim.pid}, 9)",
        f"fcntl.fcntl(0, fcntl.F_SETOWN, {victim.pid})",  # signals by way of asynchronous input
        f"__import__('resource').prlimit({victim.pid}, __import__('resource').RLIMIT_CPU, (1, 1))",
        before=code,
    )
    assert found == ["PermissionError"] * len(found)
    assert victim.poll() is None
    assert status(victim.pid, "TracerPid") == "0"


def test_kernel_surface_is_closed(session: Session):
    """Calls that hold namespaces, memory outside of the limit, or had many kernel bugs: refused on both machines."""
    x86 = {
        "unshare": 272, "setns": 308, "mount": 165, "bpf": 321, "io_uring_setup": 425, "memfd_create": 319,
        "userfaultfd": 323, "perf_event_open": 298, "keyctl": 250, "shmget": 29, "personality": 135, "chroot": 161,
        "clone3": 435, "landlock_create_ruleset": 444, "seccomp": 317, "setuid": 105, "sync": 162, "mq_open": 240,
    }  # fmt: skip
    arm = {
        "unshare": 97, "setns": 268, "mount": 40, "bpf": 280, "io_uring_setup": 425, "memfd_create": 279,
        "userfaultfd": 282, "perf_event_open": 241, "keyctl": 219, "shmget": 194, "personality": 92, "chroot": 51,
        "clone3": 435, "landlock_create_ruleset": 444, "seccomp": 277, "setuid": 146, "sync": 81, "mq_open": 180,
    }  # fmt: skip
    numbers = x86 if syscalls.machine() == "x86_64" else arm
    text = session.run(
        f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nnumbers = {numbers}\n"
        "for name, number in numbers.items():\n"
        "    r = libc.syscall(number, 0, 0, 0, 0, 0)\n    print(name, r, ctypes.get_errno())\n"
        "print('clone', libc.syscall(56 if len(numbers) and numbers['bpf'] == 321 else 220, 0x10000000, 0, 0, 0, 0))\n"
        "print('pdeathsig', libc.prctl(1, 0, 0, 0, 0))"
    ).text
    lines = text.splitlines()
    assert len(lines) == len(numbers) + 2
    for line in lines[:-2]:
        name, returned, code = line.split()
        assert (returned, code) == ("-1", "38" if name == "clone3" else "1"), line
    assert lines[-2:] == ["clone -1", "pdeathsig -1"]


def test_scratch_is_bounded_in_bytes_and_files(session: Session):
    if session.walls.name == "lock":
        assert attempts(session, "open('/tmp/x', 'w')") == ["PermissionError"]
        return
    result = session.run(
        "n = 0\ntry:\n    while True:\n        with open(f'f{n}', 'wb') as f: f.write(bytes(2 << 20))\n        n += 1\n"
        "except OSError as e: print(n, e.errno)\n"
        "import os\nfor name in os.listdir('.'): os.unlink(name)"
    )
    assert result.text == f"{SMALL.scratch_mb // 2} 28\n"
    inodes = session.run(
        "n = 0\ntry:\n    while True: os.mkdir(f'd{n}'); n += 1\nexcept OSError as e: print(n, e.errno)"
    )
    count, code = map(int, inodes.text.split())
    assert code == 28 and count < SMALL.scratch_files
    session.restart()


def test_cpu_time_of_a_session_is_bounded(session: Session):
    with Session(session.walls, SandboxLimits(cpu_seconds=2, timeout_seconds=300, memory_mb=768)) as short:
        first = short.pid
        result = short.run("try:\n    while True: pass\nexcept BaseException: pass")
        assert result.status == "killed" and "process ended" in result.text
        wait_until_gone(first)


def test_nothing_is_left_behind_when_a_session_closes(session: Session):
    with Session(session.walls, SMALL) as other:
        other.run("import threading\nthreading.Thread(target=threading.Event().wait).start()")
        seen = group(other)
        assert seen
    for pid in seen:
        wait_until_gone(pid)
    assert not group(other)


def test_nothing_is_left_behind_when_the_parent_is_killed(session: Session):
    walls: Walls = session.walls
    program = (
        "from kimi_jax.sandbox.session import Session\nfrom kimi_jax.sandbox.walls import Walls\n"
        f"s = Session({walls!r})\nprint(s.pid, s._process.pid, flush=True)\n"
        "s.run('import signal\\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\\nwhile True: pass')"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, text=True,
                              env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO)})  # fmt: skip
    assert parent.stdout
    pids = list(map(int, parent.stdout.readline().split()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for pid in pids:
        wait_until_gone(pid)

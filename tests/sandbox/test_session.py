"""Sessions: state, what a cell shows, images by name, limits; the walls that are chosen; the filter itself."""

from __future__ import annotations

import errno
import os
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.sandbox import seccomp, syscalls, walls
from kimi_jax.sandbox.limits import SandboxError, SandboxLimits
from kimi_jax.sandbox.session import PRELOAD, CellResult, Session
from tests.sandbox.machines import CONFIGURATIONS, SMALL, walls_or_skip


@pytest.fixture(scope="module", params=[*CONFIGURATIONS, "none"])
def session(request):
    with Session(walls_or_skip(request.param), SMALL) as opened:
        yield opened


def test_session_keeps_its_names(session: Session):
    assert session.run("a = 20\ndef f(x): return x + a") == CellResult("ok", ())
    assert session.run("f(1)") == CellResult("ok", ("21\n",))
    assert session.run("_ * 2").text == "42\n"


def test_session_shows_text_images_and_value_in_their_order(session: Session):
    result = session.run(
        "import numpy as np\nfrom PIL import Image\nprint('before')\n"
        "display(np.full((20, 30), 7, np.uint8))\nprint('after')\n"
        "Image.new('RGBA', (4, 5), (255, 0, 0, 128))"
    )
    assert [part if isinstance(part, str) else part.shape for part in result.parts] == [
        "before\n",
        (20, 30, 3),
        "after\n",
        (5, 4, 3),
    ]
    grey, red = result.images
    assert (grey == 7).all()
    assert red[0, 0].tolist() == [255, 127, 127]  # over white, as a page shows it


@pytest.mark.parametrize(
    "code, shape",
    [
        ("np.zeros((16, 16), np.uint8)", (16, 16, 3)),
        ("np.zeros((3, 5, 1), np.uint8)", (3, 5, 3)),
        ("np.zeros((3, 5, 3), np.uint8)[::-1, ::2]", (3, 3, 3)),
        ("np.zeros((3, 5, 4), np.uint8)", (3, 5, 3)),
        ("Image.new('P', (6, 7))", (7, 6, 3)),
        ("Image.new('1', (6, 7))", (7, 6, 3)),
        ("Image.new('I;16', (6, 7))", (7, 6, 3)),
    ],
)
def test_arrays_and_pil_images_come_back_as_pixels(session: Session, code: str, shape: tuple):
    result = session.run(f"import numpy as np\nfrom PIL import Image\n{code}")
    assert [image.shape for image in result.images] == [shape], result


@pytest.mark.parametrize(
    "code", ["np.eye(3, dtype=np.uint8)", "np.zeros((20, 20))", "np.zeros((0, 3), np.uint8)", "b'x'", "'x'"]
)
def test_other_values_come_back_as_text(session: Session, code: str):
    result = session.run(f"import numpy as np\n{code}")
    assert not result.images and result.text


def test_errors_show_the_line_of_the_cell(session: Session):
    result = session.run("x = 1\nx / 0")
    assert result.status == "error"
    assert "x / 0" in result.text and "ZeroDivisionError" in result.text and "cell.py" not in result.text
    assert "SyntaxError" in session.run("x = = 1").text
    assert session.run("class E(Exception):\n    def __str__(self): raise ValueError\nraise E").status == "error"
    assert session.run("class R:\n    def __repr__(self): raise KeyError('r')\nR()").status == "error"
    assert session.run("input()").status == "error"
    assert session.run("x").text == "1\n"


def test_text_is_cut_and_the_rest_counted(session: Session):
    with Session(session.walls, SandboxLimits(output_chars=100, memory_mb=768)) as short:
        result = short.run("print('a' * 150)")
        assert result.text == "a" * 100 + "\n[51 more characters are not shown]"
        assert "ZeroDivisionError" in short.run("print('a' * 150)\n1/0").text


def test_images_are_writable_arrays_by_name_and_survive_a_restart(session: Session):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    session.put({"image_1": image, "mask": image[:, :, 0]})
    assert (session.run("image_1").images[0] == image).all()
    assert session.run("image_1[0] = 0\nmask.shape").text == "(40, 60)\n"
    assert session.run("import os; os._exit(1)").status == "killed"
    assert (session.run("image_1").images[0] == image).all()


@pytest.mark.parametrize("name", ["", "a b", "1x", "import", "x" * 65, "a;b"])
def test_name_of_an_image_is_an_identifier(session: Session, name: str):
    with pytest.raises(ValueError, match="no name for an image"):
        session.put({name: np.zeros((2, 2, 3), np.uint8)})


@pytest.mark.parametrize("array", [np.zeros((2, 2, 3)), np.zeros((2, 2, 5), np.uint8), np.zeros((0, 2), np.uint8)])
def test_image_is_uint8_with_known_channels(session: Session, array: np.ndarray):
    with pytest.raises(ValueError, match="uint8"):
        session.put({"image_1": array})


def test_images_and_code_are_bounded(session: Session):
    with Session(session.walls, SandboxLimits(image_pixels=100, code_chars=10, memory_mb=768)) as short:
        short.put({"a": np.zeros((9, 9), np.uint8)})
        with pytest.raises(ValueError, match="at most 100"):
            short.put({"b": np.zeros((5, 5), np.uint8)})
        assert "at most 10" in short.run("x" * 11).text


def test_what_models_write_works(session: Session):
    """Threads, asyncio, dataclasses, temporary files, Pillow's readers and drawing: the lock must not break these."""
    code = (
        "import asyncio, dataclasses, io, threading, numpy as np\nfrom PIL import Image, ImageDraw, ImageFilter\n"
        "@dataclasses.dataclass\nclass D:\n    x: int\n"
        "async def f():\n    await asyncio.sleep(0.001)\n    return D(3)\n"
        "print(asyncio.run(f()))\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "im = Image.new('RGB', (64, 48)); ImageDraw.Draw(im).text((1, 1), 'hello')\n"
        "for form in ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP'):\n"
        "    b = io.BytesIO(); im.save(b, form); b.seek(0); assert Image.open(b).convert('RGB').size == (64, 48)\n"
        "im.filter(ImageFilter.GaussianBlur(2)).resize((5, 5))\n"
        "print(np.linalg.svd(np.random.default_rng(0).random((5, 5)))[1].shape, np.fft.fft(np.ones(4))[0])\n"
    )
    assert session.run(code) == CellResult("ok", ("D(x=3)\nthread\n(5,) (4+0j)\n",))
    if session.walls.name != "lock":
        code = (
            "import tempfile, os\nwith tempfile.NamedTemporaryFile('w+') as f:\n"
            "    f.write('x'); f.flush(); print(os.stat(f.name).st_size)"
        )
        assert session.run(code).text == "1\n"


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_figures_come_back_once_and_are_closed(configuration: str):
    pytest.importorskip("matplotlib")
    with Session(walls_or_skip(configuration), SandboxLimits(), (*PRELOAD, "matplotlib.pyplot")) as plotting:
        code = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(2, 1), dpi=100)\nax.plot([1, 2])\nfig"
        result = plotting.run(code)
        assert [image.shape for image in result.images] == [(100, 200, 3)], result
        assert not plotting.run("1").images


def test_files_that_packages_bring_can_be_read(session: Session):
    code = "from PIL import ImageFont\nprint(ImageFont.load_default(12) is not None)"
    assert session.run(code).text == "True\n"


def test_walls_are_refused_by_name_and_none_has_to_be_typed():
    with pytest.raises(ValueError, match="auto, bubblewrap, lock, none"):
        walls.choose("firejail")
    for sandbox in ("auto", "bubblewrap", "lock"):
        with pytest.raises(SandboxError, match="sandbox=none"):
            walls.choose(sandbox, probe=())


def test_lock_alone_is_chosen_with_a_warning_and_has_no_scratch():
    walls_or_skip("lock")
    with pytest.warns(RuntimeWarning, match="without a scratch folder"):
        found = walls.choose("auto", probe=("lock",))
    assert found.name == "lock"


def test_other_systems_are_told_that_linux_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="needs Linux, and this is darwin"):
        walls.choose()


def test_other_machines_are_told_so(monkeypatch):
    monkeypatch.setattr(syscalls.platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="not for riscv64"):
        walls.choose()


def test_start_that_fails_says_why():
    with pytest.raises(SandboxError, match="no_such_module, which is not installed"):
        Session(walls_or_skip("none"), SMALL, ("no_such_module",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        strongest = walls.choose()
    with pytest.raises(SandboxError, match=r"(?s)did not start: .*No module named"):
        Session(strongest, SMALL, ("numpy", "this.no_module"))


def test_process_that_is_not_locked_is_recognised():
    with pytest.raises(SandboxError, match="Seccomp 0 instead of 2"):
        walls.check_locked(os.getpid(), 0)


def test_limits_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"limits\.memory_mb must be"):
        SandboxLimits(memory_mb=1).check()


def verdict(code: list[seccomp.Instruction], arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the filter returns for a call: an interpreter of the four instructions of classic BPF that it uses."""
    words = {seccomp.NR: number, seccomp.ARCH: arch}
    for i in range(6):
        value = (arguments[i] if i < len(arguments) else 0) & (2**64 - 1)
        words[seccomp.ARGUMENTS + 8 * i] = value & 0xFFFFFFFF
        words[seccomp.ARGUMENTS + 8 * i + 4] = value >> 32
    at = register = 0
    while True:
        kind, yes, no, k = code[at]
        at += 1
        if kind == seccomp.LOAD:
            register = words[k]
        elif kind == seccomp.AND:
            register &= k
        elif kind == seccomp.RETURN:
            return k
        else:
            holds = register == k if kind == seccomp.EQUAL else register >= k
            at += yes if holds else no


PID = 1234
REFUSED = seccomp.ERRNO | errno.EPERM


@pytest.mark.parametrize("machine", syscalls.MACHINES)
@pytest.mark.parametrize("scratch", [True, False])
def test_filter_allows_exactly_the_listed_calls(machine: str, scratch: bool):
    code = seccomp.program(machine, PID, scratch)
    assert len(code) < 4096  # the kernel's limit
    arch = syscalls.AUDIT_ARCH[machine]
    plain = set(syscalls.numbers(syscalls.COMPUTE, machine).values())
    plain |= set(syscalls.numbers(syscalls.SCRATCH, machine).values()) if scratch else set()
    conditional = set(syscalls.numbers(syscalls.CONDITIONAL, machine).values())
    for number in range(600):
        if number not in conditional:
            assert verdict(code, arch, number) == (seccomp.ALLOW if number in plain else REFUSED), number
    other = syscalls.AUDIT_ARCH["aarch64" if machine == "x86_64" else "x86_64"]
    assert verdict(code, other, 0) == seccomp.KILL_PROCESS
    if machine == "x86_64":
        assert verdict(code, arch, 0x40000000) == seccomp.KILL_PROCESS


@given(
    st.sampled_from(sorted(syscalls.MACHINES)),
    st.booleans(),
    st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6),
)
def test_filter_looks_at_arguments(machine: str, scratch: bool, values: list[int]):
    code, arch = seccomp.program(machine, PID, scratch), syscalls.AUDIT_ARCH[machine]
    numbers = syscalls.numbers(syscalls.CONDITIONAL, machine)

    def allowed(name: str, *arguments: int) -> bool:
        return verdict(code, arch, numbers[name], arguments) == seccomp.ALLOW

    low = [value & 0xFFFFFFFF for value in values]
    thread = bool(low[0] & 0x10000) and not low[0] & seccomp.CLONE_NAMESPACES
    assert allowed("clone", *values) == thread
    assert allowed("clone", 0x3D0F00)  # what glibc starts a thread with
    assert not allowed("clone", 17)  # a fork
    assert allowed("kill", *values) == (low[0] == PID) and allowed("kill", PID, 9)
    assert not allowed("kill", -1 & (2**64 - 1), 9) and not allowed("kill", 0, 9)
    assert allowed("prlimit64", *values) == (low[0] == 0)
    assert allowed("socketpair", 1, values[1]) == (low[1] & 15 == 1)
    assert not allowed("socketpair", 2, 1)
    assert allowed("sendto", *values) == (values[4] == 0)
    assert not allowed("sendto", 3, 0, 0, 0, 1 << 40)
    assert allowed("openat", *values) == (scratch or low[2] & 0o1103 == 0)
    assert allowed("fcntl", 0, 2) and not allowed("fcntl", 0, 8) and not allowed("fcntl", 0, 1031)
    assert not allowed("ioctl", 0, 0x5412) and allowed("ioctl", 0, 0x5401)
    assert verdict(code, arch, numbers["clone3"]) == seccomp.ERRNO | errno.ENOSYS


def test_calls_that_would_open_a_way_out_are_in_no_table():
    known = {*syscalls.COMPUTE, *syscalls.SCRATCH, *syscalls.CONDITIONAL}
    forbidden = {
        "fork", "vfork", "execve", "execveat", "socket", "connect", "bind", "listen", "accept", "sendmsg", "recvmsg",
        "ptrace", "unshare", "setns", "mount", "memfd_create", "bpf", "setsid", "setpgid", "setuid", "tkill",
        "timer_create", "rt_sigqueueinfo", "openat2", "splice", "io_uring_setup",
    }  # fmt: skip
    assert not known & forbidden

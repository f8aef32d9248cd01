"""Attacks on the parent through its pipe: code inside finds the protocol and writes what it likes, or nothing."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.sandbox import walls
from kimi_jax.sandbox.limits import SandboxLimits
from kimi_jax.sandbox.protocol import HEADER, MAGIC, Frame, Pipes, ProtocolError, read_frame
from kimi_jax.sandbox.session import CellResult, Session, read_result
from tests.environment import REPO
from tests.sandbox.machines import CONFIGURATIONS, QUICK, SMALL, walls_or_skip

# finds, by walking up the frames, the descriptor of the replies and the request that is being served
FIND = """
import os, sys, json, struct
frame = sys._getframe()
while "replies" not in frame.f_locals or "request" not in frame.f_locals: frame = frame.f_back
replies, request = frame.f_locals["replies"], frame.f_locals["request"]
def forge(head, body=b"", id=request.id, sizes=None, magic=b"KSB1"):
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    data = struct.pack("<4s16sII", magic, id, *(sizes or (len(head), len(body)))) + head + body
    while data: data = data[os.write(replies, data):]
"""
OK = '{"status": "ok", "parts": []}'


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def session(request):
    with Session(walls_or_skip(request.param), SMALL) as opened:
        yield opened


@pytest.fixture
def quick(session: Session):
    """A session whose time limit is meant to be reached."""
    with Session(session.walls, QUICK) as opened:
        yield opened


@pytest.fixture(scope="module")
def strongest():
    """What the parent refuses does not depend on the walls: one configuration is enough, the strongest that is here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with Session(walls.choose(), SMALL) as opened:
            yield opened


def attack(session: Session, code: str) -> CellResult:
    """Runs the attack and proves that the session works afterwards, whatever it did."""
    result = session.run(FIND + code)
    second = session.run("6 * 7")
    if second.status == "killed":  # what was forged ahead of the request was found out
        second = session.run("6 * 7")
    assert second == CellResult("ok", ("42\n",))
    return result


FORGERIES = {
    "another magic": "forge({}, magic=b'PNG!')",
    "four gigabytes announced": "forge(b'{}', sizes=(2, 2**32 - 1))",
    "a long head announced": "forge(b'{}', sizes=(2**32 - 1, 0))",
    "no JSON": "forge(b'\\xff\\x00')",
    "JSON of a million levels": "forge(b'[' * 100000)",
    "a list": "forge(b'[]')",
    "an unknown status": "forge({'status': 'root', 'parts': []})",
    "status of another type": "forge({'status': ['ok'], 'parts': []})",
    "parts of another type": "forge({'status': 'ok', 'parts': 'text'})",
    "a pickle as a part": "forge({'status': 'ok', 'parts': [{'pickle': 'gASV'}]})",
    "an image of no size": "forge({'status': 'ok', 'parts': [{'image': [0, 5]}]})",
    "an image of negative size": "forge({'status': 'ok', 'parts': [{'image': [-1, -1]}]}, b'abc')",
    "an image of floats": "forge({'status': 'ok', 'parts': [{'image': [1.0, 1.0]}]}, b'abc')",
    "an image of booleans": "forge({'status': 'ok', 'parts': [{'image': [True, True]}]}, b'abc')",
    "an image without pixels": "forge({'status': 'ok', 'parts': [{'image': [16384, 16384]}]})",
    "an image bomb": "forge({'status': 'ok', 'parts': [{'image': [10**9, 10**9]}]})",
    "a thousand images": "forge({'status': 'ok', 'parts': [{'image': [1, 1]}] * 1000}, b'abc' * 1000)",
    "pixels of no image": "forge({'status': 'ok', 'parts': []}, b'abc')",
    "much text": "forge({'status': 'ok', 'parts': [{'text': 'x' * 100000}]})",
    "many texts": "forge({'status': 'ok', 'parts': [{'text': ''}] * 10000})",
    "another id": "forge({'status': 'ok', 'parts': []}, id=bytes(16))",
    "a request sent back": "forge(request.head)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_reply_is_refused_and_the_process_replaced(strongest: Session, name: str):
    first = strongest.pid
    result = attack(strongest, FORGERIES[name])
    assert result.status == "killed" and "protocol" in result.text
    assert strongest.pid != first


def test_reply_forged_for_this_request_says_no_more_than_an_honest_one(session: Session):
    result = attack(session, "forge({'status': 'ok', 'parts': [{'text': 'forged'}]})")
    assert result.status in ("ok", "killed")  # the honest reply that follows ends the process


def test_reply_forged_ahead_is_never_taken_for_the_next_one(session: Session):
    session.run(FIND + f"import threading\nforge({OK})\nforge({OK}, id=os.urandom(16))")
    assert session.run("'honest'").status in ("killed", "ok")
    assert session.run("'honest'") == CellResult("ok", ("'honest'\n",))


def test_text_that_cannot_be_encoded_is_made_harmless(session: Session):
    result = attack(session, "print('\\ud800 lone')")
    assert result.text.encode() == b"? lone\n"


def test_gigabyte_printed_comes_back_cut(session: Session):
    with Session(session.walls, dataclasses.replace(SMALL, output_chars=1000)) as patient:
        result = patient.run("for i in range(1024): print('x' * 2**20)")
        assert result.status == "ok"
        assert len(result.text) < 1100 and "more characters are not shown" in result.text


def test_gigabyte_written_on_the_pipe_is_not_read(session: Session):
    result = attack(session, "data = bytes(1 << 20)\nwhile True: os.write(replies, data)")
    assert result.status == "killed" and "not a frame" in result.text


def test_frame_that_drips_is_cut_off(quick: Session):
    code = "import time, signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
    code += "head = struct.pack('<4s16sII', b'KSB1', request.id, 1000, 0)\nos.write(replies, head)\n"
    code += "while True: os.write(replies, b' '); time.sleep(0.05)"
    result = attack(quick, code)
    assert result.status == "killed" and "ran longer" in result.text


def test_child_that_stops_reading_does_not_hold_the_parent(quick: Session):
    quick.run(FIND + f"forge({OK})\nimport signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass")
    image = np.full((2000, 1000, 3), 9, np.uint8)  # more than a pipe holds
    first = quick.pid
    quick.put({"image_1": image})  # meets a deadline, then a new process
    assert quick.pid != first
    assert quick.run("int(image_1.sum())").text == f"{int(image.sum())}\n"


def test_pipe_that_is_closed_ends_the_process(session: Session):
    assert attack(session, "os.close(replies)").status == "killed"
    assert attack(session, "os.closerange(0, 64)").status == "killed"


def test_exit_and_crash_are_told_and_survived(session: Session):
    assert attack(session, "os._exit(0)").status == "killed"
    assert attack(session, "import ctypes; ctypes.string_at(0)").status == "killed"
    assert attack(session, "sys.exit(3)").status == "error"


def test_image_bomb_as_a_value_is_told_in_words(session: Session):
    result = attack(session, "import PIL.Image\nPIL.Image.new('L', (4000, 4000))")
    assert not result.images and "4000x4000 pixels is not shown" in result.text
    many = attack(session, "import numpy as np\nfor i in range(100): display(np.zeros((20, 20), np.uint8))")
    assert len(many.images) == SMALL.output_images


class Bomb:
    """A pickle that would create a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_pickles_and_object_arrays_are_never_loaded(session: Session, tmp_path: Path):
    marker = tmp_path / "loaded"
    data = pickle.dumps(Bomb(marker))
    objects = np.empty(1, object)
    objects[0] = Bomb(marker)
    file = tmp_path / "objects.npy"
    np.save(file, objects, allow_pickle=True)
    for code in (
        f"forge({data!r})",
        f"forge({OK}, {data!r})",
        f"forge({{'status': 'ok', 'parts': [{{'image': [1, 1]}}]}}, {file.read_bytes()!r})",
    ):
        assert attack(session, code).status == "killed"
    assert attack(session, f"print({data!r})").status == "ok"
    assert not marker.exists()


def test_parent_imports_nothing_that_unpickles_or_decodes_images():
    for path in (REPO / "kimi_jax/sandbox").glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
            elif isinstance(node, ast.Attribute):
                assert node.attr not in ("load", "loads") or ast.unparse(node.value) == "json", path.name
        assert not names & {"pickle", "marshal", "shelve", "multiprocessing", "PIL", "PIL.Image"}, path.name


def test_three_thousand_nested_folders_are_removed():
    with Session(walls_or_skip("none"), SMALL) as plain:
        folder = plain._folder
        result = plain.run("import os\nfor i in range(3000):\n    os.mkdir('d'); os.chdir('d')")
        assert result.status == "ok"
    assert not os.path.exists(folder)


def test_nested_folders_in_scratch_do_not_hold_the_parent(session: Session):
    if session.walls.name == "lock":
        pytest.skip("the lock alone has no scratch folder")
    result = attack(
        session, "try:\n    for i in range(3000): os.mkdir('d'); os.chdir('d')\nexcept OSError as e: print(e)"
    )
    assert "No space left" in result.text
    session.restart()


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 20_000) | st.text(max_size=5) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "image", "x"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries({"status": values | st.just("ok"), "parts": values | st.lists(values)}),
    st.binary(max_size=30),
)
def test_any_head_is_a_bounded_result_or_a_protocol_error(head: dict, body: bytes):
    limits = SandboxLimits()
    try:
        result = read_result(Frame(bytes(16), head, body), limits)
    except ProtocolError:
        return
    assert result.status == "ok"
    assert sum(image.size for image in result.images) == len(body)
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in result.images)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes):
    stream = [MAGIC + data]

    def read(size: int) -> bytes:
        assert size <= 2**20, "lengths are compared with their limits before anything is read"
        found, stream[0] = stream[0][:size], stream[0][size:]
        if len(found) < size:
            raise EOFError
        return found

    try:
        frame = read_frame(read, 1000, 1000)
    except (ProtocolError, EOFError):
        return
    assert isinstance(frame.head, dict) and len(frame.body) <= 1000


def test_frame_goes_through_a_pipe_unchanged():
    inside, outside = os.pipe(), os.pipe()
    pipes = Pipes(inside[1], outside[0], watch=lambda: None)
    head = json.dumps({"status": "ok"}).encode()
    os.write(outside[1], HEADER.pack(MAGIC, b"i" * 16, len(head), 3) + head + b"abc")
    assert pipes.unread()
    deadline = float("inf")
    assert read_frame(lambda size: pipes.read(size, deadline), 100, 100) == Frame(b"i" * 16, {"status": "ok"}, b"abc")
    assert not pipes.unread()
    assert struct.calcsize("<4s16sII") == HEADER.size
    pipes.close()
    os.close(inside[0])
    os.close(outside[1])

"""What a server opens by address: nothing, unless it is allowed, and then nothing beside it."""

import http.server
import os
import threading

import pytest

from kimi_jax.data import BadRecord
from kimi_jax.serve.addresses import opener


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret.txt").write_bytes(b"outside")
    (tmp_path / "media" / "link.png").symlink_to(tmp_path / "secret.txt")
    return tmp_path / "media"


class _Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302 if self.path == "/elsewhere" else 200)
        self.send_header("location", "ftp://127.0.0.1/x")
        self.end_headers()
        self.wfile.write(b"fetched")

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_by_default():
    assert opener(False, "") is None


def test_files_below_the_folder_only(folder):
    open_address = opener(False, str(folder))
    assert open_address("a b.png") == b"inside"
    assert open_address(f"file://{folder}/a%20b.png") == b"inside"
    for address in ("../secret.txt", f"{folder.parent}/secret.txt", "link.png", "http://127.0.0.1/", "ftp://x/y"):
        with pytest.raises(BadRecord, match="refused"):
            open_address(address)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    for address in ("none.png", "x" * 5000, "a%00b", "circle.png", "pipe.png", "."):
        with pytest.raises(BadRecord, match="missing_file"):
            open_address(address)


def test_remote_addresses(site):
    open_address = opener(True, "")
    assert open_address(f"{site}/a.png") == b"fetched"
    for address in (f"{site}/elsewhere", "a.png", "file:///a.png"):
        with pytest.raises(BadRecord, match="refused"):
            open_address(address)
    with pytest.raises(BadRecord, match="does not answer"):
        open_address("http://127.0.0.1:1/")

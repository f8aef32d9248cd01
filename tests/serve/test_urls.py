"""What a server opens by URL: nothing, unless it is allowed, and then nothing beside it."""

import os

import pytest

from kimi_jax.data import BadRecord
from kimi_jax.serve.urls import opener


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret.txt").write_bytes(b"outside")
    (tmp_path / "media" / "link.png").symlink_to(tmp_path / "secret.txt")
    return tmp_path / "media"


def test_nothing_by_default(folder):
    for url in (f"{folder}/a b.png", "a b.png", "http://127.0.0.1/", "file:///etc/passwd", "http://[", ""):
        with pytest.raises(BadRecord, match="refused"):
            opener("", {})(url)


def test_files_below_the_folder_only(folder):
    open_url = opener(str(folder), {})
    assert open_url("a b.png") == b"inside"
    assert open_url(f"file://{folder}/a%20b.png") == b"inside"
    for url in ("../secret.txt", f"{folder.parent}/secret.txt", "link.png", "http://127.0.0.1/", "ftp://x/y"):
        with pytest.raises(BadRecord, match="refused"):
            open_url(url)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    for url in ("none.png", "x" * 5000, "a%00b", "circle.png", "pipe.png", "."):
        with pytest.raises(BadRecord, match="missing_file"):
            open_url(url)


def test_errors_of_files_name_no_folder_of_the_server(folder):
    open_url = opener(str(folder), {})
    for url in ("none.png", "../secret.txt", "x" * 5000, "."):
        with pytest.raises(BadRecord) as error:
            open_url(url)
        assert str(folder.parent) not in str(error.value)


def test_files_take_their_memory_before_they_are_read(folder):
    taken = []
    assert opener(str(folder), {}, taken.append)("a b.png") == b"inside"
    assert taken == [6]


def test_remote_urls_come_from_what_was_fetched():
    open_url = opener("", {"http://host/a": b"fetched"})
    assert open_url("http://host/a") == b"fetched"
    with pytest.raises(BadRecord, match="refused"):
        open_url("http://host/b")

"""Images and videos by path, which a server opens only below the folder that its flag allows.

A client that could name any file could read what only the server may see. So by default none is opened; data URIs,
which bring their own bytes, always are (`data.processor`), and http URLs have a file of their own (`remote`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kimi_jax.data import BadRecord

MAX_BYTES = 64 << 20


def is_remote(url: str) -> bool:
    """Whether it is an http or https URL."""
    return url[:8].lower().startswith(("http://", "https://"))


def opener(
    folder: str, fetched: Mapping[str, bytes], reserve: Callable[[int], None] = lambda count: None
) -> Callable[[str], bytes]:
    """What `Chat.open_url` takes: a function from a URL to bytes.

    folder: file: URLs and paths below it are opened; "" for none. fetched: the bytes of remote URLs. reserve:
    takes the memory for a file before it is read.
    The function raises BadRecord: refused, missing_file, too_long.
    """

    def open_url(url: str) -> bytes:
        shown = url[:80]
        if url in fetched:
            return fetched[url]
        if is_remote(url):
            raise BadRecord("refused", shown, "this server opens no remote URLs (--allow_remote_media)")
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise BadRecord("refused", shown, "this server does not open such URLs") from error
        if parts.scheme in ("", "file") and folder:
            return _read(Path(unquote(parts.path)), Path(folder), shown, reserve)
        raise BadRecord("refused", shown, "this server does not open such URLs")

    return open_url


def _read(path: Path, folder: Path, shown: str, reserve: Callable[[int], None]) -> bytes:
    """Errors name the URL as the client wrote it, never the path on the server."""
    root = folder.resolve()
    try:
        file = (root / path).resolve()  # links are followed first, so that none leads out
        if not file.is_relative_to(root):
            raise BadRecord("refused", shown, "only files below the folder of --allow_media_folder are opened")
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device never ends
                raise BadRecord("missing_file", shown)
            if status.st_size > MAX_BYTES:
                raise BadRecord("too_long", shown, f"more than {MAX_BYTES} bytes")
            reserve(status.st_size)
            return opened.read(status.st_size)
    except (OSError, RuntimeError, ValueError) as error:  # names that are too long or hold zeros, links in a circle
        raise BadRecord("missing_file", shown) from error

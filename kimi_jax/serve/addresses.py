"""Pictures by address, which a server opens only as far as its flags allow.

A client that could name any file or any host could read what only the server may see. So by default neither is opened;
data URIs, which bring their own bytes, always are (`data.processor`).
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kimi_jax.data import BadRecord

TIMEOUT = 20.0  # seconds
MAX_BYTES = 256 << 20


def opener(remote: bool, folder: str) -> Callable[[str], bytes] | None:
    """What `Chat.open_address` takes: a function from an address to bytes, None if nothing may be opened.

    remote: http and https addresses. folder: file: addresses and paths below this folder; "" for none.
    The function raises BadRecord: refused, missing_file, broken_image (an address that does not answer), too_long.
    """
    if not remote and not folder:
        return None

    def open_address(address: str) -> bytes:
        shown, parts = address[:80], urlsplit(address)
        if parts.scheme in ("http", "https"):
            if not remote:
                raise BadRecord("refused", shown, "this server opens no remote addresses (--allow_remote_media)")
            return _fetch(address, shown)
        if parts.scheme in ("", "file") and folder:
            return _read(Path(unquote(parts.path)), Path(folder), shown)
        raise BadRecord("refused", shown, "this server does not open such addresses")

    return open_address


def _read(path: Path, folder: Path, shown: str) -> bytes:
    root = folder.resolve()
    try:
        file = (root / path).resolve()  # links are followed first, so that none leads out
        if not file.is_relative_to(root):
            raise BadRecord("refused", shown, "only files below the folder of --allow_media_folder are opened")
        if not file.is_file():
            raise BadRecord("missing_file", shown)
        if file.stat().st_size > MAX_BYTES:
            raise BadRecord("too_long", shown, f"more than {MAX_BYTES} bytes")
        return file.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # names that are too long or hold zeros, links in a circle
        raise BadRecord("missing_file", shown, str(error)) from error


class _OnlyHttp(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but to no other scheme."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise BadRecord("refused", newurl[:80], "a redirection to another scheme")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(address: str, shown: str) -> bytes:
    try:
        with urllib.request.build_opener(_OnlyHttp).open(address, timeout=TIMEOUT) as answer:
            data = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors, those of http.client partly ValueErrors
        raise BadRecord("broken_image", shown, f"the address does not answer: {error}") from error
    if len(data) > MAX_BYTES:
        raise BadRecord("too_long", shown, f"more than {MAX_BYTES} bytes")
    return data

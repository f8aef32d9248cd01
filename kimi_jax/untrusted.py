"""Bounded reading of files that somebody else wrote: regular files only, limited JSON, names that stay in their folder.

`open_regular` and `read_regular` raise OSError. The functions above them take the class of the error to raise, because
callers name trouble differently (ConfigError for settings, CheckpointError for weights, ValueError for tokenizers).
Paths in a bucket (`gs://...`) are read by `epath`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, NoReturn

from etils import epath

MAX_CONFIG = 1 << 24  # bytes of a config.json or tokenizer_config.json; the released ones have about 5 KB
MAX_TABLE = 100_000_000  # bytes of a safetensors header or index: the limit of the safetensors library
MAX_DEPTH = 32  # nested lists and objects; the released files have 6
PLAIN_NAME = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.+=@ ()-]{1,200}")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a bucket's, `gs://...`, and not a file system's."""
    return "://" in os.fspath(path)


def open_regular(path: str | os.PathLike[str], max_bytes: int | None = None) -> io.BufferedIOBase:
    """The file, open for reading: a regular one of at most `max_bytes`, whatever the path turns into meanwhile.

    A path may name a FIFO that nobody writes to, a device without an end, or a file of a terabyte. The descriptor is
    opened without blocking and looked at itself (`fstat`), so that nothing can be exchanged between the look and the
    read. Files in a bucket are asked for their size first. Raises OSError: EINVAL for what is no regular file or no
    name of one (NUL, half of a surrogate pair), EFBIG for a larger file, and whatever the system says.
    """
    name = os.fspath(path)
    if is_remote(name):
        remote: Any = epath.Path(name)
        _check_size(name, remote.stat().length, max_bytes)
        return remote.open("rb")
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # UnicodeEncodeError is one
        raise OSError(errno.EINVAL, "not the name of a file", ascii(name)) from error
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise
        raise OSError(errno.EINVAL, "not a regular file", name) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "Is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise OSError(errno.EINVAL, kind, name)
        _check_size(name, status.st_size, max_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The bytes of a file, at most `max_bytes` even if it grows meanwhile. Raises OSError as `open_regular`."""
    with open_regular(path, max_bytes) as file:
        size = file.seek(0, os.SEEK_END)  # asked to read more, Python allocates all of it
        file.seek(0)
        data = file.read(min(size, max_bytes) + 1)
    _check_size(os.fspath(path), len(data), max_bytes)
    return data


def _check_size(name: str, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise OSError(errno.EFBIG, f"{size:,} bytes; at most {max_bytes:,} are read", name)


@contextlib.contextmanager
def refusing(error: type[ValueError]) -> Iterator[None]:
    """What `open_regular` refuses (EINVAL, EFBIG) as `error`, which names the file; other OSErrors stay."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.EFBIG):
            raise
        reason = (
            "is not a regular file" if problem.errno == errno.EINVAL else f"is larger than allowed: {problem.strerror}"
        )
        raise error(f"{problem.filename} {reason}") from problem


def read_bytes(path: str | os.PathLike[str], limit: int, error: type[ValueError]) -> bytes:
    """A whole file of at most `limit` bytes. Raises `error` for what `open_regular` refuses, and other OSErrors."""
    with refusing(error):
        return read_regular(path, limit)


def read_json(path: str | os.PathLike[str], limit: int, error: type[ValueError]) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises what `read_bytes` and `parse_object` raise."""
    return parse_object(read_bytes(path, limit, error), os.fspath(path), error)


def parse_object(data: bytes, where: str, error: type[ValueError]) -> dict[str, Any]:
    """A JSON object (RFC 8259, UTF-8) with unique keys and finite numbers, nested at most MAX_DEPTH deep.

    Raises `error`, which begins with `where`.
    """
    try:
        value = _DECODER.decode(data.decode("utf-8"))
    except RecursionError as problem:
        raise error(f"{where} is nested deeper than {MAX_DEPTH} levels") from problem
    except ValueError as problem:
        raise error(f"{where} is not JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{where} must hold a JSON object, not {describe(value)}")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            break
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)
                 if isinstance(child, (dict, list))]  # fmt: skip
    if level:
        raise error(f"{where} is nested deeper than {MAX_DEPTH} levels")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)!r} appears twice")
    return found


def refuse_constant(name: str) -> NoReturn:
    """For json.loads: NaN and Infinity, which Python reads and JSON does not have, raise ValueError."""
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=refuse_constant)


def describe(value: Any) -> str:
    """A value in an error message: at most 60 characters of it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


def check_inside(folder: epath.Path, name: str, error: type[ValueError]) -> epath.Path:
    """folder / name, where `name` comes from a file: a plain name whose file lies in the folder, links followed.

    Raises `error` for everything that leaves the folder.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise error(f"{folder}: {describe(name)} is not a plain file name; names must stay inside the folder")
    return check_link(folder / name, error)


def check_link(path: epath.Path, error: type[ValueError]) -> epath.Path:
    """The path again. Raises `error` if it is a link that leads out of its folder.

    A link from a snapshot of the Hugging Face cache into the `blobs` folder of the same model is allowed.
    """
    if is_remote(path):
        return path
    home, real = os.path.realpath(path.parent), os.path.realpath(path)
    snapshots = os.path.dirname(home)
    allowed = [home]
    if os.path.basename(snapshots) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    if os.path.dirname(real) not in allowed:
        raise error(f"{path} is a link out of its folder, to {real}; put the file itself there")
    return path

"""Opens files that strangers name: regular files only, up to a size, whatever the path turns into meanwhile.

A path may name a FIFO that nobody writes to, a device without an end, or a file of a terabyte. The descriptor is
opened without blocking and looked at itself (`fstat`), so that nothing can be exchanged between the look and the read.
Paths in a bucket are asked for their size first.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import PurePath
from typing import Any

from etils import epath

MAX_MEDIA_BYTES = 2 << 30  # of one encoded image or video


def open_regular(path: str | PurePath, max_bytes: int | None = None) -> io.BufferedIOBase:
    """The file, open for reading. Raises OSError: EINVAL for what is no regular file or no name of one (NUL, half of a
    surrogate pair), EFBIG for more than `max_bytes`, and whatever the system says.
    """
    name = os.fspath(path)
    if "://" in name:
        remote: Any = epath.Path(name)
        _check_size(name, remote.stat().length, max_bytes)
        return remote.open("rb")
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # UnicodeEncodeError is one
        raise OSError(errno.EINVAL, "not the name of a file", ascii(name)) from error
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


def read_regular(path: str | PurePath, max_bytes: int = MAX_MEDIA_BYTES) -> bytes:
    """The bytes of a file, at most `max_bytes` even if it grows meanwhile. Raises OSError as `open_regular`."""
    with open_regular(path, max_bytes) as file:
        size = file.seek(0, os.SEEK_END)  # asked to read more, Python allocates all of it
        file.seek(0)
        data = file.read(min(size, max_bytes) + 1)
    _check_size(os.fspath(path), len(data), max_bytes)
    return data


def bad_file_reason(error: OSError) -> str:
    """The reason of a BadRecord for an error of `open_regular`: absurd_size or missing_file."""
    return "absurd_size" if error.errno == errno.EFBIG else "missing_file"


def _check_size(name: str, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise OSError(errno.EFBIG, f"{size:,} bytes; at most {max_bytes:,} are read", name)

"""Checksums of the files of a checkpoint: written with it, verified before it is used.

`FOLDER/checksums.json` holds the size and the CRC-32 (`zlib`, as in gzip and PNG) of every file below the folder, and a
CRC-32 of that list itself; `_CHECKPOINT_METADATA`, of which nothing is used, has none. It tells damage from trouble
that passes: a file that is missing, has another size or another sum is damaged; an error while a file is read (no file
descriptor, no memory, I/O) says nothing about it and is raised.

Measured on one core: CRC-32 7.2 GB/s, SHA-256 2.1 GB/s, BLAKE2b 1.4 GB/s. Storage is slower than the sum.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

NAME = "checksums.json"
# what Orbax writes after everything else: a time, and in buckets the mark of a finished step
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
BLOCK = 1 << 24  # bytes read at a time
THREADS = 8


def write(folder: Any) -> None:
    """Writes the checksums of all files below `folder`. Raises OSError."""
    folder = epath.Path(folder)
    names = sorted(_files(folder))
    with ThreadPoolExecutor(THREADS) as pool:
        sums = dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))
    (folder / NAME).write_text(json.dumps({"files": sums, "crc32": _sum_of_list(sums)}), encoding="utf-8")


def recorded(folder: Any) -> dict[str, list[int]] | None:
    """The size and the CRC-32 of each file by its name below `folder`; None if none were written.

    Raises ValueError if the list itself is damaged.
    """
    file = epath.Path(folder) / NAME
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes().decode("utf-8"))
        sums = found["files"]
        whole = _sum_of_list(sums) == found["crc32"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    if not whole:
        raise ValueError(f"{file} is damaged: its own checksum is another one")
    return sums


def problems(folder: Any, parts: tuple[str, ...] = (), reader: int = 0, readers: int = 1) -> list[str]:
    """One line for every damaged file; empty if all are whole, or if no checksums were written.

    parts: names of files and folders directly below `folder` that are verified; all by default. Of several readers each
    verifies its share. Raises OSError for a file that cannot be read just now.
    """
    folder = epath.Path(folder)
    try:
        sums = recorded(folder)
    except ValueError as error:
        return [str(error)]
    names = [name for name in sorted(sums or ()) if not parts or name.split("/")[0] in parts][reader::readers]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _problem(folder / name, (sums or {})[name]), names)
        return [line for line in found if line]


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif prefix or path.name not in (NAME, *LATER):
            yield prefix + path.name


def _sum(file: epath.Path) -> list[int]:
    size, crc = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _sum_of_list(sums: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())


def _problem(file: epath.Path, wanted: list[int]) -> str:
    try:
        found = _sum(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{file} is missing"
    if found[0] != wanted[0]:
        return f"{file} has {found[0]} bytes instead of {wanted[0]}"
    return "" if found[1] == wanted[1] else f"{file} is damaged: its checksum is another one"

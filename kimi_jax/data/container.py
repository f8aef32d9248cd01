"""Whether a video file ends before its own container says that it does: a download that broke off.

FFmpeg plays such a file to where it ends and reports nothing, so that it would pass as a shorter video. What each
container declares: Matroska the size of its segment (RFC 8794, RFC 9559), AVI that of its RIFF chunks, MP4 and its
relatives (ISO 14496-12) that of each box, FLV the size of the tag before its end, MPEG-TS packets of one size, GIF and
PNG a last block. A file written as a stream declares no sizes, and then nothing is known.
"""

from __future__ import annotations

import io
import struct

TS_PACKETS = (188, 192, 204)
BOXES = 100_000  # looked at in one MP4 file


def cut_short(file: io.BufferedIOBase) -> str:
    """What the container declares and the file does not hold, "" when nothing is missing. The position is moved."""
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(1024)
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _matroska(head, size)
    if head.startswith(b"RIFF"):
        return _riff(file, size)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        return _boxes(file, size)
    if head.startswith(b"FLV"):
        return _flv(file, size)
    if head.startswith(b"GIF8") and not _ends_with(file, size, b"\x3b"):
        return "the trailer of the GIF is missing"
    if head.startswith(b"\x89PNG") and not _ends_with(file, size, b"IEND"):
        return "the last chunk of the PNG is missing"
    for packet in TS_PACKETS:
        first = 4 if packet == 192 else 0
        starts = head[first::packet]
        if len(starts) > 2 and set(starts) == {0x47}:
            return f"the last packet has {size % packet} bytes of {packet}" if size % packet else ""
    return ""


def _ends_with(file: io.BufferedIOBase, size: int, mark: bytes) -> bool:
    file.seek(max(0, size - 64))
    return mark in file.read()


def _missing(what: str, end: int, size: int) -> str:
    return f"{what} ends at byte {end:,}, the file at {size:,}" if end > size else ""


def _number(data: bytes, at: int, keep_mark: bool = False) -> tuple[int, int, bool]:
    """An EBML number: (value, where it ends, whether all its bits are ones, which means unknown)."""
    length = 9 - data[at].bit_length()
    if length > 8 or at + length > len(data):
        raise IndexError(at)
    value = int.from_bytes(data[at : at + length], "big")
    ones = (1 << (7 * length)) - 1
    return (value if keep_mark else value & ones), at + length, value & ones == ones


def _matroska(head: bytes, size: int) -> str:
    try:
        length, at, _ = _number(head, 4)
        at += length
        while True:  # the segment, or a void before it
            name, at, _ = _number(head, at, keep_mark=True)
            length, at, unknown = _number(head, at)
            if name == 0x18538067:
                return "" if unknown else _missing("the segment", at + length, size)
            at += length
    except IndexError:
        return ""


def _riff(file: io.BufferedIOBase, size: int) -> str:
    at = 0
    while at + 12 <= size:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name != b"RIFF" or length in (0, 0xFFFFFFFF):
            return ""
        at += 8 + length + length % 2
        if missing := _missing("a RIFF chunk", at - length % 2, size):
            return missing
    return ""


def _boxes(file: io.BufferedIOBase, size: int) -> str:
    at = 0
    for _ in range(BOXES):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return ""
        length, name = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack(">Q", head[8:])
        if length < 8:  # to the end of the file, or no box
            return ""
        at += length
        if name in (b"mdat", b"moov", b"moof") and (missing := _missing(f"the box {name.decode()}", at, size)):
            return missing
    return ""


def _flv(file: io.BufferedIOBase, size: int) -> str:
    file.seek(max(0, size - 4))
    (length,) = struct.unpack(">I", file.read(4).rjust(4, b"\0"))
    start = size - 4 - length
    if length >= 11 and start >= 13:
        file.seek(start)
        tag = file.read(4)
        if tag[0] & 0x1F in (8, 9, 18) and int.from_bytes(tag[1:4], "big") == length - 11:
            return ""
    return "the last tag of the FLV is not whole"

"""What a run is fed, beside its settings: its tokenizer, kept in the workdir, and fingerprints that checkpoints carry.

WORKDIR/tokenizer/ holds a copy of `config.data.tokenizer`, so that a workdir can be copied elsewhere and loaded there.
Every checkpoint holds a CRC-32 of the tokenizer's files and of a sample of each source. A run that goes on with others
would be another run under the old name, with nothing in its log to show it.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from kimi_jax import hosts
from kimi_jax.config import ConfigError, DataConfig, TrainConfig
from kimi_jax.data import BadRecord, DataError
from kimi_jax.data.example import Example, Image, Text
from kimi_jax.data.image import image_size
from kimi_jax.data.sources import open_source

SAMPLE = 16  # records of a source that are read, evenly spread over it
NAMES = "tokenizer_config.json"  # beside a tiktoken.model
# examples that wait in the packing buffer were split for these; other values would give other pieces
FIXED = ("sequence_length", "vision_bins")


def _tokenizer_files(path: str) -> dict[str, bytes]:
    """The files of a tokenizer, by the names under which `load_tokenizer` finds them in a folder."""
    file = Path(path)
    if file.is_dir():
        inside = [file / name for name in ("tiktoken.model", "tokenizer.json")]
        file = next((each for each in inside if each.is_file()), inside[0])
    if not file.is_file():
        return {}  # the data stream says what is wrong
    if file.suffix == ".json":
        return {"tokenizer.json": file.read_bytes()}
    names = file.with_name(NAMES)
    found = {"tiktoken.model": file.read_bytes()}
    return found | ({NAMES: names.read_bytes()} if names.is_file() else {})


def keep_tokenizer(config: TrainConfig) -> None:
    """Copies the tokenizer into the workdir, unless it is there. Raises OSError."""
    folder = epath.Path(config.workdir) / "tokenizer"
    for name, content in (_tokenizer_files(config.data.tokenizer) if config.data.tokenizer else {}).items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def kept_tokenizer(workdir: Any, given: str) -> str:
    """Where the tokenizer of a workdir is: its copy, or what its settings name if it has none."""
    folder = epath.Path(workdir) / "tokenizer"
    return str(folder) if folder.is_dir() else given


def fingerprint(data: DataConfig) -> dict[str, Any]:
    """{"tokenizer": CRC-32, "sources": {name: CRC-32}}, the same on all hosts; host 0 opens every source.

    Raises ConfigError on all hosts if a source cannot be opened or read.
    """
    found, problem = None, None
    if hosts.is_first():
        try:
            found = _fingerprint(data)
        except (ConfigError, DataError, OSError) as error:
            problem = str(error)
    found, problem = hosts.gather([found, problem])[0]
    if problem:
        raise ConfigError(problem)
    return found


def _fingerprint(data: DataConfig) -> dict[str, Any]:
    files = _tokenizer_files(data.tokenizer) if data.tokenizer else {}
    tokenizer = 0
    for name in sorted(files):
        tokenizer = zlib.crc32(files[name], zlib.crc32(name.encode(), tokenizer))
    return {"tokenizer": tokenizer, "sources": {name: _of_source(source) for name, source in data.sources.items()}}


def _of_source(config: Any) -> int:
    source = open_source(config)
    crc = zlib.crc32(str(len(source)).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)) if len(source) else ():
        try:
            crc = _of_example(source[int(index)], crc)
        except BadRecord as bad:
            crc = zlib.crc32(bad.reason.encode(), crc)
    return crc


def _of_example(example: Example, crc: int) -> int:
    for part in example.parts:
        if isinstance(part, Text):
            text = json.dumps([part.text, float(part.loss_weight)])
            crc = zlib.crc32(text.encode(), crc)
            continue
        image = part.image if isinstance(part, Image) else part.frames[0]
        count = 1 if isinstance(part, Image) else len(part.frames)
        crc = zlib.crc32(repr((count, *image_size(image))).encode(), crc)
        try:
            crc = zlib.crc32(np.asarray(image).tobytes(), crc)
        except (OSError, ValueError, SyntaxError):  # damaged pixels: the data stream counts them
            crc = zlib.crc32(b"broken", crc)
    return crc


def check(saved: TrainConfig, found: dict[str, Any] | None, config: TrainConfig, now: dict[str, Any]) -> None:
    """Raises ConfigError if a run would go on with other data than its checkpoint was trained on.

    found, now: fingerprints, of the checkpoint (None: it has none) and of this start.
    """
    for name in FIXED:
        before, after = getattr(saved.data, name), getattr(config.data, name)
        if before != after:
            raise ConfigError(
                f"config.data.{name} is {after!r} and was {before!r}: the data stream cannot go on, because the "
                "examples that wait to be packed were split for the old value. Put it back, or use another "
                "--config.workdir"
            )
    if found is None or not config.checkpoint.check_data:
        return
    other = found["tokenizer"] and now["tokenizer"] and found["tokenizer"] != now["tokenizer"]  # 0: there is no file
    changed = [f"the tokenizer {config.data.tokenizer}"] if other else []
    changed += [
        f"source {name!r} ({config.data.sources[name].path})"
        for name, crc in now["sources"].items()
        if found["sources"].get(name, crc) != crc
    ]
    if changed:
        raise ConfigError(
            f"{' and '.join(changed)}: the content is another one than when the checkpoint was written. Bring the old "
            "files back, use another --config.workdir, or go on all the same with --config.checkpoint.check_data=False"
        )

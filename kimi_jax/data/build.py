"""python -m kimi_jax.data build SRC DST: your own data into sharded ArrayRecord files that a run reads by number.

  SRC   a JSONL file with media beside it (format: kimi_jax/data/sources/jsonl.py), or 'FILES.parquet?template=...'
  DST   a folder that does not exist yet, or one that this command began to fill

Every record is decoded once, so that what is broken shows now and not in the run; the stored media are the original
files, byte for byte. Bad records are left out, counted by reason and listed in DST/bad_records.jsonl. The command may
be killed at any moment: the same command goes on with the shards that are missing, and the result is the same to the
byte. Then: --config.data.sources.mine.kind=array_record --config.data.sources.mine.path=DST

Shards are independent: each is written under a temporary name and renamed when it is whole, its counts likewise (in
DST/.build until the end). DST must be a local folder; copy the finished one to a bucket.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data import BadRecord, DataError
from kimi_jax.data.example import EncodeLimits, encode
from kimi_jax.data.sources import open_source
from kimi_jax.data.sources.array_record import FORMAT, MANIFEST, VERSION, read_manifest
from kimi_jax.data.sources.record import Media, decode, pack
from kimi_jax.data.tokenizer import Tokenizer, load_tokenizer

PROGRESS = ".build"  # sub-folder of an unfinished build
BAD = "bad_records.jsonl"
SHOWN = 3  # bad records named in a message


@dataclass(frozen=True)
class BuildPlan:
    """What decides the bytes of a build. Two runs of one plan write the same files."""

    source: SourceConfig
    sha256: str  # of the source's files (media are not looked at)
    records: int  # lines or rows, bad ones included
    tokenizer: str
    tokenizer_sha256: str
    shard_size: int
    name: str  # files are NAME-00000-of-000NN.array_record

    @property
    def num_shards(self) -> int:
        """Files of the result."""
        return -(-self.records // self.shard_size)

    def shard_name(self, shard: int) -> str:
        """File name of a shard."""
        return f"{self.name}-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def identity(self) -> dict[str, Any]:
        """As kept in files. Without paths: data that moved is the same data."""
        kept = ("sha256", "records", "tokenizer_sha256", "shard_size", "name")
        return {k: v for k, v in asdict(self).items() if k in kept} | {"version": VERSION}


class ShardSummary(NamedTuple):
    """What one finished shard holds."""

    records: int
    size: int  # bytes
    images: int
    videos: int
    learned: int  # records with a loss anywhere
    lengths: list[list[int]]  # [tokens, patches] of every record
    bad: list[dict[str, str]]


class _Bytes(Tokenizer):
    """A token a byte: for a build without a tokenizer, which counts patches only."""

    def __init__(self) -> None:
        self.vocab_size = 256 + 16
        self.bos_id, self.eos_id, self.pad_id = 0, 1, 2
        self.media_begin_id, self.media_content_id, self.media_end_id, self.media_pad_id = 6, 7, 8, 9

    def encode(self, text: str, allow_special_tokens: bool = False) -> list[int]:
        return [16 + b for b in text.encode("utf-8", "replace")]


# ------------------------------------------------------------------------------------------------------------ command


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("tokenizer", "", "Counts tokens with this tokenizer file; without it token lengths are -1.")
    flags.DEFINE_integer("workers", 2, "Processes; 0 works in this one.", lower_bound=0)
    flags.DEFINE_integer("shard_size", 1000, "Records a file.", lower_bound=1)
    flags.DEFINE_float("max_bad_fraction", 0.01, "Stops when a larger share of the records is bad.", 0.0, 1.0)
    flags.DEFINE_string("name", "", "First part of the file names; default: the name of SRC.")


def main(argv: list[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    if len(argv) != 3:
        sys.exit("usage: python -m kimi_jax.data build SRC DST [--tokenizer=FILE] [--workers=2]   (--help for more)")
    f = flags.FLAGS
    try:
        manifest = build(
            argv[1], argv[2], f.tokenizer, f.workers, f.shard_size, f.max_bad_fraction, f.name, progress=True
        )
    except (ConfigError, DataError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    print(summary(manifest, argv[2]))


def build(
    src: str,
    dst: str,
    tokenizer: str = "",
    workers: int = 2,
    shard_size: int = 1000,
    max_bad_fraction: float = 0.01,
    name: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Builds, or finishes building, `dst` from `src` and returns its manifest (`dataset.json`).

    Raises ConfigError for settings that do not fit or a `dst` that holds something else, DataError when more than
    `max_bad_fraction` of the records are bad (what was done stays, a larger fraction goes on from there).
    """
    plan = make_plan(src, tokenizer, shard_size, name)
    folder = Path(dst)
    if (folder / MANIFEST).exists():
        return _finished(plan, folder)
    with _claimed(plan, folder):
        _sweep(folder)
        shards = {i: s for i in range(plan.num_shards) if (s := _read_shard(plan, folder, i)) is not None}
        _check_bad(plan, folder, shards, max_bad_fraction)
        bar = Progress(
            TextColumn("building"), BarColumn(), MofNCompleteColumn(), TextColumn("records"), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not progress,
        )  # fmt: skip
        with bar:
            task = bar.add_task("build", total=plan.records)
            bar.advance(task, sum(_span(plan, i) for i in shards))
            todo = [i for i in range(plan.num_shards) if i not in shards]
            for i, shard in _write_all(plan, folder, todo, workers):
                shards[i] = shard
                bar.advance(task, _span(plan, i))
                _check_bad(plan, folder, shards, max_bad_fraction)
        return _finish(plan, folder, [shards[i] for i in range(plan.num_shards)])


def make_plan(src: str, tokenizer: str, shard_size: int, name: str) -> BuildPlan:
    """Looks at the source and fixes what the result depends on. Raises ConfigError."""
    path = src.partition("?")[0]
    kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(Path(path).suffix)
    if kind is None:
        raise ConfigError(f"{path!r} is neither a .jsonl nor a .parquet file")
    config = SourceConfig(kind=kind, path=src)
    records = len(open_source(config))
    files = sorted(Path(path).parent.glob(Path(path).name)) if "*" in path else [Path(path)]
    digest = _digest(files, src.partition("?")[2])
    if tokenizer:
        try:
            load_tokenizer(tokenizer)
        except ValueError as e:
            raise ConfigError(f"--tokenizer: {e}") from e
    digest_of_tokenizer = _digest([Path(tokenizer)]) if tokenizer else ""
    name = name or Path(path.replace("*", "")).stem.rstrip("-") or "data"
    return BuildPlan(config, digest, records, tokenizer, digest_of_tokenizer, shard_size, name)


def summary(manifest: dict[str, Any], dst: str) -> str:
    """What was built, in a few lines for a person."""
    tokens = f"{manifest['tokens']:,} tokens" if manifest["tokens"] >= 0 else "tokens not counted (no --tokenizer)"
    media = f"{manifest['images']:,} images, {manifest['videos']:,} videos, {manifest['patches']:,} patches"
    lines = [f"{dst}: {manifest['records']:,} records in {len(manifest['shards'])} files; {tokens}; {media}"]
    if manifest["records"] and manifest.get("learned") == 0:
        lines.append("warning: no record has a loss anywhere (all weights are 0): nothing is learned from this data")
    if manifest["bad"]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in manifest["bad"].items())
        lines.append(f"left out: {reasons} (named in {os.path.join(dst, BAD)})")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- shards


def _write_all(plan: BuildPlan, folder: Path, todo: list[int], workers: int) -> Iterator[tuple[int, ShardSummary]]:
    """Writes the shards, yielding each as it is done; when the caller stops, no further one is begun."""
    if workers == 0 or len(todo) < 2:
        for i in todo:
            yield i, write_shard(plan, folder, i)
        return
    context = multiprocessing.get_context("spawn")  # fork and the threads of ArrayRecord do not go together
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_worker)
    running: dict[Future, int] = {pool.submit(write_shard, plan, folder, i): i for i in todo}
    try:
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as e:
        raise DataError("a worker process died (out of memory?): the same command goes on; try fewer --workers") from e
    finally:
        pool.shutdown(cancel_futures=True)


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # killed parents cannot tell their workers to stop

    threading.Thread(target=follow, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _opened(plan: BuildPlan) -> tuple[Any, Any]:
    """The source and the tokenizer, once a process."""
    return open_source(plan.source), load_tokenizer(plan.tokenizer) if plan.tokenizer else _Bytes()


def write_shard(plan: BuildPlan, folder: Path, shard: int) -> ShardSummary:
    """Writes one shard and then its counts; both appear whole or not at all."""
    from array_record.python.array_record_module import ArrayRecordWriter

    source, tokenizer = _opened(plan)
    target = folder / plan.shard_name(shard)
    temporary = folder / PROGRESS / f"{target.name}.{os.getpid()}.tmp"
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    media: Counter[str] = Counter()
    learned, lengths, bad = 0, [], []
    for i in range(shard * plan.shard_size, min((shard + 1) * plan.shard_size, plan.records)):
        try:
            record = source.record(i)
            encoded = encode(decode(record), tokenizer, EncodeLimits())
            length = [
                len(encoded.tokens) if plan.tokenizer else -1,
                sum(len(item.patches) for item in encoded.media),
            ]
            payload = pack(record, *length)
        except BadRecord as e:
            bad.append({"record": str(i), "id": e.key, "reason": e.reason, "detail": e.detail})
            continue
        writer.write(payload)
        lengths.append(length)
        learned += bool(encoded.loss_weights.any())
        media.update(p.kind for p in record.parts if isinstance(p, Media))
    writer.close()
    with temporary.open("rb") as f:
        os.fsync(f.fileno())
    result = ShardSummary(len(lengths), temporary.stat().st_size, media["image"], media["video"], learned, lengths, bad)
    temporary.replace(target)
    _write(folder / PROGRESS / f"{shard:05d}.json", json.dumps(result._asdict()).encode())
    return result


def _read_shard(plan: BuildPlan, folder: Path, shard: int) -> ShardSummary | None:
    """The counts of a finished shard, None when it is missing or not whole."""
    try:
        result = ShardSummary(**json.loads((folder / PROGRESS / f"{shard:05d}.json").read_bytes()))
        whole = (folder / plan.shard_name(shard)).stat().st_size == result.size
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return result if whole else None


def _span(plan: BuildPlan, shard: int) -> int:
    return min(plan.shard_size, plan.records - shard * plan.shard_size)


# ------------------------------------------------------------------------------------------------------- begin and end


@contextlib.contextmanager
def _claimed(plan: BuildPlan, folder: Path) -> Iterator[None]:
    """The folder for this process alone, and for this plan alone."""
    progress = folder / PROGRESS
    if folder.exists() and not progress.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and not an unfinished build: choose another folder")
    progress.mkdir(parents=True, exist_ok=True)
    with (progress / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is building {folder}") from None
        file = progress / "plan.json"
        if file.exists():
            _check_same(plan, json.loads(file.read_bytes()), folder)
        else:
            _write(file, json.dumps(plan.identity()).encode())
        yield


def _check_same(plan: BuildPlan, begun: dict[str, Any], folder: Path) -> None:
    names = {"sha256": "the source", "tokenizer_sha256": "--tokenizer", "records": "the source", "version": "the code"}
    for key, value in plan.identity().items():
        if begun.get(key) != value:
            what = names.get(key, f"--{key}")
            raise ConfigError(
                f"{folder} was built with another {what.removeprefix('the ')} ({key} {begun.get(key)!r}, now "
                f"{value!r}): delete it or choose another folder"
            )


def _finished(plan: BuildPlan, folder: Path) -> dict[str, Any]:
    manifest = read_manifest(str(folder))
    _check_same(plan, manifest["plan"], folder)
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)  # killed between the last two steps
    return manifest


def _finish(plan: BuildPlan, folder: Path, shards: list[ShardSummary]) -> dict[str, Any]:
    lengths = np.array([x for s in shards for x in s.lengths], np.int32).reshape(-1, 2)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "name": plan.name,
        "records": len(lengths),
        "bad": dict(Counter(b["reason"] for s in shards for b in s.bad).most_common()),
        "tokens": int(lengths[:, 0].sum(dtype=np.int64)) if plan.tokenizer else -1,
        "patches": int(lengths[:, 1].sum(dtype=np.int64)),
        "longest": {"tokens": int(lengths[:, 0].max(initial=-1)), "patches": int(lengths[:, 1].max(initial=0))},
        "learned": sum(s.learned for s in shards),
        "images": sum(s.images for s in shards),
        "videos": sum(s.videos for s in shards),
        "plan": plan.identity(),
        "shards": [{"name": plan.shard_name(i), "records": s.records, "size": s.size} for i, s in enumerate(shards)],
    }
    temporary = folder / PROGRESS / "lengths.npy"
    np.save(temporary, lengths)
    temporary.replace(folder / "lengths.npy")
    _write_bad(folder, dict(enumerate(shards)))
    _write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    shutil.rmtree(folder / PROGRESS)
    return manifest


def _check_bad(plan: BuildPlan, folder: Path, shards: dict[int, ShardSummary], max_bad_fraction: float) -> None:
    """Raises DataError as soon as the share of bad records cannot end below the limit."""
    bad = [b for s in shards.values() for b in s.bad]
    if len(bad) <= max_bad_fraction * plan.records:
        return
    _write_bad(folder, shards)
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(b["reason"] for b in bad).most_common())
    first = "".join(f"\n  {b['id']}: {b['reason']}: {b['detail']}" for b in bad[:SHOWN])
    seen = sum(_span(plan, i) for i in shards)
    raise DataError(
        f"{len(bad)} of the first {seen} records are bad ({reasons}), more than --max_bad_fraction="
        f"{max_bad_fraction:g} of {plan.records} allows. The first:{first}\nAll so far are in {folder / BAD}. Mend "
        "them and build into a new folder, or run again with a larger --max_bad_fraction to leave them out."
    )


def _write_bad(folder: Path, shards: dict[int, ShardSummary]) -> None:
    lines = [json.dumps(b, ensure_ascii=False) + "\n" for i in sorted(shards) for b in shards[i].bad]
    _write(folder / BAD, "".join(lines).encode("utf-8", "surrogatepass"))


def _sweep(folder: Path) -> None:
    for leftover in (folder / PROGRESS).glob("*.tmp"):  # of a killed process; the lock says that none is alive
        leftover.unlink(missing_ok=True)


def _write(file: Path, data: bytes) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(file)


def _digest(files: list[Path], extra: str = "") -> str:
    total = hashlib.sha256(extra.encode())
    for file in files:
        with file.open("rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()

"""Conversion between released directories and our checkpoints, in pieces, resumable, atomic.

Source: docs/released_model.md section 4, docs/architecture.md section 9. Everything is written to TARGET.partial,
renamed at the end. A journal there names the pieces that are on disk; a run that was interrupted continues after them.
In a bucket, where nothing can be renamed, TARGET itself is filled, and what makes it a checkpoint is written last:
Orbax's own marker, or config.json. Files cannot be written in parts there: to-hf makes them on the local disk, one at a
time.

A converted checkpoint:
  checkpoints/0/params    our tree (what `train.checkpoint.load`, evaluation and `kimi.load` read)
  checkpoints/0/config    settings with the model's configuration
  released/               what only the way back needs: config.json and side files as they were, `layout.json`
                          (which tensor was in which file, in which dtype), `buffers.safetensors` (tensors that the
                          model does not use), and `scales/`, the INT4 scales in the released layout

INT4 weights are dequantised to their released bfloat16 values. The scales stay beside them because quantising again
with the *same* scales gives back every word (`int4.quantise`), and only then: the scale cannot be guessed from the
weights. They take 1/32 of the space. Trained checkpoints have no `released/`; their experts get new scales.

A leaf is stored in the widest dtype of its tensors, so nothing is rounded.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from kimi_jax import checksums
from kimi_jax.config import MeshConfig, TrainConfig
from kimi_jax.hf import int4, stream
from kimi_jax.hf.export import COMMITTED, Export, layout
from kimi_jax.hf.files import INDEX, CheckpointError, Writer, stamp, write_index
from kimi_jax.hf.leaves import Leaves
from kimi_jax.hf.stacks import Stacks
from kimi_jax.hf.stream import BIAS, PACKED, SCALE, Released, TensorSlice, parallel, pieces
from kimi_jax.untrusted import check_link, is_remote

Progress = Callable[[int, int], None]  # bytes done, bytes in all
STEP, JOURNAL = "checkpoints/0", "journal"
SYNC_BYTES = 1 << 28  # how much may have to be written again after an interruption


class ConvertError(RuntimeError):
    """A conversion cannot start or go on; the message says why and what to do."""


class ConversionJournal:
    """Which pieces of which work are on disk: a line of JSON that says what the work is, then a number a line.

    Raises ConvertError if `path` belongs to other work or another process is at it (which a bucket cannot tell).
    """

    def __init__(self, path: epath.Path, work: dict[str, Any]):
        self._path, self._lock = path, None
        self._head = json.dumps(work, sort_keys=True) + "\n"
        if not is_remote(path):
            self._lock = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held until the work is finished
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConvertError(f"another process is writing {path.parent}") from error
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and not text.startswith(self._head):
            raise ConvertError(f"{path.parent} was begun with another source or other options; remove it to start anew")
        whole = text.rpartition("\n")[0]  # a killed writer may leave half a line
        self.done = {int(line) for line in whole.split("\n")[1:]}
        path.write_text(self._text(self.done), encoding="utf-8")

    def _text(self, numbers: Iterable[int]) -> str:
        return self._head + "".join(f"{number}\n" for number in sorted(numbers))

    def add(self, numbers: list[int]) -> None:
        """These pieces are on disk."""
        self.done.update(numbers)
        if self._lock is None:  # objects cannot grow
            self._path.write_text(self._text(self.done), encoding="utf-8")
        else:
            self._lock.write("".join(f"{number}\n" for number in numbers))
            self._lock.flush()

    def remove(self) -> None:
        """The work is finished."""
        self._path.unlink()
        if self._lock is not None:
            self._lock.close()


def _run(
    journal: ConversionJournal,
    work: Callable[[TensorSlice], None],
    every: Iterable[TensorSlice],
    progress: Progress,
    sync: Callable[[], None] = lambda: None,
) -> None:
    """work(piece) for all pieces that the journal does not know yet; they enter it after a `sync`."""
    every = list(every)
    sizes = [(piece.last - piece.first) * piece.tensor.columns * 2 for piece in every]
    total = sum(sizes)
    done = sum(size for number, size in enumerate(sizes) if number in journal.done)
    progress(done, total)
    written: list[int] = []

    def one(number: int) -> int:
        work(every[number])
        return number

    def commit() -> None:
        sync()
        journal.add(written)
        written.clear()

    for number in parallel(one, [n for n in range(len(every)) if n not in journal.done]):
        written.append(number)
        if sum(sizes[n] for n in written) >= SYNC_BYTES:
            commit()
        done += sizes[number]
        progress(done, total)
    commit()


def _begin(source: epath.Path, given: str | os.PathLike[str], needed: int) -> epath.Path:
    """The folder to work in. Raises ConvertError if the target is taken, or its disk too small."""
    target = epath.Path(given)
    begun = is_remote(target) and (target / JOURNAL).is_file()
    if target.exists() and not begun and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target} is there already; remove it or choose another name")
    if target.resolve() == source.resolve():
        raise ConvertError("source and target are the same")
    if is_remote(target):
        target.mkdir(parents=True, exist_ok=True)
        return target
    work = target.with_name(target.name + ".partial")
    fresh = not work.exists()
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if fresh and free < needed:
        work.rmdir()
        raise ConvertError(f"{target} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    return work


def _end(journal: ConversionJournal, work: epath.Path, given: str | os.PathLike[str]) -> None:
    """Everything to disk, then the target appears at once; in a bucket it has."""
    journal.remove()
    if is_remote(work):
        return
    for folder in (Path(work), *[p for p in Path(work).rglob("*") if p.is_dir()]):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.rename(work, given)  # onto an empty folder too


# -------------------------------------------------------------------------------------------------------------- from hf


def from_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    progress: Progress = lambda *_: None,
    mesh: MeshConfig | None = None,
    checksum: bool = True,
) -> list[str]:
    """A released directory (`gs://` too) to a checkpoint of ours; see the top of the file for what it holds.

    mesh: of the devices that will restore it, a number for every axis; chunks are such that each device reads its own
    shard and little else. Any other mesh can restore it too. checksum: read back what was written and put its checksums
    beside it (kimi_jax.checksums). Returns notes for the user: INT4 groups that cannot be
    written back exactly. Raises FileNotFoundError, ConfigError or CheckpointError for a source that cannot be read,
    ConvertError for a target that cannot be written.
    """
    checkpoint = Released(source)
    try:
        plan = Stacks(checkpoint, mesh)
        work = _begin(checkpoint.path, target, plan.nbytes)
        axes = dataclasses.asdict(mesh) if mesh else None
        identity = {"from": _identity(checkpoint.path), "piece": stream.PIECE, "mesh": axes}
        journal = ConversionJournal(work / JOURNAL, identity)
        params, scales = Leaves(work / STEP / "params"), Leaves(work / "released" / "scales")
        plan.create(params, scales)
        notes: list[str] = []

        def convert(piece: TensorSlice) -> None:
            tensor = piece.tensor
            params.write(tensor.leaf, tensor.place(piece.first, piece.last), checkpoint.read(piece))
            if checkpoint.is_int4(tensor):
                base = tensor.name.removesuffix("weight")
                given = checkpoint.directory.rows(base + SCALE, piece.first, piece.last)
                scales.write(tensor.leaf, (*tensor.index, slice(piece.first, piece.last)), given)
                if int4.unusable(given).any():
                    lost = int4.lost(checkpoint.directory.rows(base + PACKED, piece.first, piece.last), given)
                    if lost:
                        notes.append(f"{tensor.name}: the codes of {lost} groups are lost, their scale is unusable")

        _run(journal, convert, plan.pieces, progress)
        params.finish()
        if plan.scale_leaves:
            scales.finish()
        _write_released(work / "released", checkpoint)
        _write_config(work / STEP, checkpoint, plan)
        if checksum:
            for folder in (work / "released", work / STEP):
                checksums.write(folder)
        if is_remote(work):
            (work / STEP / COMMITTED).write_text("", encoding="utf-8")
        _end(journal, work, target)
        return sorted(notes)
    finally:
        checkpoint.close()


def _identity(source: epath.Path) -> list[list[Any]]:
    """Names, sizes and times of the files: whether a source is the one that was begun with."""
    return [[file.name, *stamp(file)] for file in sorted(source.iterdir()) if file.is_file()]


def _write_config(step: epath.Path, checkpoint: Released, plan: Stacks) -> None:
    """The Orbax item `config` beside `params`, as training writes it, and Orbax's description of the step."""
    float32 = any(dtype == np.float32 for leaf, (_, _, dtype) in plan.leaves.items() if leaf != BIAS)
    model = dataclasses.replace(checkpoint.config, param_dtype="float32" if float32 else checkpoint.config.param_dtype)
    settings = dataclasses.asdict(TrainConfig(workdir="", model=model))
    (step / "config").mkdir(exist_ok=True)
    (step / "config" / "metadata").write_text(json.dumps(settings), encoding="utf-8")
    package = "orbax.checkpoint._src.handlers"
    handlers = {
        "config": f"{package}.json_checkpoint_handler.JsonCheckpointHandler",
        "params": f"{package}.standard_checkpoint_handler.StandardCheckpointHandler",
    }
    marker: dict[str, Any] = {
        "item_handlers": handlers,
        "metrics": {},
        "performance_metrics": {},
        "custom_metadata": {},
    }
    marker |= {"init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0}
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(marker), encoding="utf-8")


def _write_released(folder: epath.Path, checkpoint: Released) -> None:
    """What only the way back needs."""
    folder.mkdir(exist_ok=True)
    for file in checkpoint.path.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            check_link(file, CheckpointError)
            file.copy(folder / file.name, overwrite=True)
    (folder / "layout.json").write_text(json.dumps(layout(checkpoint)), encoding="utf-8")
    if checkpoint.buffers:
        buffers = {name: checkpoint.directory.whole(name) for name in checkpoint.buffers}
        (folder / "buffers.safetensors").write_bytes(safetensors.numpy.save(buffers))


# ---------------------------------------------------------------------------------------------------------------- to hf


def to_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    int4_experts: bool = False,
    model_type: str | None = None,
    dtype: str = "BF16",
    progress: Progress = lambda *_: None,
    verify: bool = True,
) -> None:
    """A checkpoint of ours (converted or trained; its newest step) to a released directory.

    Of a run with `config.lora` it is its base with the adapters merged. int4_experts: routed experts packed, with the
    released scales if the checkpoint was INT4 and they have not been trained.
    model_type, dtype: of a trained checkpoint; a converted one says itself what it was.
    verify: compare the files of the source with their checksums first.
    Raises FileNotFoundError, ConfigError or CheckpointError for the source, ConvertError for the target.
    """
    source = epath.Path(source)
    made = Export(source, int4_experts, model_type, dtype, verify)
    try:
        total = sum(entry.nbytes for entries in made.plan.values() for entry in entries)
        work = _begin(source, target, total)
        identity = {"to": str(made.step), "time": stamp(made.step)[1], "int4": int4_experts, "dtype": dtype}
        journal = ConversionJournal(work / JOURNAL, identity | {"type": made.model_type, "piece": stream.PIECE})
        if is_remote(work):
            _upload_files(made, work, journal, progress)
        else:
            writer = Writer(Path(work), made.plan, made.metadata)
            every = [piece for tensor in made.tensors for piece in pieces(tensor)]
            _run(journal, functools.partial(made.write, writer), every, progress, writer.sync)
            made.write_buffers(writer)
            writer.sync()
            writer.close()
        write_index(work, made.plan)
        made.write_side_files(work)
        _end(journal, work, target)
    finally:
        made.close()


def _upload_files(made: Export, work: epath.Path, journal: ConversionJournal, progress: Progress) -> None:
    """The safetensors files one after the other by way of a temporary folder; a file is what the journal counts."""
    sizes = [sum(entry.nbytes for entry in entries) for entries in made.plan.values()]
    for number, (file, entries) in enumerate(made.plan.items()):
        if number in journal.done:
            continue
        progress(sum(sizes[:number]), sum(sizes))
        with tempfile.TemporaryDirectory() as folder:
            writer = Writer(Path(folder), {file: entries}, made.metadata)
            for _ in parallel(functools.partial(made.write, writer), made.pieces_of(entries)):
                pass
            made.write_buffers(writer)
            writer.close()
            epath.Path(folder, file).copy(work / file, overwrite=True)
        journal.add([number])
    progress(sum(sizes), sum(sizes))

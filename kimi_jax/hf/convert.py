"""Conversion between released directories and our checkpoints, in pieces, resumable, atomic.

Source: reference.md section 4, design.md section 9. Everything is written to TARGET.partial, renamed at the end. A
journal there names the pieces that are on disk; a run that was interrupted continues after them.

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
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from kimi_jax.config import ConfigError, MeshConfig, TrainConfig, freeze
from kimi_jax.hf import config as hf_config
from kimi_jax.hf import int4, stream
from kimi_jax.hf.files import (
    DTYPES,
    INDEX,
    SINGLE,
    CheckpointError,
    Directory,
    Entry,
    Writer,
    file_plan,
    is_remote,
    stamp,
    write_index,
)
from kimi_jax.hf.leaves import Leaves
from kimi_jax.hf.names import Tensor, tensors
from kimi_jax.hf.stacks import Stacks
from kimi_jax.hf.stream import (
    BIAS,
    EXPERTS,
    MAX_FILE,
    PACKED,
    SCALE,
    Piece,
    Released,
    output_entries,
    parallel,
    pieces,
    write_piece,
)  # fmt: skip

Progress = Callable[[int, int], None]  # bytes done, bytes in all
STEP = Path("checkpoints") / "0"
SYNC_BYTES = 1 << 28  # how much may have to be written again after an interruption


class ConvertError(RuntimeError):
    """A conversion cannot start or go on; the message says why and what to do."""


class Journal:
    """Which pieces of which work are on disk: a line of JSON that says what the work is, then a number a line.

    Raises ConvertError if `path` belongs to other work or another process is at it.
    """

    def __init__(self, path: Path, work: dict[str, Any]):
        head = json.dumps(work, sort_keys=True) + "\n"
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConvertError(f"another process is writing {path.parent}") from error
        self._file.seek(0)
        text = self._file.read()
        if text and not text.startswith(head):
            raise ConvertError(f"{path.parent} was begun with another source or other options; remove it to start anew")
        whole = text.rpartition("\n")[0]  # a killed writer may leave half a line
        self.done = {int(line) for line in whole.split("\n")[1:]}
        self._file.truncate(0)
        self._file.write(head + "".join(f"{number}\n" for number in sorted(self.done)))
        self._file.flush()

    def add(self, number: int) -> None:
        """Piece `number` is on disk."""
        self.done.add(number)
        self._file.write(f"{number}\n")
        self._file.flush()

    def remove(self) -> None:
        """The work is finished."""
        os.unlink(self._file.name)
        self._file.close()

    def close(self) -> None:
        """Leaves the journal for the next run."""
        self._file.close()


def _run(
    journal: Journal,
    work: Callable[[Piece], None],
    every: Iterable[Piece],
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
        for number in written:
            journal.add(number)
        written.clear()

    for number in parallel(one, [n for n in range(len(every)) if n not in journal.done]):
        written.append(number)
        if sum(sizes[n] for n in written) >= SYNC_BYTES:
            commit()
        done += sizes[number]
        progress(done, total)
    commit()


def _begin(source: epath.Path, given: str | os.PathLike[str], needed: int) -> Path:
    """The folder to work in. Raises ConvertError if the target is taken, a bucket, or its disk too small."""
    if is_remote(epath.Path(given)):
        raise ConvertError(f"{given}: conversion writes to local or mounted file systems; copy the result there")
    target = Path(given)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target} is there already; remove it or choose another name")
    if not is_remote(source) and target.resolve() == Path(source).resolve():
        raise ConvertError("source and target are the same")
    work = target.with_name(target.name + ".partial")
    fresh = not work.exists()
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if fresh and free < needed:
        work.rmdir()
        raise ConvertError(f"{target} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    return work


def _end(work: Path, target: Path) -> None:
    """Everything to disk, then the target appears at once."""
    for folder in (work, *[p for p in work.rglob("*") if p.is_dir()]):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    work.rename(target)


# -------------------------------------------------------------------------------------------------------------- from hf


def from_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    progress: Progress = lambda *_: None,
    mesh: MeshConfig | None = None,
) -> list[str]:
    """A released directory (`gs://` too) to a checkpoint of ours; see the top of the file for what it holds.

    mesh: of the devices that will restore it, a number for every axis; chunks are cut so that each device reads its own
    shard and little else. Any other mesh can restore it too. Returns notes for the user: INT4 groups that cannot be
    written back exactly. Raises FileNotFoundError, ConfigError or CheckpointError for a source that cannot be read,
    ConvertError for a target that cannot be written.
    """
    checkpoint = Released(source)
    try:
        plan = Stacks(checkpoint, mesh)
        work = _begin(checkpoint.path, target, plan.nbytes)
        cuts = dataclasses.asdict(mesh) if mesh else None
        identity = {"from": _identity(checkpoint.path), "piece": stream.PIECE, "mesh": cuts}
        journal = Journal(work / "journal", identity)
        params, scales = Leaves(work / STEP / "params"), Leaves(work / "released" / "scales")
        plan.create(params, scales)
        notes: list[str] = []

        def convert(piece: Piece) -> None:
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
        _write_config(work / STEP, checkpoint, plan)
        _write_released(work / "released", checkpoint)
        journal.remove()
        _end(work, Path(target))
        return sorted(notes)
    finally:
        checkpoint.close()


def _identity(source: epath.Path) -> list[list[Any]]:
    """Names, sizes and times of the files: whether a source is the one that was begun with."""
    return [[file.name, *stamp(file)] for file in sorted(source.iterdir()) if file.is_file()]


def _write_config(step: Path, checkpoint: Released, plan: Stacks) -> None:
    """The Orbax item `config` beside `params`, as training writes it, and the marker of a finished step."""
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


def _write_released(folder: Path, checkpoint: Released) -> None:
    """What only the way back needs."""
    folder.mkdir(exist_ok=True)
    for file in checkpoint.path.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            file.copy(folder / file.name, overwrite=True)
    stored = checkpoint.directory.tensors
    files: dict[str, list[list[str]]] = {name: [] for name in checkpoint.directory.metadata}
    for name, where in stored.items():
        files[where.file].append([name, where.dtype])
    layout = {"files": files, "metadata": checkpoint.directory.metadata}
    (folder / "layout.json").write_text(json.dumps(layout), encoding="utf-8")
    if checkpoint.buffers:
        entries = [Entry(name, stored[name].dtype, stored[name].shape) for name in checkpoint.buffers]
        writer = Writer(folder, {"buffers.safetensors": entries}, {})
        for name in checkpoint.buffers:
            writer.write(name, checkpoint.directory.whole(name))
        writer.sync()
        writer.close()


# ---------------------------------------------------------------------------------------------------------------- to hf


def to_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    int4_experts: bool = False,
    model_type: str | None = None,
    dtype: str = "BF16",
    progress: Progress = lambda *_: None,
) -> None:
    """A checkpoint of ours (converted or trained; its newest step) to a released directory.

    int4_experts: routed experts packed, with the released scales if the checkpoint was INT4 and has not been trained.
    model_type, dtype: of a trained checkpoint; a converted one says itself what it was.
    Raises FileNotFoundError or ConfigError for the source, ConvertError for the target.
    """
    source = epath.Path(source)
    made = _Export(source, int4_experts, model_type, dtype)
    try:
        total = sum(entry.nbytes for entries in made.plan.values() for entry in entries)
        work = _begin(source, target, total)
        identity = {"to": str(made.step), "time": stamp(made.step)[1], "int4": int4_experts, "dtype": dtype}
        journal = Journal(work / "journal", identity | {"type": made.model_type, "piece": stream.PIECE})
        writer = Writer(work, made.plan, made.metadata)
        dtypes = {entry.name: DTYPES[entry.dtype] for entries in made.plan.values() for entry in entries}

        def convert(piece: Piece) -> None:
            tensor = piece.tensor
            ours = made.params.read(tensor.leaf, tensor.place(piece.first, piece.last))
            scales = made.scales_of(piece)
            write_piece(writer, piece, ours, dtypes, packed=tensor.name in made.packed, scales=scales, group=made.group)

        _run(journal, convert, [piece for tensor in made.tensors for piece in pieces(tensor)], progress, writer.sync)
        made.write_buffers(writer)
        writer.sync()
        writer.close()
        write_index(work, made.plan)
        made.write_side_files(work)
        journal.remove()
        _end(work, Path(target))
    finally:
        made.close()


class _Export:
    """What there is to write: tensors, files, dtypes, scales."""

    def __init__(self, source: epath.Path, int4_experts: bool, model_type: str | None, dtype: str):
        self.step = newest_step(source)
        self.folder = source / "released"
        self.params = Leaves(self.step / "params")
        self.config = read_config(self.step).model
        shapes = {leaf: tuple(store.shape) for leaf, store in self.params.open().items()}
        self.released = _read_json(self.folder / "config.json")
        self.model_type = str(self.released["model_type"]) if self.released else model_type or self._default_type()
        self.tensors = tensors(self.config, self.model_type)
        _check_leaves(self.tensors, shapes)
        self.buffers = Directory(self.folder) if (self.folder / "buffers.safetensors").is_file() else None
        self.scales: Leaves | None = None
        self.packed: set[str] = set()
        self.group = 32
        if int4_experts:
            self._plan_int4()
        self._plan_files(dtype)

    def _default_type(self) -> str:
        return "kimi_k25" if self.config.vision else "kimi_k2"

    def _plan_int4(self) -> None:
        leaves = {tensor.leaf for tensor in self.tensors} & set(EXPERTS)
        if (self.folder / "scales").is_dir():
            self.scales = Leaves(self.folder / "scales")
            leaves = set(self.scales.open())
            found = hf_config.quantization(self.released or {})
            self.group = found.group_size if found else self.group
        if not leaves:
            raise ConfigError("--int4 packs routed experts, and this model has none")
        self.packed = {tensor.name for tensor in self.tensors if tensor.leaf in leaves}

    def _plan_files(self, dtype: str) -> None:
        by_name = {tensor.name: tensor for tensor in self.tensors}
        layout = _read_json(self.folder / "layout.json")
        if layout is None:
            every = [(t.name, "F32" if t.leaf == BIAS else dtype) for t in self.tensors]
            self.metadata: dict[str, dict[str, str]] = {}
            entries = [entry for name, kind in every for entry in self._entries(by_name[name], kind)]
            self.plan = file_plan(entries, MAX_FILE)
            return
        self.metadata = layout["metadata"]
        self._kinds = dict(member for members in layout["files"].values() for member in members)
        self.plan = {
            file: [entry for name, _ in members for entry in self._released_entries(name, by_name)]
            for file, members in layout["files"].items()
        }
        self.plan = {file: entries for file, entries in self.plan.items() if entries}
        if len(self.plan) == 1:
            self.plan = {SINGLE: next(iter(self.plan.values()))}
            self.metadata = {SINGLE: next(iter(self.metadata.values()))}  # the name, if it was the only one, is free

    def _released_entries(self, name: str, by_name: dict[str, Tensor]) -> list[Entry]:
        """What stands for a tensor of the released file: itself, or what it is now that weights are packed or not."""
        kind = self._kinds[name]
        if name in by_name:
            return self._entries(by_name[name], "BF16" if kind == "F8_E4M3" else kind)
        if self.buffers and name in self.buffers.tensors:
            return [Entry(name, kind, self.buffers.tensors[name].shape)]
        base, _, part = name.rpartition(".")
        tensor = by_name[base + ".weight"]
        if tensor.name in self.packed:
            return [dataclasses.replace(e, dtype=kind) for e in self._entries(tensor, kind) if e.name == name]
        return self._entries(tensor, self._kinds[f"{base}.{SCALE}"]) if part == PACKED else []

    def _entries(self, tensor: Tensor, dtype: str) -> list[Entry]:
        return output_entries(tensor, dtype, tensor.name in self.packed, self.group)

    def scales_of(self, piece: Piece) -> np.ndarray | None:
        """The released scales of a packed piece, None if it needs new ones or none."""
        if self.scales is None or piece.tensor.name not in self.packed:
            return None
        return self.scales.read(piece.tensor.leaf, (*piece.tensor.index, slice(piece.first, piece.last)))

    def write_buffers(self, writer: Writer) -> None:
        """Tensors that the model does not use, as they were."""
        for name in self.buffers.tensors if self.buffers else ():
            writer.write(name, self.buffers.whole(name))  # type: ignore[union-attr]

    def write_side_files(self, work: Path) -> None:
        """config.json and, from a converted checkpoint, what lay beside it."""
        was_packed = (self.folder / "scales").is_dir()
        if self.released is None:
            name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[next(iter(self._dtypes()))]
            self.released = hf_config.to_released(self.config, self.model_type, name)
        for file in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if file.is_file() and file.name not in ("layout.json", "buffers.safetensors"):
                file.copy(work / file.name, overwrite=True)
        if not (was_packed and self.packed):  # else config.json as it was, to the byte
            section = hf_config.int4_section(self.group) if self.packed else None
            new = hf_config.with_quantization(self.released, section)
            if new != self.released or not self.folder.is_dir():
                (work / "config.json").write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")

    def _dtypes(self) -> list[str]:
        return [e.dtype for entries in self.plan.values() for e in entries if e.dtype in ("BF16", "F16")] or ["F32"]

    def close(self) -> None:
        """Lets go of the files."""
        if self.buffers:
            self.buffers.close()


def newest_step(workdir: epath.Path) -> epath.Path:
    """The folder of the newest checkpoint in a workdir. Raises FileNotFoundError without any."""
    folder = workdir / "checkpoints"
    steps = [p for p in folder.iterdir() if p.name.isdigit() and (p / "params").is_dir()] if folder.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}: the source must be a workdir of training or of from-hf")
    return max(steps, key=lambda p: int(p.name))


def read_config(step: epath.Path) -> TrainConfig:
    """The settings in a checkpoint."""
    return freeze(json.loads((step / "config" / "metadata").read_text(encoding="utf-8")))


def _read_json(file: epath.Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _check_leaves(wanted: list[Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError that lists all leaves that the checkpoint lacks or has in another shape."""
    need = {t.leaf: (*(n + 1 for n in t.index), *t.inner) for t in wanted}
    problems = [f"missing: {leaf} {list(shape)}" for leaf, shape in need.items() if leaf not in shapes]
    problems += [f"unexpected: {leaf} {list(shape)}" for leaf, shape in shapes.items() if leaf not in need]
    problems += [
        f"shape of {leaf}: {list(shapes[leaf])}, must be {list(shape)}"
        for leaf, shape in need.items() if leaf in shapes and shapes[leaf] != shape
    ]  # fmt: skip
    if problems:
        raise CheckpointError("\n  ".join(["the checkpoint does not hold the model of its settings:", *problems]))

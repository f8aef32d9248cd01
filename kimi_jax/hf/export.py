"""What `convert to-hf` writes: which tensors in which files, and their values from wherever they lie.

Source: docs/released_model.md section 4; nn.lora. Weights come from a checkpoint of ours (`_Step`) or, under the
adapters of a run with `config.lora`, from its base, which may also be a released directory (`_Base`). All is read piece
by piece.

r rank
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from kimi_jax import checksums
from kimi_jax.config import ConfigError, LoRAConfig, ModelConfig, TrainConfig, freeze
from kimi_jax.hf import bounds
from kimi_jax.hf import config as hf_config
from kimi_jax.hf.files import (
    DTYPES,
    INDEX,
    SINGLE,
    CheckpointError,
    Directory,
    Entry,
    Writer,
    file_plan,
    is_text_table,
)
from kimi_jax.hf.leaves import Leaves
from kimi_jax.hf.names import Tensor, tensors
from kimi_jax.hf.stream import (
    BIAS,
    EXPERTS,
    FLOATS,
    MAX_FILE,
    PACKED,
    SCALE,
    SCALE_INV,
    SHAPE,
    Released,
    TensorSlice,
    output_entries,
    pieces,
    write_piece,
)
from kimi_jax.untrusted import (
    MAX_CONFIG,
    MAX_TABLE,
    PLAIN_NAME,
    check_inside,
    check_link,
    describe,
    is_remote,
    read_json,
)

CONFIG, COMMITTED = "config.json", "commit_success.txt"  # the latter is Orbax's mark of a whole step in a bucket

# What may stand beside a quantised weight, in which dtypes.
PART_KINDS = {PACKED: ("I32",), SHAPE: ("I32", "I64"), SCALE: FLOATS, SCALE_INV: FLOATS}


class _Step:
    """The newest checkpoint of a workdir, converted or trained."""

    def __init__(self, workdir: epath.Path, verify: bool):
        self.step, self.folder = newest_step(workdir), workdir / "released"
        if verify:
            _check_sums(self.step, ("params", "config"))
            _check_sums(self.folder)
        self.model = read_config(self.step).model
        self.released = _read_json(self.folder, CONFIG, MAX_CONFIG)
        if self.released is not None:
            hf_config.from_released(self.released)  # raises ConfigError for what to-hf could not use
        self.layout = _read_json(self.folder, "layout.json", MAX_TABLE)
        if self.layout is not None:
            check_layout(self.layout, self.folder / "layout.json")
        self.buffers = Directory(self.folder) if (self.folder / "buffers.safetensors").is_file() else None
        self.buffer_names = list(self.buffers.tensors) if self.buffers else []
        self._params, self._scales = Leaves(self.step / "params"), Leaves(self.folder / "scales")
        self.shapes = {leaf: tuple(store.shape) for leaf, store in self._params.open().items()}
        stored = self._scales.open() if self._scales.path.is_dir() else {}
        self.scale_shapes = {leaf: tuple(store.shape) for leaf, store in stored.items()}
        self.packed = set(self.scale_shapes)

    def read(self, piece: TensorSlice) -> np.ndarray:
        """The piece in our layout."""
        return self._params.read(piece.tensor.leaf, piece.tensor.place(piece.first, piece.last))

    def scales(self, piece: TensorSlice) -> np.ndarray:
        """The released scales of a piece of a leaf in `packed`."""
        return self._scales.read(piece.tensor.leaf, (*piece.tensor.index, slice(piece.first, piece.last)))

    def close(self) -> None:
        """Lets go of the files."""
        if self.buffers:
            self.buffers.close()


class _Base:
    """A released directory in the same words."""

    def __init__(self, path: epath.Path):
        self._checkpoint = Released(path)
        self.folder, self.model = self._checkpoint.path, self._checkpoint.config
        self.released: Any = self._checkpoint.released
        self.layout: Any = layout(self._checkpoint)
        self.buffers: Directory | None = self._checkpoint.directory
        self.buffer_names = self._checkpoint.buffers
        self.packed = {tensor.leaf for tensor in self._checkpoint.tensors if self._checkpoint.is_int4(tensor)}
        self.read, self.close = self._checkpoint.read, self._checkpoint.close

    def scales(self, piece: TensorSlice) -> np.ndarray:
        """See `_Step`."""
        name = piece.tensor.name.removesuffix("weight") + SCALE
        return self._checkpoint.directory.rows(name, piece.first, piece.last)


class _Adapters:
    """The adapters of a run, which are added to the weights of its base. Small: they are held whole."""

    def __init__(self, step: epath.Path, options: LoRAConfig):
        params = Leaves(step / "params")
        every = (slice(None),)
        self._arrays = {leaf: params.read(leaf, every * store.ndim) for leaf, store in params.open().items()}
        self._options = options
        self.leaves = {leaf.removesuffix(".a") for leaf in self._arrays if leaf.endswith(".a")}

    def add(self, piece: TensorSlice, ours: np.ndarray) -> np.ndarray:
        """The piece with alpha / r * A B, in float32 and rounded once."""
        tensor = piece.tensor
        if tensor.leaf not in self.leaves:
            return ours
        a, b = (self._arrays[f"{tensor.leaf}.{name}"][tensor.index] for name in ("a", "b"))
        b = b[:, piece.first // tensor.step : piece.last // tensor.step]
        product = self._options.scale * (a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1))
        return (ours.astype(np.float32) + product.reshape(ours.shape)).astype(ours.dtype)


class Export:
    """What there is to write: tensors, files, dtypes, scales.

    step: the checkpoint that is exported; plan: file -> entries; metadata: file -> its own; packed: names of tensors
    that are written as INT4 in groups of `group`.
    """

    def __init__(self, source: epath.Path, int4_experts: bool, model_type: str | None, dtype: str, verify: bool):
        self.step = newest_step(source)
        if verify:
            _check_sums(self.step, ("config",))
        options = read_config(self.step).lora
        if verify and options:
            _check_sums(self.step, ("params",))
        self._adapters = _Adapters(self.step, options) if options else None
        base = epath.Path(options.base) if options else source
        ours = (base / "checkpoints").is_dir()
        self._weights: _Step | _Base = _Step(base, verify) if ours else _Base(base)
        self._released, self._layout = self._weights.released, self._weights.layout
        self.model_type = str(self._released["model_type"]) if self._released else model_type or self._default_type()
        if isinstance(self._weights, _Step):
            _check_stacks(self._weights.model, self._weights.shapes)
        self.tensors = tensors(self._weights.model, self.model_type)
        if isinstance(self._weights, _Step):
            _check_leaves(self.tensors, self._weights.shapes)
        self.packed: set[str] = set()
        self.group = 32
        if int4_experts:
            self._plan_int4()
        self._plan_files(dtype)
        self._dtypes = {entry.name: DTYPES[entry.dtype] for entries in self.plan.values() for entry in entries}

    def _default_type(self) -> str:
        return "kimi_k25" if self._weights.model.vision else "kimi_k2"

    def _plan_int4(self) -> None:
        leaves = self._weights.packed or {tensor.leaf for tensor in self.tensors} & set(EXPERTS)
        if self._weights.packed:
            found = hf_config.quantization(self._released or {})
            self.group = found.group_size if found else self.group
        if not leaves:
            raise ConfigError("--int4 packs routed experts, and this model has none")
        self.packed = {tensor.name for tensor in self.tensors if tensor.leaf in leaves}
        if isinstance(self._weights, _Step):
            _check_scales(self.tensors, self._weights.scale_shapes, self.group)

    def _plan_files(self, dtype: str) -> None:
        by_name = {tensor.name: tensor for tensor in self.tensors}
        if self._layout is None:
            every = [(t.name, "F32" if t.leaf == BIAS else dtype) for t in self.tensors]
            self.metadata: dict[str, dict[str, str]] = {}
            entries = [entry for name, kind in every for entry in self._entries(by_name[name], kind)]
            self.plan = file_plan(entries, MAX_FILE)
            return
        self.metadata = self._layout["metadata"]
        self._kinds = dict(member for members in self._layout["files"].values() for member in members)
        self.plan = {
            file: [entry for name, _ in members for entry in self._released_entries(name, by_name)]
            for file, members in self._layout["files"].items()
        }
        self.plan = {file: entries for file, entries in self.plan.items() if entries}
        if len(self.plan) == 1:
            self.plan = {SINGLE: next(iter(self.plan.values()))}
            self.metadata = {SINGLE: next(iter(self.metadata.values()), {})}  # an only file has a free name
        planned = {entry.name for entries in self.plan.values() for entry in entries}
        wanted = [e.name for t in self.tensors for e in self._entries(t, "F32")]
        if lacking := [name for name in wanted if name not in planned]:
            raise CheckpointError(f"layout.json names no file for {lacking[0]} and {len(lacking) - 1} other tensors")

    def _released_entries(self, name: str, by_name: dict[str, Tensor]) -> list[Entry]:
        """What stands for a tensor of the released file: itself, or what it is now that weights are packed or not."""
        kind = self._kinds[name]
        if name in by_name:
            if kind not in (*FLOATS, "F8_E4M3"):
                raise CheckpointError(f"layout.json: {name} cannot be written as {kind}")
            return self._entries(by_name[name], "BF16" if kind == "F8_E4M3" else kind)
        if name in self._weights.buffer_names:
            assert self._weights.buffers
            stored = self._weights.buffers.tensors[name]
            return [Entry(name, stored.dtype, stored.shape)]
        base, _, part = name.rpartition(".")
        kinds = PART_KINDS.get(part)
        tensor = by_name.get(base + ".weight")
        scale = self._kinds.get(f"{base}.{SCALE}", "F32")
        if tensor is None or kinds is None or kind not in kinds or scale not in FLOATS:
            raise CheckpointError(f"layout.json names {name} as {kind}, which this model does not have")
        if tensor.name in self.packed:
            return [dataclasses.replace(e, dtype=kind) for e in self._entries(tensor, kind) if e.name == name]
        return self._entries(tensor, scale) if part == PACKED else []

    def _entries(self, tensor: Tensor, dtype: str) -> list[Entry]:
        return output_entries(tensor, dtype, tensor.name in self.packed, self.group)

    def pieces_of(self, entries: list[Entry]) -> Iterator[TensorSlice]:
        """Of the tensors that these entries hold, whole or in part."""
        names = {entry.name for entry in entries}
        for tensor in self.tensors:
            parts = output_entries(tensor, "F32", tensor.name in self.packed, self.group)
            if names & {part.name for part in parts}:
                yield from pieces(tensor)

    def write(self, writer: Writer, piece: TensorSlice) -> None:
        """The piece as it is now, into the files."""
        ours, packed = self._weights.read(piece), piece.tensor.name in self.packed
        if self._adapters is not None:
            ours = self._adapters.add(piece, ours)
        write_piece(writer, piece, ours, self._dtypes, packed=packed, scales=self._scales_of(piece), group=self.group)

    def _scales_of(self, piece: TensorSlice) -> np.ndarray | None:
        """The released scales of a packed piece, None if it needs new ones or none."""
        leaf = piece.tensor.leaf
        changed = self._adapters is not None and leaf in self._adapters.leaves
        if piece.tensor.name not in self.packed or leaf not in self._weights.packed or changed:
            return None
        return self._weights.scales(piece)

    def write_buffers(self, writer: Writer) -> None:
        """Tensors that the model does not use, as they were."""
        for name in self._weights.buffer_names:
            assert self._weights.buffers
            writer.write(name, self._weights.buffers.whole(name))

    def write_side_files(self, work: epath.Path) -> None:
        """What lay beside the weights of a released or converted checkpoint; config.json last."""
        folder, released = self._weights.folder, self._released
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in ("layout.json", INDEX, CONFIG):
                check_link(file, CheckpointError)
                file.copy(work / file.name, overwrite=True)
        new = released or hf_config.to_released(self._weights.model, self.model_type, self._dtype_name())
        if not (self._weights.packed and self.packed):
            new = hf_config.with_quantization(new, hf_config.int4_section(self.group) if self.packed else None)
        if new == released:
            (folder / CONFIG).copy(work / CONFIG, overwrite=True)
        else:
            (work / CONFIG).write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")

    def _dtype_name(self) -> str:
        """Of config.json: that of the narrowest floats."""
        kinds = {entry.dtype for entries in self.plan.values() for entry in entries}
        return "bfloat16" if "BF16" in kinds else "float16" if "F16" in kinds else "float32"

    def close(self) -> None:
        """Lets go of the files."""
        self._weights.close()


def layout(checkpoint: Released) -> dict[str, Any]:
    """Which tensor is in which file of a released directory, in which dtype, and the files' own metadata."""
    files: dict[str, list[list[str]]] = {name: [] for name in checkpoint.directory.metadata}
    for name, where in checkpoint.directory.tensors.items():
        files[where.file].append([name, where.dtype])
    return {"files": files, "metadata": checkpoint.directory.metadata}


def newest_step(workdir: epath.Path) -> epath.Path:
    """The folder of the newest checkpoint in a workdir. Raises FileNotFoundError without any."""
    folder = workdir / "checkpoints"
    steps = [p for p in folder.iterdir() if p.name.isdecimal() and (p / "params").is_dir()] if folder.is_dir() else []
    steps = [p for p in steps if not is_remote(p) or (p / COMMITTED).is_file()]
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}: the source must be a workdir of training or of from-hf")
    return max(steps, key=lambda p: int(p.name))


def _check_sums(folder: epath.Path, parts: tuple[str, ...] = ()) -> None:
    """Raises CheckpointError that lists every file that is damaged or missing (kimi_jax.checksums.problems)."""
    if damage := checksums.problems(folder, parts):
        raise CheckpointError("\n  ".join(["the checkpoint is damaged:", *damage]))


def read_config(step: epath.Path) -> TrainConfig:
    """The settings in a checkpoint."""
    file = step / "config" / "metadata"
    values = read_json(file, MAX_CONFIG, CheckpointError)
    try:
        return freeze(values)
    except ConfigError as error:  # a setting out of its range, or a section that is no object
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _read_json(folder: epath.Path, name: str, limit: int) -> Any:
    if not (folder / name).exists():
        return None
    return read_json(check_inside(folder, name, CheckpointError), limit, CheckpointError)


def check_layout(found: dict[str, Any], where: epath.Path) -> None:
    """Raises CheckpointError if a layout.json is not what `layout` makes, or names files outside the folder."""
    files, metadata = found.get("files"), found.get("metadata")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{where}: files must be file -> tensors, not {describe(files)}")
    if not isinstance(metadata, dict) or not all(is_text_table(table) for table in metadata.values()):
        raise CheckpointError(f"{where}: metadata must be file -> object of texts, not {describe(metadata)}")
    seen: set[str] = set()
    for file, members in files.items():
        if not PLAIN_NAME.fullmatch(file) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{where}: files.{describe(file)} is not a plain name of a safetensors file")
        if not isinstance(members, list):
            raise CheckpointError(f"{where}: files.{file} must be a list, not {describe(members)}")
        for member in members:
            if not (isinstance(member, list) and len(member) == 2 and all(isinstance(part, str) for part in member)):
                raise CheckpointError(f"{where}: files.{file} must hold [tensor, dtype], not {describe(member)}")
            if member[0] in seen or member[1] not in DTYPES:
                raise CheckpointError(f"{where}: {describe(member)} is named twice or has an unknown dtype")
            seen.add(member[0])


def _check_stacks(model: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError if the settings want more layers or experts than there are, or wider ones than fit."""

    def axis(leaf: str, number: int) -> int:
        return (*shapes.get(leaf, ()), 0, 0)[number]

    has = {
        "num_hidden_layers": axis("dense_layers.input_norm.scale", 0) + axis("moe_layers.input_norm.scale", 0),
        "n_routed_experts": axis(EXPERTS[0], 1),
        "vision.num_hidden_layers": axis("vision.blocks.norm0.scale", 0),
    }
    wants = {
        "num_hidden_layers": model.num_hidden_layers,
        "n_routed_experts": model.moe.n_routed_experts if model.moe and model.num_moe_layers > 0 else 0,
        "vision.num_hidden_layers": model.vision.num_hidden_layers if model.vision else 0,
    }
    wrong = [f"model.{key} = {wants[key]}, the weights have {has[key]}" for key in has if wants[key] != has[key]]
    if wrong:
        raise CheckpointError("the checkpoint does not hold the model of its settings: " + "; ".join(wrong))
    bounds.check(model, max(math.prod(shape) for shape in shapes.values()), None, "the checkpoint")


def _check_scales(every: list[Tensor], shapes: dict[str, tuple[int, ...]], group: int) -> None:
    """Raises CheckpointError if stored INT4 scales are not those of groups of this size."""
    last = {tensor.leaf: tensor for tensor in every if tensor.leaf in shapes}
    for leaf, tensor in last.items():
        want = (*(n + 1 for n in tensor.index), tensor.rows, tensor.columns // group)
        if len(tensor.shape) != 2 or shapes[leaf] != want:
            found = list(shapes[leaf])
            raise CheckpointError(f"scales of {leaf}: {found}, must be {list(want)} for groups of {group} inputs")


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

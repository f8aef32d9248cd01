"""Released checkpoints opened, checked whole before anything is allocated, then read and written piece by piece.

Source: docs/released_model.md section 4; docs/architecture.md section 9 (streaming conversion into stacked leaves). A
piece is some rows of one released tensor, which are some columns of a slice of one of our leaves: at most PIECE
elements. Everything that moves weights (load, save, the two conversions) moves pieces, so memory does not depend on the
model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from kimi_jax import sharding
from kimi_jax.config import ConfigError, ModelConfig, MoEConfig
from kimi_jax.hf import bounds, fp8, int4
from kimi_jax.hf import config as hf_config
from kimi_jax.hf.files import DTYPES, NAMES, CheckpointError, Directory, Entry, Writer, file_plan, write_index
from kimi_jax.hf.names import BUFFERS, Tensor, tensors, transpose
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import leaf_name, metadata, unbox
from kimi_jax.untrusted import MAX_CONFIG, check_inside, read_json

PIECE = 1 << 23  # elements: 16 MB in bfloat16, 32 MB while it is float32
MAX_FILE = 5 << 30  # bytes of one written safetensors file
PACKED, SCALE, SHAPE, SCALE_INV = "weight_packed", "weight_scale", "weight_shape", "weight_scale_inv"
SIDE_FILES = ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json")
MAX_BUFFER = 1 << 16  # bytes of a buffer, which is held whole
FLOATS = ("F32", "F16", "BF16")
BIAS = "moe_layers.mlp.router.bias"  # always float32: the released code selects experts in float32
EXPERTS = tuple(f"moe_layers.mlp.experts.{name}" for name in ("gate", "up", "down"))  # what may stay INT4
WORDS, SCALES = "words", "scales"  # of a leaf in EXPERTS that did


@dataclass(frozen=True)
class TensorSlice:
    """Rows first..last-1 of a released tensor."""

    tensor: Tensor
    first: int
    last: int


def pieces(tensor: Tensor, block: int | None = None) -> Iterator[TensorSlice]:
    """The tensor in pieces of `block` positions of our first output axis; by default as many as PIECE elements hold."""
    limit = (block or max(PIECE // tensor.columns // tensor.step, 1)) * tensor.step
    for first in range(0, tensor.rows, limit):
        yield TensorSlice(tensor, first, min(first + limit, tensor.rows))


class Released:
    """A released-format directory, opened and checked.

    released: parsed config.json; config: ours; tensors: what it must hold; buffers: names that are kept but not used.
    Raises FileNotFoundError without config.json, ConfigError, or one CheckpointError that lists every missing,
    unexpected, mis-shaped or unreadable tensor.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = epath.Path(path)
        file = self.path / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: a released checkpoint is a directory with config.json")
        check_inside(self.path, file.name, ConfigError)
        self.released = read_json(file, MAX_CONFIG, ConfigError)
        self.config = hf_config.from_released(self.released)
        self.quantization = hf_config.quantization(self.released)
        self.model_type: str = self.released["model_type"]
        for name in SIDE_FILES:
            if (self.path / name).exists():
                read_json(check_inside(self.path, name, CheckpointError), MAX_CONFIG, CheckpointError)
        self.directory = Directory(self.path)
        try:
            stored = self.directory.tensors.values()
            longest = max((size for each in stored for size in each.shape), default=0)
            bounds.check(self.config, bounds.CODES_PER_WORD * longest, len(stored), str(self.path))
            self.tensors = tensors(self.config, self.model_type)
            self.buffers = [name for name in self.directory.tensors if name.endswith(BUFFERS)]
            problems = self._problems()
        except ValueError:
            self.directory.close()
            raise
        if problems:
            self.directory.close()
            raise CheckpointError("\n  ".join([f"{self.path} does not hold the model of its config.json:", *problems]))

    def parts(self, tensor: Tensor) -> dict[str, tuple[int, ...]]:
        """The stored names of one tensor and the shapes they must have."""
        name, base, have = tensor.name, tensor.name.removesuffix("weight"), self.directory.tensors
        quantization = self.quantization if len(tensor.shape) == 2 else None
        method = quantization.method if quantization else None
        if quantization and method == "int4" and base + PACKED in have:
            rows, columns = tensor.shape
            groups = columns // quantization.group_size
            return {base + PACKED: (rows, columns // 8), base + SCALE: (rows, groups), base + SHAPE: (2,)}
        if quantization and method == "fp8" and base + SCALE_INV in have:
            high, wide = quantization.block
            return {name: tensor.shape, base + SCALE_INV: (-(-tensor.shape[0] // high), -(-tensor.shape[1] // wide))}
        return {name: tensor.shape}

    def is_int4(self, tensor: Tensor) -> bool:
        """Whether this tensor is stored packed."""
        return tensor.name.removesuffix("weight") + PACKED in self.directory.tensors

    def _problems(self) -> list[str]:
        have, expected = self.directory.tensors, set(self.buffers)
        missing, wrong = [], []
        for tensor in self.tensors:
            group = self.quantization.group_size if self.quantization else 1
            if self.is_int4(tensor) and len(tensor.shape) == 2 and tensor.shape[1] % group:
                wrong.append(f"{tensor.name}: {tensor.shape[1]} inputs cannot be INT4 in groups of {group}")
                continue
            for name, shape in self.parts(tensor).items():
                expected.add(name)
                if name not in have:
                    missing.append(f"missing: {name} {list(shape)}")
                elif have[name].shape != shape:
                    wrong.append(f"shape of {name}: {list(have[name].shape)}, must be {list(shape)}")
                elif have[name].dtype not in self._dtypes(name):
                    wrong.append(f"dtype of {name}: {have[name].dtype}, must be one of {self._dtypes(name)}")
                elif name.endswith(SHAPE) and tuple(self.directory.whole(name)) != tensor.shape:
                    wrong.append(f"{name} says {self.directory.whole(name)}, must be {list(tensor.shape)}")
        for name in self.buffers:
            stored = have[name]
            if stored.dtype not in FLOATS or len(stored.shape) != 1 or stored.nbytes > MAX_BUFFER:
                wrong.append(f"{name} is no vector of rotary frequencies: {stored.dtype} {list(stored.shape)}")
        unexpected = [f"unexpected: {name} {list(s.shape)}" for name, s in have.items() if name not in expected]
        return missing + unexpected + wrong

    def _dtypes(self, name: str) -> tuple[str, ...]:
        if name.endswith((PACKED, SHAPE)):
            return ("I32", "I64") if name.endswith(SHAPE) else ("I32",)
        fp8_scales = name.removesuffix("weight") + SCALE_INV in self.directory.tensors
        return ("F8_E4M3",) if fp8_scales and name.endswith(".weight") else FLOATS

    def dtype(self, tensor: Tensor) -> str:
        """Name of the dtype that `read` gives: of the file, of the scales for INT4, BF16 for FP8."""
        stored = self.directory.tensors
        if self.is_int4(tensor):
            return stored[tensor.name.removesuffix("weight") + SCALE].dtype
        found = stored[tensor.name].dtype
        return "BF16" if found == "F8_E4M3" else found

    def read(self, piece: TensorSlice) -> np.ndarray:
        """The piece in our layout, dequantised."""
        tensor, first, last = piece.tensor, piece.first, piece.last
        base = tensor.name.removesuffix("weight")
        if self.is_int4(tensor):
            words = self.directory.rows(base + PACKED, first, last)
            rows = int4.dequantise(words, self.directory.rows(base + SCALE, first, last))
        else:
            rows = self._rows(tensor, first, last)
            if rows.dtype == DTYPES["F8_E4M3"]:
                assert self.quantization  # `parts` accepts FP8 only with its settings
                scales = self.directory.rows(base + SCALE_INV).astype(np.float32)
                rows = fp8.dequantise(rows, scales, self.quantization.block, first)
        return tensor.to_ours(rows)

    def read_int4(self, piece: TensorSlice) -> tuple[np.ndarray, np.ndarray]:
        """Words int32 [columns/8, n] and scales [columns/group, n] of a piece of an INT4 tensor: our layout."""
        base = piece.tensor.name.removesuffix("weight")
        words, scales = (self.directory.rows(base + part, piece.first, piece.last) for part in (PACKED, SCALE))
        return transpose(words), transpose(scales)

    def _rows(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        return self.directory.rows(tensor.name, first, last).reshape(last - first, -1)

    def close(self) -> None:
        """Lets go of the files."""
        self.directory.close()


def parallel(work: Callable[[Any], Any], items: Iterable[Any], workers: int | None = None) -> Iterator[Any]:
    """work(item) for all items in threads, results in order; the first failure stops the rest.

    Never more than a few items a worker are under way, whatever the length of `items`.
    """
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


# ------------------------------------------------------------------------------------------------- whole, in the memory


def load(
    path: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    keep_int4: bool = False,
    mesh: Mesh | None = None,
    parts: Collection[str] | None = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, parameters) of a released directory; every weight in `dtype` (default: as config.json says).

    The router bias is float32 always. keep_int4: the routed experts stay the words and scales that the files hold, and
    the configuration says so. mesh: every array is sharded by the rules of `kimi_jax.sharding`; this process reads what
    its devices hold, and each of them gets its own part only. On the host stand the parts of one leaf at a time.
    parts: names at the top of the tree (`vision`, `lm_head`), of which alone anything is read; default all.
    Raises what `Released` raises, ConfigError for `keep_int4` without INT4 experts.
    """
    checkpoint = Released(path)
    dtype = dtype or checkpoint.config.param_dtype
    config = dataclasses.replace(checkpoint.config, dtype=dtype, param_dtype=dtype)
    by_leaf: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.tensors:
        if parts is None or tensor.leaf.split(".")[0] in parts:
            by_leaf.setdefault(tensor.leaf, []).append(tensor)
    params: dict[str, Any] = {}
    try:
        if keep_int4:
            config = dataclasses.replace(config, moe=_int4_section(checkpoint, by_leaf))
        placements = _placements(config, mesh) if mesh is not None else {}
        for leaf, members in by_leaf.items():
            if keep_int4 and leaf in EXPERTS:
                set_leaf(params, leaf, _load_int4(checkpoint, members, placements))
            else:
                kind = np.dtype(np.float32) if leaf == BIAS else jnp.dtype(dtype)
                array = Parts(_stacked(members, members[-1].inner), kind, placements.get(leaf))
                _fill(members, [array], lambda piece: (checkpoint.read(piece),))
                set_leaf(params, leaf, array.array())
    finally:
        checkpoint.close()
    return config, params


def _placements(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    boxed = abstract_params(config)
    placements = sharding.param_shardings(metadata(boxed), unbox(boxed), mesh)
    leaves = jax.tree_util.tree_leaves_with_path(placements)
    return {leaf_name(path): placement for path, placement in leaves}


class Parts:
    """One array on its way from the files to its devices: on the host stand the parts that they will hold.

    placement: how it lies over devices; None: whole, on the default device. Devices with the same part share it here.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, placement: NamedSharding | None):
        self._shape, self._placement = shape, placement
        every = (slice(None),) * len(shape)
        indices = placement.addressable_devices_indices_map(shape) if placement else {None: every}
        self._boxes = {
            device: tuple(at.indices(size)[:2] for at, size in zip(index, shape, strict=True))
            for device, index in indices.items()
        }
        self._parts = {box: np.empty([stop - start for start, stop in box], dtype) for box in self._boxes.values()}

    def overlaps(self, place: Sequence[int | slice]) -> list[tuple[np.ndarray, tuple[slice, ...]]]:
        """For each part that reaches into array[place]: the view of it that does, and where that is in array[place]."""
        places = [*place, *(slice(None),) * (len(self._shape) - len(place))]
        found = []
        for box, part in self._parts.items():
            inside: list[int | slice] = []
            taken: list[slice] = []
            for at, (start, stop), size in zip(places, box, self._shape, strict=True):
                first, last = (at, at + 1) if isinstance(at, int) else at.indices(size)[:2]
                low, high = max(first, start), min(last, stop)
                if low >= high:
                    break
                inside.append(low - start if isinstance(at, int) else slice(low - start, high - start))
                if not isinstance(at, int):
                    taken.append(slice(low - first, high - first))
            else:
                found.append((part[tuple(inside)], tuple(taken)))
        return found

    def array(self) -> jax.Array:
        """The parts on their devices."""
        if self._placement is None:
            (whole,) = self._parts.values()
            return jnp.asarray(whole)
        placed = [jax.device_put(self._parts[box], device) for device, box in self._boxes.items()]
        return jax.make_array_from_single_device_arrays(self._shape, self._placement, placed)


def _fill(members: list[Tensor], arrays: list[Parts], read: Callable[[TensorSlice], tuple[np.ndarray, ...]]) -> None:
    """Every piece that a part of the arrays needs is read once; `read` gives it for each of them."""

    def fill(piece: TensorSlice) -> None:
        place = piece.tensor.place(piece.first, piece.last)
        wanted = [parts.overlaps(place) for parts in arrays]
        if any(wanted):
            for overlaps, values in zip(wanted, read(piece), strict=True):
                for view, taken in overlaps:
                    view[...] = values[taken]

    for _ in parallel(fill, (piece for tensor in members for piece in pieces(tensor))):
        pass


def _load_int4(checkpoint: Released, members: list[Tensor], placements: dict[str, NamedSharding]) -> dict[str, Any]:
    inputs, outputs = members[-1].inner
    assert checkpoint.quantization  # `_int4_section` looked
    groups, scale = inputs // checkpoint.quantization.group_size, DTYPES[checkpoint.dtype(members[0])]
    arrays = {
        name: Parts(_stacked(members, (rows, outputs)), dtype, placements.get(f"{members[0].leaf}.{name}"))
        for name, rows, dtype in ((WORDS, inputs // 8, np.dtype(np.int32)), (SCALES, groups, scale))
    }
    _fill(members, list(arrays.values()), checkpoint.read_int4)
    return {name: parts.array() for name, parts in arrays.items()}


def _stacked(members: list[Tensor], inner: tuple[int, ...]) -> tuple[int, ...]:
    return (*(n + 1 for n in members[-1].index), *inner)


def _int4_section(checkpoint: Released, by_leaf: dict[str, list[Tensor]]) -> MoEConfig:
    """The section of a configuration whose experts stay as they are stored. Raises ConfigError if that is not INT4."""
    moe, quantization = checkpoint.config.moe, checkpoint.quantization
    members = [tensor for leaf in EXPERTS for tensor in by_leaf.get(leaf, ())]
    floats = [tensor.name for tensor in members if not checkpoint.is_int4(tensor)]
    if moe is None or quantization is None or not members or floats:
        example = f", {floats[0]} for one" if floats else ""
        raise ConfigError(
            f"the experts of {checkpoint.path} are not INT4{example}, so they cannot stay so; pack them first: "
            "python -m kimi_jax.convert from-hf, then to-hf --int4"
        )
    kinds = {checkpoint.dtype(tensor) for tensor in members}
    if len(kinds) > 1:
        raise ConfigError(f"the scales of {checkpoint.path} have several dtypes, {sorted(kinds)}; load them as floats")
    return dataclasses.replace(moe, int4_group_size=quantization.group_size)


def set_leaf(tree: dict[str, Any], path: str, value: Any) -> None:
    """tree["a"]["b"] = value for the path "a.b"."""
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def get_leaf(tree: dict[str, Any], path: str) -> Any:
    """tree["a"]["b"] for the path "a.b"."""
    for key in path.split("."):
        tree = tree[key]
    return tree


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: dict[str, Any],
    model_type: str,
    dtype: str = "bfloat16",
    int4_experts: bool = False,
) -> None:
    """Parameters as a released directory: config.json and safetensors files of at most 5 GB.

    dtype: of all tensors but the router bias, which stays float32. int4_experts: routed experts packed, with scales of
    the largest magnitude in each group. Experts that are INT4 in memory are written as they are. Raises ConfigError if
    the released format cannot say what the model is, FileExistsError if `path` holds a checkpoint already.
    """
    target = Path(path)
    if (target / "config.json").exists():
        raise FileExistsError(f"{target} holds a checkpoint already; write to another directory")
    name = NAMES[np.dtype(jnp.dtype(dtype))]
    released = hf_config.to_released(config, model_type, dtype)
    wanted = tensors(config, model_type)
    kept = config.moe.int4_group_size if config.moe else None
    group = kept or 32
    is_packed = {t.name: bool(kept or int4_experts) and t.leaf in EXPERTS for t in wanted}

    def kind(tensor: Tensor) -> str:
        if kept and is_packed[tensor.name]:
            return NAMES[np.dtype(get_leaf(params, tensor.leaf)[SCALES].dtype)]
        return "F32" if tensor.leaf == BIAS else name

    entries = [entry for t in wanted for entry in output_entries(t, kind(t), is_packed[t.name], group)]
    plan = file_plan(entries, MAX_FILE)
    target.mkdir(parents=True, exist_ok=True)
    writer = Writer(target, plan, {})
    dtypes = {entry.name: DTYPES[entry.dtype] for entry in entries}

    def write(piece: TensorSlice) -> None:
        leaf, place = get_leaf(params, piece.tensor.leaf), piece.tensor.place(piece.first, piece.last)
        if kept and is_packed[piece.tensor.name]:
            words, scales = (transpose(np.asarray(leaf[part][place])) for part in (WORDS, SCALES))
            _write_words(writer, piece, words, scales, dtypes)
        else:
            ours = np.asarray(leaf[place])
            write_piece(writer, piece, ours, dtypes, packed=is_packed[piece.tensor.name], scales=None)

    for _ in parallel(write, (piece for tensor in wanted for piece in pieces(tensor))):
        pass
    writer.close()
    write_index(target, plan)
    released = hf_config.with_quantization(released, hf_config.int4_section(group) if any(is_packed.values()) else None)
    (target / "config.json").write_text(json.dumps(released, indent=2) + "\n", encoding="utf-8")


def output_entries(tensor: Tensor, dtype: str, packed: bool, group: int = 32) -> list[Entry]:
    """What is written for one tensor: itself, or its words, scales (in `dtype`) and shape.

    Raises ConfigError if a packed tensor's input width is not a multiple of the group.
    """
    if not packed:
        return [Entry(tensor.name, dtype, tensor.shape)]
    rows, columns = tensor.shape
    if columns % group:
        raise ConfigError(f"{tensor.name}: {columns} inputs cannot be INT4 in groups of {group}")
    base = tensor.name.removesuffix("weight")
    return [
        Entry(base + PACKED, "I32", (rows, columns // 8)),
        Entry(base + SCALE, dtype, (rows, columns // group)),
        Entry(base + SHAPE, "I32", (2,)),
    ]


def write_piece(
    writer: Writer,
    piece: TensorSlice,
    ours: np.ndarray,
    dtypes: dict[str, np.dtype],
    *,
    packed: bool,
    scales: np.ndarray | None,
    group: int = 32,
) -> None:
    """One piece of ours into the files; packed with these scales [n, columns/group], or with new ones if None."""
    tensor = piece.tensor
    rows = tensor.to_released(ours)
    if not packed:
        writer.write(tensor.name, rows.astype(dtypes[tensor.name], copy=False), piece.first)
        return
    base = tensor.name.removesuffix("weight")
    if scales is None:
        scales = int4.minmax_scales(rows, group, dtypes[base + SCALE])
    _write_words(writer, piece, int4.quantise(rows, scales), scales, dtypes)


def _write_words(
    writer: Writer, piece: TensorSlice, words: np.ndarray, scales: np.ndarray, dtypes: dict[str, np.dtype]
) -> None:
    tensor = piece.tensor
    base = tensor.name.removesuffix("weight")
    writer.write(base + PACKED, words, piece.first)
    writer.write(base + SCALE, scales, piece.first)
    if piece.first == 0:
        writer.write(base + SHAPE, np.asarray(tensor.shape, dtypes[base + SHAPE]))

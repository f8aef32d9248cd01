"""The training step of a configuration, lowered and compiled for devices that need not exist.

It is the function that `train.loop` jits (`train.step.make_train_step`), given shapes instead of arrays. The compiler
of the `libtpu` wheel runs on any machine; `TPU_SKIP_MDS_QUERY` keeps it from asking the cloud which TPU it is on.

G packs   R rows a pack   S tokens a row
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, TrainConfig
from kimi_jax.data.packing import Pack, PackShape
from kimi_jax.packed_batch import PackedBatch
from kimi_jax.plan.chips import Topology
from kimi_jax.train import state as state_lib
from kimi_jax.train import xla_flags
from kimi_jax.train.step import make_optimizer, make_train_step


class PlanError(RuntimeError):
    """The plan cannot be made on this machine; the message says what to do."""


class DoesNotFit(Exception):
    """The compiler gave up for lack of memory. `needed` and `available` are bytes a device."""

    def __init__(self, needed: int, available: int, seconds: float):
        super().__init__(f"needs {needed / 2**30:.2f} GiB of {available / 2**30:.2f} GiB a device")
        self.needed, self.available, self.seconds = needed, available, seconds


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step: its text, and bytes a device."""

    text: str
    arguments: int  # parameters, optimizer state, batch
    outputs: int  # that do not lie where an argument was
    peak: int  # what a device must have
    seconds: float  # to compile, without tracing
    cpu_seconds: float  # the same of all cores, which other work on the machine does not change
    trace_seconds: float

    @property
    def temporaries(self) -> int:
        """Bytes of the block in which the compiler lays out what it needs on the way."""
        return self.peak - self.arguments - self.outputs


def devices_of(topology: Topology) -> list[jax.Device]:
    """The devices of that pod, as the compiler describes them. Raises PlanError without libtpu or for a bad name."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock is for chips, and there are none here
    _reports()
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise PlanError("the TPU compiler is not installed: pip install 'kimi_jax[tpu]' (Linux, x86-64)") from None
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.slice_name, **slices).devices)
    except Exception as error:  # jax passes on whatever the plug-in raises
        raise PlanError(f"the TPU compiler does not know {topology.slice_name!r}: {error}") from None


def scaled(config: TrainConfig, mesh: Mesh | AbstractMesh, rows: int | None) -> TrainConfig:
    """`config` with `rows` rows for each device of the mesh (None: its global batch), one pack a part and microbatch.

    The vision bins of a pack grow or shrink with its rows, each class by itself and at least one bin, so that a row
    has the patches beside it that the configuration gives it. Raises ConfigError if the batch does not divide.
    """
    data = config.data
    total = data.num_packs * data.rows_per_pack if rows is None else rows * mesh.size
    packs = sharding.batch_parts(mesh) * config.memory.microbatches
    if not total or total % packs:
        raise ConfigError(
            f"{total} rows cannot be sharded into {packs} packs ({packs // config.memory.microbatches} parts of the "
            f"mesh, {config.memory.microbatches} microbatches); give another --sequences_per_chip"
        )
    share = total / packs / data.rows_per_pack
    bins = tuple((patches, max(1, math.ceil(count * share))) for patches, count in data.vision_bins)
    data = dataclasses.replace(data, num_packs=packs, rows_per_pack=total // packs, vision_bins=bins)
    return dataclasses.replace(config, data=data)


def abstract_batch(config: TrainConfig, mesh: Mesh) -> PackedBatch:
    """Shapes, dtypes and shardings of a packed batch."""
    pack = Pack(PackShape.of(config.data, config.model)).batch
    placement, packs = sharding.batch_sharding(mesh), config.data.num_packs
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((packs * x.shape[0], *x.shape[1:]), x.dtype, sharding=placement), pack
    )


def lower(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The training step for the devices of `mesh`, before compilation."""
    optimizer = make_optimizer(config, mesh)
    _, step = make_train_step(config, mesh, optimizer=optimizer)
    return cast(Any, step).lower(state_lib.abstract(config.model, optimizer, mesh), abstract_batch(config, mesh))


def compile_step(config: TrainConfig, mesh: Mesh) -> Compiled:
    """Lowers and compiles the training step. Raises DoesNotFit when the compiler runs out of the chip's memory."""
    return compile_lowered(lambda: lower(config, mesh), xla_flags.options(list(mesh.devices.flat), config.xla_preset))


def compile_lowered(make: Callable[[], jax.stages.Lowered], options: Mapping[str, str] | None = None) -> Compiled:
    """Compiles what `make` lowers. options: of the compiler, for a training step those that `train.loop` gives it.

    Raises DoesNotFit when the compiler runs out of the chip's memory.
    """
    for old in _reports().glob("*memory-usage-report.txt"):
        old.unlink()
    start = time.perf_counter()
    lowered = make()
    traced, cpu = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        too_large = memory_error(error, time.perf_counter() - traced)
        if too_large is None:
            raise
        raise too_large from None
    seconds, cpu = time.perf_counter() - traced, time.process_time() - cpu
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        text=compiled.as_text(),
        arguments=memory.argument_size_in_bytes,
        outputs=outputs,
        peak=needed(reported(_reports()), memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes),
        seconds=seconds,
        cpu_seconds=cpu,
        trace_seconds=traced - start,
    )


def reported(folder: Path) -> int | None:
    """Bytes of a chip's memory that the compiler laid out, by its own report; None where it wrote none (for a CPU).

    Up to libtpu 0.0.42 that is what it compares with the memory there is before it gives up. See `needed`.
    """
    totals = [
        int(total)
        for path in folder.glob("*memory-usage-report.txt")
        for total in re.findall(r"Memory Space: default.*\nTotal bytes: (\d+)", path.read_text())
    ]
    return max(totals, default=None)


def needed(report: int | None, analysis: int) -> int:
    """Bytes of a chip's memory of a program that the compiler has accepted: the smaller of its two accounts.

    `memory_analysis()` of libtpu 0.0.42 counts temporaries that share their place twice (117 GiB of a program laid out
    in 83), the total of the report of 0.0.52 does (186 GiB of one that it accepts for a chip of 95).
    """
    return analysis if report is None else min(report, analysis)


@functools.cache
def _reports() -> Path:
    """Where the compilers of this process write their reports. They read the flag when they are loaded."""
    flags = os.environ.get("XLA_FLAGS", "")
    if named := re.search(r"--xla_dump_to=(\S+)", flags):
        return Path(named[1])
    folder = Path(tempfile.mkdtemp(prefix="kimi_plan_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={folder} --xla_dump_hlo_as_text".strip()
    return folder


def memory_error(error: Exception, seconds: float) -> DoesNotFit | None:
    """What the compiler says about a program that is too large; None if the error is about something else.

    The two ways in which it says so (libtpu 0.0.42 to 0.0.52): the temporaries alone, or the whole program.
    """
    text = str(error)
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", text)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", text)
    if "RESOURCE_EXHAUSTED" not in text or not found:
        return None
    number, unit, limit, limit_unit = found.groups()
    return DoesNotFit(_bytes(number, unit), _bytes(limit, limit_unit), seconds)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def bytes_a_device(tree: Any) -> int:
    """Of arrays, or shapes, with shardings: what each device holds of them."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

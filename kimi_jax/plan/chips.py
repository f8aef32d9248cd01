"""What a TPU chip can do, and the names of pods.

Sources: Cloud TPU documentation, tables "Key specifications" of v5e, v5p, v6e and TPU7x (peak bfloat16 FLOP/s, HBM
bandwidth, inter-chip and data-centre bandwidth a chip); the memory a program may use is what the compiler of libtpu
0.0.42.1 says when a program is too large. An inter-chip link carries the documented figure divided by the chip's links
and by two directions: 100 GB/s one way on all but v5e. Nothing is taken off for protocol or contention.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kimi_jax.config import ConfigError, nearest


@dataclass(frozen=True)
class Chip:
    """One kind of TPU. Rates are a *device* of jax: half a chip on TPU7x, a chip on the others."""

    name: str
    flops: float  # peak bfloat16 FLOP/s
    clock: float  # Hz: the compiler's estimates are cycles
    hbm: int  # bytes that a program may use
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s, one way, of one inter-chip link
    torus_axes: int  # links = 2 * torus_axes
    dcn_rate: float  # bytes/s between slices
    devices_per_chip: int = 1
    wraps_at: int = 4  # an axis of a multiple of this many chips is a ring; shorter ones are lines


def _gib(number: float) -> int:
    return int(number * 2**30)


CHIPS = {
    "v5p": Chip("v5p", 459e12, 1.75e9, _gib(95.74), 2765e9, 100e9, 3, 6.25e9),
    "v6e": Chip("v6e", 918e12, 1.75e9, _gib(31.25), 1638e9, 100e9, 2, 12.5e9, wraps_at=16),
    "v5e": Chip("v5e", 197e12, 1.5e9, _gib(15.75), 819e9, 50e9, 2, 3.125e9, wraps_at=16),
    "tpu7x": Chip("tpu7x", 1153.5e12, 2.2e9, _gib(94.75), 3690e9, 100e9, 3, 6.25e9, devices_per_chip=2),
}


@dataclass(frozen=True)
class Topology:
    """`slices` pods of `shape` chips each; `2xv5p:4x4x4` in writing."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """The name of one slice, as the compiler knows it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return self.slice_name if self.slices == 1 else f"{self.slices}x{self.slice_name}"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Devices of jax of all slices."""
        return self.chips * self.chip.devices_per_chip


def parse_topology(text: str) -> Topology:
    """`v5p:8x8x8`, or `2xv5p:8x8x8` for two slices. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", text)
    if not found:
        raise ConfigError(f"--topology={text}: write CHIP:AxBxC, such as v5p:8x8x8, or 2xv5p:8x8x8 for two slices")
    slices, name, shape = found.groups()
    if name not in CHIPS:
        raise ConfigError(f"--topology: no chip {name!r}{nearest(name, CHIPS)}; there are {', '.join(CHIPS)}")
    chip = CHIPS[name]
    sizes = tuple(map(int, shape.split("x")))
    if len(sizes) != chip.torus_axes or min(sizes) < 1:
        raise ConfigError(f"--topology={text}: a {name} slice has {chip.torus_axes} sides of at least 1")
    return Topology(chip, sizes, int(slices or 1))

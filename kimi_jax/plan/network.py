"""Who talks to whom in a collective, how many bytes that puts on the wires, and how long the wires need for it.

Bytes are what one device sends (ring volumes; n devices, V bytes a device before the operation):
    all-gather (n-1) V     reduce-scatter, all-to-all (n-1)/n V     all-reduce 2 (n-1)/n V     permute V
A ragged all-to-all counts with its whole buffer, the most that it can send: how full it is depends on the routing.
Time is bytes over the bandwidth of the wires that the group can use at once, nothing taken off for latency: a ring or a
line along each side of the torus on which the group's chips differ. An all-to-all on a torus goes through the middle:
its longest side of length m takes V m / (4 W) with W both directions of a link, a line twice that. A group that spans
slices sends its bytes over the data-centre network instead, at the documented rate a chip.

Source: the volumes are textbook; the text forms of `replica_groups` are those of XLA's HLO printer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kimi_jax.plan.chips import Topology
from kimi_jax.plan.hlo import HloError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
THROUGH_THE_MIDDLE = ("all-to-all", "ragged-all-to-all")


def wire_bytes(kind: str, size: int, members: int) -> float:
    """Bytes that one device sends. size: bytes of its operands; members: devices of its group."""
    if kind == "collective-permute":
        return float(size)
    if members < 2:
        return 0.0
    if kind == "all-gather":
        return float(size) * (members - 1)
    return (2.0 if kind == "all-reduce" else 1.0) * size * (members - 1) / members


def groups(attributes: str, devices: int) -> np.ndarray:
    """Partition numbers that talk to each other, int [groups, members]; a permute gives its pairs.

    Raises HloError for a way of writing them that is not known.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        numbers = [int(n) for n in re.findall(r"\d+", pairs.group(1))]
        return np.array(numbers).reshape(-1, 2)
    by_axis = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", attributes
    )
    if by_axis:
        mesh, sizes, order, used = by_axis.groups()
        places = _groups_of_axes(mesh, used)
        return _reordered(sizes, order).reshape(-1)[places] if sizes else places
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, sizes, order = iota.groups()
        return _reordered(sizes, order).reshape([int(n) for n in shape.split(",")])
    lists = re.search(r"replica_groups=\{(\{[\d,{}\s]*\}|)\}", attributes)
    if lists and lists.group(1):
        return np.array([[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,\s]+)\}", lists.group(1))])
    if lists or "replica_groups" not in attributes:  # an empty list: everybody
        return np.arange(devices)[None]
    raise HloError(f"unknown way to write groups: {attributes[:200]}")


def _reordered(sizes: str, order: str | None) -> np.ndarray:
    """Partition numbers as an array of these sides, its axes then put in this order."""
    everybody = np.arange(math.prod(map(int, sizes.split(",")))).reshape([int(n) for n in sizes.split(",")])
    return everybody.transpose([int(n) for n in order.split(",")]) if order else everybody


def _groups_of_axes(mesh: str, used: str) -> np.ndarray:
    """`'a'=2,'b'=4` and `'b'`, or a part of an axis `'b':(k)n`: its size-n factor that has k in front of it."""
    sizes: list[int] = []
    inside: list[int] = []
    parts = {name: (int(pre), int(n)) for name, pre, n in re.findall(r"'([^']+)':\((\d+)\)(\d+)", used)}
    whole = set(re.findall(r"'([^']+)'", used)) - set(parts)
    for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
        if name in parts:
            before, n = parts[name]
            inside.append(len(sizes) + 1)
            sizes += [before, n, int(size) // (before * n)]
        else:
            inside += [len(sizes)] if name in whole else []
            sizes.append(int(size))
    outside = [i for i in range(len(sizes)) if i not in inside]
    members = math.prod(sizes[i] for i in inside)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(outside + inside).reshape(-1, members)


@dataclass(frozen=True)
class Network:
    """The devices of a program in the order of its partitions.

    axes: name and size of each mesh axis, first one slowest; places [devices, sides]: chip of each device on the torus;
    slices [devices].
    """

    topology: Topology
    axes: dict[str, int]
    places: np.ndarray
    slices: np.ndarray

    @classmethod
    def of(cls, topology: Topology, mesh: object) -> Network:
        """The network under a `jax.sharding.Mesh`."""
        devices = list(mesh.devices.flat)  # type: ignore[attr-defined]
        sides = len(topology.shape)
        places = np.array([tuple(d.coords)[:sides] for d in devices])
        slices = np.array([getattr(d, "slice_index", None) or 0 for d in devices])
        return cls(topology, dict(mesh.shape), places, slices)  # type: ignore[attr-defined]

    @cached_property
    def _coordinates(self) -> np.ndarray:
        sizes = tuple(self.axes.values())
        return np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), axis=-1)

    def axis(self, members: np.ndarray) -> str:
        """Mesh axes along which the members of a group differ: `fsdp`, `expert+fsdp`; `-` for a group of one."""
        differ = np.ptp(self._coordinates[members], axis=0) > 0
        return "+".join(name for name, varies in zip(self.axes, differ, strict=True) if varies) or "-"

    def crosses(self, members: np.ndarray) -> bool:
        """True if the group spans slices."""
        return bool(np.ptp(self.slices[members]))

    def seconds(self, kind: str, size: int, members: np.ndarray) -> float:
        """Time of one collective. size: bytes of a device's operands."""
        chip, count = self.topology.chip, len(members)
        sent = wire_bytes(kind, size, count)
        if not sent:
            return 0.0
        if self.crosses(members):
            return self._over_slices(kind, size, members)
        spans = [len(np.unique(self.places[members, side])) for side in range(self.places.shape[1])]
        used = [(n, self._is_ring(side, n)) for side, n in enumerate(spans) if n > 1]
        if not used:  # two devices of one chip
            return sent / (2 * chip.link_rate)
        if kind in THROUGH_THE_MIDDLE:
            return max(size * n / ((8 if ring else 4) * chip.link_rate) for n, ring in used)
        if kind == "collective-permute":
            return sent / chip.link_rate
        return sent / sum((2 if ring else 1) * chip.link_rate for _, ring in used)

    def _over_slices(self, kind: str, size: int, members: np.ndarray) -> float:
        """A reduction or gather goes in steps, inside slices over the links; each byte crosses between slices once."""
        slices = len(np.unique(self.slices[members]))
        inside = members[self.slices[members] == self.slices[members[0]]]
        rate = self.topology.chip.dcn_rate
        if kind in THROUGH_THE_MIDDLE or kind == "collective-permute":
            return size * (slices - 1) / slices / rate
        if kind == "all-gather":
            across = size * (slices - 1) / rate
            return across + self.seconds(kind, size * slices, inside)
        across = wire_bytes(kind, size // len(inside), slices) / rate
        return across + self.seconds(kind, size, inside)

    def _is_ring(self, side: int, span: int) -> bool:
        length = self.topology.shape[side]
        return span == length and length % self.topology.chip.wraps_at == 0

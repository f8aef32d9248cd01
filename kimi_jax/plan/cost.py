"""The cost of a compiled step: every instruction, times how often it runs.

Compute is what the compiler writes beside each fusion (`estimated_cycles`). Kernels written by hand have no such note:
they cost their FLOPs at peak or their bytes at the memory's rate, whichever is longer, from the estimate their author
attached (`cost_estimate`) or from their shapes. Data movers without a note (copies, sorts, gathers) cost their bytes at
the memory's rate. Collectives cost `plan.network`. A loop whose length is decided at run time (the rounds of expert
parallelism) runs `rounds` times; of the branches of a conditional the dearest is taken; both are listed in the result.

Source: docs/architecture.md section 6; XLA's HLO text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from kimi_jax.plan import network as net
from kimi_jax.plan.chips import Chip
from kimi_jax.plan.hlo import Computation, HloProgram, Instruction, arrays, nbytes, trip_count

# instructions that move bytes but carry no estimate; all others without one are free (views, constants, control)
MOVERS = ("copy", "sort", "gather", "scatter", "dynamic-update-slice", "dynamic-slice", "concatenate", "transpose",
          "pad", "reduce", "broadcast", "custom-call")  # fmt: skip
PARTLY = {"gather": None, "dynamic-slice": None, "dynamic-update-slice": 1, "scatter": 2}  # only so much is touched
CONTROL = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
_FRAMES = re.compile(r"^(jit\(.*\)|jvp\(.*\)|transpose\(.*\)|while|body|cond|closed_call|checkpoint"
                     r"|rematted_computation|remat|custom_vjp_call.*|shard_map|branch_\d+_fun|vmap\(.*\)"
                     r"|pjit|scan)$")  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective instruction of the program, over the whole step."""

    kind: str
    axis: str  # mesh axes it runs along
    members: int
    size: int  # bytes of a device's operands, once
    times: float  # how often in a step
    wire: float  # bytes sent by a device in a step
    seconds: float
    crosses: bool  # over the data-centre network
    where: str


@dataclass(frozen=True)
class Work:
    """Compute of one instruction over the whole step."""

    what: str  # fusion, kernel or mover
    name: str
    where: str
    times: float
    seconds: float


@dataclass
class Cost:
    """Everything that a step costs one device; seconds and bytes."""

    work: list[Work] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    dynamic_loops: list[str] = field(default_factory=list)  # loops that were taken to run `rounds` times
    conditionals: list[dict] = field(default_factory=list)  # where, seconds of the dearest and of the cheapest branch
    unpriced: list[str] = field(default_factory=list)  # kernels of which nothing is known

    @property
    def compute(self) -> float:
        """Seconds of compute."""
        return sum(w.seconds for w in self.work)

    @property
    def communication(self) -> float:
        """Seconds of all collectives, one after the other."""
        return sum(c.seconds for c in self.collectives)

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum(c.wire for c in self.collectives)


def label(op_name: str) -> str:
    """Where in the model an instruction is, and in which pass: `backward moe_layers/mlp/experts/dot_general`.

    Empty for instructions without a name, most of them copies into another layout.
    """
    if not op_name:
        return ""
    if "rematted_computation" in op_name or "/remat" in op_name:
        when = "recompute"
    elif "transpose(jvp" in op_name:
        when = "backward"
    elif "jvp(" in op_name:
        when = "forward"
    else:
        when = "update"
    kept = [part for part in re.split(r"/(?![^()]*\))", op_name) if part and not _FRAMES.match(part)]
    return f"{when} {'/'.join(kept[-4:])}".strip()


def price(program: HloProgram, chip: Chip, network: net.Network, rounds: int = 1) -> Cost:
    """The cost of one run of `program` on one device; loops of unknown length run `rounds` times."""
    walk = _Walk(program, chip, network, rounds)
    walk.run(program[program.entry], 1.0)
    return walk.cost


class _Walk:
    """Visits every instruction with the number of times it runs."""

    def __init__(self, program: HloProgram, chip: Chip, network: net.Network, rounds: int):
        self.program, self.chip, self.network, self.rounds = program, chip, network, rounds
        self.cost = Cost()

    def run(self, computation: Computation, times: float) -> None:
        for here in computation.instructions:
            if here.opcode == "while":
                self._loop(computation, here, times)
            elif here.opcode == "conditional":
                self._branch(here, times)
            elif here.opcode in ("call", "call-start", "async-start"):
                for name in here.called.get("to_apply", []) + here.called.get("calls", []):
                    self.run(self.program[name], times)
            elif kind := _collective(here.opcode):
                self._communicate(kind, computation, here, times)
            else:
                self._compute(computation, here, times)

    def _loop(self, computation: Computation, loop: Instruction, times: float) -> None:
        count = trip_count(self.program, computation, loop)
        if count is None:
            self.cost.dynamic_loops.append(label(loop.op_name))
            count = self.rounds
        self.run(self.program[loop.called["body"][0]], times * count)

    def _branch(self, here: Instruction, times: float) -> None:
        names = here.called.get("branch_computations") or [
            name for key in ("true_computation", "false_computation") for name in _named(here, key)
        ]
        walks = []
        for name in names:
            walk = _Walk(self.program, self.chip, self.network, self.rounds)
            walk.run(self.program[name], times)
            walks.append(walk.cost)
        totals = [cost.compute + cost.communication for cost in walks]
        dearest = walks[totals.index(max(totals))]
        entry = {"where": label(here.op_name), "dearest": max(totals), "cheapest": min(totals)}
        self.cost.conditionals.append(entry)
        for f in dataclasses.fields(Cost):
            getattr(self.cost, f.name).extend(getattr(dearest, f.name))

    def _communicate(
        self, kind: str, computation: Computation, here: Instruction, times: float, reduced: bool = False
    ) -> None:
        count = 1 if kind == "ragged-all-to-all" else len(here.operands)  # its other operands are offsets
        size = sum(nbytes(computation.by_name[name].shape) for name in here.operands[:count])
        members = net.groups(here.attributes, len(self.network.places))
        chosen = next((g for g in members if self.network.crosses(g)), members[0])
        kind = "reduce-scatter" if reduced else kind
        self.cost.collectives.append(
            Collective(
                kind=kind,
                axis=self.network.axis(chosen),
                members=len(chosen),
                size=size,
                times=times,
                wire=times * net.wire_bytes(kind, size, len(chosen)),
                seconds=times * self.network.seconds(kind, size, chosen),
                crosses=self.network.crosses(chosen),
                where=label(here.op_name),
            )
        )

    def _compute(self, computation: Computation, here: Instruction, times: float) -> None:
        if here.opcode == "fusion":
            for inner, instruction, kind in self._fused(here):  # a collective may hide in a fusion
                sliced = any(user.opcode == "dynamic-slice" for user in inner.users(instruction.name))
                self._communicate(kind, inner, instruction, times, reduced=kind == "all-reduce" and sliced)
        what, seconds = "fusion", None
        if here.cycles is not None:
            seconds = here.cycles / self.chip.clock
        elif 'custom_call_target="tpu_custom_call"' in here.attributes:
            what, seconds = "kernel", self._kernel(computation, here)
        elif here.opcode in MOVERS and not any(f'custom_call_target="{name}"' in here.attributes for name in CONTROL):
            what, seconds = "mover", _moved(computation, here) / self.chip.hbm_rate
        if seconds:
            self.cost.work.append(
                Work(what, here.name, label(here.op_name) or f"unnamed {here.opcode}", times, times * seconds)
            )

    def _fused(self, fusion: Instruction) -> Iterator[tuple[Computation, Instruction, str]]:
        for name in fusion.called.get("calls", []):
            inner = self.program[name]
            for instruction in inner.instructions:
                if kind := _collective(instruction.opcode):
                    yield inner, instruction, kind
                elif instruction.opcode == "fusion":
                    yield from self._fused(instruction)

    def _kernel(self, computation: Computation, here: Instruction) -> float:
        """Seconds of a hand-written kernel at the chip's peak rates."""
        moved = _moved(computation, here)
        shapes = [dims for name in here.operands for _, dims in arrays(computation.by_name[name].shape)]
        flops = _attached_flops(here) or matmul_flops(here.name, shapes)
        if flops is None:
            if any(dtype[0] in "bf" for dtype, _ in arrays(here.shape)):  # integers are bookkeeping, not matmuls
                self.cost.unpriced.append(here.name)
            flops = 0.0
        return max(flops / self.chip.flops, moved / self.chip.hbm_rate)


def _moved(computation: Computation, here: Instruction) -> int:
    """Bytes read and written; of an update in place or a look-up only the part that is touched."""
    if here.opcode in PARTLY:
        place = PARTLY[here.opcode]
        return 2 * nbytes(here.shape if place is None else computation.by_name[here.operands[place]].shape)
    return nbytes(here.shape) + sum(nbytes(computation.by_name[name].shape) for name in here.operands)


def _attached_flops(here: Instruction) -> float | None:
    found = re.search(r'"cost_estimate":(\{[^}]*\})', here.attributes)
    if not found:
        return None
    return float(json.loads(found.group(1)).get("flops", 0)) or None


def matmul_flops(name: str, shapes: list[tuple[int, ...]]) -> float | None:
    """FLOPs of a grouped-matmul or attention kernel from the shapes of its operands; None for another kernel.

    `gmm`: rows [M, K] times expert weights [E, K, N] or [E, N, K]; `tgmm`: [K, M] or [M, K] times [M, N];
    splash attention: q [.., H, S, d], k [.., S, d], v [.., S, dv], causal: half of all pairs.
    """
    matrices = [s for s in shapes if len(s) == 2 and min(s) > 1]
    expert_weights = [s for s in shapes if len(s) == 3]
    if name.startswith("tgmm") and len(matrices) >= 2:
        a, b = matrices[:2]
        shared = max(set(a) & set(b), default=a[0])
        return 2.0 * math.prod(a) * math.prod(b) / shared
    if name.startswith("gmm") and matrices and expert_weights:
        rows, expert_weight = matrices[0], expert_weights[0]
        return 2.0 * rows[0] * expert_weight[1] * expert_weight[2]
    if name.startswith("splash"):
        wide = [s for s in shapes if len(s) >= 3 and s[-1] >= 64 and s[-2] >= 64]
        if len(wide) >= 3:
            q, k, v = wide[:3]
            products = next((n for part, n in _SPLASH.items() if part in name), _SPLASH["fwd"])
            pairs = math.prod(q[:-1]) * k[-2] / 2
            return 2.0 * pairs * (products[0] * q[-1] + products[1] * v[-1])
    return None


_SPLASH = {"dkv": (2, 2), "dq": (2, 1), "fwd": (1, 1)}  # products of query-key width, of value width


def _collective(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in net.KINDS else None


def _named(here: Instruction, key: str) -> list[str]:
    return re.findall(rf"\b{key}=%?([\w.\-]+)", here.attributes)

"""The text of a compiled program (HLO) as data: computations, instructions, trip counts of loops.

Source: the text that `jax.stages.Compiled.as_text()` returns, as observed for libtpu 0.0.42.1 and 0.0.52 and for
XLA:CPU (docs/architecture.md section 6: what the compiler writes into it). Only what `plan.cost` needs is understood;
everything else of an instruction stays as text in `attributes`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64,
}  # fmt: skip
_ARRAY = re.compile(r"\b(" + "|".join(sorted(BITS, key=len, reverse=True)) + r")\[([0-9,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_END = re.compile(r'^\}(, execution_thread="\w+")?\s*$')  # a part of a SparseCore names its thread
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(to_apply|calls|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_INTEGER = re.compile(r"^-?\d+$")


class HloError(ValueError):
    """The text is not a compiled program, or refers to something that it does not hold."""


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array in the text of a shape, tuples flattened: `(f32[2,3], s32[])` has two."""
    return [(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in _ARRAY.findall(shape)]


def nbytes(shape: str) -> int:
    """Bytes of all arrays in the text of a shape."""
    return sum(math.prod(dims) * BITS[dtype] // 8 for dtype, dims in arrays(shape))


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names
    inside: str  # the text between the brackets: a constant's value, a parameter's number
    attributes: str
    root: bool

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """Computations that this instruction runs, by the attribute that names them."""
        found: dict[str, list[str]] = {}
        for key, value in _CALLED.findall(self.attributes):
            found.setdefault(key, []).extend(name.lstrip("%") for name in re.findall(r"%?[\w.\-]+", value))
        return found

    @cached_property
    def op_name(self) -> str:
        """Where the instruction comes from in the Python program; empty if the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @cached_property
    def cycles(self) -> int | None:
        """The TPU compiler's own estimate, None where it made none (or marked it as unknown)."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return int(found.group(1)) if found and int(found.group(1)) < 2**48 else None


@dataclass(frozen=True)
class Computation:
    """A named list of instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Its instructions by name."""
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    def parameter(self, number: int) -> Instruction:
        """Its parameter of that number."""
        return next(i for i in self.instructions if i.opcode == "parameter" and i.inside.strip() == str(number))

    def users(self, name: str) -> list[Instruction]:
        """Instructions that take the value `name`."""
        return [i for i in self.instructions if name in i.operands]


@dataclass(frozen=True)
class HloProgram:
    """All computations of a compiled module, and the name of the one where it begins."""

    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        if name not in self.computations:
            raise HloError(f"the program calls {name!r} but does not hold it")
        return self.computations[name]


def parse(text: str) -> HloProgram:
    """The program of `Compiled.as_text()`. Raises HloError if the text holds no entry computation."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", list[str]()
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, lines = head.group(2), []
            entry = name if head.group(1) else entry
        elif name and _END.match(line):
            computations[name] = Computation(name, tuple(map(_instruction, lines)))
            name = ""
        elif name and _INSTRUCTION.match(line):
            lines.append(line)
        elif name and lines:  # an attribute that spans lines
            lines[-1] += "\n" + line
    if not entry:
        raise HloError("this is not the text of a compiled program: it has no ENTRY computation")
    return HloProgram(computations, entry)


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    assert found is not None  # `parse` keeps only lines that match
    root, name, rest = found.groups()
    shape, rest = _split_shape(rest)
    opcode, _, rest = rest.partition("(")
    inside, attributes = _close(rest)
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(name, shape, opcode.strip(), operands, inside, attributes, bool(root))


def _split_shape(text: str) -> tuple[str, str]:
    """A tuple's shape ends with its bracket, any other at the first space."""
    if text.startswith("("):
        inside, rest = _close(text[1:])
        return f"({inside})", rest.strip()
    shape, _, rest = text.partition(" ")
    return shape, rest.strip()


def _close(text: str) -> tuple[str, str]:
    """`text` up to the bracket that closes one opened before it, and what comes after."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found.group() == "(" else -1
        if not depth:
            return text[: found.start()], text[found.end() :]
    return text, ""


# ---------------------------------------------------------------------------------------------------------- trip counts


def trip_count(program: HloProgram, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None if that is decided at run time.

    The compiler's `known_trip_count` if it is there. Otherwise the condition must be `counter < limit` with a limit and
    a start that are constants, perhaps by way of the tuple that the loop carries; the step is 1, as jax counts.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known.group(1))
    compare = _compare(program, program[loop.called["condition"][0]])
    if compare is None:
        return None
    counter, limit, extra = compare
    start = _carried(program, computation, loop, counter)
    stop = _carried(program, computation, loop, limit)
    return None if start is None or stop is None else max(0, stop - start + extra)


def _compare(program: HloProgram, condition: Computation) -> tuple[int | str, int | str, int] | None:
    """(counter, limit, 1 if the limit is included) of a condition.

    Each of the two is a number written as text, or the place (int) in the carried tuple that holds it.
    """
    root, names = condition.root, {i.name: _place(condition, i.name) for i in condition.instructions}
    while root.opcode in ("fusion", "call"):
        inner = program[(root.called.get("calls") or root.called["to_apply"])[0]]
        outer = [names[operand] for operand in root.operands]
        given = {inner.parameter(k).name: outer[k] for k in range(len(outer))}
        names = {i.name: _place(inner, i.name, given) for i in inner.instructions}
        root = inner.root
    direction = re.search(r"direction=(L[TE]|G[TE])", root.attributes)
    if root.opcode != "compare" or not direction:
        return None
    a, b = (names.get(operand) for operand in root.operands)
    if direction.group(1).startswith("G"):
        a, b = b, a
    return None if a is None or b is None else (a, b, int(direction.group(1).endswith("E")))


def _place(computation: Computation, name: str, given: dict[str, int | str | None] | None = None) -> int | str | None:
    """What a value is: the text of a constant, the place in the tuple that is parameter 0, or None: something else."""
    here = computation.by_name[name]
    while here.opcode in ("copy", "bitcast", "convert", "reshape"):
        here = computation.by_name[here.operands[0]]
    if given and here.name in given:
        return given[here.name]
    if here.opcode == "constant" and _INTEGER.match(here.inside.strip()):
        return here.inside.strip()
    if here.opcode == "get-tuple-element" and computation.by_name[here.operands[0]].opcode == "parameter":
        return _index(here)
    return None


def _index(element: Instruction) -> int:
    found = re.search(r"index=(\d+)", element.attributes)
    return int(found.group(1)) if found else 0


def _carried(program: HloProgram, computation: Computation, loop: Instruction, value: int | str) -> int | None:
    """The number that `value` is before the loop begins."""
    if isinstance(value, str):
        return int(value)
    carried = computation.by_name[loop.operands[0]]
    if carried.opcode != "tuple":
        return None
    start = _place(computation, carried.operands[value])
    return int(start) if isinstance(start, str) else None

"""What the values of settings may be, declared where a setting is: `peak_lr: Positive = 2e-4`.

A kind is a type with a `Range` or the options of a text; `problem` walks dataclasses of such fields. A dataclass may
have a method `conflict()` that says what of its fields does not go together.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """What a number may be: finite, from `low` to `high`, or above `above`."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    def problem(self, value: float) -> str:
        """What is allowed instead of this value; empty if it is fine."""
        if (isinstance(value, int) or math.isfinite(value)) and self.low <= value <= self.high and value > self.above:
            return ""
        least = f"above {self.above:g}" if self.above > -math.inf else f"at least {self.low:g}"
        return f"a finite number {least}" + (f" and at most {self.high:g}" if self.high < math.inf else "")


@dataclass(frozen=True)
class OneOf:
    """The texts that a setting may be."""

    options: tuple[str, ...]

    def problem(self, value: str) -> str:
        """What is allowed instead of this value; empty if it is fine."""
        return "" if value in self.options else f"one of {', '.join(self.options)}"


LARGEST = 2**31 - 1  # of a size: arrays are indexed by 32-bit numbers
Count = Annotated[int, Range(1, LARGEST)]
Natural = Annotated[int, Range(0, LARGEST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(above=0.0, high=1e30)]
NonNegative = Annotated[float, Range(0.0, 1e30)]
Share = Annotated[float, Range(0.0, 1.0)]
Decay = Annotated[float, Range(0.0, 0.9999999)]  # of a running mean
Dtype = Annotated[str, OneOf(("float32", "bfloat16"))]
ModelDtype = Annotated[str, OneOf(("float32", "bfloat16", "float16"))]  # released checkpoints come in all three


def shown(value: Any) -> str:
    """A value as an error message shows it: Python itself refuses to write integers of thousands of digits."""
    return f"{value!r:.40}" if not isinstance(value, int) or abs(value) < 10**30 else f"{value.bit_length()} bits"


def problem(config: Any, path: str) -> str:
    """What is wrong with a dataclass of settings: the first value out of its range, or a conflict; empty if nothing."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        if found := _problem_of(getattr(config, name), hint, f"{path}.{name}"):
            return found
    conflict = config.conflict() if hasattr(config, "conflict") else ""
    return f"{path}: {conflict}" if conflict else ""


def _problem_of(value: Any, hint: Any, path: str) -> str:
    if value is None:
        return ""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    origin = typing.get_origin(hint)
    if origin is Annotated:
        allowed = hint.__metadata__[0].problem(value)
        return f"{path} must be {allowed}, not {shown(value)}" if allowed else ""
    if dataclasses.is_dataclass(value):
        return problem(value, path)
    every: list[tuple[str, Any, Any]] = []
    if origin is dict:
        every = [(f"{path}.{key}", item, typing.get_args(hint)[1]) for key, item in value.items()]
    elif origin is tuple:
        kinds = typing.get_args(hint)
        kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
        every = [(f"{path}[{i}]", item, kind) for i, (item, kind) in enumerate(zip(value, kinds, strict=True))]
    return next((found for place, item, kind in every if (found := _problem_of(item, kind, place))), "")

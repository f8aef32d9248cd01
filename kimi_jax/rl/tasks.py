"""Problems whose answers a rule can check: a toy ladder, real and rendered images, JSONL files, reasoning-gym.

A task is an endless or finite list of problems: `task[i]` depends on the task and i only, so a checkpoint needs no more
than the number of problems drawn. What a task teaches, what it costs and which one must *not* learn is in docs/rl.md
section 6.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kimi_jax.config import ConfigError, TaskConfig, nearest
from kimi_jax.data.example import Image, Text
from kimi_jax.data.sources import demo_image
from kimi_jax.data.sources.demo_base import check_split, generator
from kimi_jax.data.sources.demo_count import QUESTION, draw_count, render_blobs
from kimi_jax.rl.rewards import VERIFIERS, verify
from kimi_jax.untrusted import parse_object, read_bytes

MAX_FILE = 1 << 28  # bytes of a JSONL file of problems
LENGTH = 1 << 30  # of tasks that are generated: as good as endless
SYMBOLS = "abcdefgh"
PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True)
class Problem:
    """What is asked, and how an answer is scored. parts: the prompt in reading order. truth: as the verifier wants it.

    Raises ValueError for an unknown verifier or a truth that is none for it.
    """

    key: str
    parts: tuple[Text | Image, ...]
    verifier: str
    truth: Any

    def __post_init__(self) -> None:
        if self.verifier not in VERIFIERS:
            raise ValueError(f"{self.key}: no verifier {self.verifier!r}; there are: {', '.join(VERIFIERS)}")
        VERIFIERS[self.verifier].truth(self.truth)

    def reward(self, answer: str) -> float:
        """In [0, 1]; 0 for whatever cannot be read."""
        return verify(self.verifier, answer, self.truth)


@runtime_checkable
class Task(Protocol):
    """Problems by number, the same number always the same problem."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Problem: ...


def blank(problem: Problem) -> Problem:
    """The control: every image becomes white, of the same size. What is learned from it was not seen."""
    parts = tuple(Image(np.full_like(np.asarray(p.image), 255)) if isinstance(p, Image) else p for p in problem.parts)
    return dataclasses.replace(problem, parts=parts)


# ----------------------------------------------------------------------------------------------------------- toy ladder


@dataclass(frozen=True)
class Symbols:
    """Copy or reverse `length` symbols: "reverse: a b c =" and "c b a".

    verifier: "positions" is the dense reward, "exact" the sparse one, which an untrained model never meets.
    """

    kind: str
    length: int
    verifier: str = "positions"
    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.kind not in ("copy", "reverse") or not 1 <= self.length <= 64:
            raise ConfigError(f"{self}: kind is copy or reverse, length 1..64")

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Problem:
        rng = generator(f"rl/{self.kind}/{self.length}", self.split, index)
        symbols = [SYMBOLS[k] for k in rng.integers(len(SYMBOLS), size=self.length)]
        answer = symbols if self.kind == "copy" else symbols[::-1]
        prompt = Text(f"{self.kind}: {' '.join(symbols)} =", 0.0)
        return Problem(f"{self.kind}/{self.split}/{index}", (prompt,), self.verifier, " ".join(answer))


@dataclass(frozen=True)
class ModularSum:
    """(a + b) mod 10 of two digits, all or nothing."""

    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self.split)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Problem:
        a, b = generator("rl/modsum", self.split, index).integers(10, size=2)
        return Problem(f"modsum/{self.split}/{index}", (Text(f"{a} + {b} mod 10 =", 0.0),), "exact", str((a + b) % 10))


@dataclass(frozen=True)
class Product:
    """The product of two numbers of `digits` digits, all or nothing: beyond a small model, and a line of code."""

    digits: int = 6
    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self.split)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Problem:
        low, high = 10 ** (self.digits - 1), 10**self.digits
        a, b = map(int, generator(f"rl/product/{self.digits}", self.split, index).integers(low, high, size=2))
        return Problem(f"product/{self.split}/{index}", (Text(f"{a} * {b} =", 0.0),), "mathematics", str(a * b))


@dataclass(frozen=True)
class CountBlobs:
    """How many discs are in a rendered image, 1 to 5. verifier: "count" (soft) or "mathematics" (0 or 1)."""

    verifier: str = "count"
    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self.split)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Problem:
        count, rng = draw_count("rl/count", self.split, index)
        parts = Image(render_blobs(count, rng)), Text(QUESTION, 0.0)
        truth = count if self.verifier == "count" else str(count)
        return Problem(f"count/{self.split}/{index}", parts, self.verifier, truth)


# ---------------------------------------------------------------------------------------------------------- real images


@dataclass(frozen=True)
class ReadDigits:
    """Read a row of one to four scanned handwritten digits (extra [demo]); reward by edit distance."""

    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self.split)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Problem:
        glyphs, labels = demo_image.digits(self.split)
        rng = generator("rl/digits", self.split, index)
        chosen = rng.integers(len(labels), size=rng.integers(1, 5))
        parts = Image(demo_image.eval_digits(glyphs[chosen], index)), Text("\nwhich digits?", 0.0)
        return Problem(f"digits/{self.split}/{index}", parts, "ocr", " ".join(str(labels[k]) for k in chosen))


# ----------------------------------------------------------------------------------------------------- files and others


@dataclass(frozen=True)
class JsonlProblems:
    """Questions of a JSONL file, one object a line, as lm-eval's tasks have them.

    prompt:   template of the question; {{name}} stands for a field of the line (a text or number).
    truth:    template of the truth, or with `raw` the name of the field that holds it as JSON (boxes, counts).
    verifier: of `rewards.VERIFIERS`. after: only what follows its last occurrence in the truth counts ("####").
    Raises ConfigError at once, with the line, for a line that is no problem.
    """

    path: str
    prompt: str
    truth: str
    verifier: str
    raw: bool = False
    after: str = ""

    def __post_init__(self) -> None:
        lines = read_bytes(self.path, MAX_FILE, ConfigError).split(b"\n")
        problems = [self._problem(line, f"{self.path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
        if not problems:
            raise ConfigError(f"{self.path} has no lines")
        object.__setattr__(self, "_problems", problems)

    def _problem(self, line: bytes, where: str) -> Problem:
        record = parse_object(line, where, ConfigError)
        question = Text(_fill(self.prompt, record, where), 0.0)
        if self.raw and self.truth not in record:
            raise ConfigError(f"{where} has no field {self.truth!r}")
        truth = record[self.truth] if self.raw else _fill(self.truth, record, where)
        if self.after and isinstance(truth, str):
            truth = truth.rpartition(self.after)[2].strip()
        try:
            return Problem(where, (question,), self.verifier, truth)
        except ValueError as problem:
            raise ConfigError(f"{where}: {problem}") from problem

    def __len__(self) -> int:
        return len(self._problems)  # type: ignore[attr-defined]

    def __getitem__(self, index: int) -> Problem:
        return self._problems[index]  # type: ignore[attr-defined]


def _fill(template: str, record: Mapping[str, Any], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = record.get(match[1])
        if type(found) not in (str, int, float):
            raise ConfigError(f"{where} has no text or number {match[1]!r}; there are: {', '.join(record)}")
        return str(found)

    return PLACEHOLDER.sub(value, template)


# Families of reasoning-gym whose answer one of our verifiers can check. Their own scorers are not used: some give part
# of the reward for an answer that merely contains the right one, some evaluate what the model wrote as code.
GYM = {
    "chain_sum": "mathematics", "count_bits": "mathematics", "gcd": "mathematics", "lcm": "mathematics",
    "letter_counting": "mathematics", "simple_equations": "mathematics", "spell_backward": "exact",
    "course_schedule": "exact", "isomorphic_strings": "exact", "leg_counting": "mathematics",
}  # fmt: skip


@dataclass(frozen=True)
class ReasoningGym:
    """Problems of one family of the package reasoning-gym (extra [tasks]), generated from a seed."""

    family: str
    size: int = 1 << 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in GYM:
            raise ConfigError(f"reasoning-gym's {self.family!r} has no verifier here; there are: {', '.join(GYM)}")
        try:
            import reasoning_gym
        except ImportError as problem:
            raise ConfigError("this task needs reasoning-gym: pip install 'kimi_jax[tasks]'") from problem
        data = reasoning_gym.create_dataset(self.family, size=self.size, seed=self.seed)
        object.__setattr__(self, "_data", data)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        entry = self._data[index]  # type: ignore[attr-defined]
        question = Text(entry["question"] + "\n", 0.0)
        return Problem(f"{self.family}/{self.seed}/{index}", (question,), GYM[self.family], entry["answer"])


LADDER: dict[str, Task] = {
    "copy": Symbols("copy", 1),
    "reverse": Symbols("reverse", 4),
    "modsum": ModularSum(),
    "product": Product(),  # for a tool
    "count": CountBlobs(),
    "count_exact": CountBlobs("mathematics"),
    "reverse_sparse": Symbols("reverse", 4, "exact"),  # the control: must not learn
    "digits": ReadDigits(),
}
FILES = ("jsonl", "reasoning_gym")  # kinds that take a path


@dataclass(frozen=True)
class Blanked:
    """A task whose images are white."""

    task: Task

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Problem:
        return blank(self.task[index])


def open_task(config: TaskConfig, split: str = "train") -> Task:
    """The task of a run's settings. split: "train" or "validation"; what comes from files has none, so a held-out one
    is a task of its own.

    Raises ConfigError for an unknown kind, with the nearest name, or what the task refuses.
    """
    if config.kind == "jsonl":
        task: Task = JsonlProblems(config.path, config.prompt, config.truth, config.verifier, config.raw, config.after)
    elif config.kind == "reasoning_gym":
        task = ReasoningGym(config.path, seed=int(split != "train"))
    elif config.kind in LADDER:
        task = dataclasses.replace(LADDER[config.kind], split=split)  # type: ignore[type-var]
    else:
        known = (*LADDER, *FILES)
        raise ConfigError(f"no task is called {config.kind!r:.60}{nearest(config.kind, known)}; there are: {known}")
    return Blanked(task) if config.blank else task

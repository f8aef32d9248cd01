"""A row of named columns to the parts of an example, by a template: how parquet, TFDS and seqio rows become text.

    {image}Q: {question} A:{loss=1} {answer}

Literal text stands for itself and `{name}` for the column of that name: text and numbers as they print, an image or a
video as that medium, a list of media as all of them in turn. `{image:name}` and `{video:name}` say what a column holds
where its type does not (bytes may be either). `{loss=0}` ... `{loss=1}` set the loss weight of the text behind them;
it starts at 0 when the template has such a mark and at 1 when it has none. `{{` and `}}` are braces. A template ends
the path: `train.parquet?template={image}{caption}`; everything behind `?template=` belongs to it.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_jax.config import ConfigError, nearest
from kimi_jax.data.example import Text


@dataclass(frozen=True)
class Column:
    """`{name}` or `{kind:name}` of a template; kind is "" (by type), "image" or "video"."""

    name: str
    kind: str = ""


@dataclass(frozen=True)
class Template:
    """A parsed template: its pieces in order, each with the loss weight of the text there."""

    source: str
    pieces: tuple[tuple[str | Column, float], ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns it names, in order, without repetition."""
        return tuple(dict.fromkeys(p for p, _ in self.pieces if isinstance(p, Column)))

    def fill(self, row: Mapping[Column, Any]) -> tuple:
        """The parts for one row. `row` holds a str, a medium or a sequence of media for each column; None is left
        out. Neighbouring text of the same loss weight becomes one Text.
        """
        parts: list[Any] = []
        for piece, weight in self.pieces:
            value = row[piece] if isinstance(piece, Column) else piece
            if value is None or value == "":
                continue
            if not isinstance(value, str):
                parts.extend(value if isinstance(value, Sequence) else [value])
            elif parts and isinstance(parts[-1], Text) and parts[-1].loss_weight == weight:
                parts[-1] = Text(parts[-1].text + value, weight)
            else:
                parts.append(Text(value, weight))
        return tuple(parts)


def parse_template(source: str) -> Template:
    """The template of a string. Raises ConfigError for unbalanced braces, an unknown kind or mark, or no column."""
    pieces: list[tuple[str | Column, float]] = []
    weight = 0.0 if "{loss=" in source else 1.0
    try:
        fields = list(string.Formatter().parse(source))
    except ValueError as e:
        raise ConfigError(f"template {source!r}: {e}; a brace itself is written {{{{ or }}}}") from e
    for literal, name, spec, conversion in fields:
        if literal:
            pieces.append((literal, weight))
        if name is None:
            continue
        if name.startswith("loss="):
            weight = _loss(name, source)
        elif conversion or not name or (spec and name not in ("image", "video")):
            raise ConfigError(
                f"template {source!r}: write {{column}}, {{image:column}}, {{video:column}} or {{loss=0}}, not "
                f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
            )
        else:
            pieces.append((Column(spec, name) if spec else Column(name), weight))
    template = Template(source, tuple(pieces))
    if not template.columns:
        raise ConfigError(f"template {source!r} names no column: write {{column}} where its value should stand")
    return template


def split_path(path: str, example: str) -> tuple[str, Template | None]:
    """`PATH?template=...` as the path and its template, None without one.

    Raises ConfigError for another option behind `?`; `example` shows in the message how to write it.
    """
    path, mark, rest = path.partition("?")
    if not mark:
        return path, None
    name, _, value = rest.partition("=")
    if name != "template":
        raise ConfigError(f"unknown option {name!r} behind `?` of {path!r}; there is only template: {example}")
    return path, parse_template(value)


def check_columns(template: Template, known: Sequence[str], where: str) -> None:
    """Raises ConfigError naming the first column of the template that is not among the known ones."""
    for column in template.columns:
        if column.name not in known:
            raise ConfigError(
                f"{where} has no column {column.name!r}{nearest(column.name, known)}; it has: {', '.join(known)}"
            )


def _loss(mark: str, source: str) -> float:
    try:
        weight = float(mark.removeprefix("loss="))
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"template {source!r}: {{{mark}}} needs a number that is not negative, such as {{loss=0}}")
    return weight

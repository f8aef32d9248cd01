"""Trees of settings, whatever their dataclasses: as ConfigDicts, their differences, and values set by path.

A path is `a.b.c` from the root of the tree. `set_paths` follows it through the declared types, so that a misspelt name
is an error with the nearest one; `read_text` reads what a command line says for a setting by its declared type.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

NEW_ENTRY = "kind"  # the setting that a new entry of a section with free names (data.sources) has to give
_TRUE, _FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")


class ConfigError(ValueError):
    """A setting is unknown or does not make sense; the message says which and what to write instead."""


def nearest(key: str, known: Any) -> str:
    """` (did you mean 'x'?)` with the known name that looks most like `key`; empty when nothing is known."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_setting(path: str, key: str, known: Any) -> str:
    """What is said of a name that is no setting of a section; a name that is none at all is quoted, on one line."""
    name = f"{path}.{key:.60}" if key.isidentifier() else f"{path}: {key[:60]!r}"
    return f"unknown setting {name}{nearest(key, known)}"


def thaw(config: Any) -> ml_collections.ConfigDict:
    """A dataclass as a mutable ConfigDict, for `get_config()` files and command-line overrides.

    Optional sections that are off (`None`) stay `None`; the dict is not type-locked for those keys.
    """
    out = ml_collections.ConfigDict()
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = thaw(value)
        elif isinstance(value, dict):
            out[f.name] = ml_collections.ConfigDict({k: thaw(v) for k, v in value.items()})
        elif value is None:
            out[f.name] = ml_collections.config_dict.placeholder(object)
        else:
            out[f.name] = value
    return out


def diff(config: Any, default: Any, path: str = "config") -> list[str]:
    """Lines `path = value (default ...)` for everything that differs; what a run prints at its start."""
    if type(config) is not type(default):
        return [f"{path} = {config!r} (default {default!r})"]
    if dataclasses.is_dataclass(config):
        lines = []
        for f in dataclasses.fields(config):
            lines += diff(getattr(config, f.name), getattr(default, f.name), f"{path}.{f.name}")
        return lines
    return [] if config == default else [f"{path} = {config!r} (default {default!r})"]


# ---------------------------------------------------------------------------------------------------------------- paths


def type_at(path: str, cls: type, root: str = "config") -> Any:
    """The declared type of the setting at `path` below the dataclass `cls`, without its `| None`.

    Raises ConfigError for a setting that does not exist, with the nearest name.
    """
    kind, here = cls, root
    for key in path.split("."):
        kind = _type_of(kind, key, here)
        here = f"{here}.{key}"
    return kind


def _type_of(kind: Any, key: str, here: str) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if key not in hints:
            raise ConfigError(unknown_setting(here, key, hints))
        is_union = typing.get_origin(hints[key]) in (typing.Union, types.UnionType)
        options = typing.get_args(hints[key]) if is_union else (hints[key],)
        return next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is dict:
        if not key:
            raise ConfigError(f"an entry of {here} needs a name: {here}.NAME")
        return typing.get_args(kind)[1]
    raise ConfigError(f"{here} is a value and has no setting {key[:60]!r}")


def set_paths(values: Any, changes: Iterable[tuple[str, Any]], cls: type, root: str = "config") -> None:
    """Sets each (path, value) in `values`, a nested dict or ConfigDict that `freeze` turns into `cls`; the last wins.

    A setting inside an optional section that is off turns the section on, the rest of it at its defaults. An entry of
    a section with free names (`data.sources`) is created if `changes` also give its `kind`, so that a misspelt name is
    an error and not another entry; None removes an entry. Values are not checked here, `freeze` does that.
    Raises ConfigError for a setting that does not exist, with the nearest name.
    """
    changes = list(changes)
    given = {path for path, _ in changes}
    for path, value in changes:
        *parents, last = path.split(".")
        kind, section, here = cls, values, root
        for key in parents:
            inner = _type_of(kind, key, here)
            if typing.get_origin(kind) is dict:
                _check_entry(section, key, here, f"{here}.{key}.{NEW_ENTRY}".removeprefix(f"{root}.") in given)
            kind, section, here = inner, _section(section, key, inner, here), f"{here}.{key}"
        _type_of(kind, last, here)
        if typing.get_origin(kind) is dict:
            _check_entry(
                section, last, here, hasattr(value, NEW_ENTRY) or (isinstance(value, Mapping) and NEW_ENTRY in value)
            )
            if value is None:
                del section[last]
                continue
        section[last] = value


def _section(values: Any, key: str, kind: Any, here: str) -> Any:
    """The mapping below `key`, made if the section is off or left to its defaults."""
    found = values.get(key)
    if not (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict):
        return found  # a value: the next key is refused by its type
    if found is None:
        values[key] = ml_collections.ConfigDict() if isinstance(values, ml_collections.ConfigDict) else {}
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        values[key] = thaw(found)
    elif not isinstance(found, (Mapping, ml_collections.ConfigDict)):
        raise ConfigError(f"{here}.{key} is a section of settings, not {found!r:.40}")
    return values[key]


def _check_entry(entries: Any, name: str, here: str, is_new: bool) -> None:
    if name not in entries and not is_new:
        raise ConfigError(
            f"{here} has no {name[:60]!r}{nearest(name, entries)}; to add it, set {here}.{name[:60]}.{NEW_ENTRY} too"
        )


# ----------------------------------------------------------------------------------------------------------------- text


def read_text(text: str, kind: Any, path: str) -> Any:
    """The value that a command line gives for a setting of this declared type; "None" is None.

    Raises ConfigError if it cannot be read so. Whether the value is allowed, `freeze` says.
    """
    if text == "None" or kind is str:
        return None if text == "None" else text
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        raise ConfigError(f"{path} is a section of settings: set {path}.NAME, or None to switch it off, not {shown}")
    if kind is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ConfigError(f"{path} takes true or false, not {shown}")
    if typing.get_origin(kind) is tuple:
        return _read_tuple(text, kind, path, shown)
    try:
        return int(text, 0) if kind is int else float(text)
    except ValueError as error:
        raise ConfigError(f"{path} takes {kind.__name__}, not {shown}") from error


def _read_tuple(text: str, kind: Any, path: str, shown: str) -> tuple:
    """`((64, 4), (256, 1))`; a single value without parentheses; names with commas between, without quotes."""
    is_names = typing.get_args(kind)[0] is str
    if is_names and not text.startswith(("(", "[", "'", '"')):
        return tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        with warnings.catch_warnings(action="ignore"):  # Python's own about odd literals
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        example = "'a,b'" if is_names else "'((64, 4), (256, 1))'"
        raise ConfigError(f"{path} takes a tuple such as {example}, not {shown}") from error
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)

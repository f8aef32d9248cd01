"""One way to give settings to a command: `--config=configs/demo.py --config.optimizer.peak_lr=1e-3`.

The file's `get_config()` returns a ConfigDict; `config_flags` puts the overrides on it; `settings()` freezes it into a
TrainConfig. Overrides are checked against the dataclasses first, so that a misspelt one names the nearest setting, and
what is optional can be switched off: `--config.model.vision=None`.

Use: `app.run(main, flags_parser=cli.parse)`, then `cli.settings()` inside `main`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from kimi_jax.config import ConfigError, TrainConfig, freeze, nearest

_PREFIX = "--config."


def parse(argv: Sequence[str]) -> list[str]:
    """Parses a command line with `--config` (a `flags_parser` of `absl.app.run`); returns what is left of it.

    Prints the reason and exits with status 2 for an unknown setting or a value that does not fit.
    """
    try:
        kept, off = split_overrides(argv)
        config_flags.DEFINE_config_file("config", None, "Settings: a file with get_config().", sys_argv=kept)
        rest = flags.FLAGS(kept)
        _switch_off(flags.FLAGS["config"].value, off)
        _quiet()
    except (ConfigError, flags.Error, ValueError, TypeError, SyntaxError, OverflowError, OSError) as error:
        sys.exit(f"error: {error}")
    return rest


def parse_plain(argv: Sequence[str]) -> list[str]:
    """The same for a command without `--config`."""
    rest = app.parse_flags_with_usage(list(argv))
    _quiet()
    return rest


def _quiet() -> None:
    """Logs warnings and errors only, unless the command line says otherwise: by default libraries tell their life."""
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(argv without the overrides that say None, which config_flags does not know; the paths of those).

    Raises ConfigError for an override of a setting that does not exist, with the nearest name.
    """
    kept, off = [], []
    for argument in argv:
        if not argument.startswith(_PREFIX):
            kept.append(argument)
            continue
        path, _, value = argument[len(_PREFIX) :].partition("=")
        _check_path(path)
        if value == "None":
            off.append(path)
        else:
            kept.append(argument)
    return kept, off


def _check_path(path: str) -> None:
    """Walks `a.b.c` through the dataclasses."""
    kind, here = TrainConfig, "config"
    for key in path.split("."):
        if typing.get_origin(kind) is dict:  # any key: the sections have names of the user's choice
            kind = typing.get_args(kind)[1]
        elif dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            if key not in hints:
                raise ConfigError(f"unknown setting {here}.{key}{nearest(key, hints)}")
            kind = hints[key]
            if isinstance(kind, types.UnionType):  # `Section | None`
                kind = typing.get_args(kind)[0]
        else:
            raise ConfigError(f"{here} is a value and has no setting {key!r}")
        here = f"{here}.{key}"


def _switch_off(values: ml_collections.ConfigDict, paths: list[str]) -> None:
    for path in paths:
        *parents, last = path.split(".")
        section = values
        for key in parents:
            section = section[key]
        with section.unlocked(), section.ignore_type():
            section[last] = None


def settings() -> TrainConfig:
    """The frozen settings of this command line. Exits with a message if there are none or they do not make sense."""
    values = flags.FLAGS["config"].value
    if values is None:
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        sys.exit(f"error: which settings? Give --config=FILE{f', one of {known}' if known else ''}")
    try:
        return freeze(values)
    except (ConfigError, OSError) as error:  # OSError: the file could not be read, which absl finds out only now
        sys.exit(f"error: {error}")


def enable_compilation_cache(shared: str | None = None) -> str:
    """Keeps compiled programs in `$KIMI_CACHE_DIR/xla` (default `~/.cache/kimi_jax/xla`), so that a second run starts
    in seconds. Respects a cache that is already configured. Returns the directory.

    shared: a folder that all hosts see, in which it is then unless the variable names another.
    """
    import jax  # here, because the data commands parse settings as well and never touch jax

    if not jax.config.jax_compilation_cache_dir:
        root = os.environ.get("KIMI_CACHE_DIR") or shared or os.path.join(os.path.expanduser("~"), ".cache", "kimi_jax")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return jax.config.jax_compilation_cache_dir

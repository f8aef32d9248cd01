"""One way to give settings to a command: `--config=configs/demo.py --config.optimizer.peak_lr=1e-3`.

The file's `get_config()` returns a ConfigDict; overrides are read by the declared type of their setting, put on it, and
`settings()` freezes it into a TrainConfig. Every setting can be given:

    --config.model.remat=true                                         or --config.model.remat, --noconfig.model.remat
    --config.data.vision_bins='((64, 4), (256, 1))'                   tuples as in Python
    --config.eval.tasks=wiki,digits                                   names with commas
    --config.lora.rank=8                                              turns the section `lora` on
    --config.model.vision=None                                        switches a section, or an optional value, off
    --config.data.sources.mine.kind=jsonl --config.data.sources.mine.path=mine.jsonl           adds a source
    --config.data.sources.mine=None                                   removes one

Use: `app.run(main, flags_parser=cli.parse)`, then `cli.settings()` inside `main`. Settings that do not work end a
command with one line and status 2 (`refuse`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from kimi_jax.config import TrainConfig, freeze
from kimi_jax.config_check import check_run
from kimi_jax.config_tree import ConfigError, read_text, set_paths, type_at

BAD_SETTINGS = 2  # exit status
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses a command line with `--config` (a `flags_parser` of `absl.app.run`); returns what is left of it.

    Prints the reason and exits with status 2 for an unknown setting or a value that does not fit.
    """
    try:
        kept, overrides = split_overrides(argv)
        config_flags.DEFINE_config_file("config", None, "Settings: a file with get_config().", sys_argv=kept)
        rest = flags.FLAGS(kept)
        values = flags.FLAGS["config"].value
        if values is not None and overrides:
            with values.unlocked(), values.ignore_type():
                set_paths(values, overrides, TrainConfig)
        _quiet()
    except (ConfigError, flags.Error, ValueError, TypeError, SyntaxError, OverflowError, OSError) as error:
        refuse(error)
    return rest


def refuse(error: Exception) -> NoReturn:
    """Prints one line and exits with status 2. What a settings file itself refuses is told without absl's words."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, ConfigError):
        cause = cause.__context__
    while cause and isinstance(cause.__context__, ConfigError):  # config_flags raises it again, with a traceback in it
        cause = cause.__context__
    print("error: " + " ".join(str(cause or error).split()), file=sys.stderr)
    sys.exit(BAD_SETTINGS)


def parse_plain(argv: Sequence[str]) -> list[str]:
    """The same for a command without `--config`."""
    rest = app.parse_flags_with_usage(list(argv))
    _quiet()
    return rest


def _quiet() -> None:
    """Logs warnings and errors only, unless the command line says otherwise: by default libraries tell their life."""
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """(argv without the overrides, those as pairs of path and value in their order).

    Raises ConfigError for an override of a setting that does not exist, with the nearest name, or a value that cannot
    be read as the type of its setting.
    """
    kept: list[str] = []
    overrides: list[tuple[str, Any]] = []
    rest = list(argv)
    while rest and rest[0] != "--":  # behind which absl looks for no flags
        argument = rest.pop(0)
        found = _OVERRIDE.fullmatch(argument)
        if not found:
            kept.append(argument)
            continue
        no, path, text = found.groups()
        kind = type_at(path, TrainConfig)
        if no and (kind is not bool or text is not None):
            raise ConfigError(f"{argument[:60]}: only a setting that is true or false has a --no, without a value")
        if text is None and kind is bool:
            text = "false" if no else "true"
        elif text is None:
            if not rest:
                raise ConfigError(f"config.{path} needs a value: --config.{path}=VALUE")
            text = rest.pop(0)
        overrides.append((path, read_text(text, kind, f"config.{path}")))
    return kept + rest, overrides


def settings() -> TrainConfig:
    """The frozen settings of this command line. Exits with a message if there are none or they do not make sense."""
    values = flags.FLAGS["config"].value
    try:
        if values is None:
            known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
            raise ConfigError(f"which settings? Give --config=FILE{f', one of {known}' if known else ''}")
        config = freeze(values)
        check_run(config)
    except (ConfigError, OSError) as error:  # OSError: the file could not be read, which absl finds out only now
        refuse(error)
    return config


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

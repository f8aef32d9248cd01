"""Where examples come from. A source is a random-access list of `Example`; `open_source` opens the one a config names.
Workers get a pickled copy and read it from several threads.

| kind | `path` | extra |
| --- | --- | --- |
| demo | name of a sub-set of the demo data | [demo] |
| jsonl | a JSON-lines file; media beside it | |
| array_record | the folder that `python -m kimi_jax.data build` wrote | |
| parquet | `FILES.parquet?template=...` | [parquet] |
| tfds | `NAME?template=...`, a dataset of TensorFlow Datasets in ArrayRecord format | [tfds] |
| chat | `FILE.jsonl` or `FILES.parquet` of conversations; media as with those kinds | [parquet] for parquet |
| seqio | `package.module:task` with an optional `?template=...` | [seqio] |

A reader is imported on first use, so that nothing here costs a run that does not read it. `{split}` in the path of a
file stands for `SourceConfig.split`.
"""

import importlib
from typing import NamedTuple

from kimi_jax.config import ConfigError, SourceConfig, nearest
from kimi_jax.data.example import Source


class _Kind(NamedTuple):
    module: str  # of kimi_jax.data.sources
    function: str  # (path, split) -> Source
    extra: str  # of setup.py, "" when the core has all it takes
    has_splits: bool  # False: `split` only fills `{split}` of the path
    takes_config: bool = False  # (path, SourceConfig) -> Source


__all__ = ["KINDS", "Source", "check_kind", "open_source"]

KINDS = {
    "demo": _Kind("demo", "open_demo", "demo", True),
    "jsonl": _Kind("jsonl", "open_jsonl", "", False),
    "array_record": _Kind("array_record", "open_array_record", "", False),
    "parquet": _Kind("parquet", "open_parquet", "parquet", False),
    "chat": _Kind("chat", "open_chat", "parquet", False, takes_config=True),
    "tfds": _Kind("tfds", "open_tfds", "tfds", True),
    "seqio": _Kind("seqio", "open_seqio", "seqio", True),
}


def open_source(config: SourceConfig) -> Source:
    """The source of a config.

    Raises ConfigError for an unknown kind, for a kind whose extra is not installed, for a split that the path cannot
    express, and for a path that holds no such data.
    """
    check_kind(config)
    kind = KINDS[config.kind]
    path = config.path
    if not kind.has_splits:
        path = _fill_split(config)
    try:
        module = importlib.import_module(f"{__name__}.{kind.module}")
        return getattr(module, kind.function)(path, config if kind.takes_config else config.split)
    except ModuleNotFoundError as e:
        if not kind.extra or (e.name or "").startswith("kimi_jax"):
            raise
        raise ConfigError(
            f"sources of kind {config.kind!r} need the package {e.name!r}: pip install 'kimi_jax[{kind.extra}]' "
            f"(in a clone: pip install -e '.[{kind.extra}]')"
        ) from e


def check_kind(config: SourceConfig, where: str = "") -> None:
    """Raises ConfigError with the nearest name for an unknown kind of source; the message begins with `where`."""
    if config.kind not in KINDS:
        raise ConfigError(
            f"{where}no kind of source is called {config.kind!r:.60}{nearest(config.kind, KINDS)}; there are: "
            f"{', '.join(KINDS)}"
        )


def _fill_split(config: SourceConfig) -> str:
    """The path with its `{split}` filled in; the template behind `?` is left alone."""
    path, mark, rest = config.path.partition("?")
    if "{split}" in path:
        return path.replace("{split}", config.split) + mark + rest
    if config.split != "train":
        # reading the training file under the name of another split would put training data into an evaluation
        raise ConfigError(
            f"a {config.kind} source has no split {config.split!r} of its own: write {{split}} where it stands in the "
            f"path {config.path!r}, or name the file of that split and leave `split` at 'train'"
        )
    return config.path

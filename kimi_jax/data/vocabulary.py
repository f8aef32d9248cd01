"""python -m kimi_jax.data tokenizer --config=configs/x.py: the vocabulary that a config needs, from its own texts.

Trains byte-level BPE on the texts of the config's sources and writes it to `config.data.tokenizer` (or --out), whole or
not at all. Every source gives the same number of bytes, taken at even steps over all of it, so that a large one
does not crowd out a small one. When the file is there already, nothing is done: delete it to train another. The same
sources and flags give the same file.
"""

import os
from collections.abc import Iterator

from absl import flags

from kimi_jax import cli
from kimi_jax.config import ConfigError, TrainConfig
from kimi_jax.data import BadRecord
from kimi_jax.data.example import Text
from kimi_jax.data.sources import Source, open_source
from kimi_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

parse = cli.parse
_SECTIONS = 64  # a source is read at this many even steps, round after round, until it has given its bytes


def define_flags() -> None:
    """The command's flags beside --config."""
    flags.DEFINE_string("out", "", "Where to write it; default: data.tokenizer of the config.")
    flags.DEFINE_integer("vocab_size", 0, "Tokens, special ones included; default: model.vocab_size of the config.")
    flags.DEFINE_integer("max_bytes", 20_000_000, "Bytes of text to train on, all sources together.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    config, f = cli.settings(), flags.FLAGS
    out = f.out or config.data.tokenizer
    try:
        size = f.vocab_size or config.model.vocab_size
        existed = out and os.path.exists(out)
        tokenizer = tokenizer_for(config, out, size, f.max_bytes)
    except (ConfigError, ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e
    note = ""
    if tokenizer.vocab_size != size:
        why = "delete it to train another" if existed else "the texts give no more"
        note = f"; {size:,} were asked for: {why}"
    print(f"{out}: {'there already' if existed else 'trained'}, {tokenizer.vocab_size:,} tokens{note}")


def tokenizer_for(config: TrainConfig, out: str, vocab_size: int, max_bytes: int = 20_000_000) -> Tokenizer:
    """The tokenizer at `out`, trained and written first when it is not there.

    Raises ConfigError without a path, sources or text, and ValueError for a file that is no tokenizer or a vocabulary
    that is too small.
    """
    if not out:
        raise ConfigError("where to? Set data.tokenizer in the config, or give --out=FILE.json")
    if os.path.exists(out):
        return load_tokenizer(out)
    if not config.data.sources:
        raise ConfigError("the config has no data.sources to learn a vocabulary from")
    share = max_bytes // len(config.data.sources)
    found = [text for name in sorted(config.data.sources) for text in _texts(config, name, share)]
    if not found:
        raise ConfigError(f"no text in the sources {', '.join(sorted(config.data.sources))}")
    return train_tokenizer(found, vocab_size, out)


def _texts(config: TrainConfig, name: str, max_bytes: int) -> Iterator[str]:
    source = open_source(config.data.sources[name])
    left = max_bytes
    for i in _spread(len(source)):
        for text in _texts_of(source, i):
            if left <= 0:
                return
            yield text
            left -= len(text.encode("utf-8", "replace"))


def _texts_of(source: Source, index: int) -> list[str]:
    """The texts of one example without special tokens, none of a bad one. Media are not decoded where the source can
    give the bare record."""
    try:
        parts = source.record(index).parts if hasattr(source, "record") else source[index].parts
    except BadRecord:
        return []
    return [p.text for p in parts if isinstance(p, Text) and p.text and not p.special]


def _spread(count: int) -> Iterator[int]:
    """0 .. count - 1, each once, so that any beginning of it is spread over the whole range."""
    step = -(-count // _SECTIONS)
    for start in range(step):
        yield from range(start, count, step)

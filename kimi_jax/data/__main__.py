"""python -m kimi_jax.data COMMAND: your data, before a run reads it.

  build       JSONL or parquet with media into sharded ArrayRecord files
  inspect     what a run will see: counts, fill rates, mixture, and sample packs as a figure
  tokenizer   trains the byte-level vocabulary that a config names on the texts of its sources

python -m kimi_jax.data COMMAND --help says what each takes.
"""

import difflib
import importlib
import sys

from absl import app, flags

COMMANDS = {"build": "build", "inspect": "inspect", "tokenizer": "vocabulary"}


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "-help", "help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(COMMANDS)}"
        sys.exit(f"error: no command {name!r}; {hint}")
    command = importlib.import_module(f"kimi_jax.data.{COMMANDS[name]}")
    command.define_flags()
    flags.adopt_module_key_flags(command)  # so that --help lists them
    sys.modules["__main__"].__doc__ = command.__doc__  # what --help prints
    app.run(command.main, [sys.argv[0], *sys.argv[2:]], flags_parser=getattr(command, "parse", _parse))


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()

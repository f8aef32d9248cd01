"""The released tokenizer here against plain tiktoken: characters a second, medians and their ratio, from one run.

Run:    python -m benchmarks.tokenizer --tokenizer=DIR        (DIR holds the released tiktoken.model)
Goal:   ratio of the times at most 1.10 for texts and files. A line of 30 characters takes 2 us, of which the call here
        is 0.2: the last row is about 1.1. With special tokens lines are three times as fast as in tiktoken, which is
        handed the 256 names only where a text holds a character that one begins with.

Both sides use one tiktoken encoding (same vocabulary, same pattern); what is measured is what stands around it here:
the cuts of long texts and the call itself. The two take turns, so that a busy machine slows both. The texts are this
repository's own sources: as one text as long as is not cut, file by file, and line by line (the cost of a call).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from absl import app, flags

from kimi_jax.data.kimi_tokenizer import WINDOW, KimiTokenizer
from kimi_jax.data.tokenizer import load_tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("tokenizer", None, "Folder of the released tiktoken.model, or the file.", required=True)
flags.DEFINE_integer("repeats", 15, "Runs of each side.", lower_bound=3)


def seconds(encode: Callable[[str], list[int]], texts: Sequence[str]) -> float:
    """Time of encoding all texts once."""
    start = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - start


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    tokenizer = load_tokenizer(FLAGS.tokenizer)
    if not isinstance(tokenizer, KimiTokenizer):
        raise app.UsageError(f"{FLAGS.tokenizer} is not a tiktoken.model")
    plain = tokenizer._encoding
    root = Path(__file__).resolve().parents[1]
    files = [p.read_text(encoding="utf-8") for p in sorted((root / "kimi_jax").rglob("*.py"))]
    lines = [line for file in files[:40] for line in file.splitlines() if line]
    sets = {"one long text": ["".join(files)[:WINDOW]], "files": files, "lines": lines}
    ways: dict[str, tuple[Callable[[str], list[int]], Callable[[str], list[int]]]] = {
        "specials": (tokenizer.encode, partial(plain.encode, allowed_special="all")),
        "text only": (partial(tokenizer.encode, allow_special_tokens=False), plain.encode_ordinary),
    }
    print(f"{'texts':14} {'mode':10} {'chars':>9} {'here Mchar/s':>13} {'tiktoken':>9} {'time ratio':>11}")
    for name, texts in sets.items():
        for mode, (ours, theirs) in ways.items():
            assert [ours(t) for t in texts] == [theirs(t) for t in texts]
            pairs = [(seconds(ours, texts), seconds(theirs, texts)) for _ in range(FLAGS.repeats)]
            here, there = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            size = sum(map(len, texts))
            print(f"{name:14} {mode:10} {size:9} {size / here / 1e6:13.2f} {size / there / 1e6:9.2f} {ratio:11.3f}")


if __name__ == "__main__":
    app.run(main)

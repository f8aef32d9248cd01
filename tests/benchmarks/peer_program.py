"""A peer for the tests: it prints, says what it was given, has one step that works and one that does not."""

import json
import sys

from benchmarks.peer import serve


def fail() -> None:
    """A step that ends the peer."""
    raise ValueError("the step failed")


print("a library says hello")
serve({"given": json.loads(sys.argv[1])}, {"works": lambda: print("and talks during a step"), "fails": fail})

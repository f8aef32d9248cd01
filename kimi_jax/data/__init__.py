"""From files to packed batches, in NumPy: sources, examples, released media rules, packing, mixture, workers.

Only the two errors live here, so that every module of the package can raise them without importing another one.
"""

from __future__ import annotations


class BadRecord(Exception):
    """One record cannot be used. The pipeline counts it by source and reason, remembers the first few and goes on.

    reason: a short slug: broken_image, broken_video, missing_file, absurd_size, placeholder_mismatch, too_long,
            bad_json, bad_messages, damaged_file, empty, refused (a URL that may not be opened).
    key:    which record (file name, line, identifier).
    detail: what exactly was wrong, for a person.
    """

    def __init__(self, reason: str, key: str, detail: str = ""):
        super().__init__(reason, key, detail)  # all three, so that the error survives pickling between processes
        self.reason, self.key, self.detail = reason, key, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.key}" + (f": {self.detail}" if self.detail else "")


class DataError(RuntimeError):
    """The data cannot feed the run: too many bad records, an unreachable ratio, a state of another stream."""

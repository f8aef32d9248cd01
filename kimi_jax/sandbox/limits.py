"""What one session of the sandbox may use. Every number has a range; docs/sandbox.md says who enforces which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kimi_jax.ranges import Range, problem

Seconds = Annotated[float, Range(above=0.0, high=86_400.0)]


class SandboxError(RuntimeError):
    """The sandbox cannot be started, or the walls that were asked for are missing; the message says what to do."""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a session.

    timeout_seconds: wall time of a call; then the cell is interrupted and its state survives.
    grace_seconds:   what a cell that ignores the interrupt gets on top, before the process is killed.
    start_seconds:   wall time of a start.
    cpu_seconds:     CPU time of the whole session, all threads together.
    memory_mb:       address space of the process (MiB).
    threads:         threads at once, the first one included.
    open_files:      descriptors.
    file_mb:         one file (MiB); scratch_mb, scratch_files: the scratch folder, which is memory (MiB, inodes).
    output_chars:    printed text, the traceback and the last value together, in characters.
    output_images, output_image_pixels: that come back from one call, and their pixels together.
    code_chars:      of one call.
    image_pixels:    of all images that one `put` hands in.
    """

    timeout_seconds: Seconds = 30.0
    grace_seconds: Seconds = 2.0
    start_seconds: Seconds = 60.0
    cpu_seconds: Annotated[int, Range(1, 86_400)] = 600
    memory_mb: Annotated[int, Range(256, 1_048_576)] = 2048
    threads: Annotated[int, Range(1, 1024)] = 32
    open_files: Annotated[int, Range(16, 1024)] = 64
    file_mb: Annotated[int, Range(1, 65_536)] = 64
    scratch_mb: Annotated[int, Range(1, 65_536)] = 128
    scratch_files: Annotated[int, Range(16, 1_000_000)] = 4096
    output_chars: Annotated[int, Range(100, 1_000_000)] = 20_000
    output_images: Annotated[int, Range(0, 64)] = 8
    output_image_pixels: Annotated[int, Range(0, 67_108_864)] = 4_194_304
    code_chars: Annotated[int, Range(1, 1_000_000)] = 65_536
    image_pixels: Annotated[int, Range(1, 268_435_456)] = 67_108_864

    def check(self) -> None:
        """Raises ValueError for a number out of its range."""
        if found := problem(self, "limits"):
            raise ValueError(found)

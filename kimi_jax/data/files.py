"""How large a media file may be, and what a data source calls the trouble of opening one."""

from __future__ import annotations

import errno

MAX_MEDIA_BYTES = 2 << 30  # of one encoded image or video


def bad_file_reason(error: OSError) -> str:
    """The reason of a BadRecord for an error of `kimi_jax.untrusted.open_regular`: absurd_size or missing_file."""
    return "absurd_size" if error.errno == errno.EFBIG else "missing_file"

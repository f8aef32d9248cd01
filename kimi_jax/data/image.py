"""Images by the released rule (reference.md section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image


@dataclass(frozen=True)
class Image:
    """One image of an example. `image`: a PIL image (may still be undecoded) or uint8 [H, W, 3]."""

    image: PIL.Image.Image | np.ndarray

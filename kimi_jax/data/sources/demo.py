"""The demo's sources: kind "demo", `path` names the sub-set (docs/data.md).

| path          | holds                                             | validation split           | licence of the data |
| ------------- | ------------------------------------------------- | -------------------------- | ------------------- |
| wiki          | Wikipedia leads: title and extract                | 5 % of the articles        | CC BY-SA            |
| factbook      | World Factbook sections, fact sheets, capitals    | 10 % of the countries      | public domain       |
| python        | this interpreter's standard library               | 6 % of the files           | PSF                 |
| arithmetic    | sums and differences up to 30                     | 20 % of the operand pairs  | generated           |
| easyvqa       | easy-VQA's scenes at many sizes, 2 or 3 questions | its own test set           | MIT                 |
| easyvqa_large | the same, drawn at the limit of 256 patches       | its own test set           | MIT                 |
| chat_vqa      | easy-VQA's scenes with questions, as conversations | its own test set          | MIT                 |
| chat_sums     | sums and differences up to 30, as conversations   | 20 % of the operand pairs  | generated           |
| digits        | scanned digits: naming, strings, larger           | 20 % of the digits         | BSD (UCI, CC BY)    |
| count         | discs in a rendered image, to be counted          | other images               | generated           |
| video         | a digit moving over four frames of real clips     | a clip; 20 % of the digits | BSD; CC BY          |
| video_mixed   | three such clips of 1 to 7 frames, other shapes   | as video                   | BSD; CC BY          |
| scenes        | rendered shapes and printed digits with captions  | other scenes               | generated           |
| scene_clips   | a rendered shape that moves, with a caption       | other clips                | generated           |
| long_documents | whole Factbook entries, whole library files      | as factbook and python     | public domain; PSF  |
| needle_text_T | a number said in a text of up to T tokens         | as wiki                    | CC BY-SA            |
| needle_video_T | a coloured frame in a video of up to T tokens    | a clip                     | BSD; CC BY          |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kimi_jax.config import ConfigError
from kimi_jax.data.sources import (
    demo_chat,
    demo_count,
    demo_image,
    demo_long,
    demo_scene,
    demo_text,
    demo_video,
)
from kimi_jax.data.sources.demo_base import check_split

OPENERS: dict[str, Callable[[str], Any]] = {
    "wiki": demo_text.Wiki,
    "factbook": demo_text.Factbook,
    "python": demo_text.Python,
    "arithmetic": demo_text.Arithmetic,
    "easyvqa": demo_image.EasyVQA,
    "easyvqa_large": functools.partial(demo_image.EasyVQA, large=True),
    "digits": demo_image.Digits,
    "count": demo_count.Counting,
    "chat_vqa": demo_chat.VQAChat,
    "chat_sums": demo_chat.SumsChat,
    "video": demo_video.MovingDigit,
    "video_mixed": functools.partial(demo_video.MovingDigit, mixed=True),
    "scenes": demo_scene.Scenes,
    "scene_clips": demo_scene.SceneClips,
    "long_documents": demo_long.LongDocuments,
    **{f"needle_text_{n}": functools.partial(demo_long.NeedleText, tokens=n) for n in demo_long.TOKENS},
    **{f"needle_video_{n}": functools.partial(demo_long.NeedleVideo, tokens=n) for n in demo_long.TOKENS},
}


def open_demo(path: str, split: str) -> Any:
    """The source named `path` for `split` ("train" or "validation"): `len(source)`, `source[i] -> Example`, picklable.

    Those with images also have `record(i)`: the same example without its images, which take time to draw.

    Raises ConfigError for an unknown name or split, MissingDemoPackage when its package is not installed.
    """
    if path not in OPENERS:
        raise ConfigError(f"no demo source is called {path!r}; there are: {', '.join(OPENERS)}")
    source = OPENERS[path](check_split(split))
    len(source)  # a missing package must show here, not in a worker
    return source

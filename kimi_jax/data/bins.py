"""Whether the vision bins of a pack hold the vision ratio of the run: by patch count, and for the run's own images.

Source: docs/architecture.md section 3.

P_k, v_k   patches of a bin of class k, bins of that class in a pack
r          vision share of tokens asked for

Bins that are short do not fail: images pile up in the packing buffer and the share of vision tokens falls for the
whole run. So a run is refused before its first pack. `check_bins` needs no data and counts still images, four patches a
token. It cannot see that two images of 2,600 patches do not share a bin of 4,096; `check_sizes` packs examples of the
run's own sources, and names bins that would do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kimi_jax.config import ConfigError, DataConfig, ModelConfig
from kimi_jax.data.example import Encoded, place_items
from kimi_jax.data.mixture import Mixture, ratio_at

BIN_SLACK = 1.1  # patches that bins must hold over those asked for
SAMPLE = 16  # examples of a source by whose sizes bins are judged
PACKS, WARM_UP = 48, 16  # packs that are filled with them, and those of them that fill the packing buffer
MOST_TRIES = 64  # larger bins that are tried to name some that would do
TOLERANCE = 0.95  # of the ratio, for the chance of a sample


def check_bins(data: DataConfig, model: ModelConfig) -> None:
    """Raises ConfigError if the bins of a pack cannot hold the largest vision ratio of the run.

    Counts still images, four patches a token, with BIN_SLACK for places that no image fits; a video chunk of four
    frames takes up to four times as many. Needs no data. Without a text-only source nothing is mixed, nor checked.
    """
    if not model.vision or not _mixed(data):
        return
    ratio = max((ratio for _, ratio in data.vision_ratio), default=0.0)
    tokens = data.rows_per_pack * data.sequence_length
    held = sum(patches * count for patches, count in data.vision_bins)
    needed = math.ceil(4 * ratio * tokens * BIN_SLACK)
    if held < needed:
        raise ConfigError(
            f"data.vision_bins = {data.vision_bins} hold {held:,} patches a pack, but data.vision_ratio = {ratio:g} of "
            f"{tokens:,} tokens needs {needed:,} (4 a token, and {BIN_SLACK - 1:.0%} for places that stay empty): "
            f"raise the bins to at least {needed:,} patches, or ask for at most {held / (4 * tokens * BIN_SLACK):.3f}"
        )


def check_sizes(data: DataConfig, sample: Mapping[str, Sequence[Encoded]]) -> None:
    """Raises ConfigError if examples of these sizes leave the bins with less than the vision ratio, at any time of the
    run, and larger bins would hold it; it names the share that these hold and bins that would do.

    sample: some examples of each source with media, by its name. Sources without any are left out of the judgement.
    Where no bins would do, the examples hold too much text; that is judged as they are drawn (kimi_jax.data.mixture).
    """
    if not _mixed(data) or not any(sample.values()):
        return
    begins = {0.0, *(begin for begin, _ in data.vision_ratio)}
    begins |= {begin for source in data.sources.values() for begin, _ in source.weight_schedule}
    for fraction in sorted(begins):
        ratio = ratio_at(data.vision_ratio, fraction)
        held = share_held(data, sample, fraction)
        enough = _bins_enough(data, sample, fraction, ratio) if held < TOLERANCE * ratio else None
        if enough:
            raise ConfigError(
                f"data.vision_bins = {data.vision_bins} hold a vision share of {held:.3f} of the tokens with the "
                f"images of data.sources, data.vision_ratio asks for {ratio:g} at {fraction:.0%} of training "
                f"(packed {SAMPLE} examples of each source): set data.vision_bins to {enough}, or ask for at most "
                f"{held:.3f}"
            )


def share_held(data: DataConfig, sample: Mapping[str, Sequence[Encoded]], fraction: float) -> float:
    """Vision tokens over all tokens of a pack when examples with media are waiting at all times: what the bins hold.

    Packs whole examples of the sample, in the order in which the mixture would draw them at this fraction of training.
    """
    vision = {name: replace(data.sources[name], min_per_pack=0) for name, examples in sample.items() if examples}
    mixture = Mixture(vision, ((0.0, 1.0),))
    cycles = {name: itertools.cycle(sample[name]) for name in vision}
    waiting: list[Encoded] = []
    delivered = 0
    tokens = data.rows_per_pack * data.sequence_length
    for pack in range(PACKS):
        free = [[patches] * count for patches, count in data.vision_bins]
        room, left = tokens, []
        while len(waiting) < data.buffer_size:
            name = mixture.choose(fraction)
            mixture.record_draw(name, 1, 1, 1.0, fraction)
            waiting.append(next(cycles[name]))
        for example in waiting:
            places = place_items([len(item.patches) for item in example.media], free)
            if places is None or len(example.tokens) > room:
                left.append(example)
                continue
            for item, (k, b) in zip(example.media, places, strict=True):
                free[k][b] -= len(item.patches)
            room -= len(example.tokens)
            if pack >= WARM_UP:
                delivered += sum(item.grid[1] * item.grid[2] // 4 for item in example.media)
        waiting = left
    return delivered / (tokens * (PACKS - WARM_UP))


def _mixed(data: DataConfig) -> bool:
    return len({source.vision for source in data.sources.values()}) == 2


def _bins_enough(
    data: DataConfig, sample: Mapping[str, Sequence[Encoded]], fraction: float, ratio: float
) -> tuple[tuple[int, int], ...] | None:
    """The bins with more of the largest class, as few as hold the ratio; None if none of those tried does."""
    *smaller, (patches, count) = data.vision_bins
    for more in range(1, MOST_TRIES + 1):
        bins = (*smaller, (patches, count + more))
        if share_held(replace(data, vision_bins=bins), sample, fraction) >= ratio:
            return bins
    return None

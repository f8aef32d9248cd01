"""Which source the next example comes from: a vision share of *tokens* over time, and weights inside each modality.

v_i  media tokens of draw i;  n_i  tokens of draw i;  r  vision share asked for when an example is counted
e = sum over vision examples drawn of (v_i - r n_i)  -  sum over text examples delivered of r n_i
ahead  text tokens that wait for the pack that is filled next, a pack's worth at most

Vision examples count when they are drawn, text examples when they are delivered in a pack. So text that waits (for a
row with room, or because it was drawn to keep rows full) asks for no vision tokens, and the share of the tokens that
reach the model is the one asked for. An example with media is drawn while e < r * ahead, a text-only one otherwise.
Inside a modality a source gets its weight of the *drawn examples* (tokens would favour sources of short ones), by a
deficit: every draw owes each source its share of it, the source drawn has had a whole one. No random numbers: the order
follows from the counters alone, which are the whole state. Schedules change r and the shares from then on, and leave e
and what is due as they are. Draws that `min_per_pack` forces (kimi_jax.data.shard) are counted like all others, and
made up for afterwards: by so many examples may e be off besides.

When the bins cannot hold the share that is asked for, images pile up in the packing buffer. Then text is drawn
although e < 0 (`text_only`, decided in kimi_jax.data.shard), so that rows stay full and the share delivered falls. What
e then lacks is kept only up to `max_deficit` tokens: a shortage of long ago is not made up for when the ratio changes.
Bins that are short for the sizes of the run's own images are refused before the first pack (kimi_jax.data.bins).

An example with media holds text too. If the vision examples together hold less than r of media tokens, no mixture
reaches r; that raises DataError instead of drifting: when a run of vision examples has lost ground by far more than
their scatter explains, or has gained none for very long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kimi_jax.config import SourceConfig
from kimi_jax.data import DataError

PATIENCE = 64  # vision examples in a row, at least, before a loss of ground is judged
SCATTER = 6.0  # standard deviations of such a loss that are still taken for chance
LONGEST = 64  # times the patience: a run of that length must have gained ground


def ratio_at(schedule: Sequence[tuple[float, float]], fraction: float) -> float:
    """The vision share of tokens asked for at this fraction of training: the last entry that has begun."""
    return _last_begun(schedule, fraction, 0.0)


def weight_at(source: SourceConfig, fraction: float) -> float:
    """The weight of a source at this fraction of training."""
    return _last_begun(source.weight_schedule, fraction, source.weight)


def _last_begun(schedule: Sequence[tuple[float, float]], fraction: float, current: float) -> float:
    for begin, value in schedule:
        if begin <= fraction:
            current = value
    return current


class Mixture:
    """Chooses sources. `choose` names the next one, `record_draw` tells what came of it, `delivered` that a pack holds
    it.

    `state` is JSON-able.

    With sources of one modality only there is nothing to mix: text-only sources need a ratio of 0 throughout, and
    sources with media alone are read whatever the ratio. max_deficit: tokens of media below the share asked for that
    text-only draws may add up to. Raises DataError for settings that cannot work.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        schedule: Sequence[tuple[float, float]],
        max_deficit: float = math.inf,
    ):
        if not sources:
            raise DataError("data.sources is empty")
        for name, source in sources.items():
            _check_weights(name, source)
        if list(schedule) != sorted(schedule) or any(not 0 <= r <= 1 or not 0 <= f <= 1 for f, r in schedule):
            raise DataError(f"data.vision_ratio = {schedule}: pairs (share of training, ratio) in [0, 1], ascending")
        self._sources = {
            vision: {name: s for name, s in sources.items() if s.vision == vision} for vision in (False, True)
        }
        if not self._sources[True] and any(r > 0 for _, r in schedule):
            raise DataError(
                "data.vision_ratio asks for media, but no source has vision=True, so the share is 0; "
                "add one, or set data.vision_ratio=((0.0, 0.0),)"
            )
        for fraction in {0.0, *(begin for s in sources.values() for begin, _ in s.weight_schedule)}:
            for vision in (vision for vision, some in self._sources.items() if some):
                self._shares(vision, fraction)  # raises now what would end the run then
        vision_weights = [s.weight for s in self._sources[True].values()]
        # long enough to meet every source with media twice, so that a rare one with large images is not missed
        self._patience = max(PATIENCE, *(2 * sum(vision_weights) / w for w in vision_weights), 0)
        self._deficit = dict.fromkeys(sources, 0.0)  # draws that are its share of those made, less its own
        self._max_deficit = max_deficit
        self._excess = 0.0  # e
        self._streak = 0  # vision examples since the last text-only one
        self._streak_sums = [0.0, 0.0, 0.0, 0.0]  # over them: media tokens, tokens, changes of e, and their squares

    @property
    def excess(self) -> float:
        """e: media tokens above the share asked for (below, if negative) of what counts so far."""
        return self._excess

    def choose(self, fraction: float = 0.0, ahead: float = 0.0, text_only: bool = False) -> str:
        """Name of the source to draw from next, at this fraction of training; `text_only` overrides the share.

        ahead: media tokens, r * ahead, that the text which waits for the next pack will ask for.
        """
        vision = self._excess < ahead and not text_only
        return self.choose_within(vision if self._sources[vision] else not vision, fraction)

    def choose_within(self, vision: bool, fraction: float = 0.0) -> str:
        """Name of the source of one modality to draw from next."""
        shares = self._shares(vision, fraction)
        return max(shares, key=lambda name: shares[name] + self._deficit[name])

    def _shares(self, vision: bool, fraction: float) -> dict[str, float]:
        """Share of the draws of this modality that each of its sources gets at this fraction of training."""
        weights = {name: weight_at(s, fraction) for name, s in self._sources[vision].items()}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not weights:
            kind = "with" if vision else "without"
            raise DataError(f"every source {kind} media has weight 0 at {fraction:.0%} of training; leave one above 0")
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def record_draw(self, source: str, tokens: int, media_tokens: int, ratio: float, fraction: float = 0.0) -> None:
        """Counts a draw: its tokens, those of them that are media, the ratio at the time. A bad record has 0 tokens.

        Raises DataError when the ratio is out of reach, naming the share that is not.
        """
        for name, share in self._shares(source in self._sources[True], fraction).items():
            self._deficit[name] += share
        self._deficit[source] -= 1
        if not self._sources[False]:
            return  # nothing to mix with
        if source in self._sources[False]:
            self._streak = 0
        elif tokens:
            if self._streak == 0:
                self._streak_sums = [0.0, 0.0, 0.0, 0.0]
            self._streak += 1
            change = media_tokens - ratio * tokens
            drawn = (media_tokens, tokens, change, change**2)
            self._streak_sums = [a + b for a, b in zip(self._streak_sums, drawn, strict=True)]
        if source in self._sources[True]:
            self._excess += media_tokens - ratio * tokens
        if self._unreachable():
            share = self._streak_sums[0] / self._streak_sums[1]
            raise DataError(
                f"data.vision_ratio = {ratio:g} cannot be reached: media are only {share:.1%} of the tokens of the "
                f"examples that have any (last {self._streak} of them); ask for at most {share:.3f}, or use larger or "
                "more images an example"
            )

    def delivered(self, source: str, tokens: int, ratio: float) -> None:
        """Counts an example that a pack now holds: its tokens, and the ratio at the time."""
        if source in self._sources[False] and self._sources[True]:
            self._excess = max(self._excess - ratio * tokens, -self._max_deficit)

    def _unreachable(self) -> bool:
        lost = -self._streak_sums[2]
        beyond_chance = self._streak >= self._patience and lost > SCATTER * math.sqrt(self._streak_sums[3])
        return beyond_chance or (self._streak >= LONGEST * self._patience and lost > 0)

    def state(self) -> dict:
        """All counters, JSON-able."""
        return {
            "deficit": dict(self._deficit),
            "excess": self._excess,
            "streak": [self._streak, *self._streak_sums],
        }

    def restore(self, state: dict) -> None:
        """Continues from `state()`."""
        self._deficit = dict(state["deficit"])
        self._excess = state["excess"]
        self._streak, *self._streak_sums = state["streak"]


def _check_weights(name: str, source: SourceConfig) -> None:
    """Raises DataError for weights or a schedule of them that make no sense."""
    if not 0 < source.weight < math.inf:
        raise DataError(f"data.sources.{name}.weight is {source.weight}; a weight is above 0")
    schedule = list(source.weight_schedule)
    if schedule != sorted(schedule) or any(not 0 <= f <= 1 or not 0 <= w < math.inf for f, w in schedule):
        raise DataError(
            f"data.sources.{name}.weight_schedule = {source.weight_schedule}: pairs (share of training in [0, 1], "
            "weight of 0 or more), ascending"
        )

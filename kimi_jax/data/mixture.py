"""Which source the next example comes from: a vision share of *tokens* over time, and weights inside each modality.

v   media tokens drawn so far;  n_i  tokens of draw i;  r_i  vision share asked for at draw i
e = v - sum_i r_i * n_i   what has been drawn above (below, if negative) the share asked for

An example with media is drawn while e < 0, a text-only one otherwise. So |e| stays within one example, unless examples
come up that have media and yet less than r of them; then more of those with media follow until it does. Inside a
modality a source gets its weight of the *drawn examples* (tokens would favour sources of short ones), by the same kind
of deficit. No random numbers: the order follows from the counters alone, which are the whole state. A schedule changes
r_i and leaves e as it is.

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
    current = 0.0
    for begin, ratio in schedule:
        if begin <= fraction:
            current = ratio
    return current


class Mixture:
    """Chooses sources. `choose` names the next one, `drew` tells what came of it; `state` is JSON-able.

    With sources of one modality only there is nothing to mix: text-only sources need a ratio of 0 throughout, and
    sources with media alone are read whatever the ratio. Raises DataError for settings that cannot work.
    """

    def __init__(self, sources: Mapping[str, SourceConfig], schedule: Sequence[tuple[float, float]]):
        if not sources:
            raise DataError("data.sources is empty")
        bad = [name for name, s in sources.items() if not 0 < s.weight < float("inf")]
        if bad:
            raise DataError(f"data.sources.{bad[0]}.weight is {sources[bad[0]].weight}; a weight is above 0")
        if list(schedule) != sorted(schedule) or any(not 0 <= r <= 1 or not 0 <= f <= 1 for f, r in schedule):
            raise DataError(f"data.vision_ratio = {schedule}: pairs (share of training, ratio) in [0, 1], ascending")
        self._weights = {
            vision: {name: s.weight for name, s in sources.items() if s.vision == vision} for vision in (False, True)
        }
        if not self._weights[True] and any(r > 0 for _, r in schedule):
            raise DataError(
                "data.vision_ratio asks for media, but no source has vision=True, so the share is 0; "
                "add one, or set data.vision_ratio=((0.0, 0.0),)"
            )
        vision_weights = self._weights[True].values()
        # long enough to meet every source with media twice, so that a rare one with large pictures is not missed
        self._patience = max(PATIENCE, *(2 * sum(vision_weights) / w for w in vision_weights), 0)
        self._draws = dict.fromkeys(sources, 0)
        self._excess = 0.0  # e
        self._streak = 0  # vision examples since the last text-only one
        self._streak_excess = 0.0  # e at the first of them
        self._streak_sums = [0.0, 0.0, 0.0]  # of media tokens, tokens, and squared changes of e

    @property
    def excess(self) -> float:
        """e: media tokens above the share asked for."""
        return self._excess

    def choose(self) -> str:
        """Name of the source to draw from next."""
        vision = self._excess < 0
        weights = self._weights[vision] or self._weights[not vision]
        total, drawn = sum(weights.values()), sum(self._draws[name] for name in weights) + 1
        return max(weights, key=lambda name: weights[name] / total * drawn - self._draws[name])

    def drew(self, source: str, tokens: int, media_tokens: int, ratio: float) -> None:
        """Counts a draw: its tokens, those of them that are media, the ratio at the time. A bad record has 0 tokens.

        Raises DataError when the ratio is out of reach, naming the share that is not.
        """
        self._draws[source] += 1
        if not self._weights[False]:
            return  # nothing to mix with
        if source in self._weights[False]:
            self._streak = 0
        elif tokens:
            if self._streak == 0:
                self._streak_excess, self._streak_sums = self._excess, [0.0, 0.0, 0.0]
            self._streak += 1
            change = media_tokens - ratio * tokens
            self._streak_sums = [
                a + b for a, b in zip(self._streak_sums, (media_tokens, tokens, change**2), strict=True)
            ]
        self._excess += media_tokens - ratio * tokens
        if self._hopeless():
            share = self._streak_sums[0] / self._streak_sums[1]
            raise DataError(
                f"data.vision_ratio = {ratio:g} cannot be reached: media are only {share:.1%} of the tokens of the "
                f"examples that have any (last {self._streak} of them); ask for at most {share:.3f}, or use larger or "
                "more pictures an example"
            )

    def _hopeless(self) -> bool:
        lost = self._streak_excess - self._excess
        beyond_chance = self._streak >= self._patience and lost > SCATTER * math.sqrt(self._streak_sums[2])
        return beyond_chance or (self._streak >= LONGEST * self._patience and lost > 0)

    def state(self) -> dict:
        """All counters, JSON-able."""
        return {
            "draws": dict(self._draws),
            "excess": self._excess,
            "streak": [self._streak, self._streak_excess, *self._streak_sums],
        }

    def restore(self, state: dict) -> None:
        """Continues from `state()`."""
        self._draws = dict(state["draws"])
        self._excess = state["excess"]
        self._streak, self._streak_excess, *sums = state["streak"]
        self._streak_sums = list(sums)

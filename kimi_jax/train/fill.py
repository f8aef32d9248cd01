"""Token fill and vision ratio of the last log interval, and a warning when one of them falls.

`BatchStream.report()` counts since the start of the run, where a shortage that begins late is invisible for long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kimi_jax.config import DataConfig
from kimi_jax.data.mixture import ratio_at

LOWEST_FILL = 0.95  # of token rows; the configs reach 0.97
LOWEST_SHARE = 0.9  # of the vision ratio asked for


class FillWatch:
    """Compares successive reports of the stream. Called with each of them, once a log interval.

    state: of `state()`, so that a run that was stopped logs what it would have logged.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self._before: dict[str, float] | None = state["before"] if state else None
        self._warned: set[str] = set(state["warned"]) if state else set()

    def state(self) -> dict[str, Any]:
        """What the next interval is compared with, as JSON."""
        return {"before": self._before, "warned": sorted(self._warned)}

    def __call__(self, report: dict[str, Any], data: DataConfig, steps: int, console: Callable[[str], None]) -> None:
        """Adds `interval_token_fill` and `interval_ratio` to the report; logs one warning each time one falls.

        The first report of a run has no predecessor and adds nothing. steps: of the whole run.
        """
        if not {"batches", "tokens", "vision_tokens"} <= set(report):
            return
        now = {name: report[name] for name in ("batches", "tokens", "vision_tokens")}
        # tokens the rows of this interval could hold follow from the fill of the whole run
        now["held"] = report["tokens"] / report["token_fill"] if report["token_fill"] else 0.0
        before, self._before = self._before, now
        if before is None or now["tokens"] <= before["tokens"]:
            return
        tokens = now["tokens"] - before["tokens"]
        fill = tokens / (now["held"] - before["held"])
        ratio = (now["vision_tokens"] - before["vision_tokens"]) / tokens
        report |= {"interval_token_fill": fill, "interval_ratio": ratio}
        mixed = len({source.vision for source in data.sources.values()}) == 2
        asked = ratio_at(data.vision_ratio, before["batches"] / max(1, steps)) if mixed else 0.0
        self._warn("token fill", fill, LOWEST_FILL, report["batches"], console)
        self._warn("vision ratio", ratio, LOWEST_SHARE * asked, report["batches"], console)

    def _warn(self, what: str, value: float, least: float, step: int, console: Callable[[str], None]) -> None:
        if value >= least:
            self._warned.discard(what)
        elif what not in self._warned:
            self._warned.add(what)
            console(
                f"WARNING: step {step}: the {what} of the last log interval is {value:.1%}, below {least:.1%}; "
                "data.vision_bins may be too small for data.vision_ratio, or data.buffer_size too short"
            )

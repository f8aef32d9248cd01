"""The settings of one source of examples, a part of `kimi_jax.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kimi_jax.ranges import Natural, NonNegative, OneOf, Share


@dataclass(frozen=True)
class ChatConfig:
    """How a source of kind "chat" is read (kimi_jax.data.sources.chat)."""

    # the loss is on what the assistant wrote in all of its turns, or in the last one of each conversation
    train_on: Annotated[str, OneOf(("all", "last"))] = "all"
    # a conversation longer than a row loses whole turns (the last ones; with train_on="last" the first ones), or is
    # refused and counted as too_long
    too_long: Annotated[str, OneOf(("shorten", "refuse"))] = "shorten"
    thinking: bool | None = None  # None: where a conversation says so itself, or else where it holds any reasoning
    preserve_thinking: bool = False  # earlier answers keep their reasoning; a conversation may say otherwise


@dataclass(frozen=True)
class SourceConfig:
    """One source of examples. `kind` names a reader of `kimi_jax.data.sources`; `path` is what that reader opens."""

    kind: str = "demo"
    path: str = ""
    split: str = "train"
    weight: NonNegative = 1.0  # share of the drawn examples within its modality (text-only or with media)
    weight_schedule: tuple[tuple[Share, NonNegative], ...] = ()  # (from this share of training, weight instead)
    min_per_pack: Natural = 0  # every pack holds so many of its examples or more, as far as they fit
    vision: bool = False  # True: its examples carry images or video
    chat: ChatConfig | None = None  # of kind "chat" only; None: the defaults

    def conflict(self) -> str:
        """What does not go together; empty if all does."""
        return "" if self.chat is None or self.kind == "chat" else f"chat is for kind 'chat', and kind is {self.kind!r}"

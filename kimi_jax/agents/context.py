"""What of its history an agent sends to the model: the policies of the Kimi K2.5 report (arXiv 2602.02276, section 6).

    sharding           everything: every subagent has a context of its own, and only its answer reaches its parent
    hide_tool_results  contents of tool messages but those of the last round are left out; all reasoning stays
    discard_all        past the threshold, everything but the system prompt and the task is dropped
    summary            past the threshold, the model summarises its work so far, which replaces it (costs a step)

Calls and their results stay together in each of them, as endpoints demand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kimi_jax.agents.model import Message

Policy = Literal["sharding", "hide_tool_results", "discard_all", "summary"]
POLICIES: tuple[Policy, ...] = ("sharding", "hide_tool_results", "discard_all", "summary")
HIDDEN = "[an earlier result, left out to save context; call the tool again if it is needed]"
DISCARDED = "Your earlier work on this task was dropped to save context. Go on from the task itself."
SUMMARISE = (
    "Your context is nearly full. Summarise what you have found and what is left to do; nothing else will be kept."
)
SUMMARISED = "Your earlier work was replaced by your summary of it:\n\n"


@dataclass(frozen=True)
class ContextConfig:
    """policy; threshold: tokens of the last request and its answer from which discard_all and summary act."""

    policy: Policy = "sharding"
    threshold: int = 100_000

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"the context policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")


def shown(messages: Sequence[Message], config: ContextConfig) -> list[Message]:
    """The messages that are sent. They begin with the system prompt and the task."""
    if config.policy != "hide_tool_results":
        return list(messages)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return [
        {**message, "content": HIDDEN} if message["role"] == "tool" and i < last else message
        for i, message in enumerate(messages)
    ]


def is_full(num_tokens: int, config: ContextConfig) -> bool:
    """Whether the history has to be replaced before the next request."""
    return config.policy in ("discard_all", "summary") and num_tokens >= config.threshold


def restarted(messages: Sequence[Message], summary: str | None) -> list[Message]:
    """The history after it was dropped, or replaced by its summary."""
    text = DISCARDED if summary is None else SUMMARISED + summary
    return [*messages[:2], {"role": "user", "content": text}]

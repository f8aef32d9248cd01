"""An engine that says what a rule makes it say: what `infer.engine.Engine` is to the scorer of evaluations."""

from __future__ import annotations

from collections.abc import Callable

from kimi_jax.infer.request import Request, TokenEvent


class ScriptedEngine:
    """rule(request, tokens so far) -> the next token. Every request that has not ended gets one in a step."""

    def __init__(self, rule: Callable[[Request, list[int]], int]):
        self.rule = rule
        self.running: dict[int, tuple[Request, list[int]]] = {}
        self.submitted = 0

    @property
    def idle(self) -> bool:
        return not self.running

    def submit(self, request: Request) -> int:
        self.submitted += 1
        self.running[self.submitted] = request, []
        return self.submitted

    def cancel(self, number: int) -> None:
        self.running.pop(number, None)

    def step(self) -> list[TokenEvent]:
        events = []
        for number, (request, made) in list(self.running.items()):
            made.append(self.rule(request, made))
            wanted = request.sampling
            stopped = made[-1] in wanted.stop_ids
            reason = "stop" if stopped else "length" if len(made) >= wanted.max_new_tokens else None
            events.append(TokenEvent(number, made[-1], 0.0, (), reason))
            if reason:
                del self.running[number]
        return events

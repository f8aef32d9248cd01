"""What a swarm may spend, enforced before a step and inherited by children.

A `Ledger` belongs to an agent, or to the group of children that one step spawned; its parent is the ledger that it
inherits from. A step reserves the most that it can cost in the whole chain, and settles for what it did cost, so the
total over the tree never passes a limit (tokens and money: as long as the endpoint bills no more than was asked for).
The agent that spawns a group keeps back a step and a tenth of the rest, so that it can still answer.

Critical steps (Kimi K2.5 report, arXiv 2602.02276, section 6: main agent's steps plus, for each stage, those of the
longest child) are not shared: every child of a group may use all that is left, and the group costs its longest child.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from kimi_jax.agents.events import Usage

KEPT_BACK = 0.1  # share of tokens, money and time that a group may not touch


class BudgetExceeded(Exception):
    """A step was refused; `kind` is the limit that it would pass, a field of `Budget`."""

    def __init__(self, kind: str):
        super().__init__(f"the budget of {kind.replace('_', ' ')} is used up")
        self.kind = kind


@dataclass(frozen=True)
class Budget:
    """Limits of a whole swarm. cost in US dollars, seconds of real time; infinite unless given."""

    critical_steps: float = math.inf
    steps: float = math.inf
    tokens: float = math.inf
    cost: float = math.inf
    seconds: float = math.inf

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                raise ValueError(f"a budget of {field.name} must be at least 0, not {value}")


def parse_budget(text: str) -> Budget:
    """`critical_steps=40,tokens=1e6,cost=2.5` as a Budget. Raises ValueError that names the part."""
    known = {field.name for field in fields(Budget)}
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in known or name in values:
            raise ValueError(
                f"{part!r} is no limit; give each of {', '.join(sorted(known))} at most once, as name=number"
            )
        try:
            values[name] = float(value)
        except ValueError:
            raise ValueError(f"{part!r}: the limit must be a number") from None
    return Budget(**values)


class Ledger:
    """What was spent under one budget, reservations included. `clock` gives seconds; `deadline` is on that clock."""

    def __init__(self, budget: Budget, clock: Callable[[], float], parent: "Ledger | None" = None):
        self.budget, self.parent, self._clock = budget, parent, clock
        self.deadline = clock() + budget.seconds
        self.steps, self.tokens, self.cost = 0, 0, 0.0
        self._chain: tuple[Ledger, ...] = (self, *(parent._chain if parent else ()))
        self.critical_steps = 0  # of this agent and, for each stage, of its longest child; not those of a group
        if parent:
            self.deadline = min(self.deadline, parent.deadline)

    def left(self, name: str) -> float:
        """What is left of `steps`, `tokens` or `cost` in the whole chain."""
        return min(getattr(ledger.budget, name) - getattr(ledger, name) for ledger in self._chain)

    @property
    def critical_left(self) -> float:
        return self.budget.critical_steps - self.critical_steps

    @property
    def seconds_left(self) -> float:
        return self.deadline - self._clock()

    def reserve(self, tokens: int, cost: float) -> None:
        """Takes one step and the most it can cost. Raises BudgetExceeded, and takes nothing, if that passes a limit."""
        if self.critical_left < 1:
            raise BudgetExceeded("critical_steps")
        if self.seconds_left <= 0:
            raise BudgetExceeded("seconds")
        for ledger in self._chain:
            limits = ledger.budget
            if ledger.steps + 1 > limits.steps:
                raise BudgetExceeded("steps")
            if ledger.tokens + tokens > limits.tokens:
                raise BudgetExceeded("tokens")
            if ledger.cost + cost > limits.cost:
                raise BudgetExceeded("cost")
        self._add(1, tokens, cost)

    def settle(self, tokens: int, cost: float, usage: Usage) -> None:
        """The step that reserved these is over and cost `usage`."""
        self._add(0, usage.tokens - tokens, usage.cost - cost)

    def release(self, tokens: int, cost: float) -> None:
        """The step that reserved these gave no answer: it was refused, failed or was cancelled."""
        self._add(-1, -tokens, -cost)

    def charge(self, usage: Usage) -> None:
        """A step that was paid for in an earlier attempt of this run."""
        self._add(1, usage.tokens, usage.cost)

    def _add(self, steps: int, tokens: int, cost: float) -> None:
        self.critical_steps += steps
        for ledger in self._chain:
            ledger.steps += steps
            ledger.tokens += tokens
            ledger.cost += cost

    def group(self) -> "Ledger":
        """A ledger for children that run together, which leaves this agent enough to answer."""
        share = 1 - KEPT_BACK
        left = Budget(
            critical_steps=max(self.critical_left - 1, 0),
            steps=max(self.left("steps") - 1, 0),
            tokens=max(self.left("tokens") * share, 0),
            cost=max(self.left("cost") * share, 0),
            seconds=max(self.seconds_left * share, 0),
        )
        return Ledger(left, self._clock, self)

    def child(self) -> "Ledger":
        """A ledger for one child of this group: critical steps of its own, everything else shared."""
        return Ledger(Budget(critical_steps=self.budget.critical_steps), self._clock, self)

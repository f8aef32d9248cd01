"""The line of answers that wait for a slot: callers take turns, and within a caller it is first come, first served.

A caller is a pair: where a request came from, and who it says it is for (`serve.app`: the client's address and the
`user` of the call). Places take turns, and within a place its users do: a client that invents users gains nothing. It
is round robin, without weights: a turn is one answer, however long. With one caller the line is a queue.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from kimi_jax.infer.sequence import Answer

Caller: TypeAlias = tuple[str, str]
NOBODY: Caller = ("", "")


class Line:
    """Iterates in the order in which slots are given, if nobody else comes."""

    def __init__(self) -> None:
        # those whose turn is next come first, of the places and of each place's users
        self._places: OrderedDict[str, OrderedDict[str, deque[Answer]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(queue) for users in self._places.values() for queue in users.values())

    def __iter__(self) -> Iterator[Answer]:
        return _in_turns([_in_turns(users.values()) for users in self._places.values()])

    def append(self, answer: Answer) -> None:
        """It waits behind those of its caller; a caller of whom nobody waits has its turn after all others."""
        place, user = answer.caller
        self._places.setdefault(place, OrderedDict()).setdefault(user, deque()).append(answer)

    def put_back(self, answer: Answer) -> None:
        """It had a slot and has to give it up: it is next."""
        place, user = answer.caller
        users = self._places.setdefault(place, OrderedDict())
        users.setdefault(user, deque()).appendleft(answer)
        users.move_to_end(user, last=False)
        self._places.move_to_end(place, last=False)

    def take(self, answer: Answer) -> None:
        """It gets a slot: its caller's turn is over."""
        place, user = answer.caller
        self._places[place].move_to_end(user)
        self._places.move_to_end(place)
        self.remove(answer)

    def remove(self, answer: Answer) -> None:
        """It waits no longer. Raises ValueError or KeyError if it does not stand in the line."""
        place, user = answer.caller
        users = self._places[place]
        users[user].remove(answer)
        if not users[user]:
            del users[user]
        if not users:
            del self._places[place]

    def clear(self) -> None:
        """Nobody waits."""
        self._places.clear()


def _in_turns(queues: Iterable[Iterable[Answer]]) -> Iterator[Answer]:
    """The first of each, then the second of each, and so on."""
    left = [iter(queue) for queue in queues]
    while left:
        for each in tuple(left):
            try:
                yield next(each)
            except StopIteration:
                left.remove(each)

"""Near-duplicate briefs: two tasks that differ only in order, punctuation, articles and politeness are the same task.

Refusing them at the tool boundary is cheaper than paying for them and punishing it afterwards. The test is deliberately
narrow: in wide search briefs come from one template and differ in one name ("... of France", "... of Ghana"), and those
are never duplicates, however alike by a similarity score.
"""

import re

_WORD = re.compile(r"\w+(?:[.,]\d+)*")
_EMPTY = frozenset(
    _WORD.findall(
        "a an and any are as at be by can could do for from give i in information into is it me my of on or out please "
        "provide tell that the their then these this to us we what which who will with would you your"
    )
)


def content_words(brief: str) -> frozenset[str]:
    """The words that a task is about: case, order, repetition, plural s and words without content do not count."""
    words = (word.casefold() for word in _WORD.findall(brief))
    return frozenset(w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w
                     for w in words if w not in _EMPTY)  # fmt: skip


class Briefs:
    """The tasks that one agent has given out. A task whose agent failed may be given again."""

    def __init__(self) -> None:
        self._given: dict[tuple[str, frozenset[str]], str] = {}

    def duplicate(self, agent: str, brief: str) -> str | None:
        """The child that has this task already, or None."""
        return self._given.get((agent, content_words(brief)))

    def add(self, agent: str, brief: str, child: str) -> None:
        """Remembers a task."""
        self._given[agent, content_words(brief)] = child

    def remove(self, agent: str, brief: str) -> None:
        """The child did not finish its task."""
        self._given.pop((agent, content_words(brief)), None)

"""Subagents that a small model can play: their one tool, whose results are short, and the script that shows the form.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6.2, where subagents are models with frozen weights. docs/rl.md
section 12.

    brief     longest border of Togo
    search    {"query": "Togo"}      Togo | 56785
                                     Benin 651, Burkina Faso 131, Ghana 1098
    search    {"query": "Ghana"}     Ghana | 238533
                                     Burkina Faso 602, Cote d'Ivoire 720, Togo 1098
    answer    Ghana | 238533         or "none", if there is no such row

A result is the entry that fits the query best, whatever it is, so a model that asks for the wrong country or copies the
wrong numbers comes back with a wrong row, and nothing corrects it.
"""

from __future__ import annotations

from typing import Any

from kimi_jax.agents.corpus import Corpus
from kimi_jax.agents.families import read_borders, read_number, related
from kimi_jax.agents.finder import AREA, BRIEF, RELATION_NAMES, Finder
from kimi_jax.agents.model import ModelRequest
from kimi_jax.agents.researcher import label_of, past_calls, value_of
from kimi_jax.agents.tools import Tool, ToolError, ToolResult, from_function

NOTHING = "none"  # what a subagent answers that found no row
MAX_RESULT = 400  # characters; the most borders of a country need 250
_TITLE = ": Geography"


def tools(corpus: Corpus) -> list[Tool]:
    """`search`, which gives the area and the borders of one country of the corpus."""

    async def search(query: str) -> ToolResult:
        """Search the countries. Gives the area of the best one, and its borders with their lengths in km."""
        found = [(name, corpus.documents[name].title) for name, _ in corpus.best(f"{query[:100]} Geography", 20)]
        entries = [(name, title.removesuffix(_TITLE)) for name, title in found if title.endswith(_TITLE)]
        if not entries:
            raise ToolError("nothing was found")
        # the index ranks by frequency: the country itself may stand behind one that speaks of it
        name, country = min(entries, key=lambda entry: entry[1] != query)
        text = corpus.text(name)
        borders = read_borders(value_of(text, "Land boundaries, border countries"))
        lengths = ", ".join(f"{other} {km:g}" for other, km in borders) or "no borders"
        return ToolResult(f"{country} | {read_number(value_of(text, label_of(AREA)))}\n{lengths}", (name,))

    return [from_function(search, max_chars=MAX_RESULT)]


class Searcher(Finder):
    """The script. reliability: share of briefs that it is up to; with the others it finds nothing."""

    name = "scripted searcher"

    def _turn(self, request: ModelRequest) -> tuple[str, tuple[str, dict[str, Any]] | None]:
        brief = str(request.messages[1]["content"]).strip()
        asked = BRIEF.fullmatch(brief)
        results = [call.result.splitlines() for call in past_calls(request.messages)]
        if asked is None or (results and (self._gives_up(brief) or len(results[-1]) < 2)):
            return NOTHING, None
        relation, country = asked[1], asked[2]
        if not results:
            return "", ("search", {"query": country})
        if relation and len(results) == 1:
            pairs = (pair.rpartition(" ") for pair in results[0][1].split(", ") if pair != "no borders")
            borders = tuple((name, float(km)) for name, _, km in pairs)
            neighbour = related(borders, RELATION_NAMES.index(relation))
            return (NOTHING, None) if neighbour is None else ("", ("search", {"query": neighbour}))
        return results[-1][0], None

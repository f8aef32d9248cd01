"""Short questions for small orchestrators over the World Factbook, and the scripted subagent that looks one row up.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6.4 (synthetic prompts that never say how to divide the work).

A question asks for the areas of some countries, each named, or in a relation to one of an earlier line:

    areas of                          wide   every country is named: they can be looked up at the same time
    1 Ghana                           chain  each is a neighbour of the one before: one after the other
    2 longest border of 1             mixed  some of both

The orchestrator assigns tasks to the subagent `finder`, with a brief as in the question but with names alone ("Ghana",
"longest border of Ghana"), and answers with the numbers of the calls whose results it cites, in the order of the lines:
"0 1". The table is put together from the results, so that an orchestrator of a few million parameters need not copy
numbers; all that it decides is whom to ask what, and when.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kimi_jax.agents.evals import ScoredColumn, Table, TableScore, score
from kimi_jax.agents.events import ROOT, Event, Usage
from kimi_jax.agents.families import RELATIONS, Document, Knobs, facts, make, neighbour, read_borders, related, sections
from kimi_jax.agents.model import Call, ModelError, ModelRequest, Response
from kimi_jax.agents.researcher import BYTES_A_TOKEN, find_sections, look_up, past_calls

FAMILIES = ("wide", "chain", "mixed")
FINDER = "finder"
AREA = "Area (sq km)"
COLUMNS = (
    ScoredColumn("Country", key=True),
    ScoredColumn(AREA, metrics=("number_near",), preprocess=("extract_number",), tolerance=0.01),
)
RELATION_NAMES = ("longest", "shortest", "first", "last")  # as RELATIONS of the families, in one word
MAX_CITED = 64  # numbers, of four digits and a space, that an answer may have
BRIEF = re.compile(rf"(?:({'|'.join(RELATION_NAMES)}) border of )?(\S.{{0,98}})")
_PARALLEL_FAMILY = {"wide": "wide", "chain": "trap", "mixed": "mixed"}


@dataclass(frozen=True)
class AskedRow:
    """One row that is asked for. after: the earlier line that it depends on, None for a country that is named."""

    country: str
    after: int | None = None
    relation: int = -1

    def text(self, name: str) -> str:
        """What is asked, with `name` for what it depends on."""
        return self.country if self.after is None else f"{RELATION_NAMES[self.relation]} border of {name}"


@dataclass(frozen=True)
class FinderQuestion:
    """A question with its gold table. key: family and number."""

    key: str
    family: str
    lines: tuple[AskedRow, ...]

    @property
    def text(self) -> str:
        """What the orchestrator is asked."""
        asked = (f"{i + 1} {line.text(str((line.after or 0) + 1))}" for i, line in enumerate(self.lines))
        return "\n".join(["areas of", *asked])

    @property
    def gold(self) -> Table:
        """The right rows."""
        return Table(("Country", AREA), tuple((x.country, facts()[x.country].cells[AREA]) for x in self.lines))

    @property
    def oracle(self) -> float:
        """T1 / T∞ of the lines, each of equal cost: 1 for a chain, their number where all are named."""
        depths: list[int] = []
        for line in self.lines:
            depths.append(1 if line.after is None else depths[line.after] + 1)
        return len(self.lines) / max(depths)


def question(family: str, seed: int, items: int = 4) -> FinderQuestion:
    """Question number `seed` of a family. Raises ValueError for an unknown family, or more lines than countries."""
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}; there are: {', '.join(FAMILIES)}")
    task = make(_PARALLEL_FAMILY[family], seed, Knobs(items=items, fan_in=1, distractors=0))
    lines = []
    for item in task.items:
        relation = next((r for r, form in enumerate(RELATIONS) if item.brief.startswith(form.partition("{}")[0])), -1)
        lines.append(AskedRow(item.row[0], item.after[0], relation) if item.after else AskedRow(item.row[0]))
    return FinderQuestion(f"{family}/{seed}", family, tuple(lines))


def documents() -> list[Document]:
    """The Factbook's entries of every country that a question can name."""
    return [document for name in sorted(facts()) for document in sections(name).values()]


# ---------------------------------------------------------------------------------------------------------- the answer


def results(events: Sequence[Event]) -> list[str]:
    """The row that came back of each call of the orchestrator, in their order; "" if none did."""
    ends = {event.agent: event for event in events if event.kind == "end"}
    found = []
    for event in _returned(events):
        end = ends[str(event.detail["child"])] if event.kind == "join" else None
        found.append(_row(str(end.detail["summary"])) if end and end.status == "ok" else "")
    return found


def delivered(events: Sequence[Event]) -> list[tuple[str, str]]:
    """(brief, row) of each subagent; "" for one that came back without a row."""
    briefs = {str(e.detail["child"]): str(e.detail["brief"]) for e in events if e.kind == "spawn"}
    rows = zip(_returned(events), results(events), strict=True)
    return [(briefs[str(event.detail["child"])], row) for event, row in rows if event.kind == "join"]


def _row(summary: str) -> str:
    """What a subagent that finished says, if it has the form of a row."""
    return summary if " | " in summary else ""


def row_of(brief: str) -> str:
    """The row that a brief asks for; "" if there is none."""
    asked = BRIEF.fullmatch(brief)
    country = asked[2] if asked else ""
    if asked and asked[1]:
        country = (neighbour(country, RELATION_NAMES.index(asked[1])) or "") if country in facts() else ""
    return f"{country} | {facts()[country].cells[AREA]}" if country in facts() else ""


def _returned(events: Sequence[Event]) -> list[Event]:
    """One event for each call of the orchestrator, in the order of the calls."""
    return [event for event in events if event.agent == ROOT and event.kind in ("tool", "join")]


def cited(answer: str, count: int) -> list[int]:
    """The numbers of an answer that are calls, in order, each once; [] for an answer of another form."""
    if len(answer) > 5 * MAX_CITED or not re.fullmatch(r"\s*\d{1,4}(\s+\d{1,4})*\s*", answer):
        return []
    return [n for n in dict.fromkeys(map(int, answer.split())) if n < count]


def used(events: Sequence[Event]) -> list[str]:
    """The subagents whose rows the answer cites, or whose country a later brief names."""
    children = [str(e.detail["child"]) if e.kind == "join" else "" for e in _returned(events)]
    end = next(event for event in events if event.kind == "end" and event.agent == ROOT)
    rows = dict(zip(children, results(events), strict=True))
    found = {children[number] for number in cited(str(end.detail["summary"]), len(children))}
    later: set[str] = set()
    for event in reversed(events):
        if event.kind == "spawn":
            later |= set(re.findall(r"border of (\S.*)", str(event.detail["brief"])))
        elif event.kind == "join" and rows[str(event.detail["child"])].partition(" | ")[0] in later:
            found.add(str(event.detail["child"]))
    return [child for child in children if child in found and rows[child]]


def verify(asked: FinderQuestion, events: Sequence[Event]) -> TableScore:
    """Scores the table of the rows that the answer cites."""
    end = next(event for event in events if event.kind == "end" and event.agent == ROOT)
    found = results(events)
    rows = []
    for number in cited(str(end.detail["summary"]), len(found)) if end.status == "ok" else ():
        country, bar, area = found[number].partition(" | ")
        if bar:
            rows.append((country, area))
    return score(Table(("Country", AREA), tuple(rows)), asked.gold, COLUMNS)


# ------------------------------------------------------------------------------------------------------- the subagent


class Finder:
    """A scripted subagent: it searches, reads, and answers with the one row of its brief, "Ghana | 238533".

    reliability: share of briefs that it is up to; with the others it gives up after its first search. Which those are
    depends on brief and seed alone.
    """

    name = "scripted finder"

    def __init__(self, reliability: float = 1.0, seed: int = 0):
        self._reliability, self._seed = reliability, seed

    async def complete(self, request: ModelRequest) -> Response:
        """One turn. Raises ModelError, which ends the subagent without a result, where nothing can be found."""
        text, call = self._turn(request)
        calls = () if call is None else (Call("call_0", call[0], json.dumps(call[1])),)
        size = sum(len(str(message["content"])) for message in request.messages) // BYTES_A_TOKEN
        return Response(text, calls, Usage(size, 1 + (len(text) + len(str(call))) // BYTES_A_TOKEN))

    def _turn(self, request: ModelRequest) -> tuple[str, tuple[str, dict[str, Any]] | None]:
        brief = str(request.messages[1]["content"]).strip()
        asked = BRIEF.fullmatch(brief)
        past = past_calls(request.messages)
        if asked is None or (past and self._gives_up(brief)):
            raise ModelError("no such row")
        relation, country = asked[1], asked[2]
        if relation:
            texts, search = find_sections(country, [AREA], past)
            if search:
                return "", search
            name, document = texts.get("Geography", ("", None))
            if document is None:
                raise ModelError(f"no country {country}")
            if document.offset < document.total:
                return "", ("read", {"document": name, "offset": document.offset})
            borders = read_borders(document.value("Land boundaries, border countries"))
            found = related(borders, RELATION_NAMES.index(relation))
            if found is None:
                raise ModelError(f"no {relation} border of {country}")
            country = found
        cells, step, _ = look_up(country, [AREA], past)
        if step and request.tools:
            return "", step
        if not cells[0]:
            raise ModelError(f"no area of {country}")
        return f"{country} | {cells[0]}", None

    def _gives_up(self, brief: str) -> bool:
        digest = hashlib.sha256(f"{self._seed}/{brief}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >= self._reliability * 2**32


# --------------------------------------------------------------------------------------------- a scripted orchestrator


class Orchestrator:
    """A scripted orchestrator, whose conversations are what a policy is first trained on.

    parallel: whether it assigns all lines that it can at the same time, or one in a turn. asked: the question, of which
    it reads nothing but what the question says and what came back.
    """

    name = "scripted orchestrator"

    def __init__(self, asked: FinderQuestion, parallel: bool):
        self._lines, self._parallel = asked.lines, parallel

    async def complete(self, request: ModelRequest) -> Response:
        """One turn: the next tasks, or the numbers of the calls in the order of the lines."""
        made = [call for call in past_calls(request.messages) if call.name == "assign_task"]
        rows = [_summary(call.result) for call in made]
        calls: dict[int, int] = {}  # line -> its call
        for number, call in enumerate(made):
            briefs = self._ready(calls, rows)
            calls[next(i for i in briefs if briefs[i] == call.arguments["prompt"])] = number
        ready = self._ready(calls, rows)
        if ready and request.tools:
            chosen = list(ready.values())[: None if self._parallel else 1]
            arguments = [json.dumps({"agent": FINDER, "prompt": brief}, ensure_ascii=False) for brief in chosen]
            ids = [f"functions.assign_task:{len(made) + k}" for k in range(len(chosen))]
            new = tuple(Call(i, "assign_task", text) for i, text in zip(ids, arguments, strict=True))
            return Response("", new)
        return Response(" ".join(str(calls[i]) for i in sorted(calls) if rows[calls[i]]) or "none")

    def _ready(self, calls: dict[int, int], rows: Sequence[str]) -> dict[int, str]:
        """Line -> its brief, of those that have no call yet and need nothing that is not known."""
        briefs = {i: self._brief(i, calls, rows) for i in range(len(self._lines)) if i not in calls}
        return {i: brief for i, brief in briefs.items() if brief}

    def _brief(self, i: int, calls: dict[int, int], rows: Sequence[str]) -> str:
        """The brief of a line; "" as long as what it depends on is not known."""
        line = self._lines[i]
        if line.after is None:
            return line.country
        source = rows[calls[line.after]] if line.after in calls else ""
        return line.text(source.partition(" | ")[0]) if source else ""


def _summary(envelope: str) -> str:
    """The row that a subagent came back with; "" if it did not finish."""
    try:
        fields = json.loads(envelope)
    except ValueError:
        return ""  # the runtime refused the task
    return _row(str(fields["summary"])) if fields["status"] == "ok" else ""

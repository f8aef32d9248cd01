"""A model that is a script: it answers questions of the family `wide` by searching and reading, alone or as a swarm.

It stands in for a language model where none is at hand (`make swarm-demo`). It knows the form of these questions and of
the Factbook's lines, and no answer: every cell comes from a line of a document that it read in this run. Whether it has
subagents is seen from the tools that it is given; with them it assigns one task for each row, and looks up itself what
did not come back. Asked for a summary it gives the rows so far, and goes on from those of an earlier one. Each turn is
a function of the request, so that a run can be resumed and replayed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from kimi_jax.agents.config import ASSIGN_TASK, CREATE_SUBAGENT
from kimi_jax.agents.context import SUMMARISE, SUMMARISED
from kimi_jax.agents.evals import TableError, parse_table
from kimi_jax.agents.events import Usage
from kimi_jax.agents.families import NUMBERS, SECTIONS, read_number
from kimi_jax.agents.model import Call, Message, ModelRequest, Prices, Response

BYTES_A_TOKEN = 4  # by which prompts and answers are counted; a tokenizer of English text needs about as many
SUBAGENT = "researcher"
SUBAGENT_PROMPT = "You look up facts. Search, read what you found, and answer with the table that you are asked for."
_PAGE_END = re.compile(r"\n\[characters (\d+) to (\d+) of (\d+)\]$")


@dataclass
class PastCall:
    """A call of the past, with what came back."""

    name: str
    arguments: dict[str, Any]
    result: str = ""


@dataclass
class _Text:
    """A document as far as it was read."""

    text: str = ""
    total: int = 1
    offset: int = 0

    def value(self, label: str) -> str:
        """What stands behind a label at the beginning of a line; "" without such a line."""
        return value_of(self.text, label)


def value_of(text: str, label: str) -> str:
    """What stands behind a label at the beginning of a line of a text; "" without such a line."""
    found = re.search(rf"^{re.escape(label)}: (.*)\n", text + "\n", re.MULTILINE)
    return found[1] if found else ""


class Researcher:
    """latency: seconds that every answer takes, as a model's would. prices: of its tokens, which are bytes / 4."""

    name = "scripted researcher"

    def __init__(self, latency: float = 0.0, prices: Prices = Prices()):  # noqa: B008 (frozen)
        self._latency, self._prices = latency, prices

    async def complete(self, request: ModelRequest) -> Response:
        """One turn: calls, or the answer once all cells are known, no tool is left, or nothing more can be found."""
        await anyio.sleep(self._latency)
        text, calls = self._turn(request)
        made = tuple(Call(f"call_{i}", name, json.dumps(arguments)) for i, (name, arguments) in enumerate(calls))
        response = Response(text, made)
        size = len(json.dumps([list(request.messages), list(request.tools)])) // BYTES_A_TOKEN
        answer = len(json.dumps(response.message())) // BYTES_A_TOKEN
        return Response(text, made, Usage(size, answer, self._prices.cost(size, answer)))

    def _turn(self, request: ModelRequest) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
        question = str(request.messages[1]["content"])
        countries = re.findall(r"^\d+\. (.+)$", question, re.MULTILINE)
        columns = re.findall(r"the columns (.+?);", question)[0].split(", ")
        past = past_calls(request.messages)
        if any(tool["name"] == ASSIGN_TASK["name"] for tool in request.tools):
            calls = _delegate(question, countries, past)
            if calls:
                return "", calls
        rows, sources = _delivered(past)
        rows |= _summarised(request.messages)
        for country in (name for name in countries if name not in rows):
            row, step, found = look_up(country, columns[1:], past)
            if step and request.tools:
                return "", [step]
            if step and request.messages[-1]["content"] == SUMMARISE:
                break
            if any(row):
                rows[country] = (country, *row)
                sources += found
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(rows[name]) + " |" for name in countries if name in rows]
        return "\n".join([*lines, "", "Sources: " + " ".join(f"[{name}]" for name in dict.fromkeys(sources))]), []


def past_calls(messages: Sequence[Message]) -> list[PastCall]:
    """All calls of a conversation with their results."""
    calls: list[PastCall] = []
    waiting: dict[str, PastCall] = {}
    for message in messages:
        if message["role"] == "assistant":
            made = message.get("tool_calls", ())
            waiting = {c["id"]: PastCall(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in made}
            calls += waiting.values()
        elif message["role"] == "tool":
            waiting[message["tool_call_id"]].result = message["content"]
    return calls


def _delegate(question: str, countries: Sequence[str], past: Sequence[PastCall]) -> list[tuple[str, dict[str, Any]]]:
    """The calls of the first two turns of an orchestrator: an agent is created, and gets a task for each row."""
    names = {call.name for call in past}
    if CREATE_SUBAGENT["name"] not in names:
        return [(CREATE_SUBAGENT["name"], {"name": SUBAGENT, "system_prompt": SUBAGENT_PROMPT})]
    if ASSIGN_TASK["name"] in names:
        return []
    first, *_, last = question.splitlines()
    briefs = ["\n".join([first, f"1. {country}", last]) for country in countries]
    return [(ASSIGN_TASK["name"], {"agent": SUBAGENT, "prompt": brief}) for brief in briefs]


def _delivered(past: Sequence[PastCall]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """(rows by country, documents) that subagents came back with."""
    rows: dict[str, tuple[str, ...]] = {}
    sources: list[str] = []
    for call in past:
        if call.name == ASSIGN_TASK["name"]:
            try:
                envelope = json.loads(call.result)
                found = parse_table(envelope["summary"]).rows
            except (ValueError, KeyError, TableError):
                continue  # a task that failed, or was refused
            rows |= {row[0]: row for row in found}
            sources += re.findall(r"\[(\S+?)\]", envelope["summary"])
    return rows, sources


def _summarised(messages: Sequence[Message]) -> dict[str, tuple[str, ...]]:
    """Rows by country of the summary that the conversation goes on from, if there is one."""
    text = str(messages[2]["content"]) if len(messages) > 2 and messages[2]["role"] == "user" else ""
    if not text.startswith(SUMMARISED):
        return {}
    try:
        return {row[0]: row for row in parse_table(text).rows}
    except TableError:
        return {}


def look_up(
    country: str, columns: Sequence[str], past: Sequence[PastCall]
) -> tuple[list[str], tuple[str, dict[str, Any]] | None, list[str]]:
    """(cells as far as they are known, the next call or None, documents that were read) for one row."""
    texts, search = find_sections(country, columns, past)
    if search:
        return [""] * len(columns), search, []
    cells: list[str] = []
    step = None
    for column in columns:
        name, document = texts.get(_section(column), ("", _Text(total=0)))
        cells.append(_cell(column, document))
        if not cells[-1] and document.offset < document.total and step is None:
            step = "read", {"document": name, "offset": document.offset}
    return cells, step, [name for name, document in texts.values() if document.offset]


def find_sections(
    country: str, columns: Sequence[str], past: Sequence[PastCall]
) -> tuple[dict[str, tuple[str, _Text]], tuple[str, dict[str, Any]] | None]:
    """(identifier and text of each section found, the next search or None): by title, then by what is asked."""
    wanted = list(dict.fromkeys(map(_section, columns)))
    found: dict[str, tuple[str, _Text]] = {}
    for queries, count in (
        ([f"{country} {section}" for section in wanted], 5),
        ([f"{country} {label_of(column)}" for column in columns], 20),
    ):
        call = next((c for c in past if c.name == "search" and c.arguments["queries"] == queries), None)
        if call is None:
            return found, ("search", {"queries": queries, "count": count})
        for section in wanted:
            match = re.search(rf"^\[(\S+)\] {re.escape(f'{country}: {section}')}: ", call.result, re.MULTILINE)
            if match:
                found[section] = match[1], _read(match[1], past)
        if len(found) == len(wanted):
            break
    return found, None


def _section(column: str) -> str:
    return SECTIONS.get(column, "Geography")


def label_of(column: str) -> str:
    """What stands at the beginning of the Factbook's line for a column."""
    return "Capital, name" if column == "Capital" else ", ".join(part.strip() for part in NUMBERS[column][1:])


def _read(name: str, past: Sequence[PastCall]) -> _Text:
    document = _Text()
    for call in past:
        end = _PAGE_END.search(call.result)
        if call.name == "read" and call.arguments["document"] == name and end:
            document = _Text(document.text + call.result[: end.start()], int(end[3]), int(end[2]))
    return document


def _cell(column: str, document: _Text) -> str:
    """The value of a column on the Factbook's line for it."""
    value = document.value(label_of(column))
    return re.split(r"[;(]", value)[0].strip() if column == "Capital" else read_number(value)

"""Families of research tasks with a parallelism dial, over real text: the World Factbook and Wikipedia leads.

Source: Kimi K2.5 report (arXiv 2602.02276), section 6.4: wide search, deep search, analysis of long documents and
downloads, hard to finish one after the other, in prompts that never say how to divide the work. Two are added: `mixed`,
and `trap`, which looks wide and is a chain.

A task is a hidden graph of items. An item costs steps (searches and reads), may need the answers of other items, and
gives one row of the gold table. `phi` is the probability that an item needs no other one: 1 makes items independent, 0
a chain.

  wide      a table of countries that are named                               phi = 1
  deep      the last country of a chain of land borders                       phi = 0, one row is asked for
  trap      a table of countries, each a neighbour of the one before          phi = 0, all rows are asked for
  mixed     rows that are named, or neighbours of one or several earlier rows phi of the knobs
  longdoc   one fact in each of several long documents                        phi = 1, many pages to turn
  download  checksum and length of documents                                  phi = 1, cheap items

Everything follows from family, seed and knobs. The text comes with the packages of the extra `demo`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_jax.agents import critical, evals
from kimi_jax.agents.evals import ScoredColumn, Table, TableScore
from kimi_jax.data.sources.demo_base import generator
from kimi_jax.data.sources.demo_text import Country, countries, country_sections, plain, wiki_documents

FAMILIES = ("wide", "deep", "trap", "mixed", "longdoc", "download")
MAX_ITEMS = 60
PAGE = 3000  # characters of a long document that one step reads
RELATIONS = (
    "the country with the longest land border with {}",
    "the country with the shortest land border with {}",
    "the country that comes first in the alphabet of those with a land border with {}",
    "the country that comes last in the alphabet of those with a land border with {}",
)
# as the border fields of the Factbook spell other entries
ALIASES = {
    "Democratic Republic of the Congo": "DRC",
    "Republic of the Congo": "Congo (Brazzaville)",
    "US": "United States",
    "UK": "United Kingdom",
    "UAE": "United Arab Emirates",
    "Czech Republic": "Czechia",
    "Macedonia": "North Macedonia",
}


@dataclass(frozen=True)
class Knobs:
    """What makes a task hard.

    items: nodes of the hidden graph. phi: of `mixed`. fan_in: most rows that a row needs. effort: most steps beyond the
    needed ones that an item costs, drawn with a heavy tail. pages: of a long document. distractors: documents of the
    corpus that no item needs. reliability: probability that one look-up gives the right fact, for scripted agents.
    """

    items: int = 8
    phi: float = 0.5
    fan_in: int = 2
    effort: int = 7
    pages: int = 6
    distractors: int = 40
    reliability: float = 1.0

    def __post_init__(self) -> None:
        fits = 1 <= self.items <= MAX_ITEMS and self.fan_in >= 1 and self.pages >= 1
        if (
            not fits
            or min(self.effort, self.distractors) < 0
            or not (0 <= self.phi <= 1 and 0 <= self.reliability <= 1)
        ):
            raise ValueError(
                f"no task can be made of {self}; items go from 1 to {MAX_ITEMS}, probabilities from 0 to 1"
            )


@dataclass(frozen=True)
class Document:
    """One text of the corpus. name: a relative path without spaces."""

    name: str
    text: str


@dataclass(frozen=True)
class Item:
    """A node of the hidden graph.

    row: its row of the gold table. after: numbers of the items whose answers say which entity this one is about. steps:
    tool calls that it takes. documents: names of those that hold its facts. brief: its part of the question.
    """

    row: tuple[str, ...]
    after: tuple[int, ...]
    steps: int
    documents: tuple[str, ...]
    brief: str


@dataclass(frozen=True)
class SwarmTask:
    """A question over a corpus, with its gold table and its hidden graph."""

    name: str
    family: str
    question: str
    gold: Table
    columns: tuple[ScoredColumn, ...]
    items: tuple[Item, ...]
    documents: tuple[Document, ...]
    reliability: float = 1.0

    @functools.cached_property
    def graph(self) -> critical.Graph:
        """The items, each an agent of its own, and one step of the orchestrator that writes the answer."""
        nodes = [
            critical.Node(f"item{i}", item.steps, tuple(f"item{j}" for j in item.after), f"item{i}")
            for i, item in enumerate(self.items)
        ]
        answer = critical.Node("answer", 1, tuple(node.name for node in nodes))
        return critical.Graph((*nodes, answer))

    @property
    def work(self) -> int:
        """Oracle T1 in steps."""
        return critical.work(self.graph)

    @property
    def span(self) -> int:
        """Oracle T∞ in steps."""
        return critical.span(self.graph)

    def makespan(self, slots: int) -> int:
        """Oracle Tp in steps with p slots, by list scheduling: at most (2 - 1/p) times the best."""
        return critical.makespan(self.graph, slots)

    def verify(self, answer: str | Table | None) -> TableScore:
        """Scores an answer."""
        return evals.score(answer, self.gold, self.columns)


def make(family: str, seed: int, knobs: Knobs = Knobs()) -> SwarmTask:
    """The task number `seed` of a family. Raises ValueError for an unknown family."""
    if family not in FAMILIES:
        raise ValueError(f"there is no family {family!r}; there are: {', '.join(FAMILIES)}")
    rng = generator(f"swarm/{family}", "train", seed)
    if family == "longdoc":
        return _longdoc(f"{family}/{seed}", knobs, rng)
    if family == "download":
        return _download(f"{family}/{seed}", knobs, rng)
    phi = {"wide": 1.0, "deep": 0.0, "trap": 0.0}.get(family, knobs.phi)
    return _countries(f"{family}/{seed}", family, phi, knobs, rng)


def write_corpus(task: SwarmTask, folder: Path) -> None:
    """Writes the documents as text files, for any tool that searches a folder."""
    for document in task.documents:
        path = folder / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text, encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- real facts


@dataclass(frozen=True)
class Facts:
    """What is asked of one country. borders: (neighbour, km), of all its neighbours; () if there is any doubt."""

    name: str
    cells: dict[str, str]
    borders: tuple[tuple[str, float], ...]


NUMBERS = {  # column -> where the Factbook has it
    "Area (sq km)": ("Geography", "Area", "total "),
    "Coastline (km)": ("Geography", "Coastline"),
    "Highest point (m)": ("Geography", "Elevation", "highest point"),
    "Median age (years)": ("People and Society", "Median age", "total"),
}
GEOGRAPHY = ("Area (sq km)", "Coastline (km)", "Highest point (m)")  # what one section tells, with the borders
ALL_COLUMNS = ("Capital", "Area (sq km)", "Median age (years)", "Highest point (m)")
SECTIONS = {"Capital": "Government", "Median age (years)": "People and Society"}  # of the other columns: Geography


def _text(country: Country, *keys: str) -> str:
    value: object = country.entry
    for key in (*keys, "text"):
        value = value.get(key, "") if isinstance(value, dict) else ""
    return plain(value) if isinstance(value, str) else ""


def read_number(text: str) -> str:
    """The number before a unit: "1.267 million sq km" is 1267000, "Galdhopiggen 2,469 m" is 2469."""
    found = re.search(r"(-?\d[\d,]*(?:\.\d+)?)( million)? ?(?:sq km|km|m|years)\b", text)
    if not found:
        return ""
    return f"{float(found[1].replace(',', '')) * (1_000_000 if found[2] else 1):.10g}"


def read_borders(text: str) -> tuple[tuple[str, float], ...]:
    """(neighbour, km) of a line of borders: "Burkina Faso 602 km; Togo 1098 km"."""
    pairs = re.findall(r"([A-Z][^;,\d]*?) ([\d,.]+) ?km", text)
    return tuple((ALIASES.get(name, name), float(km.replace(",", ""))) for name, km in pairs)


@functools.cache
def facts() -> dict[str, Facts]:
    """Countries of which every column is known, by name."""
    known = {}
    for country in countries():
        cells = {column: read_number(_text(country, *keys)) for column, keys in NUMBERS.items()}
        cells["Capital"] = country.capital
        if all(cells.values()) and re.fullmatch(r"[A-Za-z' ().-]+", country.name):
            borders = read_borders(_text(country, "Geography", "Land boundaries", "border countries"))
            known[country.name] = Facts(country.name, cells, borders)
    for name, found in known.items():
        lengths = [km for _, km in found.borders]
        if len(set(lengths)) != len(lengths) or any(other not in known for other, _ in found.borders):
            known[name] = Facts(name, found.cells, ())
    return known


@functools.cache
def sections(name: str) -> dict[str, Document]:
    """The sections of a country's entry, by title."""
    country = next(c for c in countries() if c.name == name)
    found: dict[str, list[str]] = {}
    for piece in country_sections(country):
        head, _, body = piece.partition("\n")
        found.setdefault(head.removeprefix(f"{name}: "), []).append(body)
    folder = re.sub(r"[^A-Za-z]+", "-", name).strip("-")
    return {
        title: Document(
            f"factbook/{folder}/{re.sub(r'[^A-Za-z]+', '-', title)}.txt", f"{name}: {title}\n" + "\n".join(pieces)
        )
        for title, pieces in found.items()
    }


def neighbour(name: str, relation: int) -> str | None:
    """The country that stands in relation number `relation` of RELATIONS to this one; None if it has no such."""
    return related(facts()[name].borders, relation)


def related(borders: tuple[tuple[str, float], ...], relation: int) -> str | None:
    """The neighbour in relation number `relation` of RELATIONS; None where there is no choice."""
    if len(borders) < 2:
        return None
    key = (lambda b: -b[1], lambda b: b[1])[relation] if relation < 2 else (lambda b: b[0])
    ordered = sorted(borders, key=key)
    return ordered[-1 if relation == 3 else 0][0]


# ----------------------------------------------------------------------------------- wide, deep, trap and mixed tasks


def _countries(name: str, family: str, phi: float, knobs: Knobs, rng: np.random.Generator) -> SwarmTask:
    asked = ALL_COLUMNS if family == "wide" else GEOGRAPHY
    plan = _plan(knobs.items, phi, knobs.fan_in, rng)
    items = []
    for country, after, relation in plan:
        titles = dict.fromkeys(SECTIONS.get(column, "Geography") for column in asked)
        documents = tuple(sections(country)[title].name for title in titles)
        row = (country, *(facts()[country].cells[column] for column in asked))
        items.append(
            Item(row, after, 1 + len(documents) + _effort(knobs, rng), documents, _entity(country, after, relation))
        )
    shown = items[-1:] if family == "deep" else items
    gold = Table(("Country", *asked), tuple(item.row for item in shown))
    lines = [f"{i + 1}. {item.brief}" for i, item in enumerate(items)]
    if family == "deep":
        what = f"Which country do you reach at the end of this walk? Give one row for it, of {len(items)} steps:"
    elif family == "wide":
        what = "Make a table with one row for each of these countries:"
    else:
        what = f"Make a table of {len(items)} countries, one row for each line:"
    form = f"Answer with one Markdown table with the columns {', '.join(gold.columns)}; plain numbers, without units."
    question = "\n".join([what, *lines, form])
    needed = [sections(item.row[0])[title] for item in items for title in sections(item.row[0])]
    columns = tuple(_rule(column) for column in gold.columns)
    return SwarmTask(
        name, family, question, gold, columns, tuple(items), _corpus(needed, knobs, rng), knobs.reliability
    )


Planned = tuple[str, tuple[int, ...], int]  # country, rows that it needs, relation to the one of them that is largest


def _plan(n: int, phi: float, fan_in: int, rng: np.random.Generator) -> list[Planned]:
    """n different countries. Each but the first needs none of the others with probability phi.

    A country that needs others is in some relation to the largest of them; where every relation leads to a country that
    is taken, the walk goes back and tries others.
    """
    needs: list[tuple[int, ...]] = [()]
    for i in range(1, n):
        dependent = rng.random() >= phi
        others = int(rng.integers(0, min(fan_in, i))) if dependent else 0
        chosen = {int(j) for j in rng.choice(i - 1, others, replace=False)} if others else set()
        needs.append(tuple(sorted(chosen | {i - 1})) if dependent else ())
    for budget in (20_000, *[500] * 20):  # choices to try; where the first order leads nowhere, others may
        plan = _walk(needs, phi, budget, rng)
        if plan:
            return plan
    raise ValueError(f"the Factbook has no walk of {n} countries with phi {phi}; ask for fewer items")


def _walk(needs: list[tuple[int, ...]], phi: float, budget: int, rng: np.random.Generator) -> list[Planned]:
    """Countries that stand in a relation to those that they need, tried in a random order; [] if none is found."""
    n = len(needs)
    names = sorted(facts())
    roots = [name for name in names if len(facts()[name].borders) >= 2]
    orders = [[names[int(k)] for k in rng.permutation(len(names))] for _ in range(n)]
    hops = [[int(k) for k in rng.permutation(len(RELATIONS))] for _ in range(n)]
    plan: list[Planned] = []

    def choices(i: int) -> list[Planned]:
        found: list[tuple[str | None, int]]
        if needs[i]:
            source = largest([plan[j][0] for j in needs[i]])
            found = [(neighbour(source, r), r) for r in hops[i]]
        else:
            found = [(name, -1) for name in orders[i] if name in roots or phi == 1]
        taken = {country for country, _, _ in plan}
        return [(country, needs[i], r) for country, r in found if country is not None and country not in taken]

    stack = [choices(0)]
    while len(plan) < n:
        budget -= 1
        if not budget or not stack:
            return []
        if stack[-1]:
            plan.append(stack[-1].pop(0))
            if len(plan) < n:
                stack.append(choices(len(plan)))
        else:
            stack.pop()
            if plan:
                plan.pop()
    return plan


def largest(names: list[str]) -> str:
    """The country with the largest area."""
    return max(names, key=lambda name: float(facts()[name].cells["Area (sq km)"]))


def _entity(country: str, after: tuple[int, ...], relation: int) -> str:
    """How the question names the country of one line."""
    if not after:
        return country
    lines = [f"line {j + 1}" for j in after]
    source = f"the country of {lines[0]}"
    if len(lines) > 1:
        source = f"the one with the largest area of the countries of {', '.join(lines[:-1])} and {lines[-1]}"
    return RELATIONS[relation].format(source)


def _rule(column: str) -> ScoredColumn:
    if column in NUMBERS:
        return ScoredColumn(column, metrics=("number_near",), preprocess=("extract_number",), tolerance=0.01)
    return ScoredColumn(column, key=column in ("Country", "Document"))


def _effort(knobs: Knobs, rng: np.random.Generator) -> int:
    """Steps that lead nowhere: most often none, sometimes many (Pareto with exponent 1.2, cut off)."""
    return min(knobs.effort, int(rng.pareto(1.2)))


def _corpus(needed: list[Document], knobs: Knobs, rng: np.random.Generator) -> tuple[Document, ...]:
    """Documents that are needed and some that are not, without repetition, sorted by name."""
    leads = wiki_documents("train")
    chosen = sorted(int(k) for k in rng.choice(len(leads), min(knobs.distractors, len(leads)), replace=False))
    others = [Document(f"wiki/{k}.txt", leads[k]) for k in chosen]
    return tuple(sorted({document.name: document for document in [*needed, *others]}.values(), key=lambda d: d.name))


# --------------------------------------------------------------------------------------- long documents and downloads


def _longdoc(name: str, knobs: Knobs, rng: np.random.Generator) -> SwarmTask:
    leads = wiki_documents("train")
    names = sorted(facts())
    items, documents = [], []
    for i, k in enumerate(rng.choice(len(names), knobs.items, replace=False)):
        country = names[int(k)]
        place = int(rng.integers(knobs.pages))
        pages = [_page(leads, rng) for _ in range(knobs.pages)]
        pages[place] = sections(country)["Geography"].text[:PAGE].ljust(PAGE)
        document = Document(f"long/report-{i + 1}.txt", "".join(pages))
        documents.append(document)
        row = (document.name, country, *(facts()[country].cells[column] for column in GEOGRAPHY[:1]))
        brief = f"{document.name}: the country whose geography it describes"
        items.append(Item(row, (), 1 + place + 1 + _effort(knobs, rng), (document.name,), brief))
    gold = Table(("Document", "Place", GEOGRAPHY[0]), tuple(item.row for item in items))
    lines = [f"- {document.name}" for document in documents]
    question = "\n".join(
        [
            "Each of these documents describes the geography of one country somewhere among other texts:",
            *lines,
            f"Answer with one Markdown table with the columns {', '.join(gold.columns)}: the document, the country and"
            " its total area as a plain number.",
        ]
    )
    columns = tuple(_rule(column) for column in gold.columns)
    return SwarmTask(
        name, "longdoc", question, gold, columns, tuple(items), _corpus(documents, knobs, rng), knobs.reliability
    )


def _page(leads: tuple[str, ...], rng: np.random.Generator) -> str:
    """PAGE characters of Wikipedia leads."""
    text = ""
    while len(text) < PAGE:
        text += leads[int(rng.integers(len(leads)))] + "\n\n"
    return text[:PAGE]


def _download(name: str, knobs: Knobs, rng: np.random.Generator) -> SwarmTask:
    leads = wiki_documents("train")
    items, documents = [], []
    for k in sorted(int(k) for k in rng.choice(len(leads), knobs.items, replace=False)):
        document = Document(f"wiki/{k}.txt", leads[k])
        data = document.text.encode()
        documents.append(document)
        row = (document.name, hashlib.sha256(data).hexdigest()[:16], str(len(data)))
        items.append(Item(row, (), 2 + _effort(knobs, rng), (document.name,), f"{document.name}: checksum and length"))
    gold = Table(("Document", "SHA-256", "Bytes"), tuple(item.row for item in items))
    question = "\n".join(
        [
            "Fetch these documents:",
            *(f"- {document.name}" for document in documents),
            "Answer with one Markdown table with the columns Document, SHA-256 (of it the first 16 hexadecimal digits)"
            " and Bytes.",
        ]
    )
    columns = tuple(_rule(column) for column in gold.columns)
    return SwarmTask(
        name, "download", question, gold, columns, tuple(items), _corpus(documents, knobs, rng), knobs.reliability
    )

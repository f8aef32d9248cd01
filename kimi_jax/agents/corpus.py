"""A folder of documents that agents search (BM25) and read: text, Markdown, saved web pages, and lines of JSON.

A document's identifier is its path inside the folder, and for a line of a .jsonl file ({"title", "text"}) the path and
the line, `wiki.jsonl#17`. Identifiers are what answers cite. Nothing outside the folder can be read: identifiers are
looked up among the documents that were found when the folder was opened, and links that lead out of it were not.

Tokens of the index are stemmed words (PyStemmer), scores those of bm25s with its defaults.
"""

import html.parser
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_jax.agents.tools import Tool, ToolError, ToolResult, from_function
from kimi_jax.untrusted import describe, open_regular, parse_object, refusing

SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".jsonl")
MAX_FILE = 1 << 26  # bytes of one file, and of one line
MAX_DOCUMENTS = 1_000_000
MAX_QUERIES, MAX_QUERY = 16, 1000  # queries of one call, characters of a query
SNIPPET = 300  # characters around the first word that was found
_WORD = re.compile(r"\w+")


class CorpusError(ValueError):
    """The folder cannot be searched."""


@dataclass(frozen=True)
class DocumentLocation:
    """Where a document lies: bytes `start` to `start + length` of a file, and its title."""

    path: Path
    start: int
    length: int
    title: str


class Corpus:
    """An index of a folder. Reading happens when it is made, which takes about 0.2 ms a document.

    Raises CorpusError if the folder has no documents.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        import Stemmer

        self._bm25s, self._stem = _import_bm25s(), Stemmer.Stemmer("english")
        self.folder = Path(folder)
        self.documents: dict[str, DocumentLocation] = {}
        texts = []
        for name, document, text in _scan(self.folder):
            self.documents[name] = document
            texts.append(f"{document.title}\n{text}")
            if len(self.documents) > MAX_DOCUMENTS:
                raise CorpusError(f"{self.folder} has more than {MAX_DOCUMENTS} documents")
        if not texts:
            raise CorpusError(f"{self.folder} has no documents; those end in {', '.join(SUFFIXES)}")
        self._names = list(self.documents)
        self._index = self._bm25s.BM25()
        self._index.index(self._tokens(texts), show_progress=False)

    def _tokens(self, texts: list[str]) -> Any:
        return self._bm25s.tokenize(texts, stopwords="en", stemmer=self._stem, show_progress=False)

    def best(self, query: str, count: int) -> list[tuple[str, float]]:
        """(identifier, score) of the best documents; those without a word of the query are left out."""
        tokens = self._tokens([query])
        if not tokens.vocab:
            return []
        count = min(count, len(self._names))
        found, scores = self._index.retrieve(tokens, k=count, show_progress=False, backend_selection="numpy")
        return [(self._names[i], float(s)) for i, s in zip(found[0], scores[0], strict=True) if s > 0]

    def text(self, name: str) -> str:
        """The text of a document. Raises ToolError for a name that is none."""
        document = self.documents.get(name)
        if document is None:
            raise ToolError(f"there is no document {name[:200]!r}; use an identifier that search gave")
        try:
            with refusing(ToolError), open_regular(document.path) as stream:
                stream.seek(document.start)
                data = stream.read(document.length)
        except OSError as error:
            raise ToolError(f"{name}: {error.strerror}") from error
        return _read(document.path.suffix, data, name)[1]

    def tools(self) -> list[Tool]:
        """`search` and `read` over this corpus."""

        async def search(queries: list[str], count: int = 5) -> ToolResult:
            """Search the documents. Several queries can be given at once. Gives identifiers, titles and snippets."""
            if not queries or len(queries) > MAX_QUERIES or any(not isinstance(q, str) for q in queries):
                raise ToolError(f"give a list of 1 to {MAX_QUERIES} queries, each a text")
            parts, sources = [], []
            for query in queries:
                found = self.best(query[:MAX_QUERY], min(max(count, 1), 20))
                parts.append(f"Results for {query[:MAX_QUERY]!r}:" + ("" if found else " nothing"))
                for name, _ in found:
                    parts.append(f"[{name}] {self.documents[name].title}: {self._snippet(name, query)}")
                    sources.append(name)
            return ToolResult("\n".join(parts), tuple(dict.fromkeys(sources)))

        async def read(document: str, offset: int = 0) -> ToolResult:
            """Read a document by its identifier, from a character on (0 is the beginning)."""
            text = self.text(document)
            offset = min(max(offset, 0), len(text))
            part = text[offset : offset + 8000]
            end = f"\n[characters {offset} to {offset + len(part)} of {len(text)}]"
            return ToolResult(part + end, (document,))

        return [from_function(search), from_function(read)]

    def _snippet(self, name: str, query: str) -> str:
        text = " ".join(self.text(name).split())
        words = sorted(_WORD.findall(query), key=len, reverse=True)
        lower = text.lower()
        place = next((p for p in (lower.find(word.lower()) for word in words[:5]) if p >= 0), 0)
        begin = max(0, place - SNIPPET // 3)
        return ("..." if begin else "") + text[begin : begin + SNIPPET]


def _import_bm25s() -> Any:
    """bm25s without jax, which its import initialises: on a TPU host that would take the chips from the server."""
    if "jax" in sys.modules:  # a local model runs in this process
        import bm25s
    else:
        sys.modules["jax"] = None  # type: ignore[assignment]
        try:
            import bm25s
        finally:
            del sys.modules["jax"]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG for itself
    return bm25s


# ----------------------------------------------------------------------------------------------------------- the folder


def _scan(folder: Path) -> Iterator[tuple[str, DocumentLocation, str]]:
    """(identifier, document, text) of everything in the folder, in a fixed order."""
    if not folder.is_dir():
        raise CorpusError(f"{folder} is no folder")
    home = folder.resolve()
    for root, folders, files in os.walk(home):
        folders.sort()
        for file in sorted(files):
            path = Path(root, file)
            if path.suffix not in SUFFIXES or not path.is_file() or not path.resolve().is_relative_to(home):
                continue
            if path.stat().st_size > MAX_FILE and path.suffix != ".jsonl":
                raise CorpusError(f"{path} is larger than {MAX_FILE} bytes; split it, so that a part can be cited")
            yield from _documents(path, path.relative_to(home).as_posix())


def _documents(path: Path, name: str) -> Iterator[tuple[str, DocumentLocation, str]]:
    with refusing(CorpusError), open_regular(path) as stream:
        if path.suffix != ".jsonl":
            data = stream.read(MAX_FILE)
            title, text = _read(path.suffix, data, name)
            yield name, DocumentLocation(path, 0, len(data), title or path.stem), text
            return
        start = number = 0
        while line := stream.readline(MAX_FILE):
            number += 1
            if line.strip():
                identifier = f"{name}#{number}"
                try:
                    title, text = _read(path.suffix, line, identifier)
                except ToolError as error:
                    raise CorpusError(f"{path}: {error}") from error
                yield identifier, DocumentLocation(path, start, len(line), title or identifier), text
            start += len(line)


def _read(suffix: str, data: bytes, name: str) -> tuple[str, str]:
    """(title, text) of a document's bytes. Raises ToolError for a line that is no document."""
    if suffix == ".jsonl":
        fields = parse_object(data, name, ToolError)
        title, text = fields.get("title", ""), fields.get("text")
        if not isinstance(title, str) or not isinstance(text, str):
            raise ToolError(f"{name} needs a text, and a title that is a text, not {describe(json.dumps(fields))}")
        return title[:200], text
    text = data.decode("utf-8", "replace")
    if suffix in (".html", ".htm"):
        page = _Page()
        page.feed(text)
        page.close()
        return page.title.strip()[:200], page.text()
    first = text.lstrip().split("\n", 1)[0].lstrip("# ").strip()
    return first[:200], text


class _Page(html.parser.HTMLParser):
    """The text of a web page: without scripts and styles, a line for each block, links with their targets."""

    BLOCKS = frozenset(("p", "div", "br", "li", "tr", "table", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article",
                        "header", "footer", "ul", "ol", "dl", "dt", "dd", "pre"))  # fmt: skip
    SILENT = frozenset(("script", "style", "template", "noscript", "svg"))

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self._parts: list[str] = []
        self._silent = 0
        self._in_title = False
        self._links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SILENT:
            self._silent += 1
        elif tag == "title":
            self._in_title = True
        elif tag == "a":
            self._links.append((dict(attrs).get("href") or "")[:500])
            self._parts.append("[")
        elif tag in ("td", "th"):
            self._parts.append(" | ")
        elif tag in self.BLOCKS:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag == "title":
            self._in_title = False
        elif tag == "a" and self._links:
            self._parts.append(f"]({self._links.pop()})")
        elif tag in self.BLOCKS:
            self._parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._silent:
            self._parts.append(data)

    def text(self) -> str:
        """What is left, with at most one empty line between blocks."""
        lines = [" ".join(line.split()) for line in "".join(self._parts).splitlines()]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

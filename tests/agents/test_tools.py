"""Tools: schemas from functions, checked arguments, limits; the corpus: search, reading, nothing outside the folder."""

import contextlib
import json
import subprocess
import sys

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.agents.corpus import Corpus, CorpusError
from kimi_jax.agents.tools import ToolError, Toolset, check_arguments, from_function
from tests.environment import REPO

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}, "required": ["a"]}


def call(tool, arguments):
    return anyio.run(Toolset.of(tool).call, tool.name, json.dumps(arguments))


def test_tool_is_declared_by_its_signature():
    def greet(name: str, times: int = 1, loud: bool = False, others: list[str] = ()) -> str:
        """Says hello."""
        return " ".join([name] * times)

    tool = from_function(greet)
    assert tool.declaration == {
        "name": "greet",
        "description": "Says hello.",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "times": {"type": "integer"},
                "loud": {"type": "boolean"},
                "others": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["name"],
        },
    }
    assert call(tool, {"name": "x", "times": 2}).text == "x x"


def test_tool_without_type_hints_is_refused():
    def f(x):
        return x

    with pytest.raises(TypeError, match=r"f\(x\) needs a type hint"):
        from_function(f)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ("{}", "lack a"),
        ('{"a": "1"}', "type integer"),
        ('{"a": true}', "type integer"),
        ('{"a": 1, "c": 2}', "no argument 'c'"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1, "b": ' + "[" * 100 + "]" * 100 + "}", "nested deeper"),
        ('{"a": 1, "b": "' + "x" * (1 << 20) + '"}', "larger"),
    ],
)
def test_tool_arguments_of_another_form_are_refused(text, reason):
    with pytest.raises(ToolError, match=reason):
        check_arguments(text, SCHEMA)


@given(st.text(max_size=200))
def test_tool_arguments_are_checked_or_refused_and_nothing_else(text):
    with contextlib.suppress(ToolError):
        assert isinstance(check_arguments(text, SCHEMA)["a"], int)


def test_tool_trouble_is_a_text_for_the_model():
    def broken() -> str:
        """Breaks."""
        raise KeyError("x" * 5000)

    async def slow() -> str:
        """Hangs."""
        await anyio.sleep_forever()

    result = call(from_function(broken), {})
    assert result.status == "error" and "KeyError" in result.text and len(result.text) <= 1000
    result = call(from_function(slow, timeout=0.01), {})
    assert result.status == "timeout" and "0.01 s" in result.text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_text("the secret of the glacier")
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "geo").mkdir()
    (folder / "geo" / "ghana.txt").write_text("# Ghana\nAccra is the capital of Ghana. " + "It is a city. " * 1000)
    (folder / "page.html").write_text(
        "<html><head><title>Rivers &amp; lakes</title><script>alert('glacier')</script></head>"
        "<body><h1>Rivers</h1><p>The <a href='geo/ghana.txt'>Volta</a> flows.</p><table><tr><td>a<td>b</table></body>"
    )
    lines = [{"title": "Peru", "text": "Lima is the capital of Peru."}, {"text": "Glaciers melt."}]
    (folder / "wiki.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "link.txt").symlink_to(outside)
    (folder / "image.png").write_bytes(b"\x89PNG")
    return Corpus(folder)


def test_corpus_finds_documents_of_every_kind(corpus):
    assert list(corpus.documents) == ["page.html", "wiki.jsonl#1", "wiki.jsonl#2", "geo/ghana.txt"]
    assert [name for name, _ in corpus.best("capital", 5)] == ["wiki.jsonl#1", "geo/ghana.txt"]
    assert corpus.best("river flowing", 5)[0][0] == "page.html", "words are stemmed"
    assert corpus.best("glacier", 5)[0][0] == "wiki.jsonl#2", "scripts and links out of the folder are not searched"
    assert corpus.best("quantum", 5) == [] and corpus.best("the of", 5) == []


def test_corpus_leaves_jax_alone(corpus):
    """A swarm beside a server must not take the host's chips, and bm25s initialises jax where it finds it."""
    code = f"import sys; from kimi_jax.agents.corpus import Corpus; Corpus({str(corpus.folder)!r}).best('ghana', 3); "
    line = [sys.executable, "-c", code + "assert 'jax' not in sys.modules; import jax"]
    subprocess.run(line, cwd=REPO, check=True)


def test_corpus_text_of_a_page_keeps_its_links(corpus):
    assert corpus.text("page.html") == "Rivers\n\nThe [Volta](geo/ghana.txt) flows.\n\n| a | b"
    assert corpus.documents["page.html"].title == "Rivers & lakes"


def test_corpus_search_takes_several_queries_and_names_its_sources(corpus):
    search, _ = corpus.tools()
    result = call(search, {"queries": ["capital of Peru", "quantum"], "count": 1})
    assert "[wiki.jsonl#1] Peru: Lima is the capital" in result.text and "'quantum': nothing" in result.text
    assert result.sources == ("wiki.jsonl#1",)
    assert call(search, {"queries": []}).status == "error"
    assert call(search, {"queries": [3]}).status == "error"


def test_corpus_reads_on_from_an_offset(corpus):
    _, read = corpus.tools()
    whole = corpus.text("geo/ghana.txt")
    first, second = (call(read, {"document": "geo/ghana.txt", "offset": i}).text for i in (0, 8000))
    assert first.rsplit("\n", 1)[0] + second.rsplit("\n", 1)[0] == whole
    assert second.endswith(f"[characters 8000 to {len(whole)} of {len(whole)}]")


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "link.txt", "image.png", "", "wiki.jsonl#3"])
def test_corpus_reads_nothing_else(corpus, name):
    _, read = corpus.tools()
    result = call(read, {"document": name})
    assert result.status == "error" and "no document" in result.text


def test_corpus_without_documents_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="no documents"):
        Corpus(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"title": "no text"}')
    with pytest.raises(CorpusError, match=r"x.jsonl#1 needs a text"):
        Corpus(tmp_path)

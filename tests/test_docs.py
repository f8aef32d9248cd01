"""Docs: every link, path, function and test that a page or a docstring names exists in the clone."""

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.environment import REPO
from tests.test_style import rel, tracked

PAGES = [p for p in tracked() if p.suffix == ".md"]
SOURCES = [
    p for p in tracked() if p.suffix in (".py", ".md", ".sh", ".toml", ".ipynb") or p.name in ("Makefile", "run")
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CITED_PAGE = re.compile(r"[\w./-]*\w\.md\b")
OUTSIDE = re.compile(r"(?<!jax )\b[Ii]ssue \d+\b|shared/docs")  # a tracker or a folder that no clone has
CODE = re.compile(r"`((?:kimi_jax|tests|configs|benchmarks|experiments)/[\w./-]+)(?::{1,2}(\w+))?`")

OWN = "configs/mine.py"  # a file that the reader is told to write


@functools.cache
def definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))}


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=rel)
def test_links_of_a_page_resolve_inside_the_clone(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists() and found.is_relative_to(REPO), f"{rel(page)}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(found), f"{rel(page)}: {target}: {rel(found)} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=rel)
def test_code_that_a_page_names_exists(page):
    for name, function in CODE.findall(page.read_text(encoding="utf-8")):
        if name == OWN:
            continue
        path = REPO / name
        assert path.exists(), f"{rel(page)}: there is no {name}"
        if function:
            assert function in definitions(path), f"{rel(page)}: {name} has no {function}"


SECTION = re.compile(r"(\w+\.md),? sections? (\d+(?:\.\d+)*)((?:(?:,| and| to) \d+(?:\.\d+)*)*)")


def test_sections_that_are_cited_exist():
    """Where a page is cited by the number of a section, it has such a heading. The number may be on the next line."""
    headings = {p.name: re.findall(r"(?m)^#+ (\d+(?:\.\d+)*)\.? ", p.read_text(encoding="utf-8")) for p in PAGES}
    met = 0
    for path in (p for p in SOURCES if p.name != Path(__file__).name):
        text = re.sub(r"\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))
        for page, first, others in SECTION.findall(text):
            for number in [first, *re.findall(r"\d+(?:\.\d+)*", others)]:
                met += 1
                assert number in headings.get(page, ()), (
                    f"{rel(path)} cites section {number} of {page}: no such heading"
                )
    assert met > 80


@pytest.mark.parametrize(
    ("term", "file", "name"),
    [
        ("FSDP", "kimi_jax/kernels/fsdp.py", "fsdp_matmul"),
        ("reduce-scatter", "kimi_jax/kernels/fsdp.py", "reduce_scatter"),
        ("prefix cache", "kimi_jax/infer/cache.py", "PagePool"),
        ("loss mask", "kimi_jax/data/conversation.py", "encode"),
        ("gradient accumulation", "kimi_jax/train/step.py", "gradients"),
        ("capacity_factor", "kimi_jax/kernels/moe/expert_parallel.py", "expert_parallel"),
        ("routing replay", "kimi_jax/data/routing.py", "RoutingShape"),
        ("packed batch", "kimi_jax/packed_batch.py", "PackedBatch"),
    ],
)
def test_term_of_the_field_leads_to_the_file_that_defines_it(term, file, name):
    """A reader who greps for the term meets it in that file, in the docstring of the file or of the definition."""
    tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
    assert nodes, f"{file} has no {name}"
    said = " ".join(ast.get_docstring(n) or "" for n in (tree, *nodes)).lower()
    assert term.lower() in re.sub(r"\s+", " ", said), f"{file} never says {term!r}"


def test_citations_lead_to_a_page_of_the_clone():
    pages = {rel(p) for p in PAGES} | {p.name for p in PAGES}
    for path in SOURCES:
        if path.name == Path(__file__).name:
            continue
        text = path.read_text(encoding="utf-8")
        bad = [
            c
            for c in CITED_PAGE.findall(text)
            if c.removeprefix("./") not in pages and c.rsplit("/", 1)[-1] not in pages
        ]
        assert not bad, f"{rel(path)} cites {bad[0]}, which is not in the repository"
        outside = OUTSIDE.search(text)
        assert not outside, f"{rel(path)} cites {outside.group()!r}, which no clone has"

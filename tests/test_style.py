"""Style that a linter does not know: file length, which package may import which, no machine paths."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.environment import REPO

MAX_LINES = 500
PACKAGE = sorted((REPO / "kimi_jax").rglob("*.py"))
# package -> modules of kimi_jax that its files may not import
FORBIDDEN = {
    "nn": ("data", "train", "eval", "optim", "sharding", "hf", "infer", "rl", "agents", "cli", "report"),
    "kernels": ("nn", "data", "train", "eval", "optim", "sharding", "cli", "report"),
    "data": ("nn", "train", "eval", "optim", "kernels", "sharding"),
    "optim": ("train", "eval", "data", "cli", "report"),
}
# entry points beside the files __main__.py: what a user runs, or another program loads
COMMANDS = (
    "kimi_jax/data/inspect.py", "kimi_jax/data/vocabulary.py", "kimi_jax/eval/conversations.py",
    "kimi_jax/eval/lm_eval_adapter.py", "kimi_jax/rl/orchestrator_page.py", "kimi_jax/rl/page.py",
)  # fmt: skip
# third-party packages that a package may not import, not even inside a function
FORBIDDEN_LIBRARIES = {
    "data": ("jax", "flax", "optax", "orbax", "torch"),
    "packed_batch.py": ("jax", "flax"),
    "nn": ("torch", "tensorflow", "grain", "etils"),
}
# the only packages that may import an optional extra
EXTRAS = {
    "tensorflow": "data/sources",
    "tensorflow_datasets": "data/sources",
    "seqio": "data/sources",
    "pyarrow": "data/sources",
    "lm_eval": "eval",
    "starlette": "serve",
    "uvicorn": "serve",
    "mcp": "agents",
    "bm25s": "agents",
    "Stemmer": "agents",
}


def rel(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def tracked() -> list[Path]:
    out = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    names = out.stdout.splitlines() if out.returncode == 0 else []
    return [REPO / name for name in names if (REPO / name).is_file()] or PACKAGE


def imports(path: Path) -> list[str]:
    """Every absolute module name that the file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{rel(path)}: relative import; write the full name"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def package(path: Path) -> str:
    return path.relative_to(REPO / "kimi_jax").parts[0]


def starts(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def test_no_long_file():
    code = [p for p in tracked() if p.suffix in (".py", ".sh", ".css") or p.name == "Makefile"]
    lengths = {rel(p): len(p.read_text(encoding="utf-8").splitlines()) for p in code}
    long = {name: n for name, n in lengths.items() if n > MAX_LINES}
    assert not long, f"files over {MAX_LINES} lines want splitting: {long}"


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_packages_import_downwards_only(path):
    names = imports(path)
    for module in FORBIDDEN.get(package(path), ()):
        bad = [n for n in names if starts(n, f"kimi_jax.{module}")]
        assert not bad, (
            f"{rel(path)} must not import {bad[0]}: dependencies point one way (docs/architecture.md section 1)"
        )
    for library in FORBIDDEN_LIBRARIES.get(package(path), ()):
        bad = [n for n in names if starts(n, library)]
        assert not bad, f"{rel(path)} must not import {bad[0]}"


def runtime_imports(path: Path) -> list[str]:
    """As `imports`, without those that only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return [f"{n.module}.{alias.name}" for n in nodes for alias in n.names]


def test_packages_import_each_other_in_no_circle():
    """Not even inside functions. Commands may import what they like: nobody imports them."""
    edges: dict[str, dict[str, str]] = {}
    for path in PACKAGE:
        if path.name == "__main__.py" or rel(path) in COMMANDS:
            continue
        own = package(path).removesuffix(".py")
        for name in runtime_imports(path):
            parts = name.split(".")
            if parts[0] == "kimi_jax" and len(parts) > 1 and parts[1] != own:
                edges.setdefault(own, {})[parts[1]] = rel(path)
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle of packages: {[*above, name]}, by {[edges[a].get(name) for a in above[-1:]]}"
        if name not in order:
            for other in edges.get(name, ()):
                visit(other, (*above, name))
            order.append(name)

    for name in sorted(edges):
        visit(name, ())
    assert (
        order.index("data") < order.index("infer") < order.index("eval") < order.index("train") < order.index("model")
    )


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_commands_are_imported_by_nobody(path):
    modules = [name.removesuffix(".py").replace("/", ".") for name in COMMANDS]
    bad = [n for n in imports(path) if path.name != "__main__.py" and any(starts(n, m) for m in modules)]
    assert not bad or rel(path) in COMMANDS, f"{rel(path)} imports the command {bad[0]}"


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_extras_stay_in_their_packages(path):
    for library, home in EXTRAS.items():
        if any(starts(n, library) for n in imports(path)):
            assert rel(path).startswith(f"kimi_jax/{home}/"), f"{library} belongs to kimi_jax/{home}"


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_files_and_public_functions_say_what_they_are(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not tree.body:
        return  # an empty __init__.py
    assert ast.get_docstring(tree), f"{rel(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{rel(path)}: {node.name} has no docstring"


@pytest.mark.parametrize("path", PACKAGE, ids=rel)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{rel(path)}: {node.name} has {length} lines"


def test_no_machine_paths():
    # assembled, so that this file does not find itself
    pattern = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/[a-z]")))
    texts = [
        p for p in tracked() if p.suffix in (".py", ".md", ".toml", ".txt", ".sh") or p.name in ("Makefile", "run")
    ]
    bad = [rel(p) for p in texts if pattern.search(p.read_text(encoding="utf-8"))]
    assert not bad, f"paths of one machine in {bad}"


def test_there_is_no_drawer_for_everything():
    assert not [rel(p) for p in PACKAGE if p.stem in ("utils", "util", "helpers", "common", "misc")]

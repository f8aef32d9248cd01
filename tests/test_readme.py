"""What README and its pages show is there: commands, make targets, settings, links and files exist; the code runs."""

import asyncio
import json
import math
import re
import subprocess
from importlib.util import find_spec

import numpy as np
import pytest

import kimi_jax as kimi
from kimi_jax.config import PRESETS, ConfigError, TrainConfig, freeze, preset, thaw
from kimi_jax.hf.names import leaf_shapes
from kimi_jax.infer.cache import page_width
from tests.environment import REPO, shared
from tests.serve.server import checkpoint

README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "docs/data.md", "docs/serving.md", "docs/tpu.md", "docs/plan.md")
TEXT = "\n".join((REPO / page).read_text(encoding="utf-8") for page in PAGES)
BLOCKS = [(kind, re.sub(r"(?m)^ {0,3}", "", body) if indent else body) for indent, kind, body in
          re.findall(r"(?ms)^( *)```(\w+)\n(.*?)^ *```", TEXT)]  # fmt: skip
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^ *```.*?^ *```", "", TEXT))


def blocks(kind: str) -> list[str]:
    return [body for k, body in BLOCKS if k == kind]


def commands() -> list[str]:
    lines = [line.strip() for body in blocks("sh") for line in body.splitlines()]
    return [line for line in lines + INLINE if line.startswith(("make ", "python ", "pip ", "source "))]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_readme_shows_its_two_commands():
    assert "```sh\nmake demo\nmake test\n```" in README


def test_readme_is_read_in_ten_minutes():
    assert len(README.splitlines()) <= 165


@pytest.mark.parametrize("command", sorted({c for c in commands() if c.startswith("make ")}))
def test_make_targets_exist(command):
    out = subprocess.run([*command.split(), "--dry-run"], cwd=REPO, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("command", sorted({c for c in commands() if c.startswith("python -m")}))
def test_commands_exist_and_their_settings_too(command):
    module, *arguments = command.split()[2:]
    spec = find_spec(module)
    assert spec is not None, f"{module} does not exist"
    if spec.submodule_search_locations:
        assert find_spec(f"{module}.__main__") is not None, f"python -m {module} would not run"
    for argument in arguments:
        if match := re.match(r"--config\.([\w.]+)=", argument):
            *parents, last = match[1].split(".")
            section = thaw(TrainConfig())
            for parent in parents:
                section = section[parent]
            assert last in section, f"no setting {match[1]}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (REPO / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, part = target.partition("#")
        file = (REPO / page).parent / path if path else REPO / page
        assert file.exists(), f"{page} links to {target}, which is not there"
        headings = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8")) if part else []
        assert not part or part in map(anchor, headings), f"{target} of {page}: no part {part}"


def test_files_that_are_named_exist():
    skip = ("configs/mine.py", "runs/", "data/mine")
    for name in INLINE:
        if re.fullmatch(r"[\w./-]+\.(py|txt|md|sh)|(kimi_jax|tests|configs|constraints)/[\w./-]*", name):
            assert name.startswith(skip) or (REPO / name).exists(), f"{name} is named, but is not there"


def test_presets_that_are_named_exist():
    listed = re.search(r'kimi\.preset\("demo"\)  # or (.*)', TEXT)[1]
    assert set(re.findall(r'"(\w+)"', listed)) | {"demo"} == set(PRESETS)


def test_sources_that_are_listed_are_all_there_are():
    from kimi_jax.data.sources import KINDS

    table = TEXT.split("Sources of `SourceConfig")[1].split("\n## ")[0]
    assert set(re.findall(r"(?m)^\| `(\w+)`", table)) == set(KINDS)


@pytest.mark.parametrize("line", [line for body in blocks("json") for line in body.splitlines()])
def test_json_lines_are_examples(line):
    from kimi_jax.data.sources.jsonl import parse_line

    record = parse_line(line.encode(), "README", REPO)
    assert record.key == json.loads(line)["id"]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
@pytest.mark.filterwarnings("ignore:.*is not the released K2.5 vocabulary")
def test_code_runs(code, tmp_path):
    """As it stands on the page; where it opens a released model, a tiny one and the released vocabulary stand in."""
    if "DIR" in code:
        code = code.replace('load("DIR"', f'load("{checkpoint(tmp_path / "tiny")}"')
        code = code.replace('load_tokenizer("DIR"', f'load_tokenizer("{shared("kimi_tokenizer")}"')
    scope: dict = {}
    exec(compile(code, "<README>", "exec"), scope)
    if "model" in scope:
        assert scope["logits"].shape == (1, 3, scope["model"].config.vocab_size) and len(scope["ids"]) > 5
        assert scope["reply"].message()["role"] == "assistant"
    elif "eight_answers" in scope:
        model = kimi.load(checkpoint(tmp_path / "tiny"))
        answers = asyncio.run(scope["eight_answers"](model, np.array([5, 6, 8], np.int32), (), model.params))
        assert len(answers) == 8 and all(answer.token_ids for answer in answers)
    elif "get_config" in scope:
        config = freeze(scope["get_config"]())
        assert config.workdir == "runs/mine"
    else:
        assert scope["y"].shape == scope["x"].shape


def test_memory_table_follows_from_the_shapes():
    rows = re.findall(
        r"(?m)^\| [\w. -]+ \| `(\w+)` \| ([\d.]+) B \| ([\d.]+) GB \| (.+?) \| ([\d.]+) kB \| (.+?) \|", TEXT
    )
    assert [row[0] for row in rows] == ["moonlight_16b_a3b", "kimi_vl_a3b", "kimi_k2_5"]
    for name, parameters, bf16, int4, token, memory in rows:
        config = preset(name)
        sizes = {leaf: math.prod(shape) for leaf, shape in leaf_shapes(config).items()}
        total, experts = sum(sizes.values()), sum(n for leaf, n in sizes.items() if ".mlp.experts." in leaf)
        packed = 2 * (total - experts) + experts * 4.5 / 8
        cache = config.num_hidden_layers * page_width(config) * 2
        assert (parameters, bf16, token) == (f"{total / 1e9:.1f}", f"{2 * total / 1e9:.1f}", f"{cache / 1e3:.1f}")
        extra = 32 * 4096 * cache  # 4 conversations for each of 8 slots
        assert memory.startswith(f"{(2 * total + extra) / 1e9:.0f} GB")
        if int4 != "not released":
            assert int4 == f"{packed / 1e9:.1f} GB"
            assert f"{(packed + extra) / 1e9:.0f} GB" in memory


def test_misspelt_setting_names_the_nearest():
    with pytest.raises(ConfigError, match="peak_lr"):
        freeze({"optimizer": {"peek_lr": 1.0}})

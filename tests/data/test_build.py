"""`python -m kimi_jax.data build`: the same bytes however often it is killed, and bad records that are named."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data import DataError
from kimi_jax.data import build as module
from kimi_jax.data.build import build
from kimi_jax.data.example import encode
from kimi_jax.data.sources import open_source
from kimi_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tests.data.sources.media import png, write_jsonl
from tests.environment import REPO


def _tree(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _jsonl(folder: Path, count: int, bad: tuple[int, ...] = ()) -> Path:
    """`count` records with an image each; those of `bad` name a file that is not there."""
    for i in range(8):
        (folder / f"{i}.png").write_bytes(png(28 + 14 * i, 42, seed=i))
    records = []
    for i in range(count):
        name = "gone.png" if i in bad else f"{i % 8}.png"
        records.append({"id": f"r{i}", "text": f"image <image> number {i}", "images": [name]})
    return write_jsonl(folder / "d.jsonl", records)


def _run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kimi_jax.data", *arguments], cwd=REPO, capture_output=True, text=True, timeout=600
    )


# `python -m kimi_jax.data ...`, killed by itself when it learns of its fifth shard, whoever is faster then
KILLED = """
import os, runpy, signal
from kimi_jax.data import build
check = build._check_bad
def kill_at_five(plan, folder, shards, limit):
    if len(shards) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    check(plan, folder, shards, limit)
build._check_bad = kill_at_five
runpy.run_module("kimi_jax.data", run_name="__main__", alter_sys=True)
"""


def test_killed_half_way_and_run_again(tmp_path):
    """kill -9 of the real command after some shards, then the same command: byte for byte what an undisturbed build
    gives, with another number of workers; the shards that were done are not written again.
    """
    source = _jsonl(tmp_path, 1200, bad=(5, 700))
    build(str(source), str(tmp_path / "whole"), workers=0, shard_size=20)
    broken = tmp_path / "broken"
    arguments = ["build", str(source), str(broken), "--shard_size=20"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments, "--workers=2"], cwd=REPO, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    counts = broken / ".build"
    done = [p for p in broken.glob("*.array_record") if (counts / f"{p.name.split('-')[1]}.json").exists()]
    assert 5 <= len(done) < 60
    assert not (broken / "dataset.json").exists()
    times = {p: p.stat().st_mtime_ns for p in done}
    again = _run(*arguments, "--workers=1")
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in done} == times
    assert _tree(broken) == _tree(tmp_path / "whole")
    assert not counts.exists()
    assert "2 missing_file" in again.stdout


def test_token_and_patch_lengths(tmp_path):
    """Lengths are those that the pipeline's own `encode` finds at the released limits."""
    source = _jsonl(tmp_path, 12)
    tokenizer = str(tmp_path / "t.json")
    train_tokenizer(["image number"], 300, tokenizer)
    manifest = build(str(source), str(tmp_path / "out"), tokenizer=tokenizer, workers=0, shard_size=5)
    stored = open_source(SourceConfig(kind="array_record", path=str(tmp_path / "out")))
    encoded = [encode(stored[i], load_tokenizer(tokenizer)) for i in range(12)]
    expected = [[len(e.tokens), sum(len(m.patches) for m in e.media)] for e in encoded]
    assert stored.lengths.tolist() == expected
    assert manifest["tokens"] == sum(t for t, _ in expected)
    assert manifest["patches"] == sum(p for _, p in expected)
    assert manifest["longest"] == {"tokens": max(t for t, _ in expected), "patches": max(p for _, p in expected)}


def test_bad_records_are_left_out_and_named(tmp_path):
    source = _jsonl(tmp_path, 30, bad=(3,))
    with source.open("a") as f:
        f.write("{\n")
    manifest = build(str(source), str(tmp_path / "out"), workers=0, shard_size=7, max_bad_fraction=0.1)
    assert manifest["records"] == 29
    assert manifest["bad"] == {"missing_file": 1, "bad_json": 1}
    named = [json.loads(line) for line in (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()]
    assert [(b["record"], b["id"], b["reason"]) for b in named] == [
        ("3", "r3", "missing_file"),
        ("30", "d.jsonl:31", "bad_json"),
    ]


def test_too_many_bad_records_stop_it_and_a_larger_share_goes_on(tmp_path):
    """It stops as soon as the share cannot be met, says why, and keeps what is done."""
    source = _jsonl(tmp_path, 40, bad=tuple(range(0, 40, 2)))
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"3 of the first 5 records are bad \(3 missing_file\)(.|\n)*r0: missing_file"):
        build(str(source), str(out), workers=0, shard_size=5)
    assert len((out / "bad_records.jsonl").read_text().splitlines()) == 3
    assert len(list(out.glob("*.array_record"))) == 1
    assert build(str(source), str(out), workers=0, shard_size=5, max_bad_fraction=0.5)["records"] == 20


def test_all_records_of_a_shard_bad(tmp_path):
    """A shard without records is a file like the others."""
    source = _jsonl(tmp_path, 9, bad=(3, 4, 5))
    build(str(source), str(tmp_path / "out"), workers=0, shard_size=3, max_bad_fraction=0.5)
    stored = open_source(SourceConfig(kind="array_record", path=str(tmp_path / "out")))
    assert [stored[i].key for i in range(len(stored))] == ["r0", "r1", "r2", "r6", "r7", "r8"]


def test_another_plan_is_refused(tmp_path):
    """Neither a finished nor a begun folder takes other settings, another source, or foreign files."""
    source = _jsonl(tmp_path, 6)
    out = str(tmp_path / "out")
    first = build(str(source), out, workers=0, shard_size=3)
    assert build(str(source), out, workers=0, shard_size=3) == first  # done already
    with pytest.raises(ConfigError, match="--shard_size"):
        build(str(source), out, workers=0, shard_size=4)
    with source.open("a") as f:
        f.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match="another source"):
        build(str(source), out, workers=0, shard_size=3)
    with pytest.raises(ConfigError, match="not empty"):
        build(str(source), str(tmp_path), workers=0)
    with pytest.raises(ConfigError, match=r"neither a \.jsonl nor"):
        build(str(tmp_path / "0.png"), out)


def test_one_builder_at_a_time(tmp_path):
    source = _jsonl(tmp_path, 3)
    plan = module.make_plan(str(source), "", 1000, "")
    with module._claimed(plan, tmp_path / "out"):
        with pytest.raises(ConfigError, match="another process"):
            build(str(source), str(tmp_path / "out"), workers=0)


def test_shard_that_was_damaged_is_written_again(tmp_path):
    """Cut short between two runs (a full disk, say): its size is not the one in its counts."""
    source = _jsonl(tmp_path, 30, bad=(29,))
    build(str(source), str(tmp_path / "whole"), workers=0, shard_size=5, max_bad_fraction=0.5)
    out = tmp_path / "out"
    with pytest.raises(DataError):
        build(str(source), str(out), workers=0, shard_size=5, max_bad_fraction=0)
    shard = out / "d-00002-of-00006.array_record"
    os.truncate(shard, shard.stat().st_size // 2)
    build(str(source), str(out), workers=0, shard_size=5, max_bad_fraction=0.5)
    assert _tree(out) == _tree(tmp_path / "whole")


def test_command_line(tmp_path):
    """Help explains, mistakes are one line for a person and not a traceback."""
    assert "inspect" in _run("--help").stdout
    help_text = _run("build", "--help").stdout
    assert "--shard_size" in help_text
    assert "DST" in help_text
    assert "did you mean 'inspect'" in _run("inspct").stderr
    assert "shard_size" in _run("build", "a", "b", "--shard_sze=3").stderr
    missing = _run("build", str(tmp_path / "gone.jsonl"), str(tmp_path / "out"))
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: no JSONL file")

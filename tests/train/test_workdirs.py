"""Two runs in one workdir, disks that cannot be written, signals before the first step: real processes each time."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import kimi_jax as kimi
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.hf.convert import from_hf
from kimi_jax.hosts import RESTART
from kimi_jax.train import checkpoint, lock
from kimi_jax.train.log import read_rows
from tests.environment import FIXTURES, REPO
from tests.train.processes import environment, make_config

# `python -m kimi_jax.train ...` that acts as a function of it is entered: "hold" says so and waits to be killed
ENTERED = """
import importlib, os, runpy, signal, sys
module, name, action = sys.argv.pop(1).split(":")
target = importlib.import_module(module)
inner = getattr(target, name)
def outer(*arguments, **named):
    if action == "hold":
        print("HOLDING", flush=True)
        signal.pause()
    os.kill(os.getpid(), getattr(signal, action))
    return inner(*arguments, **named)
setattr(target, name, outer)
runpy.run_module("kimi_jax.train", run_name="__main__", alter_sys=True)
"""
# the same, and no file can be opened while it restores its checkpoint
STARVED = """
import os, resource, runpy
from kimi_jax.train import checkpoint
inner = checkpoint.Checkpoints.restore
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
def restore(*arguments, **named):
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        return inner(*arguments, **named)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
checkpoint.Checkpoints.restore = restore
runpy.run_module("kimi_jax.train", run_name="__main__", alter_sys=True)
"""
MOUNTED = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("corpus"), steps=2)


def start(config, workdir, *program, before=(), overrides=()):
    command = [*before, sys.executable, *(program or ("-m", "kimi_jax.train")), f"--config={config}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command += [f"--config.workdir={workdir}", "--config.checkpoint.interval=1", *overrides]
    return subprocess.Popen(command, cwd=REPO, env=environment(1), **pipes)


def finish(process):
    """(status, output, errors without what Python's own warnings and the config say)."""
    out, errors = process.communicate(timeout=600)
    assert "Traceback" not in errors + out, errors
    return process.returncode, out, [line for line in errors.splitlines() if line.startswith(("error", "stopping"))]


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    status, out, _ = finish(start(config, workdir))
    assert status == 0, out
    return workdir


def test_second_run_in_a_workdir_is_refused_and_a_killed_one_leaves_no_lock(config, tmp_path):
    first = start(config, tmp_path, "-c", ENTERED, "kimi_jax.train.loop:make_train_step:hold")
    for line in first.stdout:
        if "HOLDING" in line:
            break
    status, _, errors = finish(start(config, tmp_path))
    assert status == 1 and len(errors) == 1
    assert f"another process trains in {tmp_path}: host " in errors[0] and f"process {first.pid}, since 20" in errors[0]
    first.kill()
    first.communicate()
    status, out, _ = finish(start(config, tmp_path))  # the lock of a dead process is free
    assert status == 0 and len(read_rows(tmp_path / "metrics.jsonl")) == 2, out
    assert (tmp_path / lock.NAME).read_text() == ""


class _Bucket:
    """As much of an epath.Path in a bucket as the lock uses."""

    parent = property(lambda self: self)
    text = ""

    def __truediv__(self, name):
        return self

    def __str__(self):
        return "gs://bucket/run/run.lock"

    def mkdir(self, **_):
        pass

    def exists(self):
        return True

    def read_text(self, **_):
        return self.text

    def write_text(self, text):
        self.text = text


def test_lock_in_a_bucket_says_that_it_does_not_hold_and_who_was_last(monkeypatch):
    said, bucket = [], _Bucket()
    monkeypatch.setattr(lock.epath, "Path", lambda path: bucket)
    with lock.held("gs://bucket/run", said.append):
        assert json.loads(bucket.text)["pid"] == os.getpid()
        with lock.held("gs://bucket/run", said.append):
            pass
    assert all("cannot be locked" in line for line in said)
    assert "the last one" not in said[0] and f"process {os.getpid()}, since" in said[1] and bucket.text == ""


@pytest.mark.parametrize("entered", ["kimi_jax.train.loop:make_train_step", "kimi_jax.cli:settings"])
def test_sigterm_before_the_first_step_asks_for_a_restart(config, tmp_path, entered):
    status, _, errors = finish(start(config, tmp_path, "-c", ENTERED, f"{entered}:SIGTERM"))
    assert status == RESTART == 75 and len(errors) == 1 and errors[0].startswith("stopping")


def mounted(options: str, program: str = 'exec "$@"') -> list[str]:
    """Starts what follows on a disk of its own at its first argument; skips nothing: without a mount there is none."""
    return [*MOUNTED, f'mount -t tmpfs -o {options} tmpfs "$0" && {program}']


def can_mount(folder) -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*mounted("size=1m"), str(folder), "true"]).returncode == 0


@pytest.mark.parametrize("kind", ["full", "read-only", "a file"])
def test_disk_that_cannot_be_written_at_the_start_is_one_line(config, tmp_path, kind):
    """Status 75, start again later, for what may pass; 1 for a file where the workdir has to be."""
    disk = tmp_path / "disk"
    disk.mkdir()
    workdir, before = disk / "run", []
    if kind == "a file":
        workdir.write_text("")
    elif can_mount(disk):
        fill = 'head -c 2000000 /dev/zero > "$0/filler"; mkdir "$0/run"; exec "$@"'
        before = mounted("size=1m", fill) if kind == "full" else mounted("ro,size=1m")
        before = [*before, str(disk)]
    else:
        pytest.skip("no disk can be mounted here")
    status, _, errors = finish(start(config, workdir, before=before))
    assert status == (1 if kind == "a file" else RESTART)
    assert len(errors) == 1 and f"the workdir {workdir} cannot be written" in errors[0], errors


def test_copied_workdir_is_loaded_without_the_original_tokenizer(trained, tmp_path, monkeypatch):
    """The tokenizer that the settings name is not there any more."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(trained, copy)
    for step in (copy / "checkpoints").iterdir():
        settings = json.loads((step / "config" / "metadata").read_text())
        settings["data"]["tokenizer"] = "/nowhere/tokenizer.json"
        (step / "config" / "metadata").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    model = kimi.load("elsewhere", verify=False)
    assert model.tokenizer.decode(model.tokenizer.encode("The red house")) == "The red house"
    assert checkpoint.load(str(copy), verify=False)[0].data.tokenizer == str(copy / "tokenizer")


def test_run_with_its_checkpoints_destroyed_stops_and_keeps_its_log(config, trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    log = (copy / "metrics.jsonl").read_bytes()
    for step in (copy / "checkpoints").iterdir():
        (step / "params" / "_METADATA").write_bytes(b"{}")
    status, _, errors = finish(start(config, copy))
    assert status == 1 and len(errors) == 1 and "none of the 2 checkpoints" in errors[0]
    assert (copy / "metrics.jsonl").read_bytes() == log and not (copy / "damaged_checkpoints").exists()


def test_running_out_of_file_descriptors_moves_no_checkpoint(config, trained, tmp_path):
    """A limit that is reached while the checkpoint is verified or restored: status 75, and all is as before."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    status, _, errors = finish(start(config, copy, "-c", STARVED))
    assert status == RESTART and len(errors) == 1 and "cannot be read just now" in errors[0], errors
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["1", "2"]
    assert not (copy / "damaged_checkpoints").exists()


@pytest.mark.parametrize("changed", ["tokenizer", "sequence_length"])
def test_resume_with_other_inputs_is_one_line_and_changes_nothing(config, trained, tmp_path, changed):
    other = tmp_path / "other.json"
    train_tokenizer([f"{n} quite another text of other words" for n in range(300)], 320, other)
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*") if p.is_file() and p.name != lock.NAME)
    value = {"tokenizer": str(other), "sequence_length": "48"}[changed]
    status, _, errors = finish(start(config, trained, overrides=[f"--config.data.{changed}={value}"]))
    assert status == 1 and len(errors) == 1 and (str(other) if changed == "tokenizer" else "was 64") in errors[0]
    after = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*") if p.is_file() and p.name != lock.NAME)
    assert after == before


def test_converted_checkpoint_as_a_workdir_is_refused_and_stays(config, tmp_path):
    from_hf(FIXTURES / "tiny_fp32", tmp_path / "converted")
    status, _, errors = finish(start(config, tmp_path / "converted"))
    assert status == 1 and len(errors) == 1 and "weights without an optimizer state" in errors[0]
    assert (tmp_path / "converted" / "checkpoints" / "0" / "params").is_dir()
    assert not (tmp_path / "converted" / "metrics.jsonl").exists()

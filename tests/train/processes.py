"""Starts the real processes of the tests of hosts and faults: small programs, compiled fast rather than well."""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.e2e.corpus import write_config, write_corpus
from tests.environment import COMPILE_FAST, REPO
from tests.train.tiny import CONFIG, MODEL

PROGRAM = REPO / "tests" / "train" / "host_program.py"


def make_config(folder: Path, **changes) -> Path:
    """Settings of a text and image run of few and tiny programs, on a corpus in `folder`."""
    import dataclasses

    write_corpus(folder)
    vision = dataclasses.replace(MODEL.vision, num_hidden_layers=1)
    moe = dataclasses.replace(MODEL.moe, n_routed_experts=2, num_experts_per_tok=1)
    model = dataclasses.replace(
        MODEL, vocab_size=320, num_hidden_layers=2, moe=moe, vision=vision, max_position_embeddings=64
    )
    optimizer = dataclasses.replace(CONFIG.optimizer, newton_schulz_steps=1)
    path = write_config(folder, log_interval=1, **changes)
    text = path.read_text().replace(
        "return c.thaw(", f"model = {model!r}\n    optimizer = {optimizer!r}\n    return c.thaw("
    )
    text = text.replace("model=model,", "model=model, optimizer=optimizer,")
    names = "ModelConfig, MoEConfig, VisionConfig, OptimizerConfig"
    path.write_text(f"from kimi_jax.config import {names}\n{text}")
    return path


def environment(devices: int, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("KIMI_HOST")}
    return clean | {
        "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(REPO),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        **more,
    }


def start(config: Path, tasks: list, devices: int, **more: str) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), str(config), *map(json.dumps, tasks)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=REPO, env=environment(devices, **more), text=True, **pipes)


_FIRST = 20_000 + os.getpid() * 37 % 10_000
_PORTS = itertools.chain(range(_FIRST, 30_000), range(20_000, _FIRST))  # each is tried once


def free_port() -> int:
    """A port that stays free until it is used: not one that the system would give to a connection meanwhile.

    Another worker of the tests starts its search elsewhere.
    """
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no free port between 20000 and 29999")


def start_hosts(config: Path, tasks: list, count: int, devices: int, **more: str) -> list[subprocess.Popen]:
    """`count` hosts with `devices` devices each, on a port that is free."""
    names = ",".join(["127.0.0.1"] * count)
    more = {"KIMI_HOSTS": names, "KIMI_PORT": str(free_port()), "KIMI_HEARTBEAT_SECONDS": "60", **more}
    return [start(config, tasks, devices, KIMI_HOST=str(n), **more) for n in range(count)]


def results(process: subprocess.Popen) -> list:
    """What the tasks of a process returned; fails with its output if it failed."""
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, out + errors
    return [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT ")]

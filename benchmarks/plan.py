"""Kimi K2.5 on three pods: `python -m benchmarks.plan [--dir=runs/plan] [--pods=v5p:8x8x8]`.

Runs `python -m kimi_jax.plan` for each pod in a process of its own (a compilation takes gigabytes and minutes), keeps
what it prints and its JSON in --dir, and prints one table. All times are predictions from the compiled program.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

# topology -> the layout of `configs/pods.py` that is made for it
PODS = {"v5p:4x8x8": "v5p-512", "v5p:8x8x8": "v5p-1024", "v5p:8x8x16": "v5p-2048"}
HEADER = (
    "| pod | chips | mesh | rows a chip | GiB a chip | fits | compute us/token | TB sent | tokens/s/chip | MFU "
    "| compile s |"
)
FLAGS = flags.FLAGS


def define_flags() -> None:
    """Of the command line."""
    flags.DEFINE_string("dir", "runs/plan", "Where the plans go.")
    flags.DEFINE_list("pods", list(PODS), "Which pods.")


def command(pod: str, out: Path) -> list[str]:
    """The command that makes the plan of one pod."""
    where = [f"--topology={pod}", f"--json={out}"]
    return [sys.executable, "-m", "kimi_jax.plan", f"--config=configs/pods.py:kimi_k2_5@{PODS[pod]}", *where]


def row(plan: dict[str, Any]) -> str:
    """One line of the table."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1)
    memory = plan["memory"]
    gib = f"{memory['peak'] / 2**30:.1f} of {memory['available'] / 2**30:.1f}"
    fits = "yes" if memory["fits"] else "no"
    cells = [plan["topology"], str(plan["chips"]), mesh, f"{plan['rows']:g}", gib, fits]
    if "rounds" in plan:
        timed = plan["rounds"][str(plan["usual_rounds"])]
        slow, fast = timed["tokens_per_second_per_chip"]
        cells += [f"{timed['compute_us_per_token']:,.0f}", f"{timed['wire_bytes'] / 1e12:.2f}",
                  f"{slow:,.0f} to {fast:,.0f}", f"{timed['mfu'][0]:.0%} to {timed['mfu'][1]:.0%}"]  # fmt: skip
    else:
        cells += [""] * 4
    return "| " + " | ".join([*cells, f"{memory['compile_seconds']:.0f}"]) + " |"


def main(_: list[str]) -> int:
    """Makes the plans one after the other; exit status 1 if one could not be made at all."""
    folder = Path(FLAGS.dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [HEADER, "|" + " --- |" * 11]
    failed = False
    for pod in FLAGS.pods:
        out = folder / f"{pod.replace(':', '_')}.json"
        out.unlink(missing_ok=True)
        arguments = command(pod, out)
        print("$ python " + " ".join(arguments[1:]), flush=True)
        subprocess.run(arguments, check=False)
        if out.exists():
            lines.append(row(json.loads(out.read_text())[0]))
        else:
            failed = True
            lines.append(f"| {pod} | the plan failed, see above |" + " |" * 9)
    print("\nPredicted from the compiled program, nothing measured; communication overlapped not at all to wholly\n")
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    define_flags()
    app.run(main)
